"""Restoring: a saved state and the structure that is saved with it, onto a model that lacks it, whole or not at all.

A state dict of an operated model has banks that a fresh model has no place for, and torch's strict loader says so. Here
the banks are hung first, the classes exchanged, and then torch's loader does what it always does, in one transaction.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from neuronsurgery.composites import Composites
from neuronsurgery.errors import OptimizerError
from neuronsurgery.pytorch import optimizers as optimizer_state
from neuronsurgery.pytorch.attaching import resumed
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.grafting import Grafts, planned
from neuronsurgery.pytorch.loading import Load
from neuronsurgery.pytorch.models import check_model, unwrap
from neuronsurgery.pytorch.saved import banks_in, named_as, with_versions, without_banks
from neuronsurgery.pytorch.transaction import Change, Later, run

__all__ = ["accept", "restore"]


def restore(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    prefix: str = "",
) -> Composites:
    """Take over a saved state and its structure; see `neuronsurgery.surgery.restore`."""
    check_model(model)
    model = unwrap(model)
    optimizers = optimizer_state.as_optimizers(optimizer)
    optimizer_state.check_owners(optimizers, dict(model.named_parameters()))
    is_empty = any(parameter.is_meta for parameter in model.parameters())
    if is_empty and optimizers:
        raise OptimizerError(
            "the model is on the meta device, where restoring gives it other parameters than the optimizer has: "
            "restore without optimizer=, build the optimizer, then surgery.attach(model, optimizer)"
        )
    state = named_as(model, state_dict, prefix)
    found: list[Grafts] = []

    def changes() -> Iterator[Change]:
        if is_empty:  # what a forward computes can be read from tensors with values only
            yield Load(model, lambda: without_banks(model, state), assign=True, strict=False)
        grafts = planned(model, state)
        found.append(grafts)
        yield from grafts.changes
        yield Load(model, lambda: grafts.completed(state))
        for place in grafts.banked_places.values() if optimizers else ():
            yield resumed(place, optimizers)

    with _own_load():
        run([Later(changes)])
    banks = {name: place.bank for name, place in found[0].banked_places.items()}
    return Composites({name: bank.rows.members() for name, bank in banks.items() if bank is not None})


# -- another's loader ------------------------------------------------------------------------------------------------


def accept(model: nn.Module) -> None:
    """Let the loader of a framework take over structure as well; see `neuronsurgery.surgery.accept`."""
    check_model(model)
    model = unwrap(model)
    hooks: Mapping[int, Any] = model._load_state_dict_pre_hooks
    if not any(hook.hook is graft_before_loading for hook in hooks.values()):
        model.register_load_state_dict_pre_hook(graft_before_loading)  # type: ignore[no-untyped-call]


def graft_before_loading(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, *_: Any) -> None:
    """What `accept` hangs on a model: copies and pickles find it under this name.

    It loads the whole model itself, all or nothing, before torch's loader does the same once more: so whatever is
    wrong with the model's part is raised before that has copied anything.
    """
    if getattr(_OWN, "is_loading", False):
        return
    is_strict, versions = _running_load()
    own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    if not banks_in(module, own) and not (is_strict and _has_banks(module)):
        return
    grafts = planned(module, own, is_whole=is_strict)
    state = with_versions(own, versions, prefix)
    assign = bool(metadata.get("assign_to_params_buffers", False))
    load = Load(module, lambda: grafts.completed(state, with_aliases=False), assign=assign, strict=is_strict)
    with _own_load():
        run([*grafts.changes, load])
    state_dict.update({f"{prefix}{key}": value for key, value in grafts.bank_entries().items()})


_OWN = threading.local()


@contextmanager
def _own_load() -> Iterator[None]:
    """While a load of this file runs, the hooks of `accept` on parts of the model have nothing to do."""
    before = getattr(_OWN, "is_loading", False)
    _OWN.is_loading = True
    try:
        yield
    finally:
        _OWN.is_loading = before


def _has_banks(module: nn.Module) -> bool:
    return any(isinstance(each, Composite) for each in module.modules())


def _running_load() -> tuple[bool, Any]:
    """Whether the load that is running is strict, and the versions in its state dict: torch tells no hook of either."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module.load_state_dict.__code__:
            return bool(frame.f_locals["strict"]), getattr(frame.f_locals["state_dict"], "_metadata", None)
        frame = frame.f_back
    return False, None
