"""Sharded tensors: parameters of which each process holds a part, as FSDP2 and tensor parallelism leave them.

A parameter is a `DTensor` then. What belongs to a unit is read and written through the part that is here: a process
edits the rows that it holds, and no parameter is ever gathered. `held` is that part, `Shard` where it lies in the
whole; `own_rows` says which of some units' rows are in it, `taken` collects some units' rows on all processes, at the
cost of these rows alone, and `part_of` cuts the part out of a tensor that is whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuronsurgery.errors import DistributedError, SurgeryError
from neuronsurgery.pytorch.unit_axes import UnitAxes

__all__ = [
    "ASKED",
    "Shard",
    "appended",
    "blank",
    "copied",
    "gathered",
    "held",
    "is_alike",
    "is_sharded",
    "is_sharded_alike",
    "is_spread",
    "mesh_of",
    "squared_norms",
    "own_rows",
    "own_share",
    "own_units",
    "own_values",
    "part_of",
    "problem_of",
    "room_in",
    "row_axis",
    "shard_of",
    "sharded_like",
    "sharded_rows",
    "whole",
]


def is_sharded(tensor: Any) -> bool:
    """Whether each process holds a part of a tensor, or a copy that torch keeps the same."""
    module = sys.modules.get("torch.distributed.tensor")  # importing it takes seconds; without it there are none
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded_alike(tensor: Any, other: Any) -> bool:
    """Whether a tensor is sharded as another one of its shape is."""
    return (
        is_sharded(tensor)
        and tensor.shape == other.shape
        and tensor.device_mesh == other.device_mesh
        and tensor.placements == other.placements
    )


def is_spread(tensor: Any) -> bool:
    """Whether each process holds another part of a tensor."""
    return is_sharded(tensor) and not all(placement.is_replicate() for placement in tensor.placements)


def is_alike(tensor: Any, other: Any) -> bool:
    """Whether two tensors have one shape, and are held in the same way."""
    if is_sharded(tensor) or is_sharded(other):
        return is_sharded(other) and is_sharded_alike(tensor, other)
    return bool(tensor.shape == other.shape)


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory: all of it, unless it is sharded."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    local: Tensor = sharded._local_tensor
    return local.detach()


def mesh_of(model: nn.Module) -> Any:
    """The mesh of processes that a model's parameters are sharded over; None where none is.

    Raises:
        DistributedError: they are sharded over several meshes.
    """
    meshes: list[Any] = []
    for parameter in model.parameters() if isinstance(model, nn.Module) else ():  # no model is named by others
        if is_sharded(parameter) and (mesh := parameter.device_mesh) not in meshes:  # type: ignore[attr-defined]
            meshes.append(mesh)
    if len(meshes) > 1:
        found = ", ".join(str(mesh) for mesh in meshes)
        raise DistributedError(
            f"the model's parameters are sharded over several meshes of processes: {found}. Operate on a part of the "
            "model that has one, or before it is sharded"
        )
    return meshes[0] if meshes else None


@dataclass(frozen=True)
class Shard:
    """Where the part that this process holds lies in the whole tensor, axis by axis.

    `is_first`: no process before this one holds the same part.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    is_first: bool

    @property
    def slices(self) -> tuple[slice, ...]:
        """What cuts the part out of the whole."""
        return tuple(slice(first, first + size) for first, size in zip(self.offsets, self.sizes, strict=True))

    def rows(self, axes: UnitAxes) -> slice:
        """The units of which something is here."""
        return self.slices[axes.axes[0]]

    def columns(self, axes: UnitAxes) -> tuple[slice, ...]:
        """Which part of their rows is here."""
        return tuple(one for axis, one in enumerate(self.slices) if axis != axes.axes[0])


def shard_of(tensor: Any) -> Shard:
    """Where the part of a sharded tensor that is here lies; of any other tensor all of it is."""
    shape = tuple(tensor.shape)
    if not is_sharded(tensor):
        return Shard(shape, (0,) * len(shape), shape, True)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements
    sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    coordinate = mesh.get_coordinate() or ()
    is_first = all(at == 0 for at, placement in zip(coordinate, placements, strict=True) if placement.is_replicate())
    return Shard(shape, tuple(offsets), tuple(sizes), is_first)


def problem_of(tensor: Any, axes: UnitAxes | None) -> str:
    """Why no rows of a sharded tensor can be told apart, "" where they can."""
    if not is_sharded(tensor):
        return ""
    if any(placement.is_partial() for placement in tensor.placements):
        return "its values are sums that are still spread over processes"
    if axes is not None and (axes.groups > 1 or len(axes.axes) > 1):
        return f"its units are numbered by axes {axes.axes} in {axes.groups} groups, and it is sharded"
    return ""


# -- rows ------------------------------------------------------------------------------------------------------------


def own_rows(tensor: Tensor, units: Tensor, axes: UnitAxes) -> tuple[Tensor, Tensor]:
    """Of some units, (r,) int64, those that this process holds rows of: which they are, and where in `held(tensor)`."""
    rows = shard_of(tensor).rows(axes)
    which = ((units >= rows.start) & (units < rows.stop)).nonzero().squeeze(1)
    return which, units[which] - rows.start


def own_units(tensor: Tensor, units: Tensor, axes: UnitAxes) -> Tensor:
    """Of some units, (r,) int64, those of which this process holds something, as `held(tensor)` counts them."""
    return own_rows(tensor, units, axes)[1] if is_sharded(tensor) else units


def own_values(tensor: Tensor, values: Tensor, which: Tensor, axes: UnitAxes) -> Tensor:
    """The part that this process holds of rows, (r, *row_shape), of which it holds those."""
    return values.index_select(0, which)[(slice(None), *shard_of(tensor).columns(axes))]


def blank(tensor: Tensor, num_rows: int, axes: UnitAxes) -> Tensor:
    """Zeros of the shape that so many whole rows of a tensor have, beside it."""
    row_shape = [size for axis, size in enumerate(tensor.shape) if axis != axes.axes[0]]
    return torch.zeros(num_rows, *row_shape, dtype=tensor.dtype, device=tensor.device)


def own_share(tensor: Tensor, units: Tensor, axes: UnitAxes) -> Tensor:
    """The rows of some units as far as this process is the first to hold them, zeros elsewhere: shares to be summed."""
    share, shard = blank(tensor, len(units), axes), shard_of(tensor)
    if shard.is_first:
        which, rows = own_rows(tensor, units, axes)
        share[(which[(...,) + (None,) * (share.dim() - 1)], *_grids(shard.columns(axes)))] = axes.take(
            held(tensor), rows
        )
    return share


def _grids(columns: Sequence[slice]) -> list[Tensor]:
    """Index tensors of a block's columns, to be broadcast beside those of its rows."""
    return [
        torch.arange(one.start, one.stop)[(None,) * (place + 1) + (slice(None),) + (None,) * (len(columns) - place - 1)]
        for place, one in enumerate(columns)
    ]


def squared_norms(tensor: Tensor, norms: Tensor, axes: UnitAxes) -> Tensor:
    """Squares of the norms of the rows that are here, as far as they are, zeros for others, (num_units,): to be summed.

    `norms`: those of the rows of `held(tensor)`. Squared in float64, the norm of a row that is whole here comes back
    as it was.
    """
    shard = shard_of(tensor)
    squares = torch.zeros(axes.num_units(tensor.shape), dtype=torch.float64, device=norms.device)
    if shard.is_first:
        squares[shard.rows(axes)] = norms.double().square()
    return squares


# -- whole tensors ---------------------------------------------------------------------------------------------------


def part_of(tensor: Tensor, values: Tensor) -> Tensor:
    """The part of `values`, whole or sharded alike, that belongs where this process holds its part of a tensor."""
    return held(values) if is_sharded(values) or not is_sharded(tensor) else values[shard_of(tensor).slices]


def sharded_like(tensor: Any, values: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, sharded as another one of the same shape is: nothing is sent."""
    from torch.distributed.tensor import DTensor

    part = part_of(tensor, values).contiguous()
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=values.shape, stride=values.stride()
    )


def sharded_rows(tensor: Any, rows: Tensor) -> Tensor:
    """Rows that all processes have, (n, ...), sharded along axis 0 over those that a parameter is: nothing is sent.

    Rows are added, copies of the first, so that each process holds as many.
    """
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as Along

    axis = row_axis(tensor)
    size = tensor.device_mesh.size(axis)
    room = _multiple(len(rows), size)
    padded = torch.cat([rows, rows[:1].expand(room - len(rows), *rows.shape[1:])])
    own = padded.chunk(size)[tensor.device_mesh.get_local_rank(axis)].clone()
    placements = [Along(0) if each == axis else Replicate() for each in range(tensor.device_mesh.ndim)]
    return DTensor.from_local(own, tensor.device_mesh, placements, run_check=False)


def appended(tensor: Any, num: int, added: Tensor, room: int) -> Tensor:
    """Sharded rows with others, (r, ...), behind the first `num`: in the room there is, else all of them in `room`.

    All processes have what is added; more is sent only where the rows need new room.
    """
    if num + len(added) > len(tensor):
        rows = torch.cat([whole(tensor)[:num], added])
        return sharded_rows(tensor, torch.cat([rows, rows[:1].expand(room - len(rows), *rows.shape[1:])]))
    from torch.distributed.tensor import DTensor

    own = held(tensor).clone()
    which, rows = own_rows(tensor, torch.arange(num, num + len(added), device=added.device), UnitAxes())
    own.index_copy_(0, rows, added.index_select(0, which).to(own))
    return DTensor.from_local(own, tensor.device_mesh, tensor.placements, run_check=False)


def room_in(tensor: Tensor, room: int) -> int:
    """The capacity of frozen rows that is asked for, as sharded ones have it."""
    sharded: Any = tensor
    return _multiple(room, sharded.device_mesh.size(row_axis(sharded))) if is_sharded(tensor) else room


def _multiple(number: int, size: int) -> int:
    return -(-number // size) * size


def row_axis(tensor: Any) -> int:
    """The axis of a parameter's mesh over which frozen rows are sharded: the last over which it is sharded itself."""
    return max(axis for axis, placement in enumerate(tensor.placements) if not placement.is_replicate())


@contextmanager
def gathered(tensor: Any, *, is_freed: bool) -> Iterator[Tensor]:
    """Sharded rows, all of them, to compute with in this block.

    `is_freed`: what autograd would keep of them until the backward pass is freed, and gathered anew by then.
    """
    rows = _all_gathered(tensor)
    if not is_freed or torch.compiler.is_compiling():
        yield rows
        return
    storage = rows.untyped_storage().data_ptr()

    def pack(saved: Tensor) -> Any:
        if saved.untyped_storage().data_ptr() != storage:
            return saved
        return saved.shape, saved.stride(), saved.storage_offset()

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else _all_gathered(tensor).as_strided(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield rows


def copied(tensor: Any) -> Tensor:
    """The copy that this process has of a tensor of which all have one; gradients that arrive here are its share."""
    if not is_sharded(tensor):
        return tensor  # type: ignore[no-any-return]
    from torch.distributed.tensor import Partial

    if not all(placement.is_replicate() for placement in tensor.placements):
        raise SurgeryError(
            f"a layer whose units are split over processes received an input that is spread as {tensor.placements}, "
            "and its bank needs all of it on each process; undo the operation before you parallelize it otherwise"
        )
    return tensor.to_local(grad_placements=[Partial()] * tensor.device_mesh.ndim)  # type: ignore[no-any-return]


def _all_gathered(tensor: Any) -> Tensor:
    rows: Tensor = tensor.detach().full_tensor()
    return rows


def whole(tensor: Any) -> Tensor:
    """All of a tensor on every process; all of them have to ask for it."""
    if not is_sharded(tensor):
        return tensor  # type: ignore[no-any-return]
    if (ask := ASKED.get()) is not None:
        ask("a whole tensor")
    with torch.no_grad():
        return tensor.full_tensor()  # type: ignore[no-any-return]


ASKED: ContextVar[Callable[[str], object] | None] = ContextVar("neuronsurgery_asked", default=None)
"""What is called before processes exchange something here, so that none waits for one that failed."""
