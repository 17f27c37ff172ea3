"""Retirement: frozen members that fade to zero over a number of optimizer steps, so that growth stays bounded.

What a row is multiplied by is a number of its bank's `fade`, 1 at its birth and 0 after `retire` steps of the optimizer
that owns its parameter. A step hook writes it, in place, from the owner's count and the row's birth alone: steps that
are skipped or replayed need no further care, forward passes do not count, and compiled code sees no change. It never
rises, so that an optimizer that begins to count anew brings nothing back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from neuronsurgery.composites import Rows, as_steps
from neuronsurgery.errors import OptimizerError, PlanError
from neuronsurgery.pytorch import optimizers as optimizer_state
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.step_hooks import install
from neuronsurgery.pytorch.transaction import Change

__all__ = ["Follow", "check_retire", "fades_followed", "is_faded_by", "require_counted"]


def check_retire(retire: int | None, *, is_needed: bool = False) -> None:
    """Refuse what is no number of steps.

    Raises:
        PlanError: it is none.
    """
    if retire is None and is_needed:
        raise PlanError("retire is None; without knowledge there is nothing to keep: pass a number of optimizer steps")
    if retire is not None and (isinstance(retire, bool) or not isinstance(retire, int) or retire < 1):
        raise PlanError(
            f"retire is {retire!r}; it is a number of optimizer steps, at least 1, or None to keep the rows"
        )


def require_counted(place: Place, births: Sequence[int]) -> None:
    """Refuse to let rows fade by the steps of no optimizer.

    Raises:
        OptimizerError: no optimizer owns what the operation renews.
    """
    if not any(birth >= 0 for birth in births):
        raise OptimizerError(
            f"retire= counts the steps of the optimizer that owns {place.site.name!r}, and none was given that does; "
            "pass optimizer=, with the layer's parameters in it"
        )


def fades_followed(place: Place, optimizers: Sequence[Optimizer]) -> Iterator[Change]:
    """Plan the changes that let the bank of a place fade with its optimizers' steps; nothing where no row retires."""
    for column, slots in enumerate(place.renewed):
        if slots is not None and slots.parameter is not None:
            for owner in optimizer_state.counting_owners(optimizers, slots.parameter):
                yield from install(owner, FADING, Fading)
                yield _Enter(owner, place, slots.parameter, column)


def is_faded_by(bank: Composite, optimizers: Sequence[Optimizer]) -> bool:
    """Whether step hooks of these optimizers let the bank fade."""
    return any(entry.bank() is bank for each in optimizers if each in FADING for entry in FADING[each].entries)


class Fading:
    """The step hook of one optimizer that writes the fades of banks."""

    has_pre_hook = False

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def install(self, optimizer: Optimizer) -> Iterable[RemovableHandle]:
        yield optimizer.register_step_post_hook(torch.compiler.disable(self.after_step))  # type: ignore[no-untyped-call]

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self.entries = [entry for entry in self.entries if entry.after_step(optimizer)]


FADING: WeakKeyDictionary[Optimizer, Fading] = WeakKeyDictionary()

FOLLOWERS: WeakKeyDictionary[Composite, WeakSet[Composite]] = WeakKeyDictionary()
"""The banks that share another's frozen rows, and so its fade: of targets of which parameters alone are averaged."""


class Entry:
    """One bank, and the parameter by whose steps some of its rows fade; it keeps neither alive."""

    def __init__(self, bank: Composite, parameter: nn.Parameter, column: int) -> None:
        self.bank: ReferenceType[Composite] = ref(bank)
        self.parameter: ReferenceType[nn.Parameter] = ref(parameter)
        self.column = column
        self.known: tuple[Rows, Tensor, Tensor] | None = None  # births and durations, on the device
        self.end = 0

    def is_of(self, bank: Composite, column: int) -> bool:
        """Whether this is the entry for a bank's rows."""
        return self.bank() is bank and self.column == column

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> bool:
        """Write the fade as it is now; false once bank or parameter are gone."""
        bank, parameter = self.bank(), self.parameter()
        if bank is None or parameter is None:
            return False
        if bank.fade is not None:
            births, retire = self._counted(bank)
            now = optimizer_state.age_clock([optimizer], parameter)
            if now is not None and self.end:
                left = (1 - (now - births) / retire).clamp(min=0).to(bank.fade.dtype)
                bank.fade.copy_(torch.minimum(bank.fade, left))
                _lead(bank)
        return True

    def _counted(self, bank: Composite) -> tuple[Tensor, Tensor]:
        """For each row when it was born and how long it fades, (capacity,); those of other owners never do."""
        assert bank.fade is not None
        if self.known is None or self.known[0] is not bank.rows or self.known[1].device != bank.fade.device:
            mask, room = bank.rows.fading_by(self.column), len(bank.fade)
            births, retire = np.zeros(room, np.float32), np.full(room, np.inf, np.float32)
            births[: len(mask)][mask] = as_steps(bank.rows.births[mask, self.column])
            retire[: len(mask)][mask] = bank.rows.retire[mask]
            first, second = (torch.from_numpy(values).to(bank.fade.device) for values in (births, retire))
            self.known, self.end = (bank.rows, first, second), int(mask.any())
        return self.known[1:]


class _Enter:
    """Enter the bank that hangs at a place then with the step hook of an optimizer, if any of its rows fade by it."""

    def __init__(self, optimizer: Optimizer, place: Place, parameter: nn.Parameter, column: int) -> None:
        self.optimizer, self.place, self.parameter, self.column = optimizer, place, parameter, column
        self.before: list[Entry] | None = None

    def apply(self) -> None:
        bank, fading = self.place.bank, FADING[self.optimizer]
        assert bank is not None
        if bank.rows.fading_by(self.column).any() and not any(e.is_of(bank, self.column) for e in fading.entries):
            self.before = fading.entries
            fading.entries = [*fading.entries, Entry(bank, self.parameter, self.column)]

    def revert(self) -> None:
        if self.before is not None and self.optimizer in FADING:
            FADING[self.optimizer].entries = self.before


# -- who follows -----------------------------------------------------------------------------------------------------


class Follow:
    """Let the bank that hangs at a place then fade with another, of which it shares the frozen rows, or no longer."""

    def __init__(self, place: Place, leader: Composite, *, shares: bool) -> None:
        self.place, self.leader, self.shares = place, leader, shares
        self.before: list[Composite] | None = None

    def apply(self) -> None:
        bank = self.place.bank
        assert bank is not None
        followers = FOLLOWERS.setdefault(self.leader, WeakSet())
        self.before = list(followers)
        if self.shares:
            followers.add(bank)
            _lead(self.leader)
        else:
            followers.discard(bank)

    def revert(self) -> None:
        if self.before is not None:
            FOLLOWERS[self.leader] = WeakSet(self.before)


def _lead(bank: Composite) -> None:
    """Give the fade to the banks that follow, as long as they hold the same rows."""
    for follower in FOLLOWERS.get(bank, ()):
        if bank.fade is not None and follower.fade is not None and _is_alike(follower.rows, bank.rows):
            with torch.no_grad():
                follower.fade.copy_(bank.fade)


def _is_alike(one: Rows, other: Rows) -> bool:
    return one is other or np.array_equal(one.encoded()[:, :3], other.encoded()[:, :3])
