"""What composites are checked on where no process has the whole layer: the units of an operation alone.

To see that composite units give what their old units gave takes these units' rows and no others. Where a norm couples
units, what stands in for the others are copies of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuronsurgery.pytorch.checking import Trial
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.distributed import taken
from neuronsurgery.pytorch.places import Place, Slots
from neuronsurgery.pytorch.sharding import is_sharded
from neuronsurgery.pytorch.unit_axes import ROWS

__all__ = ["trial_of"]


def trial_of(place: Place, units: Tensor, knowledge: Sequence[Tensor | None], bank: Composite) -> Trial:
    """Stand-ins for a sharded layer before an operation on these units, and for its banks before and after.

    `knowledge`: the units' rows of each of the slots.
    """
    before = [
        None if slots is None or rows is None else _filled(slots, units, rows)
        for slots, rows in zip(place.slots, knowledge, strict=True)
    ]
    old = place.bank
    return Trial(before, None if old is None else _of_units(old, units), _of_units(bank, units))


def _filled(slots: Slots, units: Tensor, rows: Tensor) -> Tensor:
    """All units' rows, as far as they are here or are asked for; others are copies of one."""
    if not is_sharded(slots.tensor):
        return slots.rows()
    if slots.axes is None:
        return rows[:1]
    every = rows[:1].expand(slots.axes.num_units(slots.tensor.shape), *rows.shape[1:])
    return every.index_copy(0, units, rows)


def _of_units(bank: Composite, units: Tensor) -> Composite | None:
    """The part of a bank that belongs to some units, whole on every process; None where there is none."""
    mask = np.isin(bank.rows.unit, units.cpu().numpy())
    if not mask.any():
        return None
    values = [_rows_of(bank, name, mask) for name in bank.buffer_names()]
    fade = bank.live_fade()[torch.from_numpy(mask).to(units.device)]
    part = Composite(bank.product, bank.path, bank.num_units, bank.rows.kept(mask), values, bank.recipe, fade)
    part.site = bank.site
    part.train(bank.training)
    return part


def _rows_of(bank: Composite, name: str, mask: NDArray[np.bool_]) -> Tensor | None:
    value = bank._buffers[name]
    if value is None:
        return None
    return taken(f"frozen rows of {bank.site!r}", value, torch.from_numpy(np.flatnonzero(mask)).to(value.device), ROWS)
