"""Methods that write a unit's incoming and outgoing weights: nothing is kept of it, and no bank is hung.

Both sides get the optimizer state of fresh weights: rows in the site's own parameters, columns in those of its
consumers. All sites' rows are written before all columns, so that a unit that starts without an effect has none.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.consumers import Consumers
from neuronsurgery.plans import Plan
from neuronsurgery.pytorch import optimizers as optimizer_state
from neuronsurgery.pytorch.checking import MovedOutput, SameOutput
from neuronsurgery.pytorch.consuming import Consumer, consumers_of
from neuronsurgery.pytorch.distributed import agreed_plan
from neuronsurgery.pytorch.drawing import Init, check_drawing, drawn_alike, generator_kept, seed_for
from neuronsurgery.pytorch.fsdp import require_whole
from neuronsurgery.pytorch.models import check_model, unwrap
from neuronsurgery.pytorch.operating import check_plan, num_weights, slot_changes
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.sites import explored
from neuronsurgery.pytorch.swapped import with_parameters_in_place
from neuronsurgery.pytorch.transaction import Change, WriteRows, run
from neuronsurgery.reports import Report

__all__ = ["Subject", "column_changes", "consumers", "prepared", "reported", "reset_units", "seed_of", "silenced"]

Optimizers = tuple[Optimizer, ...]


@with_parameters_in_place
def consumers(model: nn.Module, *, include: Collection[str] = ()) -> Consumers:
    """Who reads the units of each site; see `neuronsurgery.surgery.consumers`."""
    check_model(model)
    discovery, survey = explored(model, include=include)
    found = {name: consumers_of(survey, place) for name, place in discovery.learning.items()}
    readers = {
        name: {each.name: each.columns.shape[1] for each in own}
        for name, own in found.items()
        if not isinstance(own, str)
    }
    return Consumers(readers, {name: reason for name, reason in found.items() if isinstance(reason, str)})


@with_parameters_in_place
def reset_units(
    model: nn.Module,
    plan: Plan,
    *,
    method: str,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    init: Init | None = None,
    verify: Any = None,
    generator: torch.Generator | None = None,
) -> Report:
    """Draw the units of a plan anew and silence them; see `neuronsurgery.surgery.redo`."""
    require_whole(model, "redo or regrama")
    check_drawing(init, generator)
    subject = prepared(model, plan, optimizer, method)
    with generator_kept(generator):
        seed = seed_of(subject, generator)
        drawn = drawn_alike([(place, units) for place, units, _ in subject.sites()], init, seed)
        changes = [c for one in drawn for c in slot_changes(one.place, one.units, one.fresh, subject.optimizers)]
        notes = [note for one in drawn for note in one.notes]
        changes += silenced(subject)
        return reported(replace(subject, notes=(*subject.notes, *dict.fromkeys(notes))), changes, verify)


def silenced(subject: Subject) -> Iterator[Change]:
    """Zero the outgoing weights of all units of a subject."""
    for _, units, readers in subject.sites():
        for consumer in readers:
            columns = consumer.of(units)
            silent = torch.zeros_like(consumer.axes.take(consumer.weight.detach(), columns))
            yield from column_changes(consumer, columns, silent, subject.optimizers)


# -- what all of them share ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and a plan that were checked: the units to write, site by site, and who reads them."""

    model: nn.Module
    plan: Plan
    method: str
    optimizers: Optimizers
    places: Mapping[str, Place]
    readers: Mapping[str, tuple[Consumer, ...]]
    notes: tuple[str, ...] = ()

    def sites(self) -> Iterator[tuple[Place, Tensor, tuple[Consumer, ...]]]:
        """Each site with its units, (r,) int64, and its consumers."""
        for name, units in self.plan.units.items():
            place = self.places[name]
            yield place, torch.tensor(units, dtype=torch.long, device=place.weight.device), self.readers[name]


def prepared(
    model: nn.Module,
    plan: Plan,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    method: str,
    why_not: Callable[[Place, tuple[Consumer, ...]], str] = lambda place, readers: "",
) -> Subject:
    """Check model, plan and optimizers, and leave out sites whose consumers are not known, or that a method declines.

    Raises:
        PlanError: a plan that does not fit the model.
        OptimizerError: an optimizer that owns none of the parameters.
    """
    model, plan = unwrap(model), agreed_plan(plan)
    discovery, survey = explored(model, include=list(plan.units))
    check_plan(plan, discovery)
    optimizers = optimizer_state.as_optimizers(optimizer)
    optimizer_state.check_owners(optimizers, dict(model.named_parameters()))
    readers: dict[str, tuple[Consumer, ...]] = {}
    declined: dict[str, str] = {}
    for name in plan.units:
        found = consumers_of(survey, discovery.places[name])
        reason = found if isinstance(found, str) else why_not(discovery.places[name], found)
        if reason or isinstance(found, str):
            declined[name] = reason
        else:
            readers[name] = found
    units = {name: chosen for name, chosen in plan.units.items() if name in readers}
    kept = replace(plan, units=units, declined={**plan.declined, **declined})
    notes = [*plan.notes, *_notes(model, optimizers, discovery.places, readers)] if units else plan.notes
    return Subject(model, kept, method, optimizers, discovery.places, readers, tuple(notes))


def _notes(
    model: nn.Module,
    optimizers: Optimizers,
    places: Mapping[str, Place],
    readers: Mapping[str, tuple[Consumer, ...]],
) -> Iterator[str]:
    """What a reader should know of the optimizers of the weights that will be written."""
    if not optimizers:
        yield "no optimizer was given: rows and columns keep the old units' optimizer state"
        return
    slots = [each.parameter for name in readers for each in places[name].renewed if each is not None]
    columns = [each.weight for of_site in readers.values() for each in of_site]
    written = {id(parameter): parameter for parameter in (*slots, *columns) if parameter is not None}
    names = {name: p for name, p in model.named_parameters() if id(p) in written}
    if unowned := optimizer_state.unowned(optimizers, names):
        yield f"no optimizer owns {', '.join(unowned)}: what was written there will not train"
    found = (note for parameter in written.values() for note in optimizer_state.notes(optimizers, parameter))
    yield from dict.fromkeys(found)


def seed_of(subject: Subject, generator: torch.Generator | None) -> int:
    """The seed of fresh draws: from the generator, else from `torch.initial_seed()` and the weights to be replaced.

    These methods leave no count of operations behind. The weights differ from one time to the next, are the same on all
    replicas, and survive a resume.
    """
    digest = 0
    if generator is None:
        for place, units, _ in subject.sites():
            rows = place.product.axes.take(place.weight.detach(), units)
            digest = zlib.crc32(rows.double().cpu().numpy().tobytes(), digest)
    return seed_for(generator, digest)


def column_changes(consumer: Consumer, columns: Tensor, values: Tensor, optimizers: Optimizers) -> Iterator[Change]:
    """Write columns of a consumer: their gradients become zero, their optimizer state that of fresh weights.

    `columns`: (c,) int64 under the consumer's axes; `values`: (c, *row_shape).
    """
    weight, axes = consumer.weight, consumer.axes
    yield WriteRows(weight, columns, values, axes)
    if weight.grad is not None:
        yield WriteRows(weight.grad, columns, torch.zeros_like(values), axes)
    yield from optimizer_state.refresh(optimizers, weight, columns, axes)
    step = optimizer_state.current_step(optimizers, weight)
    if step is not None:
        yield from optimizer_state.births(optimizers, weight, columns, [step] * len(columns), axes)


def reported(subject: Subject, changes: Sequence[Change], verify: Any, same: Sequence[SameOutput] = ()) -> Report:
    """Make the changes and return the record of them; a batch tells by how much the output moved.

    `same`: where it must not move, the check of that instead.
    """
    before = num_weights(subject.model)
    checks: list[MovedOutput | SameOutput] = [*same]
    if verify is not None:
        checks.append(MovedOutput(subject.model, verify))
    return run([*changes, *checks], functools.partial(_record, subject, before, checks))


def _record(subject: Subject, before: int, checks: Sequence[MovedOutput | SameOutput]) -> Report:
    return Report(
        operation=0,
        operated=subject.plan.units,
        declined=subject.plan.declined,
        errors={},
        plan=subject.plan,
        parameters_before=before,
        parameters_after=num_weights(subject.model),
        notes=subject.notes,
        verified=bool(checks),
        model_error=checks[0].error if checks else None,
        method=subject.method,
    )
