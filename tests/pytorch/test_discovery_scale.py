"""Discovery of large models: no forward pass, work that grows with the model's size, and no limit on its depth."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from neuronsurgery import surgery


class Small(nn.Module):
    """A residual block whose ReLU stands on the stream: its value flows through all blocks that follow."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.down(self.act(self.up(x))))


class Looped(nn.Module):
    """A list of blocks, with a forward that cannot be traced and a method beside it."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Small() for _ in range(num_blocks)])

    def forward(self, x: Tensor) -> Tensor:
        for index in range(len(self.blocks)):
            x = self.blocks[index](x)
        return x if x.sum() > 0 else -x

    def generate(self, x: Tensor, num_steps: int) -> Tensor:
        for _ in range(num_steps):
            x = self(x)
        return x


class Nested(nn.Module):
    def __init__(self, inner: nn.Module | None) -> None:
        super().__init__()
        self.enter, self.inner = nn.Linear(4, 4), inner

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.enter(x))
        return h if self.inner is None else self.inner(h)


def nested(num_levels: int) -> nn.Module:
    model = Nested(None)
    for _ in range(num_levels - 1):
        model = Nested(model)
    return model


def flat(num_pairs: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(4, 4) if i % 2 == 0 else nn.ReLU() for i in range(2 * num_pairs)])


def residual(num_blocks: int) -> nn.Module:
    return nn.Sequential(*[Small() for _ in range(num_blocks)])


def encoder(num_layers: int) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), num_layers)


MODELS: dict[str, tuple[Callable[[int], nn.Module], int]] = {
    "flat": (flat, 1),
    "residual": (residual, 2),
    "looped": (Looped, 2),
    "encoder": (encoder, 1),
    "nested": (nested, 1),
}
"""Name -> how to build a model of a size, and how many sites it has for each step of that size."""


class Operations(TorchDispatchMode):
    """Counts what torch computes with real numbers; states of random generators are none."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        self.count += any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_calls() -> Iterator[list[str]]:
    """The modules that are called, by class."""
    called: list[str] = []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, _: called.append(type(module).__name__))
    try:
        yield called
    finally:
        handle.remove()


@pytest.mark.parametrize("name", MODELS)
def test_discovery_calls_no_module_and_computes_nothing(name: str):
    build, num_sites = MODELS[name]
    model = build(5)
    with counted_calls() as called, Operations() as operations:
        found = surgery.discover(model)
        assert (called, operations.count) == ([], 0)
        model(torch.ones(2, 3, 4))
    assert called and operations.count > 5, "the counters should see a forward pass"
    assert len(found) == 5 * num_sites


def num_calls(model: nn.Module) -> int:
    """How many Python functions run while a model is discovered."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        surgery.discover(model)
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("name", [name for name in MODELS if name != "nested"])
def test_discovery_does_at_most_twice_the_work_for_twice_the_modules(name: str):
    build, _ = MODELS[name]
    surgery.discover(build(2))  # what is done once for a class
    small, large = num_calls(build(40)), num_calls(build(80))
    assert large <= 2.1 * small, (small, large)


@pytest.mark.parametrize("name", ["residual", "nested"])
def test_a_model_deeper_than_pythons_stack_is_followed_to_its_end(name: str):
    build, num_sites = MODELS[name]
    num_levels = 150 if name == "nested" else 300
    assert len(surgery.discover(build(num_levels))) == num_sites * num_levels


class Swapped(nn.Module):
    """Calls layers of its own, so that banks take what discovery knows of their activation functions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(0.1), nn.Linear(4, 4), nn.LeakyReLU(0.3))

    def forward(self, x: Tensor) -> Any:
        for layer in self.net:
            x = layer(x)
        return x


def test_what_is_known_of_one_activation_module_is_not_taken_for_another_with_other_settings():
    torch.manual_seed(0)
    model, x = Swapped().double(), torch.randn(8, 4, dtype=torch.float64)
    setattr(model.net[1], "negative_slope", 0.7)  # noqa: B010
    before = model(x)
    surgery.knife(model, surgery.Units({"net.0": [0, 1], "net.2": [2]}))
    assert float((model(x) - before).detach().abs().max()) <= 1e-12
