"""The output of a network does not move when its units become composite units: the property, and its laws.

Each example draws a network of any style, its dtype and mode, and up to four operations on random units, with or
without training steps between them. Tolerances are those of design section 8.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neuronsurgery import surgery
from tests.assertions import (
    TOLERANCES,
    Outcome,
    assert_same_gradient,
    assert_same_output,
    assert_same_state,
    gradient_errors,
    outcome,
    output_errors,
    rounding_noise,
    state_of,
)
from tests.strategies import ACTIVATION_MODULES, STYLES, Network, networks, unit_sets

ROOM = 100.0  # max_growth: here the bound is not what is tested

# The issue asks for 200 examples by default and 5,000 in the slow run: this is the switch. They are shared out evenly
# among the styles, as drawing the style too leaves some of them out of most runs.
LENIENT = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
FEW = settings(LENIENT, max_examples=math.ceil(200 / len(STYLES)))
MANY = settings(LENIENT, max_examples=math.ceil(5_000 / len(STYLES)))
SOME = settings(LENIENT, max_examples=25)

Choice = Mapping[str, Sequence[int]]

every_style = pytest.mark.parametrize("style", STYLES)


@every_style
@FEW
@given(data=st.data())
def test_operating_up_to_four_times_moves_no_output(data, style):
    check_repeated_operations(data, style)


@pytest.mark.slow
@every_style
@MANY
@given(data=st.data())
def test_operating_up_to_four_times_moves_no_output_in_any_of_5000_networks(data, style):
    check_repeated_operations(data, style)


def check_repeated_operations(data, style):
    network = data.draw(networks(styles=[style]))
    optimizer = data.draw(st.sampled_from([None, torch.optim.SGD, torch.optim.AdamW]))
    if optimizer is not None:
        optimizer = optimizer(network.model.parameters(), lr=0.01)
    for _ in range(data.draw(st.integers(1, 4))):
        assume(has_scale(network))
        check_operation(network, data.draw(unit_sets(network)), optimizer)
        train(network, data.draw(st.integers(0, 3)))


def has_scale(network: Network) -> bool:
    """Whether the outputs are large enough to hold an error against.

    Inputs, weights and members are of order one: where an output is far smaller no unit fires, or the members of its
    units cancel. In float32 a member is rounded at 6e-8, which comes near 2e-6 of an output below a tenth.
    """
    smallest = 0.1 if network.dtype == torch.float32 else 0.01
    return min(outcome(network.model, network.inputs).scales) >= smallest


def site_roundings(network: Network) -> int:
    """By how many tolerances a site's own error is bounded: in half precision each norm on its path rounds anew."""
    is_half = network.dtype in (torch.bfloat16, torch.float16)
    return 1 + max(Counter(network.norms.values()).values(), default=0) if is_half else 1


def check_operation(network: Network, units: Choice, optimizer: torch.optim.Optimizer | None = None) -> surgery.Report:
    """Operate, and check the output, the input's gradient, the slots, the banks, and what the report says of them."""
    model, tolerance = network.model, TOLERANCES[network.dtype]
    before, slots, rows = outcome(model, network.inputs), state_of(model), members_by_site(model)
    is_exact = network.dtype == torch.float64  # else a statistic behind another layer takes over its rounding
    untouched = copy.deepcopy(model) if model.training and is_exact else None
    report = surgery.knife(model, surgery.Units(units), optimizer=optimizer, max_growth=ROOM)
    after = outcome(model, network.inputs)
    assert_equivalent(network, before, after)
    assert report.max_error <= tolerance * site_roundings(network)
    assert {name: set(chosen) for name, chosen in report.operated.items()} == {n: set(u) for n, u in units.items()}
    assert_operated(network, units, slots, rows)
    if untouched is not None:
        assert_same_statistics(network, untouched, units)
    return report


GRADIENT_FACTOR = 8  # a gradient sums three members' terms in every layer
ROUNDINGS = 8  # how many times a member may be rounded: product, bias, norm or scale, activation; forward and backward


def assert_equivalent(network: Network, before: Outcome, after: Outcome) -> None:
    """Output and gradient stay within tolerance, or within what rounding makes of this network's members.

    The second bound counts where members are larger than their sum: a norm of few units, gradients that cancel.
    """
    tolerance = TOLERANCES[network.dtype]
    output, gradient = max(output_errors(before, after)), max(gradient_errors(before, after), default=0.0)
    if output <= tolerance and gradient <= GRADIENT_FACTOR * tolerance:
        return
    noise = rounding_noise(network.model, network.inputs)
    assert_same_output(before, after, max(tolerance, ROUNDINGS * noise.output))
    assert_same_gradient(before, after, max(GRADIENT_FACTOR * tolerance, ROUNDINGS * noise.gradient))


def members_by_site(model: nn.Module) -> dict[str, list[surgery.Member]]:
    """The frozen members of each site, in the order of its bank's rows."""
    return {name: list(members) for name, members in surgery.composites(model).members.items()}


def assert_operated(
    network: Network, units: Choice, slots: Mapping[str, Tensor], rows: Mapping[str, list[surgery.Member]]
) -> None:
    """The slots of exactly these units were renewed, and their banks hold the old and the new weights in two rows."""
    now, members = state_of(network.model), members_by_site(network.model)
    for name in set(units) | set(members):
        chosen, added = sorted(units.get(name, ())), members.get(name, [])[len(rows.get(name, [])) :]
        assert [m.unit for m in added if m.role == "knowledge"] == chosen, name
        assert [m.unit for m in added if m.role == "compensation"] == chosen, name
        old, new = network.rows_of(name, slots), network.rows_of(name, now)
        moved = (new != old).flatten(1).any(1).nonzero().flatten().tolist()
        few = new.dtype == torch.bfloat16 and new[0].numel() < 3  # the draw may be what was there
        assert set(moved) <= set(chosen) if few else moved == chosen, name
        bank = now[f"{bank_of(name, slots)}.frozen_weight"]
        first = len(rows.get(name, []))
        for row, member in enumerate(added, start=first):
            source = old if member.role == "knowledge" else new
            assert torch.equal(bank[row], source[member.unit]), (name, member)


def assert_same_statistics(network: Network, untouched: nn.Module, units: Choice) -> None:
    """A batch in training leaves the running statistics that it would have left: a renewed unit's in its knowledge."""
    model = copy.deepcopy(network.model)
    for each in (untouched, model):
        torch.manual_seed(0)
        each(*network.inputs)
    expected, found = state_of(untouched), state_of(model)
    members, tolerance = members_by_site(model), STATISTIC_FACTOR * TOLERANCES[network.dtype]
    passed = dict.fromkeys(network.norms.values(), 0)
    for name, value in expected.items():
        norm, _, label = name.rpartition(".")
        if not label.startswith("running") or "composite" in norm:
            continue
        old, new = value.double(), found[name].double()
        if norm in network.norms and (site := network.norms[norm]) in members:
            labels = [k for k in found if k.startswith(f"{bank_of(site, found)}.running")]
            bank = found[labels[passed[site]]].double()
            passed[site] += 1
            for row, member in enumerate(members[site]):  # the latest of a unit's knowledge rows is what it was
                if member.role == "knowledge" and member.unit in units.get(site, ()):
                    new[member.unit] = bank[row]
        scale = max(1.0, float(old.abs().max()))
        assert (old - new).abs().max() <= tolerance * scale, name


STATISTIC_FACTOR = 8  # in training a statistic is summed over all samples


def bank_of(name: str, state: Mapping[str, Tensor]) -> str:
    """The name of a producer's bank: a child of the module, or beside the parameter."""
    return f"{name}.composite" if f"{name}.weight" in state else f"{name}_composite"


def train(network: Network, num_steps: int) -> None:
    """Some clipped steps of gradient descent, so that members differ and values stay finite."""
    for step in range(num_steps):
        torch.manual_seed(step)
        network.model.zero_grad()
        outputs = torch.utils._pytree.tree_leaves(network.model(*network.inputs))
        sum((y - 1).square().mean() for y in outputs).backward()
        torch.nn.utils.clip_grad_norm_(network.model.parameters(), 1.0)
        with torch.no_grad():
            for parameter in network.model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=0.1)
    network.model.zero_grad()


# -- laws ------------------------------------------------------------------------------------------------------------


@SOME
@given(networks())
def test_an_empty_plan_changes_nothing(network):
    model = network.model
    classes, state = [type(m) for m in model.modules()], state_of(model)
    before = outcome(model, network.inputs)
    sites = surgery.discover(model, include=network.hidden)
    nothing = surgery.plan(surgery.select(surgery.score(sites, None, surgery.Units({}))))
    report = surgery.operate(model, nothing)
    assert report.num_units == 0
    assert [type(m) for m in model.modules()] == classes
    assert_same_state(state, state_of(model))
    assert_same_output(before, outcome(model, network.inputs), 0.0)


@SOME
@given(st.data())
def test_undoing_up_to_three_operations_newest_first_is_identity_bit_for_bit(data):
    network = data.draw(networks())
    model = network.model
    outputs, states, classes, reports = [], [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        outputs.append(outcome(model, network.inputs))
        states.append(state_of(model))
        classes.append([type(m) for m in model.modules()])
        units = surgery.Units(data.draw(unit_sets(network)))
        reports.append(surgery.knife(model, units, max_growth=ROOM))
    while reports:
        surgery.undo(model, reports.pop())
        assert_same_state(states.pop(), state_of(model))
        assert [type(m) for m in model.modules()] == classes.pop()
        assert_same_output(outputs.pop(), outcome(model, network.inputs), 0.0)


@SOME
@given(st.data())
def test_operating_in_two_halves_gives_the_output_of_both_at_once(data):
    network = data.draw(networks())
    assume(has_scale(network))
    units = data.draw(unit_sets(network))
    twin = replace(network, model=copy.deepcopy(network.model))
    first = {name: chosen[::2] for name, chosen in units.items()}
    second = {name: chosen[1::2] for name, chosen in units.items() if len(chosen) > 1}
    check_operation(twin, units)
    check_operation(network, first)
    if second:
        check_operation(network, second)
    once, twice = outcome(twin.model, network.inputs), outcome(network.model, network.inputs)
    assert_equivalent(network, once, twice)


# -- deep networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("depth", [8, 20])
def test_each_site_of_a_deep_network_keeps_its_activations(depth, dtype):
    layers = [part for _ in range(depth) for part in (nn.Linear(12, 12), nn.SELU())]
    model = nn.Sequential(*layers, nn.Linear(12, 3)).to(dtype)
    x = torch.randn(6, 12, dtype=torch.float64).to(dtype)
    for _ in range(3):
        before = activations_by_site(model, x)
        report = surgery.knife(model, surgery.Random(0.5), max_growth=ROOM)
        assert len(report.operated) == depth
        assert report.max_error <= TOLERANCES[dtype]
        for index, (old, received) in enumerate(before):
            new = model[2 * index : 2 * index + 2](received)
            error = (new.double() - old.double()).abs().max() / old.double().abs().max()
            assert error <= TOLERANCES[dtype], f"site {index}: {error:.3g}"


def activations_by_site(model: nn.Sequential, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The activations of each hidden layer, and the input that the layer received."""
    found = []
    with torch.no_grad():
        for index in range(0, len(model) - 1, 2):
            found.append((model[index : index + 2](x), x))
            x = found[-1][0]
    return found


# -- activation functions --------------------------------------------------------------------------------------------

FUNCTIONS = {
    "torch.abs": torch.abs,
    "torch.atan": torch.atan,
    "torch.celu": torch.celu,
    "torch.celu_": torch.celu_,
    "torch.clamp": lambda x: torch.clamp(x, -1, max=0.5),
    "torch.clip": lambda x: torch.clip(x, min=-0.3),
    "torch.cos": torch.cos,
    "torch.cosh": torch.cosh,
    "torch.exp": torch.exp,
    "torch.expm1": torch.expm1,
    "torch.pow": lambda x: torch.pow(x, 2),
    "x ** 3": lambda x: x**3,
    "torch.square": torch.square,
    "torch.sinh": torch.sinh,
    "torch.sinc": torch.sinc,
    "torch.selu": torch.selu,
    "torch.asinh": torch.asinh,
    "torch.special.erf": torch.special.erf,
    "torch.special.expit": torch.special.expit,
    "F.elu": lambda x: F.elu(x, alpha=0.5),
    "F.elu_": lambda x: F.elu_(x, 0.5),
    "F.gelu": lambda x: F.gelu(x, approximate="tanh"),
    "F.hardsigmoid": F.hardsigmoid,
    "F.hardswish": F.hardswish,
    "F.hardtanh": lambda x: F.hardtanh(x, -0.5, 0.75, inplace=True),
    "F.leaky_relu": lambda x: F.leaky_relu(x, negative_slope=0.3, inplace=True),
    "F.leaky_relu_": F.leaky_relu_,
    "F.logsigmoid": F.logsigmoid,
    "F.mish": F.mish,
    "F.relu6": lambda x: F.relu6(x, inplace=True),
    "F.relu inplace": lambda x: F.relu(x, inplace=True),
    "F.silu inplace": lambda x: F.silu(x, inplace=True),
    "F.softplus": lambda x: F.softplus(x, beta=2, threshold=3),
    "F.softshrink": lambda x: F.softshrink(x, 0.1),
    "F.softsign": F.softsign,
    "F.tanhshrink": F.tanhshrink,
    "x.clamp_": lambda x: x.clamp_(-1, 1),
    "x.sigmoid_": lambda x: x.sigmoid_(),
    "x.square_": lambda x: x.square_(),
}


class Applied(nn.Module):
    """One hidden layer with a function for its activation, which the forward calls by name."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.fc1, self.fc2 = function, nn.Linear(5, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.function(self.fc1(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_unit_wise_function_of_torch_keeps_the_output(name, dtype):
    model = Applied(FUNCTIONS[name]).to(dtype)
    network = Network(name, model, (torch.randn(7, 5).to(dtype),), ("fc1",), dtype)
    for units in ([0, 3, 8], [3], [1, 3]):
        check_operation(network, {"fc1": units})
        train(network, 2)


@pytest.mark.parametrize("index", range(len(ACTIVATION_MODULES)))
def test_every_activation_module_keeps_the_output_of_an_unbatched_and_a_batched_linear_layer(index):
    activation = ACTIVATION_MODULES[index](6)
    shapes = [(5, 4)] if isinstance(activation, nn.PReLU) and activation.num_parameters > 1 else [(4,), (2, 3, 4)]
    for shape in shapes:
        model = nn.Sequential(nn.Linear(4, 6), copy.deepcopy(activation), nn.Linear(6, 2)).double()
        network = Network("module", model, (torch.randn(shape).double(),), ("0",), torch.float64)
        check_operation(network, {"0": [0, 5]})
        train(network, 2)
        check_operation(network, {"0": [5]})


@pytest.mark.parametrize(
    ("producer", "shape"),
    [(nn.Linear(4, 8), (2, 8, 4)), (nn.Conv1d(4, 8, 3, padding=1), (4, 8))],
    ids=["3-D", "unbatched"],
)
def test_a_slope_per_unit_is_never_taken_along_an_axis_that_only_has_the_right_size(producer, shape):
    model = nn.Sequential(copy.deepcopy(producer), nn.PReLU(8))
    model(torch.randn(shape))  # torch takes the slopes along axis 1, which holds no units here
    surgery.knife(model, surgery.Units({"0": [2]}))
    with pytest.raises(surgery.SurgeryError, match="slope per unit"):
        model(torch.randn(shape))


def test_a_weight_of_one_element_without_an_initializer_is_renewed_with_finite_numbers():
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Parameter(torch.ones(1, 1)), nn.Parameter(torch.ones(2, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.relu(F.linear(x, self.w)), self.v)

    model = One()
    check_operation(Network("one", model, (torch.ones(3, 1),), ("w",), torch.float32), {"w": [0]})
    assert bool(model.w.isfinite().all())
    assert model.w.item() != 1.0


def test_a_weight_shared_by_two_modules_can_be_operated_on_again_and_undone():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight, second.bias = first.weight, first.bias
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(4, 2))
    state = state_of(model)
    network = Network("shared", model, (torch.randn(5, 4),), ("0",), torch.float32)
    reports = [check_operation(network, {"0": [1, 2]}) for _ in range(3)]
    assert model[2].composite is model[0].composite
    for report in reversed(reports):
        surgery.undo(model, report)
    assert_same_state(state, state_of(model))


class Masked(nn.Module):
    """Functions of torch with an overload for numbers: their C code reads the class of what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(5, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.where(x > 0, x, 0.0)
        h = torch.relu(self.fc1(torch.pow(x, 2)))
        return self.fc2(torch.remainder(h, 3.0))  # type: ignore[no-any-return]


class MaskedTensors(Masked):
    """The same beside questions about types, which read the class as well."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.where(x > 0, x, 0.0) if isinstance(x, Tensor) and not isinstance(torch.pow(x, 2), str) else x
        return self.fc2(torch.relu(self.fc1(x)))  # type: ignore[no-any-return]


SOURCELESS: dict[str, Any] = {"torch": torch, "Tensor": Tensor}
exec("def forward(self, x): return self.fc2(torch.relu(self.fc1(x if isinstance(x, Tensor) else 0)))", SOURCELESS)


class MaskedWithoutSource(Masked):
    """A question about types that cannot be told from other reads of the class."""

    forward = SOURCELESS["forward"]


def test_functions_with_an_overload_for_numbers_do_not_end_the_process():
    network = Network("masked", Masked().double(), (torch.randn(4, 5).double(),), ("fc1",), torch.float64)
    check_operation(network, {"fc1": [1, 2]})
    network = Network("masked", MaskedTensors().double(), (torch.randn(4, 5).double(),), ("fc1",), torch.float64)
    check_operation(network, {"fc1": [1, 2]})
    assert "isinstance" in surgery.discover(MaskedWithoutSource()).declined["fc1"]


class Applying(nn.Module):
    """A layer on a weight that it is given."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.w = weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(F.linear(x, self.w))


class Lending(nn.Module):
    """A weight that its owner uses itself, and shares with a child."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.child = Applying(self.w)
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.child(torch.relu(F.linear(x, self.w))))  # type: ignore[no-any-return]


def test_an_operation_elsewhere_keeps_the_bank_of_a_weight_that_parent_and_child_share():
    network = Network("lending", Lending(), (torch.randn(5, 4),), ("w", "tail.0"), torch.float32)
    check_operation(network, {"w": [1]})
    train(network, 3)
    report = check_operation(network, {"tail.0": [1]})
    before = outcome(network.model, network.inputs)
    surgery.undo(network.model, report)
    assert_same_output(before, outcome(network.model, network.inputs), TOLERANCES[network.dtype])
