"""Reading a state dict: which of its entries are banks, and what a bank for a place of this model is made of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neuronsurgery.errors import StateError, near_names
from neuronsurgery.pytorch.composites import Composite, shard_rows
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.sharding import whole
from neuronsurgery.pytorch.structure import Structure, agrees, decoded, is_structure

__all__ = ["EXTRA", "bank_for", "banks_in", "named_as", "paths_of", "structure_for", "with_versions", "without_banks"]

EXTRA = "_extra_state"

Entries = Mapping[str, Any]


# -- names -----------------------------------------------------------------------------------------------------------


def named_as(model: nn.Module, state_dict: Any, prefix: str) -> OrderedDict[str, Any]:
    """The entries under a prefix, by the names that this model has: wrappers (DDP, `torch.compile`) leave no trace.

    Raises:
        StateError: no mapping from names, or none that begins with the prefix.
    """
    if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
        raise StateError(f"expected a state dict, a mapping from names to tensors; found a {type(state_dict).__name__}")
    if prefix and not any(key.startswith(prefix) for key in state_dict):
        first = sorted({f"{key.partition('.')[0]}." for key in state_dict})
        raise StateError(f"no name in the state dict begins with prefix={prefix!r}: {near_names(prefix, first)}")
    prefix = _with_wrappers(model, state_dict, prefix)
    found = _under(prefix, state_dict)
    if _is_compiled_inside(model, found):
        own = {_plain(path): path for path, _ in model.named_modules(remove_duplicate=False)}
        return OrderedDict((_renamed(_plain(key), own), value) for key, value in found.items())
    return with_versions(found, getattr(state_dict, "_metadata", None), prefix)


def with_versions(state: Mapping[str, Any], metadata: Any, prefix: str) -> OrderedDict[str, Any]:
    """A state dict with the versions of the modules that were saved, of which `metadata` tells under a prefix."""
    found: Any = OrderedDict(state)
    if isinstance(metadata, Mapping):
        under = _under(prefix, {f"{path}.": versions for path, versions in metadata.items()})
        found._metadata = {path.removesuffix("."): versions for path, versions in under.items()}
    return found  # type: ignore[no-any-return]


def _with_wrappers(model: nn.Module, names: Iterable[str], prefix: str) -> str:
    """A prefix, and what wrappers put behind it: what all names begin with, and no child of the model is called."""
    inside = [name for name in names if name.startswith(prefix)]
    for wrapper in ("module.", "_orig_mod.") * 4:
        if inside and wrapper[:-1] not in model._modules and all(name.startswith(prefix + wrapper) for name in inside):
            prefix += wrapper
    return prefix


def _under(prefix: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}


def _is_compiled_inside(model: nn.Module, state: Entries) -> bool:
    return any("_orig_mod" in module._modules for module in model.modules()) or any("_orig_mod." in k for k in state)


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _renamed(key: str, modules: Mapping[str, str]) -> str:
    """A name with the part that names a module exchanged; the module with the longest name that fits."""
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:end])
        if path in modules:
            return ".".join([modules[path], *parts[end:]])
    return key


def paths_of(model: nn.Module) -> dict[int, list[str]]:
    """All names of each module, by its id; shared modules have several."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(path)
    return found


# -- banks -----------------------------------------------------------------------------------------------------------


def banks_in(model: nn.Module, state: Entries) -> dict[str, dict[str, Any]]:
    """Each bank's entries by its path: what is named as one and has frozen rows or a structure, if its owner exists."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, dict[str, Any]] = {}
    for key, value in state.items():
        path, _, name = key.rpartition(".")
        owner, _, last = path.rpartition(".")
        is_named_so = last == "composite" or last.endswith("_composite")
        if is_named_so and owner in modules and isinstance(modules.get(path), Composite | None):
            found.setdefault(path, {})[name] = value
    return {
        path: entries
        for path, entries in found.items()
        if "frozen_weight" in entries or is_structure(entries.get(EXTRA)) or path in modules
    }


def without_banks(model: nn.Module, state: Entries) -> dict[str, Any]:
    """The entries that belong to no bank."""
    banks = banks_in(model, state)
    return {key: value for key, value in state.items() if key.rpartition(".")[0] not in banks}


def structure_for(place: Place, path: str, entries: Entries) -> Structure:
    """The structure that a state dict gives a place, which has that many units and row-wise parameters.

    Raises:
        StateError: there is none, it cannot be read, or it is of another layer.
    """
    label = f"the bank at '{path}'"
    if EXTRA not in entries:
        raise StateError(
            f"{label} is saved without its structure ('{path}.{EXTRA}'): the state dict was filtered or saved by "
            "something that drops what is no weight; save model.state_dict() as it is"
        )
    if place.bank is not None and agrees(entries[EXTRA], place.bank.structure):
        return place.bank.structure
    found = decoded(entries[EXTRA], label)
    if found.num_units != place.site.num_units or len(found.counts) != len(place.slots):
        raise StateError(
            f"{label} belongs to a layer of {found.num_units} units with {len(found.counts)} tensors each; "
            f"'{place.site.name}' has {place.site.num_units} units with {len(place.slots)}. It is the bank of another "
            "layer or model"
        )
    return found


def bank_for(place: Place, path: str, structure: Structure, entries: Entries) -> Composite:
    """A bank for a place with saved frozen rows, on the device and in the dtype of the slots.

    Raises:
        StateError: a tensor is missing, or has another shape than the place's rows have, or there is one too many.
    """
    values = list(_frozen_rows(place, path, structure, entries))
    fade = _fade(place, path, structure, entries)
    bank = Composite(place.product, place.path, place.site.num_units, structure.rows, values, place.recipe, fade)
    bank.site = place.site.name
    bank.set_extra_state(structure.encoded())  # the counts
    shard_rows(place.weight, bank, place.is_split)  # of many banks no process has more than one whole
    bank.train(place.owners[0][0].training)
    return bank


def _frozen_rows(place: Place, path: str, structure: Structure, entries: Entries) -> Iterator[Tensor | None]:
    strange = sorted(set(entries) - {*place.buffer_names, "fade", EXTRA})
    if strange:
        raise StateError(
            f"the bank at '{path}' holds {', '.join(strange)}, which a bank of '{place.site.name}' has no use for: it "
            f"was made for another path than '{place.path.name}' with these parameters"
        )
    num_rows = len(structure.rows)
    for name, slots in zip(place.buffer_names, place.slots, strict=True):
        value = entries.get(name)
        if slots is None:
            if value is not None:
                raise StateError(f"the bank at '{path}' holds '{name}', and '{place.site.name}' has no such parameter")
            yield None
            continue
        kept = _check_rows(f"{path}.{name}", value, num_rows, slots.row_shape)
        kept = kept.to(slots.tensor.dtype)
        yield kept if slots.tensor.is_meta else kept.to(slots.tensor.device)


def _fade(place: Place, path: str, structure: Structure, entries: Entries) -> Tensor | None:
    """How far the rows have faded, None where none can."""
    if not structure.rows.can_fade:
        return None
    kept = _check_rows(f"{path}.fade", entries.get("fade"), len(structure.rows), torch.Size())
    return kept if place.weight.is_meta else kept.to(place.weight.device)


def _check_rows(name: str, value: Any, num_rows: int, shape: torch.Size) -> Tensor:
    """A saved tensor, if it has the rows.

    Raises:
        StateError: there is none, or it has not.
    """
    if value is None:
        raise StateError(f"the state dict has no '{name}', which the frozen rows saved beside it need")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise StateError(f"'{name}' is {found}, expected a floating-point tensor with a row for each frozen member")
    if value.dim() == 0 or value.shape[1:] != shape or len(value) < num_rows:
        raise StateError(
            f"'{name}' has shape {tuple(value.shape)}, expected at least {num_rows} rows of shape {tuple(shape)}: "
            "it is cut, or the bank of another layer"
        )
    return whole(value)[:num_rows].detach()
