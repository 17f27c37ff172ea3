"""Products: how a producer computes pre-activations from its input and its units' incoming weights.

A bank evaluates the same product for its frozen rows alone. Rows are in one form, (num_rows, *row_shape), whatever the
layout of the producer's own weight (`UnitAxes` translates), and a row that sees only a part of the input (a group, an
expert) is told by its unit which part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuronsurgery.pytorch.unit_axes import ROWS, UnitAxes
from neuronsurgery.pytorch.unitwise import along

__all__ = ["Contraction", "Convolution", "Linear", "Product"]


@dataclass(frozen=True)
class Linear:
    """`F.linear`: (..., in) -> (..., out); `axes` says how the producer's own weight numbers the units."""

    axes: UnitAxes = ROWS
    kind: str = "linear"
    unit_axes: tuple[int, ...] = (-1,)
    is_stacked: bool = False

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, units: Tensor | None = None) -> Tensor:
        """Pre-activations of the given rows, (num_rows, in), on the last axis."""
        return F.linear(x, weight, bias)

    def num_axes(self, least: int) -> int:
        """How many axes an example has whose result has at least so many."""
        return least

    def example(self, weight: Tensor, generator: torch.Generator, num_axes: int, sizes: Mapping[int, int]) -> Tensor:
        """A standard normal input to rows (num_units, in); `sizes` are those that its result must have, by axis."""
        between = [sizes.get(axis, 5) for axis in range(1 - num_axes, -1)]
        return _normal((64, *between, weight.shape[1]), weight, generator)


@dataclass(frozen=True)
class Convolution:
    """A convolution or, with `transposed`, its transpose: (batch, in, *space) -> (batch, out, *space).

    `padding` is a tuple or one of torch's names for it; `wrapped_padding` what a `padding_mode` other than zeros pads.
    """

    dims: int
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int = 1
    units_per_group: int = 0  # with groups: which units read which part of the input
    padding_mode: str = "zeros"
    wrapped_padding: tuple[int, ...] = ()
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    is_stacked: bool = False

    @property
    def kind(self) -> str:
        """The torch function, "conv2d" say."""
        return f"conv_transpose{self.dims}d" if self.transposed else f"conv{self.dims}d"

    @property
    def unit_axes(self) -> tuple[int, ...]:
        """The axis of the units in the output, counted from the end."""
        return (-self.dims - 1,)

    @property
    def axes(self) -> UnitAxes:
        """Where the units are in the producer's own weight."""
        if not self.transposed:
            return ROWS
        return UnitAxes((1,)) if self.groups == 1 else UnitAxes((0, 2), self.groups)

    def is_of(self, module: Any) -> bool:
        """Whether a module still convolves in this way."""
        return bool(
            module.stride == self.stride
            and module.padding == self.padding
            and module.dilation == self.dilation
            and module.groups == self.groups
            and module.padding_mode == self.padding_mode
        )

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, units: Tensor | None = None) -> Tensor:
        """Pre-activations of the given rows, (num_rows, in / groups, *kernel), on the unit axis."""
        groups = 1
        if self.groups > 1:
            assert units is not None
            x, groups = self._parts(x, units), len(weight)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self.wrapped_padding, mode=self.padding_mode), 0
        function = getattr(F, self.kind)
        if not self.transposed:
            return function(x, weight, bias, self.stride, padding, self.dilation, groups)  # type: ignore[no-any-return]
        weight = weight.flatten(0, 1).unsqueeze(1) if groups > 1 else weight.transpose(0, 1)
        return function(  # type: ignore[no-any-return]
            x, weight, bias, self.stride, padding, self.output_padding, groups, self.dilation
        )

    def _parts(self, x: Tensor, units: Tensor) -> Tensor:
        """Each row's own input channels, one after another."""
        axis = -self.dims - 1
        size = x.shape[axis] // self.groups
        first = units // self.units_per_group * size
        channels = first[:, None] + torch.arange(size, device=x.device)
        return x.index_select(axis, channels.reshape(-1))

    def num_axes(self, least: int) -> int:
        """How many axes an example has: those of a batch of inputs."""
        return self.dims + 2

    def example(self, weight: Tensor, generator: torch.Generator, num_axes: int, sizes: Mapping[int, int]) -> Tensor:
        """A standard normal input to rows (num_units, in / groups, *kernel), large enough for kernel and padding.

        `sizes` are those that its result must have, by axis.
        """
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, weight.shape[2:], strict=True)]
        space = [
            self._size_for(axis, sizes[axis - self.dims], span)
            if axis - self.dims in sizes
            else span + 3 + max(self.wrapped_padding, default=0)
            for axis, span in enumerate(reach)
        ]
        return _normal((8, weight.shape[1] * self.groups, *space), weight, generator)

    def _size_for(self, axis: int, size: int, reach: int) -> int:
        """The largest input along an axis of space whose output has this size."""
        stride = self.stride[axis]
        if isinstance(self.padding, str):
            padding = reach - 1 if self.padding == "same" else 0
        else:
            padding = 2 * self.padding[axis]
        if self.transposed:
            return (size + padding - reach - self.output_padding[axis]) // stride + 1
        return (size - 1) * stride + reach - padding + stride - 1


@dataclass(frozen=True)
class Contraction:
    """`einsum(x, weight)`, one letter an axis, leading axes of x and of the result left out: `x @ W`, bmm, experts.

    Letters of the weight that the result has number the units, in the order of the result; those that x has as well
    (experts) say which part of x a unit reads. All others are summed over.

    Example:
        >>> stacked = Contraction("ebi", "eio", "ebo", (2, 4))        # 2 experts of 4 units each
        >>> x, weight = torch.randn(2, 5, 3), torch.randn(2, 3, 4)
        >>> rows = stacked(x, stacked.axes.take(weight, torch.tensor([6])), None, torch.tensor([6]))
        >>> torch.allclose(rows[:, 0], (x @ weight)[1, :, 2])
        True
    """

    x: str
    weight: str
    result: str
    sizes: tuple[int, ...]  # how many units there are along each letter that numbers them
    kind: str = "einsum"

    @property
    def letters(self) -> str:
        """The letters that number the units, slowest first."""
        return "".join(letter for letter in self.result if letter in self.weight)

    @property
    def unit_axes(self) -> tuple[int, ...]:
        """The axes of the units in the result, counted from the end."""
        return tuple(self.result.index(letter) - len(self.result) for letter in self.letters)

    @property
    def is_stacked(self) -> bool:
        """Whether rows are on the last axis, wherever the units are: several axes number them, or parts of x."""
        return len(self.letters) > 1 or self.letters in self.x

    @property
    def axes(self) -> UnitAxes:
        """Where the units are in the producer's own weight."""
        return UnitAxes(tuple(self.weight.index(letter) for letter in self.letters))

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, units: Tensor | None = None) -> Tensor:
        """Pre-activations of the given rows on one axis: that of the units, or the last where they are stacked."""
        assert units is not None
        row = "".join(letter for letter in self.weight if letter not in self.letters)
        shared = [letter for letter in self.letters if letter in self.x]
        inside = "".join(letter for letter in self.x if letter not in shared)
        rest = "".join(letter for letter in self.result if letter not in self.letters)
        out = f"{rest}R" if self.is_stacked else self.result.replace(self.letters, "R")
        if shared:
            x = self._parts(x, units, shared)
        z = torch.einsum(f"{'R' if shared else ''}...{inside},R{row}->...{out}", x, weight)
        return z if bias is None else z + along(bias, out.index("R") - len(out))

    def _parts(self, x: Tensor, units: Tensor, shared: Sequence[str]) -> Tensor:
        """The part of x that each row reads, (num_rows, ...)."""
        x = x[(None,) * (len(self.x) - x.dim())] if x.dim() < len(self.x) else x  # as matmul broadcasts
        places = dict(zip(self.letters, torch.unravel_index(units, self.sizes), strict=True))
        axes = [self.x.index(letter) - len(self.x) for letter in shared]
        for letter, axis in zip(shared, axes, strict=True):
            if x.shape[axis] == 1:
                places[letter] = torch.zeros_like(places[letter])
        return x.movedim(axes, tuple(range(len(axes))))[tuple(places[letter] for letter in shared)]

    def num_axes(self, least: int) -> int:
        """How many axes the result of an example has."""
        return max(least, len(self.result))

    def example(self, weight: Tensor, generator: torch.Generator, num_axes: int, sizes: Mapping[int, int]) -> Tensor:
        """A standard normal input to rows (num_units, *row_shape); `sizes` are those that its result must have."""
        row = [letter for letter in self.weight if letter not in self.letters]
        known = dict(zip(self.letters, self.sizes, strict=True)) | dict(zip(row, weight.shape[1:], strict=True))
        known = {letter: sizes.get(axis, 7) for axis, letter in enumerate(self.result, -len(self.result))} | known
        return _normal([known[letter] for letter in self.x], weight, generator)


Product = Linear | Convolution | Contraction


def _normal(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    assert math.prod(shape)
    return torch.randn(tuple(shape), generator=generator, dtype=like.dtype, device=like.device)
