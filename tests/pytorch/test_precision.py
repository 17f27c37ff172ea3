"""Operating in the middle of a run in other precisions than float32: autocast, gradient scalers, half and double."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import neuronsurgery.pytorch
from neuronsurgery import surgery
from neuronsurgery.surgery import Quantity
from tests.assertions import TOLERANCES, assert_same_output, assert_same_state, bank_tensors, outcome

situation = pytest.mark.situation
UA = Quantity.UPDATE_ACTIVITY


def two_layers() -> Any:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


# -- what is measured under a gradient scaler ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unscales",
    [
        pytest.param(False, marks=situation("Precision", "torch.amp.GradScaler", "works")),
        pytest.param(True, marks=situation("Precision", "torch.amp.GradScaler, scaler.unscale_ and clipping", "works")),
    ],
)
@pytest.mark.parametrize(
    "fused",
    [False, pytest.param(True, marks=situation("Precision", "torch.amp.GradScaler, fused optimizer", "works"))],
)
def test_update_activity_is_that_of_unscaled_gradients_whatever_the_scale_was(fused: bool, unscales: bool) -> None:
    model = two_layers()
    optimizer = Adam(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    by_hand = []
    with surgery.observe(model, optimizer) as evidence:
        for step in range(4):
            x = torch.randn(6, 4)
            (gradient,) = torch.autograd.grad(model(x).square().mean(), [model[0].weight])
            by_hand.append(gradient.norm(dim=1) / model[0].weight.detach().norm(dim=1))
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            if unscales:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1e6)
            scaler.step(optimizer)
            scaler.update(new_scale=2.0 ** (step + 3))
    assert (evidence.num_steps, evidence.num_skipped) == (4, 0)
    torch.testing.assert_close(evidence.measured("0")[UA], torch.stack(by_hand).mean(0))


@situation("Precision", "torch.amp.GradScaler, fused optimizer", "works")
def test_a_step_that_a_fused_optimizer_leaves_out_for_another_parameter_is_not_measured() -> None:
    model = two_layers()
    optimizer = SGD(model.parameters(), lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with surgery.observe(model, optimizer) as evidence:
        for overflows in (False, True, False):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(6, 4)).square().mean()).backward()
            if overflows:  # the head is no site
                model[4].bias.grad.fill_(torch.inf)
            before = model[0].weight.detach().clone()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(model[0].weight, before) == overflows
    assert (evidence.num_steps, evidence.num_skipped) == (2, 1)
    assert evidence.num_samples("0", UA) == 2


@situation("Precision", "torch.amp.GradScaler, gradients of activations", "works")
def test_gradients_of_activations_are_unscaled_by_the_scaler_so_that_no_step_weighs_more() -> None:
    model = two_layers()
    optimizer = SGD(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    batches = torch.randn(3, 6, 4)
    with surgery.observe(model, optimizer) as plain:
        for x in batches:
            model(x).square().mean().backward()
            optimizer.step()
    with surgery.observe(model, optimizer, scaler=scaler) as evidence:
        for step, x in enumerate(batches):
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update(new_scale=2.0 ** (3 * step + 4))
    gradient = Quantity.ACTIVATION_GRADIENT
    torch.testing.assert_close(evidence.measured("0")[gradient], plain.measured("0")[gradient])


@situation("Precision", "torch.amp.GradScaler, no optimizer given", "works")
def test_gradients_read_after_a_backward_pass_are_unscaled_by_the_scaler() -> None:
    model = two_layers()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    x = torch.randn(6, 4)
    with surgery.observe(model) as plain:
        model(x).square().mean().backward()
    model.zero_grad()
    with surgery.observe(model, scaler=scaler) as evidence:
        scaler.scale(model(x).square().mean()).backward()
    torch.testing.assert_close(evidence.measured("0")[UA], plain.measured("0")[UA])


# -- autocast --------------------------------------------------------------------------------------------------------

HALVES = [torch.bfloat16, torch.float16]
BLOCKS = [
    pytest.param(dtype, marks=situation("Precision", f"autocast, {str(dtype).removeprefix('torch.')}", "works"))
    for dtype in HALVES
]


@pytest.mark.parametrize("dtype", BLOCKS)
@pytest.mark.parametrize("is_inside", [False, True])
def test_an_operation_between_autocast_steps_keeps_the_output_and_training_goes_on(
    dtype: torch.dtype, is_inside: bool
) -> None:
    model, x = two_layers(), torch.randn(16, 4)
    optimizer = Adam(model.parameters(), lr=1e-2)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()

    for operation in (1, 2):
        step()
        with torch.autocast("cpu", dtype=dtype):
            before = outcome(model, [x])
            if is_inside:
                surgery.knife(model, surgery.Units({"0": [0, 3, 5], "2": [1]}), optimizer=optimizer, verify=x)
        if not is_inside:
            surgery.knife(model, surgery.Units({"0": [0, 3, 5], "2": [1]}), optimizer=optimizer, verify=x)
        with torch.autocast("cpu", dtype=dtype):
            after = outcome(model, [x])
        assert after.tensors[0].dtype == dtype
        assert_same_output(before, after, TOLERANCES[torch.bfloat16])
        frozen = bank_tensors(model)
        assert all(value.dtype in (torch.float32, torch.int64) for value in frozen.values()), operation
        step()
        assert_same_state(frozen, bank_tensors(model))
    surgery.check(model, optimizer).require()


@pytest.mark.parametrize("dtype", BLOCKS)
def test_evidence_under_autocast_is_summed_in_float32(dtype: torch.dtype) -> None:
    model = two_layers()
    with torch.no_grad():
        model[0].weight[0] *= 300  # its sum over a batch is beyond what float16 holds
    optimizer = SGD(model.parameters(), lr=0.0)
    x = torch.randn(4096, 4)
    with surgery.observe(model, optimizer) as evidence, torch.autocast("cpu", dtype=dtype):
        model(x).float().mean().backward()
        optimizer.step()
    found = evidence.measured("0")[Quantity.ACTIVATION]
    expected = torch.relu(model[0](x)).detach().mean(0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def trained_with_scaler(fused: bool, overflows_at: int) -> tuple[Any, Adam, list[int]]:
    """Six steps under float16 autocast and a scaler, one of which overflows, with an operation after the second."""
    torch.manual_seed(1)
    model = two_layers()
    optimizer = Adam(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    ages = []
    for step in range(6):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = (model(x) - 1).square().mean()
        scaler.scale(loss).backward()
        if step == overflows_at:
            model[2].weight.grad.fill_(torch.inf)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        if step == overflows_at:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        if step == 1:
            surgery.knife(model, surgery.Units({"0": [0, 3]}), optimizer=optimizer)
        if step > 1:
            ages.append(neuronsurgery.pytorch.ages(model, optimizer)["0"][0])
    return model, optimizer, ages


@situation("Precision", "torch.amp.GradScaler, a skipped step after an operation", "works")
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_ages_no_unit_and_moves_nothing(fused: bool) -> None:
    model, optimizer, ages = trained_with_scaler(fused, overflows_at=3)
    assert ages == [1, 1, 2, 3]
    surgery.check(model, optimizer).require()


# -- parameters of other dtypes --------------------------------------------------------------------------------------

DTYPES = {
    torch.float64: TOLERANCES[torch.float64],
    torch.float32: TOLERANCES[torch.float32],
    torch.bfloat16: TOLERANCES[torch.bfloat16],
    torch.float16: 2.0**-9,
}


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, marks=situation("Precision", f"{str(dtype).removeprefix('torch.')} parameters", "works"))
        for dtype in DTYPES
    ],
)
def test_parameters_of_a_dtype_are_operated_on_trained_and_operated_on_again(dtype: torch.dtype) -> None:
    model, x = two_layers().to(dtype), torch.randn(16, 4, dtype=dtype)
    optimizer = Adam(model.parameters(), lr=1e-2, eps=1e-4)
    for operation in (1, 2, 3):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        before = outcome(model, [x])
        report = surgery.knife(
            model, surgery.Units({"0": [0, 3, 5], "2": [1]}), optimizer=optimizer, verify=x, cooldown=0
        )
        assert_same_output(before, outcome(model, [x]), DTYPES[dtype])
        assert report.max_error <= DTYPES[dtype], operation
        assert all(value.dtype == dtype for name, value in bank_tensors(model).items() if "frozen" in name)
    surgery.check(model, optimizer).require()


@situation("Precision", "evidence of bfloat16 and float16 parameters", "works")
@pytest.mark.parametrize("dtype", HALVES)
def test_evidence_of_half_precision_parameters_is_in_float32(dtype: torch.dtype) -> None:
    model = two_layers().to(dtype)
    optimizer = SGD(model.parameters(), lr=0.0)
    with surgery.observe(model, optimizer) as evidence:
        for _ in range(2):
            model(torch.randn(16, 4, dtype=dtype)).square().mean().backward()
            optimizer.step()
    measured = evidence.measured("0")
    assert set(measured) == set(Quantity)
    assert all(value.dtype == torch.float32 and bool(value.isfinite().all()) for value in measured.values())


@situation("Precision", "layers of different dtypes in one model", "works")
def test_layers_of_different_dtypes_are_operated_on_each_in_its_own() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = nn.Linear(4, 8).bfloat16()
            self.high = nn.Linear(8, 8).double()
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            h = torch.relu(self.low(x.bfloat16()))
            return self.head(torch.relu(self.high(h.double())).float())

    model: Any = Mixed()
    x = torch.randn(16, 4)
    before = outcome(model, [x])
    report = surgery.knife(model, surgery.Units({"low": [0, 3], "high": [1]}), verify=x)
    assert report.errors["low"] <= TOLERANCES[torch.bfloat16] and report.errors["high"] <= TOLERANCES[torch.float64]
    assert (model.low.composite.frozen_weight.dtype, model.high.composite.frozen_weight.dtype) == (
        torch.bfloat16,
        torch.float64,
    )
    assert_same_output(before, outcome(model, [x]), TOLERANCES[torch.bfloat16])


@situation("Precision", "model.to(dtype) between operations", "works")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_model_may_change_its_dtype_between_two_operations(dtype: torch.dtype) -> None:
    model, x = two_layers(), torch.randn(16, 4)
    surgery.knife(model, surgery.Units({"0": [0, 3, 5]}))
    model.to(dtype)
    surgery.check(model).require()
    before = outcome(model, [x.to(dtype)])
    surgery.knife(model, surgery.Units({"0": [0, 3, 6]}), verify=x.to(dtype))
    assert_same_output(before, outcome(model, [x.to(dtype)]), DTYPES[dtype])


@situation("Precision", "complex weights", "refused")
def test_complex_weights_are_declined_with_their_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 8, dtype=torch.complex64), nn.Tanh(), nn.Linear(8, 2, dtype=torch.complex64))
    assert surgery.discover(model).declined["0"] == "complex weights"
    with pytest.raises(surgery.SiteError, match="complex weights"):
        surgery.knife(model, surgery.Units({"0": [0]}))


@situation("Precision", "float8 and integer weights", "refused")
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_weights_that_nothing_can_train_in_are_declined_with_their_dtype(dtype: torch.dtype) -> None:
    def stored(shape: tuple[int, int]) -> nn.Parameter:
        return nn.Parameter(torch.ones(shape).to(dtype), requires_grad=dtype.is_floating_point)

    class Net(nn.Module):
        """A layer that stores its weight small, and computes in float32 if it computes."""

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
            self.layer.weight = stored((8, 4))

        def forward(self, x):
            return self.head(torch.relu(self.layer(x)))

    model = Net()
    assert str(dtype) in surgery.discover(model).declined["layer"]
    with pytest.raises(surgery.SiteError, match=f"weights of dtype {dtype}"):
        surgery.knife(model, surgery.Units({"layer": [0]}))


# -- master weights --------------------------------------------------------------------------------------------------


def with_masters() -> tuple[Any, list[nn.Parameter], Adam]:
    """A bfloat16 model, and an optimizer of float32 copies that are cast back after each step."""
    model = two_layers().bfloat16()
    masters = [nn.Parameter(p.detach().float()) for p in model.parameters()]
    return model, masters, Adam(masters, lr=1e-2)


@situation("Precision", "an optimizer of float32 master copies", "refused")
def test_an_optimizer_of_master_copies_is_refused_and_found() -> None:
    model, _, optimizer = with_masters()
    with pytest.raises(surgery.OptimizerError, match="owns none of the model's 6 parameters"):
        surgery.knife(model, surgery.Units({"0": [0]}), optimizer=optimizer)
    (problem,) = surgery.check(model, optimizer).problems
    assert problem.about == "optimizer" and "none" not in problem.where


@situation("Checks", "master copies that write old weights back", "works")
def test_master_copies_that_write_old_weights_back_are_found() -> None:
    model, masters, _ = with_masters()
    surgery.knife(model, surgery.Units({"0": [0, 3]}))
    surgery.check(model).require()
    with torch.no_grad():
        for parameter, master in zip(model.parameters(), masters, strict=True):
            parameter.copy_(master)
    (problem,) = surgery.check(model).problems
    assert problem.about == "active members" and "units 0, 3 have their old weights" in problem.found


@situation("Precision", "a float32 model whose bfloat16 copy runs forward", "works")
def test_a_float32_model_is_operated_on_and_its_low_precision_copy_made_anew() -> None:
    master, x = two_layers(), torch.randn(16, 4)
    optimizer = Adam(master.parameters(), lr=1e-2)
    for step in range(4):
        low = copy.deepcopy(master).bfloat16()
        (low(x.bfloat16()).float() - 1).square().mean().backward()
        for parameter, small in zip(master.parameters(), low.parameters(), strict=True):
            parameter.grad = small.grad.float()
        optimizer.step()
        if step == 1:
            before = outcome(master, [x])
            surgery.knife(master, surgery.Units({"0": [0, 3]}), optimizer=optimizer, verify=x)
            assert_same_output(before, outcome(master, [x]), TOLERANCES[torch.float32])
            frozen = bank_tensors(master)
    assert_same_state(frozen, bank_tensors(master))
    surgery.check(master, optimizer).require()
