"""A padded game is the game itself, in larger tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from marl.environments import Task, TaskSequence, make_environment
from marl.environments.padding import Padded
from marl.errors import ActionError, SettingsError
from tests.marl.environments.playing import uniform_actions

SMALL: dict[str, Any] = {"height": 3, "width": 3, "num_agents": 2, "num_stags": 1, "episode_limit": 6}
LARGER = {"agents": 3, "actions": 8, "obs": 80, "state": 30, "steps": 9}


def test_padding_adds_zeros_idle_agents_and_actions_nobody_has_and_changes_nothing_else() -> None:
    plain, padded = (
        make_environment("predator_prey", 4, **SMALL),
        Padded(make_environment("predator_prey", 4, **SMALL), LARGER),
    )
    assert (padded.spec.num_agents, padded.spec.num_actions, padded.spec.episode_limit) == (3, 8, 9)
    assert padded.spec.obs_dtype == torch.uint8
    seen, larger, generator = plain.reset(3), padded.reset(3), torch.Generator().manual_seed(0)
    for _ in range(6):
        assert torch.equal(larger.obs[:, :2, :75], seen.obs) and torch.equal(larger.state[:, :27], seen.state)
        assert torch.equal(larger.avail_actions[:, :2, :6], seen.avail_actions)
        assert not larger.obs[:, 2].any() and not larger.obs[..., 75:].any() and not larger.state[:, 27:].any()
        assert larger.avail_actions[:, 2].nonzero()[:, 1].tolist() == [0] * 4
        assert not larger.avail_actions[:, :2, 6:].any()
        assert larger.obs.dtype == torch.uint8
        actions = uniform_actions(larger.avail_actions, generator)
        one, other = plain.step(actions[:, :2]), padded.step(actions)
        assert torch.equal(one.reward, other.reward)
        assert torch.equal(one.terminated, other.terminated) and torch.equal(one.truncated, other.truncated)
        seen, larger = one.observation, other.observation
    assert (other.terminated | other.truncated).all()
    assert padded.text(1) == plain.text(1)


@pytest.mark.parametrize("actions", [[[0, 0, 1]], [[0, 7, 0]], [[0, 0]]])
def test_what_nobody_can_do_is_refused(actions: list[list[int]]) -> None:
    padded = Padded(make_environment("matrix_game", 1), {"agents": 3, "actions": 8})
    padded.reset()
    with pytest.raises(ActionError):
        padded.step(torch.tensor(actions))


@pytest.mark.parametrize(
    ("pad", "message"),
    [
        ({"state": 26}, "pad.state is 26; the game has 27"),
        ({"obs": 80.0}, "pad.obs is 80.0"),
        ({"grid": 9}, "pad has no size 'grid'"),
    ],
)
def test_sizes_that_are_none_are_refused(pad: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Task("small", "predator_prey", SMALL, pad=pad).make(1)


def test_the_error_for_games_of_several_sizes_says_what_to_pad_them_to() -> None:
    large = Task("large", "predator_prey", SMALL | {"height": 4})
    small = Task("small", "predator_prey", SMALL | {"obs_radius": 3})
    sizes = {"agents": 2, "actions": 6, "obs": 147, "state": 36}
    with pytest.raises(SettingsError, match=f"pad each task to {sizes}"):
        TaskSequence((small, large))
    padded = TaskSequence(tuple(Task(each.name, each.environment, each.options, pad=sizes) for each in (small, large)))
    assert padded.spec.state_size == 36
