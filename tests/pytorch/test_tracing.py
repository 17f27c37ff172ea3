"""What torch.fx would bake in silently is recorded or refused: every trap, over calls that differ in what it traps."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neuronsurgery import surgery
from neuronsurgery.pytorch.calls import Call, default_call
from neuronsurgery.pytorch.tracing import trace
from tests.assertions import state_of

OPERATED = surgery.Units({"fc": [0, 1, 2]})


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


RECORDED = [
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
]


@pytest.mark.parametrize(("cls", "calls"), RECORDED, ids=[cls.__name__ for cls, _ in RECORDED])
def test_an_operated_model_follows_what_a_trace_would_bake_in(cls, calls):
    model = cls()
    operated = copy.deepcopy(model)
    surgery.knife(operated, OPERATED)
    seen = []
    for seed, call in enumerate(calls):
        results = []
        for each in (model, operated):
            torch.manual_seed(seed)
            results.append(call(each))
        assert_alike(*results)
        assert_alike(*(list(state_of(each).values()) for each in (model.out, operated.out)))
        assert_alike(dict(model.named_buffers()), {k: v for k, v in operated.named_buffers() if "composite" not in k})
        seen.append(results[0])
    if len(seen) > 1 and cls is not Property:
        assert not all(alike(seen[0], other) for other in seen[1:]), "the calls do not differ: the trap is not set"


def assert_alike(old: Any, new: Any) -> None:
    """The same structure, shapes and dtypes, values equal to rounding, and gradients for the same tensors."""
    assert alike(old, new), (old, new)


def alike(old: Any, new: Any) -> bool:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        same = (old.shape, old.dtype, old.requires_grad) == (new.shape, new.dtype, new.requires_grad)
        return same and torch.allclose(old, new, rtol=1e-5, atol=1e-5)
    if type(old) is not type(new):
        return False
    if isinstance(old, dict):
        return list(old) == list(new) and all(alike(old[key], new[key]) for key in old)
    if isinstance(old, (tuple, list)):
        return len(old) == len(new) and all(map(alike, old, new))
    return bool(old == new)


def test_assert_alike_fails_on_another_value_structure_or_gradient():
    assert_alike({"a": (x(), None)}, {"a": (x(), None)})
    for other in (
        {"a": [x(), None]},
        {"a": (x() + 1e-3, None)},
        {"b": (x(), None)},
        {"a": (x().requires_grad_(), None)},
    ):
        with pytest.raises(AssertionError):
            assert_alike({"a": (x(), None)}, other)


def test_a_class_attribute_changed_after_surgery_takes_effect(monkeypatch):
    model = ClassScale()
    operated = copy.deepcopy(model)
    surgery.knife(operated, OPERATED)
    plain(operated)
    monkeypatch.setattr(ClassScale, "scale", 11.0)
    assert_alike(plain(model), plain(operated))


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


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (RandomlyDouble, "draws random numbers from Python or numpy"),
    (NumpyNoise, "draws random numbers from Python or numpy"),
    (lambda: OwnGenerator(rng=random.Random(0)), "calls the method 'random' of 'rng', a Random"),
    (lambda: OwnGenerator(rng=np.random.default_rng(0)), "calls the method 'random' of 'rng', a Generator"),
    (TorchCoin, "control flow on tensor values"),
    (AsksGradMode, "asks torch.is_grad_enabled"),
    (NoGradBlock, "switches gradients on or off"),
    (NoGradDecorator, "switches gradients on or off"),
    (EnableGradBlock, "switches gradients on or off"),
    (AutocastBlock, "opens an autocast block"),
    (KeepsLast, "writes the attribute 'last'"),
    (KeepsLastQuietly, "writes the attribute 'last'"),
    (KeepsInDict, "writes the attribute 'last'"),
    (Counts, "writes the attribute 'count'"),
    (lambda: FillsCache(cache=[]), "writes into 'cache'"),
    (lambda: FillsCache(cache=collections.deque(maxlen=2)), "calls the method 'append' of 'cache', a deque"),
    (lambda: FillsNestedCache(cache={"seen": []}), "writes into 'cache'"),
    (lambda: FillsNestedCache(cache=collections.defaultdict(list)), "writes into 'cache'"),
    (AssignsData, "assigns the 'data' of a tensor"),
    (ReassignsBuffer, "writes the attribute 'steps'"),
    (TypeOfResult, "asks for the type of a value that is known only when it runs"),
    (BranchesOnValue, "control flow on tensor values"),
    (BranchesQuietly, "control flow on tensor values"),
    (BranchesOnShape, "control flow on tensor values or shapes"),
    (GlobalTensor, "neither an argument nor an attribute of the module"),
    (lambda: UnregisteredModule(layers=[nn.Linear(4, 4)]), "a module that is not registered as a child"),
    (lambda: OpaqueCallable(act=functools.partial(F.leaky_relu, negative_slope=0.3)), "calls 'act', a partial"),
    (FunctionalCall, "writes the attribute 'weight' of a Linear"),
    (GradientInside, "switches gradients on or off"),
    (OwnOutputClass, "passes or returns a Output"),
    (ReadsValue, "reads the values of a tensor"),
]


@pytest.mark.parametrize(("build", "words"), REFUSED, ids=[f"{i}-{words[:30]}" for i, (_, words) in enumerate(REFUSED)])
def test_an_impurity_declines_the_site_and_leaves_model_and_random_states_alone(build, words):
    model = build()
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    contents = copy.deepcopy(getattr(model, "cache", None))
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    reason = surgery.discover(model).declined["fc"]
    assert words in reason and type(model).__name__ in reason
    assert contents == getattr(model, "cache", None)
    for path, module in model.named_modules():
        assert {k: id(v) for k, v in before[path].items()} == {k: id(v) for k, v in module.__dict__.items()}
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))


def test_a_reason_names_the_file_and_the_line():
    reason = surgery.discover(BranchesOnValue()).declined["fc"]
    line = BranchesOnValue.forward.__code__.co_firstlineno + 1
    assert reason.endswith(f"test_tracing.py:{line})")


class Logs(Hidden):
    """Writes into a list or dictionary that the caller passes."""

    def forward(self, x, log=None):
        h = F.relu(self.fc(x))
        if isinstance(log, list):
            log.append(h)
        if isinstance(log, dict):
            log["h"] = h
        return self.out(h)


@pytest.mark.parametrize("log", [[], [1], {}, {"h": 0.0}], ids=str)
def test_a_call_that_fills_a_container_of_the_caller_is_refused(log):
    model = Logs()
    surgery.knife(model, OPERATED)
    plain(model)
    with pytest.raises(surgery.UntraceableError, match="writes into 'log'"):
        model(x(), log)


def test_a_new_kind_of_call_that_cannot_be_traced_says_so_and_what_to_do():
    class Sizes(Hidden):
        def forward(self, x, limit=None):
            if limit is not None and x.sum() > limit:
                x = x * 2
            return self.out(F.relu(self.fc(x)))

    model = Sizes()
    before = plain(model)
    surgery.knife(model, OPERATED)
    with pytest.raises(
        surgery.UntraceableError, match=r"called in a new way that cannot be traced.*Call it as before, or"
    ):
        model(x(), limit=torch.zeros(()))
    assert_alike(before, plain(model))


def test_an_argument_of_an_unknown_class_is_refused_by_name():
    model = OptionalMask()
    surgery.knife(model, OPERATED)
    with pytest.raises(surgery.UntraceableError, match="an argument of type SimpleNamespace"):
        model(x(), SimpleNamespace())


def test_einops_functions_are_recorded_or_declined():
    einops = pytest.importorskip("einops")

    class Rearranges(Hidden):
        def forward(self, x):
            h = einops.rearrange(F.relu(self.fc(einops.rearrange(x, "b f -> b f"))), "b (a c) -> b a c", a=2)
            return self.out(einops.rearrange(h, "b a c -> b (a c)"))

    model = Rearranges()
    before = plain(model)
    sites = surgery.discover(model)
    if "fc" in sites:
        surgery.knife(model, OPERATED, verify=x())
        assert_alike(before, plain(model))
    else:
        assert "Rearranges.forward cannot be traced" in sites.declined["fc"]


def test_nothing_in_torch_stays_patched_also_after_a_failure():
    ambient = (torch.is_grad_enabled, torch.is_autocast_enabled, torch.get_autocast_dtype)
    inside = (torch.amp.autocast_mode.autocast.__enter__, nn.Module.__call__, nn.Module.__getattr__)
    for cls in (Scale, NoGradBlock, BranchesOnValue, AutocastBlock):
        surgery.discover(cls())
    assert ambient == (torch.is_grad_enabled, torch.is_autocast_enabled, torch.get_autocast_dtype)
    assert inside == (torch.amp.autocast_mode.autocast.__enter__, nn.Module.__call__, nn.Module.__getattr__)
    assert torch.relu(torch.tensor([-1.0])).item() == 0.0


def test_tracing_reads_a_class_in_both_modes_without_switching_the_module():
    model = FunctionalDropout().eval()
    surgery.knife(model, OPERATED)
    assert not any(module.training for module in model.modules())
    model.train()
    torch.manual_seed(0)
    first = plain(model)
    torch.manual_seed(1)
    assert not alike(first, plain(model))


def test_instances_of_one_class_keep_their_own_attributes():
    models = [Scale() for _ in range(3)]
    for factor, model in enumerate(models):
        vars(model)["scale"] = float(factor)
    before = [plain(model) for model in models]
    for model in models[::-1]:
        surgery.knife(model, OPERATED)
    assert_alike(before, [plain(model) for model in models])
    assert len({type(model) for model in models}) == 1


def test_a_trace_of_the_same_call_gives_the_same_graph():
    model = Configured()
    call = default_call(model)
    assert isinstance(call, Call)
    assert str(trace(model, "forward", call).graph) == str(trace(model, "forward", call).graph)
