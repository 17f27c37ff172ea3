"""All or nothing: an operation is a list of changes, each of which can be taken back.

Everything that can be computed or refused happens before the first change. The changes are small, in place, and
keep what they replaced, so a fault between any two of them leaves the model bit for bit as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar, overload

import torch
from torch import Tensor

from neuronsurgery.pytorch.sharding import held, is_sharded, own_rows, own_values, part_of
from neuronsurgery.pytorch.unit_axes import ROWS, UnitAxes

__all__ = [
    "Call",
    "Change",
    "Keeper",
    "Later",
    "Overwrite",
    "RemoveItem",
    "SetClass",
    "SetItem",
    "WriteRows",
    "keep",
    "keeping",
    "revert",
    "run",
]


T = TypeVar("T")


class Change(Protocol):
    """One step of an operation: `apply` does it, `revert` takes it back, also when `apply` failed half way."""

    def apply(self) -> None: ...

    def revert(self) -> None: ...


class Keeper(Protocol):
    """Who decides beyond a transaction: asked before its first change, and given what it would take to undo it."""

    def begin(self) -> None: ...

    def keep(self, changes: list[Change]) -> None: ...


_KEEPER: ContextVar[Keeper | None] = ContextVar("neuronsurgery_keeper", default=None)


@contextmanager
def keeping(keeper: Keeper | None) -> Iterator[None]:
    """Let transactions in this block ask a keeper, or none."""
    token = _KEEPER.set(keeper)
    try:
        yield
    finally:
        _KEEPER.reset(token)


def keep(change: Change) -> None:
    """Hand a change that was made to the keeper, if there is one, to be taken back with the others."""
    if (keeper := _KEEPER.get()) is not None:
        keeper.keep([change])


@overload
def run(changes: Sequence[Change]) -> None: ...


@overload
def run(changes: Sequence[Change], record: Callable[[], T]) -> T: ...


def run(changes: Sequence[Change], record: Callable[[], T] | None = None) -> T | None:
    """Apply the changes in order and return the record of them.

    After a fault, or an interrupt, until the record is written: revert those begun, newest first, and raise it.
    """
    begun: list[Change] = []
    keeper = _KEEPER.get()
    if keeper is not None:
        keeper.begin()
    try:
        for change in changes:
            begun.append(change)
            change.apply()
        torch.clear_autocast_cache()  # inside an autocast block it still holds casts of the old weights
        result = record() if record is not None else None
        if keeper is not None:
            keeper.keep(begun)
        return result
    except BaseException:
        revert(begun)
        raise


def revert(changes: Sequence[Change]) -> None:
    """Take the changes back, newest first."""
    for change in reversed(changes):
        change.revert()
    torch.clear_autocast_cache()


class Later:
    """Changes that can only be planned once those before them are made, one after the other."""

    def __init__(self, plan: Callable[[], Iterable[Change]]) -> None:
        self.plan = plan
        self.begun: list[Change] = []

    def apply(self) -> None:
        for change in self.plan():
            self.begun.append(change)
            change.apply()

    def revert(self) -> None:
        revert(self.begun)


class Call:
    """Something that is done by a call, or taken back by one, or both."""

    def __init__(self, undo: Callable[[], object] = lambda: None, do: Callable[[], object] = lambda: None) -> None:
        self.undo, self.do = undo, do

    def apply(self) -> None:
        self.do()

    def revert(self) -> None:
        self.undo()


class WriteRows:
    """Overwrite the rows of some units of a tensor in place, without autograd: `tensor[rows] = values`.

    `rows`: (r,) int64, units under `axes`; `values`: (r, *row_shape). Of a sharded tensor this process writes its part.
    """

    def __init__(self, tensor: Tensor, rows: Tensor, values: Tensor, axes: UnitAxes = ROWS) -> None:
        if is_sharded(tensor):
            which, own = own_rows(tensor, rows, axes)
            tensor, rows, values = held(tensor), own, own_values(tensor, values, which, axes)
        self.tensor, self.rows, self.values, self.axes = tensor, rows, values, axes
        self.replaced: Tensor | None = None

    def apply(self) -> None:
        with torch.no_grad():
            self.replaced = self.axes.take(self.tensor, self.rows)
            self.axes.put(self.tensor, self.rows, self.values.to(self.tensor))

    def revert(self) -> None:
        if self.replaced is not None:
            with torch.no_grad():
                self.axes.put(self.tensor, self.rows, self.replaced)


class Overwrite:
    """Overwrite a whole tensor in place, without autograd; of a sharded one the part that this process holds."""

    def __init__(self, tensor: Tensor, values: Tensor) -> None:
        if is_sharded(tensor):
            tensor, values = held(tensor), part_of(tensor, values)
        self.tensor, self.values = tensor, values
        self.replaced: Tensor | None = None

    def apply(self) -> None:
        self.replaced = self.tensor.detach().clone()
        with torch.no_grad():
            self.tensor.copy_(self.values)

    def revert(self) -> None:
        if self.replaced is not None:
            with torch.no_grad():
                self.tensor.copy_(self.replaced)


_ABSENT = object()


class SetItem:
    """Put `value` under `key` of a mapping (a module's buffers, say); the order of other keys stays."""

    def __init__(self, mapping: MutableMapping[Any, Any], key: Any, value: Any) -> None:
        self.mapping, self.key, self.value = mapping, key, value
        self.replaced: Any = mapping.get(key, _ABSENT)

    def apply(self) -> None:
        self.mapping[self.key] = self.value

    def revert(self) -> None:
        if self.replaced is _ABSENT:
            self.mapping.pop(self.key, None)
        else:
            self.mapping[self.key] = self.replaced


class RemoveItem:
    """Take a key out of a mapping; taken back, it stands where it stood."""

    def __init__(self, mapping: MutableMapping[Any, Any], key: Any) -> None:
        self.mapping, self.key = mapping, key
        self.replaced = dict(mapping)

    def apply(self) -> None:
        del self.mapping[self.key]

    def revert(self) -> None:
        self.mapping.clear()
        self.mapping.update(self.replaced)


class SetClass:
    """Exchange the class of an object for one of the same layout."""

    def __init__(self, instance: Any, cls: type) -> None:
        self.instance, self.cls, self.replaced = instance, cls, type(instance)

    def apply(self) -> None:
        object.__setattr__(self.instance, "__class__", self.cls)

    def revert(self) -> None:
        object.__setattr__(self.instance, "__class__", self.replaced)
