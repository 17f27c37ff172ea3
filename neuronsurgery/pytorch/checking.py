"""Measuring that an operation changed no output: each composite on random inputs, and the whole model on a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from neuronsurgery.errors import EquivalenceError
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.computing import Computed
from neuronsurgery.pytorch.fsdp import as_shards
from neuronsurgery.pytorch.links import BatchNorm, Dropout, Link, Norm, UnitFunction
from neuronsurgery.pytorch.models import left_alone, run_model
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.unitwise import along

__all__ = [
    "MovedOutput",
    "Observed",
    "allowed_move",
    "SameOutput",
    "Trial",
    "check_composite",
    "moved_activations",
    "moved_when_flat",
    "observe_output",
    "tolerance",
]

_TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative error of an output-equivalent operation in a dtype."""
    return _TOLERANCES[dtype]


# -- one site --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trial:
    """What stands in for a layer of which no process has all: its slots' rows, its bank, and the one it will have."""

    before: list[Tensor | None]
    old: Composite | None
    new: Composite | None


def check_composite(
    place: Place, renewed: Sequence[Tensor | None], bank: Composite, trial: Trial | None = None
) -> float:
    """The relative error of a layer's activations with new slots and a new bank, on random inputs to its producer.

    `renewed`: all units' rows of each of the place's slots. Tensors from elsewhere are random as well.

    Raises:
        EquivalenceError: beyond the tolerance of the weights' dtype.
    """
    error, allowed = moved_activations(place, renewed, bank, trial), allowed_move(place)
    if not error <= allowed:
        raise EquivalenceError(
            f"{place.site.name}: the composite units differ from the old units by {error:.3g} of the layer's largest "
            f"activation; at most {allowed:.3g} is allowed in {place.weight.dtype}. Nothing was changed"
        )
    return error


def allowed_move(place: Place) -> float:
    """The tolerance of the weights' dtype; in half precision once more for each norm on the path, which rounds anew."""
    dtype = place.weight.dtype
    norms = sum(isinstance(link, (BatchNorm, Norm)) for link in place.path.links)
    return tolerance(dtype) * (1 + norms if dtype in (torch.bfloat16, torch.float16) else 1)


def moved_activations(
    place: Place, renewed: Sequence[Tensor | None], bank: Composite | None, trial: Trial | None = None
) -> float:
    """By how much of their largest value a layer's activations move with new slots and a new bank, or none.

    On random inputs, as `check_composite`.
    """
    if trial is None:
        trial = Trial([None if slots is None else slots.rows() for slots in place.slots], place.bank, bank)
    error = 0.0
    for computed in place.computed or (None,):
        with torch.no_grad():
            old, _ = _activations(place, trial.before, trial.old, computed)
            new, rows = _activations(place, renewed, trial.new, computed)
            scale = max(_magnitude(old), _magnitude(rows))
            error = max(error, _magnitude(new - old) / max(scale, torch.finfo(old.dtype).tiny))
    return error


def moved_when_flat(place: Place, left: Composite, shares: Tensor) -> float:
    """By how much of their largest value activations move where rows are units of their own, summed by their shares.

    On random inputs, as `check_composite`; `shares`: (num_rows,), what each row is multiplied by.
    """
    slots = [None if each is None else each.rows() for each in place.slots]
    frozen = [left.live(name) for name in place.buffer_names]
    grown = [
        own if own is None or row is None or each is None or each.axes is None else torch.cat([own, row.to(own)])
        for each, own, row in zip(place.slots, slots, frozen, strict=True)
    ]
    with torch.no_grad():
        old, _ = _activations(place, slots, place.bank, None)
        new, _ = _activations(place, grown, None, None)
    axis = place.path.unit_axes(place.product, old.dim())[0]
    num_units = place.site.num_units
    units = new.double().narrow(axis, 0, num_units)
    rows = new.double().narrow(axis, num_units, len(shares)) * along(shares.to(new.device), axis)
    summed = units.index_add(axis, torch.from_numpy(left.rows.unit).to(rows.device), rows)
    scale = max(_magnitude(old), _magnitude(rows), torch.finfo(old.dtype).tiny)
    return _magnitude(summed - old.double()) / scale


def _activations(
    place: Place, renewed: Sequence[Tensor | None], bank: Composite | None, computed: Computed | None
) -> tuple[Tensor, Tensor]:
    """The activations of all units, on one axis, with these slots and this bank, in evaluation; and the rows' own."""
    _, _, *values = renewed
    weight, bias = _effective(place, renewed, computed)
    generator = torch.Generator(weight.device).manual_seed(0)
    axis = -1 if place.product.is_stacked else place.product.unit_axes[0]
    num_axes = place.product.num_axes(place.path.num_axes(axis))
    x = place.product.example(weight, generator, num_axes, place.path.sizes(num_axes))
    h = place.product(x, weight, bias, torch.arange(len(weight), device=weight.device))
    rows = h if bank is None else _rows(bank, x, computed)
    for index, link in enumerate(place.path.links):
        own = [value for value in values[place.path.span(index)] if value is not None]
        others = _others(link, index, h, place.product.is_stacked)
        slots, h = h, link.slots(h, own, others, axis)
        if bank is not None:
            h, rows = _passed(bank, index, link, (slots, rows), h, own, others)
        axis = link.axis_after(axis, h.dim())
    return (h, rows) if bank is None else (bank.summed(h, rows, axis), rows)


def _effective(
    place: Place, renewed: Sequence[Tensor | None], computed: Computed | None
) -> tuple[Tensor, Tensor | None]:
    """All units' rows of the weight, and biases, that these slots give."""
    weight, bias = renewed[:2]
    assert weight is not None
    if computed is None:
        return weight, bias
    stored = {name: rows for name, rows in zip(place.buffer_names, renewed, strict=True) if rows is not None}
    units = torch.arange(len(weight), device=weight.device)
    return computed.recipe.rows(computed.compute, stored, computed.live, units)


def _rows(bank: Composite, x: Tensor, computed: Computed | None) -> Tensor:
    if computed is None:
        return bank(x)  # type: ignore[no-any-return]
    return bank.computed(x, computed.recipe, computed.compute, computed.live)


def _others(link: Link, index: int, slots: Tensor, is_stacked: bool) -> list[Tensor]:
    """Random tensors from elsewhere, the same at every call; masks where a mask is asked for."""
    if not isinstance(link, UnitFunction):
        return []
    generator = torch.Generator(slots.device).manual_seed(index)
    shape = (1,) if is_stacked else slots.shape
    found = [
        torch.rand(shape, generator=generator, dtype=slots.dtype, device=slots.device) for _ in range(link.num_others)
    ]
    return [other > 0.5 if place in link.masks else other for place, other in enumerate(found)]


def _passed(
    bank: Composite,
    index: int,
    link: Link,
    before: tuple[Tensor, Tensor],
    result: Tensor,
    own: Sequence[Tensor],
    others: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    slots, rows = before
    if isinstance(link, Norm):
        received = bank.entered(index, link, slots, rows)
        axis = bank.axis(index, rows)
        result = link.slots(received, own, (), axis)
        as_in_module = [value if value.dim() == 1 else along(value, axis) for value in own]
        return bank.left(index, link, slots, rows, received, result, as_in_module)
    return result, rows if isinstance(link, Dropout) else bank.passed(index, link, rows, others)


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
    as_shards(model)
    return Observed(tensors, mode.floor)


class SameOutput:
    """The last change of an operation: none, but it fails if the model's output on a batch has moved."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self.model, self.batch = model, batch
        self.before = observe_output(model, batch)
        self.error = 0.0

    def apply(self) -> None:
        for error, allowed in _moves(self.before, observe_output(self.model, self.batch)):
            self._record(error, allowed)

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


class MovedOutput:
    """The last change where an output may move: none, it notes by how much."""

    def __init__(self, model: nn.Module, batch: Any) -> None:
        self.model, self.batch = model, batch
        self.before = observe_output(model, batch)
        self.error = 0.0

    def apply(self) -> None:
        moves = _moves(self.before, observe_output(self.model, self.batch))
        self.error = max((error for error, _ in moves), default=0.0)

    def revert(self) -> None:
        """Nothing was changed."""


def _moves(before: Observed, after: Observed) -> Iterator[tuple[float, float]]:
    """By how much of its scale each output moved, and the most that an output-equivalent operation may move it."""
    for old, new in zip(before.tensors, after.tensors, strict=True):
        if old.is_floating_point():
            scale = max(_magnitude(old), before.floor, torch.finfo(old.dtype).tiny)
            yield _magnitude(new - old) / scale, tolerance(old.dtype)


class _LastProduct(TorchFunctionMode):
    """Notes sum |weight| |activation| of the last product: outputs near zero by cancellation are no failure."""

    floor = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.linear, F.conv1d, F.conv2d, F.conv3d):
            absolute = pytree.tree_map_only(Tensor, torch.abs, (args, kwargs or {}))
            self.floor = _magnitude(func(*absolute[0], **absolute[1]))
        return func(*args, **(kwargs or {}))
