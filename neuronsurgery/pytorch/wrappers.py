"""Optimizers that hold another one: Lookahead, SAM, what training frameworks put around an optimizer.

The inner optimizer has the state and takes the steps, so that it is operated with. What a wrapper keeps beside it has
to forget the old rows too: copies of the weights (slow weights, the weights before a perturbation) become the new rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.errors import OptimizerError
from neuronsurgery.pytorch.sharding import held, own_units
from neuronsurgery.pytorch.transaction import Change, WriteRows, revert
from neuronsurgery.pytorch.unit_axes import UnitAxes

__all__ = ["COPIES", "inner_of", "refresh_wrapper", "unwrapped"]

COPIES = frozenset({"slow_params", "slow_param", "slow_buffer", "lookahead_slow_buff", "old_p", "backup_params"})
"""Names under which wrappers keep copies of the weights, in a state of their own or in the inner optimizer's."""


def inner_of(optimizer: Optimizer) -> Optimizer | None:
    """Return the optimizer that another one holds, None where it holds none."""
    return next((one for one in vars(optimizer).values() if isinstance(one, Optimizer) and one is not optimizer), None)


def unwrapped(optimizer: Optimizer) -> Iterator[Optimizer]:
    """Yield the innermost optimizer, then the wrappers around it that have a state of their own.

    Raises `OptimizerError` where a wrapper holds several, or steps parameters that its inner optimizer has not.
    """
    inner = inner_of(optimizer)
    if inner is None:
        yield optimizer
        return
    held = [one for one in vars(optimizer).values() if isinstance(one, Optimizer) and one is not optimizer]
    owned = {id(one) for group in inner.param_groups for one in group["params"]}
    if len({id(one) for one in held}) > 1 or any(
        id(one) not in owned for group in optimizer.param_groups for one in group["params"]
    ):
        names = ", ".join(type(one).__name__ for one in held)
        raise OptimizerError(
            f"{type(optimizer).__name__} holds {len(held)} optimizers, {names}, which do not step exactly its own "
            "parameters; pass those that do instead of the wrapper"
        )
    yield from unwrapped(inner)
    if optimizer.state is not inner.state:
        yield optimizer


def refresh_wrapper(wrapper: Optimizer, parameter: nn.Parameter, rows: Tensor, axes: UnitAxes) -> list[Change]:
    """Plan the changes that let a wrapper's copies of the weights follow the rows, which are written before.

    Raises `OptimizerError` for anything of the parameter's in its state that is not known to be such a copy.
    """
    changes: list[Change] = []
    for key, entry in wrapper.state.get(parameter, {}).items():
        if key not in COPIES or not isinstance(entry, Tensor) or entry.shape != parameter.shape:
            raise OptimizerError(
                f"{type(wrapper).__name__} keeps {key!r} of each parameter beside the optimizer that it holds, and it "
                "is not known what that becomes for operated rows. Pass the "
                f"{type(inner_of(wrapper)).__name__} that it holds if its own state may keep the old rows, or operate "
                "without optimizer="
            )
        changes.append(CopyRows(entry, parameter, rows, axes))
    return changes


class CopyRows:
    """Copy rows of a parameter, as they are by then, into a tensor of its shape."""

    def __init__(self, entry: Tensor, parameter: nn.Parameter, rows: Tensor, axes: UnitAxes) -> None:
        self.entry, self.parameter, self.rows, self.axes = entry, parameter, rows, axes
        self.writes: list[WriteRows] = []

    def apply(self) -> None:
        with torch.no_grad():
            rows = own_units(self.parameter, self.rows, self.axes)
            values = self.axes.take(held(self.parameter.detach()), rows.to(self.parameter.device))
        self.writes = [WriteRows(held(self.entry), rows.to(self.entry.device), values, self.axes)]
        self.writes[0].apply()

    def revert(self) -> None:
        revert(self.writes)
