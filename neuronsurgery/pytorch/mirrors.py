"""Mirroring: target, average and teacher networks get the structure of an operated model, all of them or none.

Whose frozen rows a target holds depends on how it follows the model. `"own"`: its own old units, so that nothing moves,
where frozen rows will be copied or averaged with everything else. `"shared"`: the model's, where parameters alone are
averaged, and frozen rows would else stay behind for good (`offsets` finds the targets to which that happened).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from neuronsurgery.errors import MirrorError, SiteError
from neuronsurgery.mirrors import Mirrored, MirrorReport
from neuronsurgery.pytorch.checking import MovedOutput, SameOutput, check_composite, moved_activations
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.hanging import hang, take_down
from neuronsurgery.pytorch.mirrored_rows import (
    Key,
    Renewal,
    emptied_rows,
    kept_operations,
    key_rows,
    own_rows,
    shared_rows,
)
from neuronsurgery.pytorch.models import unwrap
from neuronsurgery.pytorch.offsets import MARK, mark_of, marked, refuse_offsets
from neuronsurgery.pytorch.operating import banks_of
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.rewriting import class_changes
from neuronsurgery.pytorch.sites import Discovery, discover
from neuronsurgery.pytorch.swapped import holds_for_others, swapped_in
from neuronsurgery.pytorch.transaction import Change, SetItem, WriteRows, run

__all__ = ["mirror"]

Frozen = Literal["own", "shared"]


def mirror(model: nn.Module, *, onto: Any, frozen: Frozen = "own", verify: Any = None) -> MirrorReport:
    """Give target networks the structure of a model; see `neuronsurgery.surgery.mirror`."""
    if frozen not in ("own", "shared"):
        raise MirrorError(f"frozen= takes 'own' or 'shared', found {frozen!r}")
    source, targets = unwrap(model), targets_of(model, onto)
    with ExitStack() as stack:
        for each in (source, *targets):
            stack.enter_context(swapped_in(each))
        operated = banked_places(source, discover(source), "model")
        prepared = []
        for target in targets:
            with trained_as(target, source, operated):
                prepared.append(prepare(target, operated, frozen))
        checks = [_check(each, frozen, verify) for each in prepared]
        changes = [change for each in prepared for change in each.changes]

        def report() -> MirrorReport:
            mirrored = (
                Mirrored(each.made, each.taken_back, each.moved, None if check is None else check.error)
                for each, check in zip(prepared, checks, strict=True)
            )
            return MirrorReport(frozen, tuple(mirrored), tuple(_notes(prepared, frozen)))

        return run([*changes, *(check for check in checks if check is not None)], report)


def targets_of(model: nn.Module, onto: Any) -> list[nn.Module]:
    """What was passed as `onto=`, unwrapped, each target once.

    Raises:
        MirrorError: none, the model itself, or what is no module.
    """
    found = list(onto) if isinstance(onto, (list, tuple)) else [onto]
    for each in found:
        if not isinstance(each, nn.Module):
            raise MirrorError(f"onto= takes a torch.nn.Module or a list of them, found {type(each).__name__}")
        if holds_for_others(each):
            raise MirrorError(
                "the target holds parameters alone (TensorDictParams), which one module runs in turn with the model's: "
                "it has no structure of its own. Operate before the loss module is built, or build the loss module anew"
            )
    targets = list(dict.fromkeys(unwrap(each) for each in found))
    if not targets:
        raise MirrorError("onto= holds no target: pass the network that is to follow the model")
    if any(each is unwrap(model) for each in targets):
        raise MirrorError("the target is the model itself: pass the network that follows it")
    return targets


def banked_places(model: nn.Module, discovery: Discovery, role: str) -> dict[str, Place]:
    """The places that have composite units.

    Raises:
        MirrorError: a bank of which the module shows no site, because that lies across its border.
    """
    places = {name: place for name, place in discovery.places.items() if place.bank is not None}
    known = {id(place.bank) for place in places.values()}
    for bank in banks_of(model):
        if id(bank) not in known:
            reason = discovery.declined.get(bank.site, "its producer and activation function are not both inside")
            raise MirrorError(
                f"the {role} has composite units at {bank.site!r}, which is no site of the module that was passed: "
                f"{reason}; pass the module that was operated on, and a target that corresponds to it"
            )
    return places


# -- one target ------------------------------------------------------------------------------------------------------


@contextmanager
def trained_as(target: nn.Module, model: nn.Module, operated: Mapping[str, Place]) -> Iterator[None]:
    """The target's parameters ask for gradients where the model's do, and where it was operated on.

    Targets are frozen, and frozen layers are declined; which parameters a computed weight has rows in goes by it too.
    """
    own = {id(slots.tensor) for place in operated.values() for slots in place.renewed if slots is not None}
    trained = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad or id(p) in own}
    others = [p for name, p in target.named_parameters() if p.requires_grad != (name in trained)]
    changed = [p for p in others if p.is_leaf and p.is_floating_point()]
    before = [p.requires_grad for p in changed]
    try:
        for parameter, was in zip(changed, before, strict=True):
            parameter.requires_grad_(not was)
        yield
    finally:
        for parameter, was in zip(changed, before, strict=True):
            parameter.requires_grad_(was)


@dataclass(frozen=True, eq=False)
class Prepared:
    """What mirroring does to one target: the changes, in order, and what was measured; nothing is changed yet."""

    target: nn.Module
    changes: list[Change]
    made: dict[str, tuple[int, ...]]
    taken_back: dict[str, tuple[int, ...]]
    moved: dict[str, float]


def prepare(target: nn.Module, operated: Mapping[str, Place], frozen: Frozen) -> Prepared:
    """See what a target needs, and that it fits.

    Raises:
        MirrorError: it does not.
    """
    try:
        discovery = discover(target, include=list(operated))
    except SiteError as error:
        raise MirrorError(f"the target lacks a site that was operated on in the model: {error}") from error
    mirrored = banked_places(target, discovery, "target")
    if frozen == "own":
        refuse_offsets(mirrored)
    prepared = Prepared(target, [], {}, {}, {})
    banked = set(operated)
    for name in dict.fromkeys((*operated, *mirrored)):
        place, source = discovery.places.get(name), operated.get(name)
        if place is None:
            reason = discovery.declined.get(name, "it is no site there")
            raise MirrorError(f"{name!r} was operated on in the model, and is declined in the target: {reason}")
        if source is not None and not _is_shared(place, source):
            check_fit(name, place, source)
        elif source is not None:
            continue
        _prepare_site(prepared, place, source, frozen)
    prepared.changes.extend(class_changes(discovery, banked))
    return prepared


def _prepare_site(prepared: Prepared, place: Place, source: Place | None, frozen: Frozen) -> None:
    """Add what one site needs; nothing where the target has it already."""
    bank = None if source is None else source.bank
    kept = kept_operations(place.bank, bank)
    own = {} if place.bank is None else key_rows(place.bank.rows, 1)
    surplus = [key for key in own if key not in kept]
    if surplus:
        check_mirrored(place, surplus)
    name = place.site.name
    new = [] if bank is None else [key for key in key_rows(bank.rows, 1) if key not in kept]
    if source is None or bank is None:
        renewal = emptied_rows(place)
    else:
        renewal = (own_rows if frozen == "own" else shared_rows)(place, source, kept)
        if not (new or surplus or renewal.units):
            return
    made = _bank(place, source, renewal)
    is_same = frozen == "own" and not surplus and made is not None
    prepared.moved[name] = (
        check_composite(place, renewal.slots, made)
        if is_same and made
        else moved_activations(place, renewal.slots, made)
    )
    prepared.changes.extend(_slot_changes(place, renewal))
    prepared.changes.extend(take_down(place) if made is None else hang(place, made))
    if made is not None:
        prepared.changes.append(_mark(place, made, source, new if frozen == "own" else []))
    if new:
        prepared.made[name] = tuple(sorted({unit for unit, _ in new}))
    if surplus:
        prepared.taken_back[name] = tuple(sorted({unit for unit, _ in surplus}))


def _bank(place: Place, source: Place | None, renewal: Renewal) -> Composite | None:
    """A bank of the target's own, with the model's structure: equal row by row, so that state dicts correspond."""
    if source is None or source.bank is None:
        return None
    rows = source.bank.rows
    bank = Composite(place.product, place.path, place.site.num_units, rows, renewal.values, place.recipe)
    bank.site = place.site.name
    bank.train(place.owners[0][0].training)
    return bank


def _slot_changes(place: Place, renewal: Renewal) -> Iterator[Change]:
    """Write the slots of the units concerned; gradients that their old members left behind become zero."""
    units = torch.tensor(renewal.units, dtype=torch.long, device=place.weight.device)
    for slot, rows in zip(place.slots, renewal.slots, strict=True):
        if slot is None or rows is None or slot.axes is None or not slot.is_own or not len(units):
            continue
        axes = slot.axes
        values = rows[units].reshape(len(units), *axes.view(slot.tensor).shape[len(axes.axes) :])
        yield WriteRows(slot.tensor, units, values, axes=axes)
        if slot.tensor.grad is not None:
            yield WriteRows(slot.tensor.grad, units, torch.zeros_like(values), axes=axes)


def _mark(place: Place, made: Composite, source: Place | None, new: Sequence[Key]) -> Change:
    """Note in the bank which of its knowledge rows are the target's own, and lag behind the model's."""
    assert source is not None and source.bank is not None
    rows = key_rows(made.rows, 1)
    index = [rows[key] for key in new]
    written, theirs = made.frozen_weight[index], source.bank.frozen_weight[index].to(made.frozen_weight)
    held = made if place.bank is None else place.bank
    return SetItem(vars(held), MARK, marked(mark_of(place.bank), list(new), written, theirs))


# -- what fits -------------------------------------------------------------------------------------------------------


def _is_shared(place: Place, source: Place) -> bool:
    """Whether the target's layer is the model's own: then it has what the model has."""
    return place.weight is source.weight and {id(owner) for owner, _ in place.owners} == {
        id(owner) for owner, _ in source.owners
    }


def check_fit(name: str, place: Place, source: Place) -> None:
    """Refuse a target whose site is another.

    Raises:
        MirrorError: with what differs.
    """
    tensors = {id(slots.tensor) for slots in source.slots if slots is not None}
    if any(slots is not None and id(slots.tensor) in tensors for slots in place.slots):
        raise MirrorError(
            f"the target's {name!r} shares a parameter with the model's without being the same module: a change to "
            "one would change the other; give the target parameters of its own"
        )
    for what, ours, theirs in _aspects(place, source):
        if ours != theirs:
            raise MirrorError(
                f"the target's {name!r} differs from the model's: {what} {ours}, in the model {theirs}; build the "
                "target as the model was built"
            )


def _aspects(place: Place, source: Place) -> Iterator[tuple[str, Any, Any]]:
    """What must be equal, in words, in the target and in the model."""
    yield "the number of units is", place.site.num_units, source.site.num_units
    yield "it is held by", _names(place), _names(source)
    yield "it computes", place.product, source.product
    yield "its activation function is", place.path.name, source.path.name
    yield "its units have", place.buffer_names, source.buffer_names
    yield "its units have of their own", _renewed(place), _renewed(source)
    yield "the shapes of a unit's weights are", _shapes(place), _shapes(source)


def _names(place: Place) -> list[tuple[str, str]]:
    """Under which names its weight is held; tied ones are held by several modules."""
    return [(type(owner).__name__, name) for owner, name in place.owners]


def _renewed(place: Place) -> list[bool]:
    return [slots is not None for slots in place.renewed]


def _shapes(place: Place) -> list[tuple[int, ...] | None]:
    return [None if slots is None else tuple(slots.rows().shape[1:]) for slots in place.slots]


def check_mirrored(place: Place, surplus: Sequence[Key]) -> None:
    """Refuse to take back operations on a bank that mirroring did not make: it may be someone's work.

    Raises:
        MirrorError: with the units.
    """
    if mark_of(place.bank) is None:
        units = sorted({unit for unit, _ in surplus})
        raise MirrorError(
            f"the target has operations on units {units} of {place.site.name!r} that the model does not have, and that "
            "mirroring did not make: it was operated on by itself, target and model were exchanged, or it is a copy "
            "made before the model's operation was undone. Undo them on the target: surgery.undo(target, report)"
        )


# -- the report ------------------------------------------------------------------------------------------------------


def _check(prepared: Prepared, frozen: Frozen, verify: Any) -> SameOutput | MovedOutput | None:
    """The comparison of a target's output; it must not move where its own units stay."""
    if verify is None:
        return None
    is_same = frozen == "own" and not prepared.taken_back
    return SameOutput(prepared.target, verify) if is_same else MovedOutput(prepared.target, verify)


def _notes(prepared: Sequence[Prepared], frozen: Frozen) -> Iterator[str]:
    if not any(each.moved for each in prepared):
        yield "nothing to do: the targets have what the model has"
    elif frozen == "shared" and any(moved for each in prepared for moved in each.moved.values()):
        yield (
            "the targets' composite units gave up what they lagged behind the model; a target that is next copied as a "
            'whole (load_state_dict) needs frozen="own", and does not move'
        )
