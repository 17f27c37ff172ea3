"""Which banks a state dict gives a model, and the changes that hang them: nothing is loaded here, and nothing done."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuronsurgery.errors import StateError
from neuronsurgery.pytorch.hanging import hang, take_down
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.rewriting import class_changes
from neuronsurgery.pytorch.saved import EXTRA, bank_for, banks_in, paths_of, structure_for
from neuronsurgery.pytorch.sites import Discovery, discover
from neuronsurgery.pytorch.structure import Structure
from neuronsurgery.pytorch.swapped import with_parameters_in_place
from neuronsurgery.pytorch.transaction import Change

__all__ = ["Grafts", "planned"]

Saved = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Grafts:
    """The changes that give a model the structure of a state dict, and the banks that it has afterwards."""

    model: nn.Module
    changes: list[Change]
    places: Mapping[str, Place]
    banked: Mapping[str, Structure]
    paths: Mapping[str, list[str]]  # where each bank is found by name: at every owner, under each of its names

    @property
    def banked_places(self) -> dict[str, Place]:
        """The places that the state dict has banks for."""
        return {name: self.places[name] for name in self.banked}

    def completed(self, state: OrderedDict[str, Any], with_aliases: bool = True) -> OrderedDict[str, Any]:
        """The state for a strict loader, once the banks hang: with them as they are, and tied tensors by each name.

        Formats that refuse shared memory keep one name of several.
        """
        found = copy.copy(state)  # with the versions that it may carry
        found.update(self.bank_entries())
        for key, others in _aliases(self.model).items() if with_aliases else ():
            saved = next((other for other in others if other in state), None)
            if key not in found and saved is not None:
                found[key] = state[saved]
        return found

    def bank_entries(self) -> dict[str, Tensor]:
        """What a state dict of the hung banks holds, with the saved structure."""
        found: dict[str, Tensor] = {}
        for name, structure in self.banked.items():
            bank = self.places[name].bank
            assert bank is not None
            for path in self.paths[name]:
                found.update(bank.state_dict(prefix=f"{path}."))
                found[f"{path}.{EXTRA}"] = structure.encoded()
        return found


@with_parameters_in_place
def planned(model: nn.Module, state: Mapping[str, Any], *, is_whole: bool = True) -> Grafts:
    """What has to change for the model to have the structure of a state dict, nothing of it done.

    `is_whole`: a site without a bank in the state dict shall have none.

    Raises:
        StateError: the state dict has a bank that does not fit, or where this model has no site.
    """
    saved, paths = banks_in(model, state), paths_of(model)
    with _thawed(model, saved):
        discovery = _discovered(model, saved, paths)
    at = {name: _paths_at(place, paths) for name, place in discovery.places.items()}
    _check_all_used(saved, at, discovery)
    changes: list[Change] = []
    banked: dict[str, Structure] = {}
    for name, place in discovery.places.items():
        found = [path for path in at[name] if path in saved]
        if found:
            structures = [structure_for(place, path, saved[path]) for path in found]
            entries, banked[name] = _joined(saved, found), structures[0]
            changes += hang(place, bank_for(place, found[0], banked[name], entries))
        elif place.bank is not None and is_whole:
            changes += take_down(place)
    kept = [] if is_whole else [name for name, place in discovery.places.items() if place.bank is not None]
    changes += class_changes(discovery, {*banked, *kept})
    return Grafts(model, changes, discovery.places, banked, at)


@contextmanager
def _thawed(model: nn.Module, saved: Saved) -> Iterator[None]:
    """Layers that are saved with a bank and are frozen here, as in a target network, ask for gradients like the others.

    Frozen layers are no sites, but what was operated on was one. A layer of which a part is frozen stays as it is.
    """
    owners = [list(model.get_submodule(path.rpartition(".")[0]).parameters()) for path in saved]
    frozen = [p for own in owners if not any(p.requires_grad for p in own) for p in own if p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _discovered(model: nn.Module, saved: Saved, paths: Mapping[int, list[str]]) -> Discovery:
    """The places of a model, those included that were operated on by name although their range bears meaning."""
    discovery = discover(model)
    at = {path for place in discovery.places.values() for path in _paths_at(place, paths)}
    names = {name for path in saved if path not in at for name in _site_names(model, path, paths)}
    forced = sorted(names & set(discovery.declined))
    return discover(model, include=forced) if forced else discovery


def _paths_at(place: Place, paths: Mapping[int, list[str]]) -> list[str]:
    """Where a place's bank is found by name."""
    at = [(path, name) for owner, name in place.owners for path in paths[id(owner)]]
    return [f"{path}.{name}" if path else name for path, name in at]


def _site_names(model: nn.Module, path: str, paths: Mapping[int, list[str]]) -> list[str]:
    """The names that the site of a bank may have: those of its producer, or of the parameter."""
    owner, _, bank = path.rpartition(".")
    names = paths[id(model.get_submodule(owner))]
    if bank == "composite":
        return names
    parameter = bank.removesuffix("_composite")
    return [f"{name}.{parameter}" if name else parameter for name in names]


def _check_all_used(saved: Saved, at: Mapping[str, Sequence[str]], discovery: Discovery) -> None:
    """Refuse a bank where the model has no site.

    Raises:
        StateError: with the reason why the producer is none.
    """
    known = {path for paths in at.values() for path in paths}
    paths = paths_of(discovery.model)
    for path in saved:
        if path not in known:
            names = _site_names(discovery.model, path, paths)
            reasons = [discovery.declined[name] for name in names if name in discovery.declined]
            reason = reasons[0] if reasons else "it has no producer of that name"
            raise StateError(
                f"the state dict has a bank at '{path}', and '{names[0]}' is no site of this model: "
                f"{reason}. Build the model as it was when saved; where a part of it was operated on, restore that part"
            )


def _joined(saved: Saved, paths: Sequence[str]) -> dict[str, Any]:
    """The entries of one bank that is saved under several names; each may lack what another has.

    Raises:
        StateError: two of them differ: the weights were not tied in the saved model.
    """
    entries: dict[str, Any] = {}
    for path in paths:
        for name, value in saved[path].items():
            if name in entries and not _is_same(entries[name], value):
                raise StateError(
                    f"the banks at '{paths[0]}' and '{path}' differ in '{name}', and here both belong to one tied "
                    "weight. Build the model as it was when saved"
                )
            entries.setdefault(name, value)
    return entries


def _is_same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other)
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """The other names of each tensor that has several."""
    names: dict[int, list[str]] = {}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        names.setdefault(id(tensor), []).append(name)
    return {
        name: [other for other in several if other != name]
        for several in names.values()
        if len(several) > 1
        for name in several
    }
