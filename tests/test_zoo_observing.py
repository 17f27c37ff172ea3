"""Hidden units are counted as the page says, on networks whose count can be read off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo import ZOO, Animal
from tests.zoo.observing import hidden_units


class Net(nn.Module):
    """A function on the parameters of modules that are given by name."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def linear(inner: int = 4, outer: int = 6) -> nn.Linear:
    return nn.Linear(inner, outer)


Build = Callable[[], nn.Module]
CASES: dict[str, tuple[Build, tuple[int, ...], dict[tuple[str, ...], int]]] = {
    "a head is not hidden": (
        lambda: nn.Sequential(linear(), nn.ReLU(), linear(6, 3)),
        (5, 4),
        {("0.weight",): 6},
    ),
    "softmax counts nothing": (lambda: nn.Sequential(linear(), nn.Softmax(-1)), (5, 4), {}),
    "a norm made of powers and roots counts nothing": (
        lambda: Net(lambda m, x: m.a(x) * m.a(x).pow(2).mean(-1, keepdim=True).rsqrt(), a=linear()),
        (5, 4),
        {},
    ),
    "a sum over units ends them": (lambda: Net(lambda m, x: m.a(x).sum(-1).relu(), a=linear()), (5, 4), {}),
    "another product ends them": (
        lambda: Net(lambda m, x: (m.a(x).transpose(0, 1) @ x).relu(), a=linear()),
        (5, 4),
        {},
    ),
    "norm, dropout and arithmetic leave them": (
        lambda: Net(
            lambda m, x: torch.tanh(F.dropout(m.norm(m.a(x)) * m.scale + 1.0) / x.mean()),
            a=linear(),
            norm=nn.LayerNorm(6),
            scale=weight(6),
        ),
        (5, 4),
        {("a.weight",): 6},
    ),
    "a channel is a unit, through BatchNorm and pooling": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.ReLU()),
        (2, 2, 10, 10),
        {("0.weight",): 4},
    ),
    "pooling over units ends them": (
        lambda: nn.Sequential(linear(), nn.Unflatten(-1, (2, 3)), nn.AvgPool2d((1, 3)), nn.ReLU()),
        (5, 1, 4),
        {},
    ),
    "channels of grouped and transposed convolutions": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 8, 3, groups=4), nn.ReLU(), nn.ConvTranspose1d(8, 6, 3, groups=2), nn.ReLU()
        ),
        (2, 4, 9),
        {("0.weight",): 8, ("2.weight",): 6},
    ),
    "two products joined before the activation function are one unit": (
        lambda: Net(lambda m, x: torch.relu(m.a(x) + m.b(x)), a=linear(), b=linear()),
        (5, 4),
        {("a.weight", "b.weight"): 6},
    ),
    "a product added to another by addmm joins it": (
        lambda: Net(lambda m, x: torch.relu(torch.addmm(m.a(x), x, m.w)), a=linear(), w=weight(4, 6)),
        (5, 4),
        {("w", "a.weight"): 6},
    ),
    "two products side by side are units of their own": (
        lambda: Net(lambda m, x: torch.relu(torch.cat([m.a(x), x, m.b(x)], -1)), a=linear(), b=linear()),
        (5, 4),
        {("a.weight",): 6, ("b.weight",): 6},
    ),
    "a residual whose own activation was applied adds none": (
        lambda: Net(lambda m, x: torch.relu(m.b(h := torch.relu(m.a(x))) + h), a=linear(), b=linear(6, 6)),
        (5, 4),
        {("a.weight",): 6, ("b.weight",): 6},
    ),
    "a residual of pre-activations joins": (
        lambda: Net(lambda m, x: torch.relu(m.b(torch.relu(h := m.a(x))) + h), a=linear(), b=linear(6, 6)),
        (5, 4),
        {("a.weight", "b.weight"): 6},
    ),
    "only the half that enters the activation function": (
        lambda: Net(lambda m, x: F.silu(m.a(x).chunk(2, -1)[0]) * m.a(x).chunk(2, -1)[1], a=linear()),
        (5, 4),
        {("a.weight",): 3},
    ),
    "the gated half of GLU": (lambda: nn.Sequential(linear(), nn.GLU()), (5, 4), {("0.weight",): 3}),
    "a layer called twice counts once": (
        lambda: Net(lambda m, x: torch.relu(m.a(torch.relu(m.a(x)))), a=linear(4, 4)),
        (5, 4),
        {("a.weight",): 4},
    ),
    "rows and columns of one weight are different units": (
        lambda: Net(lambda m, x: torch.relu(F.linear(torch.relu(F.linear(x, m.w)), m.w.t())), w=weight(6, 4)),
        (5, 4),
        {("w",): 10},
    ),
    "units of stacked weights": (
        lambda: Net(lambda m, x: torch.relu(torch.einsum("bi,eio->beo", x, m.w)), w=weight(3, 4, 6)),
        (5, 4),
        {("w",): 18},
    ),
    "a matrix in front of the values": (
        lambda: Net(lambda m, x: torch.relu(m.w @ x), w=weight(6, 4)),
        (2, 4, 5),
        {("w",): 6},
    ),
    "a matrix broadcast over a batch": (
        lambda: Net(lambda m, x: torch.relu(x.transpose(1, 2) @ m.w), w=weight(4, 6)),
        (2, 4, 5),
        {("w",): 6},
    ),
    "the experts that are chosen": (
        lambda: Net(lambda m, x: sum(torch.relu(F.linear(x, m.w[i])).sum() for i in (0, 2)), w=weight(3, 6, 4)),
        (5, 4),
        {("w",): 12},
    ),
    "weights computed from parameters": (
        lambda: nn.Sequential(
            parametrizations.weight_norm(linear()), nn.ReLU(), parametrizations.spectral_norm(linear(6, 5)), nn.ReLU()
        ),
        (5, 4),
        {("0.parametrizations.weight.original1",): 6, ("2.parametrizations.weight.original",): 5},
    ),
    "weights generated from the input are no producer": (
        lambda: Net(lambda m, x: torch.relu(x.unsqueeze(1) @ m.a(x).view(-1, 4, 2)), a=linear(4, 8)),
        (5, 4),
        {},
    ),
    "three gates of a GRU, four of an LSTM": (
        lambda: Net(lambda m, x: m.lstm(m.gru(x)[0])[0], gru=nn.GRU(4, 5), lstm=nn.LSTM(5, 3)),
        (7, 2, 4),
        {("gru.weight_ih_l0", "gru.weight_hh_l0"): 15, ("lstm.weight_ih_l0", "lstm.weight_hh_l0"): 12},
    ),
    "torch's transformer layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (2, 3, 8),
        {("linear1.weight",): 16},
    ),
    "in place": (
        lambda: Net(lambda m, x: F.relu_(m.a(x).mul_(2.0).add_(m.b(x))), a=linear(), b=linear()),
        (5, 4),
        {("a.weight", "b.weight"): 6},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_hidden_units_are_counted_as_they_can_be_read_off(case: str) -> None:
    build, shape, expected = CASES[case]
    x = torch.randn(shape, dtype=torch.float64)
    found = hidden_units(build().double(), lambda model: model(x))
    assert dict(found.units) == expected
    assert found.num_units == sum(expected.values())


@pytest.mark.parametrize("animal", ZOO, ids=str)
def test_every_site_of_the_animals_is_seen_by_watching_it_run(animal: Animal) -> None:
    model, batch = animal.build(), animal.batch()
    found = hidden_units(model, lambda model: model(*batch))
    seen = {name for names in found.units for name in names}
    assert {site for site in animal.sites if not any(f"{name}.".startswith(f"{site}") for name in seen)} == set()


def test_watching_leaves_no_mode_behind() -> None:
    before = torch.utils._python_dispatch._len_torch_dispatch_stack()  # type: ignore[attr-defined]
    hidden_units(linear(), lambda model: model(torch.randn(2, 4)))
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == before  # type: ignore[attr-defined]
