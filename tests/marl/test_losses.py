"""Targets and losses against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from marl.losses import best_values, greedy_actions, masked_mean, td_lambda_targets

GAMMA = 0.9


def lambda_return(rewards: list[float], next_values: list[float], ends: bool, td_lambda: float) -> float:
    """The forward view: n-step returns weighted by (1 - lambda) lambda^(n-1), the whole return by what is left."""

    def n_step(n: int) -> float:
        bootstrap = 0.0 if ends and n == len(rewards) else GAMMA**n * next_values[n - 1]
        return sum(GAMMA**k * reward for k, reward in enumerate(rewards[:n])) + bootstrap

    length = len(rewards)
    weighted = sum((1 - td_lambda) * td_lambda ** (n - 1) * n_step(n) for n in range(1, length))
    return weighted + td_lambda ** (length - 1) * n_step(length)


@st.composite
def episode_fates(draw: st.DrawFn) -> list[tuple[int, bool]]:
    return draw(st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=4))


@given(fates=episode_fates(), td_lambda=st.sampled_from([0.0, 0.6, 1.0]))
def test_targets_are_the_lambda_returns_of_episodes_that_end_or_are_cut_off_anywhere(
    fates: list[tuple[int, bool]], td_lambda: float
) -> None:
    num_steps = max(length for length, _ in fates) + 1
    shape = (len(fates), num_steps)
    reward, next_q_tot = torch.randn(shape).double(), torch.randn(shape).double()
    mask = torch.arange(num_steps) < torch.tensor([[length] for length, _ in fates])
    terminated = torch.zeros(shape, dtype=torch.bool)
    for episode, (length, ends) in enumerate(fates):
        terminated[episode, length - 1] = ends
    found = td_lambda_targets(next_q_tot, reward, terminated, mask, gamma=GAMMA, td_lambda=td_lambda)
    for episode, (length, ends) in enumerate(fates):
        for t in range(length):
            rewards, values = (x[episode, t:length].tolist() for x in (reward, next_q_tot))
            assert abs(float(found[episode, t]) - lambda_return(rewards, values, ends, td_lambda)) <= 1e-12


def test_a_time_limit_bootstraps_and_a_true_end_does_not() -> None:
    ones, mask = torch.ones(2, 1), torch.ones(2, 1, dtype=torch.bool)
    terminated = torch.tensor([[False], [True]])
    targets = td_lambda_targets(10 * ones, ones, terminated, mask, gamma=0.5, td_lambda=0.7)
    assert targets.tolist() == [[6.0], [1.0]]


@given(st.integers(1, 4), st.integers(2, 5))
def test_greedy_actions_are_the_best_of_those_available(num_agents: int, num_actions: int) -> None:
    agent_qs, avail_actions = torch.randn(7, num_agents, num_actions), torch.rand(7, num_agents, num_actions) < 0.5
    avail_actions[..., -1] = True
    actions = greedy_actions(agent_qs, avail_actions)
    for row in range(7):
        for i in range(num_agents):
            allowed = [a for a in range(num_actions) if avail_actions[row, i, a]]
            best = max(allowed, key=lambda a: float(agent_qs[row, i, a]))
            assert int(actions[row, i]) == best
            assert float(best_values(agent_qs, avail_actions)[row, i]) == float(agent_qs[row, i, best])


def test_where_nothing_is_available_values_stay_finite() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert greedy_actions(torch.randn(2, 3), nothing).tolist() == [0, 0]
    assert best_values(torch.randn(2, 3), nothing).isfinite().all()


@pytest.mark.parametrize("num_seeds", [None, 2])
def test_the_mean_is_over_the_steps_that_happened_of_each_seed(num_seeds: int | None) -> None:
    values: Tensor = torch.tensor([[1.0, 2.0, 100.0], [6.0, 100.0, 100.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    if num_seeds is None:
        assert float(masked_mean(values, mask)) == 3.0
    else:
        assert masked_mean(torch.stack([values, 2 * values]), torch.stack([mask, mask])).tolist() == [3.0, 6.0]
