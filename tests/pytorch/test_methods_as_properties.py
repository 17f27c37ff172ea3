"""Laws of the methods over generated networks: what preserves the output does, and nobody hears a silenced unit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from neuronsurgery import surgery
from neuronsurgery.pytorch.links import Norm
from neuronsurgery.pytorch.sites import discover
from tests.strategies import STYLES, Network, networks

FEW = settings(max_examples=3, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=60, suppress_health_check=list(HealthCheck))
every_style = pytest.mark.parametrize("style", STYLES)


def chosen(data: Any, names: list[str], network: Network) -> dict[str, list[int]]:
    sites = surgery.discover(network.model)
    return {
        name: data.draw(st.lists(st.integers(0, sites[name].num_units - 1), min_size=1, max_size=3, unique=True))
        for name in data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    }


def outputs(network: Network) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        found = network.model(*network.inputs)
    return [each for each in pytree.tree_leaves(found) if isinstance(each, Tensor)]


def couples(network: Network, name: str) -> bool:
    """Whether a norm on the path lets a unit move its neighbors, whoever reads it."""
    return any(isinstance(link, Norm) for link in discover(network.model).places[name].path.links)


@every_style
@FEW
@given(data=st.data())
def test_the_output_does_not_depend_on_what_a_reset_draws(data, style):
    check_reset(data, style)


@pytest.mark.slow
@every_style
@MANY
@given(data=st.data())
def test_the_output_does_not_depend_on_what_a_reset_draws_many(data, style):
    check_reset(data, style)


def check_reset(data: Any, style: str) -> None:
    network = data.draw(networks(styles=[style], dtypes=[torch.float64]))
    network.model.eval()
    readers = surgery.consumers(network.model).readers
    names = [name for name in readers if not couples(network, name)]
    if not names:
        return
    units = surgery.Units(chosen(data, names, network))
    surgery.redo(network.model, units, generator=torch.Generator().manual_seed(1))
    before = outputs(network)
    surgery.redo(network.model, units, generator=torch.Generator().manual_seed(2))
    for one, other in zip(before, outputs(network), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@every_style
@FEW
@given(data=st.data())
def test_widening_moves_no_output_wherever_it_is_not_declined(data, style):
    check_widening(data, style)


@pytest.mark.slow
@every_style
@MANY
@given(data=st.data())
def test_widening_moves_no_output_wherever_it_is_not_declined_many(data, style):
    check_widening(data, style)


def check_widening(data: Any, style: str) -> None:
    network = data.draw(networks(styles=[style], dtypes=[torch.float64]))
    network.model.eval()
    names = list(surgery.consumers(network.model).readers)
    if not names:
        return
    before = outputs(network)
    parameters = list(network.model.parameters())
    report = surgery.widen(network.model, surgery.Units(chosen(data, names, network)))
    for one, other in zip(before, outputs(network), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    assert [id(each) for each in parameters] == [id(each) for each in network.model.parameters()]
    assert (report.num_units > 0) == (report.parameters_after > report.parameters_before)


def test_some_styles_of_network_have_consumers() -> None:
    """So that the laws above say something."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert surgery.consumers(model).readers
