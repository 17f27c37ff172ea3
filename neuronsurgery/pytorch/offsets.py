"""Permanent offsets: targets of which parameters alone follow their model, while their own frozen rows stay behind.

Mirrored with `frozen="own"`, a target knows its own old units: those of the model, some updates ago. Copied or averaged
by state dict, these rows follow the model's. Where an update goes over `zip(parameters)` alone they never do, and the
target keeps an offset for good. Nothing but values can tell: such updates write through `.data`, which no version
counter notices. So mirroring notes which elements of a knowledge row lag behind the model's by so much that any
update would show. If all of them are bit for bit what they were, and the slots have moved, the rows are left behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuronsurgery.composites import Rows
from neuronsurgery.errors import MirrorError
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.places import Place

__all__ = ["MARK", "Mark", "differs", "mark_of", "marked", "offsets_of", "refuse_offsets"]

MARK = "_neuronsurgery_mirrored"
"""The attribute of a bank that was given its rows by mirroring."""


@dataclass(frozen=True, eq=False)
class Mark:
    """What mirroring wrote into a bank: the knowledge rows of a target's own units that lag behind the model's.

    `keys` are (unit, operation); `written` (num_keys, *row_shape) the rows of the bank's first weight, and `lagging`,
    of the same shape, where any update would show.
    """

    keys: tuple[tuple[int, int], ...]
    written: Tensor
    lagging: Tensor


def mark_of(bank: Composite | None) -> Mark | None:
    """What mirroring wrote into a bank, None if it made none of its rows."""
    return None if bank is None else vars(bank).get(MARK)


def marked(old: Mark | None, keys: list[tuple[int, int]], written: Tensor, theirs: Tensor) -> Mark:
    """The mark with further knowledge rows, which are the model's `theirs`, (num_keys, *row_shape) both."""
    lagging = differs(written, theirs)
    new = Mark(tuple(keys), written.clone(), lagging)
    if old is None or not old.keys:
        return new
    kept = [index for index, key in enumerate(old.keys) if key not in keys]
    written, lagging = old.written[kept].to(written), old.lagging[kept].to(lagging.device)
    return Mark(
        (*(old.keys[index] for index in kept), *new.keys),
        torch.cat([written, new.written]),
        torch.cat([lagging, new.lagging]),
    )


def differs(one: Tensor, other: Tensor) -> Tensor:
    """Where two tensors differ by so much that an update by 1/2000 of it, or more, would show in their dtype.

    In half precision never: there averages with small rates stall by themselves, and nothing can be told.
    """
    noticeable = max(1e-4, torch.finfo(one.dtype).eps * 2000)
    return (one - other).abs() > noticeable * torch.maximum(one.abs(), other.abs())


def offsets_of(places: Mapping[str, Place]) -> dict[str, tuple[int, ...]]:
    """Site name -> units with a permanent offset: their slots have moved, their own knowledge rows have not.

    A layer with gradients trains by itself, and is no target. It waits for the device.
    """
    found = {name: _left_behind(place) for name, place in places.items()}
    return {name: units for name, units in found.items() if units}


def refuse_offsets(places: Mapping[str, Place]) -> None:
    """Refuse a target with permanent offsets.

    Raises:
        MirrorError: with the units of the first such site, and how to mend them.
    """
    for name, units in offsets_of(places).items():
        raise MirrorError(
            f"the target's {name!r} was mirrored with frozen='own'; since then the slots of units {list(units)} have "
            "moved and their frozen rows have not: its updates go over parameters alone (zip(parameters())), and the "
            "target would keep an offset from the model for good. Mirror it with frozen='shared', now and from now on, "
            "or average and copy state dicts. (If it is no target but trains by itself, operate on it with "
            "Units, instead of mirroring)"
        )


def _left_behind(place: Place) -> tuple[int, ...]:
    """The units of a place whose slots have moved without their knowledge rows."""
    bank, mark, slots = place.bank, mark_of(place.bank), place.slots[0]
    if bank is None or mark is None or slots is None or place.weight.grad is not None:
        return ()
    rows = {key: index for index, key in enumerate(_keys(bank.rows)) if bank.rows.sign[index] > 0}
    known = [index for index, key in enumerate(mark.keys) if key in rows and bool(mark.lagging[index].any())]
    if not known or bank.frozen_weight.shape[1:] != mark.written.shape[1:]:
        return ()
    now = bank.frozen_weight[[rows[mark.keys[index]] for index in known]]
    lagging, written = mark.lagging[known].to(now.device), mark.written[known].to(now.device)
    stuck = ((now == written) | ~lagging).flatten(1).all(1)
    units = [mark.keys[index][0] for index in known]
    moved = _moved(bank, slots.take(torch.tensor(units, device=now.device)), units)
    return tuple(sorted({unit for unit, is_left in zip(units, (stuck & moved).tolist(), strict=True) if is_left}))


def _moved(bank: Composite, slots: Tensor, units: list[int]) -> Tensor:
    """Whether the slots, (num_units, *row_shape), have left their latest compensation rows."""
    order = np.lexsort((bank.rows.operation, bank.rows.sign < 0))  # compensation rows last, the latest at the end
    latest = {int(bank.rows.unit[row]): int(row) for row in order}
    return differs(slots, bank.frozen_weight[[latest[unit] for unit in units]]).flatten(1).any(1)


def _keys(rows: Rows) -> list[tuple[int, int]]:
    return list(zip(rows.unit.tolist(), rows.operation.tolist(), strict=True))
