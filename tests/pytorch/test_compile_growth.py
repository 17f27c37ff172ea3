"""How often torch.compile compiles a model again while it is operated on: once for the first operation, then never."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from neuronsurgery import surgery

WHAT = "1,000 operations under torch.compile(fullgraph=True)"
NUM_UNITS = 8


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Scope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.out = nn.Linear(4, NUM_UNITS), nn.Linear(NUM_UNITS, 100), nn.Linear(100, 2)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.relu(self.inner(torch.relu(self.enter(x)))))


def sequential() -> nn.Module:
    first = (nn.Linear(4, NUM_UNITS), nn.LayerNorm(NUM_UNITS), nn.ReLU())
    return nn.Sequential(*first, nn.Linear(NUM_UNITS, 100), nn.BatchNorm1d(100), nn.ReLU(), nn.Linear(100, 2))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, str]]] = {
    "a scope": (Scope, ("enter", "inner")),
    "a Sequential": (sequential, ("0", "3")),
}
PATTERNS: dict[str, Callable[[int], list[int]]] = {
    "one unit again and again": lambda i: [0],
    "each unit in turn": lambda i: [i % NUM_UNITS],
    "several at a time": lambda i: sorted({0, i % 3, i % NUM_UNITS}),
}


def x() -> Tensor:
    return torch.linspace(-1.0, 1.0, 20).view(5, 4)


def compilations(model: nn.Module, sites: tuple[str, ...], pattern: str, num_operations: int) -> list[int]:
    """How often the model had been compiled after each training step: one before, one after each operation."""
    counter = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)  # where the limit is hit, this raises
    counts = []
    for index in range(num_operations + 1):
        compiled(x()).square().sum().backward()
        counts.append(counter.frame_count)
        if index < num_operations:
            units = PATTERNS[pattern](index)
            surgery.knife(model, surgery.Units(dict.fromkeys(sites, units)), max_growth=1e6)
    assert torch.allclose(compiled(x()), model(x()), atol=1e-5)
    return counts


@pytest.mark.situation("Compile and export", WHAT, "works")
@pytest.mark.parametrize(
    ("name", "pattern"), [("a Sequential", "several at a time"), *(("a scope", p) for p in PATTERNS)]
)
def test_only_the_first_operation_recompiles(name: str, pattern: str):
    build, sites = MODELS[name]
    model = build()
    counts = compilations(model, sites, pattern, num_operations=20)
    bank: Any = model.get_submodule(f"{sites[0]}.composite")
    assert len(bank.frozen_weight) >= 4 * NUM_UNITS, "the bank should have grown twice"
    assert counts == [1, *[2] * 20]


@pytest.mark.slow
@pytest.mark.situation("Compile and export", WHAT, "works")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_thousand_operations_recompile_once(pattern: str):
    assert compilations(Scope(), ("enter",), pattern, num_operations=1000) == [1, *[2] * 1000]


def test_wide_layers_recompile_once_while_all_their_units_are_operated_on_one_after_another():
    model = Scope()
    counter = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    for index in range(0, 100, 10):
        compiled(x())
        surgery.knife(model, surgery.Units({"inner": range(index, index + 10)}), max_growth=1e6)
    assert (compiled(x()).shape, counter.frame_count) == ((5, 2), 2)


def test_layers_that_join_one_after_another_recompile_once_each_and_never_as_they_grow():
    model = Scope()
    counter = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    counts = []
    for index in range(24):
        compiled(x())
        counts.append(counter.frame_count)
        site = "enter" if index < 3 or index % 2 else "inner"
        surgery.knife(model, surgery.Units({site: [index % 5]}), max_growth=1e6)
    assert counts == [1, 2, 2, 2, 2, *[3] * 19]


def test_training_evaluation_and_undo_add_their_own_compilations_only_once():
    model = Scope()
    counter = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(6):
        report = surgery.knife(model, surgery.Units({"enter": [0, 1], "inner": [5]}), max_growth=1e6)
        compiled.train()(x()).sum().backward()
        with torch.no_grad():
            compiled.eval()(x())
        surgery.undo(model, report)
        compiled.train()(x()).sum().backward()
        surgery.knife(model, surgery.Units({"enter": [0, 1], "inner": [5]}), max_growth=1e6)
    assert counter.frame_count == 3  # operated on in training, in evaluation, and without banks after the first undo


@pytest.mark.parametrize("change", ["deepcopy", "double", "assign"])
def test_a_bank_that_was_copied_cast_or_loaded_still_grows_without_recompilation(change: str):
    model: Any = Scope()
    surgery.knife(model, surgery.Units({"enter": [0]}))
    data = x()
    if change == "deepcopy":
        model = copy.deepcopy(model)
    elif change == "double":
        model, data = model.double(), data.double()
    else:
        model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    counter = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(10):
        compiled(data)
        surgery.knife(model, surgery.Units({"enter": [0, 3]}), max_growth=1e6)
    assert counter.frame_count <= (2 if change == "assign" else 1)  # assigned rows are marked when the bank grows


def test_without_dynamic_shapes_a_bank_grows_without_recompilation_too():
    model = Scope()
    surgery.knife(model, surgery.Units({"enter": [0]}))
    counter = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for _ in range(10):
        compiled(x())
        surgery.knife(model, surgery.Units({"enter": [0, 3]}), max_growth=1e6)
    assert counter.frame_count == 1


def test_weights_that_are_computed_recompile_at_most_once_for_each_doubling():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2))
    counter = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    compiled(x())
    rooms = []
    for _ in range(5):
        surgery.knife(model, surgery.Units({"0": [0, 1]}), max_growth=1e6)
        compiled(x())
        rooms.append(len(model[0].composite.frozen_weight))  # type: ignore[arg-type, union-attr]
    assert rooms == [8, 8, 16, 16, 32] and counter.frame_count == 1 + 3
