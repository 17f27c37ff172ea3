"""What an optimizer has to know of the banks of its model, told again after a resume, a copy or a pickle.

The births of operated rows are saved with the banks. What goes by them are step hooks and clocks on the optimizer,
which torch drops on pickling and copying, and which no state dict holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from neuronsurgery.errors import SiteError
from neuronsurgery.pytorch import optimizers as optimizer_state
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.fading import fades_followed
from neuronsurgery.pytorch.hanging import hang_as_sharded
from neuronsurgery.pytorch.models import check_model, unwrap
from neuronsurgery.pytorch.places import Place, Slots
from neuronsurgery.pytorch.sites import discover
from neuronsurgery.pytorch.step_hooks import CLOCKS, Clock
from neuronsurgery.pytorch.swapped import with_parameters_in_place
from neuronsurgery.pytorch.transaction import Change, Later, SetItem, run

__all__ = ["FollowClocks", "attach", "resumed"]


@with_parameters_in_place
def attach(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer]) -> None:
    """Install the step hooks that the operated rows of a model need; see `neuronsurgery.surgery.attach`."""
    check_model(model)
    model = unwrap(model)
    optimizers = optimizer_state.as_optimizers(optimizer)
    optimizer_state.check_owners(optimizers, dict(model.named_parameters()))
    places = _banked(model)
    sharded = [change for place in places for change in hang_as_sharded(place)]
    run([*sharded, *(resumed(place, optimizers) for place in places)])


def _banked(model: nn.Module) -> list[Place]:
    """The places with a bank.

    Raises:
        SiteError: a bank is at no site of this model.
    """
    banks = {id(module): module for module in model.modules() if isinstance(module, Composite)}
    if not banks:
        return []
    discovery = discover(model)
    places = [place for place in discovery.places.values() if place.bank is not None]
    for bank in banks.values():
        if not any(place.bank is bank for place in places):
            reason = discovery.declined.get(bank.site, "it was operated on as a part of another model")
            raise SiteError(
                f"{bank.label} is at no site of this {type(model).__name__}: {reason}; attach the part that was "
                "operated on: surgery.attach(part, optimizer)"
            )
    return places


def resumed(place: Place, optimizers: Sequence[Optimizer]) -> Later:
    """Let the optimizers of a place go on as if they had been there at its operations."""

    def changes() -> Iterator[Change]:
        # Clocks first: which rows have yet to take their first step is asked of them.
        yield from _clock_changes(place, optimizers)
        yield FollowClocks(place, optimizers, anew=False)
        yield from _birth_changes(place, optimizers)
        if place.bank is not None and place.bank.rows.can_fade:
            yield from fades_followed(place, optimizers)

    return Later(changes)


class FollowClocks:
    """Let the bank of a place know the clocks that its births are counted by, to be saved and copied with it.

    `anew`: its latest births are counted by clocks of these optimizers; else only those that were counted before.
    """

    def __init__(self, place: Place, optimizers: Sequence[Optimizer], *, anew: bool = True) -> None:
        self.place, self.optimizers, self.anew = place, optimizers, anew
        self.change: SetItem | None = None

    def apply(self) -> None:
        bank = self.place.bank
        assert bank is not None
        known = bank.clocks or (None,) * len(self.place.slots)
        clocks = tuple(
            _clock(slots, self.optimizers) or own if self.anew or own is not None else None
            for slots, own in zip(self.place.renewed, known, strict=True)
        )
        if any(clock is not own for clock, own in zip(clocks, known, strict=True)):
            self.change = SetItem(vars(bank), "clocks", clocks)
            self.change.apply()

    def revert(self) -> None:
        if self.change is not None:
            self.change.revert()


def _clock(slots: Slots | None, optimizers: Sequence[Optimizer]) -> Clock | None:
    """The clock of a parameter's optimizers, that ahead of several; None where nothing or an optimizer counts."""
    if slots is None or slots.parameter is None:
        return None
    owners = [each for each in optimizers if _owns(each, slots.parameter)]
    return max((CLOCKS[each] for each in owners if each in CLOCKS), key=lambda clock: clock.num_steps, default=None)


def _owns(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    return any(one is parameter for group in optimizer.param_groups for one in group["params"])


def _counts(place: Place) -> tuple[int, ...]:
    """What the clock of each of a place's parameters stands at, -1 where there is none."""
    assert place.bank is not None
    return place.bank.structure.counts


def _clock_changes(place: Place, optimizers: Sequence[Optimizer]) -> Iterator[Change]:
    for slots, count in zip(place.renewed, _counts(place), strict=True):
        if slots is not None and slots.parameter is not None and count >= 0:
            yield from optimizer_state.start_clocks(optimizers, slots.parameter, at=count)


def _birth_changes(place: Place, optimizers: Sequence[Optimizer]) -> Iterator[Change]:
    """Each operated unit is born at its latest operation; the births of other units, or of none, are not known."""
    assert place.bank is not None
    latest = {member.unit: member.births for member in place.bank.rows.members()}  # in order: the latest stays
    for column, slots in enumerate(place.renewed):
        born = {unit: births[column] for unit, births in latest.items() if births[column] >= 0}
        if slots is None or slots.parameter is None or slots.axes is None or not born:
            continue
        units = torch.tensor(list(born), dtype=torch.long, device=slots.tensor.device)
        yield from optimizer_state.resume(optimizers, slots.parameter, units, list(born.values()), slots.axes)
