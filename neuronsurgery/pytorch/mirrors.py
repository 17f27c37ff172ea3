"""Mirroring: target, average and teacher networks get the structure of an operated model, all of them or none.

Whose frozen rows a target holds depends on how it follows the model. `"own"`: its own old units, so that nothing moves,
where frozen rows will be copied or averaged with everything else. `"shared"`: the model's, where parameters alone are
averaged, and frozen rows would else stay behind for good (`offsets` finds the targets to which that happened).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from neuronsurgery.errors import MirrorError, SiteError
from neuronsurgery.mirrors import Mirrored, MirrorReport
from neuronsurgery.pytorch.checking import MovedOutput, SameOutput, check_composite, moved_activations
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.distributed import by_itself
from neuronsurgery.pytorch.fading import Follow
from neuronsurgery.pytorch.fitting import (
    banked_places,
    check_fit,
    check_mirrored,
    is_shared,
    targets_of,
    trained_as,
)
from neuronsurgery.pytorch.fsdp import require_whole
from neuronsurgery.pytorch.hanging import hang, take_down
from neuronsurgery.pytorch.mirrored_rows import (
    Key,
    Renewal,
    emptied_rows,
    fade_of,
    kept_operations,
    key_rows,
    own_rows,
    retired_operations,
    shared_rows,
)
from neuronsurgery.pytorch.models import unwrap
from neuronsurgery.pytorch.offsets import MARK, mark_of, marked, refuse_offsets
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.rewriting import class_changes
from neuronsurgery.pytorch.sites import Discovery, discover
from neuronsurgery.pytorch.swapped import swapped_in
from neuronsurgery.pytorch.transaction import Change, SetItem, WriteRows, run

__all__ = ["check_mirrors", "mirror"]

Frozen = Literal["own", "shared"]


@by_itself
def mirror(model: nn.Module, *, onto: Any, frozen: Frozen = "own", verify: Any = None) -> MirrorReport:
    """Give target networks the structure of a model; see `neuronsurgery.surgery.mirror`."""
    require_whole(model, "mirror")
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


def check_mirrors(model: nn.Module, *, onto: Any, sites: Collection[str]) -> None:
    """Refuse targets that could not be given the structure of a model once these sites of it are operated on.

    Raises:
        MirrorError: a target lacks one of the sites, or has another layer there.
    """
    require_whole(model, "mirror")
    source, targets = unwrap(model), targets_of(model, onto)
    with ExitStack() as stack:
        for each in (source, *targets):
            stack.enter_context(swapped_in(each))
        places = {name: place for name, place in discover(source, include=sites).places.items() if name in sites}
        for target in targets:
            with trained_as(target, source, places):
                found = _discovered(target, places)
                for name, place in places.items():
                    check_fit(name, _found(found, name), place)


# -- one target ------------------------------------------------------------------------------------------------------


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
    discovery = _discovered(target, operated)
    mirrored = banked_places(target, discovery, "target")
    if frozen == "own":
        refuse_offsets(mirrored)
    prepared = Prepared(target, [], {}, {}, {})
    banked = set(operated)
    for name in dict.fromkeys((*operated, *mirrored)):
        place, source = _found(discovery, name), operated.get(name)
        if source is not None and not is_shared(place, source):
            check_fit(name, place, source)
        elif source is not None:
            continue
        _prepare_site(prepared, place, source, frozen)
    prepared.changes.extend(class_changes(discovery, banked))
    return prepared


def _discovered(target: nn.Module, operated: Mapping[str, Place]) -> Discovery:
    try:
        return discover(target, include=list(operated))
    except SiteError as error:
        raise MirrorError(f"the target lacks a site that is operated on in the model: {error}") from error


def _found(discovery: Discovery, name: str) -> Place:
    if name not in discovery.places:
        reason = discovery.declined.get(name, "it is no site there")
        raise MirrorError(f"{name!r} is operated on in the model, and is declined in the target: {reason}")
    return discovery.places[name]


def _prepare_site(prepared: Prepared, place: Place, source: Place | None, frozen: Frozen) -> None:
    """Add what one site needs; nothing where the target has it already."""
    bank = None if source is None else source.bank
    kept = kept_operations(place.bank, bank)
    retired = retired_operations(place.bank, bank)
    new, surplus = _but(bank, kept), _but(place.bank, kept | retired)
    if surplus:
        check_mirrored(place, surplus)
    renewal = _renewal(place, source, kept, frozen)
    if bank is not None and not (new or surplus or renewal.units) and _in_one_order(place.bank, bank):
        prepared.changes.append(Follow(place, bank, shares=frozen == "shared"))
        return
    name = place.site.name
    made = _bank(place, source, renewal, kept, frozen)
    if frozen == "own" and not (surplus or retired) and made is not None:
        prepared.moved[name] = check_composite(place, renewal.slots, made)
    else:
        prepared.moved[name] = moved_activations(place, renewal.slots, made)
    prepared.changes.extend(_slot_changes(place, renewal))
    prepared.changes.extend(take_down(place) if made is None else hang(place, made))
    if made is not None:
        assert bank is not None
        prepared.changes.append(_mark(place, made, source, new))
        prepared.changes.append(Follow(place, bank, shares=frozen == "shared"))
    for found, keys in ((prepared.made, new), (prepared.taken_back, surplus)):
        if keys:
            found[name] = tuple(sorted({unit for unit, _ in keys}))


def _but(bank: Composite | None, kept: set[Key]) -> list[Key]:
    """The operations of a bank that are not kept."""
    return [] if bank is None else [key for key in key_rows(bank.rows, 1) if key not in kept]


def _in_one_order(one: Composite | None, other: Composite) -> bool:
    """Whether two banks hold their rows in one order, as averages of state dicts take for granted."""
    return one is not None and all(key_rows(one.rows, sign) == key_rows(other.rows, sign) for sign in (1, -1))


def _renewal(place: Place, source: Place | None, kept: set[Key], frozen: Frozen) -> Renewal:
    if source is None:
        return emptied_rows(place)
    return own_rows(place, source, kept) if frozen == "own" else shared_rows(place, source, kept)


def _bank(place: Place, source: Place | None, renewal: Renewal, kept: set[Key], frozen: Frozen) -> Composite | None:
    """A bank of the target's own, with the model's structure: equal row by row, so that state dicts correspond."""
    if source is None or source.bank is None:
        return None
    rows = source.bank.rows
    fade = fade_of(place, source, kept, shares=frozen == "shared")
    bank = Composite(place.product, place.path, place.site.num_units, rows, renewal.values, place.recipe, fade)
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
    """Note in the bank which of its knowledge rows lag behind the model's: of shared ones, none."""
    assert source is not None and source.bank is not None
    rows = key_rows(made.rows, 1)
    index = [rows[key] for key in new]
    written, theirs = made.frozen_weight[index], source.bank.frozen_weight[index].to(made.frozen_weight)
    held = made if place.bank is None else place.bank
    return SetItem(vars(held), MARK, marked(mark_of(place.bank), list(new), written, theirs))


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
