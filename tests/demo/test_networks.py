"""The network and how its size is counted."""

from __future__ import annotations

import pytest
import torch

from neuronsurgery import surgery
from neuronsurgery.demo.networks import build_network, num_frozen_rows, num_stored_weights, width_of_size


def test_equal_seeds_give_equal_weights_and_leave_torch_s_generator_alone():
    before = torch.get_rng_state()
    one, other, third = build_network(8, seed=0), build_network(8, seed=0), build_network(8, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))
    assert not any(torch.equal(*pair) for pair in zip(one.parameters(), third.parameters(), strict=True))


def test_an_operation_adds_two_frozen_rows_a_unit_to_the_count():
    model = build_network(8, seed=0)
    surgery.knife(model, surgery.Units({"0": [1, 3], "4": [0]}))
    assert num_frozen_rows(model) == 6
    plain = sum(parameter.numel() for parameter in model.parameters())
    assert num_stored_weights(model) == plain + 4 * (64 + 1) + 2 * (8 + 1)


@pytest.mark.parametrize("num_units", [1, 2, 64, 65, 300])
def test_width_of_size_is_the_smallest_that_stores_as_much(num_units):
    num_weights = num_stored_weights(build_network(num_units, seed=0))
    assert width_of_size(num_weights) == num_units
    assert width_of_size(num_weights + 1) == num_units + 1
