"""Carried rows: how the children of a Sequential make composites of their own, so that it stays a loop over them.

A producer's output carries the pre-activations of its frozen rows as an attribute; what stands behind it takes them one
step on, and the activation function adds them in. So slices, appended children and loops of the user's own behave.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from neuronsurgery.errors import SurgeryError
from neuronsurgery.pytorch.mirroring import original_class
from neuronsurgery.pytorch.taps import offset_of, tap

__all__ = ["FORWARDS", "Role", "produce"]


class Role(enum.Enum):
    """The part of a module in a site."""

    SCOPE = "scope"  # its functions are graphs with the banks put in
    SEQUENTIAL = "sequential"  # a loop over its children, which hand the rows on
    PRODUCER = "producer"  # a child of a Sequential: its output carries the rows of its bank
    PATH = "path"  # a child of a Sequential between a producer and its consumers, the activation function at last


def produce(producer: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """A producer's output, and its frozen rows' pre-activations for the same input, None where it has no bank."""
    z, received = call_producer(producer, *args, **kwargs)
    carried = getattr(z, CARRIED, None)
    if carried is not None:
        delattr(z, CARRIED)  # this scope adds the rows in itself
        return z, carried[1]
    bank = producer._modules.get("composite")
    return z, None if bank is None else bank(received)


def call_producer(producer: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """A producer's output, and the input its forward received: the bank must get what the pre-hooks made of it."""
    if not (producer._forward_pre_hooks or nn.modules.module._global_forward_pre_hooks):
        return producer(*args, **kwargs), args[0] if args else kwargs["input"]
    received: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        received.append(arguments[0] if arguments else named["input"])

    handle = producer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        return producer(*args, **kwargs), received[0]
    finally:
        handle.remove()


CARRIED = "_neuronsurgery_carried"
"""The attribute of a pre-activation that carries (its producer, the rows' pre-activations, the steps still to go)."""

Forward = Callable[..., Any]


def producing(original: Forward) -> Forward:
    """The forward of a producer in a Sequential: its output carries the rows of its bank along."""

    @functools.wraps(original)
    def forward(self: nn.Module, input: Tensor) -> Tensor:
        z: Tensor = original(self, input)
        bank: Any = self._modules.get("composite")
        steps = offset_of(self) if bank is None else bank.path.offset
        if steps:
            setattr(z, CARRIED, (self, None if bank is None else bank(input), steps))
        return z

    return forward


def passing(original: Forward) -> Forward:
    """The forward of a unit-wise child of a Sequential: it takes the rows one step on, the last one adds them in."""

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        carried = carried_by((*args, *kwargs.values())[0])
        h = original(self, *args, **kwargs)
        if carried is None:
            return h
        producer, z, steps = carried
        bank: Any = producer._modules.get("composite")
        if z is not None and not bank.path.function.parameters:
            z = original(self, z)
        if steps > 1:
            setattr(h, CARRIED, (producer, z, steps - 1))
            return h
        return _combined(producer, self, h, z)

    return forward


def looping(original: Forward) -> Forward:
    """The forward of a Sequential: the same loop, which does not let carried rows get lost."""

    @functools.wraps(original)
    def forward(self: Any, input: Any) -> Any:
        for module in self:
            carried = carried_by(input)
            input = module(input)
            if carried is not None and not is_passing(module):
                raise _replaced(carried[0], module)
        carried = carried_by(input)
        if carried is not None and carried[1] is not None:
            raise SurgeryError(
                f"this Sequential ends between {type(carried[0]).__name__} and its activation function, and the "
                "producer's units are composite units, which exist only after the activation; take a slice that "
                "ends behind it, or undo the operation"
            )
        return input

    return forward


FORWARDS = {Role.PRODUCER: producing, Role.PATH: passing, Role.SEQUENTIAL: looping}


def carried_by(value: Any) -> tuple[nn.Module, Tensor | None, int] | None:
    """What a pre-activation carries along, None for any other value."""
    return getattr(value, CARRIED, None) if isinstance(value, Tensor) else None


def is_passing(module: nn.Module) -> bool:
    """Whether a module takes carried rows on."""
    program = getattr(module, "_neuronsurgery_program", None)
    return program is not None and program.role is Role.PATH


def _combined(producer: nn.Module, activation: nn.Module, h: Tensor, z: Tensor | None) -> Tensor:
    """Composites in place; `z`: the rows' activations, or pre-activations where the path has parameters of its own."""
    bank: Any = producer._modules.get("composite")
    if z is not None:
        if original_class(activation).__qualname__ != bank.path.activation_class:
            raise _replaced(producer, activation)
        h = bank.combine(h, z) if bank.path.function.parameters else bank.assemble(h, z)
    return tap(producer.weight, h) if offset_of(producer) else h


def _replaced(producer: nn.Module, found: nn.Module) -> SurgeryError:
    bank: Any = producer._modules.get("composite")
    made_for = "" if bank is None else f" {bank.path.activation_class}"
    return SurgeryError(
        f"the bank of this {type(producer).__name__} was made for the activation{made_for}, and "
        f"{original_class(found).__qualname__} stands there now; undo the operation before you change the activation"
    )
