from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from marl.environments import PAYOFFS, Environment, MatrixGame, TwoStepGame, make_environment
from marl.environments.payoffs import payoff_array


def all_joint_actions(environment: Environment) -> Tensor:
    spec = environment.spec
    return torch.tensor(list(itertools.product(range(spec.num_actions), repeat=spec.num_agents)))


@pytest.mark.parametrize("name", PAYOFFS)
def test_every_joint_action_earns_its_entry(name: str) -> None:
    matrix = PAYOFFS[name].matrix
    game = make_environment("matrix_game", len(matrix) * len(matrix[0]), payoff=name)
    game.reset()
    actions = all_joint_actions(game)
    outcome = game.step(actions)
    assert outcome.reward.tolist() == pytest.approx([matrix[first][second] for first, second in actions.tolist()])
    assert outcome.terminated.all() and not outcome.truncated.any()


def test_three_agents_with_different_numbers_of_actions() -> None:
    payoff = np.arange(2 * 3 * 1, dtype=np.float32).reshape(2, 3, 1)
    game = MatrixGame([payoff], batch_size=6)
    available = game.reset().avail_actions
    assert available[0].tolist() == [[True, True, False], [True, True, True], [True, False, False]]
    actions = torch.tensor([[a, b, 0] for a in range(2) for b in range(3)])
    assert game.step(actions).reward.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("payoff", [[[1, 2], [3, 4]], torch.tensor([[1, 2], [3, 4]]), np.array([[1, 2], [3, 4]])])
def test_a_payoff_can_be_lists_a_tensor_or_an_array(payoff: Any) -> None:
    assert payoff_array(payoff).tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_what_is_shown_follows_the_convention() -> None:
    shown = {"ones": [1.0] * 5, "zeros": [0.0, 0.0], "step": [0.0], "one_hot_step": [1.0, 0.0], "context": [1.0]}
    after = shown | {"step": [1.0], "one_hot_step": [0.0, 1.0]}
    for obs, state in itertools.product(shown, repeat=2):
        game = make_environment("matrix_game", 1, obs=obs, state=state)
        first = game.reset()
        assert (first.obs.tolist(), first.state.tolist()) == ([[shown[obs]] * 2], [shown[state]])
        last = game.step(torch.zeros(1, 2, dtype=torch.long)).observation
        assert (last.obs.tolist(), last.state.tolist()) == ([[after[obs]] * 2], [after[state]])


def test_the_context_shown_is_the_one_that_pays() -> None:
    game = MatrixGame(["qtran", "climbing", "knife"], batch_size=300, obs="context", state="context", seed=2)
    observation = game.reset()
    contexts = observation.state.argmax(dim=1)
    assert torch.equal(observation.obs.argmax(dim=2), contexts[:, None].expand(-1, 2))
    actions = torch.randint(3, (300, 2))
    earned = game.step(actions).reward
    tables = torch.stack([torch.from_numpy(payoff_array(name)) for name in ("qtran", "climbing", "knife")])
    assert torch.equal(earned, tables[contexts, actions[:, 0], actions[:, 1]])
    assert contexts.bincount().tolist() == pytest.approx([100, 100, 100], abs=30)


def test_best_returns() -> None:
    assert MatrixGame(["knife"], 1).max_return == 12.0
    assert MatrixGame(["two_state_1", "two_state_2"], 1).max_return == 10.0
    assert TwoStepGame(["two_step_a", "two_step_b"], 1).max_return == 8.0


def test_the_first_agent_chooses_what_the_second_step_is_about() -> None:
    game = make_environment("two_step_game", 16)
    game.reset()
    plans = torch.tensor(list(itertools.product(range(2), repeat=4)))
    first = game.step(plans[:, :2])
    assert not first.reward.any() and not first.terminated.any()
    assert torch.equal(first.observation.state.argmax(dim=1), 1 + plans[:, 0])
    second = game.step(plans[:, 2:])
    expected = [[7.0, 7.0, 7.0, 7.0], [0.0, 1.0, 1.0, 8.0]]
    assert second.reward.tolist() == [expected[a][2 * c + d] for a, _, c, d in plans.tolist()]
    assert second.terminated.all() and not second.truncated.any()
    assert not second.observation.state.any()
    assert not game.step(plans[:, 2:]).reward.any()


def test_text_is_the_payoff_in_question() -> None:
    game = make_environment("two_step_game", 2)
    game.reset()
    assert game.text() == "choosing among 2 payoffs"
    game.step(torch.tensor([[0, 0], [1, 0]]))
    assert game.text(1) == "[[0. 1.]\n [1. 8.]]"
