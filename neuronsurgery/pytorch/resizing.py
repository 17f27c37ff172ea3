"""Parameters of another size that stay the same objects, with their gradients, their optimizers' state and its ages.

A parameter grows along one axis: `source` says for each new index which old one it is a copy of. Values, gradients and
whatever state has the parameter's shape are taken by it; ages of young weights too, so that step hooks go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.errors import OptimizerError
from neuronsurgery.pytorch.corrections import CORRECTIONS, Young
from neuronsurgery.pytorch.fresh_state import is_shared
from neuronsurgery.pytorch.transaction import Change, SetItem
from neuronsurgery.pytorch.unit_axes import UnitAxes

__all__ = ["check_resizable", "resized", "said"]


def check_resizable(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> None:
    """Refuse optimizers whose state of a parameter cannot grow with it.

    Raises:
        OptimizerError: state of another shape than the parameter's.
    """
    for optimizer in optimizers:
        for key, entry in optimizer.state.get(parameter, {}).items():
            if not is_shared(key, entry, parameter) and not _is_alike(entry, parameter):
                raise OptimizerError(
                    f"{type(optimizer).__name__} keeps its state {key!r} of a parameter of shape "
                    f"{tuple(parameter.shape)} in another shape, which cannot grow with it. Build the optimizer anew "
                    "after widening, or use one that is element-wise (SGD, RMSprop, Adam, AdamW)"
                )


def resized(optimizers: Sequence[Optimizer], parameter: nn.Parameter, axis: int, source: Tensor) -> Iterator[Change]:
    """The changes that give a parameter and all of its shape another size along an axis; `source`: (size,) int64."""
    for optimizer in optimizers:
        state = optimizer.state.get(parameter, {})
        for key, entry in state.items():
            if not is_shared(key, entry, parameter) and _is_alike(entry, parameter):
                yield SetItem(state, key, entry.index_select(axis, source.to(entry.device)))
        if optimizer in CORRECTIONS and parameter in CORRECTIONS[optimizer].young:
            yield _Renumber(optimizer, parameter, axis, source)
    yield _Resize(parameter, axis, source)


_SIZES = {
    "producer": ("out_features", "out_channels", "num_features", "num_parameters", "nf"),
    "consumer": ("in_features", "in_channels", "nx"),
}
"""The attributes in which modules of torch, and one of transformers, say how many units they have or read."""


def said(
    owners: Mapping[int, Sequence[tuple[nn.Module, str]]],
    tensor: Tensor,
    role: Literal["producer", "consumer"],
    size: int,
) -> Iterator[Change]:
    """The changes of the attributes in which the modules that own a tensor say its size as well."""
    for owner, _ in owners[id(tensor)]:
        is_cell = role == "consumer" and isinstance(owner, nn.RNNCellBase)
        for name in (*_SIZES[role], "input_size") if is_cell else _SIZES[role]:  # others mean other sizes by it
            if isinstance(vars(owner).get(name), int):
                yield SetItem(vars(owner), name, size)


def _is_alike(entry: Any, parameter: nn.Parameter) -> bool:
    return isinstance(entry, Tensor) and entry.shape == parameter.shape


class _Resize:
    """Exchange what a parameter holds, and its gradient; the parameter stays the object that optimizers know."""

    def __init__(self, parameter: nn.Parameter, axis: int, source: Tensor) -> None:
        self.parameter, self.axis, self.source = parameter, axis, source.to(parameter.device)
        self.replaced: tuple[Tensor, Tensor | None] | None = None

    def apply(self) -> None:
        data, gradient = self.parameter.data, self.parameter.grad
        self.replaced = data, gradient
        _exchange(self.parameter, data.index_select(self.axis, self.source))
        if gradient is not None:
            self.parameter.grad = gradient.index_select(self.axis, self.source)

    def revert(self) -> None:
        if self.replaced is not None:
            data, gradient = self.replaced
            _exchange(self.parameter, data)
            self.parameter.grad = gradient


def _exchange(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter data of another shape, without a gradient.

    As long as a loss of before is kept, so is the node of its graph that adds to the parameter's gradient, and it
    remembers the old shape: the next backward pass would fail. Torch makes another node where the dtype changes.
    """
    parameter.grad = None  # torch takes no gradient of another shape
    other = torch.float32 if data.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data


class _Renumber:
    """Let the young weights of a parameter be the same ones after it has grown; copies are as young as their source."""

    def __init__(self, optimizer: Optimizer, parameter: nn.Parameter, axis: int, source: Tensor) -> None:
        self.optimizer, self.parameter, self.axis, self.source = optimizer, parameter, axis, source
        self.replaced: dict[nn.Parameter, Young] | None = None

    def apply(self) -> None:
        corrections = CORRECTIONS[self.optimizer]
        self.replaced = dict(corrections.young)
        young = corrections.young[self.parameter]
        births = torch.zeros(self.parameter.shape, dtype=young.births.dtype, device=young.births.device)
        values = young.births.reshape(-1, *[1] * (young.axes.take(births, young.rows).dim() - 1))
        young.axes.put(births, young.rows, values.expand_as(young.axes.take(births, young.rows)).contiguous())
        grown = births.index_select(self.axis, self.source.to(births.device))
        axes = UnitAxes(tuple(range(grown.dim())))
        rows = torch.arange(grown.numel(), device=grown.device)
        # Made for the parameter as it will be: nothing but the shape is asked of it.
        corrections.young[self.parameter] = Young.of(grown, rows, grown.flatten(), young.latest, axes)

    def revert(self) -> None:
        if self.replaced is not None:
            CORRECTIONS[self.optimizer].young = self.replaced
