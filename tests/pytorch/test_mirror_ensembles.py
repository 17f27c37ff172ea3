"""Ensembles that `torch.func.stack_module_state` runs as one: members of equal structure stay stackable."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from neuronsurgery import surgery

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.relu(self.norm(self.fc(x))))
        return out


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))


MEMBERS: dict[str, tuple[Callable[[], nn.Module], str]] = {"scope": (Net, "fc"), "sequential": (sequential, "0")}


@pytest.fixture(params=MEMBERS)
def members(request: Any) -> tuple[list[Any], str]:
    make, site = MEMBERS[request.param]
    return [make() for _ in range(3)], site


def stacked(models: Sequence[nn.Module]) -> Callable[..., Tensor]:
    """The ensemble as torch's tutorial builds it."""
    base = copy.deepcopy(models[0]).to("meta")
    state = stack_module_state(list(models))
    return lambda: vmap(lambda p, b: functional_call(base, (p, b), (X,)))(*state)


def assert_agree(models: Sequence[nn.Module]) -> None:
    expected = torch.stack([model(X) for model in models])
    assert torch.allclose(stacked(models)(), expected, atol=1e-6)


@pytest.mark.situation("Replicas", "ensemble under vmap, the same units of each member", "works")
def test_members_operated_on_in_the_same_units_stay_stackable(members):
    models, site = members
    before = torch.stack([model(X) for model in models])
    for units in ([1, 5], [5, 2]):
        for model in models:
            surgery.knife(model, surgery.Units({site: units}))
    assert torch.allclose(stacked(models)(), before, atol=1e-5)
    for model in models:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
    assert_agree(models)


@pytest.mark.situation("Replicas", "ensemble under vmap, mirrored members", "works")
def test_members_mirrored_from_one_stay_stackable(members):
    models, site = members
    surgery.knife(models[0], surgery.Units({site: [1, 5]}))
    surgery.mirror(models[0], onto=models[1:])
    assert_agree(models)


def test_gradients_of_stacked_members_are_their_own(members):
    models, site = members
    for model in models:
        surgery.knife(model, surgery.Units({site: [1, 5]}))
    base = copy.deepcopy(models[0]).to("meta")

    def loss(parameters: Any, buffers: Any) -> Tensor:
        out: Tensor = functional_call(base, (parameters, buffers), (X,))
        return out.square().mean()

    found = vmap(grad(loss))(*stack_module_state(models))
    for index, model in enumerate(models):
        model(X).square().mean().backward()
        for name, parameter in model.named_parameters():
            assert torch.allclose(found[name][index], parameter.grad, atol=1e-6)


@pytest.mark.situation("Replicas", "ensemble under vmap, members of different structure", "refused")
@pytest.mark.parametrize("units", [[2, 5], [5, 1]], ids=["other units", "another order"])
def test_members_whose_rows_are_summed_differently_are_refused(members, units):
    """Their tensors have the same names and shapes, so that torch stacks them."""
    models, site = members
    for model, chosen in zip(models, ([1, 5], [1, 5], units), strict=True):
        surgery.knife(model, surgery.Units({site: chosen[:1]}))
        surgery.knife(model, surgery.Units({site: chosen[1:]}))
    run = stacked(models)
    for _ in range(2):
        with pytest.raises(surgery.SurgeryError, match=f"stacked here were operated on differently at '{site}'"):
            run()
    assert_agree(models[:2])


@pytest.mark.situation("Replicas", "ensemble under vmap, only some members operated on", "refused")
def test_members_with_and_without_composite_units_are_refused_by_torch(members):
    models, site = members
    surgery.knife(models[2], surgery.Units({site: [1, 5]}))
    with pytest.raises(RuntimeError, match="Expected all models to be of the same class"):
        stacked(models)


def test_a_vmap_over_inputs_alone_needs_no_stack(members):
    (model, *_), site = members
    surgery.knife(model, surgery.Units({site: [1, 5]}))
    assert torch.allclose(vmap(model)(X), model(X), atol=1e-6)


def test_an_averaged_fingerprint_is_still_taken_for_the_same(members):
    models, site = members
    surgery.knife(models[0], surgery.Units({site: [1, 5]}))
    surgery.mirror(models[0], onto=models[1:])
    with torch.no_grad():
        models[1].get_submodule(f"{site}.composite").fingerprint.mul_(1 + 1e-5)  # as rounding would
    assert_agree(models)


def test_undoing_makes_the_fingerprint_that_of_what_is_left(members):
    (one, other, _), site = members
    for model in (one, other):
        surgery.knife(model, surgery.Units({site: [1]}))
    report = surgery.knife(one, surgery.Units({site: [3]}))
    with pytest.raises(surgery.SurgeryError, match="operated on differently"):
        stacked([one, other])()
    surgery.undo(one, report)
    assert_agree([one, other])
