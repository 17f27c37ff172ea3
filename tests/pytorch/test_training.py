"""What training after surgery moves: every active member that gets a gradient, and no frozen member ever.

Fifty steps of each optimizer, with gradient clipping and with the sweeps that real training code makes over
`model.parameters()`: masking a gradient would not survive these, a buffer does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronsurgery import surgery
from tests.assertions import assert_unchanged, bank_tensors

NUM_STEPS = 50

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
}


class Shared(nn.Module):
    """A layer called twice, and a weight that another module shares."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(torch.relu(self.inner(x))))
        return self.head(torch.relu(self.second(torch.relu(self.first(h)))))  # type: ignore[no-any-return]


class Functional(nn.Module):
    """F.linear on the module's own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(8, 6) / 6**0.5), nn.Parameter(torch.zeros(8))
        self.w2 = nn.Parameter(torch.randn(3, 8) / 8**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.w1, self.b1)), self.w2)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))


def sloped() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.PReLU(16), nn.Linear(16, 12), nn.PReLU(), nn.Linear(12, 3))


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 2), nn.ReLU()]
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), *layers, nn.Flatten(), nn.Linear(16, 9), nn.ReLU(), nn.Linear(9, 3)
    )


NETWORKS = {net.__name__.lower(): net for net in (plain, sloped, convolutional, Shared, Functional)}


@dataclass(eq=False)
class Trial:
    """A network after an operation, with the rows that its optimizer is about to train."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    report: surgery.Report
    x: Tensor
    y: Tensor

    def weights(self) -> dict[str, nn.Parameter]:
        """The weight of each operated site."""
        parameters = dict(self.model.named_parameters())
        return {name: parameters.get(f"{name}.weight", parameters.get(name)) for name in self.report.operated}  # type: ignore[misc]

    def step(self) -> None:
        self.optimizer.zero_grad()
        for parameter in self.model.parameters():
            parameter.requires_grad_(True)
        F.mse_loss(self.model(self.x), self.y).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def trial(network: str, optimizer: str, dtype: torch.dtype, num_operations: int = 1) -> Trial:
    """Train a network a little, operate on half of its units, `num_operations` times with steps between them."""
    torch.manual_seed(3)
    model = NETWORKS[network]().to(dtype)
    x, y = torch.randn(32, 6).to(dtype), torch.randn(32, 3).to(dtype)
    result = Trial(model, OPTIMIZERS[optimizer](model.parameters()), None, x, y)  # type: ignore[arg-type]
    for number in range(num_operations):
        for _ in range(5):
            result.step()
        result.report = surgery.knife(
            model, surgery.Random(0.5, seed=number), optimizer=result.optimizer, cooldown=0, verify=x
        )
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("network", NETWORKS)
def test_fifty_steps_move_no_frozen_member_and_every_active_member_with_a_gradient(network, optimizer, dtype):
    after = trial(network, optimizer, dtype)
    frozen = bank_tensors(after.model)
    assert frozen, "the operation made no bank"
    start = {name: weight.detach().clone() for name, weight in after.weights().items()}
    received = {name: torch.zeros(len(weight), dtype=torch.bool) for name, weight in start.items()}
    for _ in range(NUM_STEPS):
        after.step()
        for name, weight in after.weights().items():
            assert weight.grad is not None
            received[name] |= (weight.grad != 0).flatten(1).any(1)
    now = bank_tensors(after.model)
    assert list(now) == list(frozen)
    for name, value in frozen.items():
        assert_unchanged(name, value, now[name])
    num_still = 0
    for name, units in after.report.operated.items():
        moved = (after.weights()[name].detach() != start[name]).flatten(1).any(1)[list(units)]
        got = received[name][list(units)]
        assert bool(moved[got].all()), f"{name}: an active member with a gradient did not move"
        num_still += int((~got).sum())
        if optimizer != "adamw":
            assert int((~moved).sum()) == int((~got).sum()), f"{name}: a member moved without a gradient"
        else:  # decay alone moves the others: by the same factor each step
            shrunk = start[name][list(units)][~got] * (1 - 0.1 * 0.1) ** NUM_STEPS
            torch.testing.assert_close(after.weights()[name].detach()[list(units)][~got], shrunk)
    assert num_still < after.report.num_units / 2, f"{num_still} of {after.report.num_units} never got a gradient"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_members_of_three_operations_stay_frozen_through_training(optimizer):
    after = trial("plain", optimizer, torch.float32, num_operations=3)
    frozen = bank_tensors(after.model)
    for _ in range(NUM_STEPS):
        after.step()
    for name, value in bank_tensors(after.model).items():
        assert_unchanged(name, frozen[name], value)


def test_no_bank_tensor_is_a_parameter_or_asks_for_a_gradient_after_a_sweep():
    after = trial("plain", "adam", torch.float32)
    after.model.requires_grad_(True)
    after.step()
    assert not [name for name, _ in after.model.named_parameters() if "composite" in name]
    for name, buffer in after.model.named_buffers():
        assert not buffer.requires_grad and buffer.grad is None, name


def test_a_unit_that_never_fires_stands_still_under_sgd_and_is_the_only_one():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x, y = torch.rand(32, 6), torch.randn(32, 3)

    def silent_first_row(weight: Tensor) -> None:
        nn.init.uniform_(weight, 0.1, 0.5)
        weight[2] = -1.0  # all inputs are positive: this unit never fires

    report = surgery.knife(model, surgery.Units({"0": [2, 4, 5]}), optimizer=optimizer, init=silent_first_row)
    after = Trial(model, optimizer, report, x, y)
    start = model.state_dict()["0.weight"].clone()
    for _ in range(NUM_STEPS):
        after.step()
    still = (model.state_dict()["0.weight"] == start).all(1)
    assert [unit for unit in (2, 4, 5) if still[unit]] == [2]
