"""What a method writes, rows and columns, is stepped as fresh weights are, and everything else as if nothing had been.

Gradients are given, not computed, so that a twin that nobody operated on sees the same. The layer in the middle is
the hard one: its rows are units of its own, its columns belong to the units of the layer before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery import surgery
from neuronsurgery.errors import OptimizerError
from tests.optimizer_rows import COUPLED, EXACT, REFUSED, Make, library_warnings

UNITS = surgery.Units({"0": [1], "2": [2, 3]})


@pytest.fixture(autouse=True)
def _warnings_of_libraries() -> Any:
    with library_warnings():
        yield


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def written(model: Any) -> dict[str, Tensor]:
    """By parameter, which of its elements a reset of these units writes; worked out by hand."""
    masks = {name: torch.zeros_like(parameter, dtype=torch.bool) for name, parameter in model.named_parameters()}
    masks["0.weight"][1] = masks["0.bias"][1] = True
    masks["2.weight"][:, 1] = True
    masks["2.weight"][[2, 3]] = masks["2.bias"][[2, 3]] = True
    masks["4.weight"][:, [2, 3]] = True
    return masks


def step(optimizer: Optimizer, parameters: Iterable[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = 0.1 * torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def situation(name: str) -> Any:
    return pytest.param(
        name,
        marks=pytest.mark.situation("Optimizers", f"{name}, outgoing weights reset", "works"),
        id=name.replace(" ", "-"),
    )


@pytest.mark.parametrize("name", [situation(name) for name in EXACT])
def test_what_a_reset_writes_is_stepped_as_fresh_and_all_else_as_before(name: str) -> None:
    make: Make = EXACT[name]
    model, untouched = network(), network()
    optimizer, beside = make(list(model.parameters())), make(list(untouched.parameters()))
    for place in range(20):
        step(optimizer, model.parameters(), place)
        step(beside, untouched.parameters(), place)
    report = surgery.redo(model, UNITS, optimizer=optimizer)
    assert report.num_units == 3
    fresh = network()
    fresh.load_state_dict(model.state_dict())
    twin = make(list(fresh.parameters()))
    masks = written(model)
    for place in range(20, 40):
        for each, net in ((optimizer, model), (beside, untouched), (twin, fresh)):
            step(each, net.parameters(), place)
        now, then, anew = (dict(net.named_parameters()) for net in (model, untouched, fresh))
        for key, mask in masks.items():
            assert torch.equal(now[key][~mask], then[key][~mask]), (key, place)
            torch.testing.assert_close(now[key][mask], anew[key][mask], rtol=1e-4, atol=2e-5, msg=f"{key} {place}")


@pytest.mark.parametrize("name", [*COUPLED, *REFUSED])
def test_optimizers_that_couple_columns_are_refused_before_anything_changes(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 5, bias=False))
    optimizer = (COUPLED | dict(REFUSED))[name](list(model.parameters()))  # type: ignore[operator]
    for place in range(3):
        step(optimizer, model.parameters(), place)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(OptimizerError, match=f"{type(optimizer).__name__} couples"):
        surgery.redo(model, surgery.Units({"0": [1]}), optimizer=optimizer)
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
