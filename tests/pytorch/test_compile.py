"""torch.compile around models that are operated on while they train: what they give is what eager gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim import SGD, Adam, Optimizer
from torch.utils.checkpoint import checkpoint

from neuronsurgery import surgery
from neuronsurgery.errors import SurgeryError


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Outer(nn.Module):
    """A model whose one block may be compiled alone."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Any:
        return self.block(x) * 2.0


def situation(what: str, outcome: str = "works") -> pytest.MarkDecorator:
    return pytest.mark.situation("Compile and export", what, outcome)


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
        h = F.relu(self.norm(self.conv(x))).mean((-1, -2))
        return self.out(F.gelu(self.inner(h)))


def images() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Images(), torch.randn(6, 2, 5, 5)


def vectors() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = (nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 2))
    return nn.Sequential(*layers), torch.randn(6, 4)


# behind a graph break; unlike others this warning is raised within torch's compiler, which has no way to go on
DYNAMO_ASKS_FOR_GRAD = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)
SLOW = pytest.mark.slow
BOTH = pytest.mark.parametrize("build", [images, pytest.param(vectors, marks=SLOW)])


def operate(model: nn.Module, turn: int = 0, optimizer: Optimizer | None = None) -> surgery.Report:
    """On two units of every site, others at each turn; drawn alike for any copy of the model."""
    units = {name: [turn % 5, 5] for name in surgery.discover(model)}
    assert len(units) == 2
    draw = torch.Generator().manual_seed(turn)
    return surgery.knife(model, surgery.Units(units), optimizer=optimizer, generator=draw, max_growth=100.0)


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.compile(model)": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    "model.compile()": lambda model: in_place(model),
    "torch.compile of a function": lambda model: torch.compile(lambda x: model(x), backend="aot_eager", fullgraph=True),
}


def assert_gradients_agree(model: nn.Module, expected: nn.Module) -> None:
    for (name, mine), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        assert torch.allclose(mine.grad, other.grad, atol=1e-5), name


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager", fullgraph=True)
    return model


@pytest.mark.parametrize(
    ("way", "build"),
    [
        pytest.param("torch.compile(model)", images, marks=situation("torch.compile(model) before surgery")),
        pytest.param("torch.compile(model)", vectors, marks=SLOW),
        pytest.param("model.compile()", vectors, marks=situation("model.compile() before surgery")),
        pytest.param("model.compile()", images, marks=SLOW),
        pytest.param("torch.compile of a function", images, marks=SLOW),
    ],
)
def test_a_model_compiled_before_surgery_gives_what_eager_gives_after_each(way: str, build):
    model, x = build()
    model = model if build is images else Outer(model)  # torch compiles no Sequential in place, operated on or not
    assert_follows_eager(model, WAYS[way](model), x)


@situation("torch.compile of one block before surgery")
def test_a_block_compiled_alone_gives_what_eager_gives_after_each_operation():
    block, x = images()
    model = Outer(block)
    block.compile(backend="aot_eager", fullgraph=True)
    assert_follows_eager(model, model, x)


def assert_follows_eager(model: nn.Module, compiled: Any, x: Tensor) -> None:
    eager = copy.deepcopy(model)  # which torch leaves without the compiled call
    stale = compiled(x)
    for turn in range(2):
        for each in (model, eager):
            operate(each, turn)
            with torch.no_grad():
                for value in each.parameters():
                    value.add_(0.01)  # the active members move: who ran an old graph would differ
            each.zero_grad()
        found, expected = compiled(x), eager(x)
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(found, stale, atol=1e-3)
        found.square().sum().backward()
        expected.square().sum().backward()
        assert_gradients_agree(model, eager)


@BOTH
@situation("torch.compile after surgery")
def test_a_model_compiled_after_surgery_gives_what_eager_gives(build):
    model, x = build()
    operate(model)
    eager = copy.deepcopy(model)
    found, expected = torch.compile(model, backend="aot_eager", fullgraph=True)(x), eager(x)
    assert torch.allclose(found, expected, atol=1e-5)
    found.sum().backward()
    expected.sum().backward()
    assert_gradients_agree(model, eager)


def train(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, wrap: Callable[[Any], Any]) -> list[float]:
    """Train with ten operations in between; `wrap` is applied to the step of the optimizer."""
    optimizer = Adam(model.parameters(), lr=0.01)
    step, losses = wrap(optimizer.step), []
    for turn in range(20):
        if turn % 2:
            operate(model, turn, optimizer)
        optimizer.zero_grad()
        loss = (call(x) - 1.0).square().mean()
        loss.backward()
        step()
        losses.append(float(loss.detach()))
    return losses


@BOTH
@situation("ten operations while a compiled model trains")
def test_a_compiled_model_operated_on_ten_times_in_training_follows_the_eager_one(build):
    model, x = build()
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    losses = train(model, torch.compile(model, backend=counter, fullgraph=True), x, lambda step: step)
    assert losses == pytest.approx(train(eager, eager, x, lambda step: step), rel=1e-3)
    assert losses[-1] < losses[0] and counter.frame_count == 2
    for (name, mine), other in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-3), name


@SLOW
@situation("training step compiled as one function")
@DYNAMO_ASKS_FOR_GRAD
def test_a_compiled_training_step_follows_the_eager_one():
    model, x = vectors()
    eager = copy.deepcopy(model)

    def gradient_step(net: nn.Module, optimizer: Optimizer) -> Callable[[], Tensor]:
        def step() -> Tensor:
            loss = (net(x) - 1.0).square().mean()
            grads = torch.autograd.grad(loss, list(net.parameters()))
            for parameter, grad in zip(net.parameters(), grads, strict=True):
                parameter.grad = grad
            total: Tensor = loss.detach()
            return total

        return step

    losses = []
    for net in (model, eager):
        optimizer = SGD(net.parameters(), lr=0.1)
        step: Any = gradient_step(net, optimizer)
        if net is model:
            step = torch.compile(step, backend="aot_eager")
        found = []
        for turn in range(12):
            if turn % 3 == 2:
                operate(net, turn, optimizer)
            found.append(float(step()))
            optimizer.step()
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@situation("mark_dynamic batch")
def test_a_dynamic_batch_stays_dynamic_through_operations():
    model, x = vectors()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for turn in range(5):
        batch = torch.cat([x] * (turn + 1))
        torch._dynamo.mark_dynamic(batch, 0)
        assert torch.allclose(compiled(batch), model(batch), atol=1e-5)
        operate(model, turn)
    assert counter.frame_count == 2


@situation("verify= on a compiled model")
def test_verify_runs_the_compiled_model_and_measures_no_error():
    model, x = images()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    for turn in range(2):
        units = {name: [turn] for name in surgery.discover(compiled)}
        report = surgery.knife(compiled, surgery.Units(units), verify=x)
        assert report.verified and report.model_error is not None and report.model_error < 2e-6


@situation("activation checkpointing")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_give_the_same_gradients(reentrant: bool):
    model, x = vectors()
    operate(model)
    eager = copy.deepcopy(model)
    data = x.clone().requires_grad_()
    checkpoint(model, data, use_reentrant=reentrant).sum().backward()
    eager(x).sum().backward()
    assert_gradients_agree(model, eager)


@SLOW
@situation("activation checkpointing under torch.compile")
def test_compiled_checkpointing_gives_the_same_gradients():
    model, x = vectors()
    operate(model)
    eager = copy.deepcopy(model)

    def call(data: Tensor) -> Any:
        return checkpoint(model, data, use_reentrant=False)

    torch.compile(call, backend="aot_eager", fullgraph=True)(x).sum().backward()
    eager(x).sum().backward()
    assert_gradients_agree(model, eager)


@SLOW
@situation("compiled optimizer step")
def test_a_compiled_optimizer_step_follows_the_eager_one():
    model, x = vectors()
    model, x = model.double(), x.double()
    eager = copy.deepcopy(model)
    expected = train(eager, eager, x, lambda step: step)
    losses = train(model, model, x, lambda step: torch.compile(step, backend="eager"))
    assert losses == pytest.approx(expected, rel=1e-4)  # torch's compiled Adam counts in float32, without surgery too


@DYNAMO_ASKS_FOR_GRAD
@situation("observe under torch.compile")
@BOTH
def test_an_observation_of_a_compiled_model_measures_what_eager_measures(build):
    model, x = build()
    operate(model)
    eager = copy.deepcopy(model)
    call = torch.compile(model, backend="eager")
    call(x)
    scores = []
    for net, forward in ((model, call), (eager, eager)):
        optimizer = SGD(net.parameters(), lr=0.01)
        with surgery.observe(net, optimizer) as evidence:
            forward(x).square().sum().backward()
            optimizer.step()
        scores.append(surgery.score(surgery.discover(net), evidence, surgery.Dormant() & surgery.GraMa()))
    assert str(scores[0]) == str(scores[1])


@situation("observe under torch.compile(fullgraph=True)", "refused")
def test_an_observation_under_fullgraph_says_to_compile_without():
    model, x = vectors()
    call = torch.compile(model, backend="eager", fullgraph=True)
    optimizer = SGD(model.parameters(), lr=0.01)
    with (
        pytest.raises(torch._dynamo.exc.Unsupported, match=r"an observation reads.*without fullgraph=True"),
        surgery.observe(model, optimizer),
    ):
        call(x)
    assert call(x).shape == (6, 2)


@situation("a norm exchanged under torch.compile", "refused")
@pytest.mark.parametrize("is_full", [False, True])
def test_compiled_code_notices_that_a_norm_was_exchanged(is_full: bool):
    model, x = images()
    operate(model)
    call = torch.compile(model, backend="eager", fullgraph=is_full)
    call(x)
    model.norm = nn.BatchNorm2d(6)
    error, says = (torch._dynamo.exc.Unsupported, "SurgeryError") if is_full else (SurgeryError, "was exchanged after")
    with pytest.raises(error, match=says):
        call(x)


@SLOW
@situation("inductor")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning", "ignore::UserWarning:torch._inductor")
def test_inductor_follows_eager_through_ten_operations_in_training():
    model, x = images()
    eager = copy.deepcopy(model)
    losses = train(model, torch.compile(model, fullgraph=True), x, lambda step: step)
    assert losses == pytest.approx(train(eager, eager, x, lambda step: step), rel=1e-3)
