"""Links: what a pre-activation passes on its way to the activation, one operation after another, and how rows pass it.

A **link** has one input and one output on the path. The slots pass it in the user's own module or function; the frozen
rows of a bank pass it here, with their own copies of what belongs to a unit (a norm's weight, a PReLU's slope, running
statistics) and their unit's part of any other tensor (a residual).

Two kinds of links take the slots' side into their hands as well. A normalization that couples units takes its
statistics from the *reference*, in which each operated unit's first knowledge row stands in its slot's place, so that a
new active member does not disturb its neighbors. Dropout draws one mask, for the slots and their rows alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronsurgery.errors import SurgeryError
from neuronsurgery.pytorch.syncing import normalize_together
from neuronsurgery.pytorch.unitwise import Kind, Other, Step, along, evaluate, laid_out_as

__all__ = [
    "BatchNorm",
    "Coupling",
    "Dropout",
    "Link",
    "Move",
    "Norm",
    "Reshape",
    "SyncBatchNorm",
    "Table",
    "UnitFunction",
    "is_coupling",
    "is_statistic",
    "signature",
]


class Table(Protocol):
    """What a link is told of the rows: `units` (num_rows,) int64, and the reference as indices into [slots, rows]."""

    units: Tensor
    reference: Tensor
    num_units: int

    def gathered(self, other: Any, axis: int) -> Any:
        """Each row's unit's part of a tensor from elsewhere."""
        ...

    def referred(self, slots: Tensor, rows: Tensor, axis: int) -> Tensor:
        """The reference: each unit's slot, of an operated one its first knowledge row, or what that fades into."""
        ...


class Link(Protocol):
    """One operation on the path; `tensors` labels its own tensors, which have a value per unit, or one in all."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def tensors(self) -> tuple[str, ...]: ...

    def slots(self, z: Tensor, values: Sequence[Tensor], others: Sequence[Any], axis: int) -> Tensor:
        """What the slots' own operation gives in evaluation, for values (num_units, ...) or (1,)."""
        ...

    def rows(
        self,
        table: Table,
        rows: Tensor,
        values: Sequence[Tensor],
        others: Sequence[Any],
        axis: int,
        module: nn.Module | None,
    ) -> Tensor:
        """The frozen rows past this link; `module` is the slots' own, None for a function or in evaluation."""
        ...

    def axis_after(self, axis: int, num_axes: int) -> int:
        """Where the units are past this link, counted from the end."""
        ...


class Coupling(Link, Protocol):
    """A link that has a hand in what the slots receive and give."""

    def enter(self, table: Table, slots: Tensor, rows: Tensor, axis: int) -> Tensor:
        """What the slots' own operation receives in their place."""
        ...

    def leave(
        self,
        table: Table,
        slots: Tensor,
        rows: Tensor,
        received: Tensor,
        result: Tensor,
        own: Sequence[Tensor],
        values: Sequence[Tensor],
        axis: int,
    ) -> tuple[Tensor, Tensor]:
        """The slots and the rows past this link; `result` is what the operation made of what it received."""
        ...


def is_coupling(link: Link) -> bool:
    """Whether a link has a hand in what the slots receive and give."""
    return isinstance(link, (Norm, Dropout, SyncBatchNorm))


def signature(link: Link) -> str:
    """What of a link must stay the same for whoever takes its rows on: its kind, its tensors, and how it moves axes."""
    moves = (link.name, link.arguments) if isinstance(link, Move) else ()
    return repr((type(link).__name__, link.tensors, moves))


def is_statistic(label: str) -> bool:
    """Whether a labeled tensor is a running statistic: it moves with every row on its own, and is never renewed."""
    return label.startswith("running_")


class AxesAsTheyAre:
    """What all links but a move have in common: the units stay where they are."""

    def axis_after(self, axis: int, num_axes: int) -> int:
        """Where the units are past this link: where they were."""
        return axis


@dataclass(frozen=True)
class UnitFunction(AxesAsTheyAre):
    """A function of each unit alone: steps that may read tensors of the path and tensors from elsewhere.

    `live` names tensors of the module that all rows read as they are, ahead of the others that a graph passes in.
    `per_unit`: for each of `tensors`, whether it has a value per unit.
    """

    steps: tuple[Step, ...]
    name: str
    kind: Kind
    tensors: tuple[str, ...] = ()
    live: tuple[str, ...] = ()
    num_others: int = 0
    per_unit: tuple[bool, ...] = ()

    @property
    def masks(self) -> frozenset[int]:
        """Which of the others are masks."""
        at = {"torch.where": 0, "torch.masked_fill": 1, "torch.Tensor.where": 1}
        asked = (step.args[at[step.function]] for step in self.steps if step.function in at)
        return frozenset(argument.index for argument in asked if isinstance(argument, Other))

    def slots(self, z: Tensor, values: Sequence[Tensor], others: Sequence[Any], axis: int) -> Tensor:
        return evaluate(self.steps, z, values, others, axis)

    def rows(
        self,
        table: Table,
        rows: Tensor,
        values: Sequence[Tensor],
        others: Sequence[Any],
        axis: int,
        module: nn.Module | None,
    ) -> Tensor:
        if any(self.per_unit) and any(step.function.endswith(".prelu") for step in self.steps):
            _check_axis(rows, axis, "a PReLU with a slope per unit")
        return evaluate(self.steps, rows, values, [table.gathered(other, axis) for other in others], axis)


@dataclass(frozen=True)
class Move:
    """Axes exchanged: a transpose, or a permutation; `order` gives for each new axis the old one."""

    name: str
    arguments: tuple[Any, ...]
    kind: Kind = Kind.NEUTRAL
    tensors: tuple[str, ...] = ()

    @property
    def num_axes(self) -> int:
        """How many axes there must be, at least."""
        if self.name == "permute":
            return len(self.arguments[0])
        return max(int(a) + 1 if a >= 0 else -int(a) for a in self.arguments)

    def slots(self, z: Tensor, values: Sequence[Tensor], others: Sequence[Any], axis: int) -> Tensor:
        return getattr(torch, self.name)(z, *self.arguments)  # type: ignore[no-any-return]

    def rows(
        self,
        table: Table,
        rows: Tensor,
        values: Sequence[Tensor],
        others: Sequence[Any],
        axis: int,
        module: nn.Module | None,
    ) -> Tensor:
        return self.slots(rows, values, others, axis)

    def axis_after(self, axis: int, num_axes: int) -> int:
        order = list(range(num_axes))
        if self.name == "permute":
            order = [a % num_axes for a in self.arguments[0]]
        elif self.name == "transpose":
            a, b = (argument % num_axes for argument in self.arguments)
            order[a], order[b] = order[b], order[a]
        else:
            source, target = (argument % num_axes for argument in self.arguments)
            order.insert(target, order.pop(source))
        return order.index(axis % num_axes) - num_axes


@dataclass(frozen=True)
class Reshape(AxesAsTheyAre):
    """Another shape with the units on the last axis as before; rows take the shape that the slots have then."""

    name: str
    num_units: int
    kind: Kind = Kind.NEUTRAL
    tensors: tuple[str, ...] = ()

    def slots(self, z: Tensor, values: Sequence[Tensor], others: Sequence[Any], axis: int) -> Tensor:
        return z

    def rows(
        self,
        table: Table,
        rows: Tensor,
        values: Sequence[Tensor],
        others: Sequence[Any],
        axis: int,
        module: nn.Module | None,
    ) -> Tensor:
        if not others:
            return rows
        shape = others[0].shape
        if shape[-1] != self.num_units:
            raise SurgeryError(
                f"'{self.name}' gives the {self.num_units} units of a layer the shape {tuple(shape)}: they are not its "
                "last axis; undo the operation on this site before you call it so"
            )
        return rows.reshape(*shape[:-1], rows.shape[-1])


@dataclass(frozen=True)
class BatchNorm(AxesAsTheyAre):
    """Batch or instance normalization: statistics of each unit alone, on axis 1; rows keep running ones too."""

    name: str
    tensors: tuple[str, ...]  # of weight, bias, running_mean, running_var those that there are
    eps: float
    is_instance: bool = False
    kind: Kind = Kind.NEUTRAL

    def slots(self, z: Tensor, values: Sequence[Tensor], others: Sequence[Any], axis: int) -> Tensor:
        return self._normalized(z, values, "running_mean" not in self.tensors, 0.0, self.eps)

    def rows(
        self,
        table: Table,
        rows: Tensor,
        values: Sequence[Tensor],
        others: Sequence[Any],
        axis: int,
        module: nn.Module | None,
    ) -> Tensor:
        if not self.is_instance:
            _check_axis(rows, axis, self.name)
        if module is None:
            return self.slots(rows, values, others, axis)
        settings: Any = module
        uses_batch = settings.training or "running_mean" not in self.tensors
        momentum, count = settings.momentum, settings.num_batches_tracked
        if momentum is None:  # a cumulative average, but for instances; the slots' own pass has counted this batch
            is_counted = settings.training and count is not None and not self.is_instance
            momentum = 1.0 / float(count) if is_counted else 0.0
        return self._normalized(rows, values, uses_batch, momentum, settings.eps)

    def _normalized(self, z: Tensor, values: Sequence[Tensor], uses_batch: bool, momentum: float, eps: float) -> Tensor:
        named = dict(zip(self.tensors, values, strict=True))
        weight, bias = named.get("weight"), named.get("bias")
        mean, var = named.get("running_mean"), named.get("running_var")
        if self.is_instance:
            return F.instance_norm(z, mean, var, weight, bias, uses_batch, momentum, eps)
        return F.batch_norm(z, mean, var, weight, bias, uses_batch, momentum, eps)


@dataclass(frozen=True)
class SyncBatchNorm(BatchNorm):
    """Batch normalization over all processes: slots and rows pass it in one call, and share its all-reduce."""

    def together(
        self, slots: Tensor, rows: Tensor, values: Sequence[Tensor], axis: int, module: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """The slots and the rows past the module."""
        _check_axis(rows, axis, self.name)
        return normalize_together(module, slots, rows, self.tensors, values)


@dataclass(frozen=True)
class Norm(AxesAsTheyAre):
    """A normalization that couples units: over the last axes (layer, root mean square) or over groups of units."""

    name: str  # layer_norm, rms_norm or group_norm
    shape: tuple[int, ...]  # the normalized axes' sizes; for groups their number
    eps: float | None
    tensors: tuple[str, ...]
    kind: Kind = Kind.NEUTRAL

    def slots(self, z: Tensor, values: Sequence[Tensor], others: Sequence[Any], axis: int) -> Tensor:
        mean, scale = self._statistics(z, axis)
        return self._normalized(z, mean, scale, values, axis).to(z.dtype)

    def rows(
        self,
        table: Table,
        rows: Tensor,
        values: Sequence[Tensor],
        others: Sequence[Any],
        axis: int,
        module: nn.Module | None,
    ) -> Tensor:
        raise AssertionError("a normalization that couples units passes its rows in `leave`")

    def enter(self, table: Table, slots: Tensor, rows: Tensor, axis: int) -> Tensor:
        """The reference: what the statistics are taken of."""
        if self.name == "group_norm":
            _check_axis(rows, axis, self.name)
        return laid_out_as(table.referred(slots, rows, axis), slots)

    def leave(
        self,
        table: Table,
        slots: Tensor,
        rows: Tensor,
        received: Tensor,
        result: Tensor,
        own: Sequence[Tensor],
        values: Sequence[Tensor],
        axis: int,
    ) -> tuple[Tensor, Tensor]:
        """Operated slots and rows by the reference's statistics; all other units as the operation itself gave them."""
        mean, scale = self._statistics(received, axis)
        own = [value if value.dim() == 1 else value.movedim(axis, 0) for value in own]
        active = self._normalized(slots, mean, scale, own, axis).to(result.dtype)
        is_untouched = along(table.reference.to(slots.device) < table.num_units, axis)
        if self.name == "group_norm":
            units = table.units.to(slots.device)
            mean, scale = mean.index_select(axis, units), scale.index_select(axis, units)
        passed = self._normalized(rows, mean, scale, values, axis).to(result.dtype)
        return torch.where(is_untouched, result, active), passed  # laid out as the first: dropout draws in that order

    def _statistics(self, z: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Mean and reciprocal deviation, to broadcast; for groups one per unit, (batch, num_units, 1 ...)."""
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if self.name == "rms_norm":
            eps = torch.finfo(z.dtype).eps if self.eps is None else self.eps
            square = z.square().mean(self._axes, keepdim=True)
            return torch.zeros_like(square), torch.rsqrt(square + eps)
        assert self.eps is not None
        if self.name == "layer_norm":
            mean = z.mean(self._axes, keepdim=True)
            return mean, torch.rsqrt((z - mean).square().mean(self._axes, keepdim=True) + self.eps)
        grouped = z.reshape(len(z), self.shape[0], z.shape[1:].numel() // self.shape[0])  # an empty batch leaves no -1
        mean = grouped.mean(-1, keepdim=True)
        scale = torch.rsqrt((grouped - mean).square().mean(-1, keepdim=True) + self.eps)
        shape = (len(z), z.shape[1], *[1] * (z.dim() - 2))
        each = z.shape[1] // self.shape[0]
        return mean.repeat_interleave(each, 1).reshape(shape), scale.repeat_interleave(each, 1).reshape(shape)

    @property
    def sizes(self) -> tuple[int, ...]:
        """How long the last axes must be."""
        return () if self.name == "group_norm" else self.shape

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(-len(self.shape), 0))

    def _normalized(self, z: Tensor, mean: Tensor, scale: Tensor, values: Sequence[Tensor], axis: int) -> Tensor:
        named = dict(zip(self.tensors, values, strict=True))
        z = (z.to(mean.dtype) - mean) * scale
        if "weight" in named:
            z = z * along(named["weight"], axis)
        return z + along(named["bias"], axis) if "bias" in named else z


@dataclass(frozen=True)
class Dropout(AxesAsTheyAre):
    """Dropout of units, samples or whole channels: what one draw makes of ones multiplies the slots and their rows."""

    name: str = "dropout"
    kind: Kind = Kind.NEUTRAL
    tensors: tuple[str, ...] = ()

    def slots(self, z: Tensor, values: Sequence[Tensor], others: Sequence[Any], axis: int) -> Tensor:
        return z

    def rows(
        self,
        table: Table,
        rows: Tensor,
        values: Sequence[Tensor],
        others: Sequence[Any],
        axis: int,
        module: nn.Module | None,
    ) -> Tensor:
        raise AssertionError("dropout passes its rows in `leave`")

    def enter(self, table: Table, slots: Tensor, rows: Tensor, axis: int) -> Tensor:
        """Ones in the place of the slots."""
        return torch.ones_like(slots)

    def leave(
        self,
        table: Table,
        slots: Tensor,
        rows: Tensor,
        received: Tensor,
        result: Tensor,
        own: Sequence[Tensor],
        values: Sequence[Tensor],
        axis: int,
    ) -> tuple[Tensor, Tensor]:
        """Slots and rows under the mask, which is scaled already."""
        return slots * result, rows * table.gathered(result, axis)


def _check_axis(rows: Tensor, axis: int, what: str) -> None:
    """Some operations of torch take the units to be on axis 1, wherever they are."""
    if rows.dim() + axis != 1:
        raise SurgeryError(
            f"{what} reads axis 1 of its input, of {rows.dim()} axes here, and the units are on axis "
            f"{rows.dim() + axis}; undo the operation on this site before you call it so"
        )
