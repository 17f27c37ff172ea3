"""Functions of one unit's pre-activation, as plain data: the operations that act on each unit alone.

A bank keeps what its site's units pass as tuples of steps, each naming a function of torch, so that it can be pickled,
copied and evaluated on any rows.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "Earlier",
    "Kind",
    "Other",
    "PerUnit",
    "Step",
    "along",
    "evaluate",
    "laid_out_as",
    "qualified_name",
    "resolve",
]


class Kind(enum.Enum):
    """What a unit-wise function means for a site."""

    NEUTRAL = "neutral"  # no nonlinearity: the path goes on
    FREE = "free"
    RANGE_BEARING = "range-bearing"


@dataclass(frozen=True)
class Earlier:
    """A reference within steps: the value of an earlier step, 0 being what enters."""

    index: int


@dataclass(frozen=True)
class PerUnit:
    """A reference within steps: a tensor of the path, of which every frozen row keeps its own copy."""

    index: int


@dataclass(frozen=True)
class Other:
    """A reference within steps: a tensor from elsewhere; a frozen row takes its unit's part of it."""

    index: int


@dataclass(frozen=True)
class Step:
    """One call: the function's qualified name, so that it can be pickled, and its arguments."""

    function: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


def evaluate(steps: Sequence[Step], z: Tensor, values: Sequence[Tensor], others: Sequence[Any], axis: int) -> Tensor:
    """The last step's result: z with its units on `axis`, `values` (num_units,) or (1,) each, others to broadcast."""
    results = [z]

    def value(argument: Any) -> Any:
        if isinstance(argument, Earlier):
            return results[argument.index]
        if isinstance(argument, PerUnit):
            return along(values[argument.index], axis)
        return others[argument.index] if isinstance(argument, Other) else argument

    for step in steps:
        args = [value(argument) for argument in step.args]
        if step.function.endswith(".prelu"):  # torch's own takes the slopes along axis 1 only
            results.append(torch.where(args[0] > 0, args[0], args[1].to(args[0].dtype) * args[0]))
        else:
            results.append(resolve(step.function)(*args, **{key: value(entry) for key, entry in step.kwargs}))
    return results[-1]


def along(values: Tensor, axis: int) -> Tensor:
    """Values by unit, (num_units, *rest), shaped to broadcast where the units are on `axis` (negative).

    Example:
        >>> along(torch.zeros(5), -3).shape, along(torch.zeros(5, 4), -1).shape
        (torch.Size([5, 1, 1]), torch.Size([4, 5]))
    """
    if values.dim() > 1:
        return values.movedim(0, axis)
    return values.reshape(-1, *([1] * (-axis - 1)))


def laid_out_as(values: Tensor, like: Tensor) -> Tensor:
    """Values in the memory order of a tensor of their shape: random masks behind them are drawn in that order."""
    if values.stride() == like.stride():
        return values
    order = sorted(range(like.dim()), key=lambda axis: -like.stride()[axis])
    back = [order.index(axis) for axis in range(like.dim())]
    return values.permute(order).contiguous().permute(back)


_NAMESPACES = {
    "torch.nn.functional": F,
    "torch": torch,
    "torch.special": torch.special,
    "operator": operator,
    "torch.Tensor": Tensor,
}


def resolve(function: str) -> Callable[..., Any]:
    """The function of a step.

    Example:
        >>> resolve("torch.relu") is torch.relu
        True
    """
    namespace, name = function.rsplit(".", 1)
    return getattr(_NAMESPACES[namespace], name)  # type: ignore[no-any-return]


def qualified_name(target: Any, name: str, is_method: bool) -> str | None:
    """The one name by which a function of torch goes here, however it was called; None for any other function.

    `torch.relu(z)`, `F.relu_(z)` and `z.relu()` are all "torch.nn.functional.relu"; `z += 1` is "operator.add".
    """
    found = [label for label, namespace in _NAMESPACES.items() if callable(getattr(namespace, name, None))]
    if getattr(operator, f"i{name}", None) is target:
        return f"operator.{name}"
    is_torch = any(
        target in (getattr(_NAMESPACES[label], name), getattr(_NAMESPACES[label], f"{name}_", None)) for label in found
    )
    return f"{found[0]}.{name}" if found and (is_method or is_torch) else None
