"""The surgical verb: everything is computed, checked and refused first, then changed in small steps that can be undone.

An operation renews the slots of its units (they become the active members), stacks the old and the fresh weights into
the bank as knowledge and compensation, gives the rows the optimizer state of fresh ones, and lets the module that sees
producer and activation apply the bank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.composites import Rows, room_for
from neuronsurgery.errors import ModelError, PlanError
from neuronsurgery.methods import METHODS
from neuronsurgery.plans import ROWS_PER_OPERATION, Plan
from neuronsurgery.pytorch import optimizers as optimizer_state
from neuronsurgery.pytorch.attaching import FollowClocks
from neuronsurgery.pytorch.checking import MovedOutput, SameOutput, check_composite
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.distributed import agreed_plan, is_one_of_many
from neuronsurgery.pytorch.drawing import Drawn, Init, check_drawing, drawn_alike, generator_kept, seed_for
from neuronsurgery.pytorch.fading import check_retire, fades_followed, require_counted
from neuronsurgery.pytorch.hanging import hang, take_down
from neuronsurgery.pytorch.models import unwrap
from neuronsurgery.pytorch.offsets import refuse_offsets
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.reducing import removable, without
from neuronsurgery.pytorch.rewriting import class_changes
from neuronsurgery.pytorch.sharding import appended, held, is_sharded
from neuronsurgery.pytorch.sites import Discovery, check_banks_in_place, check_paths, discover
from neuronsurgery.pytorch.swapped import with_parameters_in_place
from neuronsurgery.pytorch.transaction import Change, WriteRows, run
from neuronsurgery.pytorch.trying import trial_of
from neuronsurgery.pytorch.undoable import check_undo, undoable
from neuronsurgery.reports import Report

__all__ = ["banked_names", "banks_of", "check_plan", "next_operation", "num_weights", "operate", "slot_changes", "undo"]

Optimizers = tuple[Optimizer, ...]

ALONE = (
    "other processes run, and nothing says that they hold replicas of this model: this one operated by itself. For all "
    "of them to do the same pass what DistributedDataParallel made of the model, or surgery.replicated(model)"
)


@with_parameters_in_place
def operate(
    model: nn.Module,
    plan: Plan,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    retire: int | None = None,
    init: Init | None = None,
    verify: Any = None,
    generator: torch.Generator | None = None,
    method: str = "knife",
) -> Report:
    """Carry out a plan on a model, in place; see `neuronsurgery.surgery.operate`, and for other methods their own."""
    is_alone = is_one_of_many(model)
    model = unwrap(model)
    check_drawing(init, generator)
    check_retire(retire, is_needed=METHODS[method].preserves != "yes")
    plan = agreed_plan(plan, retire=retire or 0)
    discovery = discover(model, include=list(plan.units))
    check_plan(plan, discovery)
    check_banks_in_place(discovery)
    check_paths(discovery)
    optimizers = optimizer_state.as_optimizers(optimizer)
    parameters = dict(model.named_parameters())
    optimizer_state.check_owners(optimizers, parameters)
    if not optimizers:  # a target: what has an optimizer trains by itself
        refuse_offsets({name: discovery.places[name] for name, units in plan.units.items() if units})
    operation = next_operation(model)
    before = num_weights(model)
    with generator_kept(generator):
        seed = seed_for(generator, operation)
        common = Operation(operation, optimizers, init, seed, retire or 0, plan.max_growth, method)
        chosen = [(discovery.places[name], units) for name, units in plan.units.items() if units]
        drawn = drawn_alike([(place, place.index(units)) for place, units in chosen], init, seed)
        grafts = [graft(each, common) for each in drawn]
        changes = [change for each in grafts for change in each.changes]
        banked = banked_names(discovery) | {each.place.site.name for each in grafts}
        changes += class_changes(discovery, banked)
        check = None if verify is None else (SameOutput if common.keeps_knowledge else MovedOutput)(model, verify)

        def report() -> Report:  # written within the transaction: either it happened and is on record, or not
            return Report(
                operation=operation if grafts else 0,
                operated={name: tuple(units) for name, units in plan.units.items() if units},
                declined=plan.declined,
                errors={each.place.site.name: each.error for each in grafts if each.error is not None},
                plan=plan,
                parameters_before=before,
                parameters_after=num_weights(model),
                notes=(*plan.notes, *_notes(grafts, optimizers, parameters), *([ALONE] if is_alone else [])),
                verified=check is not None,
                model_error=None if check is None else check.error,
                method=method,
            )

        return run([*changes, *([check] if check else [])], report)


def check_plan(plan: Plan, discovery: Discovery) -> None:
    """Refuse a plan that does not fit the model, or weights that no composite can preserve.

    Raises:
        PlanError: a site that the model does not have, or units out of range.
        ModelError: weights that are not finite.
    """
    for name, units in plan.units.items():
        if name not in discovery.learning:
            reason = discovery.sites.declined.get(name, "the model has no producer of that name")
            raise PlanError(f"the plan operates on {name!r}, which is no site of this model: {reason}")
        place = discovery.places[name]
        if name in plan.sites and plan.sites[name].num_units != place.site.num_units:
            raise PlanError(
                f"the plan was made for {plan.sites[name].num_units} units at {name!r}, the model has "
                f"{place.site.num_units}; plan again for this model"
            )
        if len(set(units)) != len(units) or not all(0 <= unit < place.site.num_units for unit in units):
            raise PlanError(f"units {list(units)} of {name!r} must be distinct and below {place.site.num_units}")
        for slots in place.slots:
            if slots is not None and not bool(held(slots.tensor.detach()).isfinite().all()):
                raise ModelError(
                    f"the weights of {name!r} are not finite (NaN or infinity); restore the model from a checkpoint, "
                    "a composite unit would keep the NaN for good"
                )


# -- one site --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Graft:
    """What an operation does to one site: the changes, in order, and what was measured; None: it may move."""

    place: Place
    changes: list[Change]
    error: float | None
    notes: list[str]


@dataclass(frozen=True, eq=False)
class Operation:
    """What is the same for all sites of an operation; `retire`: over how many steps its rows fade, 0: they stay."""

    number: int
    optimizers: Optimizers
    init: Init | None
    seed: int
    retire: int
    max_growth: float
    method: str

    @property
    def keeps_knowledge(self) -> bool:
        """Whether the composite units go on with what the old units computed."""
        return METHODS[self.method].preserves == "yes"


def graft(drawn: Drawn, operation: Operation) -> Graft:
    """Prepare an operation on one site: nothing is changed yet."""
    place, chosen, fresh = drawn.place, drawn.units, drawn.fresh
    optimizers = operation.optimizers
    births = _births(place, optimizers)
    if operation.retire:
        require_counted(place, births)
    old = _with_room(place, len(chosen), operation.max_growth)
    knowledge = [None if slots is None else slots.take(chosen) for slots in place.slots]
    bank = _extended_bank(drawn, old, knowledge, operation)
    bank.train(place.owners[0][0].training)
    error = _error(drawn, knowledge, bank) if operation.keeps_knowledge else None
    changes = [*slot_changes(place, chosen, fresh, optimizers), *hang(place, bank)]
    notes = list(drawn.notes)
    for slots in place.renewed:
        if slots is not None and (parameter := slots.parameter) is not None:
            changes += optimizer_state.start_clocks(optimizers, parameter)
            notes += optimizer_state.notes(optimizers, parameter)
    changes.append(FollowClocks(place, optimizers))
    changes += fades_followed(place, optimizers) if bank.rows.can_fade else []
    return Graft(place, changes, error, notes)


def _births(place: Place, optimizers: Optimizers) -> list[int]:
    """The optimizer step of each of the place's parameters now; -1 where no optimizer owns it."""
    parameters = [None if slots is None else slots.parameter for slots in place.renewed]
    steps = [None if p is None else optimizer_state.birth_step(optimizers, p) for p in parameters]
    return [-1 if step is None else step for step in steps]


def _extended_bank(
    drawn: Drawn, old: Composite | None, knowledge: Sequence[Tensor | None], operation: Operation
) -> Composite:
    """A bank with a knowledge and a compensation row for each unit appended.

    A method that does not keep knowledge has the same rows; those of what the unit knew have retired already.
    """
    place, units, births = drawn.place, drawn.units.tolist(), _births(drawn.place, operation.optimizers)
    structure = (Rows.empty(len(births)) if old is None else old.rows).extended(
        units, operation.number, [births] * len(units), operation.retire
    )
    room = room_for(len(structure), place.site.num_units)
    added = [
        None if rows is None else torch.cat([rows, rows if fresh is None else fresh])
        for rows, fresh in zip(knowledge, drawn.fresh, strict=True)
    ]
    values = [
        rows if rows is None or old is None else _appended(old, name, rows, room)
        for name, rows in zip(place.buffer_names, added, strict=True)
    ]
    faded = torch.ones(0, device=place.weight.device) if old is None else old.live_fade()
    fade = torch.cat([faded, faded.new_ones(2 * len(units))])
    if not operation.keeps_knowledge:
        structure, known = structure.forgetting(units, operation.number, operation.retire)
        fade[torch.from_numpy(known).to(fade.device)] = 0
    bank = Composite(place.product, place.path, place.site.num_units, structure, values, place.recipe, fade)
    bank.site = place.site.name
    return bank


def _appended(old: Composite, name: str, added: Tensor, room: int) -> Tensor:
    """The rows of one buffer of a bank, and those that are added."""
    value = old._buffers[name]
    if value is not None and is_sharded(value):
        return appended(value, len(old.rows), added, room)
    live = old.live(name)
    return added if live is None else torch.cat([live, added])


def _with_room(place: Place, num_chosen: int, max_growth: float) -> Composite | None:
    """The bank there is; at the bound on growth without the rows that contribute nothing."""
    bank = place.bank
    if bank is None or len(bank.rows) + ROWS_PER_OPERATION * num_chosen <= max_growth * place.site.num_units:
        return bank
    return without(bank, removable(bank))


def _error(drawn: Drawn, knowledge: Sequence[Tensor | None], bank: Composite) -> float:
    """By how much the composites of a new bank are off; of a sharded layer on the operation's units alone."""
    place, units = drawn.place, drawn.units
    if not is_sharded(place.weight):
        before, trial = [None if slots is None else slots.rows() for slots in place.slots], None
    else:
        trial = trial_of(place, units, knowledge, bank)
        before = trial.before
    renewed = [
        old if old is None or fresh is None else old.index_copy(0, units, fresh.to(old))
        for old, fresh in zip(before, drawn.fresh, strict=True)
    ]
    return check_composite(place, renewed, bank, trial)


def slot_changes(
    place: Place, units: Tensor, values: Sequence[Tensor | None], optimizers: Optimizers
) -> Iterator[Change]:
    """Write new rows into the slots: their gradients become zero, their optimizer state a fresh row's."""
    for slots, drawn in zip(place.slots, values, strict=True):
        if slots is None or slots.axes is None or drawn is None:
            continue
        axes = slots.axes
        shaped = drawn.reshape(len(units), *axes.view(slots.tensor).shape[len(axes.axes) :])
        yield WriteRows(slots.tensor, units, shaped, axes=axes)
        parameter = slots.parameter
        if parameter is None:
            continue
        if parameter.grad is not None:
            yield WriteRows(parameter.grad, units, torch.zeros_like(shaped), axes=axes)
        yield from optimizer_state.refresh(optimizers, parameter, units, axes)
        step = optimizer_state.current_step(optimizers, parameter)
        if step is not None:
            yield from optimizer_state.births(optimizers, parameter, units, [step] * len(units), axes)


def _notes(grafts: list[Graft], optimizers: Optimizers, parameters: dict[str, nn.Parameter]) -> Iterator[str]:
    seen: set[str] = set()
    for note in (note for each in grafts for note in each.notes):
        if note not in seen:
            seen.add(note)
            yield note
    if not optimizers and grafts:
        yield "no optimizer was given: rows keep the old units' optimizer state, and no cooldown can be counted"
    elif grafts:
        operated = {id(slots.tensor) for each in grafts for slots in each.place.renewed if slots is not None}
        renewed = {name: p for name, p in parameters.items() if id(p) in operated}
        if names := optimizer_state.unowned(optimizers, renewed):
            yield f"no optimizer owns {', '.join(names)}: their active members will not train"


# -- undo ------------------------------------------------------------------------------------------------------------


@with_parameters_in_place
def undo(
    model: nn.Module,
    operation: Report | int | None = None,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
) -> Report:
    """Put the old weights of an operation's units back; see `neuronsurgery.surgery.undo`."""
    model = unwrap(model)
    discovery = discover(model)
    optimizers = optimizer_state.as_optimizers(optimizer)
    parameters = dict(model.named_parameters())
    optimizer_state.check_owners(optimizers, parameters)
    asked = undoable(operation, discovery)
    check_undo(asked, discovery)
    check_banks_in_place(discovery)
    before = num_weights(model)
    changes: list[Change] = []
    emptied: set[str] = set()
    for name, units in asked.operated.items():
        place = discovery.places[name]
        changes += _restored(place, units, asked.operation, optimizers)
        if place.bank is not None and bool(place.bank.rows.of_operation(asked.operation).all()):
            emptied.add(name)
    changes += class_changes(discovery, banked_names(discovery) - emptied)

    def record() -> Report:
        return Report(
            operation=asked.operation,
            operated=asked.operated,
            declined={},
            errors={},
            plan=asked.plan,
            parameters_before=before,
            parameters_after=num_weights(model),
            notes=(f"operation {asked.operation} was undone",),
            verified=False,
            model_error=None,
        )

    return run(changes, record)


def _restored(place: Place, units: Sequence[int], operation: int, optimizers: Optimizers) -> Iterator[Change]:
    """Put the knowledge rows of an operation back into their slots, and take its rows out of the bank."""
    bank = place.bank
    assert bank is not None
    mask = bank.rows.of_operation(operation)
    knowledge = np.flatnonzero(mask & (bank.rows.sign > 0))
    restored = torch.from_numpy(bank.rows.unit[knowledge].copy()).to(place.weight.device)
    index = torch.from_numpy(knowledge).to(place.weight.device)
    live = [bank.live(name) for name in bank.buffer_names()]
    old = [
        None if value is None or slots is None or not slots.is_own else value.index_select(0, index)
        for value, slots in zip(live, place.slots, strict=True)
    ]
    yield from slot_changes(place, restored, old, optimizers)
    kept = bank.rows.kept(~mask)
    if len(kept) == 0:
        yield from take_down(place)
        return
    keep = torch.from_numpy(np.flatnonzero(~mask)).to(place.weight.device)
    values = [None if value is None else value.index_select(0, keep) for value in live]
    fade = bank.live_fade()[keep]
    smaller = Composite(place.product, place.path, place.site.num_units, kept, values, place.recipe, fade)
    yield from hang(place, smaller)


# -- the model -------------------------------------------------------------------------------------------------------


def banks_of(model: nn.Module) -> list[Composite]:
    """Every bank of a model."""
    return [module for module in model.modules() if isinstance(module, Composite)]


def next_operation(model: nn.Module) -> int:
    """The number of the next operation on a model: one more than the latest its banks remember."""
    return 1 + max((int(bank.rows.operation.max()) for bank in banks_of(model)), default=0)


def banked_names(discovery: Discovery) -> set[str]:
    """The names of the sites that carry a bank."""
    return {name for name, place in discovery.places.items() if place.bank is not None}


def num_weights(model: nn.Module) -> int:
    """The numbers a model stores: its parameters and its live frozen rows."""
    frozen = sum(
        len(bank.rows) * math.prod(value.shape[1:])
        for bank in banks_of(model)
        for name in bank.buffer_names()
        if (value := bank._buffers[name]) is not None
    )
    return sum(p.numel() for p in model.parameters()) + frozen
