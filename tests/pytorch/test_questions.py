"""Dtypes and devices that decide a branch: asked while the forward runs, and never answered with what was assumed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from neuronsurgery import surgery

OPERATED = surgery.Units({"fc": [0, 1, 2]})


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 2)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(4)


class Casting(Layers):
    """As T5: draws and updates running statistics before it asks, so that nothing may run twice."""

    def forward(self, x):
        h = self.drop(F.relu(self.fc(self.norm(x))))
        if isinstance(self.out.weight, Tensor) and h.dtype != self.out.weight.dtype and h.dtype != torch.int8:
            h = 3 * h.to(self.out.weight.dtype)
        return self.out(h)


class Clamping(Layers):
    def forward(self, x):
        h = F.relu(self.fc(x))
        if x.dtype == torch.bfloat16:
            h = h.clamp(max=torch.finfo(x.dtype).max) * 2
        elif x.dtype in (torch.float64, torch.float16):
            h = h * 4
        return self.out(h.to(self.out.weight.dtype))


class Between(Layers):
    """The question stands between the producer and its activation function, past a norm that couples units."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(6)

    def forward(self, x):
        z = self.layer_norm(self.fc(x))
        scale = 2.0 if z.dtype == torch.bfloat16 else 0.5
        h = F.relu(z) * scale
        return self.out(h if h.dtype == torch.float32 else h.float())


class OfDevice(Layers):
    def forward(self, x):
        if x.device.type == "cpu" and not x.is_cuda and x.is_floating_point():
            return self.out(F.relu(self.fc(x)))
        return self.out(F.relu(self.fc(x)) + 100)


class Twice(Layers):
    """The same question again has the same answer: four graphs would be two too many."""

    def forward(self, x):
        z = self.fc(x)
        h = F.relu(z) if z.dtype == torch.bfloat16 else F.relu(z) * 2
        return self.out((h + 1 if z.dtype == torch.bfloat16 else h - 1).float())


class Refusing(Layers):
    def forward(self, x):
        if x.dtype == torch.float64:
            raise TypeError(f"no doubles, and this is {x.dtype}")
        return self.out(F.relu(self.fc(x)).float())


ALL = (Casting, Clamping, Between, OfDevice, Twice, Refusing)


def operated_on(cls: Any) -> tuple[Any, Any]:
    """A model and its operated copy, whose active members have moved, so that a call without its bank shows."""
    torch.manual_seed(0)
    model = cls()
    operated = copy.deepcopy(model)
    assert surgery.knife(operated, OPERATED, verify=torch.randn(3, 4)).num_units == 3
    for each in (model, operated):
        with torch.no_grad():
            each.fc.weight[3:].add_(1.0)
    return model, operated


def run(model: Any, x: Tensor, autocast: bool) -> Any:
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(x)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_a_forward_that_dtypes_drive_is_right_for_every_dtype(cls):
    model, operated = operated_on(cls)
    for _ in range(2):
        for autocast in (False, True, False):
            x = torch.randn(8, 4)
            old, new = run(model, x, autocast), run(operated, x, autocast)
            assert old.dtype == new.dtype
            assert torch.allclose(old, new, atol=0.05 if autocast else 1e-5), autocast
            assert torch.equal(model.norm.running_mean, operated.norm.running_mean)
            assert model.norm.num_batches_tracked == operated.norm.num_batches_tracked


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [Casting, Clamping], ids=lambda cls: cls.__name__)
def test_a_model_cast_after_the_operation_takes_the_branches_of_its_dtype(cls, dtype):
    model, operated = operated_on(cls)
    x = torch.randn(8, 4, dtype=dtype)
    old, new = run(model.to(dtype), x, False), run(operated.to(dtype), x, False)
    assert old.dtype == new.dtype
    assert torch.allclose(old, new, atol=1e-5 if dtype == torch.float64 else 0.1)


def test_gradients_and_training_pass_the_questions():
    _, operated = operated_on(Casting)
    frozen = {name: value.clone() for name, value in operated.fc.composite.named_buffers()}
    run(operated, torch.randn(8, 4), True).sum().backward()
    assert (operated.fc.weight.grad[:3] != 0).any()
    assert all(torch.equal(value, frozen[name]) for name, value in operated.fc.composite.named_buffers())


def test_the_same_question_is_asked_once():
    _, operated = operated_on(Twice)
    (graphs,) = type(operated)._neuronsurgery_entries["forward"].graphs.values()
    assert len(graphs) == 1
    (segment,) = (cell.cell_contents for cell in graphs[0].run.__closure__)
    assert [bool(following.next) for following in segment.next.values()] == [False, False]


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_questions_compile_in_one_piece(cls):
    torch._dynamo.reset()
    _, operated = operated_on(cls)
    operated.eval()
    counter = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(operated, backend=counter, fullgraph=True, dynamic=False)
    for autocast in (False, True, False, True):
        x = torch.randn(8, 4)
        assert torch.allclose(run(operated, x, autocast), run(compiled, x, autocast), atol=1e-5)
    assert counter.frame_count == 2  # one for each state of autocast
    torch._dynamo.reset()


def test_an_outcome_that_the_forward_refuses_is_an_error_and_no_guess():
    _, operated = operated_on(Refusing)
    with pytest.raises(surgery.UntraceableError, match="no doubles"):
        operated.double()(torch.randn(3, 4, dtype=torch.float64))


# -- verdicts ----------------------------------------------------------------------------------------------------------


class OtherwiseInHalf(Layers):
    def forward(self, x):
        z = self.fc(x)
        return self.out(z if z.dtype == torch.bfloat16 else F.relu(z))


class ImpureInHalf(Layers):
    def forward(self, x):
        if x.dtype == torch.float16 and x.sum() > 0:
            x = 2 * x
        return self.out(F.relu(self.fc(x)))


class ByIdentity(Layers):
    def forward(self, x):
        return self.out(F.relu(self.fc(x if x.dtype is torch.float16 else 2 * x)))


class OwnByIdentity(Layers):
    def forward(self, x):
        return self.out(F.relu(self.fc(x if self.fc.weight.dtype is torch.float16 else 2 * x)))


class ManyQuestions(Layers):
    def forward(self, x):
        for _ in range(7):
            x = x * 2
            x = x if x.dtype == torch.float16 else x + 1
        return self.out(F.relu(self.fc(x)))


class Activation(nn.Module):
    def forward(self, x):
        return F.relu(x) if x.dtype == torch.float32 else x


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (OtherwiseInHalf, "no activation function"),
        (ImpureInHalf, "control flow on tensor values"),
        (ByIdentity, "compares a dtype by 'is'"),
        (OwnByIdentity, "compares a dtype by 'is'"),
        (ManyQuestions, "decide too many branches"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_verdict_that_depends_on_a_dtype_declines(cls, words):
    assert words in surgery.discover(cls()).declined["fc"]


def test_an_activation_function_that_depends_on_a_dtype_is_none():
    found = surgery.discover(nn.Sequential(nn.Linear(4, 6), Activation(), nn.Linear(6, 2)))
    assert "another function for another dtype" in found.declined["0"]


def test_a_question_about_own_tensors_is_a_guard():
    class Own(Layers):
        def forward(self, x):
            h = F.relu(self.fc(x))
            return self.out(h * 2 if self.fc.weight.dtype == torch.float64 else h)

    model, operated = operated_on(Own)
    x = torch.randn(3, 4)
    assert torch.allclose(model(x), operated(x), atol=1e-6)
    assert torch.allclose(model.double()(x.double()), operated.double()(x.double()))
