"""Carried rows: how the children of a Sequential make composites of their own, so that it stays a loop over them.

A producer's output carries the pre-activations of its frozen rows as an attribute; what stands behind it takes them one
step on, and the activation function adds them in. So slices, appended children and loops of the user's own behave.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from neuronsurgery.errors import SurgeryError
from neuronsurgery.pytorch.composites import Composite, check_in_place
from neuronsurgery.pytorch.computed_modules import frozen_rows
from neuronsurgery.pytorch.links import Dropout, Norm, SyncBatchNorm, UnitFunction
from neuronsurgery.pytorch.mirroring import original_class
from neuronsurgery.pytorch.products import Convolution
from neuronsurgery.pytorch.taps import observed_weight, offset_of, tap

__all__ = ["FORWARDS", "Role", "carry", "produce"]


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
        return z, carried.rows
    bank = producer._modules.get("composite")
    return z, None if bank is None else rows_of(producer, bank, received)


def rows_of(producer: nn.Module, bank: Any, received: Tensor) -> Tensor:
    """The frozen rows' pre-activations for the input that a producer received.

    Raises:
        SurgeryError: the settings of a convolution are others than those that its bank was made for.
    """
    if isinstance(bank.product, Convolution) and not bank.product.is_of(producer):
        raise SurgeryError(
            f"the settings of this {original_class(producer).__name__} (stride, padding, dilation, groups, padding "
            "mode) are others than those that its bank was made for; undo the operation before you change them"
        )
    return bank(received) if bank.recipe is None else frozen_rows(producer, bank, received)


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


class Carried(NamedTuple):
    """What a pre-activation carries: the weight by which it is observed if it is, its bank and frozen rows if any.

    And of its links the number passed, and of all.
    """

    weight: nn.Parameter | None
    bank: Composite | None
    rows: Tensor | None
    num_passed: int
    num_links: int


def carry(
    z: Tensor, producer: nn.Module | nn.Parameter, bank: Composite | None, rows: Tensor | None, num_passed: int
) -> Tensor:
    """The pre-activations themselves, which carry their rows if there are any, or if their activations are observed."""
    weight = producer if isinstance(producer, nn.Parameter) else observed_weight(producer)
    num_links = offset_of(weight) if bank is None else len(bank.path.links)
    if num_links:
        setattr(z, CARRIED, Carried(weight, bank, rows, num_passed, num_links))
    return z


CARRIED = "_neuronsurgery_carried"
"""The attribute of a pre-activation that holds what it carries."""

Forward = Callable[..., Any]


def producing(original: Forward) -> Forward:
    """The forward of a producer in a Sequential: its output carries the rows of its bank along."""

    @functools.wraps(original)
    def forward(self: nn.Module, input: Tensor) -> Tensor:
        bank: Any = self._modules.get("composite")
        z = original(self, input)
        return carry(z, self, bank, None if bank is None else rows_of(self, bank, input), 0)

    return forward


def passing(original: Forward) -> Forward:
    """The forward of a link in a Sequential: it takes the rows along, the last one adds them in."""

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        slots = (*args, *kwargs.values())[0]
        carried = carried_by(slots)
        if carried is None:
            return original(self, *args, **kwargs)
        if carried.rows is None:
            h, rows = original(self, slots), None
        else:
            h, rows = _passed_by(self, original, carried, slots)
        carried = carried._replace(rows=rows, num_passed=carried.num_passed + 1)
        if carried.num_passed < carried.num_links:
            setattr(h, CARRIED, carried)
            return h
        if h is slots:  # changed in place: what it carried as a pre-activation is not the activation's
            delattr(h, CARRIED)
        if rows is not None and carried.bank is not None:
            h = carried.bank.assemble(h, rows)
        return h if carried.weight is None or not offset_of(carried.weight) else tap(carried.weight, h)

    return forward


def _passed_by(module: nn.Module, original: Forward, carried: Carried, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Slots and rows past the link that a module is."""
    bank, index, rows = carried.bank, carried.num_passed, carried.rows
    assert bank is not None and rows is not None
    if original_class(module).__qualname__ != bank.path.classes[index]:
        raise _replaced(carried, module)
    link = bank.path.links[index]
    if link.tensors:
        check_in_place(bank, module)
    if isinstance(link, SyncBatchNorm):
        return bank.together(index, link, module, slots, rows)
    if isinstance(link, (Norm, Dropout)):
        received = bank.entered(index, link, slots, rows)
        own = [_attribute(module, name) for name in link.tensors]
        return bank.left(index, link, slots, rows, received, original(module, received), own)
    h = original(module, slots)
    if isinstance(link, UnitFunction) and not (link.tensors or link.live):
        return h, original(module, rows)  # by the settings that it has now
    live = [_attribute(module, name) for name in link.live] if isinstance(link, UnitFunction) else []
    return h, bank.passed(index, link, rows, live, module)


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def looping(original: Forward) -> Forward:
    """The forward of a Sequential: the same loop, which does not let carried rows get lost."""

    @functools.wraps(original)
    def forward(self: Any, input: Any) -> Any:
        for module in self:
            carried = carried_by(input)
            input = module(input)
            if carried is not None and not is_passing(module):
                raise _replaced(carried, module)
        carried = carried_by(input)
        if carried is not None and carried.rows is not None and not self._neuronsurgery_program.is_open:
            raise SurgeryError(
                f"this Sequential ends between a producer and its activation function {_made_for(carried)}, and the "
                "producer's units are composite units, which exist only after the activation; take a slice that "
                "ends behind it, or undo the operation"
            )
        return input

    return forward


FORWARDS = {Role.PRODUCER: producing, Role.PATH: passing, Role.SEQUENTIAL: looping}


def carried_by(value: Any) -> Carried | None:
    """What a pre-activation carries along, None for any other value."""
    return getattr(value, CARRIED, None) if isinstance(value, Tensor) else None


def is_passing(module: nn.Module) -> bool:
    """Whether a module takes carried rows on, or is a loop over such."""
    program = getattr(module, "_neuronsurgery_program", None)
    return program is not None and program.role in (Role.PATH, Role.SEQUENTIAL)


def _replaced(carried: Carried, found: nn.Module) -> SurgeryError:
    return SurgeryError(
        f"this bank was made for the activation {_made_for(carried)}, and {original_class(found).__qualname__} stands "
        "there now; undo the operation before you change the activation"
    )


def _made_for(carried: Carried) -> str:
    """The class of the module that has to come next."""
    return "" if carried.bank is None else carried.bank.path.classes[carried.num_passed]
