"""The vectorized games against the reference, step by step, on the same random numbers."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from marl.environments.predator_prey import PredatorPrey
from marl.environments.predator_prey_settings import VARIANTS, PredatorPreySettings
from marl.environments.protocol import Observation
from tests.marl.environments import reference
from tests.marl.environments.playing import Policy, keen_actions, uniform_actions, uniform_returns

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
LARGE = ["predator_prey_m", "predator_prey_l"]  # the reference is slow
POLICIES: dict[str, Policy] = {"uniform": uniform_actions, "keen": keen_actions}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rules", [name for name in RULES if name not in LARGE])
def test_every_step_is_that_of_the_rules(rules: str, policy: str) -> None:
    assert_plays_by_the_rules(RULES[rules], policy, num_steps=100)


@pytest.mark.slow
@pytest.mark.parametrize("rules", RULES)
def test_ten_thousand_steps_are_those_of_the_rules(rules: str) -> None:
    for policy in POLICIES:
        assert_plays_by_the_rules(RULES[rules], policy, num_steps=5000)


@pytest.mark.parametrize("field", ["reward_stag", "reward_hare", "punishment", "hunter_factor", "episode_limit"])
def test_a_difference_in_the_rules_is_found(field: str) -> None:
    settings = RULES["hunters that freeze"]
    with pytest.raises(AssertionError):
        assert_plays_by_the_rules(
            settings, "keen", 300, told=replace(settings, **{field: getattr(settings, field) + 1})
        )


@pytest.mark.parametrize("change", [{"capture_freezes": False}, {"stag_catchers": 1}, {"hare_catchers": 2}])
def test_a_difference_in_what_a_capture_takes_is_found(change: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        assert_plays_by_the_rules(CROWD, "keen", 300, told=replace(CROWD, **change))


def assert_plays_by_the_rules(
    settings: PredatorPreySettings, policy: str, num_steps: int, *, told: PredatorPreySettings | None = None
) -> None:
    """Plays at least this many steps, those of all episodes together, and compares all there is to see.

    `told` is what the reference plays, where that is something else.
    """
    num_lanes, seed = 3, 5
    game = PredatorPrey(settings, num_lanes, seed=seed)
    generator = torch.Generator().manual_seed(2)
    for episode in itertools.count(1):
        streams = [reference.stream(seed, lane, episode) for lane in range(num_lanes)]
        games = [reference.Game(told or settings, settings.hunters, stream) for stream in streams]
        num_steps -= assert_same_episodes(game, games, POLICIES[policy], generator)
        if num_steps <= 0:
            break


def assert_same_episodes(
    game: PredatorPrey, games: list[reference.Game], policy: Policy, generator: torch.Generator
) -> int:
    """Plays one episode in each lane to its end and returns the number of their steps."""
    observation, num_steps = game.reset(), 0
    ended = [False] * len(games)
    assert_sees(observation, games, ended)
    while not all(ended):
        actions = policy(observation.avail_actions, generator)
        outcome = game.step(actions)
        rewards = [each.step(chosen) for each, chosen in zip(games, actions.tolist(), strict=True)]
        assert outcome.reward.tolist() == pytest.approx(rewards)
        assert outcome.terminated.tolist() == [each.terminated for each in games]
        assert outcome.truncated.tolist() == [each.truncated for each in games]
        assert_sees(outcome.observation, games, ended)
        observation, num_steps = outcome.observation, num_steps + ended.count(False)
        ended = [each.terminated or each.truncated for each in games]
    return num_steps


def assert_sees(observation: Observation, games: list[reference.Game], ended: list[bool]) -> None:
    for lane, game in enumerate(games):
        assert observation.obs[lane].tolist() == game.obs()
        assert observation.state[lane].tolist() == game.state()
        only_stay = [[False, False, False, False, True, False]] * len(game.agents)
        expected = only_stay if ended[lane] else game.avail_actions()
        assert observation.avail_actions[lane].tolist() == expected


@pytest.mark.slow
def test_the_uniform_policy_returns_what_it_returns_under_the_reference() -> None:
    """Seeds and policies are drawn apart, so only the rules can make the two agree."""
    game = PredatorPrey(DEFAULT, batch_size=500, seed=1)
    found = uniform_returns(game, num_batches=8)
    expected = torch.tensor([reference_return(episode) for episode in range(1000)])
    margin = 2.58 * expected.std() / len(expected) ** 0.5
    assert abs(found.mean() - expected.mean()) < margin, (found.mean(), expected.mean(), margin)
    assert -110 < expected.mean() < -90  # the literature's code: about -99


def reference_return(episode: int) -> float:
    game = reference.Game(DEFAULT, (), reference.stream(seed=77, lane=0, episode=episode + 1))
    generator = random.Random(episode)
    total = 0.0
    while not (game.terminated or game.truncated):
        available = game.avail_actions()
        total += game.step([generator.choice([a for a in range(6) if flags[a]]) for flags in available])
    return total
