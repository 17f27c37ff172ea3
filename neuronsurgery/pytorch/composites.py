"""The bank: the frozen members of a site, stacked row by row, and the sum that makes them composite units.

A bank is a child module of its producer and holds buffers only, so nothing that walks parameters can move a frozen
member. It receives the producer's own input, and replaces the activations of operated units by their composites:
`forward` gives the rows' pre-activations, `combine` the activations of the whole layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronsurgery.composites import Layout, Rows, room_for
from neuronsurgery.errors import SurgeryError
from neuronsurgery.pytorch.unitwise import Earlier, PerUnit, UnitFunction, resolve

__all__ = ["Composite", "Product", "UnitPath", "apply", "frozen_names"]

STRUCTURE_FORMAT = 1


@dataclass(frozen=True)
class Product:
    """How a producer computes pre-activations from its input and rows: the operation and its constants.

    `kind` is "linear", "conv1d", "conv2d" or "conv3d"; `padding` a tuple or one of torch's names for it.
    """

    kind: str
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    dilation: tuple[int, ...] = ()
    padding_mode: str = "zeros"
    wrapped_padding: tuple[int, ...] = ()

    @property
    def unit_axis(self) -> int:
        """The axis of the units in the output, counted from the end."""
        return -1 if self.kind == "linear" else -int(self.kind[4]) - 1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Pre-activations of the given rows; weight (num_rows, *row_shape), bias (num_rows,)."""
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.wrapped_padding, mode=self.padding_mode), 0
        conv = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}[self.kind]
        return conv(x, weight, bias, self.stride, padding, self.dilation)


@dataclass(frozen=True)
class UnitPath:
    """What a producer's pre-activations pass on the way out: the unit-wise function, and where it ends.

    In a Sequential, `offset` counts the children from the producer to the activation and `activation_class` names the
    last one; elsewhere the rewritten forward knows the place. `per_unit`: a path parameter has a value for each unit,
    which torch takes along axis 1.
    """

    function: UnitFunction
    offset: int = 0
    activation_class: str = ""
    per_unit: bool = False


def frozen_names(path: UnitPath) -> tuple[str, ...]:
    """The names of a bank's buffers with one value a row: weights, biases, and the path's own parameters.

    Not `weight` and `bias`: functions that walk all modules and initialize whatever has a weight must pass it by.
    """
    return ("frozen_weight", "frozen_bias", *(f"frozen_path_{index}" for index in range(len(path.function.parameters))))


class Composite(nn.Module):
    """The bank of one producer: frozen rows, their structure, and the sum into composite units.

    Buffers: `frozen_weight` (capacity, *row_shape), `frozen_bias` (capacity,) where the producer has one, and
    `frozen_path_<i>` (capacity,), copies of the path's own parameters. Unused rows repeat the first and are never read.
    """

    frozen_weight: Tensor
    frozen_bias: Tensor | None
    order: Tensor
    source: Tensor | None

    def __init__(self, product: Product, path: UnitPath, num_units: int, rows: Rows, values: Sequence[Tensor | None]):
        super().__init__()
        self.product, self.path, self.num_units = product, path, num_units
        self.rows = rows
        for name, value in zip(self.buffer_names(), values, strict=True):
            self.register_buffer(name, None if value is None else _padded(value, room_for(len(rows), num_units)))
        for name, value in self.tables(rows).items():
            self.register_buffer(name, value, persistent=False)

    def buffer_names(self) -> tuple[str, ...]:
        """The buffers with one value a row: weight, bias, and the path's parameters."""
        return frozen_names(self.path)

    def tables(self, rows: Rows) -> dict[str, Tensor | None]:
        """The gather tables for these rows, on the bank's device."""
        layout = Layout.of(rows, self.num_units)
        device = self.frozen_weight.device
        return {
            "order": torch.from_numpy(layout.order).to(device),
            "source": None if layout.source is None else torch.from_numpy(layout.source).to(device),
        }

    def live(self, name: str) -> Tensor | None:
        """The rows in use of one buffer, (num_rows, ...)."""
        value: Tensor | None = getattr(self, name)
        return None if value is None else value[: len(self.rows)]

    def forward(self, x: Tensor) -> Tensor:
        """Pre-activations of the frozen rows for the input the producer received, unit axis of size capacity."""
        return self.product(x, self.frozen_weight, self.frozen_bias)

    def combine(self, h: Tensor, z: Tensor, function: UnitFunction | None = None) -> Tensor:
        """The layer's activations with composites in place: h (the slots' activations), z (`forward` of this bank).

        `function` is what the slots passed, where a plain attribute may have changed it since the operation.
        """
        return self.assemble(h, self.activation(z, function))

    def assemble(self, h: Tensor, rows: Tensor) -> Tensor:
        """As `combine`, from the activations of the rows."""
        axis = self.product.unit_axis
        values = torch.cat([h, rows], axis)
        num_terms, num_columns = self.order.shape
        terms = values.index_select(axis, self.order.reshape(-1))
        terms = terms.unflatten(axis, (num_terms, num_columns))  # type: ignore[no-untyped-call]
        depth = num_terms // 2
        oldest, positive, negative = terms.split([1, depth, depth], axis - 1)
        composites: Tensor = oldest.squeeze(axis - 1) + (positive - negative).sum(axis - 1)
        if self.source is None:
            return composites
        return torch.cat([h, composites], axis).index_select(axis, self.source)

    def activation(self, z: Tensor, function: UnitFunction | None = None) -> Tensor:
        """The site's unit-wise function on the rows, with their own frozen path parameters.

        Raises:
            SurgeryError: a function with other parameters; or a slope per unit where the units are not on axis 1, so
                that torch takes it along another axis.
        """
        if self.path.per_unit and z.dim() + self.product.unit_axis != 1:
            raise SurgeryError(
                f"a PReLU with a slope per unit reads axis 1 of its input, of {z.dim()} axes here, and the units are "
                f"on axis {z.dim() + self.product.unit_axis}; undo the operation on this site before you call it so"
            )
        function = self.path.function if function is None else function
        if function.parameters != self.path.function.parameters:
            raise SurgeryError(
                f"the activation function is '{function.name}' now, with other parameters than those of "
                f"'{self.path.function.name}', for which the bank was made; undo the operation before you change it"
            )
        slopes = [getattr(self, f"frozen_path_{index}") for index in range(len(function.parameters))]
        return apply(function, z, slopes, self.product.unit_axis)

    def get_extra_state(self) -> Tensor:
        """The structure as one int64 tensor, so that state dicts hold tensors only."""
        table = self.rows.encoded()
        head = np.array([STRUCTURE_FORMAT, self.num_units, *table.shape], np.int64)
        return torch.from_numpy(np.concatenate([head, table.reshape(-1)]))

    def set_extra_state(self, state: Tensor) -> None:
        """Take over a saved structure; the weights come with the same state dict.

        Raises:
            SurgeryError: a newer format, a structure of another layer, or one that was averaged or cast.
        """
        numbers = state.detach().cpu().numpy()
        if numbers.dtype != np.int64 or numbers[0] != STRUCTURE_FORMAT or numbers.size != 4 + numbers[2] * numbers[3]:
            raise SurgeryError(
                f"the saved structure of a bank has format {numbers.flat[0]} and {numbers.size} entries; this version "
                f"reads format {STRUCTURE_FORMAT}. It is no weight: copy it, never average or cast it"
            )
        rows = Rows.decoded(numbers[4:].reshape(numbers[2], numbers[3]))
        if numbers[1] != self.num_units or rows.unit.max(initial=0) >= self.num_units:
            raise SurgeryError(
                f"the saved bank belongs to a layer of {numbers[1]} units, this one has {self.num_units}"
            )
        if room_for(len(rows), self.num_units) != len(self.frozen_weight):
            raise SurgeryError(
                f"the saved bank has {len(rows)} frozen rows, this model's has room for {len(self.frozen_weight)}: it "
                "was operated on differently"
            )
        self.rows = rows
        for name, value in self.tables(rows).items():
            setattr(self, name, value)

    def extra_repr(self) -> str:
        return f"{len(self.rows)} frozen rows, {len(set(self.rows.unit))} of {self.num_units} units"


def apply(function: UnitFunction, z: Tensor, slopes: Sequence[Tensor], unit_axis: int) -> Tensor:
    """A unit-wise function on the pre-activations of any units; a slope has one value per unit, or one in all."""
    values = [z]
    for step in function.steps:
        if step.function.endswith(".prelu"):
            (index,) = [argument.index for argument in step.args if isinstance(argument, PerUnit)]
            values.append(_prelu(values[_first_index(step.args)], slopes[index], unit_axis))
            continue
        args = [values[a.index] if isinstance(a, Earlier) else a for a in step.args]
        kwargs = {k: values[v.index] if isinstance(v, Earlier) else v for k, v in step.kwargs}
        values.append(resolve(step.function)(*args, **kwargs))
    return values[-1]


def _first_index(args: tuple[Any, ...]) -> int:
    return next(argument.index for argument in args if isinstance(argument, Earlier))


def _prelu(z: Tensor, slope: Tensor, unit_axis: int) -> Tensor:
    return torch.where(z > 0, z, _along(slope.to(z.dtype), unit_axis) * z)


def _padded(value: Tensor, room: int) -> Tensor:
    """Rows up to the capacity; unused ones repeat the first, so that no function is evaluated off its domain."""
    return torch.cat([value, value[:1].expand(room - len(value), *value.shape[1:])]).contiguous()


def _along(table: Tensor, axis: int) -> Tensor:
    """A table whose last axis is the units, shaped to broadcast where the units are on `axis`."""
    return table.reshape(*table.shape, *([1] * (-axis - 1)))
