from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from marl.environments import make_environment
from marl.environments.pettingzoo import ForPettingZoo
from marl.errors import ActionError, SettingsError
from tests.marl.environments.test_contract import CASES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the tests of PettingZoo import a game in the old way
    from pettingzoo.test import parallel_api_test, parallel_seed_test

every_environment = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value)[:40])


@every_environment
def test_ours_pass_pettingzoos_api_test(name: str, options: dict[str, Any]) -> None:
    parallel_api_test(ForPettingZoo(make_environment(name, 1, **options)), num_cycles=100)


@pytest.mark.parametrize("name", ["matrix_game", "contextual_matrix_game", "two_step_game", "qtran_predator_prey"])
def test_ours_pass_pettingzoos_seed_test(name: str) -> None:
    """Those in which every action is available: the test does not look at masks."""
    parallel_seed_test(lambda: ForPettingZoo(make_environment(name, 1)), num_cycles=10)


def test_what_is_handed_out_is_what_the_environment_shows() -> None:
    original = make_environment("predator_prey_tiny", 1)
    game = ForPettingZoo(make_environment("predator_prey_tiny", 1))
    observation, (shown, _) = original.reset(seed=4), game.reset(seed=4)
    for _ in range(original.spec.episode_limit):
        for index, agent in enumerate(game.agents):
            assert shown[agent]["observation"].tolist() == observation.obs[0, index].tolist()
            assert shown[agent]["action_mask"].tolist() == observation.avail_actions[0, index].int().tolist()
            assert game.observation_space(agent).contains(shown[agent])
        assert np.array_equal(game.state(), observation.state[0].numpy())
        assert game.state_space.contains(game.state())
        assert game.render() == original.text()
        actions = {agent: int(game.action_space(agent).sample(shown[agent]["action_mask"])) for agent in game.agents}
        outcome = original.step(torch.tensor([list(actions.values())]))
        shown, rewards, terminated, truncated, _ = game.step(actions)
        observation = outcome.observation
        assert set(rewards.values()) == {outcome.reward.item()}
        assert set(terminated.values()) == {outcome.terminated.item()}
        assert set(truncated.values()) == {outcome.truncated.item()}
        if outcome.terminated or outcome.truncated:
            break
    assert game.agents == []


def test_an_action_that_is_not_available_is_refused() -> None:
    game = ForPettingZoo(make_environment("matrix_game", 1))
    game.reset()
    with pytest.raises(ActionError, match="agent 1 of episode 0 took action 3; available to it: 0, 1, 2"):
        game.step({"agent_0": 0, "agent_1": 3})


def test_several_parallel_episodes_are_refused() -> None:
    with pytest.raises(SettingsError, match="one episode at a time; found 2, make one with batch_size=1"):
        ForPettingZoo(make_environment("matrix_game", 2))
