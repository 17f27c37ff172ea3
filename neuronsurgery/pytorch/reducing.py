"""Which frozen rows of a bank can go, and the bank without them: what operating and consolidating have in common.

A row that has faded to zero goes by itself. Of all others a knowledge and a compensation row of one unit go together,
where their sum is nothing: equal weights, of an active member that never moved, or equal activations on what was seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from neuronsurgery.composites import Rows
from neuronsurgery.pytorch.composites import Composite, UnitPath
from neuronsurgery.pytorch.links import Norm

__all__ = ["Pairs", "candidates", "equal", "faded", "is_coupled", "removable", "without"]

Pairs = Sequence[tuple[int, int]]
"""Knowledge and compensation rows of one unit each."""


def removable(bank: Composite) -> NDArray[np.bool_]:
    """Mask of the rows that contribute nothing by their weights alone, whatever the data; it waits for the device."""
    dropped = faded(bank)
    if bank.is_sharded:  # rows could be compared at the price of gathering them, which `consolidate` pays
        return dropped
    if any(len(value) < len(bank.rows) for name in bank.buffer_names() if (value := bank.live(name)) is not None):
        return dropped  # cut short: `check` says so
    for pair in equal(bank, candidates(bank.rows, bank.path)):
        dropped[list(pair)] = True
    return dropped


def faded(bank: Composite) -> NDArray[np.bool_]:
    """Mask of the rows that have retired."""
    none = np.zeros(len(bank.rows), np.bool_)
    if bank.fade is None or bank.fade.is_meta or len(bank.fade) < len(none):
        return none
    return bank.rows.paired((bank.live_fade() == 0).cpu().numpy() & bank.rows.can_go)


def candidates(rows: Rows, path: UnitPath) -> list[tuple[int, int]]:
    """Pairs of rows that may go: each active member's two appearances first, as they are the likeliest to be equal.

    Units of which a row fades are left alone, and so is the row that a coupling normalization refers to.
    """
    return rows.pairs(skip_first=is_coupled(path))


def is_coupled(path: UnitPath) -> bool:
    """Whether a normalization on the path couples units, whose statistics refer to their first knowledge rows."""
    return any(isinstance(link, Norm) for link in path.links)


def equal(bank: Composite, pairs: Pairs) -> list[tuple[int, int]]:
    """The pairs whose rows are bit for bit the same, no row in two of them."""
    if not pairs or bank.frozen_weight.is_meta:
        return []
    first, second = torch.tensor(pairs, device=bank.frozen_weight.device).T
    same = torch.ones(len(pairs), dtype=torch.bool, device=first.device)
    for name in bank.buffer_names():
        value = bank.live(name)
        if value is not None:
            same &= (value[first] == value[second]).reshape(len(pairs), -1).all(dim=1)
    taken: set[int] = set()
    found = []
    for pair, is_same in zip(pairs, same.tolist(), strict=True):
        if is_same and not taken & set(pair):
            taken |= set(pair)
            found.append(pair)
    return found


def without(bank: Composite, dropped: NDArray[np.bool_]) -> Composite | None:
    """A bank without these rows, None if there are no others."""
    if dropped.all():
        return None
    keep = torch.from_numpy(np.flatnonzero(~dropped)).to(bank.frozen_weight.device)
    live = [bank.live(name) for name in bank.buffer_names()]
    values = [None if value is None else value.index_select(0, keep) for value in live]
    rows, fade = bank.rows.without(dropped), bank.live_fade()[keep]
    smaller = Composite(bank.product, bank.path, bank.num_units, rows, values, bank.recipe, fade)
    smaller.site = bank.site
    smaller.train(bank.training)
    return smaller
