"""The units of a parameter are found, read and written wherever a layout has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from neuronsurgery.pytorch.transaction import WriteRows
from neuronsurgery.pytorch.unit_axes import ROWS, UnitAxes


@dataclass(frozen=True)
class Layout:
    """Axes, a shape to try them on, and by hand: how many units, which elements are a unit's, the smallest shape."""

    axes: UnitAxes
    shape: tuple[int, ...]
    num_units: int
    select: Callable[[int], Any]
    few_units: tuple[int, ...]


LAYOUTS = {
    "rows": Layout(ROWS, (5, 3), 5, lambda unit: (unit,), (2, 3)),
    "bias": Layout(ROWS, (5,), 5, lambda unit: (unit,), (2,)),
    "columns": Layout(UnitAxes((1,)), (3, 5), 5, lambda unit: (slice(None), unit), (3, 2)),
    "transposed": Layout(UnitAxes((1,)), (3, 5, 2, 2), 5, lambda unit: (slice(None), unit), (3, 2, 2, 2)),
    "norm": Layout(UnitAxes((1,)), (1, 5, 1, 1), 5, lambda unit: (slice(None), unit), (1, 2, 1, 1)),
    "grouped": Layout(  # two groups of three inputs and four outputs
        UnitAxes((0, 2), 2),
        (6, 4, 3),
        8,
        lambda unit: (slice(3 * (unit // 4), 3 * (unit // 4) + 3), unit % 4),
        (6, 2, 3),
    ),
    "stacked": Layout(UnitAxes((0, 2)), (3, 4, 2), 6, lambda unit: (unit // 2, slice(None), unit % 2), (2, 4, 2)),
    "stacked-bias": Layout(UnitAxes((0, 1)), (3, 2), 6, lambda unit: (unit // 2, unit % 2), (2, 2)),
    "backwards": Layout(UnitAxes((2, 0)), (3, 4, 2), 6, lambda unit: (unit % 3, slice(None), unit // 3), (2, 4, 2)),
}

every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
every_stride = pytest.mark.parametrize("is_contiguous", [True, False])
UNITS = torch.tensor([3, 0, 4])


def tensor_of(layout: Layout, is_contiguous: bool = True) -> Tensor:
    """Different numbers; if not contiguous, every second one of a larger tensor with its axes reversed."""
    numbers = torch.arange(float(torch.Size(layout.shape).numel())).reshape(layout.shape)
    if is_contiguous:
        return numbers
    larger = torch.full([2 * size for size in reversed(layout.shape)], -1.0)
    tensor = larger[(slice(None, None, 2),) * len(layout.shape)].permute(*reversed(range(len(layout.shape))))
    assert not tensor.is_contiguous()
    return tensor.copy_(numbers)


def by_hand(layout: Layout, tensor: Tensor, units: list[int]) -> Tensor:
    return torch.stack([tensor[layout.select(unit)] for unit in units])


@every_layout
def test_units_are_counted_as_by_hand(layout: Layout) -> None:
    assert layout.axes.num_units(layout.shape) == layout.num_units


@every_layout
def test_every_element_belongs_to_one_unit(layout: Layout) -> None:
    found = torch.cat([tensor_of(layout)[layout.select(unit)].flatten() for unit in range(layout.num_units)])
    assert torch.equal(found.sort().values, torch.arange(float(tensor_of(layout).numel())))


@every_layout
@every_stride
def test_rows_are_the_units_in_order(layout: Layout, is_contiguous: bool) -> None:
    tensor = tensor_of(layout, is_contiguous)
    rows = layout.axes.rows(tensor)
    assert torch.equal(rows, by_hand(layout, tensor, list(range(layout.num_units))))


@every_layout
@every_stride
def test_view_is_the_rows_in_place(layout: Layout, is_contiguous: bool) -> None:
    tensor = tensor_of(layout, is_contiguous)
    view = layout.axes.view(tensor)
    assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    num_axes = len(layout.axes.axes)
    assert tuple(view.shape[:num_axes]) == layout.axes.unit_shape(layout.shape)
    assert torch.equal(view.reshape(-1, *view.shape[num_axes:]), layout.axes.rows(tensor))


@every_layout
@every_stride
def test_take_copies_the_units_asked_for_in_their_order(layout: Layout, is_contiguous: bool) -> None:
    tensor = tensor_of(layout, is_contiguous)
    taken = layout.axes.take(tensor, UNITS)
    assert torch.equal(taken, by_hand(layout, tensor, UNITS.tolist()))
    taken.zero_()
    assert torch.equal(tensor, tensor_of(layout))


@every_layout
@every_stride
def test_index_selects_the_units_from_the_view(layout: Layout, is_contiguous: bool) -> None:
    tensor = tensor_of(layout, is_contiguous)
    index = layout.axes.index(tensor.shape, UNITS)
    assert torch.equal(layout.axes.view(tensor)[index], by_hand(layout, tensor, UNITS.tolist()))


@every_layout
@every_stride
def test_put_writes_through_and_touches_nothing_else(layout: Layout, is_contiguous: bool) -> None:
    tensor, expected = tensor_of(layout, is_contiguous), tensor_of(layout)
    values = -1.0 - torch.rand(layout.axes.take(tensor, UNITS).shape, generator=torch.Generator().manual_seed(0))
    for unit, value in zip(UNITS.tolist(), values, strict=True):
        expected[layout.select(unit)] = value
    layout.axes.put(tensor, UNITS, values)
    assert torch.equal(tensor, expected)


@every_layout
def test_put_writes_through_a_parameter(layout: Layout) -> None:
    parameter = nn.Parameter(tensor_of(layout))
    with torch.no_grad():
        layout.axes.put(parameter, UNITS, -torch.ones_like(layout.axes.take(parameter, UNITS)))
    assert (by_hand(layout, parameter.detach(), UNITS.tolist()) == -1).all()
    assert parameter.is_leaf and parameter.requires_grad


@every_layout
@every_stride
def test_whole_is_the_inverse_of_rows(layout: Layout, is_contiguous: bool) -> None:
    tensor = tensor_of(layout, is_contiguous)
    whole = layout.axes.whole(layout.axes.rows(tensor), tensor.shape)
    assert torch.equal(whole, tensor) and whole.shape == tensor.shape
    whole.zero_()
    assert torch.equal(tensor, tensor_of(layout))


@every_layout
@every_stride
def test_a_written_row_is_taken_back_exactly(layout: Layout, is_contiguous: bool) -> None:
    tensor = tensor_of(layout, is_contiguous)
    change = WriteRows(tensor, UNITS, torch.full_like(layout.axes.take(tensor, UNITS), 0.5).double(), layout.axes)
    change.apply()
    assert (by_hand(layout, tensor, UNITS.tolist()) == 0.5).all()
    change.revert()
    assert torch.equal(tensor, tensor_of(layout))


@every_layout
def test_few_units_have_a_neighbor_along_each_axis(layout: Layout) -> None:
    assert layout.axes.few_units(layout.shape) == layout.few_units
    assert layout.axes.unit_shape(layout.few_units) == (2,) * len(layout.axes.axes)
    assert layout.axes.few_units(layout.few_units) == layout.few_units


def test_no_unit_is_taken_where_none_is_asked_for() -> None:
    for layout in LAYOUTS.values():
        tensor, none = tensor_of(layout), torch.tensor([], dtype=torch.int64)
        taken = layout.axes.take(tensor, none)
        assert taken.shape == (0, *layout.axes.rows(tensor).shape[1:])
        layout.axes.put(tensor, none, taken)
        assert torch.equal(tensor, tensor_of(layout))


# -- what the layouts are for: a unit's row is what its output depends on ----------------------------------------------

PRODUCERS: dict[str, tuple[UnitAxes, tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "linear": (ROWS, (5, 3), lambda w: functional.linear(torch.ones(1, 3), w)[0]),
    "matmul": (UnitAxes((1,)), (3, 5), lambda w: (torch.ones(1, 3) @ w)[0]),
    "conv": (ROWS, (6, 2, 3), lambda w: functional.conv1d(torch.ones(1, 4, 5), w, groups=2)[0].sum(1)),
    "transposed": (UnitAxes((1,)), (3, 5, 2), lambda w: functional.conv_transpose1d(torch.ones(1, 3, 4), w)[0].sum(1)),
    "grouped": (
        UnitAxes((0, 2), 2),
        (6, 4, 2),
        lambda w: functional.conv_transpose1d(torch.ones(1, 6, 4), w, groups=2)[0].sum(1),
    ),
    "experts": (UnitAxes((0, 2)), (3, 4, 2), lambda w: torch.einsum("ebi,eio->eo", torch.ones(3, 1, 4), w).flatten()),
}


@pytest.mark.parametrize(("axes", "shape", "produce"), PRODUCERS.values(), ids=PRODUCERS)
def test_a_unit_of_a_producer_reads_its_row_and_no_other(
    axes: UnitAxes, shape: tuple[int, ...], produce: Callable[[Tensor], Tensor]
) -> None:
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    outputs = produce(weight)
    assert len(outputs) == axes.num_units(shape)
    for unit, output in enumerate(outputs):
        (gradient,) = torch.autograd.grad(output, weight, retain_graph=True)
        is_read = axes.rows(gradient).flatten(1).ne(0)
        assert is_read[unit].all() and int(is_read.sum()) == int(is_read[unit].sum())
