"""What FSDP2 does to a model's parameters: which tensor stands for one now, and in which dtype it is computed with.

`fully_shard` keeps a parameter as the shard that a process holds, and puts the whole one in its place around each
forward and backward pass. Optimizers know the shards, and so does surgery: before it looks at a model, whatever was
left whole by the last pass is a shard again. The few attributes of torch's that are no public interface are read here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from neuronsurgery.errors import DistributedError
from neuronsurgery.pytorch.sharding import is_sharded

__all__ = [
    "as_shards",
    "is_fsdp",
    "is_gathered",
    "output_dtype",
    "require_reduced",
    "require_whole",
    "stand_in",
]


def is_fsdp(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on a module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)  # torch's parts may be there without it
    return kind is not None and isinstance(module, kind)


def as_shards(model: nn.Module) -> None:
    """Let a model's parameters be those that its optimizer has: a pass may have left some of them whole.

    Raises:
        DistributedError: a forward or backward pass is under way.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():  # what is no model is named by others
        if is_fsdp(module):
            state = _state(module)
            if state._training_state.name != "IDLE":
                raise DistributedError(
                    "FSDP is in the middle of a forward or backward pass of this model; operate on it, or measure it, "
                    "before the forward pass or after optimizer.step()"
                )
            module.reshard()  # type: ignore[operator]


def require_reduced(model: nn.Module) -> None:
    """Refuse to change rows of which gradients wait to be reduced: what they are of will be no more.

    Raises:
        DistributedError: in the middle of gradient accumulation without reduction.
    """
    for _, record in _parameters(model):
        whole = getattr(record, "_unsharded_param", None)
        if record.unsharded_accumulated_grad is not None or (whole is not None and whole.grad is not None):
            raise DistributedError(
                "gradients of earlier micro-batches wait to be reduced (set_requires_gradient_sync(False)), and would "
                "be given to rows that are not there any more; operate after optimizer.step()"
            )


def require_whole(model: nn.Module, verb: str) -> None:
    """Refuse what is not done to sharded parameters.

    Raises:
        DistributedError: the model has some.
    """
    if is_gathered(model) or any(is_sharded(parameter) for parameter in model.parameters()):
        raise DistributedError(
            f"{verb} is not done to a model whose parameters are sharded over processes (FSDP, tensor parallelism): it "
            "has to see whole layers. Do it before the model is sharded, and save and restore around that"
        )


def is_gathered(model: nn.Module) -> bool:
    """Whether FSDP gathers any part of a model for its passes."""
    return isinstance(model, nn.Module) and any(is_fsdp(module) for module in model.modules())


def output_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype that FSDP casts the module's output to, None: it stays as it is."""
    found: torch.dtype | None = _state(module)._mp_policy.output_dtype if is_fsdp(module) else None
    return found


def stand_in(parameter: Any, model: nn.Module) -> Any:
    """The whole parameter that a forward pass has in a shard's place; None where there was no pass yet."""
    found = _parameter(parameter, model)
    return None if found is None else getattr(found[1], "_unsharded_param", None)


def _parameter(parameter: Any, model: nn.Module) -> tuple[Any, Any] | None:
    """FSDP's group and record of a parameter, None where it has none."""
    return next((pair for pair in _parameters(model) if pair[1].sharded_param is parameter), None)


def _parameters(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    for module in model.modules():
        if is_fsdp(module):
            for group in _state(module)._fsdp_param_groups:
                yield from ((group, each) for each in group.fsdp_params)


def _state(module: Any) -> Any:
    return module._get_fsdp_state()
