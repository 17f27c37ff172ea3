"""Measuring that an operation changed no output: each composite on random inputs, and the whole model on a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from neuronsurgery.errors import EquivalenceError
from neuronsurgery.pytorch.composites import Composite, Product, apply
from neuronsurgery.pytorch.models import left_alone, run_model
from neuronsurgery.pytorch.places import Place

__all__ = ["Observed", "SameOutput", "check_composite", "observe_output", "tolerance"]

_TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative error of an output-equivalent operation in a dtype."""
    return _TOLERANCES[dtype]


# -- one site --------------------------------------------------------------------------------------------------------


def check_composite(place: Place, slots: Sequence[Tensor | None], bank: Composite) -> float:
    """The relative error of a layer's activations with new slots and a new bank, on random inputs to its producer.

    Raises:
        EquivalenceError: beyond the tolerance of the weights' dtype.
    """
    with torch.no_grad():
        x = _random_input(place.weight, place.product)
        old = _activations(place, (place.weight, place.bias, *place.slopes), place.bank, x)
        new = _activations(place, slots, bank, x)
        scale = max(_magnitude(old), _magnitude(bank.activation(bank(x))))
        error = _magnitude(new - old) / max(scale, torch.finfo(old.dtype).tiny)
    if not error <= tolerance(place.weight.dtype):
        raise EquivalenceError(
            f"{place.site.name}: the composite units differ from the old units by {error:.3g} of the layer's largest "
            f"activation; at most {tolerance(place.weight.dtype):.3g} is allowed in {place.weight.dtype}. Nothing was "
            "changed"
        )
    return error


def _activations(place: Place, slots: Sequence[Tensor | None], bank: Composite | None, x: Tensor) -> Tensor:
    weight, bias, *slopes = slots
    assert weight is not None
    z = place.product(x, weight, bias)
    h = apply(place.path.function, z, [s for s in slopes if s is not None], place.product.unit_axis)
    return h if bank is None else bank.combine(h, bank(x))


def _random_input(weight: Tensor, product: Product) -> Tensor:
    """Standard normal input to a producer, large enough for its kernel and its padding."""
    generator = torch.Generator(weight.device).manual_seed(0)
    if product.kind == "linear":
        shape: tuple[int, ...] = (64, weight.shape[1])
    else:
        reach = [d * (k - 1) + 1 for d, k in zip(product.dilation, weight.shape[2:], strict=True)]
        shape = (8, weight.shape[1], *(size + 3 + max(product.wrapped_padding, default=0) for size in reach))
    return torch.randn(shape, generator=generator, dtype=weight.dtype, device=weight.device)


def _magnitude(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


# -- the whole model -------------------------------------------------------------------------------------------------


class Observed:
    """What a model gave for a batch: its output tensors, and the scale of the last product that led to them."""

    def __init__(self, tensors: list[Tensor], floor: float) -> None:
        self.tensors, self.floor = tensors, floor


def observe_output(model: nn.Module, batch: Any) -> Observed:
    """Run the model on a batch in its current mode, and leave its buffers and all random states as they were."""
    torch.clear_autocast_cache()  # inside an autocast block it may hold casts of weights that have changed
    mode = _LastProduct()
    with torch.no_grad(), left_alone(model), mode:
        tensors = [t.clone() for t in pytree.tree_leaves(run_model(model, batch)) if isinstance(t, Tensor)]
    return Observed(tensors, mode.floor)


class SameOutput:
    """The last change of an operation: none, but it fails if the model's output on a batch has moved."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self.model, self.batch = model, batch
        self.before = observe_output(model, batch)
        self.error = 0.0

    def apply(self) -> None:
        after = observe_output(self.model, self.batch)
        for old, new in zip(self.before.tensors, after.tensors, strict=True):
            if old.is_floating_point():
                scale = max(_magnitude(old), self.before.floor, torch.finfo(old.dtype).tiny)
                self._record(_magnitude(new - old) / scale, tolerance(old.dtype))

    def _record(self, error: float, allowed: float) -> None:
        self.error = max(self.error, error)
        if not error <= allowed:
            raise EquivalenceError(
                f"the model's output on the verify= batch moved by {error:.3g} of its largest value, at most "
                f"{allowed:.3g} is allowed; the operation was rolled back. Some part of the forward uses a producer in "
                "a way that its trace does not show (a hook that changes outputs, say): leave that site out with sites="
            )

    def revert(self) -> None:
        """Nothing was changed."""


class _LastProduct(TorchFunctionMode):
    """Notes sum |weight| |activation| of the last product: outputs near zero by cancellation are no failure."""

    floor = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, F.conv1d, F.conv2d, F.conv3d):
            absolute = pytree.tree_map_only(Tensor, torch.abs, (args, kwargs or {}))
            self.floor = _magnitude(func(*absolute[0], **absolute[1]))
        return func(*args, **(kwargs or {}))
