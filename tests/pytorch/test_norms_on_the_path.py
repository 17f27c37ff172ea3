"""Norms between producer and activation function: neighbors never notice, statistics travel with their rows."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops.layers.torch import EinMix
from torch import Tensor, nn

from neuronsurgery import surgery
from tests.assertions import TOLERANCES, assert_same_output, assert_same_state, outcome, state_of
from tests.path_strategies import settled

TOLERANCE = TOLERANCES[torch.float64]
NUM_UNITS = 6


Make = Callable[[], nn.Module]
LINEAR, CONVOLUTION = (lambda: nn.Linear(3, NUM_UNITS)), (lambda: nn.Conv2d(3, NUM_UNITS, 3, stride=2, padding=1))
COUPLING: dict[str, tuple[Make, Make, tuple[int, ...]]] = {
    "LayerNorm": (LINEAR, lambda: nn.LayerNorm(NUM_UNITS), (5, 3)),
    "LayerNorm of a sequence": (LINEAR, lambda: nn.LayerNorm((4, NUM_UNITS)), (5, 4, 3)),
    "LayerNorm over space": (CONVOLUTION, lambda: nn.LayerNorm((NUM_UNITS, 3, 4)), (5, 3, 5, 7)),
    "RMSNorm": (LINEAR, lambda: nn.RMSNorm(NUM_UNITS), (5, 4, 3)),
    "RMSNorm with eps": (LINEAR, lambda: nn.RMSNorm(NUM_UNITS, eps=0.1), (5, 3)),
    "GroupNorm": (LINEAR, lambda: nn.GroupNorm(2, NUM_UNITS), (5, 3)),
    "GroupNorm over space": (CONVOLUTION, lambda: nn.GroupNorm(3, NUM_UNITS), (5, 3, 5, 7)),
}


def site_of(kind: str) -> tuple[nn.Sequential, Tensor]:
    """Producer, norm and tanh; on the activations of tanh every unit can be seen by itself."""
    producer, norm, shape = COUPLING[kind]
    model = nn.Sequential(producer(), settled(norm()), nn.Tanh(), nn.Flatten(1), nn.LazyLinear(2))
    model(torch.zeros(shape))
    return model.double(), torch.randn(shape, dtype=torch.float64)


def units_of(model: nn.Sequential, x: Tensor) -> Tensor:
    """The activations, (num_units, ...)."""
    with torch.no_grad():
        h: Tensor = model[:3](x)
    return h.movedim(1 if h.dim() == 4 else -1, 0)


def train(model: nn.Module, x: Tensor, steps: int = 5) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


OPERATIONS = ([0, 2], [0, 1], [3])


@pytest.mark.parametrize("kind", COUPLING)
def test_three_operations_on_the_same_and_on_other_units_leave_every_unit_as_it_is(kind):
    model, x = site_of(kind)
    for units in OPERATIONS:
        before = units_of(model, x)
        report = surgery.knife(model, surgery.Units({"0": units}), max_growth=100.0)
        assert report.max_error <= TOLERANCE
        assert (units_of(model, x) - before).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", COUPLING)
def test_neighbors_of_active_members_that_have_moved_are_as_if_those_units_had_never_changed(kind):
    model, x = site_of(kind)
    never = copy.deepcopy(model)
    operated: set[int] = set()
    for units in OPERATIONS:
        before = units_of(model, x)
        surgery.knife(model, surgery.Units({"0": units}), max_growth=100.0)
        assert (units_of(model, x) - before).abs().max() <= TOLERANCE
        operated |= set(units)
        train(model, x)
        untouched = [unit for unit in range(NUM_UNITS) if unit not in operated]
        take_over(never, model, untouched)
        now, expected = units_of(model, x), units_of(never, x)
        assert (now - expected)[untouched].abs().max() <= TOLERANCE
        assert (now - expected)[sorted(operated)].abs().max() > 0.01  # else nothing was shown
        take_over(never, model, [])
    assert len(untouched) == 2


def take_over(never: nn.Sequential, model: nn.Sequential, units: list[int]) -> None:
    """Give the copy the weights that training gave the model, but for units that were operated on by then."""
    with torch.no_grad():
        for old, new in zip(never[:2].parameters(), model[:2].parameters(), strict=True):
            axis = old.dim() - 1 if old.dim() == 2 and old.shape[0] == 4 else 0
            index = torch.tensor(units, dtype=torch.long)
            old.index_copy_(axis, index, new.index_select(axis, index))


def test_one_unit_that_a_norm_makes_a_constant_can_be_operated_on():
    norm = nn.LayerNorm(1)
    model = nn.Sequential(nn.Linear(3, 1), norm, nn.Tanh(), nn.Linear(1, 2)).double()
    before = outcome(model, [torch.randn(5, 3).double()])
    surgery.knife(model, surgery.Units({"0": [0]}))
    scale = norm.eps**-0.5  # the active member is divided by the deviation of the reference, which is 0
    assert_same_output(before, outcome(model, [torch.randn(5, 3).double()]), scale * TOLERANCE)


# -- sizes -----------------------------------------------------------------------------------------------------------

NORMS: dict[str, Make] = {
    "batch": lambda: nn.BatchNorm1d(NUM_UNITS),
    "batch, cumulative": lambda: nn.BatchNorm1d(NUM_UNITS, momentum=None),
    "batch, without statistics": lambda: nn.BatchNorm1d(NUM_UNITS, momentum=None, track_running_stats=False),
    "layer": lambda: nn.LayerNorm(NUM_UNITS),
    "root mean square": lambda: nn.RMSNorm(NUM_UNITS),
    "group": lambda: nn.GroupNorm(3, NUM_UNITS),
    "dropout": lambda: nn.Dropout(0.3),
}


def operated_on(norm: nn.Module) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, NUM_UNITS), norm, nn.ReLU(), nn.Linear(NUM_UNITS, 2)).double()
    surgery.knife(model, surgery.Units({"0": [0, 4]}))
    return model


@pytest.mark.parametrize(
    ("batch", "kind"), [(n, kind) for kind in NORMS for n in (0, 1) if n == 0 or "without" not in kind]
)
def test_a_batch_of_none_or_one_passes_as_it_did(kind, batch):
    model = nn.Sequential(nn.Linear(3, NUM_UNITS), NORMS[kind](), nn.ReLU(), nn.Linear(NUM_UNITS, 2)).double().eval()
    x = torch.randn(batch, 3).double()
    before = model(x)
    surgery.knife(model, surgery.Units({"0": [0, 4]}))
    assert model(x).shape == (batch, 2)
    assert torch.allclose(before, model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", NORMS)
def test_gradients_of_an_empty_batch_are_empty_and_do_not_fail(kind):
    model = operated_on(NORMS[kind]()).eval()
    x = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and x.grad.shape == (0, 3)


# -- state -----------------------------------------------------------------------------------------------------------

STATEFUL = ["batch", "batch, cumulative", "layer"]


def running(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in state_of(model).items() if "running_path" in name}


def test_the_statistics_of_frozen_rows_are_in_the_state_dict_and_follow_training_alone():
    model = operated_on(nn.BatchNorm1d(NUM_UNITS))
    first = running(model)
    assert len(first) == 2
    model.eval()(torch.randn(7, 3).double())
    assert_same_state(first, running(model))
    x = torch.randn(7, 3).double()
    model.train()(x)
    mean = running(model)["0.composite.running_path_2"]
    bank: Any = model[0].composite
    z = x @ bank.frozen_weight[:4].T + bank.frozen_bias[:4]
    assert torch.allclose(mean[:4], 0.1 * z.mean(0))


@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_a_copy_behaves_as_its_original_in_training_and_evaluation(kind, how):
    model = operated_on(settled(NORMS[kind]()))
    x = torch.randn(7, 3).double()
    train(model, x)
    other = copied(model, how)
    assert_same_state(state_of(model), state_of(other))
    for mode in (True, False, True):
        assert torch.equal(model.train(mode)(x), other.train(mode)(x))
        assert_same_state(state_of(model), state_of(other))


def copied(model: nn.Sequential, how: str) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)  # type: ignore[no-any-return]
    other = operated_on(type(model[1])(NUM_UNITS))
    if isinstance(model[1], nn.BatchNorm1d):
        other.get_submodule("1").__dict__["momentum"] = model[1].momentum
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_renewed_weight_of_a_norm_is_fresh_and_so_is_its_optimizer_state(kind):
    model = nn.Sequential(nn.Linear(3, NUM_UNITS), NORMS[kind](), nn.ReLU(), nn.Linear(NUM_UNITS, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.randn(7, 3)) - 1).square().mean().backward()
        optimizer.step()
    norm: Any = model[1]
    before = {parameter: copy.deepcopy(state) for parameter, state in optimizer.state.items()}
    surgery.knife(model, surgery.Units({"0": [0, 4]}), optimizer=optimizer)
    for parameter, fresh in ((norm.weight, 1.0), (norm.bias, 0.0)):
        assert parameter[[0, 4]].tolist() == [fresh, fresh]
        assert fresh not in parameter[[1, 2, 3, 5]].tolist()
        for name in ("exp_avg", "exp_avg_sq"):
            state = optimizer.state[parameter][name]
            assert state[[0, 4]].tolist() == [0, 0]
            assert torch.equal(state[[1, 2, 3, 5]], before[parameter][name][[1, 2, 3, 5]])
            assert bool((before[parameter][name] != 0).any())


class Shared(nn.Module):
    """One norm behind two layers."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = nn.Linear(3, NUM_UNITS), nn.Linear(NUM_UNITS, NUM_UNITS), norm
        self.head = nn.Linear(NUM_UNITS, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.fc2(torch.relu(self.norm(self.fc1(x)))))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["layer", "group", "root mean square"])
def test_the_weight_of_a_norm_that_two_layers_share_is_not_renewed(kind):
    model, x = Shared(settled(NORMS[kind]())).double(), [torch.randn(7, 3).double()]
    state, before = state_of(model), outcome(model, x)
    reports = [surgery.knife(model, surgery.Units({name: [0, 4]})) for name in ("fc1", "fc2")]
    assert_same_output(before, outcome(model, x), TOLERANCE)
    for name, value in model.norm.state_dict().items():
        assert torch.equal(value, state[f"norm.{name}"]), name
    for report in reversed(reports):
        surgery.undo(model, report)
    assert_same_state(state, state_of(model))


# -- defects that the generated networks found -------------------------------------------------------------------------


class Block(nn.Module):
    """One class whose instances have norms of other settings, and shifts of other shapes."""

    def __init__(self, norm: nn.Module, shift: tuple[int, ...]) -> None:
        super().__init__()
        self.fc, self.norm, self.head = nn.Linear(3, NUM_UNITS), norm, nn.Linear(NUM_UNITS, 2)
        self.shift = nn.Parameter(torch.rand(shift))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.fc(x)) + self.shift))  # type: ignore[no-any-return]


def test_instances_of_one_class_may_differ_in_the_tensors_of_their_norms_and_shifts():
    norms = [
        nn.LayerNorm(NUM_UNITS),
        nn.LayerNorm(NUM_UNITS, elementwise_affine=False),
        nn.LayerNorm(NUM_UNITS, bias=False),
        nn.LayerNorm((2, NUM_UNITS), elementwise_affine=False),
        nn.LayerNorm(NUM_UNITS),
        nn.RMSNorm(NUM_UNITS),
        nn.RMSNorm(NUM_UNITS, elementwise_affine=False),
    ]
    for norm in norms:
        for shift in ((NUM_UNITS,), (2, NUM_UNITS), (1, NUM_UNITS), (2, 1), (1,)):
            model, x = Block(norm, shift).double(), [torch.randn(4, 2, 3).double()]
            before = outcome(model, x)
            surgery.knife(model, surgery.Units({"fc": [0, 4]}))
            assert_same_output(before, outcome(model, x), TOLERANCE)


def test_a_functional_convolution_with_a_bias_is_a_site():
    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel, self.shift = nn.Parameter(torch.randn(4, 3, 2)), nn.Parameter(torch.randn(4))
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.conv1d(x, self.kernel, self.shift).relu().mean(-1))  # type: ignore[no-any-return]

    assert list(surgery.discover(Convolved())) == ["kernel"]


def test_a_layer_of_einops_is_a_site_without_a_bias_and_with_one_number_a_unit():
    def discover(bias: str | None) -> surgery.Sites:
        layer = EinMix("b i -> b e o", "e i o", bias, i=3, e=2, o=4)
        return surgery.discover(nn.Sequential(layer, nn.ReLU(), nn.Linear(4, 2)))

    assert "0" in discover(None).sites
    assert "0" in discover("e o").sites
    assert "one number per unit" in discover("o").declined["0"]


def test_a_mask_of_dropout_behind_a_norm_over_moved_axes_falls_where_it_fell():
    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, NUM_UNITS, 1), nn.LayerNorm(NUM_UNITS)
            self.head = nn.Linear(NUM_UNITS, 2)

        def forward(self, x: Tensor) -> Tensor:
            z = self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            h = F.relu(F.dropout(z, 0.5, self.training))
            return self.head(h.mean((-1, -2)))  # type: ignore[no-any-return]

    model, x = Moved().double(), [torch.randn(2, 3, 4, 5).double()]
    before = outcome(model, x)
    surgery.knife(model, surgery.Units({"conv": [0, 4]}))
    assert_same_output(before, outcome(model, x), TOLERANCE)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_dropout_behind_a_site_draws_the_mask_it_drew_whatever_the_memory_format(layout: torch.memory_format):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 2, 1))
    model = model.to(memory_format=layout)  # type: ignore[call-overload]
    x = torch.randn(4, 3, 7, 7).contiguous(memory_format=layout)
    untouched = copy.deepcopy(model)
    surgery.knife(model, surgery.Units({"0": [0, 4]}))
    torch.manual_seed(1)
    found = model(x)
    torch.manual_seed(1)
    assert torch.allclose(found, untouched(x), atol=1e-6)


def test_one_slope_for_a_layer_of_one_unit_is_shared_and_asks_for_no_axis():
    model = nn.Sequential(nn.Linear(4, 1), nn.PReLU(), nn.Linear(1, 2))
    x = torch.randn(3, 5, 4)
    before = model(x)
    surgery.knife(model, surgery.Units({"0": [0]}))
    assert torch.allclose(model(x), before, atol=1e-6)
