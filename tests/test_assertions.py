"""The assertions can fail, each for the reason it exists."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.assertions import (
    assert_same_gradient,
    assert_same_output,
    assert_same_state,
    assert_unchanged,
    bank_tensors,
    outcome,
    state_of,
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_assert_same_output_fails_when_an_output_moves_beyond_the_tolerance():
    model, x = network(), [torch.randn(5, 3)]
    before = outcome(model, x)
    model.state_dict()["2.bias"].add_(1e-4)
    after = outcome(model, x)
    assert_same_output(before, after, 1e-3)
    with pytest.raises(AssertionError, match="output 0 moved"):
        assert_same_output(before, after, 1e-6)


def test_an_outcome_of_keyword_arguments_has_the_gradients_of_floating_ones():
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)

        def forward(self, *, tokens: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"found": self.embedding(tokens) * scale}

    found = outcome(Lookup(), {"tokens": torch.tensor([1, 4]), "scale": torch.ones(3)})
    assert [output.shape for output in found.tensors] == [(2, 3)]
    assert [None if g is None else g.shape for g in found.gradients] == [(3,)]


def test_assert_same_output_fails_when_an_output_is_not_finite():
    model, x = network(), [torch.full((5, 3), torch.inf)]
    with pytest.raises(AssertionError, match="not finite"):
        assert_same_output(outcome(model, x), outcome(model, x), 1.0)


def test_assert_same_output_fails_when_only_the_second_of_two_outputs_moves():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.a(x), self.b(x)

    model, x = Two(), [torch.randn(5, 3)]
    before = outcome(model, x)
    with torch.no_grad():
        model.b.weight += 1
    with pytest.raises(AssertionError, match="output 1 moved"):
        assert_same_output(before, outcome(model, x), 1e-3)


def test_assert_same_output_takes_outputs_near_zero_by_cancellation_relative_to_the_last_layers_terms():
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model.state_dict()["0.weight"].copy_(torch.tensor([[1.0, -1.0]]))
    before = outcome(model, [torch.tensor([[1.0, 1.0]])])
    assert before.tensors[0].item() == 0.0
    assert before.scales == (2.0,)


def test_assert_same_gradient_fails_when_no_gradient_passes_a_layer_any_more():
    model, x = network(), [torch.randn(5, 3)]
    before = outcome(model, x)
    model.insert(1, Detached())
    after = outcome(model, x)
    assert_same_output(before, after, 1e-6)
    with pytest.raises(AssertionError, match="gradient"):
        assert_same_gradient(before, after, 1e-3)


class Detached(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach() + 0 * x[..., :1]


def test_assert_same_state_fails_on_one_changed_bit_and_on_a_new_key():
    model = network()
    before = state_of(model)
    assert_same_state(before, state_of(model))
    model.state_dict()["0.weight"][0, 0] += 1e-6
    with pytest.raises(AssertionError, match=r"0\.weight moved"):
        assert_same_state(before, state_of(model))
    with pytest.raises(AssertionError):
        assert_same_state(before, {**before, "more": torch.zeros(())})


def test_assert_unchanged_fails_on_another_dtype():
    with pytest.raises(AssertionError, match="weight"):
        assert_unchanged("weight", torch.zeros(2), torch.zeros(2, dtype=torch.float64))


def test_bank_tensors_are_those_of_banks_and_no_others():
    model = network()
    norm = nn.BatchNorm1d(2)
    model[0].add_module("composite", norm)
    assert set(bank_tensors(model)) == {name for name in model.state_dict() if name.startswith("0.composite.")}
    assert norm.running_mean is not None
    norm.running_mean += 1
    assert bank_tensors(model)["0.composite.running_mean"].tolist() == [1, 1]


def test_outcome_leaves_gradients_buffers_and_inputs_alone():
    model, x = network(), torch.randn(5, 3)
    model.insert(1, nn.BatchNorm1d(4))
    kept, state = x.clone(), state_of(model)
    outcome(model, [x])
    assert_same_state(state, state_of(model))
    assert torch.equal(x, kept)
    assert not x.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
