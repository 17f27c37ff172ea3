"""Networks whose producers are other than `nn.Linear`: columns, experts, einsum, kinds of convolutions.

A `Case` is one way to multiply an input with weights, by hand: where a unit's weights are in them is written here in
words of its own, as a function that stacks the units' rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import einops
import torch
import torch.nn.functional as F
from einops.layers.torch import EinMix
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.strategy_parts import FUNCTIONS, Draw, activations, per_unit

__all__ = ["PRODUCT_STYLES", "grouped", "products", "transposed"]

Rows = Callable[[Tensor], Tensor]
Drawn = tuple[nn.Module, list[tuple[int, ...]], list[str], dict[str, Any]]

# -- functions of a parameter ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Batch, length, input features, units (of each expert), experts."""

    b: int
    t: int
    i: int
    o: int
    e: int


def as_rows(weight: Tensor) -> Tensor:
    return weight


def as_columns(weight: Tensor) -> Tensor:
    return weight.t()


def of_experts(weight: Tensor) -> Tensor:
    """(experts, in, out) -> (experts * out, in)."""
    return weight.transpose(1, 2).flatten(0, 1)


def of_backward_experts(weight: Tensor) -> Tensor:
    """(experts, in, out) -> (out * experts, in)."""
    return weight.permute(2, 0, 1).flatten(0, 1)


@dataclass(frozen=True)
class Case:
    """A product: axes of input, weight and bias by letter, the call, the units' rows, and if units come out last."""

    x: str
    weight: str
    bias: str
    call: Callable[[Tensor, Tensor, Tensor], Tensor]
    rows: Rows
    is_last: bool = True


CASES: dict[str, Case] = {
    "x @ W": Case("bi", "io", "", lambda x, w, b: x @ w, as_columns),
    "x @ W + b": Case("bti", "io", "o", lambda x, w, b: x @ w + b, as_columns),
    "b + matmul": Case("bti", "io", "1o", lambda x, w, b: b + torch.matmul(x, w), as_columns),
    "mm": Case("bi", "io", "", lambda x, w, b: torch.mm(x, w), as_columns),
    "x.mm": Case("bi", "io", "o", lambda x, w, b: x.mm(w) - b, as_columns),
    "addmm": Case("bi", "io", "o", lambda x, w, b: torch.addmm(b, x, w), as_columns),
    "addmm of a row": Case("bi", "io", "1o", lambda x, w, b: torch.addmm(b, mat1=x, mat2=w), as_columns),
    "W on the left": Case("ib", "oi", "o1", lambda x, w, b: w.mm(x) + b, as_rows, is_last=False),
    "bmm": Case("ebi", "eio", "", lambda x, w, b: torch.bmm(x, w), of_experts),
    "bmm + b": Case("ebi", "eio", "e1o", lambda x, w, b: x.bmm(w) + b, of_experts),
    "bmm, then scaled": Case("ebi", "eio", "11o", lambda x, w, b: torch.bmm(x, w) * b, of_experts),
    "baddbmm": Case("ebi", "eio", "e1o", lambda x, w, b: torch.baddbmm(b, x, w), of_experts),
    "experts of x": Case("bi", "eio", "e1o", lambda x, w, b: x @ w + b, of_experts),
    "experts of their own x": Case("ebi", "eio", "", lambda x, w, b: torch.matmul(x, w), of_experts),
    "experts in a batch": Case("bti", "eio", "", lambda x, w, b: x.unsqueeze(1) @ w, of_experts),
    "bi,io": Case("bi", "io", "", lambda x, w, b: torch.einsum("bi,io->bo", x, w), as_columns),
    "bi,oi": Case("bi", "oi", "o", lambda x, w, b: torch.einsum("bi,oi->bo", x, w) + b, as_rows),
    "io,bti": Case("bti", "io", "", lambda x, w, b: torch.einsum("io, bti -> bto", w, x), as_columns),
    "...i,io": Case("bti", "io", "o", lambda x, w, b: torch.einsum("...i,io->...o", x, w) + b, as_columns),
    "bi,oi->ob": Case("bi", "oi", "o1", lambda x, w, b: torch.einsum("bi,oi->ob", x, w) + b, as_rows, is_last=False),
    "bi,eio->ebo": Case("bi", "eio", "e1o", lambda x, w, b: torch.einsum("bi,eio->ebo", x, w) + b, of_experts),
    "bi,eio->beo": Case("bi", "eio", "eo", lambda x, w, b: torch.einsum("bi,eio->beo", x, w) + b, of_experts),
    "ebi,eio->ebo": Case("ebi", "eio", "", lambda x, w, b: torch.einsum("ebi,eio->ebo", x, w), of_experts),
    "bei,eio->beo": Case("bei", "eio", "eo", lambda x, w, b: torch.einsum("bei,eio->beo", x, w) + b, of_experts),
    "bei,eio->bo": Case(
        "bei", "eio", "", lambda x, w, b: torch.einsum("bei,eio->bo", x, w), lambda w: w.permute(2, 0, 1)
    ),
    "bi,eio->boe": Case("bi", "eio", "oe", lambda x, w, b: torch.einsum("bi,eio->boe", x, w) + b, of_backward_experts),
    "einops": Case("bi", "io", "o", lambda x, w, b: einops.einsum(x, w, "b i, i o -> b o") + b, as_columns),
    "einops experts": Case(
        "bei", "eio", "", lambda x, w, b: einops.einsum(x, w, "batch e inner, e inner out -> batch e out"), of_experts
    ),
}


class Multiplied(nn.Module):
    """One product with parameters of the module's own, an activation function, and a head on the last axis."""

    def __init__(self, case: Case, sizes: Sizes, activation: Any) -> None:
        super().__init__()
        shape = shape_of(case.weight, sizes)
        self.call, self.is_last, self.activation = case.call, case.is_last, activation
        self.weight = nn.Parameter(torch.randn(shape) / sizes.i**0.5)
        self.bias = nn.Parameter(torch.randn(shape_of(case.bias, sizes)) * 0.5)
        self.head = nn.Linear(sizes.e if case is CASES["bi,eio->boe"] else sizes.o, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.call(x, self.weight, self.bias))
        return self.head(h if self.is_last else h.t())  # type: ignore[no-any-return]


def shape_of(letters: str, sizes: Sizes) -> tuple[int, ...]:
    return tuple(1 if letter == "1" else getattr(sizes, letter) for letter in letters)


@st.composite
def products(draw: Draw, jumping: bool) -> Drawn:
    """A function of a parameter."""
    sizes = Sizes(*(draw(st.integers(1, 5)) for _ in range(5)))
    case = CASES[draw(st.sampled_from(sorted(CASES)))]
    modules = activations(jumping).filter(lambda make: not per_unit(make)).map(lambda make: make(0))
    model = Multiplied(case, sizes, draw(st.one_of(modules, st.sampled_from(FUNCTIONS))))
    return model, [shape_of(case.x, sizes)], ["weight"], {"rows": {"weight": case.rows}}


@st.composite
def foreign(draw: Draw, jumping: bool) -> Drawn:
    """Layers of other packages: transformers' Conv1D, einops' EinMix, in a Sequential."""
    sizes = Sizes(*(draw(st.integers(1, 5)) for _ in range(5)))
    b, t, i, o, e = sizes.b, sizes.t, sizes.i, sizes.o, sizes.e
    layer, shape, rows = draw(
        st.sampled_from(
            [
                (Conv1D(o, i), (b, i), as_columns),
                (EinMix("b i -> b o", "i o", "o", i=i, o=o), (b, i), as_columns),
                (EinMix("b t i -> b t o", "i o", i=i, o=o), (b, t, i), as_columns),
                (EinMix("b i -> b e o", "e i o", "e o", i=i, o=o, e=e), (b, i), of_experts),
                (EinMix("b e i -> b e o", "e i o", "e o", i=i, o=o, e=e), (b, e, i), of_experts),
            ]
        )
    )
    parts = [layer] if isinstance(layer, Conv1D) else [layer, nn.Identity()]
    makes = activations(jumping).filter(lambda make: not per_unit(make))
    model = nn.Sequential(*parts, draw(makes)(o), nn.Linear(o, 3))
    return model, [shape], ["0"], {"rows": {"0": rows}}


# -- convolutions ------------------------------------------------------------------------------------------------------

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@st.composite
def grouped(draw: Draw, jumping: bool) -> Drawn:
    """Grouped and depthwise convolutions, modules or functions on the module's own kernel."""
    axes, groups, width = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inner = groups * draw(st.integers(1, 2))
    padding = draw(st.sampled_from([0, 1, "same", "valid"]))
    settings = {
        "stride": 1 if padding == "same" else draw(st.integers(1, 2)),
        "padding": padding,
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
    }
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    kernel = 3 if padding == "same" else 2  # torch warns that an even one is padded on one side
    layer = CONVOLUTIONS[axes - 1](
        inner, groups * width, kernel, **settings, padding_mode=mode, bias=draw(st.booleans())
    )
    if mode == "zeros" and draw(st.booleans()):
        return convolved(draw, Filtering(layer, settings), (inner, *[5] * axes), "weight", as_rows, jumping)
    return convolved(draw, layer, (inner, *[5] * axes), "", as_rows, jumping)


@st.composite
def transposed(draw: Draw, jumping: bool) -> Drawn:
    """Transposed convolutions with groups and output padding, modules or functions."""
    axes, groups, width = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inner, stride = groups * draw(st.integers(1, 2)), draw(st.integers(1, 2))
    settings = {
        "stride": stride,
        "padding": draw(st.integers(0, 1)),
        "output_padding": draw(st.integers(0, stride - 1)),
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
    }
    layer = TRANSPOSES[axes - 1](inner, groups * width, 2, **settings, bias=draw(st.booleans()))

    def rows(weight: Tensor) -> Tensor:
        return weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)

    if draw(st.booleans()):
        return convolved(draw, Filtering(layer, settings), (inner, *[4] * axes), "weight", rows, jumping)
    return convolved(draw, layer, (inner, *[4] * axes), "", rows, jumping)


class Filtering(nn.Module):
    """The function that a convolution ends in, on a kernel and a bias of the module's own."""

    def __init__(self, layer: Any, settings: dict[str, Any]) -> None:
        super().__init__()
        self.kind = ("conv_transpose" if layer.transposed else "conv") + f"{len(layer.kernel_size)}d"
        self.weight, self.bias, self.settings = layer.weight, layer.bias, settings
        self.activation: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(getattr(F, self.kind)(x, self.weight, self.bias, **self.settings))  # type: ignore[no-any-return]


def convolved(draw: Draw, layer: nn.Module, shape: tuple[int, ...], own: str, rows: Rows, jumping: bool) -> Drawn:
    """A convolution with an activation function and a linear layer on all that comes out, batched."""
    makes = activations(jumping).filter(lambda make: not per_unit(make))
    activation: Any = draw(makes)(0)
    parts = [layer, activation]
    if isinstance(layer, Filtering):
        layer.activation, parts = draw(st.one_of(st.just(activation), st.sampled_from(FUNCTIONS))), [layer]
    full = (draw(st.integers(1, 3)), *shape)
    with torch.no_grad():
        size = nn.Sequential(*parts)(torch.zeros(full)).flatten(1).shape[1]
    name = f"0.{own}" if own else "0"
    return nn.Sequential(*parts, nn.Flatten(1), nn.Linear(size, 3)), [full], [name], {"rows": {name: rows}}


PRODUCT_STYLES = (products, foreign, grouped, transposed)
