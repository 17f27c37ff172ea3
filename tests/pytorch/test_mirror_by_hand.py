"""Mirroring that a reader can check on paper: the layer of `test_composite_by_hand`, and a target that lags behind it.

    model    W = [[ 1,  2],   b = (-1, 0)      target   W = [[ 1,  1],   b = (0, 0)      x = (2, 1)
                  [ 3, -1]]                                   [ 2, -1]]
             h = relu(3, 5) = (3, 5)                    h = relu(3, 3) = (3, 3)
             V = (1, 10), y = 53                        V = (1, 10), y = 33

Unit 0 of the model is operated on; the fresh draw is made to be (1, -1), bias 0, which gives 1.

    own:     knowledge (1, 1) + 0, the target's own unit; compensation (1, -1); the slot becomes (1, -1)
             h_0 = 3 + (1 - 1) = 3 as before, y = 33
    shared:  knowledge (1, 2) - 1 and compensation (1, -1), the model's; the slot becomes the model's slot, (1, -1)
             h_0 = 3 + (1 - 1) = 3: by chance as before. At x = (2, 3) it is 7 where it was 5

The model's slot then trains to (1, -0.5), bias 0.5: the active member gives 2, h_0 = 3 + (2 - 1) = 4, y = 54.
The target follows with rate 1/2 (all numbers are exact in binary):

    own, by state dict     knowledge (1, 1.5) - 0.5 gives 3; slot (1, -0.75), 0.25 gives 1.5; h_0 = 3 + 0.5 = 3.5
                           unit 1: (2.5, -1) gives 4; y = 3.5 + 40 = 43.5
    shared, by parameters  knowledge (1, 2) - 1 gives 3; the same slot, the same unit 1; y = 43.5
    own, by parameters     knowledge (1, 1) + 0 gives 3; y = 43.5 here; but at x = (2, 3) the knowledge stays at 5
                           where the model's is 7, for good

The model's operation undone, its slot is (1, 2) - 1 again, and the target's (by state dict) is (1, 1.5) - 0.5.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuronsurgery import surgery

X, ELSEWHERE = torch.tensor([[2.0, 1.0]]), torch.tensor([[2.0, 3.0]])


def network(weight: list[list[float]], bias: list[float]) -> Any:
    made = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
    for tensor, values in zip(made.state_dict().values(), (weight, bias, [[1.0, 10.0]]), strict=True):
        tensor.copy_(torch.tensor(values))
    return made


def one_minus_one(weight: Tensor) -> None:
    weight.copy_(torch.tensor([[1.0, -1.0], [1.0, -1.0]]))


@pytest.fixture
def model() -> Any:
    made = network([[1, 2], [3, -1]], [-1, 0])
    surgery.knife(made, surgery.Units({"0": [0]}), init=one_minus_one)
    return made


@pytest.fixture
def target() -> Any:
    return network([[1, 1], [2, -1]], [0, 0]).requires_grad_(False)


def train(model: Any) -> None:
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([1.0, -0.5])
        model[0].bias[0] = 0.5


def follow(target: nn.Module, model: nn.Module, *, whole: bool) -> None:
    mine, theirs = (dict(each.state_dict() if whole else each.named_parameters()) for each in (target, model))
    with torch.no_grad():
        for name, value in mine.items():
            if value.is_floating_point():
                value.copy_((value + theirs[name]) / 2)


def rows(target: nn.Module) -> tuple[list[list[float]], list[float]]:
    state = target.state_dict()
    return state["0.composite.frozen_weight"][:2].tolist(), state["0.composite.frozen_bias"][:2].tolist()


def test_own_knowledge_is_the_targets_old_unit_and_its_output_stays(model, target):
    assert (model(X).item(), target(X).item()) == (53, 33)
    report = surgery.mirror(model, onto=target, verify=X)
    assert rows(target) == ([[1, 1], [1, -1]], [0, 0])
    assert target[0].weight.tolist() == [[1, -1], [2, -1]] and target[0].bias.tolist() == [0, 0]
    assert (target(X).item(), report.max_moved) == (33, 0)


def test_shared_rows_and_slots_are_the_models(model, target):
    assert target(ELSEWHERE).item() == 5 + 10 * 1
    surgery.mirror(model, onto=target, frozen="shared")
    assert rows(target) == ([[1, 2], [1, -1]], [-1, 0])
    assert target[0].weight.tolist() == [[1, -1], [2, -1]]
    assert target(ELSEWHERE).item() == 7 + 10 * 1


@pytest.mark.parametrize(("frozen", "whole"), [("own", True), ("shared", False)])
def test_the_right_update_takes_every_member_half_way(model, target, frozen, whole):
    surgery.mirror(model, onto=target, frozen=frozen)
    train(model)
    assert model(X).item() == 54
    follow(target, model, whole=whole)
    assert target(X).item() == 43.5
    assert rows(target) == (([[1, 1.5], [1, -1]], [-0.5, 0]) if whole else ([[1, 2], [1, -1]], [-1, 0]))


def test_own_rows_under_updates_of_parameters_alone_stay_behind_for_good(model, target):
    surgery.mirror(model, onto=target, frozen="own")
    train(model)
    for _ in range(60):
        follow(target, model, whole=False)
    assert (model(X) - target(X)).item() == 0
    assert (model(ELSEWHERE) - target(ELSEWHERE)).item() == 7 - 5


def test_an_undone_operation_is_taken_back_to_the_targets_own_knowledge(target):
    model = network([[1, 2], [3, -1]], [-1, 0])
    report = surgery.knife(model, surgery.Units({"0": [0]}), init=one_minus_one)
    surgery.mirror(model, onto=target)
    train(model)
    follow(target, model, whole=True)
    surgery.undo(model, report)
    mirrored = surgery.mirror(model, onto=target)
    assert model[0].weight.tolist() == [[1, 2], [3, -1]]
    assert target[0].weight.tolist() == [[1, 1.5], [2.5, -1]] and target[0].bias.tolist() == [-0.5, 0]
    assert mirrored.targets[0].taken_back == {"0": (0,)} and list(target.state_dict()) == list(model.state_dict())
