"""Target networks follow in place, buffers included, and say where they differ."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from marl.errors import CheckpointError
from marl.targets import copy_online, follow_online


def network() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    made(torch.randn(8, 2))  # so that running statistics differ
    return made


def test_a_copy_is_made_in_place_and_of_buffers_too() -> None:
    online, target = network(), network()
    held = [*target.parameters(), *target.buffers()]
    online(torch.randn(4, 2))
    copy_online(target, online)
    for found, expected in zip(held, [*online.parameters(), *online.buffers()], strict=True):
        assert torch.equal(found, expected)


def test_following_goes_a_share_of_the_way_and_copies_whole_numbers() -> None:
    online, target = network(), network()
    online(torch.randn(4, 2))
    expected = [one.lerp(two, 0.25) for one, two in zip(target.parameters(), online.parameters(), strict=True)]
    follow_online(target, online, rate=0.25)
    for found, value in zip(target.parameters(), expected, strict=True):
        assert torch.allclose(found, value)
    assert target.get_buffer("1.num_batches_tracked") == 2


@pytest.mark.parametrize("other", [nn.Linear(2, 4), nn.Linear(2, 3, bias=False)])
def test_networks_that_differ_are_refused_before_anything_changes(other: nn.Module) -> None:
    target = nn.Linear(2, 3)
    before = target.weight.detach().clone()
    with pytest.raises(CheckpointError, match="'bias'"):
        copy_online(target, other)
    assert torch.equal(target.weight, before)
