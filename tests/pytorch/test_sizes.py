"""Sizes and numbers that decide what is computed: one graph for each value asked for, none for those passed on."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from neuronsurgery import surgery
from neuronsurgery.pytorch.tracing import trace

OPERATED = surgery.Units({"fc": [0, 1, 2]})


class Cell(nn.Module):
    """A recurrent cell whose hidden layer is a site of the module that loops over time."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.back, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.embed, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.start = nn.Parameter(torch.zeros(1, 6))

    def step(self, x: Tensor, h: Any) -> Any:
        return F.relu(self.fc(x)) + 0.5 * torch.tanh(self.back(h))


class ShapeRange(Cell):
    def forward(self, x):
        h = torch.zeros(x.shape[0], 6)
        for t in range(x.shape[1]):
            h = self.step(x[:, t], h)
        return self.out(h)


class SizeRange(Cell):
    def forward(self, x):
        h, seen = x.new_zeros(x.size(0), 6), []
        for t in range(x.size(dim=1)):
            h = self.step(x[:, t], h)
            seen.append(self.out(h))
        return torch.stack(seen, 1)


class Length(Cell):
    def forward(self, x):
        h = self.start.expand(x.shape[1], -1)
        for t in range(len(x)):
            h = self.step(x[t], h)
        return self.out(h)


class Rows(Cell):
    def forward(self, x):
        h = torch.zeros((x.shape[1], 6))
        for x_t in x:
            h = self.step(x_t, h)
        return self.out(h)


class Enumerated(Cell):
    def forward(self, x):
        h = torch.zeros(x.shape[0], 6)
        for t, x_t in enumerate(x.unbind(1)):
            h = self.step(x_t, h) * (t + 1)
        return self.out(h)


class Unbound(Cell):
    def forward(self, x):
        h = torch.zeros(x.size()[0], 6)
        for x_t, weight in zip(torch.unbind(x, dim=1), [0.5, 0.25, 2.0, 1.0], strict=False):
            h = self.step(x_t * weight, h)
        return self.out(h)


class Unpacked(Cell):
    def forward(self, x):
        num_steps, batch, _ = x.shape
        h = torch.zeros(batch, 6)
        for t in reversed(range(num_steps)):
            h = self.step(x[t], h)
        return self.out(h)


class Chunks(Cell):
    def forward(self, x):
        h = torch.zeros(x.shape[0], 6)
        for piece in x.split(2, dim=1):
            h = self.step(piece.mean(1), h)
        for piece in x.chunk(2, 1):
            h = self.step(piece.sum(1), h)
        return self.out(h)


class Computed(Cell):
    """Loops over the sizes of tensors that provably have those of the argument."""

    def forward(self, x):
        e = self.norm(F.relu(self.embed(x)) * 2).transpose(0, 1)
        h = torch.zeros(e.shape[1], 6)
        for t in range(e.shape[0]):
            h = self.step(e[t], h)
        return self.out(h)


class WhileLoop(Cell):
    def forward(self, x):
        t, h = 0, torch.zeros(x.shape[0], 6)
        while t < x.shape[1]:
            h, t = self.step(x[:, t], h), t + 1
        return self.out(h)


class Scaled(Cell):
    def forward(self, x):
        return self.out(F.relu(self.fc(x)) / math.sqrt(x.size(1)))


class Truncated(Cell):
    def forward(self, x):
        if x.shape[1] > 3:
            x = x[:, :3]
        return self.out(F.relu(self.fc(x)).sum(1))


class Checked(Cell):
    def forward(self, x):
        if x.shape[-1] != self.fc.in_features or x.shape[2] != 4:
            raise ValueError(f"expected {self.fc.in_features} features")
        assert x.size(2) == 4, "four"
        return self.out(F.relu(self.fc(x)).mean(1))


class LengthAsFactor(Cell):
    def forward(self, x):
        return self.out(F.relu(self.fc(x))).sum(1) * len(x)


LOOPS = (ShapeRange, SizeRange, Length, Rows, Enumerated, Unbound, Unpacked, Chunks, Computed, WhileLoop)
LOOPS += (Scaled, Truncated, Checked, LengthAsFactor)  # type: ignore[assignment]


def assert_same_for(model: nn.Module, operated: nn.Module, *shapes: tuple[int, ...]) -> None:
    for shape in shapes:
        x = torch.randn(shape)
        old, new = model(x), operated(x)
        assert old.shape == new.shape and torch.allclose(old, new, atol=1e-5), shape


def graphs_of(module: nn.Module) -> list[Any]:
    entry = type(module)._neuronsurgery_entries["forward"]  # type: ignore[attr-defined]
    return [graph for graphs in entry.graphs.values() for graph in graphs]


@pytest.mark.parametrize("cls", LOOPS, ids=lambda cls: cls.__name__)
def test_a_forward_that_sizes_drive_is_right_for_every_length(cls):
    model = cls()
    operated = copy.deepcopy(model)
    found = surgery.discover(operated)
    assert "fc" in found, found.declined
    report = surgery.knife(operated, OPERATED, verify=torch.randn(3, 4, 4))
    assert report.num_units == 3
    assert_same_for(model, operated, (3, 4, 4), (3, 1, 4), (2, 3, 4), (1, 2, 4), (4, 7, 4), (3, 4, 4))
    with torch.no_grad():  # active and compensation differ, so that a call without its bank shows
        for each in (model, operated):
            each.fc.weight[3:].add_(1.0)
    assert_same_for(model, operated, (3, 4, 4), (5, 5, 4))


def test_every_call_of_an_unrolled_loop_gets_the_bank():
    model: Any = ShapeRange()
    surgery.knife(model, OPERATED)
    with torch.no_grad():
        model.fc.weight.add_(0.3)
    x, bank = torch.randn(3, 5, 4), model.fc.composite
    h = torch.zeros(3, 6)
    for t in range(5):
        rows = bank.passed(0, bank.path.links[0], bank(x[:, t]))
        h = bank.assemble(F.relu(model.fc(x[:, t])), rows) + 0.5 * torch.tanh(model.back(h))
    assert torch.allclose(model(x), model.out(h), atol=1e-6)
    model(x).sum().backward()
    assert (model.fc.weight.grad[:3] != 0).any()


def test_a_length_is_traced_once_and_the_batch_size_not_at_all():
    model = ShapeRange()
    surgery.knife(model, OPERATED)
    before = len(graphs_of(model))
    for shape in [(3, 6, 4), (5, 6, 4), (1, 6, 4), (3, 6, 4), (3, 9, 4), (2, 9, 4)]:
        model(torch.randn(shape))
    assert len(graphs_of(model)) == before + 2


def test_a_branch_on_a_size_has_a_graph_for_each_outcome_and_not_for_each_size():
    model = Truncated()
    surgery.knife(model, OPERATED)
    for length in (1, 2, 3, 4, 5, 6, 7):
        model(torch.randn(2, length, 4))
    assert len({str(graph.conditions) for graph in graphs_of(model)}) == 2


def test_graphs_of_many_lengths_do_not_pile_up():
    model = ShapeRange()
    surgery.knife(model, OPERATED)
    entry = type(model)._neuronsurgery_entries["forward"]  # type: ignore[attr-defined]
    (graphs,) = entry.graphs.values()
    graphs.extend([graphs[0]] * 200)
    model(torch.randn(1, 17, 4))
    assert len(graphs) == 128
    assert model(torch.randn(2, 17, 4)).shape == (2, 2)


def test_a_loop_compiles_once_for_each_length():
    torch._dynamo.reset()
    model = ShapeRange()
    surgery.knife(model, OPERATED)
    lengths = (3, 5)
    xs = {length: torch.randn(2, length, 4) for length in lengths}
    plain = {length: model(x) for length, x in xs.items()}
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for length in (*lengths, *lengths):
        assert torch.allclose(compiled(xs[length]), plain[length], atol=1e-6)
    assert counter.frame_count == 2
    torch._dynamo.reset()


# -- numbers -----------------------------------------------------------------------------------------------------------


class Steps(Cell):
    def forward(self, x, steps=2, scale=1.0, eps=0.5):
        h = torch.zeros(x.shape[0], 6)
        for _ in range(steps):
            h = self.step(x, h)
        return self.out(h if scale > 2 else h * scale) + eps


class Typed(Cell):
    def forward(self, x, scale=2):
        table = {2: 1.0, 3: 2.0}
        return self.out(F.relu(self.fc(x)) * table.get(scale, 5.0) * (1 if isinstance(scale, int) else 3))


@pytest.mark.parametrize("verify", [None, torch.ones(3, 4)], ids=["unverified", "verified"])
def test_a_default_number_that_drives_a_loop_is_a_condition_of_the_graph(verify):
    model = Steps()
    operated = copy.deepcopy(model)
    assert surgery.knife(operated, OPERATED, verify=verify).num_units == 3
    for steps in (2, 0, 3, 1, 2):
        for scale in (1.0, 3.0, -1.0):
            x = torch.randn(3, 4)
            assert torch.allclose(model(x, steps, scale), operated(x, steps=steps, scale=scale), atol=1e-5)
    before = len(graphs_of(operated))
    for scale in (0.1, 0.2, 0.3):
        operated(torch.ones(2, 4), scale=scale, eps=scale)  # an input of the graph, as long as it stays below 2
    assert len(graphs_of(operated)) == before


def test_a_number_that_must_be_constant_is_traced_once_for_each_value(monkeypatch):
    model = Typed()
    operated = copy.deepcopy(model)
    surgery.knife(operated, OPERATED)
    traced: list[Any] = []

    def noting(*args: Any, **more: Any) -> Any:
        traced.append(args)
        return trace(*args, **more)

    monkeypatch.setattr("neuronsurgery.pytorch.programs.trace", noting)
    for scale in (2, 3, 4, 2.0, True, 3, 4, 2.0, True, 2):
        x = torch.randn(3, 4)
        assert torch.allclose(model(x, scale), operated(x, scale), atol=1e-5), scale
    known = len(traced)
    for scale in (2, 3, 4, 2.0, True):
        operated(torch.ones(2, 4), scale)
    assert len(traced) == known


# -- refused -----------------------------------------------------------------------------------------------------------


class ComputedSize(Cell):
    def forward(self, x):
        kept = x[x.sum(1) > 0]
        return self.out(sum((F.relu(self.fc(kept[i])) for i in range(kept.shape[0])), torch.zeros(6)))


class Resized(Cell):
    def forward(self, x):
        x = x.clone()
        x.unsqueeze_(0)
        return self.out(sum((F.relu(self.fc(x[i])) for i in range(x.shape[0])), torch.zeros(6)))


class ReadOtherwiseWithFourAxes(Cell):
    def forward(self, x):
        z = self.fc(x)
        return self.out(F.relu(z) + z if x.dim() == 4 else F.relu(z))


class ReadOtherwiseAlone(Cell):
    """The pre-activation is read otherwise for sequences of one step only."""

    def forward(self, x):
        z = self.fc(x)
        return self.out(F.relu(z) + z if x.shape[1] == 1 else F.relu(z))


class ReadOtherwiseFromThreeOn(Cell):
    def forward(self, x):
        z = self.fc(x)
        return self.out(F.relu(z) + z if x.shape[1] > 2 else F.relu(z))


class ImpureForThree(Cell):
    def forward(self, x):
        if x.shape[1] == 3 and x.sum() > 0:
            x = 2 * x
        return self.out(F.relu(self.fc(x)))


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (ComputedSize, "control flow on tensor values or shapes"),
        (Resized, "control flow on tensor values or shapes"),
        (ReadOtherwiseWithFourAxes, "its pre-activation is read 2 times"),
        (ReadOtherwiseAlone, "its pre-activation is read 2 times"),
        (ReadOtherwiseFromThreeOn, "its pre-activation is read 2 times"),
        (ImpureForThree, "control flow on tensor values"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_verdict_that_depends_on_a_size_or_an_unknown_size_declines(cls, words):
    assert words in surgery.discover(cls()).declined["fc"]


def test_a_forward_that_never_fits_its_assumed_sizes_gives_its_own_reason():
    class Odd(Cell):
        def forward(self, x):
            if x.shape[1] < 10:
                raise ValueError("too short")
            return self.out(F.relu(self.fc(x)))

    assert "too short" in surgery.discover(Odd()).declined["fc"]


def test_a_size_past_a_producer_is_asked_for_while_it_runs_whatever_axis_it_is():
    class Inner(Cell):
        def forward(self, x):
            h = F.relu(self.fc(x))
            return h * h.shape[1] if h.shape[1] > 4 else -h

    model = Inner()
    operated = copy.deepcopy(model)
    assert surgery.knife(operated, OPERATED).num_units
    for shape in ((3, 5, 4), (3, 4, 4), (3, 4), (2, 2, 5, 4)):
        x = torch.randn(shape)
        assert torch.allclose(model(x), operated(x), atol=1e-5)


# -- the number of axes ------------------------------------------------------------------------------------------------


class Averaged(Cell):
    def forward(self, x):
        return self.out(F.relu(self.fc(x.mean(1) if x.dim() == 3 else x)))


class ByNdim(Cell):
    def forward(self, x):
        if x.ndim > 3:
            x = x.flatten(0, -3)
        return self.out(F.relu(self.fc(x)))


class ByLength(Cell):
    def forward(self, x):
        if len(x.size()) < 2:
            raise ValueError("too few axes")
        return self.out(F.relu(self.fc(x.unsqueeze(0) if len(x.shape) == 2 else x)))


class Starred(Cell):
    """As torchrl's ConvNet: any number of batch axes before the last two."""

    def forward(self, x):
        *batch, length, _ = x.shape
        if len(batch) > 1:
            x = x.flatten(0, len(batch) - 1)
        out = self.out(F.relu(self.fc(x))) * length
        return out.unflatten(0, batch) if len(batch) > 1 else out


class Heads(Cell):
    """As attention does: `view` with the leading sizes of the argument."""

    def forward(self, x):
        shape = (*x.shape[:-1], -1, 2)
        h = F.relu(self.fc(x)).view(shape)
        second = x.shape[:3][1]
        return self.out(h.flatten(-2)) * (2 if second > 2 else 1)


class WholeShape(Cell):
    def forward(self, x):
        h = F.relu(self.fc(x))
        if x.shape[-1:] != (4,) or h.shape != (*x.shape[:-1], 6):
            raise ValueError("expected 4 features")
        return self.out(h)


RANKS = (Averaged, ByNdim, ByLength, Starred, Heads, WholeShape)


@pytest.mark.parametrize("cls", RANKS, ids=lambda cls: cls.__name__)
def test_a_forward_that_the_number_of_axes_drives_is_right_for_every_number(cls):
    model = cls()
    operated = copy.deepcopy(model)
    assert surgery.knife(operated, OPERATED, verify=torch.randn(3, 5, 4)).num_units == 3
    with torch.no_grad():
        for each in (model, operated):
            each.fc.weight[3:].add_(1.0)
    assert_same_for(model, operated, (3, 5, 4), (2, 4), (3, 3, 5, 4), (2, 1, 4), (1, 2, 3, 5, 4), (2, 1, 1, 2, 3, 4))


def test_a_number_of_axes_compiles_once_for_each():
    torch._dynamo.reset()
    model = Starred()
    surgery.knife(model, OPERATED)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for shape in ((3, 5, 4), (2, 3, 5, 4), (3, 5, 4)):
        x = torch.randn(shape)
        assert torch.allclose(compiled(x), model(x), atol=1e-6)
    assert counter.frame_count == 2
    torch._dynamo.reset()


def test_a_forward_that_fits_no_assumed_number_of_axes_gives_its_own_reason():
    class Six(Cell):
        def forward(self, x):
            a, b, c, d, e, _ = tuple(x.shape)
            return self.out(F.relu(self.fc(x))) * (a + b + c + d + e)

    assert "unpack" in surgery.discover(Six()).declined["fc"]


# -- *args -------------------------------------------------------------------------------------------------------------


class AnyNumber(Cell):
    def forward(self, *inputs):
        return self.out(F.relu(self.fc(torch.cat(inputs, -1) if len(inputs) > 1 else inputs[0])))


class Two(Cell):
    def forward(self, *inputs):
        if len(inputs) != 2:
            raise TypeError(f"two, not {len(inputs)}")
        x, scale = inputs
        return self.out(F.relu(self.fc(x)) * scale)


class Three(Cell):
    def forward(self, *inputs):
        x, y, z = inputs
        return self.out(F.relu(self.fc(x + y)) + z)


class NoneAtAll(Cell):
    def forward(self, *inputs):
        assert not inputs
        return self.out(F.relu(self.fc(self.start[:, :4])))


STARRED = {
    AnyNumber: [(3, 4)],
    Two: [(3, 4), (3, 1)],
    Three: [(3, 4), (3, 4), (3, 1)],
    NoneAtAll: [],
}


@pytest.mark.parametrize(("cls", "shapes"), STARRED.items(), ids=lambda each: getattr(each, "__name__", ""))
def test_a_forward_of_any_number_of_inputs_is_traced_with_one_that_it_takes(cls, shapes):
    model = cls()
    operated = copy.deepcopy(model)
    found = surgery.discover(operated)
    assert "fc" in found, found.declined
    inputs = tuple(map(torch.randn, shapes))
    assert surgery.knife(operated, OPERATED, verify=inputs).num_units == 3
    assert len(graphs_of(operated)) == 1
    assert torch.allclose(model(*inputs), operated(*inputs), atol=1e-6)


def test_another_number_of_inputs_is_traced_when_it_comes():
    model = AnyNumber()
    operated = copy.deepcopy(model)
    surgery.knife(operated, OPERATED)
    halves = torch.randn(3, 2), torch.randn(3, 2)
    assert torch.allclose(model(*halves), operated(*halves), atol=1e-6)
