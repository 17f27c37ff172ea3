"""The PyTorch backend passes the contract of backends, for a Sequential and for a module with a forward of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronsurgery.pytorch
from tests.backend_contract import Array, BackendContract, Lab


class Functional(nn.Module):
    """Producers by name, the activation in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.hidden(x)))
        return out


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def loss(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = (model(x) - 1).square().mean()
    return out


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    loss(model, x).backward()
    optimizer.step()


def array(values: Any) -> Array:
    found: Array = values.detach().numpy().copy()
    return found


def lab_of(make: Callable[[], nn.Module], site: str, head: str) -> Lab:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return make().double()

    return Lab(
        backend=neuronsurgery.pytorch,
        site=site,
        head=head,
        model=model,
        optimizer=lambda net: torch.optim.Adam(net.parameters(), lr=0.1),
        batch=torch.from_numpy,
        output=lambda net, x: array(net(x)),
        loss=loss,
        differentiate=lambda net, x: loss(net, x).backward(),
        step=step,
        weights=lambda net: {name: array(parameter) for name, parameter in net.named_parameters()},
        incoming=lambda net: array(net.get_submodule(site).weight),
        gradient=lambda net: array(net.get_submodule(site).weight.grad),
        generator=lambda seed: torch.Generator().manual_seed(seed),
    )


class TestPyTorch(BackendContract):
    @pytest.fixture(params=[(sequential, "0", "2"), (Functional, "hidden", "head")], ids=["sequential", "functional"])
    def lab(self, request: Any) -> Lab:
        return lab_of(*request.param)
