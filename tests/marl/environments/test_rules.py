"""The vectorized games against the reference, step by step, on the same random numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from marl.environments.predator_prey import PredatorPrey
from marl.environments.predator_prey_settings import VARIANTS, PredatorPreySettings
from marl.environments.protocol import Observation
from tests.marl.environments import reference
from tests.marl.environments.playing import keen_actions, uniform_actions, uniform_returns

DEFAULT = VARIANTS["predator_prey"]
CROWD = replace(DEFAULT, height=5, width=6, num_agents=7, num_stags=6, num_hares=5, episode_limit=40)
RULES = {
    **VARIANTS,
    "crowd": CROWD,
    "crowd without freezing": replace(CROWD, capture_freezes=False),
    "three for a stag, two for a hare": replace(CROWD, stag_catchers=3, hare_catchers=2, punishment=-0.5),
    "hunters that freeze": replace(CROWD, num_hunters=3, hunter_factor=3.0),
    "blind": replace(CROWD, obs_radius=0),
    "full grid": PredatorPreySettings(height=2, width=3, num_agents=3, num_stags=1, num_hares=2, episode_limit=20),
    "one column": PredatorPreySettings(height=9, width=1, num_agents=3, num_stags=2, episode_limit=30, obs_radius=4),
    "wide view": replace(CROWD, obs_radius=6),
}
POLICIES = {"uniform": uniform_actions, "keen": keen_actions}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rules", RULES)
def test_every_step_is_that_of_the_rules(rules: str, policy: str) -> None:
    assert_plays_by_the_rules(RULES[rules], policy, num_steps=300)


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES)
def test_ten_thousand_steps_are_those_of_the_rules(rules: str) -> None:
    for policy in POLICIES:
        assert_plays_by_the_rules(RULES[rules], policy, num_steps=5000)


def assert_plays_by_the_rules(settings: PredatorPreySettings, policy: str, num_steps: int, batch_size: int = 3) -> None:
    """Plays at least `num_steps` steps, counted over the batch's episodes, and compares all there is to see."""
    game = PredatorPrey(settings, batch_size, seed=5)
    generator = torch.Generator().manual_seed(2)
    episode = 0
    while num_steps > 0:
        episode += 1
        games = [
            reference.Game(settings, settings.hunters, reference.stream(5, lane, episode)) for lane in range(batch_size)
        ]
        observation = game.reset()
        assert_sees(observation, games, ended=[False] * batch_size)
        while not all(each.terminated or each.truncated for each in games) and num_steps > 0:
            ended = [each.terminated or each.truncated for each in games]
            actions = POLICIES[policy](observation.avail_actions, generator)
            outcome = game.step(actions)
            rewards = [each.step(chosen) for each, chosen in zip(games, actions.tolist(), strict=True)]
            assert outcome.reward.tolist() == pytest.approx(rewards)
            assert outcome.terminated.tolist() == [each.terminated for each in games]
            assert outcome.truncated.tolist() == [each.truncated for each in games]
            observation = outcome.observation
            assert_sees(observation, games, ended)
            num_steps -= ended.count(False)


def assert_sees(observation: Observation, games: list[reference.Game], ended: list[bool]) -> None:
    for lane, game in enumerate(games):
        assert observation.obs[lane].tolist() == game.obs()
        assert observation.state[lane].tolist() == game.state()
        only_stay = [[False, False, False, False, True, False]] * len(game.agents)
        expected = only_stay if ended[lane] else game.avail_actions()
        assert observation.avail_actions[lane].tolist() == expected


def test_a_wrong_rule_is_found() -> None:
    """The comparison above can fail: here on the smallest of the differences between two rules."""
    game = replace(CROWD, punishment=-1.5)
    with pytest.raises(AssertionError):
        compare_with = PredatorPreySettings.hunters.fget
        assert compare_with is None or assert_plays_by_the_rules(game, "keen", 300) is not None
