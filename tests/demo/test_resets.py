"""The plain reset and what Adam makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import Adam

from neuronsurgery.demo.resets import FreshRows, redraw

ROWS = [1, 3]
OTHERS = [0, 2, 4]


def take_steps(parameter, optimizer, gradients):
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()


def make(start, lr=0.01):
    parameter = nn.Parameter(start.clone())
    return parameter, Adam([parameter], lr=lr)


@pytest.mark.parametrize("shape", [(5, 3), (5,)], ids=["weight", "bias"])
@pytest.mark.parametrize("num_before", [1, 10, 1000])
def test_restarted_rows_move_as_a_new_network_s_do(shape, num_before):
    before, after = torch.randn(num_before, *shape), torch.randn(50, *shape)
    restarted, optimizer = make(torch.zeros(shape))
    fresh = FreshRows(optimizer)
    take_steps(restarted, optimizer, before)
    fresh.restart([restarted], ROWS)
    new, its_optimizer = make(restarted.detach())
    for gradient in after:
        take_steps(restarted, optimizer, [gradient])
        take_steps(new, its_optimizer, [gradient])
        torch.testing.assert_close(restarted[ROWS], new[ROWS], rtol=1e-5, atol=1e-7)


def test_the_other_rows_keep_torch_s_update_bit_for_bit():
    before, after = torch.randn(10, 5, 3), torch.randn(50, 5, 3)
    restarted, optimizer = make(torch.zeros(5, 3))
    untouched, its_optimizer = make(torch.zeros(5, 3))
    fresh = FreshRows(optimizer)
    for parameter, its in ((restarted, optimizer), (untouched, its_optimizer)):
        take_steps(parameter, its, before)
    fresh.restart([restarted], ROWS)
    for parameter, its in ((restarted, optimizer), (untouched, its_optimizer)):
        take_steps(parameter, its, after)
    assert torch.equal(restarted[OTHERS], untouched[OTHERS])
    assert not torch.equal(restarted[ROWS], untouched[ROWS])


def test_rows_can_start_over_twice():
    restarted, optimizer = make(torch.zeros(5, 3))
    fresh = FreshRows(optimizer)
    take_steps(restarted, optimizer, torch.randn(10, 5, 3))
    fresh.restart([restarted], [0, 1])
    take_steps(restarted, optimizer, torch.randn(10, 5, 3))
    fresh.restart([restarted], ROWS)
    new, its_optimizer = make(restarted.detach())
    gradients = torch.randn(5, 5, 3)
    take_steps(restarted, optimizer, gradients)
    take_steps(new, its_optimizer, gradients)
    torch.testing.assert_close(restarted[ROWS], new[ROWS], rtol=1e-5, atol=1e-7)


def test_redraw_draws_within_the_bound_of_a_new_layer_and_leaves_other_units():
    layer = nn.Linear(16, 5)
    kept = layer.weight[OTHERS].detach().clone(), layer.bias[OTHERS].detach().clone()
    old = layer.weight[ROWS].detach().clone()
    redraw(layer, ROWS, torch.Generator().manual_seed(0))
    assert torch.equal(layer.weight[OTHERS], kept[0])
    assert torch.equal(layer.bias[OTHERS], kept[1])
    assert not torch.equal(layer.weight[ROWS], old)
    assert max(layer.weight.abs().max(), layer.bias.abs().max()) <= 0.25
