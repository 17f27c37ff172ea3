"""Flattening: a plain wider network in place of banks, for deployment.

A composite unit is a sum of activations with signs, and a linear consumer takes sums: its frozen rows become rows of
the producer, and their columns in the consumers are the unit's own, times the sign and what a fade has left. Sites go
in rounds, each traced anew: where a consumer reads two of them, one moves the other's columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neuronsurgery.errors import EquivalenceError, ModelError, OptimizerError
from neuronsurgery.flattenings import Flattened, Flattening
from neuronsurgery.pytorch.checking import MovedOutput, allowed_move, moved_activations, moved_when_flat, tolerance
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.consuming import Consumer, consumers_of
from neuronsurgery.pytorch.corrections import CORRECTIONS
from neuronsurgery.pytorch.distributed import group_of
from neuronsurgery.pytorch.fading import FADING
from neuronsurgery.pytorch.fsdp import require_whole
from neuronsurgery.pytorch.hanging import take_down
from neuronsurgery.pytorch.layouts import Passed
from neuronsurgery.pytorch.links import Dropout
from neuronsurgery.pytorch.models import check_model, unwrap
from neuronsurgery.pytorch.operating import banked_names, num_weights
from neuronsurgery.pytorch.places import Place, Slots, banks_at, owners_of
from neuronsurgery.pytorch.reducing import removable, without
from neuronsurgery.pytorch.resizing import resized, said
from neuronsurgery.pytorch.rewriting import class_changes
from neuronsurgery.pytorch.sites import Discovery, check_banks_in_place, check_paths, explored
from neuronsurgery.pytorch.survey import Survey
from neuronsurgery.pytorch.swapped import with_parameters_in_place
from neuronsurgery.pytorch.transaction import Change, Later, SetItem, WriteRows, run
from neuronsurgery.pytorch.widening import Owners, why_not_wider

__all__ = ["flatten"]


@with_parameters_in_place
def flatten(model: nn.Module, *, verify: Any = None) -> Flattening:
    """Make a model plain and wider where its banks allow; see `neuronsurgery.surgery.flatten`."""
    check_model(model)
    require_whole(model, "flatten")
    if group_of(model) is not None:
        raise ModelError("DistributedDataParallel keeps the sizes of parameters: flatten the module inside it")
    source = unwrap(model)
    discovery, _ = explored(source)
    check_banks_in_place(discovery)
    check_paths(discovery)
    _check_untrained(source)
    flat, before = Rounds(source), num_weights(source)
    checks = [] if verify is None else [_Rounded(source, verify, _depth(discovery))]

    def report() -> Flattening:
        return Flattening(
            sites=flat.done,
            declined=flat.declined,
            parameters_before=before,
            parameters_after=num_weights(source),
            model_error=checks[0].error if checks else None,
            notes=(*flat.notes, *(() if flat.done else ("nothing was flattened",))),
        )

    return run([Later(flat.changes), *checks], report)


def _check_untrained(model: nn.Module) -> None:
    """Refuse to change the size of parameters while an optimizer that operating has hooked on still trains them.

    Raises:
        OptimizerError: names the optimizer.
    """
    own = {id(parameter) for parameter in model.parameters()}
    for optimizer in {*CORRECTIONS, *FADING}:
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            raise OptimizerError(
                f"a {type(optimizer).__name__} still trains this model, and its state would no longer fit the wider "
                "layers; flatten a copy, surgery.flatten(copy.deepcopy(model)), or delete the optimizer first"
            )


def _depth(discovery: Discovery) -> int:
    """The most pairs of rows that any unit has: each rounds once more."""
    banks = [place.bank for place in discovery.places.values() if place.bank is not None]
    return max((_pairs(bank) for bank in banks), default=1)


def _pairs(bank: Composite) -> int:
    return int(torch.from_numpy(bank.rows.unit).bincount().max()) // 2


class _Rounded(MovedOutput):
    """The last change of a flattening: none, but it fails if the model's output moved by more than rounding."""

    def __init__(self, model: nn.Module, batch: Any, depth: int) -> None:
        super().__init__(model, batch)
        self.depth = depth

    def apply(self) -> None:
        super().apply()
        allowed = self.depth * max(
            (tolerance(t.dtype) for t in self.before.tensors if t.is_floating_point()), default=0
        )
        if not self.error <= allowed:
            raise EquivalenceError(
                f"the flattened model's output on the verify= batch differs by {self.error:.3g} of its largest value, "
                f"at most {allowed:.3g} is allowed; nothing was changed. In training mode dropout draws other masks: "
                "call model.eval() first"
            )


# -- which sites, in which order -------------------------------------------------------------------------------------


@dataclass(eq=False)
class Rounds:
    """The sites of a model, flattened round by round, and what is said of them."""

    model: nn.Module
    done: dict[str, Flattened] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def changes(self) -> Iterator[Change]:
        """All changes, each planned once those before it are made."""
        discovery, survey = explored(self.model)
        while chosen := self.chosen(discovery, survey):
            owners = owners_of(self.model)
            for site in chosen:
                self.done[site.place.site.name] = site.report
                yield from site.changes(owners)
            yield from class_changes(discovery, banked_names(discovery))
            discovery, survey = explored(self.model)

    def chosen(self, discovery: Discovery, survey: Survey) -> list[Site]:
        """The sites of this round: those of which no consumer reads another of them."""
        owners, taken, found = owners_of(self.model), set[int](), list[Site]()
        for name, place in discovery.places.items():
            if place.bank is None or name in self.declined:
                continue
            left = _left(place)
            readers: Sequence[Consumer] | str = consumers_of(survey, place, is_kept=True) if left is not None else ()
            reason = readers if isinstance(readers, str) else _why_not(place, left, readers, owners)
            if reason or isinstance(readers, str):
                self.declined[name] = reason
            elif not taken & (weights := {id(each.weight) for each in readers}):
                taken |= weights
                found.append(Site.of(place, left, readers))
                self.notes += _dropout_notes(place, left)
        return found


def _left(place: Place) -> Composite | None:
    """The bank of a place without the rows that contribute nothing."""
    assert place.bank is not None
    return without(place.bank, removable(place.bank))


def _why_not(place: Place, left: Composite | None, readers: Sequence[Consumer], owners: Owners) -> str:
    """Why a site cannot be plain and compute the same."""
    if left is None:
        return ""
    if reason := why_not_wider(place, tuple(readers), owners):
        return reason
    for each in readers:
        if each.passed is not Passed.LINEAR:
            return f"what it passes on the way to '{each.name}' is not linear, and composites are sums"
    for name, slots in zip(place.buffer_names, place.slots, strict=True):
        if slots is None:
            continue
        values = left.live(name)
        if slots.axes is None and values is not None and not bool(torch.eq(values, slots.rows()).all()):
            return f"its frozen rows have other values of '{slots.attribute}', of which the layer has one for all"
        if slots.axes is not None and not slots.is_own:
            return f"its '{slots.attribute}' is read elsewhere too"
    return ""


def _dropout_notes(place: Place, left: Composite | None) -> Iterator[str]:
    if left is not None and any(isinstance(link, Dropout) for link in place.path.links):
        yield f"{place.site.name}: dropout draws a mask for each unit, and so for each former row, in training"


# -- one site --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Site:
    """A site that becomes plain: the units that its rows belong to, and their shares of them."""

    place: Place
    readers: Sequence[Consumer]
    units: Tensor
    shares: Tensor
    report: Flattened

    @staticmethod
    def of(place: Place, left: Composite | None, readers: Sequence[Consumer]) -> Site:
        """With what is left of its bank."""
        bank, num_units = place.bank, place.site.num_units
        assert bank is not None
        units, shares = torch.zeros(0, dtype=torch.long), torch.zeros(0)
        if left is not None:
            units = torch.from_numpy(left.rows.unit)
            shares = torch.from_numpy(left.rows.sign).double() * left.live_fade().double().cpu()
        error = _error(place, left, shares)
        names = tuple(each.name for each in readers)
        report = Flattened(num_units, num_units + len(units), len(bank.rows) - len(units), names, error)
        return Site(place, readers, units, shares, report)

    def changes(self, owners: Owners) -> Iterator[Change]:
        """No bank, its rows behind the slots, and columns for them."""
        left = _left(self.place)  # as it is now: sites before this one may have given its rows more columns
        yield from take_down(self.place)
        if left is None:
            return
        for name, slots in zip(self.place.buffer_names, self.place.slots, strict=True):
            values = left.live(name)
            if slots is not None and slots.axes is not None and values is not None:
                yield from self.grown_slots(slots, values, owners)
        for consumer in self.readers:
            yield from self.grown_columns(consumer, owners)

    def grown_slots(self, slots: Slots, values: Tensor, owners: Owners) -> Iterator[Change]:
        assert slots.axes is not None
        (axis,), num_units = slots.axes.axes, self.place.site.num_units
        source = torch.cat([torch.arange(num_units), self.units])
        new = torch.arange(num_units, len(source), device=slots.tensor.device)
        if isinstance(slots.tensor, nn.Parameter):
            shape = slots.axes.view(slots.tensor).shape[1:]
            yield _NoGradient(slots.tensor)
            yield from resized((), slots.tensor, axis, source)
            yield WriteRows(slots.tensor, new, values.reshape(len(new), *shape), slots.axes)
        else:
            yield SetItem(slots.owner._buffers, slots.attribute, torch.cat([slots.tensor, values.to(slots.tensor)]))
        yield from said(owners, slots.tensor, "producer", len(source))

    def grown_columns(self, consumer: Consumer, owners: Owners) -> Iterator[Change]:
        """Columns of each row: its unit's, times its share; in the frozen rows of the consumer as well."""
        weight, (axis,) = consumer.weight, consumer.axes.axes
        source, now = consumer.beside(self.units)
        new = now[self.place.site.num_units :]
        shares = self.shares.repeat_interleave(new.shape[1])
        columns = new.flatten().to(weight.device)
        yield _NoGradient(weight)
        yield from resized((), weight, axis, source)
        yield Later(lambda: _scaled(weight, columns, shares, consumer))
        yield from said(owners, weight, "consumer", len(source))
        bank = next((owner._modules.get(name) for owner, name in banks_at(list(owners[id(weight)]))), None)
        if isinstance(bank, Composite):
            frozen = bank.frozen_weight.index_select(1, source.to(weight.device))
            scale = torch.ones(len(source), dtype=shares.dtype).index_copy(0, new.flatten(), shares).to(frozen)
            yield SetItem(bank._buffers, "frozen_weight", frozen * scale.reshape(-1, *[1] * (frozen.dim() - 2)))


def _scaled(weight: nn.Parameter, columns: Tensor, shares: Tensor, consumer: Consumer) -> Iterator[Change]:
    values = consumer.axes.take(weight.detach(), columns)
    scale = shares.to(values).reshape(-1, *[1] * (values.dim() - 1))
    yield WriteRows(weight, columns, values * scale, consumer.axes)


class _NoGradient:
    """Drop the gradient of a parameter: that of the operated network is not that of the plain one."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter, self.replaced = parameter, parameter.grad

    def apply(self) -> None:
        self.parameter.grad = None

    def revert(self) -> None:
        self.parameter.grad = self.replaced


def _error(place: Place, left: Composite | None, shares: Tensor) -> float:
    """By how much the sums of the plain units differ from the composites, on random inputs.

    Raises:
        EquivalenceError: by more than rounding.
    """
    own = [None if slots is None else slots.rows() for slots in place.slots]
    error = moved_activations(place, own, None) if left is None else moved_when_flat(place, left, shares)
    allowed = allowed_move(place) * (1 if left is None else _pairs(left))
    if not error <= allowed:
        raise EquivalenceError(
            f"{place.site.name}: as plain units its rows give activations that differ by {error:.3g} of the largest; "
            f"at most {allowed:.3g} is allowed in {place.weight.dtype}. Nothing was changed"
        )
    return error
