"""Producers whose weight is computed from parameters, row by row: weight norm, noisy layers, masks, standardization."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from neuronsurgery import surgery
from neuronsurgery.errors import SurgeryError
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.computing import recipe_of
from neuronsurgery.surgery import Units

TOLERANCE = 1e-12
OPERATIONS = ([0, 3], [3, 1], [3])


# -- layers ----------------------------------------------------------------------------------------------------------


class Masked(nn.Linear):
    """As in MADE: a buffer says which connections there are."""

    mask: Tensor

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out)
        self.register_buffer("mask", (torch.rand(num_out, num_in) > 0.3).to(torch.get_default_dtype()))

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.mask, self.bias)


class Equalized(nn.Module):
    """Equalized learning rate: standard normal weights, scaled where they are used."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(num_out, num_in)), nn.Parameter(torch.empty(num_out))
        self.scale = 1 / math.sqrt(num_in)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.normal_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class Noisy(nn.Module):
    """A layer of NoisyNet with noise in buffers, as it is often written by hand."""

    weight_epsilon: Tensor
    bias_epsilon: Tensor

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.weight_sigma = nn.Parameter(torch.full((num_out, num_in), 0.2))
        self.weight_mu = nn.Parameter(torch.randn(num_out, num_in) * 0.3)
        self.bias_sigma, self.bias_mu = nn.Parameter(torch.full((num_out,), 0.2)), nn.Parameter(torch.randn(num_out))
        self.register_buffer("weight_epsilon", torch.randn(num_out, num_in))
        self.register_buffer("bias_epsilon", torch.randn(num_out))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.linear(x, self.weight_mu, self.bias_mu)
        weight = self.weight_mu + self.weight_sigma * self.weight_epsilon
        return F.linear(x, weight, self.bias_mu + self.bias_sigma * self.bias_epsilon)


class NoisyProperty(nn.Linear):
    """As torchrl's: the weight is a property, noisy in training."""

    weight_epsilon: Tensor

    def __init__(self, num_in: int, num_out: int) -> None:
        nn.Module.__init__(self)
        self.weight_mu = nn.Parameter(torch.empty(num_out, num_in))
        self.weight_sigma = nn.Parameter(torch.empty(num_out, num_in))
        self.bias_mu = nn.Parameter(torch.empty(num_out))
        self.register_buffer("weight_epsilon", torch.randn(num_out, num_in))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.weight_mu.data.uniform_(-1.0, 1.0)
        self.weight_sigma.data.fill_(0.25)
        self.bias_mu.data.uniform_(-1.0, 1.0)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.weight_mu + self.weight_sigma * self.weight_epsilon if self.training else self.weight_mu

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        return self.bias_mu


class DrawnNoise(nn.Module):
    """Noise that is drawn in the forward itself, with a deviation that is kept positive."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.rho, self.mean = nn.Parameter(torch.randn(num_out, num_in)), nn.Parameter(torch.randn(num_out, num_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mean + F.softplus(self.rho).to(x.dtype) * torch.randn_like(self.mean))


class Standardized(nn.Conv2d):
    """Weight standardization (Qiao et al. 2019), with the number of units held as a constant by the view."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        deviation = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(input, weight / deviation, self.bias, self.stride, self.padding)


class Scaled(nn.Module):
    """A parametrization of the user's own: no inverse, and a constant."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5 - 0.1


def own_parametrization(num_in: int, num_out: int) -> nn.Module:
    layer = nn.Linear(num_in, num_out)
    parametrize.register_parametrization(layer, "weight", Scaled())
    return layer


def old_weight_norm(num_in: int, num_out: int) -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(num_in, num_out))


def pruned(num_in: int, num_out: int) -> nn.Module:
    layer = nn.Linear(num_in, num_out)
    prune.l1_unstructured(layer, "weight", amount=4)
    return layer


def weight_norm(num_in: int, num_out: int) -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(num_in, num_out))  # type: ignore[no-any-return]


def both_normed(num_in: int, num_out: int) -> nn.Module:
    return parametrizations.weight_norm(weight_norm(num_in, num_out), "bias")  # type: ignore[no-any-return]


def conv_weight_norm(num_in: int, num_out: int) -> nn.Module:
    return parametrizations.weight_norm(nn.Conv2d(num_in, num_out, 3))  # type: ignore[no-any-return]


def transposed_weight_norm(num_in: int, num_out: int) -> nn.Module:
    return parametrizations.weight_norm(nn.ConvTranspose2d(num_in, num_out, 3), dim=1)  # type: ignore[no-any-return]


MODULES: dict[str, Callable[[int, int], nn.Module]] = {
    "weight norm": weight_norm,
    "weight norm of weight and bias": both_normed,
    "old weight norm": old_weight_norm,
    "weight norm, convolution": conv_weight_norm,
    "weight norm, transposed convolution": transposed_weight_norm,
    "pruned": pruned,
    "noisy property": NoisyProperty,
    "own parametrization": own_parametrization,
}
FUNCTIONAL: dict[str, Callable[[int, int], nn.Module]] = {
    "masked": Masked,
    "equalized": Equalized,
    "noisy": Noisy,
    "noise drawn in the forward": DrawnNoise,
    "standardized": lambda num_in, num_out: Standardized(num_in, num_out, 3),
}


class Custom(nn.Module):
    """A forward of its own around the layer."""

    def __init__(self, layer: nn.Module, num_units: int = 6) -> None:
        super().__init__()
        self.layer, self.pool, self.out = layer, Pool(), nn.Linear(num_units, 2)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.pool(torch.relu(self.layer(x))))


class Pool(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        """The mean over space, if there is any."""
        return h.reshape(*h.shape[:2], -1).mean(-1)


@dataclass(frozen=True)
class Case:
    """A network around a layer, an input, and the name of the one site in it."""

    make: Callable[[], nn.Module]
    site: str
    is_image: bool

    def example(self) -> Tensor:
        return torch.randn((4, 5, 7, 7) if self.is_image else (9, 5))


def case(label: str, container: str) -> Case:
    layer = {**MODULES, **FUNCTIONAL}[label]
    first = {"noisy": ".weight_mu", "noise drawn in the forward": ".mean"}.get(label, ".weight")
    tail = first if label in FUNCTIONAL else ""
    is_image = "convolution" in label or label == "standardized"

    def make() -> nn.Module:
        torch.manual_seed(0)
        if container == "Sequential":
            return nn.Sequential(layer(5, 6), nn.ReLU(), Pool(), nn.Linear(6, 2))
        return Custom(layer(5, 6))

    return Case(make, ("0" if container == "Sequential" else "layer") + tail, is_image)


CASES = {f"{label} in {where}": case(label, where) for label in MODULES for where in ("Sequential", "a forward")} | {
    f"{label} in a forward": case(label, "a forward") for label in FUNCTIONAL
}
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def double_precision() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def outputs(model: nn.Module, x: Tensor) -> dict[bool, Tensor]:
    """What a model gives in both modes, from one random state; it is left in training."""
    found = {}
    for training in (False, True):
        torch.manual_seed(7)
        found[training] = model.train(training)(x).detach()
    return found


def assert_same(found: dict[bool, Tensor], expected: dict[bool, Tensor]) -> None:
    for training, value in expected.items():
        assert bool(value.isfinite().all()) and float(value.std()) > 0
        error = float((found[training] - value).abs().max() / value.abs().max())
        assert error <= TOLERANCE, f"training={training}: {error:.3g}"


def operated(name: str, **options: Any) -> tuple[nn.Module, list[Any], Tensor]:
    model, x = CASES[name].make(), CASES[name].example()
    return model, [surgery.knife(model, Units({CASES[name].site: units}), **options) for units in OPERATIONS], x


def bank_of(model: nn.Module) -> Composite:
    (bank,) = (module for module in model.modules() if isinstance(module, Composite))
    return bank


def noise_of(model: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in model.named_buffers() if "epsilon" in name]


# -- equivalence -----------------------------------------------------------------------------------------------------


@every_case
def test_three_operations_keep_the_output_in_both_modes(name: str) -> None:
    model, x = CASES[name].make(), CASES[name].example()
    expected = outputs(model, x)
    for units in OPERATIONS:
        report = surgery.knife(model, Units({CASES[name].site: units}), verify=x)
        assert report.max_error is not None and report.max_error <= TOLERANCE
        assert_same(outputs(model, x), expected)


@every_case
def test_the_slots_of_every_parameter_hold_fresh_rows(name: str) -> None:
    untouched = dict(CASES[name].make().named_parameters())
    model, _, _ = operated(name)
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, untouched[key])}
    prefix = CASES[name].site.partition(".")[0]
    constant = {key for key in untouched if key.endswith("_sigma")}  # initialized to one value everywhere
    assert changed | constant == {key for key in untouched if key.startswith(f"{prefix}.")} | constant


@every_case
def test_the_compensation_row_computes_to_the_active_row_bit_for_bit(name: str) -> None:
    model, x = CASES[name].make(), CASES[name].example()
    surgery.knife(model, Units({CASES[name].site: [2]}))
    bank = bank_of(model)
    order, num_units = bank.order, bank.num_units
    values: dict[str, Tensor] = {}

    def summed(self: Composite, h: Tensor, rows: Tensor, axis: int) -> Tensor:
        values["active"], values["compensation"] = h.select(axis, 2), rows.select(axis, 1)
        return Composite.summed(self, h, rows, axis)

    bank.__dict__["summed"] = summed.__get__(bank)
    outputs(model, x)
    assert order.shape[1] <= num_units
    assert torch.equal(values["active"], values["compensation"])


def test_weights_of_frozen_rows_are_those_of_the_rows_they_were() -> None:
    layer: Any = weight_norm(5, 6)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(6, 2))
    old: Tensor = layer.weight[[1, 4]].detach().clone()
    surgery.knife(model, Units({"0": [1, 4]}))
    bank = bank_of(model)
    direction, length = bank.live("frozen_weight"), bank.live("frozen_weight_original0")
    assert direction is not None and length is not None
    rows = direction * (length / direction.norm(dim=1))[:, None]
    torch.testing.assert_close(rows, torch.cat([old, layer.weight[[1, 4]].detach()]), rtol=1e-12, atol=1e-14)


def test_fresh_weight_norm_starts_as_the_plain_layer_would() -> None:
    layer: Any = weight_norm(5, 64)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(64, 2))
    surgery.knife(model, Units({"0": range(64)}))
    stored = layer.parametrizations.weight
    torch.testing.assert_close(stored.original0[:, 0], stored.original1.norm(dim=1))
    assert 0.3 < float(layer.weight.detach().abs().max()) <= 1 / math.sqrt(5)


# -- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("noisy")])
def test_with_noise_drawn_anew_the_output_is_that_of_an_untouched_copy_with_the_same(name: str) -> None:
    model, _, x = operated(name)
    untouched = CASES[name].make()
    seen = []
    for _ in range(3):
        for mine, other in zip(noise_of(model), noise_of(untouched), strict=True):
            other.copy_(mine.normal_())
        assert_same(outputs(model, x), outputs(untouched, x))
        seen.append(outputs(model, x)[True])
    assert not torch.allclose(seen[0], seen[1])


def test_torchrl_noisy_linear_follows_the_exploration_type() -> None:
    modules, utils = pytest.importorskip("torchrl.modules"), pytest.importorskip("torchrl.envs.utils")
    model = nn.Sequential(modules.NoisyLinear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    untouched, x = copy.deepcopy(model), torch.randn(9, 5)
    for units in OPERATIONS:
        surgery.knife(model, Units({"0": units}))
    for exploration in (utils.ExplorationType.RANDOM, utils.ExplorationType.MEAN):
        with utils.set_exploration_type(exploration):
            assert_same(outputs(model, x), outputs(untouched, x))


# -- training and undo -----------------------------------------------------------------------------------------------


@every_case
def test_training_moves_active_members_of_every_parameter_and_nothing_frozen(name: str) -> None:
    model = CASES[name].make()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    x = CASES[name].example()
    for units in OPERATIONS:
        surgery.knife(model, Units({CASES[name].site: units}), optimizer=optimizer)
    frozen = {key: value.clone() for key, value in bank_of(model).named_buffers()}
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    train(model, optimizer, x)
    for key, value in bank_of(model).named_buffers():
        assert torch.equal(value, frozen[key]), key
    assert [key for key, value in model.named_parameters() if torch.equal(value, before[key])] == []


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, num_steps: int = 20) -> None:
    model.train()
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


@every_case
def test_optimizer_state_of_all_renewed_rows_is_fresh(name: str) -> None:
    model, x = CASES[name].make(), CASES[name].example()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, x, 3)
    stale = {key: optimizer.state[p]["exp_avg_sq"].clone() for key, p in model.named_parameters()}
    surgery.knife(model, Units({CASES[name].site: [0, 3]}), optimizer=optimizer)
    for key, parameter in model.named_parameters():
        if key.startswith(("out.", "3.")):
            continue
        now = optimizer.state[parameter]["exp_avg_sq"]
        axis = 1 if "transposed" in name and parameter.dim() > 1 else 0
        is_fresh = [bool((now.select(axis, unit) == 0).all()) for unit in range(6)]
        assert is_fresh[0] and is_fresh[3], key
        for unit in (1, 2, 4, 5):
            assert torch.equal(now.select(axis, unit), stale[key].select(axis, unit)), key


@every_case
def test_undo_puts_every_parameter_back(name: str) -> None:
    untouched = CASES[name].make().state_dict()
    model, reports, _ = operated(name)
    for report in reversed(reports):
        surgery.undo(model, report)
    found = model.state_dict()
    assert list(found) == list(untouched)
    assert all(torch.equal(found[key], value) for key, value in untouched.items())


@every_case
def test_evidence_is_measured(name: str) -> None:
    model, _, x = operated(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with surgery.observe(model, optimizer) as evidence:
        train(model, optimizer, x, 2)
    assert evidence.num_steps == 2
    scores = surgery.score(surgery.discover(model), evidence, "grama")
    assert CASES[name].site in str(scores)
    probed = surgery.probe(model, [x], lambda model, x: model(x).square().sum())
    assert probed.num_steps == 1


# -- copies, checkpoints, changes of the layer -----------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("old", "pruned"))])
def test_a_copy_and_a_loaded_state_give_the_same_output(name: str) -> None:
    model, _, x = operated(name)  # torch itself cannot copy layers whose hooks assign a weight
    expected = outputs(model, x)
    copied = copy.deepcopy(model)
    assert_same(outputs(copied, x), expected)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in copied.parameters():
        nn.init.normal_(parameter)
    bank_of(copied).frozen_weight.zero_()
    copied.load_state_dict(state)
    assert_same(outputs(copied, x), expected)
    surgery.knife(copied, Units({CASES[name].site: [0, 5]}))
    assert_same(outputs(copied, x), expected)


def test_removing_the_weight_norm_of_an_operated_layer_is_refused_or_an_error() -> None:
    in_forward, _, x = operated("weight norm in a forward")
    parametrize.remove_parametrizations(in_forward.get_submodule("layer"), "weight")
    with pytest.raises(SurgeryError, match="undo the operation before you remove it"):
        in_forward(x)
    in_sequential, _, x = operated("weight norm in Sequential")
    expected = outputs(in_sequential, x)
    with pytest.raises(AttributeError):
        parametrize.remove_parametrizations(in_sequential.get_submodule("0"), "weight")
    assert_same(outputs(in_sequential, x), expected)


def test_layers_of_one_class_and_other_sizes_do_not_share_a_graph() -> None:
    for num_units in (6, 9):
        torch.manual_seed(0)
        model = Custom(Standardized(5, num_units, 3), num_units)
        x = torch.randn(4, 5, 7, 7)
        expected = outputs(model, x)
        for units in OPERATIONS:
            surgery.knife(model, Units({"layer.weight": units}))
        assert_same(outputs(model, x), expected)


# -- declined --------------------------------------------------------------------------------------------------------


class Couples(Equalized):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(dim=0, keepdim=True), self.bias)


class NonNegative(Equalized):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, F.softplus(self.weight), self.bias)


class Gained(Equalized):
    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.gain, self.bias)


class Regularized(nn.Module):
    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(5, 6), nn.Linear(6, 2)
        self.register_buffer("mask", torch.ones(6, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.layer.weight * self.mask
        return self.out(torch.relu(F.linear(x, weight))), weight.square().sum()


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


class Dropped(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return F.dropout(weight, 0.5, True)


class Counting(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        self.count = getattr(self, "count", 0) + 1
        return weight * self.count


def with_parametrization(parametrization: nn.Module, num_in: int = 5) -> nn.Module:
    layer = nn.Linear(num_in, 6)
    parametrize.register_parametrization(layer, "weight", parametrization)
    return layer


def hooked() -> nn.Module:
    layer = nn.Linear(5, 6)
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.weight = weight
    return layer


DECLINED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(5, 6)), "layer", "spectral norm"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(5, 6)), "layer", "orthogonal"),
    "weight norm over inputs": (lambda: parametrizations.weight_norm(nn.Linear(5, 6), dim=1), "layer", "couples"),
    "weight norm of all": (lambda: parametrizations.weight_norm(nn.Linear(5, 6), dim=-1), "layer", "couples"),
    "transposed, over inputs": (
        lambda: parametrizations.weight_norm(nn.ConvTranspose2d(5, 6, 3), dim=0), "layer", "couples",
    ),
    "transposed, groups": (
        lambda: parametrizations.weight_norm(nn.ConvTranspose2d(4, 6, 3, groups=2), dim=1), "layer", "several",
    ),
    "symmetric": (lambda: with_parametrization(Symmetric(), 6), "layer", "couples"),
    "random": (lambda: with_parametrization(Dropped()), "layer", "random"),
    "counting": (lambda: with_parametrization(Counting()), "layer", "cannot be read"),
    "a plain attribute": (hooked, "layer", "plain attribute"),
    "functional, over inputs": (lambda: Couples(5, 6), "layer.weight", "couples"),
    "functional, not negative": (lambda: NonNegative(5, 6), "layer.weight", "one sign"),
    "functional, a gain of all": (lambda: Gained(5, 6), "layer.weight", "all units share"),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_what_couples_its_units_is_declined_with_the_reason(name: str) -> None:
    make, producer, reason = DECLINED[name]
    sites = surgery.discover(Custom(make()))
    assert producer not in sites.sites
    assert reason in sites.declined[producer]


def test_a_computed_weight_that_is_read_otherwise_too_is_declined() -> None:
    declined = surgery.discover(Regularized()).declined
    assert "also read by 'square'" in declined["layer"] or "also read by 'square'" in declined.get("layer.weight", "")


def test_the_axis_of_a_square_source_is_found_by_what_it_does() -> None:
    weight, gain = torch.randn(4, 4), torch.randn(4)
    by_row = recipe_of(["w", "g"], [weight, gain], [True, True], lambda v: (v[0] * v[1][:, None], None), 0)
    by_column = recipe_of(["w", "g"], [weight, gain], [True, False], lambda v: (v[0] * v[1], None), 0)
    assert not isinstance(by_row, str) and [source.axis for source in by_row[0].sources] == [0, 0]
    assert not isinstance(by_column, str) and [source.axis for source in by_column[0].sources] == [0, None]


def test_discovery_changes_nothing_of_a_layer_whose_weight_it_computes() -> None:
    for name in CASES:
        model = CASES[name].make()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        state = torch.get_rng_state()
        surgery.discover(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
