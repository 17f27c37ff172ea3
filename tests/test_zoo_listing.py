"""Every producer of the zoo is a site or is listed with a reason: nothing is passed over in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neuronsurgery import surgery
from neuronsurgery.pytorch.swapped import swapped_in
from tests.zoo import SPECIMENS
from tests.zoo.multiplied import multiplied_parameters
from tests.zoo.specimen import run

BY_NAME = {specimen.name: specimen for specimen in SPECIMENS}


def unlisted(model: nn.Module, inputs: Any) -> set[str]:
    """The producers, modules and parameters, of which discovery says nothing."""
    wanted = multiplied_parameters(model, lambda each: run(each, inputs))
    found = surgery.discover(model)
    listed = {*found, *found.declined}
    modules = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and not is_listed(name, listed)
    }
    aliases: dict[int, list[str]] = {}
    with swapped_in(model):  # names that parameters have only while they are used count as well
        for name, parameter in model.named_parameters(remove_duplicate=False):
            aliases.setdefault(id(parameter), []).append(name)
    named = dict(model.named_parameters())
    return modules | {name for name in wanted if not any(is_listed(a, listed) for a in aliases[id(named[name])])}


def is_listed(name: str, listed: set[str]) -> bool:
    """Whether a name is listed, or a module around it: a parametrized weight is its module's."""
    parts = name.split(".")
    return any(".".join(parts[:depth]) in listed for depth in range(len(parts) + 1))


@pytest.mark.parametrize("name", BY_NAME)
def test_every_producer_is_a_site_or_declined_with_a_reason(name: str) -> None:
    specimen = BY_NAME[name]
    assert unlisted(specimen.make(), specimen.example()) == set()


class Expert(nn.Module):
    """Chooses an expert by value, so that no trace reads its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 6, 4)), nn.Parameter(torch.randn(2, 4, 6))

    def forward(self, x):
        expert = int(x.sum() > 0)
        return F.relu(F.linear(x, self.up[expert])) @ self.down[expert].T


class Part(nn.Module):
    """A weight that is a sum of two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.noise = nn.Parameter(torch.randn(2, 6, 4)), nn.Parameter(torch.randn(6, 4))

    def forward(self, x):
        return F.relu(F.linear(x, self.both[0] + torch.tanh(self.noise)))


class Coupled(Part):
    def forward(self, x):
        return F.relu(F.linear(x, self.both[0].cumsum(0) + torch.tanh(self.noise)))


def test_stacked_weights_of_a_forward_that_cannot_be_traced_are_listed_with_its_place():
    declined = surgery.discover(Expert()).declined
    assert set(declined) == {"up", "down"}
    assert all(
        "Expert.forward cannot be traced" in reason and "test_zoo_listing.py" in reason for reason in declined.values()
    )


def test_a_weight_that_something_is_made_of_before_the_product_is_listed():
    declined = surgery.discover(Coupled()).declined
    assert set(declined) == {"both", "noise"}


def test_a_parameter_that_is_part_of_the_weight_of_a_site_is_not_declined():
    found = surgery.discover(Part())
    assert len(found) == 1 and not found.declined


def test_parameters_of_several_networks_that_are_swapped_in_are_listed_with_what_to_do():
    declined = surgery.discover(BY_NAME["MultiAgentMLP, own weights"].make()).declined
    assert {"_empty_net.0", "params.0.weight"} <= set(declined)
    assert all("swapped in at run time" in reason and "share_params=True" in reason for reason in declined.values())


def test_a_network_whose_shared_parameters_are_swapped_in_keeps_its_parameters_names_and_buffers():
    specimen = BY_NAME["MultiAgentMLP, shared"]
    model: Any = specimen.make()
    names, parameters = list(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    found = surgery.discover(model)
    assert list(found) == ["_empty_net.0", "_empty_net.2"] and list(model.state_dict()) == names
    optimizer = torch.optim.Adam(model.parameters())
    before = model(*specimen.example())
    report = surgery.knife(model, surgery.Units({"_empty_net.0": [1, 4]}), optimizer=optimizer)
    assert torch.allclose(model(*specimen.example()), before)
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert [name for name in model.state_dict() if name in names] == names
    surgery.undo(model, report, optimizer=optimizer)
    assert torch.equal(model(*specimen.example()), before) and list(model.state_dict()) == names


@pytest.mark.parametrize("shares", [True, False])
def test_torchrl_networks_that_keep_their_parameters_are_operable_where_agents_share_them(shares):
    modules = pytest.importorskip("torchrl.modules")
    model = modules.MultiAgentMLP(6, 2, 3, centralized=False, share_params=shares, depth=2, use_td_params=False)
    x = torch.randn(4, 3, 6)
    if not shares:
        found = surgery.discover(model)
        assert not found and "stacked for torch.vmap" in found.declined["_empty_net.0"]
        return
    before = model(x)
    assert surgery.knife(model, surgery.Random(1.0), verify=x).num_units == 64
    assert torch.allclose(model(x), before, atol=1e-6)
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_is_multiplied_with_is_seen_through_what_is_made_of_it():
    assert multiplied_parameters(Part(), lambda model: model(torch.randn(3, 4))) == {"both", "noise"}
    assert multiplied_parameters(nn.Embedding(5, 4), lambda model: model(torch.tensor([1]))) == set()
    assert unlisted(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), (torch.randn(2, 4),)) == set()
