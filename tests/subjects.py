"""Small models with optimizers, data and the units to operate on: what the tests of operations are run over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

__all__ = ["MODELS", "OPTIMIZERS", "Subject", "subject"]

UnitsOf = Mapping[str, Sequence[int]]


class Functional(nn.Module):
    """Producers that are Parameters used by F.linear."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(16, 4) / 2)
        self.b1 = nn.Parameter(torch.zeros(16))
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(F.linear(x, self.w1, self.b1)))
        return out


class Shared(nn.Module):
    """Two layers that hold one weight and one bias, each with an activation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 16)
        self.one = nn.Linear(16, 16)
        self.two = nn.Linear(16, 16)
        self.two.weight, self.two.bias = self.one.weight, self.one.bias
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.enter(x))
        h = h + F.relu(self.one(h))
        out: Tensor = self.head(F.relu(self.two(h)))
        return out


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 2))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(64, 16), nn.GELU(),
        nn.Linear(16, 2),
    )  # fmt: skip


def prelu() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.PReLU(16), nn.Linear(16, 2))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "sequential": (sequential, ("0", "2")),
    "functional": (Functional, ("w1",)),
    "shared": (Shared, ("one", "enter")),
    "conv": (conv, ("0", "4")),
    "prelu": (prelu, ("0",)),
}
"""Name -> how to make the model, and its sites; each has 16 units."""

Make = Callable[[Sequence[nn.Parameter]], list[Optimizer]]


def one(make: Callable[..., Optimizer]) -> Make:
    return lambda parameters: [make(parameters)]


def two(parameters: Sequence[nn.Parameter]) -> list[Optimizer]:
    return [Adam(parameters[:2], lr=1e-2), SGD(parameters[2:], lr=1e-2, momentum=0.9)]


OPTIMIZERS: dict[str, Make] = {
    "adam": one(partial(Adam, lr=1e-2)),
    "adamw": one(partial(AdamW, lr=1e-2, weight_decay=0.1)),
    "sgd": one(partial(SGD, lr=1e-2)),
    "sgd-momentum": one(partial(SGD, lr=1e-2, momentum=0.9)),
    "sgd-dampening": one(partial(SGD, lr=1e-2, momentum=0.9, dampening=0.5)),
    "rmsprop": one(partial(RMSprop, lr=1e-2)),
    "two": two,
}


@dataclass(frozen=True, eq=False)
class Subject:
    """A model that is being trained."""

    model: Any
    sites: tuple[str, ...]
    optimizers: list[Optimizer]
    x: Tensor

    def units(self, *units: int) -> dict[str, list[int]]:
        """The same units of every site."""
        return {name: list(units) for name in self.sites}

    def loss(self) -> Tensor:
        out: Tensor = (self.model(self.x) - 1).square().mean()
        return out

    def backward(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.loss().backward()

    def train(self, num_steps: int = 1) -> None:
        """Training steps; the gradients of the last one stay."""
        for _ in range(num_steps):
            self.backward()
            for optimizer in self.optimizers:
                optimizer.step()


def subject(model: str = "sequential", optimizer: str = "adam", num_steps: int = 3) -> Subject:
    """The same subject for the same arguments, bit for bit, after some training steps."""
    torch.manual_seed(3)
    make, sites = MODELS[model]
    net = make()
    x = torch.randn(8, 1, 2, 2) if model == "conv" else torch.randn(8, 4)
    found = Subject(net, sites, OPTIMIZERS[optimizer](list(net.parameters())), x)
    found.train(num_steps)
    return found
