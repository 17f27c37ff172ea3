"""A specimen: one model as it is published and trained, with what running and training it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["Batch", "Exemption", "Specimen", "mean_square", "run"]

Batch = tuple[Any, ...] | dict[str, Any]
"""The arguments of one call of a model."""

Exemption = Literal["recurrent", "fused", "tied", "range-bearing", "spectral", "stacked"]
"""More than a fifth of the units are, by build: gates of a recurrent cell; in one weight with others, for experts that
values choose; computed with weights that are read in another role too; of a range that carries meaning; computed with
weights under a spectral norm; in networks of several agents, stacked and run under vmap.
"""


def run(model: nn.Module, batch: Batch) -> Any:
    """Call a model with a batch."""
    return model(**batch) if isinstance(batch, dict) else model(*batch)


def mean_square(output: Any) -> Tensor:
    """A loss that reads all of an output: the mean square of each tensor that depends on weights, off a target of 1."""
    tensors = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack([(t - 1.0).square().mean() for t in tensors]).sum()


@dataclass(frozen=True)
class Specimen:
    """One model: how to build it, a batch, the loss of an output, and what of it must be declined."""

    name: str
    origin: str
    """Where the code of the model comes from: "own" or a library."""
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    loss: Callable[[Any], Tensor] = mean_square
    exempt: Exemption | None = None
    """Why it need not reach the share that every other model must reach."""
    dtype: torch.dtype = torch.float64
    """float32 only where the model itself casts to it, or a kernel takes nothing else."""
    declined: Mapping[str, str] = field(default_factory=dict)
    """Producer of hidden units (a pattern of names) -> words of the reason for which it must be declined."""

    def __str__(self) -> str:
        return self.name

    def make(self) -> nn.Module:
        """The model at its random initialization, in training mode: the same weights in every call."""
        torch.manual_seed(0)
        return self.build().to(self.dtype).train()

    def example(self) -> Batch:
        """The batch, floating tensors in the model's dtype; the same in every call."""
        torch.manual_seed(1)
        made: Batch = pytree.tree_map_only(
            Tensor, lambda t: t.to(self.dtype) if t.is_floating_point() else t, self.batch()
        )
        return made
