"""Operated models in torch.export, ONNX, torch.jit and torch.func: what comes out computes what the model computes."""

from __future__ import annotations

import copy
import io
import pathlib
from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronsurgery import surgery
from neuronsurgery.errors import UntraceableError

Tensors = dict[str, Tensor]


def situation(what: str, outcome: str = "works") -> pytest.MarkDecorator:
    return pytest.mark.situation("Compile and export", what, outcome)


class Vectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.inner, self.out = (
            nn.Linear(4, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 70),
            nn.Linear(70, 2),
        )

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.inner(F.gelu(self.norm(self.enter(x))))))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.inner, self.out = (
            nn.Conv2d(2, 6, 3),
            nn.BatchNorm2d(6),
            nn.Linear(6, 9),
            nn.Linear(9, 2),
        )

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.inner(F.relu(self.norm(self.conv(x))).mean((-1, -2)))))


def chain() -> nn.Module:
    first = (nn.Linear(4, 8), nn.BatchNorm1d(8), nn.PReLU(8))
    return nn.Sequential(*first, nn.Linear(8, 70), nn.ReLU(), nn.Linear(70, 2))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vectors": (Vectors, (4,)),
    "conv and batch norm": (Images, (2, 6, 6)),
    "Sequential": (chain, (4,)),
}


def every(quick: str) -> pytest.MarkDecorator:
    """All models, of which the quick tests run one."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize("name", [n if n == quick else pytest.param(n, marks=slow) for n in MODELS])


def operated(name: str, seed: int = 0, units: tuple[int, ...] = (0, 3)) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    build, shape = MODELS[name]
    model, x = build(), torch.randn(5, *shape)
    model(x)  # statistics that differ from unit to unit
    for _ in range(2):
        surgery.knife(model, surgery.Units(dict.fromkeys(surgery.discover(model), units)))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.01)  # the active members have moved: composites differ from the slots alone
    return model.eval(), x


def assert_same(found: Any, expected: Any) -> None:
    assert torch.allclose(found, expected, atol=1e-5)


STRICT = [pytest.param(strict, marks=situation(f"torch.export, strict={strict}")) for strict in (True, False)]

# -- programs ----------------------------------------------------------------------------------------------------------


@every("vectors")
@pytest.mark.parametrize("strict", STRICT)
def test_an_exported_program_gives_what_the_model_gives_for_any_batch_also_saved_and_loaded(name: str, strict: bool):
    model, x = operated(name)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for each in (program, torch.export.load(file)):
        for data in (x, torch.cat([x, x])):
            assert_same(each.module()(data), model(data))


@situation("operating after torch.export")
def test_an_exported_program_stays_as_it_was_when_the_model_is_operated_on():
    model, x = operated("vectors")
    program = torch.export.export(model, (x,))
    expected = model(x)
    surgery.knife(model, surgery.Units({"enter": [5]}))
    with torch.no_grad():
        model.get_parameter("enter.weight")[5].mul_(3.0)
    assert not torch.allclose(model(x), expected, atol=1e-3)
    again = torch.export.export(model, (x,))
    assert_same(again.module()(x), model(x))
    assert len(program.state_dict) == len(again.state_dict)


@every("conv and batch norm")
@situation("ONNX, through onnxruntime")
@pytest.mark.filterwarnings("ignore::FutureWarning:copyreg", "ignore::DeprecationWarning")
def test_onnxruntime_gives_what_the_model_gives(name: str, tmp_path: pathlib.Path):
    model, x = operated(name)
    path = str(tmp_path / "model.onnx")
    batch = torch.export.Dim("batch")
    exported: Any = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    exported.save(path)
    session = onnxruntime.InferenceSession(path)
    data = torch.cat([x, x])
    (found,) = session.run(None, {session.get_inputs()[0].name: data.numpy()})
    assert_same(torch.from_numpy(found), model(data))


@every("Sequential")
@situation("torch.jit.trace")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_script_gives_what_the_model_gives_also_saved_and_loaded(name: str):
    model, x = operated(name)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (x,)), file)
    file.seek(0)
    data = torch.cat([x, x])
    assert_same(torch.jit.load(file)(data), model(data))


@situation("torch.fx.symbolic_trace", "refused")
def test_tracing_an_operated_scope_symbolically_says_what_cannot_be_traced():
    model, _ = operated("vectors")
    with pytest.raises(UntraceableError, match="an argument of type Proxy cannot be part of a traced call"):
        torch.fx.symbolic_trace(model)


# -- torch.func --------------------------------------------------------------------------------------------------------


def tensors_of(model: nn.Module) -> tuple[Tensors, Tensors]:
    return dict(model.named_parameters()), dict(model.named_buffers())


@every("vectors")
@situation("torch.func: grad, vmap, jvp")
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own jvp rules use it
def test_functional_transforms_agree_with_autograd(name: str):
    model, x = operated(name)
    parameters, buffers = tensors_of(model)

    def loss(parameters: Tensors, data: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(model, (parameters, buffers), (data,)).square().sum()
        return result

    model(x).square().sum().backward()
    grads = torch.func.grad(loss)(parameters, x)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
    ones = {key: torch.ones_like(value) for key, value in parameters.items()}
    slope: Tensor = torch.func.jvp(lambda values: loss(values, x), (parameters,), (ones,))[1]
    for key, parameter in model.named_parameters():
        assert_same(grads[key], parameter.grad)
        assert_same(each[key].sum(0), parameter.grad)
    assert float(slope.detach()) == pytest.approx(sum(float(grad.detach().sum()) for grad in grads.values()), rel=1e-3)


@situation("torch.func.functional_call under torch.compile")
def test_a_compiled_functional_call_uses_the_tensors_it_is_given():
    model, x = operated("vectors")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def call(values: Tensors, data: Tensor) -> Any:
        return torch.func.functional_call(model, values, (data,))

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    halved = {key: (value / 2).detach() for key, value in tensors.items()}
    assert_same(compiled(tensors, x), model(x))
    assert_same(compiled(halved, x), call(halved, x))
    assert not torch.allclose(call(halved, x), model(x), atol=1e-3)


@pytest.mark.parametrize(
    ("device", "is_compiled"), [("meta", False), ("cpu", True), pytest.param("meta", True, marks=pytest.mark.slow)]
)
@situation("torch.func.stack_module_state and vmap")
def test_a_stack_of_models_operated_on_alike_agrees_with_a_loop(device: str, is_compiled: bool):
    models = [operated("vectors", seed)[0] for seed in range(3)]
    x = operated("vectors")[1]
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to(device)

    def call(parameters: Tensors, buffers: Tensors) -> Any:
        return torch.func.functional_call(base, (parameters, buffers), (x,))

    together = torch.func.vmap(call)
    if is_compiled:
        together = torch.compile(together, backend="eager", fullgraph=True)
    for found, model in zip(together(parameters, buffers), models, strict=True):
        assert_same(found, model(x))
