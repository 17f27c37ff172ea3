"""How activations become samples: each counts the same, or by a weight, as where batches are padded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from neuronsurgery.errors import EvidenceError

__all__ = ["EVEN", "Sampling", "Weights", "sums_by_unit"]

Weights: TypeAlias = Callable[[str, Tensor], Tensor | None]
"""Gives the samples in the activations of a site, by the site's name, their weights; None: all count the same."""


@dataclass(frozen=True, eq=False)
class Sampling:
    """What decides how much a sample counts."""

    scaler: Any = None
    """The gradient scaler by which losses are multiplied."""
    weights: Weights | None = None

    def __post_init__(self) -> None:
        if self.weights is not None and not callable(self.weights):
            raise EvidenceError(
                f"weights= takes a function of a site's name and its activations that returns a tensor or None; found "
                f"{type(self.weights).__name__}: for one mask at all sites pass weights=lambda site, h: mask"
            )

    def of(self, site: str, h: Tensor, axes: tuple[int, ...]) -> Tensor | None:
        """The weights of the samples in h, whose units are on these axes: of h's shape without them, or None.

        Raises:
            EvidenceError: the weights are no tensor, or of another shape.
        """
        if self.weights is None:
            return None
        with torch.no_grad():
            found = self.weights(site, h)
        if found is None:
            return None
        samples = _without(h, axes)
        if not isinstance(found, Tensor) or found.is_complex() or not _fits(found, samples):
            raise EvidenceError(_what_does_not_fit(site, h, axes, found))
        return found.to(h.device).expand(samples).clone()  # the gradient asks for it later: a mask may be written anew


EVEN = Sampling()
"""Each sample counts the same."""


def sums_by_unit(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """Sums over the samples of values (num_units, num_samples), weighted where there are weights, and of the weights.

    The sums are (num_units,), in float32 or better; the sum of the weights is a number of the same dtype, an integer if
    they are bools or integers. A sample whose weight is not above 0 does not enter, whatever it holds.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    if weights is None:
        return values.sum(1, dtype=dtype), values.shape[1]
    weights = weights.flatten()
    counted = weights > 0
    kept = torch.where(counted, values, torch.zeros_like(values)).to(dtype)  # before the product: 0 * nan is nan
    weights = torch.where(counted, weights, torch.zeros_like(weights))
    count = weights.sum(dtype=dtype if weights.is_floating_point() else torch.int64)
    return (kept * weights.to(dtype)).sum(1), count


def _without(h: Tensor, axes: tuple[int, ...]) -> tuple[int, ...]:
    of_units = {axis % h.dim() for axis in axes}
    return tuple(size for axis, size in enumerate(h.shape) if axis not in of_units)


def _fits(weights: Tensor, samples: tuple[int, ...]) -> bool:
    """Whether every axis is there, of its size or of size 1; a missing one could be taken for another of its size."""
    if weights.dim() == 0:
        return True
    sizes = zip(weights.shape, samples, strict=False)
    return weights.dim() == len(samples) and all(found in (1, wanted) for found, wanted in sizes)


def _what_does_not_fit(site: str, h: Tensor, axes: tuple[int, ...], found: object) -> str:
    of_units, samples = sorted(axis % h.dim() for axis in axes), _without(h, axes)
    units = f"its units on axis {of_units[0]}" if len(of_units) == 1 else f"its units on axes {tuple(of_units)}"
    what = type(found).__name__
    if isinstance(found, Tensor):
        what = f"{'complex numbers' if found.is_complex() else 'a tensor'} of shape {tuple(found.shape)}"
    return (
        f"weights of site {site!r}: its activations have shape {tuple(h.shape)} with {units}, and weights returned "
        f"{what}: return a weight for each of its {math.prod(samples)} samples, shape {samples} (an axis along which "
        "they are alike may have size 1), or None for all alike"
    )
