"""Modules as users write them, compared with what they gave before an operation: same output, or a clear error."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neuronsurgery import surgery
from neuronsurgery.surgery import SurgeryError, Units
from tests.assertions import TOLERANCES

UNITS = [1, 2, 3, 4]


class Parts(nn.Module):
    """Parameters for the calls below; `forward` has an argument that chooses among them."""

    def __init__(self):
        super().__init__()
        self.fc, self.out = nn.Linear(4, 8), nn.Linear(8, 2)
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.batch_norms = nn.ModuleList([nn.BatchNorm1d(8), nn.BatchNorm1d(8)])
        self.slopes = nn.ModuleList([nn.PReLU(8), nn.PReLU(8)])
        self.weight = nn.Parameter(torch.randn(8, 4))
        self.first_bias, self.second_bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.kernel, self.last = nn.Parameter(torch.randn(8, 2, 3, 3)), nn.Conv2d(8, 2, 1)


class AnotherNorm(Parts):
    def forward(self, x, other=False):
        return self.out(F.relu(self.norms[int(other)](self.fc(x))))


class AnotherBatchNorm(Parts):
    def forward(self, x, other=False):
        return self.out(F.relu(self.batch_norms[int(other)](self.fc(x))))


class AnotherSlope(Parts):
    def forward(self, x, other=False):
        return self.out(self.slopes[int(other)](self.fc(x)))


class AnotherBias(Parts):
    def forward(self, x, other=False):
        return self.out(F.relu(F.linear(x, self.weight, self.second_bias if other else self.first_bias)))


class AnotherDilation(Parts):
    def forward(self, x, other=False):
        reach = 2 if other else 1
        return self.last(F.relu(F.conv2d(x, self.kernel, None, 1, reach, reach)))


class AnotherAxis(Parts):
    def forward(self, x, other=False):
        z = self.fc(x)
        return self.out(F.relu(z.transpose(1, 2) if other else z * 2.0))


class AnotherMask(Parts):
    def forward(self, x, other=None):
        z = self.fc(x)
        return self.out(F.relu(z if other is None else z.masked_fill(other, -1.0)))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def made(cls):
    """A model in float64 whose parameters are all apart from one another."""
    model = cls().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def assert_near(found, expected):
    assert float((found - expected).detach().abs().max()) <= TOLERANCES[torch.float64] * 100


CHOICES = [
    (AnotherNorm, "fc", (5, 4)),
    (AnotherBatchNorm, "fc", (5, 4)),
    (AnotherSlope, "fc", (5, 4)),
    (AnotherBias, "weight", (5, 4)),
    (AnotherDilation, "kernel", (2, 2, 6, 6)),
]


@pytest.mark.parametrize(("cls", "site", "shape"), CHOICES)
def test_a_call_that_passes_other_parameters_or_settings_is_refused_not_answered_wrongly(cls, site, shape):
    model, x = made(cls), torch.randn(shape, dtype=torch.float64)
    before = model(x)
    surgery.knife(model, Units({site: UNITS}))
    assert_near(model(x), before)
    with pytest.raises(SurgeryError, match=site):
        model(x, True)


@pytest.mark.parametrize("cls", [AnotherAxis, AnotherMask])
def test_a_call_with_other_links_keeps_its_output(cls):
    model, x = made(cls), torch.randn(5, 8, 4, dtype=torch.float64)
    other = torch.rand(8, 8) > 0.5 if cls is AnotherMask else True
    before = model(x), model(x, other)
    surgery.knife(model, Units({"fc": UNITS}))
    assert_near(model(x), before[0])
    assert_near(model(x, other), before[1])
