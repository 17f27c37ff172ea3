"""torch.compile, torch.export and autocast over everything that a path may hold: what they give is what eager gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronsurgery import surgery


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm = nn.Linear(4, 6), nn.LayerNorm(6)
        self.inner, self.batch_norm, self.out = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.norm(self.enter(x)))
        return self.out(F.gelu(self.batch_norm(self.inner(h)) + h))


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(3, 6, 3, groups=3), nn.GroupNorm(2, 6)
        self.up, self.dropout, self.out = nn.ConvTranspose2d(6, 4, 2), nn.Dropout(0.3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.relu(self.dropout(self.up(F.silu(self.norm(self.depthwise(x)))))))


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(3, 1, 5))
        self.out = nn.Parameter(torch.randn(3, 5, 1))

    def forward(self, x: Tensor) -> Any:
        return torch.relu(x @ self.weight + self.bias) @ self.out


def sequential() -> nn.Module:
    first = [nn.Linear(4, 6), nn.BatchNorm1d(6), nn.PReLU(6)]
    return nn.Sequential(*first, nn.Linear(6, 5), nn.LayerNorm(5), nn.Dropout(0.2), nn.ReLU(), nn.Linear(5, 2))


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 2))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (8, 4)),
    "images": (Images, (2, 3, 8, 8)),
    "ensemble": (Ensemble, (8, 4)),
    "sequential": (sequential, (8, 4)),
    "weight norm": (weight_normed, (8, 4)),
}
EVERY = pytest.mark.parametrize("name", MODELS)
MODES = pytest.mark.parametrize("mode", ["train", "eval"])


def operated(name: str, mode: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build().train(mode == "train")
    operate_on_two(model)
    return model, torch.randn(shape)


def operate_on_two(model: nn.Module) -> None:
    sites = surgery.discover(model)
    assert sites
    surgery.knife(model, surgery.Units({site: [0, 2] for site in sites}))


def seeded(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    torch.manual_seed(1)
    return model(x)


@EVERY
@MODES
def test_a_compiled_model_gives_what_it_gives_without_also_after_another_operation(name: str, mode: str):
    model, x = operated(name, mode)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        eager = copy.deepcopy(model)
        found, expected = seeded(compiled, x), seeded(eager, x)
        assert torch.allclose(found, expected, atol=1e-6)
        found.square().sum().backward()
        expected.square().sum().backward()
        for (key, mine), other in zip(model.named_parameters(), eager.parameters(), strict=True):
            assert (mine.grad is None) == (other.grad is None)
            assert mine.grad is None or torch.allclose(mine.grad, other.grad, atol=1e-5), key  # type: ignore[arg-type]
        model.zero_grad()
        operate_on_two(model)


@EVERY
def test_an_exported_model_gives_what_the_model_gives(name: str):
    model, x = operated(name, "eval")
    program: Any = torch.export.export(model, (x,)).module()
    assert torch.allclose(program(x), model(x), atol=1e-6)


@EVERY
@MODES
def test_an_operation_keeps_output_and_dtype_under_autocast(name: str, mode: str):
    model, x = operated(name, mode)
    untouched = copy.deepcopy(model)
    operate_on_two(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = seeded(model, x), seeded(untouched, x)
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= 2.0**-6 * expected.abs().max()
