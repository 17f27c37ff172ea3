"""Which operation is to be undone, told by its report, by its number, or as the last; and whether it can be.

What an undo puts back comes from the banks alone. A report says in addition which units there should be, so that one of
another model, or of units that were consolidated since, is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from neuronsurgery.errors import UndoError
from neuronsurgery.plans import MAX_GROWTH, ROWS_PER_OPERATION, Plan
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.sites import Discovery
from neuronsurgery.reports import Report
from neuronsurgery.sites import Sites
from neuronsurgery.tables import listed

__all__ = ["Undoable", "check_undo", "undoable"]


@dataclass(frozen=True)
class Undoable:
    """One operation of a model: its number, its units by site, and the plan that it carried out."""

    operation: int
    operated: Mapping[str, tuple[int, ...]]
    plan: Plan


def undoable(operation: Report | int | None, discovery: Discovery) -> Undoable:
    """The operation that is meant: a report's, one of that number, or the last.

    Raises:
        UndoError: the banks hold none of that number, or none at all.
    """
    if isinstance(operation, Report):
        if not operation.operated:
            raise UndoError("the report holds no operated unit: there is nothing to undo")
        return Undoable(operation.operation, operation.operated, operation.plan)
    if operation is not None and (isinstance(operation, bool) or not isinstance(operation, int)):
        raise UndoError(
            f"the operation to undo is a {type(operation).__name__}; pass its report, its number, or nothing for the "
            "last"
        )
    banks = {name: place.bank for name, place in discovery.places.items() if place.bank is not None}
    numbers = sorted({int(number) for bank in banks.values() for number in bank.rows.operation})
    if not numbers:
        raise UndoError("the model has no composite unit: there is nothing to undo")
    number = numbers[-1] if operation is None else operation
    if number not in numbers:
        raise UndoError(
            f"operation {number} is not in this model, whose banks hold {listed(numbers)}: it was undone, "
            "consolidated, flattened, or done on another model"
        )
    operated = {name: tuple(sorted(_units(bank, number))) for name, bank in banks.items() if _units(bank, number)}
    return Undoable(number, operated, _plan(number, operated, discovery))


def _units(bank: Composite, operation: int) -> set[int]:
    return set(bank.rows.unit[bank.rows.of_operation(operation)].tolist())


def _plan(operation: int, operated: Mapping[str, tuple[int, ...]], discovery: Discovery) -> Plan:
    """What the operation's plan must have been, as far as the banks tell."""
    sites = {name: discovery.places[name].site for name in operated}
    before = {
        name: replace(site, num_frozen=site.num_frozen - ROWS_PER_OPERATION * len(operated[name]))
        for name, site in sites.items()
    }
    return Plan(operated, {}, f"operation {operation}", MAX_GROWTH, (), Sites(before))


def check_undo(asked: Undoable, discovery: Discovery) -> None:
    """Refuse to undo what is not the latest operation on each of its units.

    Raises:
        UndoError: the operation is not in the model's banks, or a later one, a consolidation or a fade intervened.
    """
    operation = asked.operation
    for name, units in asked.operated.items():
        bank = discovery.places[name].bank if name in discovery.places else None
        found = set() if bank is None else _units(bank, operation)
        if bank is not None and found and found < set(units):
            raise UndoError(
                f"of operation {operation} on {name!r} only units {sorted(found)} are left: the rows of the others "
                f"were consolidated, or belong to another model. To undo what is left: surgery.undo(model, {operation})"
            )
        if bank is None or found != set(units):
            raise UndoError(
                f"operation {operation} on {name!r} is not in this model: it was undone, consolidated, flattened, or "
                "done on another model"
            )
        if bool((bank.live_fade()[torch.from_numpy(bank.rows.of_operation(operation))] < 1).any()):
            raise UndoError(
                f"the frozen rows of operation {operation} on {name!r} have begun to fade (retire=), and "
                "what they were is gone with them; load a checkpoint of before"
            )
        later = [unit for unit in units if bank.rows.latest()[unit] != operation]
        if later:
            raise UndoError(
                f"operation {bank.rows.latest()[later[0]]} came after operation {operation} on units {later} of "
                f"{name!r}; undo the newest first"
            )
