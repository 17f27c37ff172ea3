"""What the tests of saved states share: a model and its empty twin, and what says that two are one and the same."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from neuronsurgery import surgery
from tests.assertions import assert_same_output, outcome
from tests.snapshots import bits

__all__ = ["as_bits", "assert_same_model", "operated", "overwritten"]


def operated(model: nn.Module, times: int = 2) -> nn.Module:
    """Operated on at every site, some units again."""
    for time in range(times):
        sites = surgery.discover(model)
        surgery.knife(model, surgery.Units({name: [0, 1 + time] for name in sites}))
    return model


def overwritten(model: nn.Module, value: float = 0.5) -> nn.Module:
    """A copy with other values in every floating-point tensor: a model as it is before a state is loaded."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*copied.parameters(), *copied.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(value)
    return copied


def as_bits(state: Mapping[str, Any]) -> dict[str, bytes]:
    """A state dict as bytes, by name."""
    return {name: bits(value) for name, value in state.items()}


def assert_same_model(one: nn.Module, other: nn.Module, batch: Any) -> None:
    """The same state dict and composites bit for bit, the same output, and the same after one more operation."""
    assert as_bits(one.state_dict()) == as_bits(other.state_dict())
    assert surgery.composites(one) == surgery.composites(other)
    assert [type(m).__name__ for m in one.modules()] == [type(m).__name__ for m in other.modules()]
    assert_same_output(outcome(one, batch), outcome(other, batch), 0.0)
    site = next(iter(surgery.discover(one)), None)
    if site is not None:
        for model in (one, other):
            torch.manual_seed(5)
            surgery.knife(model, surgery.Units({site: [1]}))
        assert as_bits(one.state_dict()) == as_bits(other.state_dict())
        assert_same_output(outcome(one, batch), outcome(other, batch), 0.0)
