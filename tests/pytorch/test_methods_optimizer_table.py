"""The optimizer table of every method: what it draws anew is stepped as fresh weights are, all else goes on as before.

Gradients are given, not computed, so that two twins see the same: one that nobody operated on, and a fresh optimizer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery import surgery
from tests.optimizer_rows import EXACT, library_warnings

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))
UNITS = surgery.Units({"0": [1], "2": [2, 3]})
CONSUMERS = {"0": "2", "2": "4"}
WIDTHS = {"0": 4, "2": 5}

Units = Mapping[str, Sequence[int]]
Masks = dict[str, Tensor]
Apply = Callable[[Any, Optimizer], Any]

QUICK = ("SGD, momentum", "Adam", "Adam, amsgrad", "RMSprop", "Rprop", "NAdam")
WITHOUT_DECAY = ("SGD, momentum", "Adam", "Adam, amsgrad", "RMSprop")
"""Whose updates do not depend on what the weights are."""


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = model(x).square().mean()
    return loss


def nothing(model: nn.Module, report: Any) -> Masks:
    return {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}


def all_of(*layers: str) -> Callable[[nn.Module, Any], Masks]:
    """Every element of some layers."""

    def masks(model: nn.Module, report: Any) -> Masks:
        return {name: mask | (name.split(".")[0] in layers) for name, mask in nothing(model, report).items()}

    return masks


def of_units(model: nn.Module, report: Any) -> Masks:
    """Rows and outgoing columns of the units that the report names."""
    assert report.num_units
    return rows_and_columns(model, report.operated)


def added(model: nn.Module, report: Any) -> Masks:
    """Rows and columns beyond those that there were."""
    return rows_and_columns(model, {"0": [4], "2": [5, 6]})


def rows_and_columns(model: nn.Module, units: Units) -> Masks:
    masks = nothing(model, None)
    for name, own in units.items():
        for each in own:
            masks[f"{name}.weight"][each] = masks[f"{name}.bias"][each] = True
            masks[f"{CONSUMERS[name]}.weight"][:, each] = True
    return masks


def called_once(make: Callable[..., Any], **options: Any) -> Apply:
    """A method that counts by itself, after a pass that it sees."""

    def apply(model: Any, optimizer: Optimizer) -> Any:
        gradients = [parameter.grad for parameter in model.parameters()]
        runner = make(model, optimizer, **options)
        loss_of(model, X).backward()
        report = runner.step()
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        return report

    return apply


def reborn(model: Any, optimizer: Optimizer) -> Any:
    evidence = surgery.probe(model, [X], loss_of)
    criterion = surgery.Lowest(0.25, of="dormant")
    return surgery.reborn(model, criterion, evidence=evidence, over_active=1.01, optimizer=optimizer)


# What a method does, and which elements have the state of fresh ones then. A new method is a new row.
TABLE: Mapping[str, tuple[Apply, Callable[[nn.Module, Any], Masks]]] = {
    "regrama": (lambda m, o: surgery.regrama(m, UNITS, optimizer=o), of_units),
    "reborn": (reborn, of_units),
    "widen": (lambda m, o: surgery.widen(m, UNITS, optimizer=o), added),
    "ContinualBackprop": (called_once(surgery.ContinualBackprop, rate=0.25, maturity=0), of_units),
    "CCBP": (called_once(surgery.CCBP, rate=0.5, every=1), nothing),
    "reset": (lambda m, o: surgery.reset(m, ["2", "4"], optimizer=o), all_of("2", "4")),
    "reset_optimizer": (lambda m, o: surgery.reset_optimizer(m, ["2"], optimizer=o), all_of("2")),
    "shrink_and_perturb": (lambda m, o: surgery.shrink_and_perturb(m, optimizer=o), nothing),
    "scale_head": (lambda m, o: surgery.scale_head(m, 0.5, "4", optimizer=o), nothing),
    "plasticity_injection": (lambda m, o: surgery.plasticity_injection(m, "4", optimizer=o), all_of("4")),
}

CHANGES_VALUES = frozenset(TABLE) - {"reset_optimizer"}


def rows(names: Sequence[str], *marks: Any) -> list[Any]:
    return [pytest.param(method, name, marks=marks, id=f"{method}-{name}") for method in TABLE for name in names]


@pytest.mark.parametrize(
    ("method", "name"), [*rows(QUICK), *rows([name for name in EXACT if name not in QUICK], pytest.mark.slow)]
)
def test_what_is_drawn_anew_is_stepped_as_fresh_and_all_else_as_before(method: str, name: str) -> None:
    with library_warnings():
        apply, fresh_elements = TABLE[method]
        model, untouched = network(), network()
        optimizer, beside = EXACT[name](list(model.parameters())), EXACT[name](list(untouched.parameters()))
        for place in range(15):
            step(place, (model, optimizer), (untouched, beside))
        before = values_of(untouched)
        report = apply(model, optimizer)
        operated = values_of(model)
        assert any(not torch.equal(operated[key], before[key]) for key in before) == (method in CHANGES_VALUES)
        twin = of_values(operated)
        anew = EXACT[name](list(twin.parameters()))
        masks = fresh_elements(model, report)
        for place in range(15, 30):
            step(place, (model, optimizer), (untouched, beside), (twin, anew))
            now, then, fresh = map(values_of, (model, untouched, twin))
            for key, mask in masks.items():
                torch.testing.assert_close(now[key][mask], fresh[key][mask], rtol=1e-4, atol=2e-5, msg=f"{key} {place}")
                old = within(before[key].shape)
                same = ~mask[old] & (operated[key][old] == before[key])
                # A fused kernel steps a parameter of another size in other lanes, which round otherwise.
                off = 1e-6 if (method, name[-5:]) == ("widen", "fused") else 0.0
                torch.testing.assert_close(
                    now[key][old][same], then[key][same], rtol=off, atol=off, msg=f"{key} {place}"
                )
                if name in WITHOUT_DECAY:
                    moved, wanted = now[key][old] - operated[key][old], then[key] - before[key]
                    kept = ~mask[old]
                    torch.testing.assert_close(moved[kept], wanted[kept], rtol=1e-4, atol=2e-5, msg=f"{key} {place}")


def step(seed: int, *pairs: tuple[nn.Module, Optimizer]) -> None:
    """One step of each with the same gradients: of smaller parameters the part that they have."""
    generator = torch.Generator().manual_seed(seed)
    for parameters in zip(*(model.parameters() for model, _ in pairs), strict=True):
        gradient = 0.1 * torch.randn(parameters[0].shape, generator=generator)
        for parameter in parameters:
            parameter.grad = gradient[within(parameter.shape)].clone()
    for _, optimizer in pairs:
        optimizer.step()


def within(shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(size) for size in shape)


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def of_values(values: Mapping[str, Tensor]) -> nn.Module:
    """A plain network of these weights."""
    model: nn.Sequential = network()
    for name, value in values.items():
        layer, attribute = name.split(".")
        setattr(model[int(layer)], attribute, nn.Parameter(value.clone()))
    return model
