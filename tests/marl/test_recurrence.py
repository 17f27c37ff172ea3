"""The cell that is unrolled by hand against torch's own, step by step, and against numbers of the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from marl import recurrence
from marl.recurrence import GRUCell

T, M, NUM_INPUTS, H = 7, 5, 3, 4


@pytest.fixture(params=[1, 3 * H * M * 2, 2**18], ids=["one step", "two steps", "all steps"])
def stretch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many steps are computed together must not matter."""
    monkeypatch.setattr(recurrence, "STRETCH", request.param)


def step_by_step(cell: nn.GRUCell, x: Tensor) -> Tensor:
    hidden = x.new_zeros(x.shape[1], H)
    return torch.stack([hidden := cell(step, hidden) for step in x])


def gradients(hidden: Tensor, x: Tensor, cell: nn.GRUCell, upstream: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((hidden * upstream).sum(), [x, *cell.parameters()]))


@pytest.mark.usefixtures("stretch")
def test_unrolled_cell_has_the_states_and_the_gradients_of_torchs_own() -> None:
    cell, x = GRUCell(NUM_INPUTS, H).double(), torch.randn(T, M, NUM_INPUTS).double().requires_grad_()
    upstream = torch.randn(T, M, H).double()
    found, expected = cell(x), step_by_step(cell, x)
    assert (found - expected).abs().max() <= 1e-14
    pairs = zip(gradients(found, x, cell, upstream), gradients(expected, x, cell, upstream), strict=True)
    for mine, theirs in pairs:
        assert theirs.abs().max() > 0.01
        assert (mine - theirs).abs().max() <= 1e-12


@pytest.mark.usefixtures("stretch")
def test_gradient_of_the_unrolled_cell_is_that_of_differences() -> None:
    cell, x = GRUCell(NUM_INPUTS, H).double(), torch.randn(T, 2, NUM_INPUTS).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: cell(x), (x, *cell.parameters()))


@pytest.mark.usefixtures("stretch")
def test_states_are_the_same_without_gradients() -> None:
    cell, x = GRUCell(NUM_INPUTS, H), torch.randn(T, M, NUM_INPUTS)
    with torch.no_grad():
        assert torch.equal(cell(x), cell(x.clone().requires_grad_()))


def test_inputs_without_gradient_get_none_and_weights_get_theirs() -> None:
    cell, x = GRUCell(NUM_INPUTS, H), torch.randn(T, M, NUM_INPUTS)
    cell(x).sum().backward()
    assert x.grad is None
    assert all(parameter.grad is not None for parameter in cell.parameters())


def test_a_second_backward_pass_finds_what_the_first_did() -> None:
    cell, x = GRUCell(NUM_INPUTS, H).double(), torch.randn(T, M, NUM_INPUTS).double().requires_grad_()
    hidden = cell(x).square().sum()
    first = torch.autograd.grad(hidden, [x, *cell.parameters()], retain_graph=True)
    second = torch.autograd.grad(hidden, [x, *cell.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_inputs_of_one_row_and_those_that_are_no_block_of_memory_are_taken() -> None:
    cell = GRUCell(NUM_INPUTS, H).double()
    for x in (torch.randn(T, 1, NUM_INPUTS).double(), torch.randn(M, T, NUM_INPUTS).double().transpose(0, 1)):
        assert (cell(x) - step_by_step(cell, x)).abs().max() <= 1e-14
