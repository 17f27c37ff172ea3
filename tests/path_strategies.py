"""Networks whose pre-activations pass something on the way to the activation function: norms, dropout, shifts, masks.

A `Path` is a producer, steps drawn for the shape of what it gives, an activation function and a head. A step is a
module, or a function of `STEPS` with parameters of the path's own; new ones are a row in `modules` or in `STEPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.strategy_parts import FUNCTIONS, Draw, activations, per_unit

__all__ = ["PATH_STYLES", "Ground", "chain", "path", "straddled_path"]


@dataclass(frozen=True)
class Ground:
    """The shape of a pre-activation: (batch, units), (batch, length, units) or (batch, units, *space)."""

    batch: int
    num_units: int
    length: int = 0
    space: tuple[int, ...] = ()

    @property
    def axis(self) -> int:
        """Where the units are, counted from the end."""
        return -len(self.space) - 1

    @property
    def shape(self) -> tuple[int, ...]:
        """One sample's shape."""
        return (self.num_units, *self.space) if not self.length else (self.length, self.num_units)

    @property
    def is_on_one(self) -> bool:
        """Whether the units are on axis 1, where a batch norm or a slope per unit takes them to be."""
        return not self.length


@st.composite
def grounds(draw: Draw) -> Ground:
    batch, num_units = draw(st.integers(4, 6)), draw(st.sampled_from([1, 2, 3, 4, 6, 7, 12]))
    space = (5,) * draw(st.integers(0, 3)) if num_units < 7 else ()
    return Ground(batch, num_units, 0 if space else draw(st.sampled_from([0, 0, 2, 3])), space)


# -- modules ---------------------------------------------------------------------------------------------------------


class Affine(nn.Module):
    """A scale and a shift per unit, as hand-written norms have them."""

    def __init__(self, ground: Ground) -> None:
        super().__init__()
        shape = (ground.num_units, *[1] * len(ground.space))
        self.weight, self.bias = nn.Parameter(torch.rand(shape) + 0.5), nn.Parameter(torch.randn(shape) * 0.3)

    def forward(self, z: Tensor) -> Tensor:
        return z * self.weight + self.bias


def settled(module: nn.Module) -> nn.Module:
    """A norm with weights and statistics that are not those of a fresh one."""
    for name, parameter in module.named_parameters(recurse=False):
        torch.nn.init.normal_(parameter, float(name == "weight"), 0.3)
    for name, buffer in module.named_buffers(recurse=False):
        is_count = name.startswith("num")
        buffer.copy_(torch.tensor(3) if is_count else torch.rand_like(buffer) + 0.4 * (name == "running_var"))
    return module


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@st.composite
def batch_norms(draw: Draw, ground: Ground) -> nn.Module:
    settings = {"momentum": draw(st.sampled_from([0.1, 0.5, None])), "affine": draw(st.booleans())}
    tracks = draw(st.sampled_from([True, True, False]))
    return BATCH_NORMS[len(ground.space)](ground.num_units, **settings, track_running_stats=tracks)


@st.composite
def instance_norms(draw: Draw, ground: Ground) -> nn.Module:
    affine, tracks = draw(st.booleans()), draw(st.booleans())
    return INSTANCE_NORMS[len(ground.space) - 1](ground.num_units, affine=affine, track_running_stats=tracks)


@st.composite
def normalized_shapes(draw: Draw, ground: Ground) -> tuple[int, ...]:
    """All of a sample, or the units alone, at least two: one unit by itself is a constant, whatever its weights."""
    is_whole = ground.space or ground.num_units == 1 or draw(st.booleans())
    return ground.shape if is_whole else (ground.num_units,)


@st.composite
def layer_norms(draw: Draw, ground: Ground) -> nn.Module:
    shape = draw(normalized_shapes(ground))
    settings = draw(st.sampled_from([{}, {"elementwise_affine": False}, {"bias": False}, {"eps": 1e-3}]))
    return nn.LayerNorm(shape, **settings)


@st.composite
def root_norms(draw: Draw, ground: Ground) -> nn.Module:
    shape = draw(normalized_shapes(ground))
    return nn.RMSNorm(shape, eps=draw(st.sampled_from([None, 1e-3])), elementwise_affine=draw(st.booleans()))


@st.composite
def group_norms(draw: Draw, ground: Ground) -> nn.Module:
    most = ground.num_units if ground.space else ground.num_units // 2
    divisors = [d for d in range(1, most + 1) if ground.num_units % d == 0]
    return nn.GroupNorm(draw(st.sampled_from(divisors)), ground.num_units, affine=draw(st.booleans()))


def modules(ground: Ground) -> st.SearchStrategy[nn.Module]:
    """Modules that may stand between a producer and its activation function, with weights that say something."""
    kinds = [st.just(nn.Dropout(0.3)), st.builds(partial(Affine, ground))]
    if size_on(ground) > 1:
        kinds += [layer_norms(ground), root_norms(ground)]
    if ground.is_on_one:
        kinds += [batch_norms(ground), batch_norms(ground)]
    if ground.is_on_one and size_on(ground) > 1:
        kinds += [group_norms(ground)]
    if ground.space:
        kinds += [instance_norms(ground), st.just(DROPOUTS[len(ground.space) - 1](0.3))]
    return st.one_of(kinds).map(settled)


# -- functions -------------------------------------------------------------------------------------------------------

Step = Callable[[Any, int, Tensor, Tensor], Tensor]
STEPS: dict[str, Step] = {
    "module": lambda path, i, z, x: path.parts[i](z),
    "shift": lambda path, i, z, x: z + path.vectors[i],
    "shift in place": lambda path, i, z, x: z.add_(path.vectors[i]),
    "scale": lambda path, i, z, x: path.vectors[i] * z,
    "scale in place": lambda path, i, z, x: z.mul_(path.vectors[i]),
    "position": lambda path, i, z, x: z + path.positions[i],
    "numbers": lambda path, i, z, x: (z * 1.5 - 0.25) / 2,
    "float": lambda path, i, z, x: z.contiguous().clone(),
    "layer_norm": lambda path, i, z, x: F.layer_norm(z, path.shape, path.positions[i], eps=1e-3),
    "bare layer_norm": lambda path, i, z, x: F.layer_norm(z, path.shape),
    "rms_norm": lambda path, i, z, x: F.rms_norm(z, path.shape, path.positions[i]),
    "group_norm": lambda path, i, z, x: F.group_norm(z, 1, path.flat[i], path.flat[i]),
    "dropout": lambda path, i, z, x: F.dropout(z, 0.3, path.training),
    "dropout of channels": lambda path, i, z, x: (F.dropout1d, F.dropout2d, F.dropout3d)[path.dims - 1](
        z, 0.3, training=path.training
    ),
    "input": lambda path, i, z, x: x + z,
    "other": lambda path, i, z, x: z + path.others[i](x),
    "other first": lambda path, i, z, x: path.others[i](x) - z,
    "activation": lambda path, i, z, x: torch.tanh(path.others[i](x)) + z,
    "masked_fill": lambda path, i, z, x: z.masked_fill(x.sum(path.axis, keepdim=True) > 0, -0.5),
    "where": lambda path, i, z, x: torch.where(x.sum(path.axis, keepdim=True) > 0, z, path.vectors[i]),
    "exchanged": lambda path, i, z, x: path.parts[i](z.transpose(-1, -2)).transpose(-1, -2),
    "permuted": lambda path, i, z, x: path.parts[i](z.permute(0, 2, 1)).permute(0, 2, 1),
    "moved": lambda path, i, z, x: path.parts[i](z.movedim(1, -1)).movedim(-1, 1),
    "channels last": lambda path, i, z, x: path.parts[i](z.permute(path.order)).permute(path.back),
}
EVERYWHERE = (
    "module",
    "module",
    "shift",
    "shift in place",
    "scale",
    "scale in place",
    "position",
    "numbers",
    "float",
    "dropout",
    "other",
    "other first",
    "activation",
    "masked_fill",
    "where",
)
"""What may be drawn whatever the shape."""

WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda z: z * torch.sigmoid(z),
    "gelu": lambda z: 0.5 * z * (1 + torch.tanh(0.7978845608028654 * (z + 0.044715 * z**3))),
    "leaky": lambda z: torch.maximum(z, 0.1 * z),
    "mish": lambda z: z * F.softplus(z).tanh(),
    "square": lambda z: F.relu(z) ** 2,
    "softplus": lambda z: torch.log1p(torch.exp(z)),
}


@st.composite
def step_names(draw: Draw, ground: Ground, inner: int) -> list[str]:
    names = [*EVERYWHERE, *(["input"] if inner == ground.num_units else [])]
    if size_on(ground) > 1:
        names += ["layer_norm", "bare layer_norm", "rms_norm", *(["group_norm"] if ground.is_on_one else [])]
    if ground.length:
        names += ["exchanged", "permuted"]
    if ground.space:
        names += ["dropout of channels", *(["channels last"] * 2 if ground.num_units > 1 else [])]
    return list(draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)))


class Path(nn.Module):
    """A producer (or a path that ends before its activation function), steps, an activation function, a head."""

    def __init__(self, producer: nn.Module, ground: Ground, names: Sequence[str], parts: list[nn.Module]) -> None:
        super().__init__()
        self.producer, self.names, self.parts = producer, tuple(names), nn.ModuleList(parts)
        self.shape, self.axis, self.dims = ground.shape, ground.axis, len(ground.space)
        self.order, self.back = (0, *range(2, self.dims + 2), 1), (0, self.dims + 1, *range(1, self.dims + 1))
        vector = (ground.num_units, *[1] * self.dims)
        self.vectors = nn.ParameterList(torch.rand(*[1] * (i % 2), *vector) - 0.3 for i, _ in enumerate(names))
        self.positions = nn.ParameterList(torch.rand(self.shape) + 0.5 for _ in names)
        self.flat = nn.ParameterList(torch.rand(ground.num_units) + 0.5 for _ in names)
        self.others = nn.ModuleList(nn.Identity() for _ in names)
        self.activation: nn.Module | Callable[[Tensor], Tensor] | None = None
        self.slope = nn.Parameter(torch.rand(ground.num_units if ground.is_on_one else 1) * 0.3)
        self.head: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        z = self.producer(x)
        for index, name in enumerate(self.names):
            z = STEPS[name](self, index, z, x)
        if self.activation is None:
            return z  # type: ignore[no-any-return]
        h = F.prelu(z, self.slope) if self.activation is F.prelu else self.activation(z)
        return self.head(h.flatten(1))  # type: ignore[no-any-return]


def producer_on(ground: Ground, inner: int) -> nn.Module:
    """A linear layer, or a convolution that keeps the space as it is."""
    if not ground.space:
        return nn.Linear(inner, ground.num_units)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(ground.space) - 1]
    return kind(inner, ground.num_units, 3, padding=1)


@st.composite
def bare_paths(draw: Draw, ground: Ground, inner: int, producer: nn.Module) -> Path:
    """A path without its activation function, with the modules that its steps need."""
    names = draw(step_names(ground, inner))
    made = Path(producer, ground, names, [draw(part_for(name, ground)) for name in names])
    for index, name in enumerate(names):
        if name in ("other", "other first", "activation"):
            made.others[index] = producer_on(ground, inner)
    return made


def part_for(name: str, ground: Ground) -> st.SearchStrategy[nn.Module]:
    """The module that a step calls."""
    if name == "module":
        return modules(ground)
    if name in ("exchanged", "permuted"):
        return batch_norms(ground).map(settled)
    if name == "channels last":
        return layer_norms(Ground(ground.batch, ground.num_units)).map(settled)
    return st.just(nn.Identity())


@st.composite
def endings(draw: Draw, ground: Ground, jumping: bool) -> Any:
    """An activation function: a module, a function, written out, or with a slope of the path's own."""
    makes = activations(jumping).filter(lambda make: ground.is_on_one or not per_unit(make))
    modules = makes.map(lambda make: make(ground.num_units))
    return draw(st.one_of(modules, st.sampled_from((*FUNCTIONS, *WRITTEN.values(), F.prelu))))


# -- styles ----------------------------------------------------------------------------------------------------------

Drawn = tuple[nn.Module, list[tuple[int, ...]], list[str], dict[str, Any]]


def inputs_on(ground: Ground, inner: int) -> list[tuple[int, ...]]:
    """The shape of the input that gives such pre-activations."""
    return [(ground.batch, inner, *ground.space) if not ground.length else (ground.batch, ground.length, inner)]


def size_on(ground: Ground) -> int:
    """How many values a sample has."""
    return int(torch.Size(ground.shape).numel())


@st.composite
def path(draw: Draw, jumping: bool) -> Drawn:
    ground, inner = draw(grounds()), draw(st.integers(1, 5))
    made = draw(bare_paths(ground, inner, producer_on(ground, inner)))
    made.activation = draw(endings(ground, jumping))
    made.head = nn.Linear(size_on(ground), 3)
    hidden = ["producer", *(f"others.{i}" for i, name in enumerate(made.names) if name == "activation")]
    return made, inputs_on(ground, inner), hidden, {"norms": norms_of(made, "producer")}


@st.composite
def straddled_path(draw: Draw, jumping: bool) -> Drawn:
    """A child holds the producer and the first steps; its caller goes on, and applies the activation function."""
    ground, inner = draw(grounds()), draw(st.integers(1, 5))
    first = draw(bare_paths(ground, inner, producer_on(ground, inner)))
    made = draw(bare_paths(ground, inner, first))
    made.activation = draw(endings(ground, jumping))
    made.head = nn.Linear(size_on(ground), 3)
    name = "producer.producer"
    return made, inputs_on(ground, inner), [name], {"norms": norms_of(made, name)}


@st.composite
def chain(draw: Draw, jumping: bool) -> Drawn:
    """A Sequential: a producer, up to three modules and an activation function, twice, or once with a convolution."""
    ground, inner = draw(grounds()), draw(st.integers(1, 5))
    layers, hidden, norms = list[nn.Module](), [], dict[str, str]()
    for depth in range(2):
        hidden.append(str(len(layers)))
        layers.append(producer_on(ground, ground.num_units if depth else inner))
        for module in draw(st.lists(modules(ground), min_size=depth == 0, max_size=3)):
            norms[str(len(layers))] = hidden[-1]
            layers.append(module)
        makes = activations(jumping).filter(lambda make: ground.is_on_one or not per_unit(make))
        layers.append(draw(makes)(ground.num_units))
    model = nn.Sequential(*layers, nn.Flatten(1), nn.Linear(size_on(ground), 3))
    return model, inputs_on(ground, inner), hidden, {"norms": norms}


def norms_of(made: nn.Module, producer: str) -> dict[str, str]:
    """The modules that a path calls, in order, each with the producer whose units pass it."""
    inner = [name for name, _ in made.named_modules() if name.startswith("producer.parts.")]
    return dict.fromkeys((*inner, *(name for name, _ in made.named_modules() if name.startswith("parts."))), producer)


PATH_STYLES = (path, straddled_path, chain)
