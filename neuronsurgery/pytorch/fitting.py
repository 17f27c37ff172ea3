"""Which targets fit a model: the networks that may be given its structure, and the errors for all others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from neuronsurgery.errors import MirrorError
from neuronsurgery.pytorch.mirrored_rows import Key
from neuronsurgery.pytorch.models import unwrap
from neuronsurgery.pytorch.offsets import mark_of
from neuronsurgery.pytorch.operating import banks_of
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.sites import Discovery
from neuronsurgery.pytorch.swapped import holds_for_others

__all__ = ["banked_places", "check_fit", "check_mirrored", "is_shared", "targets_of", "trained_as"]


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


def is_shared(place: Place, source: Place) -> bool:
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
    return [None if slots is None else tuple(slots.row_shape) for slots in place.slots]


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
