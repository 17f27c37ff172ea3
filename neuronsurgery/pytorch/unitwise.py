"""Functions of one unit's pre-activation, as plain data: what stands between a producer and its consumers.

A bank keeps the function of its site as a tuple of steps, each naming a function of torch, so that it can be pickled,
copied and evaluated on any rows.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["IDENTITY", "Kind", "PerUnit", "Step", "UnitFunction", "Earlier", "qualified_name", "resolve"]


class Kind(enum.Enum):
    """What a unit-wise function means for a site."""

    NEUTRAL = "neutral"  # no nonlinearity: the path goes on
    FREE = "free"
    RANGE_BEARING = "range-bearing"


@dataclass(frozen=True)
class Earlier:
    """A reference within steps: the value of an earlier step, 0 being the pre-activation."""

    index: int


@dataclass(frozen=True)
class PerUnit:
    """A reference within steps: a parameter of the path, of which every frozen row keeps its own copy."""

    index: int


@dataclass(frozen=True)
class Step:
    """One call: the function's qualified name, so that it can be pickled, and its arguments."""

    function: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class UnitFunction:
    """A function of one unit's pre-activation: its steps, its name, and the path parameters it reads."""

    steps: tuple[Step, ...]
    name: str
    kind: Kind
    parameters: tuple[str, ...] = ()

    def after(self, first: UnitFunction) -> UnitFunction:
        """The composition: first the other function, then this one."""
        shift, parameters = len(first.steps), len(first.parameters)

        def moved(value: Any) -> Any:
            if isinstance(value, Earlier):
                return Earlier(value.index + shift)
            return PerUnit(value.index + parameters) if isinstance(value, PerUnit) else value

        steps = tuple(
            Step(s.function, tuple(map(moved, s.args)), tuple((k, moved(v)) for k, v in s.kwargs)) for s in self.steps
        )
        return UnitFunction(first.steps + steps, self.name, self.kind, first.parameters + self.parameters)


IDENTITY = UnitFunction((), "identity", Kind.NEUTRAL)

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

    `torch.relu(z)`, `F.relu_(z)` and `z.relu()` are all "torch.nn.functional.relu".
    """
    found = [label for label, namespace in _NAMESPACES.items() if callable(getattr(namespace, name, None))]
    is_torch = any(
        target in (getattr(_NAMESPACES[label], name), getattr(_NAMESPACES[label], f"{name}_", None)) for label in found
    )
    return f"{found[0]}.{name}" if found and (is_method or is_torch) else None
