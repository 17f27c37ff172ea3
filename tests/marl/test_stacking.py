"""What can be computed for many seeds at once, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from marl.errors import SettingsError
from marl.layers import GroupedLinear
from marl.stacking import load_module, stack_modules
from neuronsurgery import surgery


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 4), lambda: GroupedLinear(2, 3, 4)])
def test_a_stacked_layer_computes_each_seed_on_its_own_input(make: type[nn.Module]) -> None:
    seeds = [make().double() for _ in range(3)]
    x = torch.randn(3, 5, 6, 2, 3).double()
    found = stack_modules(seeds)(x)
    for seed, layer in enumerate(seeds):
        assert torch.allclose(found[seed], layer(x[seed]))


def test_a_stacked_cell_steps_as_each_cell_does() -> None:
    cells = [nn.GRUCell(3, 4).double() for _ in range(3)]
    x, hidden = torch.randn(3, 5, 3).double(), torch.randn(3, 5, 4).double()
    found = stack_modules(cells)(x, hidden)
    for seed, cell in enumerate(cells):
        assert torch.allclose(found[seed], cell(x[seed], hidden[seed]))


def test_a_grouped_layer_is_a_linear_layer_for_each_group() -> None:
    layer, x = GroupedLinear(2, 3, 4), torch.randn(5, 2, 3)
    for group in range(2):
        alone = nn.functional.linear(x[:, group], layer.weight[group].T, layer.bias[group])
        assert torch.allclose(layer(x)[:, group], alone, atol=1e-6)


def test_a_grouped_layer_starts_as_linear_layers_do() -> None:
    grouped, linear = GroupedLinear(10, 64, 50), nn.Linear(64, 500)
    for one, other in ((grouped.weight, linear.weight), (grouped.bias, linear.bias)):
        assert float(one.detach().abs().max()) <= 1 / 8
        assert float(one.detach().std()) == pytest.approx(float(other.detach().std()), rel=0.1)


def test_the_modules_stacked_stay_as_they_are() -> None:
    seeds = [nn.Sequential(nn.Linear(3, 4), nn.ReLU()) for _ in range(2)]
    stacked = stack_modules(seeds)
    with torch.no_grad():
        stacked.get_parameter("0.weight").zero_()
    assert all(type(seed[0]) is nn.Linear and seed[0].weight.abs().max() > 0 for seed in seeds)
    load_module(seeds[0], stacked, seed=0)
    assert seeds[0].get_parameter("0.weight").abs().max() == 0


def test_layers_with_frozen_rows_are_refused() -> None:
    seeds = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2)]
    for seed in seeds:
        surgery.knife(seed, surgery.Units({"0": [1]}))
    with pytest.raises(SettingsError, match=r"found 'composite' .* on it: stack learners before"):
        stack_modules(seeds)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([], "at least one seed"),
        ([nn.Linear(2, 3), nn.Linear(2, 4)], "number 1 differs"),
        ([nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh())], "number 1 differs"),
        ([nn.LayerNorm(3), nn.LayerNorm(3)], "LayerNorm, found its own tensor 'weight'"),
    ],
)
def test_what_has_no_stacked_form_is_refused(modules: list[nn.Module], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        stack_modules(modules)
