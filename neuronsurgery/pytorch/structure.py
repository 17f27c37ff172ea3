"""The structure of a bank as one int64 tensor, so that state dicts hold tensors only.

Which unit a frozen row belongs to, its sign, its operation and its births are no weights: arithmetic on them would
corrupt a model silently. They are saved beside the weights, as a module's extra state, and checked on the way back.

    [MARK, FORMAT, num_units, num_rows, num_columns, *counts (num_columns), *table (num_rows, 4 + num_columns)]

A column is a row-wise parameter (weight, bias ...). Its count is what the clock of its optimizer stood at, -1 where
the optimizer counts its steps itself or nothing does: so ages outlive the process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuronsurgery.composites import Rows
from neuronsurgery.errors import StateError

__all__ = ["FORMAT", "MARK", "Structure", "agrees", "decoded", "is_structure"]

FORMAT = 3
MARK = 2771790
"""The first number of every structure; exact in float32, so that an average of two equal ones can be told."""

_HEAD = 5


@dataclass(frozen=True, eq=False)
class Structure:
    """Which frozen rows a bank holds, for how many units, and what the clocks of its columns stood at."""

    num_units: int
    rows: Rows
    counts: tuple[int, ...]

    def encoded(self) -> Tensor:
        """As one tensor for a state dict, (num_numbers,) int64 on the CPU."""
        num_rows, num_columns = self.rows.births.shape
        head = [MARK, FORMAT, self.num_units, num_rows, num_columns, *self.counts]
        return torch.from_numpy(np.concatenate([np.array(head, np.int64), self.rows.encoded().reshape(-1)]))


def decoded(state: Any, bank: str) -> Structure:
    """The inverse of `encoded`; `bank` is named in errors.

    Raises:
        StateError: no structure, one of another version, or one that was cast, averaged or cut.
    """
    numbers = _numbers(state, bank)
    if numbers.size < _HEAD or numbers[0] != MARK:
        raise StateError(
            f"the saved structure of {bank} does not begin as one does: it was averaged or overwritten, or an "
            "unreleased version wrote it. It is no weight; copy it as it is"
        )
    if numbers[1] != FORMAT:
        newer = "a newer version wrote it; update neuronsurgery" if numbers[1] > FORMAT else "it is not known"
        raise StateError(
            f"the saved structure of {bank} has format {numbers[1]}, this version reads format {FORMAT}: {newer}"
        )
    num_units, num_rows, num_columns = map(int, numbers[2:_HEAD])
    width = 4 + num_columns
    if min(num_units, num_rows) < 1 or num_columns < 0 or numbers.size != _HEAD + num_columns + num_rows * width:
        raise StateError(
            f"the saved structure of {bank} has {numbers.size} numbers, where {num_rows} frozen rows with "
            f"{num_columns} parameters were announced: it was cut or padded"
        )
    table = numbers[_HEAD + num_columns :].reshape(num_rows, width)
    rows = Rows.decoded(table)
    _check_rows(rows, num_units, bank)
    return Structure(num_units, rows, tuple(map(int, numbers[_HEAD : _HEAD + num_columns])))


def agrees(state: Any, own: Structure) -> bool:
    """Whether a structure that was averaged is, to rounding, this one: so it was averaged with an equal one.

    Averaging two equal state dicts key by key gives such a tensor, in float32 or float64; less can tell no units apart.
    Births and counts may differ between a network and the one that follows it, and say nothing of the output.
    """
    if not isinstance(state, Tensor) or state.dtype not in (torch.float32, torch.float64):
        return False
    expected = own.encoded().double()
    if state.shape != expected.shape:
        return False
    tolerance = 4 * torch.finfo(state.dtype).eps * expected.abs().clamp(min=1.0)
    is_same = (state.detach().cpu().double() - expected).abs() <= tolerance
    start = _HEAD + len(own.counts)
    table = is_same[start:].reshape(len(own.rows), 4 + len(own.counts))
    return bool(is_same[:_HEAD].all() and table[:, :3].all())


def is_structure(state: Any) -> bool:
    """Whether something in a state dict is the structure of a bank."""
    return (
        isinstance(state, Tensor)
        and state.dim() == 1
        and not state.is_meta
        and len(state) >= _HEAD
        and not state.is_complex()
        and float(state[0]) == MARK
    )


def _numbers(state: Any, bank: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    if not isinstance(state, Tensor):
        raise StateError(f"the saved structure of {bank} is a {type(state).__name__}, expected an int64 tensor")
    if state.dtype != torch.int64 or state.dim() != 1 or state.is_meta:
        raise StateError(
            f"the saved structure of {bank} is {state.dtype} of shape {tuple(state.shape)} on {state.device}, expected "
            "int64 of one axis: it was cast or averaged. It is no weight; leave `_extra_state` as it is"
        )
    return state.detach().cpu().numpy().copy()


def _check_rows(rows: Rows, num_units: int, bank: str) -> None:
    """Refuse rows that no series of operations leaves: each unit's members come in pairs."""
    is_pair = bool(np.isin(rows.sign, (1, -1)).all()) and bool(((rows.unit >= 0) & (rows.unit < num_units)).all())
    if is_pair:
        _, place = np.unique(rows.unit, return_inverse=True)
        is_pair = not np.bincount(place, weights=rows.sign).any()
    if not is_pair or bool((rows.operation < 1).any()) or bool((rows.retire < 0).any()):
        raise StateError(
            f"the saved structure of {bank} is none that operations leave (signs, units below {num_units}, or pairs of "
            "knowledge and compensation do not agree): it was averaged or overwritten"
        )
