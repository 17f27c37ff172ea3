"""Batch normalization whose statistics are those of all processes: slots and frozen rows share one all-reduce.

`nn.SyncBatchNorm` normalizes on accelerators only. Its function is called once, on slots and rows together, with their
weights and running statistics end to end; without a process group it is a batch normalization like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import _functions

__all__ = ["normalize_together"]

LABELS = ("weight", "bias", "running_mean", "running_var")


def normalize_together(
    module: Any, slots: Tensor, rows: Tensor, labels: Sequence[str], values: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Slots and rows past a `nn.SyncBatchNorm`: (batch, num_units, ...) and (batch, num_rows, ...).

    `values` are the rows' own tensors, by `labels`; running statistics, the module's and the rows', are updated in
    place as the module itself does.

    Raises:
        ValueError: as the module: it is to synchronize tensors that are on no accelerator.
    """
    own = {label: getattr(module, label) for label in LABELS}
    kept = dict.fromkeys(LABELS) | dict(zip(labels, values, strict=True))
    uses_batch = module.training or (own["running_mean"] is None and own["running_var"] is None)
    factor = _counted(module)
    if not (uses_batch and module.training and _num_processes(module) > 1):
        tracks = not module.training or module.track_running_stats
        return tuple(  # type: ignore[return-value]
            F.batch_norm(
                z,
                tensors["running_mean"] if tracks else None,
                tensors["running_var"] if tracks else None,
                tensors["weight"],
                tensors["bias"],
                uses_batch,
                factor,
                module.eps,
            )
            for z, tensors in ((slots, own), (rows, kept))
        )
    return _reduced(module, slots, rows, own, kept, factor)


def _counted(module: Any) -> float:
    """Count the batch, and the share that it has in the running statistics."""
    factor = 0.0 if module.momentum is None else module.momentum
    if module.training and module.track_running_stats:
        module.num_batches_tracked.add_(1)
        if module.momentum is None:
            factor = 1.0 / float(module.num_batches_tracked)
    return float(factor)


def _num_processes(module: Any) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(module.process_group or dist.group.WORLD)


def _reduced(
    module: Any, slots: Tensor, rows: Tensor, own: dict[str, Any], kept: dict[str, Any], factor: float
) -> tuple[Tensor, Tensor]:
    """One call of torch's function on slots and rows together."""
    accelerator = ("cuda", "hpu", "xpu", torch._C._get_privateuse1_backend_name())
    if slots.device.type not in accelerator:
        raise ValueError(
            f"SyncBatchNorm expected input tensor to be on one of {accelerator}, found {slots.device.type}"
        )
    both: dict[str, Any] = {
        label: None if own[label] is None else torch.cat([own[label], kept[label]]) for label in LABELS
    }
    group = module.process_group or dist.group.WORLD
    z = torch.cat([slots, rows], 1)
    result = _functions.SyncBatchNorm.apply(  # type: ignore[no-untyped-call]
        z,
        both["weight"],
        both["bias"],
        both["running_mean"],
        both["running_var"],
        module.eps,
        factor,
        group,
        dist.get_world_size(group),
    )
    num_units = slots.shape[1]
    with torch.no_grad():
        for label in ("running_mean", "running_var"):
            if own[label] is not None:
                own[label].copy_(both[label][:num_units])
                kept[label].copy_(both[label][num_units:])
    return result[:, :num_units], result[:, num_units:]
