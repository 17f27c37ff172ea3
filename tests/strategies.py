"""Hypothesis strategies for networks: every style in which people write a forward, with what is drawn inside it.

`networks()` draws a `Network`: a model, its inputs, and the producers that must be sites of it. A new style is one
class and one strategy in `STYLES`; a new activation one entry of `SMOOTH`, `KINKED` or `JUMPING`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.path_strategies import PATH_STYLES
from tests.product_strategies import PRODUCT_STYLES
from tests.strategy_parts import ACTIVATION_MODULES, FUNCTIONS, METHODS, Draw, activations, leading, per_unit, small

__all__ = ["ACTIVATION_MODULES", "DTYPES", "STYLES", "Network", "networks", "unit_sets"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Network:
    """A drawn model in the dtype and mode to use it in, with inputs and the names of its hidden producers.

    `rows` stacks the units' weights where they are not rows already; `norms` are modules on the way from producer to
    activation function, in order, each with its producer.
    """

    style: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    hidden: tuple[str, ...]
    dtype: torch.dtype
    rows: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    norms: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        shapes = [tuple(x.shape) for x in self.inputs]
        mode = "train" if self.model.training else "eval"
        return f"Network({self.style}, {self.dtype}, {mode}, inputs {shapes}, hidden {self.hidden}, {self.model})"

    @property
    def widths(self) -> dict[str, int]:
        """How many units each hidden producer has."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        return {name: len(self.rows_of(name, parameters)) for name in self.hidden}

    def rows_of(self, name: str, state: Mapping[str, Tensor]) -> Tensor:
        """The weights of each unit of a hidden producer, (num_units, ...), in a state dict or the parameters."""
        weight = state[f"{name}.weight" if f"{name}.weight" in state else name].detach()
        return self.rows[name](weight) if name in self.rows else weight


@st.composite
def networks(draw: Draw, dtypes: Sequence[torch.dtype] = DTYPES, styles: Sequence[str] | None = None) -> Network:
    """Networks of one to three hidden layers and a head, of any style, with random weights and inputs."""
    style = draw(st.sampled_from(sorted(STYLES) if styles is None else list(styles)))
    dtype = draw(st.sampled_from(dtypes))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    model, shapes, hidden, *more = draw(STYLES[style](jumping=dtype == torch.float64))
    memory = draw(st.sampled_from(sorted(MEMORY)))
    inputs = tuple(MEMORY[memory](torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes)
    model = model.to(dtype).train(draw(st.booleans()))
    if memory == "channels last" and all(p.dim() < 5 for p in model.parameters()):
        model = model.to(memory_format=torch.channels_last)
    return Network(style, model, inputs, tuple(hidden), dtype, **(more[0] if more else {}))


def transposed_in_memory(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else x


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "transposed": transposed_in_memory,
    "channels last": channels_last,
}


@st.composite
def unit_sets(draw: Draw, network: Network) -> dict[str, tuple[int, ...]]:
    """Random units of random hidden layers, at least one."""
    widths = network.widths
    names = draw(st.sets(st.sampled_from(sorted(widths)), min_size=1))
    return {name: tuple(draw(st.sets(st.integers(0, widths[name] - 1), min_size=1))) for name in sorted(names)}


# -- parts -----------------------------------------------------------------------------------------------------------


@st.composite
def after(draw: Draw, num_units: int, norm: Callable[[int], nn.Module] | None) -> list[nn.Module]:
    """What may stand behind an activation function."""
    parts: list[Callable[[], nn.Module]] = [nn.Identity, partial(nn.Dropout, 0.3)]
    if norm is not None:
        parts.append(lambda: norm(num_units))
    return [part() for part in draw(st.lists(st.sampled_from(parts), max_size=2))]


@st.composite
def widths(draw: Draw, most: int = 3) -> list[int]:
    """The widths of an input and of one to `most` hidden layers."""
    return [draw(small) for _ in range(draw(st.integers(2, most + 1)))]


# -- styles ----------------------------------------------------------------------------------------------------------


@st.composite
def sequential(draw: Draw, jumping: bool) -> tuple[nn.Module, list[tuple[int, ...]], list[str]]:
    sizes, layers, hidden = draw(widths()), list[nn.Module](), []
    makes = [draw(activations(jumping)) for _ in sizes[1:]]
    matrix = any(map(per_unit, makes)) or draw(st.booleans())
    for (inner, outer), make in zip(pairwise(sizes), makes, strict=True):
        hidden.append(str(len(layers)))
        layers += [nn.Linear(inner, outer, bias=draw(st.booleans())), make(outer)]
        layers += draw(after(outer, nn.BatchNorm1d if matrix else None))
    layers.append(nn.Linear(sizes[-1], draw(small)))
    return nn.Sequential(*layers), [draw(leading(sizes[0], matrix))], hidden


class Loop(nn.Module):
    """Layers in a ModuleList, one activation function for all but the last."""

    def __init__(self, sizes: list[int], activation: nn.Module | Callable[[Tensor], Tensor], bias: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o, bias) for i, o in pairwise(sizes))
        self.activation = activation
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index < len(self.layers) - 1:
                x = self.dropout(self.activation(x))
        return x


@st.composite
def loop(draw: Draw, jumping: bool) -> tuple[nn.Module, list[tuple[int, ...]], list[str]]:
    sizes = [*draw(widths()), draw(small)]
    makes = activations(jumping).filter(lambda make: not per_unit(make)).map(lambda make: make(0))
    activation = draw(st.one_of(makes, st.sampled_from(FUNCTIONS)))
    hidden = [f"layers.{index}" for index in range(len(sizes) - 2)]
    return Loop(sizes, activation, draw(st.booleans())), [draw(leading(sizes[0]))], hidden


class Functional(nn.Module):
    """F.linear on the module's own parameters, the activation functions from torch and torch.nn.functional."""

    def __init__(self, sizes: list[int], functions: list[Callable[[Tensor], Tensor]], bias: bool) -> None:
        super().__init__()
        self.functions = tuple(functions)
        self.weights = nn.ParameterList(torch.randn(o, i) / i**0.5 for i, o in pairwise(sizes))
        self.first = nn.Parameter(torch.randn(sizes[0], sizes[0]))
        self.offset = nn.Parameter(torch.randn(sizes[0]) * 0.1) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, self.first, self.offset))
        for weight, function in zip(list(self.weights)[:-1], self.functions, strict=True):
            x = function(F.linear(x, weight))
        return F.linear(x, self.weights[-1])


@st.composite
def functional(draw: Draw, jumping: bool) -> tuple[nn.Module, list[tuple[int, ...]], list[str]]:
    sizes = [*draw(widths(most=2)), draw(small)]
    functions = [draw(st.sampled_from(FUNCTIONS)) for _ in sizes[2:]]
    hidden = ["first", *(f"weights.{index}" for index in range(len(functions)))]
    return Functional(sizes, functions, draw(st.booleans())), [draw(leading(sizes[0]))], hidden


class Methods(nn.Module):
    """`x.relu()` style, with a method for each layer."""

    def __init__(self, sizes: list[int], methods: list[str]) -> None:
        super().__init__()
        self.methods = methods
        self.fc1, self.fc2, self.fc3 = (nn.Linear(i, o) for i, o in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        x = getattr(self.fc1(x), self.methods[0])()
        x = getattr(self.fc2(x).contiguous() * 2 - 0.5, self.methods[1])()
        return self.fc3(x)  # type: ignore[no-any-return]


@st.composite
def methods(draw: Draw, jumping: bool) -> tuple[nn.Module, list[tuple[int, ...]], list[str]]:
    sizes = [draw(small) for _ in range(4)]
    names = [draw(st.sampled_from(METHODS)) for _ in range(2)]
    return Methods(sizes, names), [draw(leading(sizes[0]))], ["fc1", "fc2"]


class Block(nn.Module):
    """A layer and its activation function, a module of its own."""

    def __init__(self, inner: int, outer: int, activation: nn.Module, how: str) -> None:
        super().__init__()
        self.linear, self.activation, self.how = nn.Linear(inner, outer), activation, how

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.activation(self.linear(x))
        if self.how == "concatenate":
            return torch.cat([x, h], dim=-1)
        return x + h if self.how == "residual" else h


@st.composite
def blocks(draw: Draw, jumping: bool) -> tuple[nn.Module, list[tuple[int, ...]], list[str]]:
    how = draw(st.sampled_from(["plain", "residual", "concatenate"]))
    first = size = draw(small)
    parts, depth = list[nn.Module](), draw(st.integers(1, 3))
    for _ in range(depth):
        outer = size if how == "residual" else draw(small)
        parts.append(Block(size, outer, draw(activations(jumping))(outer), how))
        size = size + outer if how == "concatenate" else outer
    model = nn.Sequential(nn.Sequential(*parts), nn.Linear(size, draw(small)))
    return model, [draw(leading(first, matrix=True))], [f"0.{index}.linear" for index in range(depth)]


class Heads(nn.Module):
    """A trunk and several heads: a dictionary of outputs, one of them dueling."""

    def __init__(self, inner: int, width: int, activation: Callable[[int], nn.Module], num_heads: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(inner, width), activation(width))
        self.heads = nn.ModuleDict({f"head{i}": self.head(width, i + 1, activation) for i in range(num_heads)})
        self.value, self.advantage = nn.Linear(width, 1), nn.Linear(width, 3)

    @staticmethod
    def head(width: int, outer: int, activation: Callable[[int], nn.Module]) -> nn.Module:
        return nn.Sequential(nn.Linear(width, width), activation(width), nn.Linear(width, outer))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.trunk(x)
        advantage = self.advantage(h)
        q = self.value(h) + advantage - advantage.mean(-1, keepdim=True)
        return {"q": q, **{name: head(h) for name, head in self.heads.items()}}


@st.composite
def heads(draw: Draw, jumping: bool) -> tuple[nn.Module, list[tuple[int, ...]], list[str]]:
    inner, width, count = draw(small), draw(small), draw(st.integers(0, 2))
    model = Heads(inner, width, draw(activations(jumping)), count)
    return model, [draw(leading(inner, matrix=True))], ["trunk.0", *(f"heads.head{i}.0" for i in range(count))]


class Reused(nn.Module):
    """A layer called several times, a weight that two modules share, and a Sequential within it all."""

    def __init__(self, width: int, times: int, activation: nn.Module) -> None:
        super().__init__()
        self.times = times
        self.layer = nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Linear(width, width), activation)
        self.twin = nn.Sequential(nn.Linear(width, width), activation, nn.Linear(width, 2))
        self.twin[0].weight, self.twin[0].bias = self.inner[0].weight, self.inner[0].bias

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.layer(x))
        return self.twin(self.inner(x))  # type: ignore[no-any-return]


@st.composite
def reused(draw: Draw, jumping: bool) -> tuple[nn.Module, list[tuple[int, ...]], list[str]]:
    width = draw(small)
    model = Reused(width, draw(st.integers(1, 2)), draw(activations(jumping))(width))
    return model, [draw(leading(width, matrix=True))], ["layer", "inner.0"]


class Recurrent(nn.Module):
    """A hidden layer in front of a GRU cell, as in PyMARL's agents."""

    def __init__(self, inner: int, width: int, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.rnn, self.fc2 = nn.Linear(inner, width), nn.GRUCell(width, width), nn.Linear(width, 2)
        self.function = function

    def forward(self, obs: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        h = self.rnn(self.function(self.fc1(obs)), hidden.reshape(-1, self.rnn.hidden_size))
        return self.fc2(h), h


@st.composite
def recurrent(draw: Draw, jumping: bool) -> tuple[nn.Module, list[tuple[int, ...]], list[str]]:
    inner, width, batch = draw(small), draw(small), draw(st.integers(1, 4))
    model = Recurrent(inner, width, draw(st.sampled_from(FUNCTIONS)))
    return model, [(batch, inner), (batch, width)], ["fc1"]


class Mixer(nn.Module):
    """Hypernetworks whose outputs are reshaped into weights and made positive, as in QMIX."""

    def __init__(self, num_agents: int, state: int, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.num_agents = num_agents
        self.weights = nn.Sequential(nn.Linear(state, width), activation, nn.Linear(width, num_agents * 2))
        self.bias = nn.Linear(state, 2)
        self.value = nn.Sequential(nn.Linear(state, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, agent_qs: Tensor, state: Tensor) -> Tensor:
        weights = self.weights(state).abs().view(-1, self.num_agents, 2)
        hidden = F.elu(torch.bmm(agent_qs.unsqueeze(1), weights) + self.bias(state).view(-1, 1, 2))
        return hidden.sum(-1) + self.value(state)  # type: ignore[no-any-return]


@st.composite
def mixer(draw: Draw, jumping: bool) -> tuple[nn.Module, list[tuple[int, ...]], list[str]]:
    agents, state, width, batch = draw(small), draw(small), draw(small), draw(st.integers(1, 4))
    model = Mixer(agents, state, width, draw(activations(jumping))(width))
    return model, [(batch, agents), (batch, state)], ["weights.0", "value.0"]


class Straddled(nn.Module):
    """A child that returns its pre-activation, to which the caller applies the activation function."""

    def __init__(self, sizes: list[int], function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        first, second, third, fourth = sizes
        self.body = nn.Sequential(nn.Linear(first, second), nn.ReLU(), nn.Linear(second, third))
        self.function = function
        self.head = nn.Linear(third, fourth)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.body(x)))  # type: ignore[no-any-return]


@st.composite
def straddled(draw: Draw, jumping: bool) -> tuple[nn.Module, list[tuple[int, ...]], list[str]]:
    sizes = [draw(small) for _ in range(4)]
    model = Straddled(sizes, draw(st.sampled_from(FUNCTIONS)))
    return model, [draw(leading(sizes[0]))], ["body.0", "body.2"]


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


@st.composite
def convolution(draw: Draw, axes: int, inner: int, outer: int) -> nn.Module:
    """A convolution whose kernel spans at most three."""
    kernel, dilation = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (2, 2)]))
    padding = draw(st.sampled_from([0, 1] if kernel == 2 else [0, 1, "same"]))
    return CONVOLUTIONS[axes - 1](
        inner,
        outer,
        (kernel, *[draw(st.sampled_from([1, kernel]))] * (axes - 1)),
        stride=1 if padding == "same" else draw(st.integers(1, 2)),
        padding=padding,
        dilation=dilation,
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        bias=draw(st.booleans()),
    )


@st.composite
def convolutional(draw: Draw, jumping: bool) -> tuple[nn.Module, list[tuple[int, ...]], list[str]]:
    axes, channels = draw(st.integers(1, 3)), [draw(st.integers(1, 4)) for _ in range(3)]
    makes = [draw(activations(jumping)) for _ in range(2)]
    parts = [draw(convolution(axes, channels[0], channels[1])), makes[0](channels[1])]
    parts += draw(after(channels[1], NORMS[axes - 1]))
    parts += [POOLS[axes - 1](2, stride=1)] if draw(st.booleans()) else []
    hidden = ["0", str(len(parts))]
    parts += [draw(convolution(axes, channels[1], channels[2])), makes[1](channels[2])]
    batch = draw(st.integers(2, 3))
    shape = (batch, channels[0], *[9] * axes)
    with torch.no_grad():
        size = nn.Sequential(*parts)(torch.zeros(shape)).flatten(1).shape[1]
    hidden.append(str(len(parts) + 1))
    parts += [nn.Flatten(), nn.Linear(size, 4), nn.ReLU(), nn.Linear(4, 2)]
    return nn.Sequential(*parts), [shape], hidden


class Filters(nn.Module):
    """F.conv on the module's own parameter, then a global mean; batched or not."""

    def __init__(self, axes: int, inner: int, outer: int, function: Callable[[Tensor], Tensor], settings: Any) -> None:
        super().__init__()
        self.axes, self.function, self.settings = axes, function, settings
        self.kernel = nn.Parameter(torch.randn(outer, inner, *[2] * axes) / (inner * 2**axes) ** 0.5)
        self.shift = nn.Parameter(torch.randn(outer)) if settings["stride"] == 1 else None
        self.head = nn.Linear(outer, 2)

    def forward(self, x: Tensor) -> Tensor:
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.axes - 1]
        h = self.function(conv(x, self.kernel, self.shift, **self.settings))
        return self.head(h.flatten(-self.axes).mean(-1))  # type: ignore[no-any-return]


@st.composite
def filters(draw: Draw, jumping: bool) -> tuple[nn.Module, list[tuple[int, ...]], list[str]]:
    axes, inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(small)
    settings = {
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.sampled_from([0, 1])),
        "dilation": draw(st.sampled_from([1, (2,) * axes])),
    }
    batch = draw(st.sampled_from([(3,), ()]))
    return (
        Filters(axes, inner, outer, draw(st.sampled_from(FUNCTIONS)), settings),
        [(*batch, inner, *[5] * axes)],
        ["kernel"],
    )


STYLES = {
    style.__name__: style
    for style in (
        sequential,
        loop,
        functional,
        methods,
        blocks,
        heads,
        reused,
        recurrent,
        mixer,
        straddled,
        convolutional,
        filters,
        *PATH_STYLES,
        *PRODUCT_STYLES,
    )
}
