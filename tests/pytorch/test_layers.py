"""Which layers are meant: named ones, and the last before an output, told by the graph and not by registration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronsurgery.errors import SiteError
from neuronsurgery.pytorch.layers import layers_of


class Backwards(nn.Module):
    """Two heads, registered before what they read; a norm in between, a layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(4, 1)
        self.policy = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        self.norm = nn.LayerNorm(4)
        self.body = nn.Linear(3, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.norm(F.relu(self.body(x), inplace=True))
        return {"value": self.value(h), "policy": self.policy(h)}


EXAMPLE = torch.ones(2, 3)


def names(model: nn.Module, layers: object, example: Tensor | None = EXAMPLE) -> list[str]:
    return [each.name for each in layers_of(model, layers, example)]  # type: ignore[arg-type]


def test_the_last_layers_are_the_heads_wherever_they_are_registered() -> None:
    assert names(Backwards(), 1) == ["value", "policy.2"]


def test_a_layer_is_as_far_from_the_output_as_the_shortest_way_to_it() -> None:
    assert names(Backwards(), 2) == ["value", "policy.0", "policy.2", "body"]


def test_a_name_stands_for_all_that_is_in_it_and_none_for_the_model() -> None:
    assert names(Backwards(), "policy", None) == ["policy.0", "policy.2"]
    assert names(Backwards(), None, None) == ["value", "policy.0", "policy.2", "norm", "body", "unused"]


def test_a_parameter_of_two_names_is_listed_once() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert [list(each.parameters) for each in layers_of(model, None)] == [["weight", "bias"], ["bias"]]


def test_looking_for_the_last_layers_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.Dropout())
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert names(model, 1) == ["1"]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(each._forward_hooks for each in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("layers", "example", "message"),
    [
        ("head", EXAMPLE, "'head' is no module of this Backwards; it has value, policy"),
        (["policy.1"], EXAMPLE, r"'policy\.1' has no parameter"),
        (1, None, "without an example"),
        (0, EXAMPLE, "ask for at least 1"),
    ],
)
def test_layers_that_there_are_not_are_refused(layers: object, example: Tensor | None, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        names(Backwards(), layers, example)


def test_an_example_whose_output_has_no_graph_is_refused() -> None:
    class Detached(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(SiteError, match="gradients do not reach one"):
        names(nn.Sequential(Detached(3, 2)), 1)
