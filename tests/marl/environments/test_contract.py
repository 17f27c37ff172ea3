"""What every environment promises, whichever game it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from marl.environments import ENVIRONMENTS, Environment, Observation, Outcome, make_environment
from marl.environments.protocol import Clock
from marl.errors import ActionError, SettingsError
from tests.marl.environments.battles import NEEDS_SMAX
from tests.marl.environments.playing import uniform_actions

LARGE = {"predator_prey_m", "predator_prey_l", "smacv2", "smac"}
COMPILED = {"smax"}  # for each number of parallel episodes, for some ten seconds
SHORT: dict[str, dict[str, Any]] = {name: {"episode_limit": 6} for name in ENVIRONMENTS if "predator" in name}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, SHORT.get(name, {})) for name in ENVIRONMENTS if name not in LARGE | COMPILED),
    ("matrix_game", {"payoff": [[[1, 2]], [[3, 4]], [[5, 6]]], "obs": "step", "state": "zeros"}),
    ("matrix_game", {"payoff": "knife", "obs": "one_hot_step", "state": "one_hot_step"}),
    ("contextual_matrix_game", {"payoffs": ["qtran", "climbing", "knife"]}),
    # Small enough for episodes to end at different times, and for every array of one row.
    ("predator_prey", {"height": 1, "width": 9, "num_agents": 3, "num_stags": 0, "num_hares": 2, "episode_limit": 40}),
]
SLOW = pytest.param("smax", {"scenario": "3m", "episode_limit": 30}, marks=[pytest.mark.slow, NEEDS_SMAX])
every_environment = pytest.mark.parametrize(("name", "options"), [*CASES, SLOW], ids=lambda value: str(value)[:40])


def played(environment: Environment, seed: int | None, extra_steps: int = 2) -> Iterator[Observation | Outcome]:
    """An episode of every lane and a few steps past the end; a lane's actions do not depend on the batch size."""
    generators = [torch.Generator().manual_seed(lane) for lane in range(environment.batch_size)]
    observation = environment.reset(seed)
    yield observation
    for _ in range(environment.spec.episode_limit + extra_steps):
        actions = [
            uniform_actions(lane[None], generator)
            for lane, generator in zip(observation.avail_actions, generators, strict=True)
        ]
        outcome = environment.step(torch.cat(actions))
        yield outcome
        observation = outcome.observation


def tensors(seen: Observation | Outcome) -> list[Tensor]:
    if isinstance(seen, Observation):
        return [seen.obs, seen.state, seen.avail_actions]
    return [*tensors(seen.observation), seen.reward, seen.terminated, seen.truncated]


def record(environment: Environment, seed: int | None, num_lanes: int = 3) -> list[Tensor]:
    """All that was seen of the first lanes of an episode."""
    return [tensor[:num_lanes].clone() for seen in played(environment, seed) for tensor in tensors(seen)]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@every_environment
def test_shapes_and_types_are_those_of_the_specification(name: str, options: dict[str, Any]) -> None:
    environment = make_environment(name, 4, **options)
    spec = environment.spec
    for seen in played(environment, seed=0):
        observation = seen if isinstance(seen, Observation) else seen.observation
        assert observation.obs.shape == (4, spec.num_agents, spec.obs_size)
        assert observation.obs.dtype == spec.obs_dtype
        assert observation.state.shape == (4, spec.state_size)
        assert observation.state.dtype == spec.state_dtype
        assert observation.avail_actions.shape == (4, spec.num_agents, spec.num_actions)
        assert observation.avail_actions.dtype == torch.bool
        assert observation.avail_actions.any(dim=2).all()
        assert all(tensor.is_contiguous() for tensor in tensors(seen))
        if isinstance(seen, Outcome):
            assert seen.reward.shape == seen.terminated.shape == seen.truncated.shape == (4,)
            assert seen.reward.dtype == torch.float32
            assert seen.terminated.dtype == seen.truncated.dtype == torch.bool
            assert not (seen.terminated & seen.truncated).any()


@every_environment
def test_a_seed_gives_the_same_episodes_again(name: str, options: dict[str, Any]) -> None:
    first = record(make_environment(name, 3, seed=9, **options), seed=None)
    environment = make_environment(name, 3, **options)
    assert same(record(environment, seed=9), first)
    assert same(record(environment, seed=9), first)


@pytest.mark.parametrize("name", ["contextual_matrix_game", "predator_prey", "qtran_predator_prey"])
def test_without_a_seed_other_episodes_follow(name: str) -> None:
    environment = make_environment(name, 20, seed=9, **SHORT.get(name, {}))
    records = [record(environment, seed, num_lanes=20) for seed in (None, None, None, 9, None, 10)]
    first, second, third, again, after, other = records
    assert same(first, again) and same(second, after)
    assert not same(first, second) and not same(second, third) and not same(first, other)


@every_environment
def test_an_episode_is_the_same_whatever_the_batch_size(name: str, options: dict[str, Any]) -> None:
    few, many = (make_environment(name, batch_size, seed=4, **options) for batch_size in (3, 8))
    for _ in range(2):
        assert same(record(few, seed=None), record(many, seed=None))


def test_the_episodes_of_a_batch_differ() -> None:
    states = make_environment("predator_prey", 50).reset().state
    assert len(states.unique(dim=0)) == 50


@every_environment
def test_ended_episodes_stay_as_they_are(name: str, options: dict[str, Any]) -> None:
    environment = make_environment(name, 6, **options)
    last: Outcome | None = None
    for seen in played(environment, seed=2, extra_steps=4):
        if isinstance(seen, Observation):
            continue
        if last is not None:
            ended = last.terminated | last.truncated
            assert not seen.reward[ended].any()
            assert torch.equal(seen.observation.obs[ended], last.observation.obs[ended])
            assert torch.equal(seen.observation.state[ended], last.observation.state[ended])
            assert seen.terminated[ended].equal(last.terminated[ended])
            assert seen.truncated[ended].equal(last.truncated[ended])
            assert seen.observation.avail_actions[ended].sum(dim=2).eq(1).all()
        last = seen
    assert last is not None and (last.terminated | last.truncated).all()


@every_environment
def test_what_was_seen_is_not_written_to_later(name: str, options: dict[str, Any]) -> None:
    environment = make_environment(name, 1, **options)
    kept = [(tensor, tensor.clone()) for seen in played(environment, seed=3) for tensor in tensors(seen)]
    kept += [(tensor, tensor.clone()) for seen in played(environment, seed=None) for tensor in tensors(seen)]
    assert all(torch.equal(tensor, copy) for tensor, copy in kept)


@every_environment
def test_any_action_of_an_ended_episode_is_ignored(name: str, options: dict[str, Any]) -> None:
    environment = make_environment(name, 2, **options)
    for _ in played(environment, seed=1, extra_steps=0):
        pass
    outcome = environment.step(torch.full((2, environment.spec.num_agents), 99))
    assert not outcome.reward.any()


@every_environment
def test_actions_that_cannot_be_taken_are_refused(name: str, options: dict[str, Any]) -> None:
    environment = make_environment(name, 2, **options)
    num_agents, num_actions = environment.spec.num_agents, environment.spec.num_actions
    fine = environment.reset(seed=0).avail_actions.long().argmax(dim=2)
    for wrong in (num_actions, -1):
        actions = fine.clone()
        actions[1, -1] = wrong
        with pytest.raises(ActionError, match=f"agent {num_agents - 1} of episode 1 took action {wrong}; available"):
            environment.step(actions)
    for actions in (fine[:, :-1], fine.float(), fine.bool(), fine[0]):
        with pytest.raises(ActionError, match=rf"integer actions of shape \(2, {num_agents}\) are needed; got"):
            environment.step(actions)
    environment.step(fine.to(torch.uint8))  # any integer type will do


def test_an_action_that_is_not_available_is_refused() -> None:
    environment = make_environment("predator_prey", 2)
    available = environment.reset(seed=0).avail_actions
    actions = available.long().argmax(dim=2)
    lane, agent, action = (~available).nonzero()[0].tolist()
    actions[lane, agent] = action
    with pytest.raises(ActionError, match=f"agent {agent} of episode {lane} took action {action}; available to it: "):
        environment.step(actions)


@every_environment
def test_a_step_before_the_first_reset_is_refused(name: str, options: dict[str, Any]) -> None:
    environment = make_environment(name, 2, **options)
    with pytest.raises(ActionError, match=r"before the first reset; call reset\(\)"):
        environment.step(torch.zeros(2, environment.spec.num_agents, dtype=torch.long))


def test_how_an_episode_ended_does_not_change_afterwards() -> None:
    nothing, all_of_them = np.zeros(2, dtype=np.bool_), np.ones(2, dtype=np.bool_)
    clock = Clock(batch_size=2, episode_limit=5)
    clock.start()
    clock.tick(np.array([True, False]), is_cut_off=np.array([False, True]))
    for is_over, is_cut_off in ((all_of_them, nothing), (nothing, all_of_them), (nothing, nothing)):
        clock.tick(is_over, is_cut_off)
        assert clock.terminated.tolist() == [True, False]
        assert clock.truncated.tolist() == [False, True]


@every_environment
def test_no_parallel_episodes_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="0 parallel episodes were asked for; at least 1 is needed"):
        make_environment(name, 0, **options)
