"""Modules as users write them, compared with what they gave before an operation: same output, or a clear error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class Head(nn.Module):
    """Returns a pre-activation, for whoever calls it to activate."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x)


class TwoCallers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 8), Head()
        self.block, self.out = nn.Sequential(self.head, nn.ReLU()), nn.Linear(8, 2)

    def forward(self, x):
        h = F.relu(self.first(x))
        return self.out(F.relu(self.head(h)) + self.block(h))


def test_a_child_whose_pre_activation_a_forward_and_a_sequential_activate_keeps_its_output():
    model, x = made(TwoCallers), torch.randn(5, 4, dtype=torch.float64)
    before = model(x)
    surgery.knife(model, Units({"head.fc": UNITS}))
    assert_near(model(x), before)


class Stacked(nn.Module):
    """Three experts of six units each."""

    def __init__(self):
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(6, 2))

    def forward(self, x):
        return F.relu(torch.matmul(x, self.weight)) @ self.last


def test_stacked_weights_given_a_vector_name_the_axes_they_miss():
    model = made(Stacked)
    surgery.knife(model, Units({"weight": [0, 7]}))
    with pytest.raises(SurgeryError, match="axes"):
        model(torch.randn(4, dtype=torch.float64))


class StackedBias(Stacked):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(3, 1, 6))

    def forward(self, x):
        return F.relu(torch.matmul(x, self.weight) + self.bias) @ self.last


def test_a_bias_that_adds_an_axis_to_the_product_of_a_vector_is_a_clear_error():
    model = made(StackedBias)
    surgery.knife(model, Units({"weight": [0, 7]}))
    with pytest.raises(SurgeryError, match="axes"):
        model(torch.randn(4, dtype=torch.float64))


class ChosenNoise(Parts):
    def __init__(self):
        super().__init__()
        self.first_noise, self.second_noise = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8, 4))
        self.draw = nn.Buffer(torch.randn(8, 4))

    def forward(self, x, other=False):
        noise = self.second_noise if other else self.first_noise
        return self.out(F.relu(F.linear(x, self.weight + noise * self.draw, self.first_bias)))


def test_a_weight_computed_from_a_parameter_without_frozen_rows_is_a_clear_error():
    model, x = made(ChosenNoise), torch.randn(5, 4, dtype=torch.float64)
    before = model(x)
    surgery.knife(model, Units({"weight": UNITS}))
    assert_near(model(x), before)
    with pytest.raises(SurgeryError, match="second_noise"):
        model(x, True)


class Inner(Parts):
    def forward(self, x):
        return self.out(F.relu(F.linear(x, self.weight)))


class CallsWhatItsChildCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Inner()

    def forward(self, x):
        h = self.part.out(F.relu(F.linear(x, self.part.weight)))
        return self.part(x) + h


def test_a_layer_that_a_scope_calls_before_a_child_of_it_calls_it_too_keeps_its_output():
    model, x = made(CallsWhatItsChildCalls), torch.randn(5, 4, dtype=torch.float64)
    before = model(x)
    surgery.knife(model, Units({"part.weight": UNITS}))
    assert_near(model(x), before)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.sig = nn.Parameter(torch.randn(8, 4))


class TwoScales(Parts):
    """Two tensors that have the same name in their modules, to compute a weight from."""

    def __init__(self):
        super().__init__()
        self.p, self.q = Scale(), Scale()
        self.draw = nn.Buffer(torch.randn(8, 4))


class ChosenScale(TwoScales):
    def forward(self, x, other=False):
        return self.out(F.relu(F.linear(x, self.weight + (self.q if other else self.p).sig * self.draw)))


@pytest.mark.parametrize("prefix", ["", "0."])
def test_a_weight_computed_from_a_namesake_of_what_the_bank_has_rows_of_is_refused(prefix):
    part, x = made(ChosenScale), torch.randn(5, 4, dtype=torch.float64)
    model = nn.Sequential(part) if prefix else part
    before = model(x)
    surgery.knife(model, Units({f"{prefix}weight": UNITS}))
    assert_near(model(x), before)
    with pytest.raises(SurgeryError, match=r"weight.*q\.sig"):
        part(x, True)
    assert_near(model(x), before)


class NoisyInTraining(TwoScales):
    """Has its noise in training alone."""

    def forward(self, x):
        weight = self.weight + self.p.sig * self.draw if self.training else self.weight * 1.5
        return self.out(F.relu(F.linear(x, weight)))


class Around(nn.Module):
    """A second scope that calls the same layer, always with noise."""

    def __init__(self):
        super().__init__()
        self.part = NoisyInTraining()

    def forward(self, x):
        z = F.relu(F.linear(x, self.part.weight + self.part.p.sig * self.part.draw))
        return self.part(x) + self.part.out(z)


def test_a_source_that_one_mode_or_one_of_two_scopes_reads_is_known_in_all_of_them():
    model, x = made(Around), torch.randn(5, 4, dtype=torch.float64)
    before = [model.train(mode)(x) for mode in (True, False)]
    surgery.knife(model, Units({"part.weight": UNITS}))
    for mode, expected in zip((True, False), before, strict=True):
        assert_near(model.train(mode)(x), expected)


class ThreeWays(TwoScales):
    """Two methods that compute the weight from namesakes, beside a forward that needs neither."""

    def forward(self, x):
        return self.out(F.relu(F.linear(x, self.weight * 1.5))) + self.first(x) + self.second(x)

    def first(self, x):
        return self.out(F.relu(F.linear(x, self.weight + self.p.sig * self.draw)))

    def second(self, x):
        return self.out(F.relu(F.linear(x, self.weight + self.q.sig * self.draw)))


def test_a_weight_that_a_model_computes_from_two_namesakes_is_declined():
    discovery = surgery.discover(made(ThreeWays))
    assert "weight" not in discovery.sites
    assert "other parameters" in discovery.declined["weight"]


WIDE_NORMS = {
    "tokens": (lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm((3, 8)), nn.ReLU(), nn.Linear(8, 2)), (5, 3, 4)),
    "image": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.LayerNorm((4, 4, 4)), nn.ReLU(), nn.Conv2d(4, 2, 1)
        ),
        (5, 3, 8, 8),
    ),
    "upsampled": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(3, 8, 2, stride=2), nn.LayerNorm((8, 6, 8)), nn.ReLU(), nn.Conv2d(8, 2, 1)
        ),
        (5, 3, 3, 4),
    ),
}


@pytest.mark.parametrize("name", WIDE_NORMS)
def test_a_layer_norm_over_more_axes_than_the_units_can_be_operated_on(name):
    make, shape = WIDE_NORMS[name]
    model, x = made(make), torch.randn(shape, dtype=torch.float64)
    for _ in range(2):
        before = model(x)
        surgery.knife(model, Units({"0": [1, 2]}))
        assert_near(model(x), before)


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(3, 5, 3), nn.Conv1d(5, 2, 1)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.relu(self.conv(x)))


@pytest.mark.parametrize("build", [Convolved, lambda: nn.Sequential(nn.Conv1d(3, 5, 3), nn.ReLU(), nn.Conv1d(5, 2, 1))])
def test_a_convolution_whose_settings_changed_after_the_operation_is_an_error(build: Any):
    model = build()
    name = next(iter(surgery.discover(model)))
    surgery.knife(model, surgery.Units({name: [1]}))
    conv: Any = dict(model.named_modules())[name]
    conv.dilation = conv.padding = (2,)
    with pytest.raises(surgery.SurgeryError, match=r"settings of this Conv1d .* undo the operation before you change"):
        model(torch.randn(2, 3, 9))
    conv.dilation, conv.padding = (1,), (0,)
    assert model(torch.randn(2, 3, 9)).shape == (2, 2, 7)


@pytest.mark.parametrize("make", [lambda: nn.LayerNorm(6), lambda: nn.BatchNorm1d(6), lambda: nn.PReLU(6)])
def test_a_module_on_the_path_that_was_exchanged_after_the_operation_is_an_error(make: Any):
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.out = nn.Linear(4, 6), make(), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Any:
            return self.out(torch.relu(self.norm(self.fc(x))))

    model, x = Normed(), torch.randn(5, 4)
    report = surgery.knife(model, Units({"fc": [1, 4]}))
    old, model.norm = model.norm, make()
    with pytest.raises(SurgeryError, match=r"between the producer 'fc' and its activation function was exchanged"):
        model(x)
    model.norm = old
    before = copy.deepcopy(model)(x)
    assert torch.allclose(model(x), before)
    surgery.undo(model, report)
    assert not [name for name in vars(old) if name.startswith("_neuronsurgery")]


class Opening(nn.Module):
    """Returns pre-activations for a Sequential to go on with; an attribute says what they pass here."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.way = nn.Linear(4, 8), "scaled"

    def forward(self, x: Tensor) -> Any:
        z = self.fc(x)
        if self.way == "moved":
            return z.transpose(1, 2)
        return z * 2.0 + 1.0 if self.way == "shifted" else z * 2.0


@pytest.mark.parametrize("way", ["moved", "shifted"])
def test_a_child_that_opens_a_site_another_way_after_the_operation_is_an_error(way: str):
    model, x = nn.Sequential(Opening(), nn.ReLU(), nn.Linear(8, 2)), torch.randn(5, 8, 4)
    opening: Any = model[0]
    before = model(x)
    surgery.knife(model, Units({"0.fc": [1, 2]}))
    assert torch.allclose(model(x), before, atol=1e-6)
    opening.way = way
    with pytest.raises(SurgeryError, match="passes other operations than it did when it was discovered"):
        model(x)
    opening.way = "scaled"
    assert torch.allclose(model(x), before, atol=1e-6)


def test_a_pre_activation_changed_in_place_before_its_other_reader_is_declined():
    class Shifted(Parts):
        def forward(self, x: Tensor) -> Any:
            z = self.fc(x)
            shifted = z.add_(1.0)
            return self.out(torch.relu(shifted) * z)

    assert "read 2 times" in surgery.discover(Shifted()).declined["fc"]
