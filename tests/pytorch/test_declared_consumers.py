"""Consumers that no graph shows: layers of declared classes, cells whose input may grow, and what einops rearranges.

Where a unit goes through a pattern is held to einops itself: with the columns found zero the output does not depend on
the unit, and it depends on others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronsurgery import surgery
from neuronsurgery.errors import ModelError, SiteError
from neuronsurgery.pytorch.passing import axes_of_pattern
from tests.pytorch.test_consumers import Forward, filled, measured, readers_of, silence, with_louder

# -- declared classes ------------------------------------------------------------------------------------------------


class Fused(nn.GRUCell):
    """What torch's cell computes, with a backward pass that no graph shows."""

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        if hidden is None:
            hidden = x.new_zeros(len(x), self.hidden_size)
        return Stepped.apply(x, hidden, *self.parameters())  # type: ignore[no-any-return]


class Stepped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, hidden: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, hidden, *weights)
        return torch.gru_cell(x, hidden, *weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs = [each.detach().requires_grad_() for each in ctx.saved_tensors]
        with torch.enable_grad():
            return torch.autograd.grad(torch.gru_cell(*inputs), inputs, gradient)


class Skipping(Fused):
    """Hands its input on beside its gates."""

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        return super().forward(x, hidden) + x


class Peeking(Fused):
    """A method that is no part of the forward reads the same weight."""

    def peek(self, x: Tensor) -> Any:
        return x @ self.weight_ih.T if x.sum() > 0 else x


class Mistaken(Fused):
    """Declared with a weight that it has not."""


class Readable(nn.GRUCell):
    """Can be traced, and is declared all the same."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight_ih, self.bias_ih)[:, : self.hidden_size].tanh()


class Undeclared(Fused):
    pass


surgery.declare_consumer(Fused, {"weight_ih": "bias_ih"})
surgery.declare_consumer(Peeking, {"weight_ih": "bias_ih"})
surgery.declare_consumer(Readable, {"weight_ih": "bias_ih"})
surgery.declare_consumer(Mistaken, {"weight_input": None})


class Agent(Forward):
    """As PyMARL's agents: a hidden layer, a cell, a head; the cell in a module of its own."""

    def __init__(self, cell: Callable[[int, int], nn.Module] = Fused) -> None:
        super().__init__(one=nn.Linear(4, 5), body=nn.ModuleDict({"cell": cell(5, 5)}), head=nn.Linear(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body["cell"](F.relu(self.one(x))))  # type: ignore[no-any-return]


class Elsewhere(Agent):
    """A method that cannot be traced calls the cell with something else."""

    def of_input(self, x: Tensor) -> Any:
        return self.body["cell"](x) if x.sum() > 0 else x


def declined(model: nn.Module) -> str:
    return surgery.consumers(model).declined["one"]


@pytest.mark.parametrize("cell", [Fused, Readable])
def test_a_layer_reads_by_the_weights_that_its_class_was_declared_with(cell: Any) -> None:
    assert surgery.consumers(Agent(cell)).readers["one"] == {"body.cell.weight_ih": 1}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (partial(Agent, Undeclared), "it enters 'body.cell' in a way that cannot be followed"),
        (partial(Agent, Skipping), "it enters 'body.cell' in a way that cannot be followed"),
        (partial(Agent, Peeking), "its consumer 'body.cell.weight_ih' is used by Peeking.peek"),
        (partial(Agent, Mistaken), "'body.cell' reads by 'weight_input', which is computed or no parameter"),
        (Elsewhere, "its consumer 'body.cell.weight_ih' is used by Elsewhere.of_input"),
    ],
)
def test_what_may_read_otherwise_than_declared_is_declined(model: Callable[[], nn.Module], reason: str) -> None:
    assert reason in declined(model())


@pytest.mark.parametrize(
    ("kind", "weights", "complaint"),
    [
        (nn.GRUCell, {"weight_ih": None}, "torch's own"),
        (Undeclared, {}, "without a weight"),
        (Agent(), {"weight_ih": None}, "expected a class"),
        (torch.optim.SGD, {"weight_ih": None}, "expected a class"),
        (dict, {"weight_ih": None}, "expected a class"),
    ],
)
def test_what_cannot_be_declared_is_refused(kind: Any, weights: Any, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        surgery.declare_consumer(kind, weights)


def test_the_output_does_not_depend_on_what_units_are_drawn_in_front_of_a_declared_layer() -> None:
    x = torch.randn(7, 4)
    outputs = []
    for value in (1.0, -2.0):
        torch.manual_seed(0)
        model = Agent()
        init = partial(filled, value)
        report = surgery.redo(model, surgery.Lowest(0.4, of="dormant"), evidence=measured(model, x), init=init)
        assert report.num_units == 2
        outputs.append(model(x))
    assert torch.equal(*outputs)


def test_the_mean_of_a_unit_that_goes_enters_the_declared_bias() -> None:
    torch.manual_seed(0)
    model: Any = Agent().double()
    cell, x = model.body["cell"], torch.randn(7, 4).double()
    with torch.no_grad():
        model.one.weight[2], model.one.bias[2] = 0.0, 1e-3  # the same for every input, and the least useful
    before = model(x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    biases = cell.bias_ih.detach().clone()
    with surgery.ContinualBackprop(model, optimizer, rate=0.2, maturity=1) as replacing:
        while not replacing.num_units:
            model(x).square().mean().backward()
            optimizer.step()
            replacing.step()
            optimizer.zero_grad()
        assert replacing.last is not None and replacing.last.operated == {"one": (2,)}
    assert torch.allclose(model(x), before, rtol=0, atol=1e-9)  # means are added up in float32
    assert not torch.equal(cell.bias_ih, biases) and not cell.weight_ih[:, 2].any()


# -- recurrent layers ------------------------------------------------------------------------------------------------


def parametrized(layer: nn.Module, name: str) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(layer, name)  # type: ignore[no-any-return]


class Beside(Forward):
    """A recurrent or attention layer, and a head beside it that reads the units by a plain weight."""

    def __init__(self, memory: nn.Module) -> None:
        super().__init__(one=nn.Linear(4, 6), memory=memory, head=nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.one(x))
        is_attention = isinstance(self.memory, nn.MultiheadAttention)
        return (self.memory(h, h, h) if is_attention else self.memory(h)), self.head(h)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.GRUCell(6, 3), "weight_ih"),
        (lambda: nn.LSTM(6, 3, bidirectional=True), "weight_ih_l0"),
        (lambda: nn.LSTM(6, 3, bidirectional=True), "weight_ih_l0_reverse"),
        (lambda: nn.MultiheadAttention(6, 2), "in_proj_weight"),
    ],
)
def test_a_weight_that_is_computed_is_not_passed_over(make: Callable[[], nn.Module], name: str) -> None:
    assert "one" in surgery.consumers(Beside(make())).readers
    assert f"'memory' reads by '{name}', which is computed" in declined(Beside(parametrized(make(), name)))


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.RNNCell, Fused])
def test_units_in_front_of_a_cell_are_split_without_a_change_of_the_output(cell: Any) -> None:
    torch.manual_seed(0)
    model: Any = Agent(cell).double()
    x = torch.randn(7, 4).double()
    before = model(x)
    optimizer = torch.optim.Adam(model.parameters())
    assert surgery.widen(model, surgery.Units({"one": [1, 3]}), optimizer=optimizer).operated == {"one": (1, 3)}
    assert torch.allclose(model(x), before, rtol=0, atol=1e-12)
    assert (model.one.out_features, model.body["cell"].input_size) == (7, 7)
    model(x).square().mean().backward()
    optimizer.step()
    assert model.body["cell"].weight_ih.grad.shape == (model.body["cell"].weight_ih.shape[0], 7)


def test_a_size_of_the_same_name_on_another_module_is_left() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input_size = 4
            self.up, self.down = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(2, 6))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.relu(F.linear(x, self.up)), self.down)

    model = Written()
    assert surgery.widen(model, surgery.Units({"up": [1]})).operated == {"up": (1,)}
    assert model.input_size == 4


# -- patterns of einops ----------------------------------------------------------------------------------------------

einops: Any = pytest.importorskip("einops")


class Rearranged(Forward):
    """A convolution or a linear layer over time, a pattern, and a head that reads `size` entries."""

    def __init__(self, pattern: str, size: int, **sizes: int) -> None:
        one = nn.Linear(5, 3) if "t" in pattern else nn.Conv2d(1, 3, 3)
        super().__init__(one=one, head=nn.Linear(size, 2))
        self.pattern, self.sizes = pattern, sizes

    def forward(self, x: Tensor) -> Tensor:
        return self.head(einops.rearrange(F.relu(self.one(x)), self.pattern, **self.sizes))  # type: ignore[no-any-return]


IMAGE, TIMES = (6, 1, 4, 4), (6, 4, 5)


@pytest.mark.parametrize(
    ("pattern", "size", "columns", "shape"),
    [
        ("b c h w -> b (c h w)", 12, 4, IMAGE),
        ("b c h w -> b (h w c)", 12, 4, IMAGE),
        ("b c h w -> b h (w c)", 6, 2, IMAGE),
        ("b c h w -> (b h) w c", 3, 1, IMAGE),
        ("b c h w -> b () w h c", 3, 1, IMAGE),
        ("(b d) c h w -> b d (c h w)", 12, 4, IMAGE),
        ("... c h w -> ... (c h w)", 12, 4, IMAGE),
        ("b ... t c -> b ... (t c)", 12, 4, TIMES),
        ("... b t c -> ... (b t) c", 3, 1, TIMES),
        ("b t c -> b (t c)", 12, 4, TIMES),
        ("b t c -> t b c", 3, 1, TIMES),
        ("b (t d) c -> b t (d c)", 6, 2, TIMES),
    ],
)
def test_units_are_followed_through_a_pattern(pattern: str, size: int, columns: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    sizes = {"d": 2} if "d" in pattern else {}
    model, x = Rearranged(pattern, size, **sizes).double(), torch.randn(shape).double()
    assert surgery.consumers(model).readers == {"one": {"head": columns}}
    silence(readers_of(model, "one"), unit=1)
    before = model(x)
    with with_louder(model, "one", unit=1):
        assert torch.equal(model(x), before)
    with with_louder(model, "one", unit=0):
        assert not torch.allclose(model(x), before)


@pytest.mark.parametrize(
    ("pattern", "size", "reason"),
    [
        ("b c h w -> h (b c w)", 36, "flattened together with the batch"),
        ("b (c d) h w -> b h w d c", 1, "where 'b (c d) h w -> b h w d c' leaves its units"),
        ("b c ... -> b (c ...)", 12, "which of the axes of 'b c ... -> b (c ...)' is that of its units"),
        ("b c h w -> b (h c w)", 12, "how 12 entries are shared out"),
        ("b c h w -> b h c w", 2, "reads it along another axis"),
        ("... c h w -> c h w ...", 6, "where '... c h w -> c h w ...' leaves its units"),
    ],
)
def test_a_pattern_that_loses_sight_of_the_units_is_a_reason(pattern: str, size: int, reason: str) -> None:
    model = Rearranged(pattern, size, **({"d": 3} if "d" in pattern else {}))
    with pytest.raises(SiteError) as caught:
        surgery.consumers(model).require(["one"])
    assert reason in str(caught.value)


def test_a_number_of_units_that_a_pattern_says_is_not_widened() -> None:
    units = surgery.Units({"one": [1]})
    free, said = (Rearranged("b t c -> (b t) c", 3, **sizes) for sizes in ({}, {"c": 3}))
    assert surgery.widen(free, units).num_units == 1
    assert "says how many entries there are" in surgery.widen(said, units).declined["one"]


def test_a_pattern_is_read_axis_by_axis() -> None:
    assert axes_of_pattern(" b (c  h)... () (1 w) 1 ") == [["b"], ["c", "h"], ["..."], ["1"], ["w"], ["1"]]
