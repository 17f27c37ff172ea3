"""Sites of sharded layers: which of them can be operated on, and which are split over processes by their units.

FSDP gathers a layer for its passes, so that each process computes all of its units. Tensor parallelism does not: under
`ColwiseParallel` a process computes the units that it holds, and its bank adds in the rows of these units alone.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from neuronsurgery.pytorch.chains import is_sequential
from neuronsurgery.pytorch.fsdp import is_fsdp, output_dtype
from neuronsurgery.pytorch.hooks import parallelizes
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.products import Linear
from neuronsurgery.pytorch.sharding import is_sharded, problem_of

__all__ = ["sharding_problem"]


def sharding_problem(place: Place) -> str:
    """Why a sharded site cannot be operated on, "" where it can."""
    for slots in place.slots:
        if slots is not None and (problem := problem_of(slots.tensor, slots.axes)):
            return f"of its '{slots.attribute}', {problem}"
    modules = [owner for owner, _ in place.owners]
    if any(is_fsdp(module) and output_dtype(module) is not None for module in modules):
        return "FSDP casts its output to another dtype (output_dtype=), and what its frozen rows give would stay behind"
    if place.is_split:
        return _split_problem(place)
    if is_sharded(place.weight) and any(_is_parallel(module) for module in modules):
        return "its weight is spread by tensor parallelism in another way than by ColwiseParallel"
    return ""


def _is_parallel(module: nn.Module) -> bool:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(parallelizes(hook) for hook in hooks)


def _split_problem(place: Place) -> str:
    """Why a layer whose units are split over processes cannot be operated on."""
    weight: Any = place.weight
    if weight.device_mesh.ndim > 1:
        return "it is sharded by FSDP and by tensor parallelism at once; operate before fully_shard"
    if not isinstance(place.product, Linear) or place.path.tensors or place.computed:
        return "its units are split over processes (ColwiseParallel), and on their way they meet tensors of their own"
    if any(is_sequential(home.scope) for home in place.homes):
        return (
            "ColwiseParallel splits it in a Sequential, whose children could not hand its frozen rows on; write a "
            "module with a forward of its own around it"
        )
    return ""
