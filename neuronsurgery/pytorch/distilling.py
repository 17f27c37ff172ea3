"""Distillation: fewer frozen rows of a bank that give nearly what all of them gave on a data set.

Which pairs of knowledge and compensation rows go is chosen one after the other, each time the pair whose going moves
the activations least, in sums of squares, what went before included. Then the rows that are left are fitted by least
squares to what all rows gave, on three quarters of the samples; the others tell whether that helped, and the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuronsurgery.composites import KNOWLEDGE, Rows
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.computing import FIRST_NAMES
from neuronsurgery.pytorch.links import BatchNorm, Dropout, Norm, Reshape, SyncBatchNorm, UnitFunction
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.reducing import is_coupled

__all__ = ["Fit", "chosen", "fitted", "unfit"]

HELD_OUT = 4
"""Each fourth sample is kept from the fit."""

NUM_STEPS = 50
"""At most so many steps of L-BFGS."""

RIDGE = 1e-4
"""Weight of the rows' own change, relative to their size, beside the relative squared error."""


def chosen(gram: NDArray[np.float64], bank: Composite, gone: NDArray[np.bool_], num_left: int) -> NDArray[np.bool_]:
    """Mask of the rows that go so that at most `num_left` are left, where those of units of which none fades suffice.

    `gram`: (num_rows, num_rows), sums over the samples of products of the rows' activations; `gone`: those gone before.
    """
    units = [Unit.of(gram, bank.rows, rows) for rows in _by_unit(bank, gone)]
    dropped = np.zeros_like(gone)
    while int((~gone & ~dropped).sum()) > num_left:
        best = min((unit for unit in units if unit.pairs), key=lambda unit: unit.least, default=None)
        if best is None:
            break
        dropped[list(best.drop())] = True
    return dropped


def _by_unit(bank: Composite, gone: NDArray[np.bool_]) -> list[NDArray[np.int64]]:
    """The rows of each unit that may go."""
    rows = bank.rows
    is_free = ~gone & ~np.isin(rows.unit, rows.unit[rows.can_go & ~gone])
    if is_coupled(bank.path):
        first = rows.reference(bank.num_units) - bank.num_units
        is_free[first[first >= 0]] = False
    return [np.flatnonzero(is_free & (rows.unit == unit)) for unit in np.unique(rows.unit[is_free])]


class Unit:
    """The rows of one unit: which pairs are left, and by how much the activation moves without those that went."""

    def __init__(self, gram: NDArray[np.float64], knowledge: Sequence[int], compensation: Sequence[int]) -> None:
        self.gram = gram
        self.pairs = [(k, c) for k in knowledge for c in compensation]
        self.moved = np.zeros(len(gram))
        self.least = self._least()

    @staticmethod
    def of(gram: NDArray[np.float64], rows: Rows, own: NDArray[np.int64]) -> Unit:
        """All of them still there."""
        is_knowledge = rows.sign[own] == KNOWLEDGE
        return Unit(gram, own[is_knowledge].tolist(), own[~is_knowledge].tolist())

    def drop(self) -> tuple[int, int]:
        """Take out the pair whose going moves the activation least."""
        knowledge, compensation = self.best
        self.moved[knowledge] += 1
        self.moved[compensation] -= 1
        self.pairs = [(k, c) for k, c in self.pairs if k != knowledge and c != compensation]
        self.least = self._least()
        return knowledge, compensation

    def _least(self) -> float:
        """By how much more it moves, in sums of squares, without one pair more; that pair is `best`."""
        if not self.pairs:
            return 0.0
        ks, cs = np.array(self.pairs).T
        gram, along = self.gram, 2 * (self.gram @ self.moved)
        more = gram[ks, ks] + gram[cs, cs] - 2 * gram[ks, cs] + along[ks] - along[cs]
        self.best = self.pairs[int(more.argmin())]
        return float(more.min())


# -- the fit ---------------------------------------------------------------------------------------------------------


def unfit(place: Place) -> str:
    """Why the rows of a place cannot be fitted to what they are given, "" where they can."""
    if place.computed or place.product.is_stacked:
        return "their weights are computed" if place.computed else "their units are numbered by several axes"
    if place.weight.dtype not in (torch.float32, torch.float64):
        return f"they are in {place.weight.dtype}"
    for link in place.path.links:
        if isinstance(link, (Norm, Reshape)) or (isinstance(link, UnitFunction) and (link.num_others or link.live)):
            return f"'{link.name}' on their path takes more than their own values"
        is_training = any(module.training for module in place.passed_modules)
        if isinstance(link, SyncBatchNorm) or (isinstance(link, BatchNorm) and is_training):
            return f"'{link.name}' on their path takes the statistics of a batch: call model.eval() first"
    return ""


@dataclass(frozen=True, eq=False)
class Fit:
    """The rows that are left, fitted, and the sum of squares that is left of their units' errors, for all samples."""

    left: Composite
    is_fitted: NDArray[np.bool_]  # which of the rows that are left
    squares: float


def fitted(bank: Composite, left: Composite, gone: NDArray[np.bool_], inputs: Sequence[Tensor]) -> Fit:
    """What is left of a bank, fitted to what all of its rows gave but those gone before; `left` is changed.

    `inputs`: what the producer received, batch by batch. Rows of a unit change only where that helps on samples that
    the fit did not see.
    """
    changed = _changed(bank.rows, left.rows, gone)
    signs = _signs(bank.rows, changed, ~gone).to(bank.frozen_weight)
    own = _signs(left.rows, changed, np.ones(len(left.rows), np.bool_)).to(bank.frozen_weight)
    wanted = [_activations(bank, x).detach() @ signs for x in inputs]
    parts = [_split(x, target) for x, target in zip(inputs, wanted, strict=True)]
    train, kept = [part[0] for part in parts], [part[1] for part in parts if len(part[1][0])]
    before = _weights(left)
    judged = kept or train
    squares = _squares(left, judged, own).detach()
    after = _least_squares(left, train, own)
    left._buffers.update(after)
    better = _squares(left, judged, own).detach() < squares
    is_fitted = (own @ better.to(own)).bool().cpu()
    for name, values in before.items():
        mask = is_fitted.to(values.device).reshape(-1, *[1] * (values.dim() - 1))
        merged = values.clone()
        merged[: len(mask)] = torch.where(mask, after[name][: len(mask)], values[: len(mask)])
        left._buffers[name] = merged
    share = sum(len(target) for _, target in judged) / sum(map(len, wanted))
    return Fit(left, is_fitted.numpy(), float(_squares(left, judged, own).sum()) / share)


def _weights(bank: Composite) -> dict[str, Tensor]:
    """The weights and biases of all rows, unused ones as well."""
    return {name: value.detach() for name in FIRST_NAMES if (value := bank._buffers[name]) is not None}


def _changed(before: Rows, after: Rows, gone: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The units that have fewer rows than before."""
    units = np.unique(before.unit[~gone])
    counts = [np.bincount(rows, minlength=units.max() + 1)[units] for rows in (before.unit[~gone], after.unit)]
    found: NDArray[np.int64] = units[counts[0] > counts[1]]
    return found


def _signs(rows: Rows, units: NDArray[np.int64], mask: NDArray[np.bool_]) -> Tensor:
    """What sums rows into units, (num_rows, num_units): signs, zero where the mask is false."""
    is_of = rows.unit[:, None] == units[None, :]
    return torch.from_numpy(np.where(is_of & mask[:, None], rows.sign[:, None], 0))


def _activations(bank: Composite, x: Tensor) -> Tensor:
    """The activations of the rows in use for an input of the producer, (num_samples, ..., num_rows), in evaluation."""
    rows: Tensor = bank(x)
    for index, link in enumerate(bank.path.links):
        rows = rows if isinstance(link, Dropout) else bank.passed(index, link, rows)
    axis = bank.axis(len(bank.path.links), rows)
    return rows.movedim(axis, -1)[..., : len(bank.rows)]


Part = tuple[Tensor, Tensor]


def _split(x: Tensor, target: Tensor) -> tuple[Part, Part]:
    """Inputs and targets to fit to, and those kept from it: each fourth sample."""
    is_kept = torch.arange(len(x), device=x.device) % HELD_OUT == HELD_OUT - 1
    return (x[~is_kept], target[~is_kept]), (x[is_kept], target[is_kept])


def _squares(left: Composite, parts: Sequence[Part], signs: Tensor) -> Tensor:
    """The squared errors of the units, (num_units,), summed over the samples."""
    errors = [
        (_activations(left, x) @ signs - target).square().reshape(-1, signs.shape[1]).sum(0) for x, target in parts
    ]
    return torch.stack(errors).sum(0)


def _least_squares(left: Composite, train: Sequence[Part], signs: Tensor) -> dict[str, Tensor]:
    """The rows' weights and biases that come nearest to the targets, as L-BFGS finds them from where they are."""
    starts = _weights(left)
    rows = {name: value.clone().requires_grad_() for name, value in starts.items()}
    left._buffers.update(rows)
    scale = max(float(sum(target.square().sum() for _, target in train)), torch.finfo(signs.dtype).tiny)
    size = {name: value.square().sum().clamp(min=torch.finfo(value.dtype).tiny) for name, value in starts.items()}
    optimizer = torch.optim.LBFGS(rows.values(), max_iter=NUM_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _squares(left, train, signs).sum() / scale
        loss = loss + RIDGE * sum((rows[name] - starts[name]).square().sum() / size[name] for name in rows)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return {name: value.detach() for name, value in rows.items()}
