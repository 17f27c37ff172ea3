"""Consolidation: rows that contribute nothing, or nearly, leave the banks of a model and of its followers.

All or nothing, as every operation. What goes by weights alone changes the output by rounding; what goes by data changes
it by what the report says. A bank without rows goes altogether: keys, class and speed are those of a plain layer again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.consolidations import Consolidated, Consolidation
from neuronsurgery.errors import EquivalenceError, MirrorError, PlanError
from neuronsurgery.pytorch import distilling
from neuronsurgery.pytorch import optimizers as optimizer_state
from neuronsurgery.pytorch.checking import MovedOutput, allowed_move, moved_activations
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.computing import FIRST_NAMES
from neuronsurgery.pytorch.distributed import session, summed
from neuronsurgery.pytorch.fading import fades_followed
from neuronsurgery.pytorch.fitting import banked_places, is_shared, targets_of, trained_as
from neuronsurgery.pytorch.fsdp import require_whole
from neuronsurgery.pytorch.hanging import hang, take_down
from neuronsurgery.pytorch.models import check_model, unwrap
from neuronsurgery.pytorch.operating import num_weights
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.reducing import Pairs, candidates, equal, faded, without
from neuronsurgery.pytorch.rewriting import class_changes
from neuronsurgery.pytorch.sites import Discovery, check_banks_in_place, discover
from neuronsurgery.pytorch.swapped import swapped_in
from neuronsurgery.pytorch.transaction import Change, run

__all__ = ["consolidate"]


def consolidate(
    model: nn.Module,
    *,
    mirrors: Any = (),
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    batches: Iterable[Any] | None = None,
    tolerance: float = 1e-3,
    max_rows: int | None = None,
) -> Consolidation:
    """Take rows that contribute nothing out of a model and its mirrors; see `neuronsurgery.surgery.consolidate`."""
    check_model(model)
    if not 0 <= tolerance < 1:
        raise PlanError(f"tolerance is {tolerance!r}; it is a share of a unit's mean activation, from 0 to below 1")
    _check_max_rows(max_rows, batches)
    source = unwrap(model)
    if batches is not None:
        require_whole(source, "consolidate(batches=...)")
    targets = [] if isinstance(mirrors, (list, tuple)) and not mirrors else targets_of(model, mirrors)
    optimizers = optimizer_state.as_optimizers(optimizer)
    optimizer_state.check_owners(optimizers, dict(source.named_parameters()))
    with ExitStack() as stack:
        for each in (source, *targets):
            stack.enter_context(swapped_in(each))
        discovery = discover(source)
        check_banks_in_place(discovery)
        places = banked_places(source, discovery, "model")
        checks, seen = _seen(source, places, batches, is_distilled=max_rows is not None)
        cuts = {name: _cut(place, seen.get(name), tolerance, max_rows) for name, place in places.items()}
        notes = [f"{name}: {cut.note}" for name, cut in cuts.items() if cut.note]
        cuts = {name: cut for name, cut in cuts.items() if cut.dropped.any()}
        changes = _changes(discovery, places, cuts)
        changes += [change for place in _fading(places, cuts) for change in fades_followed(place, optimizers)]
        followed = [_follow(target, source, places, cuts) for target in targets]
        changes += [change for each in followed for change in each[0]]
        before = num_weights(source)

        def report() -> Consolidation:
            return Consolidation(
                sites={name: cut.report for name, cut in cuts.items()},
                mirrors=tuple(moved for _, moved in followed),
                parameters_before=before,
                parameters_after=num_weights(source),
                model_error=max((check.error for check in checks), default=None),
                notes=(*notes, *(() if cuts else ("nothing to do: every frozen row contributes",))),
            )

        return run([*changes, *checks], report)


def _check_max_rows(max_rows: int | None, batches: Iterable[Any] | None) -> None:
    if max_rows is not None and (isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 0):
        raise PlanError(f"max_rows is {max_rows!r}; it is how many frozen rows a site may keep, 0 or more")
    if max_rows is not None and batches is None:
        raise PlanError("max_rows= needs batches=, on which the rows that are left are fitted to all of them")
    if max_rows is not None and session() is not None:
        raise PlanError(
            "max_rows= fits rows to the batches of one process, and several hold this model: consolidate without, or "
            "fit a copy on one process and load its state on all (surgery.restore)"
        )


# -- one bank --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Cut:
    """The rows of one bank that go, the bank that is left, and what is said of it."""

    dropped: NDArray[np.bool_]
    left: Composite | None
    report: Consolidated
    is_fitted: NDArray[np.bool_] | None = None  # which of the rows that are left have other weights now
    note: str = ""


def _cut(place: Place, seen: Seen | None, tolerance: float, max_rows: int | None) -> Cut:
    """What may go at one place, and that it changes what it may."""
    bank = place.bank
    assert bank is not None
    dropped = faded(bank)
    num_retired = int(dropped.sum())
    for pair in equal(bank, candidates(bank.rows, bank.path)):
        dropped[list(pair)] = True
    num_exact = int(dropped.sum())
    left = without(bank, dropped)
    error = _exact_error(place, left) if num_exact else 0.0
    if seen is not None:
        merged, bound = seen.cancelling(dropped, tolerance)
        dropped = dropped | merged
        left, error = without(bank, dropped), max(error, bound)
    num_merged = int(dropped.sum()) - num_exact
    num_left = 0 if left is None else len(left.rows)
    report = Consolidated(num_retired, num_exact - num_retired, num_merged, num_left, error)
    cut = Cut(dropped, left, report)
    return cut if seen is None or max_rows is None or num_left <= max_rows else _distilled(place, seen, cut, max_rows)


def _distilled(place: Place, seen: Seen, cut: Cut, max_rows: int) -> Cut:
    """What is left of a cut with fewer rows still, whose part those that stay take over."""
    bank = seen.bank
    more = distilling.chosen(seen.gram_now, bank, cut.dropped, max_rows)
    dropped = cut.dropped | more
    left, reason = without(bank, dropped), distilling.unfit(place)
    squares = seen.moved_without(more)
    is_fitted, note = None, ""
    if left is not None and more.any() and not reason:
        fit = distilling.fitted(bank, left, cut.dropped, seen.inputs)
        squares, is_fitted = fit.squares, fit.is_fitted
    elif left is not None and more.any():
        note = f"rows were chosen and not fitted: {reason}"
    num_left = 0 if left is None else len(left.rows)
    if num_left > max_rows:
        note = f"{num_left} rows are left: those of units of which a row fades, or that a norm refers to, stay"
    error = cut.report.error + float(np.sqrt(squares / float(seen.total or 1.0)))
    report = replace(cut.report, left=num_left, distilled=int(more.sum()), error=error)
    return Cut(dropped, left, report, is_fitted, note)


def _exact_error(place: Place, left: Composite | None) -> float:
    """By how much activations move where they may by rounding only.

    Raises:
        EquivalenceError: by more.
    """
    error, allowed = _moved(place, left), allowed_move(place)
    if not error <= allowed:
        raise EquivalenceError(
            f"{place.site.name}: without rows that contribute nothing the activations differ by {error:.3g} of the "
            f"largest; at most {allowed:.3g} is allowed in {place.weight.dtype}. Nothing was changed"
        )
    return error


def _moved(place: Place, left: Composite | None) -> float:
    return moved_activations(place, [None if slots is None else slots.rows() for slots in place.slots], left)


def _changes(discovery: Discovery, places: Mapping[str, Place], cuts: Mapping[str, Cut]) -> list[Change]:
    changes: list[Change] = []
    for name, cut in cuts.items():
        changes += take_down(places[name]) if cut.left is None else hang(places[name], cut.left)
    emptied = {name for name, cut in cuts.items() if cut.left is None}
    return changes + class_changes(discovery, set(places) - emptied)


def _fading(places: Mapping[str, Place], cuts: Mapping[str, Cut]) -> Iterator[Place]:
    """The places of which rows fade that are left."""
    for name, place in places.items():
        left = cuts[name].left if name in cuts else place.bank
        if left is not None and left.rows.can_fade:
            yield place


# -- mirrors ---------------------------------------------------------------------------------------------------------


def _follow(
    target: nn.Module, source: nn.Module, operated: Mapping[str, Place], cuts: Mapping[str, Cut]
) -> tuple[list[Change], dict[str, float]]:
    """The changes that take the same rows out of a target, and by how much that moves its activations.

    Raises:
        MirrorError: its banks hold other rows than the model's.
    """
    with trained_as(target, source, operated):
        discovery = discover(target, include=list(operated))
        places = banked_places(target, discovery, "target")
        own: dict[str, Cut] = {}
        for name, cut in cuts.items():
            place, leader = places.get(name), operated[name]
            if place is not None and is_shared(place, leader):
                continue
            if place is None or place.bank is None or leader.bank is None or not _is_alike(place.bank, leader.bank):
                raise MirrorError(
                    f"the mirror holds other frozen rows at {name!r} than the model, so none can be taken out of both; "
                    "call surgery.mirror(model, onto=...) after each operation, and before this"
                )
            left = without(place.bank, cut.dropped)
            own[name] = Cut(cut.dropped, left, cut.report)
            if left is not None and cut.left is not None and cut.is_fitted is not None:
                _take_over(left, cut.left, cut.is_fitted)
        moved = {name: _moved(places[name], cut.left) for name, cut in own.items()}
        return _changes(discovery, places, own), moved


def _take_over(own: Composite, other: Composite, is_fitted: NDArray[np.bool_]) -> None:
    """Give a mirror's bank the rows that were fitted: its own were those of other weights than the model's."""
    rows = torch.from_numpy(np.flatnonzero(is_fitted))
    for name in FIRST_NAMES:
        values, fitted = own.live(name), other.live(name)
        if values is not None and fitted is not None:
            values[rows.to(values.device)] = fitted[rows.to(fitted.device)].to(values)


def _is_alike(one: Composite, other: Composite) -> bool:
    return np.array_equal(one.rows.encoded()[:, :3], other.rows.encoded()[:, :3])


# -- data ------------------------------------------------------------------------------------------------------------


class Seen:
    """What the batches show of one bank: how far apart the rows of each pair are, in sums of squares.

    To distill also what it received, `inputs`, and the sums of products of all rows, (num_rows, num_rows), `gram`.
    """

    def __init__(self, bank: Composite, is_distilled: bool) -> None:
        self.bank, self.is_distilled = bank, is_distilled
        self.inputs: list[Tensor] = []
        self.gram: Tensor | float = 0.0
        self.pairs: Pairs = candidates(bank.rows, bank.path)
        self.apart: Tensor | float = 0.0
        self.total: Tensor | float = 0.0

    def summed(self, h: Tensor, rows: Tensor, axis: int) -> Tensor:
        """What the bank gives, and note of the rows that it gives it from."""
        result = type(self.bank).summed(self.bank, h, rows, axis)
        self.total = self.total + result.double().square().sum()
        flat = rows.movedim(axis, -1).reshape(-1, rows.shape[axis])[:, : len(self.bank.rows)].double()
        if self.is_distilled:
            self.gram = self.gram + flat.T @ flat
        if self.pairs:
            first, second = torch.tensor(self.pairs, device=rows.device).T
            self.apart = self.apart + (flat[:, first] - flat[:, second]).square().sum(0)
        return result

    def sums(self) -> Tensor:
        """The total, and how far apart the rows of each pair are, (1 + num_pairs,) float64."""
        device = self.bank.frozen_weight.device
        apart = torch.as_tensor(self.apart, dtype=torch.float64, device=device).expand(len(self.pairs))
        return torch.cat([torch.as_tensor(self.total, dtype=torch.float64, device=device).reshape(1), apart])

    def forward(self, x: Tensor) -> Tensor:
        """The bank's forward, and note what it received."""
        if self.is_distilled:
            num_axes = self.bank.product.num_axes(2)
            self.inputs.append(x.detach().to(self.bank.frozen_weight)[(None,) * max(0, num_axes - x.dim())].clone())
        return type(self.bank).forward(self.bank, x)

    @property
    def gram_now(self) -> NDArray[np.float64]:
        """The sums of products."""
        num_rows = len(self.bank.rows)
        found = self.gram.cpu().numpy() if isinstance(self.gram, Tensor) else np.zeros((num_rows, num_rows))
        return np.asarray(found, np.float64)

    def moved_without(self, dropped: NDArray[np.bool_]) -> float:
        """The sum of squares by which the units' activations move without these rows."""
        rows, gram = self.bank.rows, self.gram_now
        parts = [np.where(dropped & (rows.unit == unit), rows.sign, 0) for unit in np.unique(rows.unit[dropped])]
        return sum(max(0.0, float(part @ gram @ part)) for part in parts)

    def cancelling(self, gone: NDArray[np.bool_], tolerance: float) -> tuple[NDArray[np.bool_], float]:
        """Mask of the rows of pairs that give the same but for a tolerance, and a bound on the error of them all."""
        dropped, errors = np.zeros_like(gone), dict[int, float]()
        if not self.pairs or not isinstance(self.total, Tensor) or float(self.total) == 0.0:
            return dropped, 0.0
        assert isinstance(self.apart, Tensor)
        total = float(self.total)
        apart = (self.apart / (total / self.bank.num_units)).sqrt().tolist()
        for distance, (knowledge, compensation) in sorted(zip(apart, self.pairs, strict=True)):
            both = [knowledge, compensation]
            if distance <= tolerance and not (gone | dropped)[both].any():
                dropped[both] = True
                unit = int(self.bank.rows.unit[knowledge])
                errors[unit] = errors.get(unit, 0.0) + distance
        return dropped, float(np.sqrt(sum(error**2 for error in errors.values()) / self.bank.num_units))


def _seen(
    model: nn.Module, places: Mapping[str, Place], batches: Iterable[Any] | None, *, is_distilled: bool
) -> tuple[list[MovedOutput], dict[str, Seen]]:
    """The model's outputs on the batches, to be compared with those afterwards, and what its banks show on the way."""
    if batches is None:
        return [], {}
    seen = {name: Seen(place.bank, is_distilled) for name, place in places.items() if place.bank is not None}
    with _watched(seen.values()):
        checks = [MovedOutput(model, batch) for batch in batches]
    if not checks:
        raise PlanError("batches= holds no batch; pass those on which rows are to be compared, or None")
    _add_up(list(seen.values()))
    return checks, seen


def _add_up(seen: Sequence[Seen]) -> None:
    """Let the batches of all processes that hold the model count."""
    if session() is None:
        return
    own = [each.sums() for each in seen]
    for each, sums in zip(seen, summed("what the batches show", own), strict=True):
        each.total, each.apart = sums[0], sums[1:]


@contextmanager
def _watched(seen: Iterable[Seen]) -> Iterator[None]:
    """The banks call what notes their rows, for as long as the block is open."""
    watching = list(seen)
    try:
        for each in watching:
            vars(each.bank).update(summed=each.summed, forward=each.forward)
        yield
    finally:
        for each in watching:
            vars(each.bank).pop("summed", None)
            vars(each.bank).pop("forward", None)
