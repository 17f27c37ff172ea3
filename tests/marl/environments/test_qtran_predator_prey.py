from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from marl.environments.qtran_predator_prey import QTRAN_VARIANTS, QtranPredatorPrey, QtranPredatorPreySettings
from marl.errors import SettingsError
from tests.marl.environments import qtran_reference, reference
from tests.marl.environments.playing import uniform_actions

CROWD = QtranPredatorPreySettings(height=3, width=5, num_agents=7, num_prey=5, obs_radius=2, episode_limit=20)
RULES = {**QTRAN_VARIANTS, "crowd": CROWD, "one free cell": replace(CROWD, height=1, width=13)}


@pytest.mark.parametrize("rules", RULES)
def test_every_step_is_that_of_the_rules(rules: str) -> None:
    assert_plays_by_the_rules(RULES[rules], num_episodes=4)


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES)
def test_ten_thousand_steps_are_those_of_the_rules(rules: str) -> None:
    settings = RULES[rules]
    assert_plays_by_the_rules(settings, num_episodes=-(-10_000 // (3 * settings.episode_limit)))


@pytest.mark.parametrize("change", [{"penalty": 0.25}, {"episode_limit": 19}])
def test_a_difference_in_the_rules_is_found(change: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        assert_plays_by_the_rules(CROWD, num_episodes=2, told=replace(CROWD, **change))  # type: ignore[arg-type]


def assert_plays_by_the_rules(
    settings: QtranPredatorPreySettings, num_episodes: int, told: QtranPredatorPreySettings | None = None
) -> None:
    game = QtranPredatorPrey(settings, batch_size=3, seed=11)
    generator = torch.Generator().manual_seed(0)
    for episode in range(1, num_episodes + 1):
        games = [qtran_reference.Game(told or settings, reference.stream(11, lane, episode)) for lane in range(3)]
        observation = game.reset()
        for _ in range(settings.episode_limit):
            assert observation.obs.tolist() == [each.obs() for each in games]
            assert observation.state.tolist() == [each.state() for each in games]
            actions = uniform_actions(observation.avail_actions, generator)
            outcome = game.step(actions)
            rewards = [each.step(chosen) for each, chosen in zip(games, actions.tolist(), strict=True)]
            assert outcome.reward.tolist() == pytest.approx(rewards)
            assert not outcome.terminated.any()
            assert outcome.truncated.tolist() == [each.truncated for each in games]
            observation = outcome.observation


def test_nothing_happens_past_the_time_limit() -> None:
    game = QtranPredatorPrey(replace(CROWD, episode_limit=1), batch_size=2)
    game.reset()
    last = game.step(torch.zeros(2, 7, dtype=torch.long))
    assert last.observation.avail_actions.all()  # the time limit is bootstrapped from these
    past = game.step(torch.zeros(2, 7, dtype=torch.long))
    assert past.reward.tolist() == [0.0, 0.0]
    assert past.truncated.all() and not past.terminated.any()
    assert torch.equal(past.observation.state, last.observation.state)
    assert past.observation.avail_actions.sum(dim=2).eq(1).all()


def test_a_full_grid_is_refused_because_captured_prey_has_nowhere_to_go() -> None:
    with pytest.raises(SettingsError, match="6 animals leave no cell free of 6; enlarge"):
        QtranPredatorPreySettings(height=2, width=3, num_agents=4, num_prey=2)
