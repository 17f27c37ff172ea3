"""What DistributedDataParallel sends around with each forward, and frozen rows need not be.

It broadcasts a model's buffers from its first process, before each forward in training. Frozen rows are the same on all
processes once an operation of all of them has compared their digests, so they are left out from then on; running
statistics, which each process sees its own batches through, go on being sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.models import unwrap, wrappers_of
from neuronsurgery.pytorch.transaction import Call, Change, SetItem

__all__ = ["exclusions"]

IGNORED = "_ddp_params_and_buffers_to_ignore"
"""The attribute of a module in which DistributedDataParallel looks, as it wraps it, for what to leave alone."""


def exclusions(model: nn.Module) -> Iterator[Change]:
    """The changes by which a model's wrappers, those it has and those it may get, leave its frozen rows alone."""
    for module in (unwrap(model), *(each.module for each in replicas_of(model))):
        before = vars(module).get(IGNORED)
        after = _without_banks(module, before or ()) | _frozen_names(module)
        if after != set(before or ()):
            yield SetItem(vars(module), IGNORED, after)
    for each in replicas_of(model):
        after = _without_banks(each.module, each.parameters_to_ignore) | _frozen_names(each.module)
        if after != each.parameters_to_ignore:
            # Whether it sends any is decided by the list it made last, which is made anew after either way.
            yield Call(undo=each._assign_modules_buffers)
            yield SetItem(vars(each), "parameters_to_ignore", after)
            yield Call(do=each._assign_modules_buffers)


def replicas_of(model: nn.Module) -> list[nn.parallel.DistributedDataParallel]:
    """The wrappers of a model that send its buffers around."""
    return [each for each in wrappers_of(model) if isinstance(each, nn.parallel.DistributedDataParallel)]


def _frozen_names(module: nn.Module) -> set[str]:
    """What of banks does not change between operations, nor differs between processes, by the names of buffers."""
    return {
        f"{name}.{buffer}"
        for name, bank in module.named_modules()
        if isinstance(bank, Composite)
        for buffer in bank._buffers
        if not buffer.startswith("running")
    }


def _without_banks(module: nn.Module, names: Any) -> set[str]:
    """Without buffers of banks, also of banks that are gone."""
    return {name for name in names if "composite." not in name}
