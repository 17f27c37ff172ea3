"""The rows that mirroring gives a target at one site: its slots and its bank, computed before anything changes.

An operation is known by its unit, its number and its compensation row: after an undo numbers are given anew, the fresh
draw never comes again. Per unit, a target keeps the operations with which the model's began, gives up what came after,
and takes over the rest, oldest first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuronsurgery.composites import Rows
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.links import is_statistic
from neuronsurgery.pytorch.offsets import differs
from neuronsurgery.pytorch.places import Place, Slots

__all__ = [
    "Key",
    "Renewal",
    "emptied_rows",
    "fade_of",
    "kept_operations",
    "key_rows",
    "own_rows",
    "retired_operations",
    "shared_rows",
]

Key = tuple[int, int]
"""Unit and operation."""


@dataclass(frozen=True, eq=False)
class Renewal:
    """What a site of a target will hold.

    `slots`: all units' rows of each of the place's slots. `values`: the bank's live rows, as the place's
    `buffer_names`, in the order of the model's. `units`: those whose slots may have changed.
    """

    slots: list[Tensor | None]
    values: list[Tensor | None]
    units: tuple[int, ...]


def key_rows(rows: Rows, sign: int) -> dict[Key, int]:
    """The row of each operation on each unit, of knowledge (1) or compensation (-1)."""
    return {
        (int(rows.unit[row]), int(rows.operation[row])): int(row) for row in np.flatnonzero(np.sign(rows.sign) == sign)
    }


def kept_operations(target: Composite | None, model: Composite | None) -> set[Key]:
    """The operations that both have: for each unit the longest common beginning of its history."""
    if target is None or model is None:
        return set()
    ours, theirs = key_rows(target.rows, -1), key_rows(model.rows, -1)
    ours = {key: row for key, row in ours.items() if key not in retired_operations(target, model)}
    both = [key for key in ours if key in theirs]
    one = target.frozen_weight[[ours[key] for key in both]].flatten(1)
    other = model.frozen_weight[[theirs[key] for key in both]].flatten(1).to(one)
    known = _agreeing(both, one, other) if both else set()
    kept: set[Key] = set()
    for unit, history in _histories(ours).items():
        for mine, operation in zip(history, _histories(theirs).get(unit, []), strict=False):
            if mine != operation or (unit, mine) not in known:
                break
            kept.add((unit, mine))
    return kept


def retired_operations(target: Composite | None, model: Composite | None) -> set[Key]:
    """The operations whose rows have begun to fade in the target and are gone from the model: it consolidated them.

    There is nothing to take back. An operation whose rows have begun to fade cannot be undone.
    """
    if target is None or target.fade is None:
        return set()
    has_begun = (target.live_fade() < 1).tolist()
    theirs = {} if model is None else key_rows(model.rows, -1)
    return {key for key, row in key_rows(target.rows, -1).items() if has_begun[row] and key not in theirs}


def fade_of(place: Place, source: Place, kept: set[Key], *, shares: bool) -> Tensor:
    """The fade of the target's rows, (num_rows,), in the order of the model's.

    One that shares the model's rows has its fade. Else kept rows go on from where they are in the target, and new ones
    begin: so the output stays, until the fade is copied or averaged with everything else.
    """
    bank = source.bank
    assert bank is not None
    fade = bank.live_fade().to(place.weight.device, copy=True)
    if shares:
        return fade
    fade.fill_(1.0)
    if place.bank is not None:
        ours = place.bank.live_fade()
        for sign in (1, -1):
            old, new = key_rows(place.bank.rows, sign), key_rows(bank.rows, sign)
            for key in kept:
                fade[new[key]] = ours[old[key]]
    return fade


def _agreeing(keys: list[Key], one: Tensor, other: Tensor) -> set[Key]:
    """The operations whose compensation rows are one draw: averages of equal rows drift by their rounding alone."""
    allowed = max(1e-2, torch.finfo(one.dtype).eps ** 0.5)
    scale = torch.maximum(one.norm(dim=1), other.norm(dim=1))
    agrees = (one - other).norm(dim=1) <= allowed * scale
    return {key for key, is_same in zip(keys, agrees.tolist(), strict=True) if is_same}


def _histories(keys: Collection[Key]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for unit, operation in sorted(keys):
        found[unit].append(operation)
    return found


def own_rows(place: Place, source: Place, kept: set[Key]) -> Renewal:
    """The target's knowledge is its own slots; compensation rows and slots are the model's compensation rows.

    Running statistics stay the slot's in all members, as at surgery.
    """
    slots, taken = _taken_back(place, kept, source.bank)
    bank = source.bank
    assert bank is not None
    values = _rows_of(source, place)
    _keep(place, bank.rows, values, kept)
    knowledge, compensation = key_rows(bank.rows, 1), key_rows(bank.rows, -1)
    made: dict[int, list[int]] = defaultdict(list)
    for unit, operation in compensation:
        if (unit, operation) not in kept:
            made[operation].append(unit)
    for operation in sorted(made):
        units = _index(made[operation], place)
        old = _index([knowledge[unit, operation] for unit in made[operation]], place)
        new = _index([compensation[unit, operation] for unit in made[operation]], place)
        for slot, rows, value in zip(place.slots, slots, values, strict=True):
            if slot is None or rows is None or value is None:
                continue
            value[old] = _taken(slot, rows, units)
            if slot.is_renewed:
                rows[units] = value[new]
            else:
                value[new] = value[old]
    return Renewal(slots, values, tuple(sorted({*taken, *(unit for units in made.values() for unit in units)})))


def shared_rows(place: Place, source: Place, kept: set[Key]) -> Renewal:
    """Frozen rows are the model's, and so are the slots of units whose rows were others; they give up their lag."""
    slots, taken = _taken_back(place, kept, source.bank)
    bank = source.bank
    assert bank is not None
    values = _rows_of(source, place)
    own = [value.clone() if value is not None else None for value in values]
    _keep(place, bank.rows, own, kept)
    units = {unit for unit, operation in key_rows(bank.rows, -1) if (unit, operation) not in kept}
    for slot, ours, theirs in zip(place.slots, own, values, strict=True):
        if slot is None or ours is None or theirs is None:
            continue
        if is_statistic(slot.attribute):
            theirs.copy_(ours)  # of what each row sees in its own network; new rows have the model's
        else:
            others = differs(ours, theirs).flatten(1).any(1) if ours.dim() > 1 else differs(ours, theirs)
            units |= set(bank.rows.unit[others.cpu().numpy()].tolist())
    index = _index(sorted(units), place)
    for slot, rows, model_slot in zip(place.slots, slots, source.slots, strict=True):
        if slot is not None and rows is not None and model_slot is not None and slot.is_own and slot.axes is not None:
            rows[index] = model_slot.take(index.to(model_slot.tensor.device)).to(rows)
    return Renewal(slots, values, tuple(sorted({*taken, *units})))


def emptied_rows(place: Place) -> Renewal:
    """The slots of a target of which the model has no composite unit any more."""
    slots, taken = _taken_back(place, set(), None)
    return Renewal(slots, [None for _ in slots], tuple(sorted(taken)))


def _taken_back(place: Place, kept: set[Key], model: Composite | None) -> tuple[list[Tensor | None], set[int]]:
    """All units' slots with the operations taken back that are not kept, and their units: as `undo`, newest first."""
    slots = [None if slot is None else slot.rows().clone() for slot in place.slots]
    bank = place.bank
    if bank is None:
        return slots, set()
    earliest: dict[int, int] = {}
    retired = retired_operations(bank, model)
    for (unit, operation), row in sorted(key_rows(bank.rows, 1).items(), reverse=True):
        if (unit, operation) not in kept and (unit, operation) not in retired:
            earliest[unit] = row
    units, index = _index(list(earliest), place), _index(list(earliest.values()), place)
    for name, slot, rows in zip(bank.buffer_names(), place.slots, slots, strict=True):
        live = bank.live(name)
        if slot is not None and rows is not None and live is not None and slot.is_own and slot.axes is not None:
            rows[units] = live[index]
    return slots, set(earliest)


def _rows_of(source: Place, place: Place) -> list[Tensor | None]:
    """Copies of the model's live rows, in the target's dtypes and on its devices."""
    bank = source.bank
    assert bank is not None
    live = [bank.live(name) for name in bank.buffer_names()]
    return [
        None if value is None or slot is None else value.to(slot.tensor.device, slot.tensor.dtype, copy=True)
        for value, slot in zip(live, place.slots, strict=True)
    ]


def _keep(place: Place, rows: Rows, values: list[Tensor | None], kept: set[Key]) -> None:
    """Put the target's own rows of kept operations where the model's are."""
    bank = place.bank
    if bank is None or not kept:
        return
    for sign in (1, -1):
        ours, theirs = key_rows(bank.rows, sign), key_rows(rows, sign)
        old = _index([ours[key] for key in sorted(kept)], place)
        new = _index([theirs[key] for key in sorted(kept)], place)
        for name, value in zip(bank.buffer_names(), values, strict=True):
            live = bank.live(name)
            if value is not None and live is not None:
                value[new] = live[old]


def _taken(slot: Slots, rows: Tensor, units: Tensor) -> Tensor:
    return rows.expand(len(units)) if slot.axes is None else rows[units]


def _index(numbers: list[int], place: Place) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long, device=place.weight.device)
