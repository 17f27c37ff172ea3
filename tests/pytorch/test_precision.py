"""Operating in the middle of a run in other precisions than float32: autocast, gradient scalers, half and double."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from neuronsurgery import surgery
from neuronsurgery.surgery import Quantity

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
