"""Penalties and UPGD, worked out by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from neuronsurgery import surgery
from neuronsurgery.errors import ModelError, OptimizerError
from neuronsurgery.pytorch.upgd import UPGD


def layer(rows: list[list[float]], bias: list[float]) -> Any:
    model: Any = nn.Linear(len(rows[0]), len(rows))
    with torch.no_grad():
        model.weight.copy_(torch.tensor(rows)), model.bias.copy_(torch.tensor(bias))
    return model


def test_regenerative_penalty_is_the_squared_distance_to_the_first_weights() -> None:
    model = layer([[3.0, 4.0]], [1.0])
    penalty = surgery.regenerative_regularizer(model, 0.5)
    assert penalty().item() == 0.0
    with torch.no_grad():
        model.weight.add_(torch.tensor([[1.0, -2.0]])), model.bias.add_(3.0)
    assert penalty().item() == 0.5 * (1 + 4 + 9)
    penalty().backward()
    assert model.weight.grad is not None and model.weight.grad.tolist() == [[1.0, -2.0]]  # 2 * 0.5 * distance


def test_regenerative_penalty_takes_stored_weights() -> None:
    model = layer([[3.0, 4.0]], [1.0])
    stored = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    assert surgery.regenerative_regularizer(model, 1.0, initial=stored)().item() == 26.0


def test_a_resumed_penalty_pulls_to_where_the_first_did() -> None:
    model = layer([[3.0, 4.0]], [1.0])
    penalty = surgery.regenerative_regularizer(model, 1.0)
    with torch.no_grad():
        model.weight.add_(1.0)
    resumed = surgery.regenerative_regularizer(model, 1.0)
    assert resumed().item() == 0.0
    resumed.load_state_dict(penalty.state_dict())
    assert resumed().item() == 2.0


def test_l2_penalty_is_the_squared_norm() -> None:
    assert surgery.l2_regularizer(layer([[3.0, 4.0]], [1.0]), 0.5)().item() == 13.0


@pytest.mark.parametrize("make", [surgery.regenerative_regularizer, surgery.l2_regularizer])
def test_norms_are_left_out_and_layers_can_be_named(make: Any) -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 1))
    penalty = make(model, 1.0, "0")
    with torch.no_grad():
        model[1].weight.add_(5.0), model[2].weight.add_(5.0)
    before = penalty().item()
    assert set(make(model, 1.0).pulled) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    with torch.no_grad():
        model[0].weight.add_(5.0)
    assert penalty().item() != before


def test_spectral_penalty_of_a_matrix_with_known_singular_values() -> None:
    model = layer([[0.0, 3.0], [2.0, 0.0]], [1.0, 2.0])  # singular values 3 and 2
    penalty = surgery.spectral_regularizer(model, 0.5)
    assert penalty().item() == pytest.approx(0.5 * ((9 - 1) ** 2 + (1 + 4) ** 2), rel=1e-5)
    penalty().backward()
    # d (s^2 - 1)^2 / dW = 4 s (s^2 - 1) u v^T, u v^T = e1 e2^T
    assert model.weight.grad is not None
    expected = torch.tensor([[0.0, 0.5 * 4 * 3 * 8], [0.0, 0.0]])
    assert torch.allclose(model.weight.grad, expected, atol=1e-3)


def test_spectral_penalty_follows_the_largest_singular_value_while_it_moves() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(2, 3, 3))
    penalty = surgery.spectral_regularizer(model, 1.0, exponent=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        penalty().backward()
        optimizer.step()
    largest = torch.linalg.matrix_norm(model[0].weight.detach().flatten(1), 2)
    assert float(largest) == pytest.approx(1.0, abs=1e-3)
    assert float(model[0].bias.detach().norm()) == pytest.approx(0.0, abs=1e-3)


def test_anchors_do_not_train_and_parameters_belong_to_the_model_alone() -> None:
    model = layer([[3.0, 4.0]], [1.0])
    penalty = surgery.regenerative_regularizer(model, 1.0)
    assert list(penalty.parameters()) == []
    assert sorted(penalty.state_dict()) == ["bias", "weight"]
    for one in (copy.deepcopy, lambda each: each.__reduce_ex__(4)):
        with pytest.raises(ModelError, match="neither copied nor pickled"):
            one(penalty)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (surgery.l2_regularizer, {"strength": -1.0}, "strength is -1.0"),
        (surgery.spectral_regularizer, {"strength": 1.0, "exponent": 0}, "exponent is 0"),
        (surgery.spectral_regularizer, {"strength": 1.0, "num_iterations": 0}, "num_iterations is 0"),
    ],
)
def test_numbers_that_make_no_penalty_are_refused(make: Any, options: dict[str, float], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make(nn.Linear(2, 1), **options)


# -- UPGD ------------------------------------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_two_steps_of_upgd_worked_out_by_hand() -> None:
    one, other = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([3.0]))
    optimizer = UPGD([one, other], lr=0.1, weight_decay=0.5, beta_utility=0.75, sigma=0.0)
    one.grad, other.grad = torch.tensor([-1.0, -1.0]), torch.tensor([-2.0])
    optimizer.step()
    # utilities -g w: 1, -2, 6; means 0.25, -0.5, 1.5; corrected 1, -2, 6; divided by the largest mean, 1.5
    scaled = [sigmoid(1 / 1.5), sigmoid(-2 / 1.5), sigmoid(6 / 1.5)]
    expected = [0.95 * w - 0.2 * g * (1 - s) for w, g, s in zip((1, -2, 3), (-1, -1, -2), scaled, strict=True)]
    assert [*one.tolist(), *other.tolist()] == pytest.approx(expected, rel=1e-6)
    optimizer.step()
    means = [0.75 * m - 0.25 * g * w for m, g, w in zip((0.25, -0.5, 1.5), (-1, -1, -2), expected, strict=True)]
    scaled = [sigmoid(m / (1 - 0.75**2) / max(means)) for m in means]
    expected = [0.95 * w - 0.2 * g * (1 - s) for w, g, s in zip(expected, (-1, -1, -2), scaled, strict=True)]
    assert [*one.tolist(), *other.tolist()] == pytest.approx(expected, rel=1e-6)


def test_upgd_perturbs_by_its_generator() -> None:
    found = []
    for seed in (0, 0, 1):
        model = layer([[1.0, 1.0]], [0.0])
        optimizer = surgery.upgd(model, 0.1, sigma=1.0, generator=torch.Generator().manual_seed(seed))
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        found.append(model.weight.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_upgd_without_any_utility_takes_plain_steps() -> None:
    model = layer([[0.0, 0.0]], [0.0])
    optimizer = surgery.upgd(model, 0.1, weight_decay=0.0, sigma=0.0)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert model.weight.tolist() == [[pytest.approx(-0.1), pytest.approx(-0.1)]]  # 2 lr g / 2


def test_upgd_goes_on_from_its_state_and_leaves_parameters_without_gradients() -> None:
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    optimizer = UPGD([one, other], lr=0.1, sigma=0.0)
    one.grad = torch.ones(2)
    optimizer.step()
    assert other.tolist() == [1.0] and other not in optimizer.state
    twin = nn.Parameter(one.detach().clone())
    resumed = UPGD([twin, nn.Parameter(torch.ones(1))], lr=0.1, sigma=0.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin.grad = torch.ones(2)
    for each in (optimizer, resumed):
        each.step()
    assert torch.equal(one, twin)


def test_upgd_is_refused_where_single_rows_are_to_be_made_fresh() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = surgery.upgd(model, 0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(OptimizerError, match="UPGD couples"):
        surgery.knife(model, surgery.Units({"0": [1]}), optimizer=optimizer)


def test_settings_that_make_no_step_are_refused() -> None:
    with pytest.raises(OptimizerError, match=r"beta_utility=1\.0"):
        UPGD([nn.Parameter(torch.ones(1))], beta_utility=1.0)
