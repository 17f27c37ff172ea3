"""Traps: small models in which torch.fx bakes in what it saw, silently, each with calls that differ in what it traps.

What a trace can record, the operated model has to follow; what it cannot, declines the site `fc` with a reason.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["TRAPS", "Hidden", "Trap", "plain", "x"]


@dataclass(frozen=True, eq=False)
class Trap:
    """A model, calls that differ in the trapped quantity, and the reason why its site is declined, "" if it is not."""

    name: str
    build: Callable[[], Any]
    calls: list[Callable[[Any], Any]]
    reason: str = ""

    def __str__(self) -> str:
        return self.name


class Hidden(nn.Module):
    """One hidden layer; each trap adds its own forward."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 2)
        for name, value in attributes.items():
            setattr(self, name, value)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def x() -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, 20).view(5, 4)


def plain(model):
    return model(x())


def evaluating(model):
    return model.eval()(x())


def setting(name: str, value: Any) -> Callable[[Any], Any]:
    """A call after a plain attribute of the model, or of an object it holds, has changed."""

    def call(model):
        *path, last = name.split(".")
        setattr(functools.reduce(getattr, path, model), last, value)
        return model(x())

    return call


def without_gradients(model):
    with torch.no_grad():
        return model(x())


def negative(model):
    return model(-1 - x())


def keeping(name: str, factor: float) -> Callable[[Any], Any]:
    """A call, and what the model holds under a name afterwards."""

    def call(model):
        y, held = model(factor * x()), getattr(model, name)
        return y, list(held) if isinstance(held, collections.deque) else held

    return call


# -- recorded: the operated model must follow --------------------------------------------------------------------------


class FunctionalDropout(Hidden):
    def forward(self, x):
        return self.out(F.dropout(F.relu(self.fc(x)), 0.5, self.training))


class OptionalMask(Hidden):
    def forward(self, x, mask=None):
        h = F.relu(self.fc(x))
        if mask is not None:
            h = h * mask
        return self.out(h)


class TypeOfInput(Hidden):
    def forward(self, x):
        if isinstance(x, (tuple, list)):
            x = x[0] + 2 * x[1]
        if isinstance(x, dict):
            x = x["x"] * 3
        return self.out(F.relu(self.fc(x)))


class TypeOfTensor(Hidden):
    def forward(self, x):
        h = F.relu(self.fc(x))
        return self.out(h if isinstance(h, torch.Tensor) else h[0])


class Scale(Hidden):
    def __init__(self):
        super().__init__(scale=2.0)

    def forward(self, x):
        return self.out(F.relu(self.fc(x)) * self.scale)


class ScaleBeforeActivation(Scale):
    def forward(self, x):
        return self.out(F.relu(self.fc(x) * self.scale - 0.1))


class ClassScale(Hidden):
    scale = 2.0

    def forward(self, x):
        return self.out(F.relu(self.fc(x)) * self.scale)


class LateAttribute(Hidden):
    def forward(self, x):
        h = F.relu(self.fc(x))
        if hasattr(self, "late"):
            h = h * 3
        return self.out(h * getattr(self, "later", 1.0))


class TensorAttribute(Hidden):
    def __init__(self):
        super().__init__(factor=torch.tensor(2.0))

    def forward(self, x):
        return self.out(F.relu(self.fc(x)) * self.factor)


class FunctionAttribute(Hidden):
    def __init__(self):
        super().__init__(act=F.relu)

    def forward(self, x):
        return self.out(self.act(self.fc(x)))


class ActivationModule(Hidden):
    def __init__(self):
        super().__init__(act=nn.LeakyReLU(0.1))

    def forward(self, x):
        return self.out(self.act(self.fc(x)))


class Factories(Hidden):
    def forward(self, x):
        noise = torch.randn(6) + torch.empty(6).uniform_(0, 1) + torch.zeros(6).normal_()
        return self.out(F.relu(self.fc(x + torch.randn_like(x))) + noise)


class BufferInPlace(Hidden):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps.add_(1)
        return self.out(F.relu(self.fc(x))) * self.steps


class RunningMean(Hidden):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            self.mean[0] = x[0, 0]
        return self.out(F.relu(self.fc(x - self.mean)))


class InputChangedAfterProducer(Hidden):
    def forward(self, x):
        x = x * 1.0
        z = self.fc(x)
        x.add_(1.0)
        return self.out(F.relu(z)) + x.sum()


class InPlaceActivation(Hidden):
    def forward(self, x):
        h = F.relu(self.fc(x), inplace=True)
        h.add_(1.0)
        h[:, 1:].mul_(3.0)
        return self.out(h)


class KeywordOnly(Hidden):
    def forward(self, x, *, scale=1.0):
        return self.out(F.relu(self.fc(x)) * scale)


class Starred(Hidden):
    def forward(self, *xs, **more):
        y = self.out(F.relu(self.fc(sum(xs[1:], xs[0]))))
        for value in more.values():
            y = y + value
        return y


class Property(Hidden):
    @property
    def width(self):
        return self.fc.out_features

    def forward(self, x):
        return self.out(F.relu(self.fc(x)).reshape(-1, self.width))


@dataclasses.dataclass
class Settings:
    act: str = "relu"
    sizes: tuple[int, ...] = (6, 2)
    nested: dict[str, Any] = dataclasses.field(default_factory=lambda: {"factors": [1.0, 2.0]})


class Configured(Hidden):
    def __init__(self):
        super().__init__(settings=Settings())

    def forward(self, x):
        h = F.relu(self.fc(x)) if self.settings.act == "relu" else F.gelu(self.fc(x))
        if getattr(self.settings, "doubled", False):
            h = 2 * h
        return self.out(h * self.settings.nested["factors"][1]).view(-1, self.settings.sizes[1])


class PlainListOfModules(Hidden):
    def __init__(self):
        super().__init__()
        self.fc2 = nn.Linear(4, 6)
        self.layers = [self.fc, self.fc2]

    def forward(self, x):
        h = torch.zeros(1)
        for weight, layer in enumerate(self.layers, 1):
            h = h + weight * F.relu(layer(x))
        return self.out(h)


class Inherited(Scale):
    def forward(self, x):
        return super().forward(x) * 2


class HelperAndClosure(Hidden):
    def encode(self, x, factor=1.0):
        return F.relu(self.fc(x)) * factor

    def forward(self, x):
        def twice(y):
            return self.encode(y, factor=2.0)

        return self.out(twice(x) + (lambda z: twice(z * 3))(x))


class ShapesAsValues(Hidden):
    def forward(self, x):
        batch = x.shape[0]
        return self.out(F.relu(self.fc(x)).view(batch, -1, 6)).reshape(x.size(0), -1) * batch + x.dim()


class Numbers(Hidden):
    def forward(self, x, eps, mode="sum"):
        h = F.relu(self.fc(x)) * eps
        return self.out(h) if mode == "sum" else self.out(-h)


class Repeated(Hidden):
    def forward(self, x, repeats=None):
        h = F.relu(self.fc(x))
        for _ in range(repeats or 1):
            h = h * 1.5
        return self.out(h)


Pair = collections.namedtuple("Pair", "a b")


class Structures(Hidden):
    def forward(self, x):
        if isinstance(x, Pair):
            x = x.a - x.b
        h = F.relu(self.fc(x))
        return {"y": self.out(h), "none": None, "pair": Pair(h, (h, [h]))}


class ParametersAsMetadata(Hidden):
    def forward(self, x):
        return self.out(F.relu(self.fc(x.to(self.fc.weight.device, next(self.parameters()).dtype))))


class InferenceBlockBeside(Hidden):
    def forward(self, x):
        h = F.relu(self.fc(x))
        return self.out(h) + self.out(h.detach())


class AsksLength(Hidden):
    def forward(self, x):
        return self.out(F.relu(self.fc(x))) * len(x)


class LoopsOverRows(Hidden):
    def forward(self, x):
        return torch.stack([self.out(F.relu(self.fc(row))) for row in x])


class Einops(Hidden):
    def forward(self, x):
        import einops

        h = einops.rearrange(F.relu(self.fc(x)), "b (a c) -> b c a", a=2)
        return self.out(einops.rearrange(h, "b c a -> b (c a)", b=x.shape[0]))


class InferenceMode(Hidden):
    def forward(self, x):
        with torch.inference_mode():
            h = F.relu(self.fc(x))
        return self.out(h.clone())


class LayerDrop(Hidden):
    def forward(self, x):
        h = F.relu(self.fc(x))
        return self.out(h if self.training and torch.rand(1).item() < 0.5 else h * 2)


# -- refused: declined with the reason ---------------------------------------------------------------------------------


class RandomlyDouble(Hidden):
    def forward(self, x):
        h = F.relu(self.fc(x))
        return self.out(h * 2 if random.random() < 0.5 else h)


class NumpyNoise(Hidden):
    def forward(self, x):
        return self.out(F.relu(self.fc(x)) * float(np.random.rand()))


class OwnGenerator(Hidden):
    def forward(self, x):
        return self.out(F.relu(self.fc(x)) * self.rng.random())


class TorchCoin(Hidden):
    def forward(self, x):
        h = F.relu(self.fc(x))
        return self.out(h * 2 if torch.rand(()) < 0.5 else h)


class AsksGradMode(Hidden):
    def forward(self, x):
        h = F.relu(self.fc(x))
        return self.out(h * 2 if torch.is_grad_enabled() else h)


class NoGradBlock(Hidden):
    def forward(self, x):
        with torch.no_grad():
            h = F.relu(self.fc(x))
        return self.out(h)


class NoGradDecorator(Hidden):
    @torch.no_grad()
    def forward(self, x):
        return self.out(F.relu(self.fc(x)))


class EnableGradBlock(Hidden):
    def forward(self, x):
        with torch.enable_grad():
            return self.out(F.relu(self.fc(x)))


class AutocastBlock(Hidden):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = F.relu(self.fc(x))
        return self.out(h.float())


class KeepsLast(Hidden):
    def forward(self, x):
        self.last = F.relu(self.fc(x))
        return self.out(self.last)


class KeepsLastQuietly(Hidden):
    def forward(self, x):
        h = F.relu(self.fc(x))
        try:  # noqa: SIM105
            self.last = h
        except Exception:
            pass
        return self.out(h)


class KeepsInDict(Hidden):
    def forward(self, x):
        self.__dict__["last"] = h = F.relu(self.fc(x))
        return self.out(h)


class Counts(Hidden):
    count = 0

    def forward(self, x):
        self.count += 1
        return self.out(F.relu(self.fc(x)))


class FillsCache(Hidden):
    def forward(self, x):
        h = F.relu(self.fc(x))
        self.cache.append(h)
        return self.out(h)


class FillsNestedCache(Hidden):
    def forward(self, x):
        h = F.relu(self.fc(x))
        self.cache["seen"].append(h)
        return self.out(h)


class AssignsData(Hidden):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean.data = self.mean.data * 0.9
        return self.out(F.relu(self.fc(x - self.mean)))


class ReassignsBuffer(Hidden):
    steps: torch.Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps = self.steps + 1
        return self.out(F.relu(self.fc(x)))


class Maybe(nn.Module):
    def forward(self, x):
        return x, x


class TypeOfResult(Hidden):
    def __init__(self):
        super().__init__(child=Maybe())

    def forward(self, x):
        y = self.child(x)
        return self.out(F.relu(self.fc(y[0] if isinstance(y, tuple) else y)))


class BranchesOnValue(Hidden):
    def forward(self, x):
        return self.out(F.relu(self.fc(x * 2 if x.sum() > 0 else x)))


class BranchesQuietly(Hidden):
    def forward(self, x):
        try:
            if x.sum() > 0:
                x = x * 2
        except Exception:
            x = x * 3
        return self.out(F.relu(self.fc(x)))


class BranchesOnShape(Hidden):
    def forward(self, x):
        return self.out(F.relu(self.fc(x * len(x[x > 0]))))


FACTOR = torch.full((6,), 2.0)


class GlobalTensor(Hidden):
    def forward(self, x):
        return self.out(F.relu(self.fc(x)) * FACTOR)


class UnregisteredModule(Hidden):
    def forward(self, x):
        return self.out(F.relu(self.fc(self.layers[0](x))))


class OpaqueCallable(Hidden):
    def forward(self, x):
        return self.out(self.act(self.fc(x)))


class FunctionalCall(Hidden):
    def forward(self, x):
        doubled = {"weight": self.out.weight * 2, "bias": self.out.bias}
        return torch.func.functional_call(self.out, doubled, (F.relu(self.fc(x)),))


class GradientInside(Hidden):
    def forward(self, x):
        return torch.func.grad(lambda row: self.out(F.relu(self.fc(row))).sum())(x)


class Output:
    def __init__(self, y: torch.Tensor) -> None:
        self.y = y


class OwnOutputClass(Hidden):
    def forward(self, x):
        return Output(self.out(F.relu(self.fc(x))))


class ReadsValue(Hidden):
    def forward(self, x):
        return self.out(F.relu(self.fc(x)) * float(x.abs().max().item()))


_MODELS: list[tuple[Any, ...]] = [
    (FunctionalDropout, [plain, evaluating]),
    (OptionalMask, [plain, lambda m: m(x(), torch.arange(6.0)), lambda m: m(x(), mask=torch.zeros(6))]),
    (TypeOfInput, [plain, lambda m: m((x(), x())), lambda m: m([x(), x()]), lambda m: m({"x": x()})]),
    (TypeOfTensor, [plain]),
    (Scale, [plain, setting("scale", 3.0), setting("scale", torch.tensor(4.0))]),
    (ScaleBeforeActivation, [plain, setting("scale", -3.0)]),
    (ClassScale, [plain, setting("scale", 3.0)]),
    (LateAttribute, [plain, setting("late", True), setting("later", 7.0)]),
    (TensorAttribute, [plain, setting("factor", torch.tensor(5.0)), setting("factor", 3.0)]),
    (FunctionAttribute, [plain, setting("act", F.gelu)]),
    (ActivationModule, [plain, setting("act.negative_slope", 0.9), setting("act", nn.Softplus())]),
    (Factories, [plain, plain]),
    (BufferInPlace, [plain, plain]),
    (RunningMean, [plain, plain, evaluating]),
    (InputChangedAfterProducer, [plain]),
    (InPlaceActivation, [plain]),
    (KeywordOnly, [plain, lambda m: m(x(), scale=2.0), lambda m: m(x=x(), scale=torch.tensor(3.0))]),
    (Starred, [plain, lambda m: m(x(), x(), x()), lambda m: m(x(), a=torch.ones(2), b=1.0)]),
    (Property, [plain, lambda m: m(x=x()), lambda m: m(x().view(1, 5, 4)), lambda m: m(x()[0])]),
    (
        Configured,
        [
            plain,
            setting("settings.act", "gelu"),
            setting("settings.doubled", True),
            lambda m: m.settings.nested["factors"].__setitem__(1, 9.0) or m(x()),
        ],
    ),
    (PlainListOfModules, [plain, lambda m: m.layers.reverse() or m(x())]),
    (Inherited, [plain, setting("scale", 3.0)]),
    (HelperAndClosure, [plain]),
    (ShapesAsValues, [plain, lambda m: m(x()[:2])]),
    (Numbers, [lambda m: m(x(), 0.5), lambda m: m(x(), 0.25), lambda m: m(x(), torch.tensor(2.0), "minus")]),
    (Repeated, [plain, lambda m: m(x(), 3), lambda m: m(x(), 2), lambda m: m(x(), repeats=3)]),
    (Structures, [plain, lambda m: m(Pair(x(), 2 * x()))]),
    (ParametersAsMetadata, [plain, lambda m: m.double()(x())]),
    (InferenceBlockBeside, [plain]),
    (AsksLength, [plain, lambda m: m(x()[:2])]),
    (LoopsOverRows, [plain, lambda m: m(x()[:2]), plain]),
    *([(Einops, [plain, lambda m: m(x()[:2])])] if importlib.util.find_spec("einops") else []),
    (RandomlyDouble, [*[plain] * 4], "draws random numbers from Python or numpy"),
    (NumpyNoise, [plain, plain], "draws random numbers from Python or numpy"),
    (lambda: OwnGenerator(rng=random.Random(0)), [plain, plain], "calls the method 'random' of 'rng', a Random"),
    (
        lambda: OwnGenerator(rng=np.random.default_rng(0)),
        [plain, plain],
        "calls the method 'random' of 'rng', a Generator",
    ),
    (TorchCoin, [*[plain] * 4], "control flow on tensor values"),
    (AsksGradMode, [plain, without_gradients], "asks torch.is_grad_enabled"),
    (NoGradBlock, [plain, without_gradients], "switches gradients on or off"),
    (NoGradDecorator, [plain, negative], "switches gradients on or off"),
    (EnableGradBlock, [plain, negative], "switches gradients on or off"),
    (AutocastBlock, [plain, lambda m: m(2 * x())], "opens an autocast block"),
    (KeepsLast, [keeping("last", 1), keeping("last", 2)], "writes the attribute 'last'"),
    (KeepsLastQuietly, [keeping("last", 1), keeping("last", 2)], "writes the attribute 'last'"),
    (KeepsInDict, [keeping("last", 1), keeping("last", 2)], "writes the attribute 'last'"),
    (Counts, [keeping("count", 1), keeping("count", 1)], "writes the attribute 'count'"),
    (lambda: FillsCache(cache=[]), [keeping("cache", 1), keeping("cache", 2)], "writes into 'cache'"),
    (
        lambda: FillsCache(cache=collections.deque(maxlen=2)),
        [keeping("cache", 1), keeping("cache", 2)],
        "calls the method 'append' of 'cache', a deque",
    ),
    (lambda: FillsNestedCache(cache={"seen": []}), [keeping("cache", 1), keeping("cache", 2)], "writes into 'cache'"),
    (
        lambda: FillsNestedCache(cache=collections.defaultdict(list)),
        [keeping("cache", 1), keeping("cache", 2)],
        "writes into 'cache'",
    ),
    (AssignsData, [keeping("mean", 1), keeping("mean", 2)], "assigns the 'data' of a tensor"),
    (ReassignsBuffer, [keeping("steps", 1), keeping("steps", 1)], "writes the attribute 'steps'"),
    (TypeOfResult, [plain, lambda m: m(2 * x())], "asks for the type of a value that is known only when it runs"),
    (BranchesOnValue, [plain, negative], "control flow on tensor values"),
    (BranchesQuietly, [plain, negative], "control flow on tensor values"),
    (BranchesOnShape, [plain, lambda m: m(x().view(1, 5, 4))], "control flow on tensor values or shapes"),
    (GlobalTensor, [plain, lambda m: m(2 * x())], "neither an argument nor an attribute of the module"),
    (
        lambda: UnregisteredModule(layers=[nn.Linear(4, 4)]),
        [plain, lambda m: m(2 * x())],
        "a module that is not registered as a child",
    ),
    (
        lambda: OpaqueCallable(act=functools.partial(F.leaky_relu, negative_slope=0.3)),
        [plain, lambda m: m(2 * x())],
        "calls 'act', a partial",
    ),
    (FunctionalCall, [plain, lambda m: m(2 * x())], "writes the attribute 'weight' of a Linear"),
    (GradientInside, [plain, lambda m: m(2 * x())], "switches gradients on or off"),
    (OwnOutputClass, [plain, lambda m: m(2 * x())], "passes or returns a Output"),
    (ReadsValue, [plain, lambda m: m(2 * x())], "reads the values of a tensor"),
    (InferenceMode, [lambda m: m(x()).detach(), lambda m: m(2 * x()).detach()], "opens an inference_mode block"),
    (LayerDrop, [*[plain] * 4], "reads the values of a tensor"),
]
TRAPS = [
    Trap(f"{build.__name__}-{index}" if isinstance(build, type) else f"{reason}-{index}", build, calls, reason)
    for index, (build, calls, reason) in enumerate((*row, "")[:3] for row in _MODELS)
]
