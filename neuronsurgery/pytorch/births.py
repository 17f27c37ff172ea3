"""Which weights are young under which optimizer, to be saved and told again after a resume.

`knife`'s births are saved with its banks. Methods that leave no bank have them here, in the state of a schedule or of
the method itself: without them an optimizer would step weights that were just written by the age of their parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from neuronsurgery.pytorch.corrections import CORRECTIONS, register
from neuronsurgery.pytorch.families import family_of
from neuronsurgery.pytorch.transaction import run
from neuronsurgery.pytorch.unit_axes import UnitAxes

__all__ = ["load_births", "saved_births"]


def saved_births(optimizers: Sequence[Optimizer], model: nn.Module) -> list[list[dict[str, Any]]]:
    """For each optimizer the model's parameters with young weights: tensors, numbers and strings. It waits for them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        [
            {
                "name": names[parameter],
                "axes": list(young.axes.axes),
                "groups": young.axes.groups,
                "rows": young.rows.cpu(),
                "births": young.births.double().cpu(),
            }
            for parameter, young in (CORRECTIONS[each].young.items() if each in CORRECTIONS else ())
            if parameter in names
        ]
        for each in optimizers
    ]


def load_births(
    optimizers: Sequence[Optimizer], model: nn.Module, state: Sequence[Sequence[Mapping[str, Any]]]
) -> None:
    """Tell optimizers, whose own states were loaded before, which weights of a model are young."""
    parameters = dict(model.named_parameters())
    for optimizer, entries in zip(optimizers, state, strict=True):
        for entry in entries:
            family = family_of(optimizer)
            known = ~torch.as_tensor(entry["births"]).isnan()
            if family is None or entry["name"] not in parameters or not bool(known.any()):
                continue
            parameter, axes = parameters[entry["name"]], UnitAxes(tuple(entry["axes"]), entry["groups"])
            rows, births = entry["rows"][known], entry["births"][known].tolist()
            run(register(optimizer, family, parameter, rows.to(parameter.device), births, axes))
