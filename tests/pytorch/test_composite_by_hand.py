"""One composite unit that a reader can check on paper: a layer of two units with small integers.

    x = (2, 1)

    W = [[ 1,  2],   b = (-1, 0)      z = (1*2 + 2*1 - 1,  3*2 - 1*1 + 0) = (3, 5)
         [ 3, -1]]                    h = relu(z)                         = (3, 5)

    V = [[1, 10]]    no bias          y = 1*3 + 10*5                      = 53

Unit 0 is operated on, and the fresh draw is made to be (1, -1) with bias 0 (`init=` fills weights with it, and biases
start at zero). Then

    member            weights    bias   z = w.x + b       relu(z)
    knowledge k       (1,  2)     -1    2 + 2 - 1 =  3       3       frozen, bank row 0, sign +
    compensation c    (1, -1)      0    2 - 1 + 0 =  1       1       frozen, bank row 1, sign -
    active a          (1, -1)      0    2 - 1 + 0 =  1       1       trained, in the slot

    h_0 = k + (a - c) = 3 + (1 - 1) = 3,  h_1 = 5,  y = 53 as before.

Gradients of y. At the slot of unit 0: dy/dh_0 = 1, and relu'(1) = 1, so dy/da = 1 * x = (2, 1), and 1 for the bias; at
unit 1 it is 10 * x = (20, 10), and 10. At the input all members pass it on:

    dy/dx = 1 * (k + a - c) + 10 * w_1 = (1, 2) + (1, -1) - (1, -1) + (30, -10) = (31, -8)

After a step of SGD with lr 0.5 the slot is (1, -1) - 0.5 * (2, 1) = (0, -1.5), with bias -0.5; unit 1 becomes
(3, -1) - 0.5 * (20, 10) = (-7, -6), bias -5. Then a.x + b = 0 - 1.5 - 0.5 = -2, and h_0 = 3 + (0 - 1) = 2;
unit 1 has -14 - 6 - 5 = -25, so h_1 = 0. With V held fixed, y = 2.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from neuronsurgery import surgery


@pytest.fixture
def model() -> nn.Sequential:
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
    weight, bias, outgoing = network.state_dict().values()
    weight.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    bias.copy_(torch.tensor([-1.0, 0.0]))
    outgoing.copy_(torch.tensor([[1.0, 10.0]]))
    return network


X = torch.tensor([[2.0, 1.0]])


def one_minus_one(weight: Tensor) -> None:
    weight.copy_(torch.tensor([[1.0, -1.0], [1.0, -1.0]]))


def operated(model: nn.Sequential) -> surgery.Report:
    return surgery.knife(model, surgery.Units({"0": [0]}), init=one_minus_one)


def test_before_the_operation_the_output_is_53(model):
    assert model(X).item() == 53


def test_the_slot_holds_the_active_member_and_the_bank_knowledge_then_compensation(model):
    operated(model)
    state = model.state_dict()
    assert state["0.weight"].tolist() == [[1, -1], [3, -1]]
    assert state["0.bias"].tolist() == [0, 0]
    assert state["0.composite.frozen_weight"][:2].tolist() == [[1, 2], [1, -1]]
    assert state["0.composite.frozen_bias"][:2].tolist() == [-1, 0]
    members = surgery.composites(model).members["0"]
    assert [(member.role, member.unit) for member in members] == [("knowledge", 0), ("compensation", 0)]


def test_the_output_is_the_same_and_so_is_each_activation(model):
    report = operated(model)
    assert model[:2](X).tolist() == [[3, 5]]
    assert model(X).item() == 53
    assert report.max_error == 0


def test_the_active_row_gets_the_gradient_of_the_input_and_the_input_that_of_all_members(model):
    operated(model)
    x = X.clone().requires_grad_()
    model(x).backward()
    assert model[0].weight.grad.tolist() == [[2, 1], [20, 10]]
    assert model[0].bias.grad.tolist() == [1, 10]
    assert x.grad is not None
    assert x.grad.tolist() == [[31, -8]]


def test_after_a_step_the_knowledge_stays_and_the_active_member_moves(model):
    operated(model)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.5)
    model(X).backward()
    optimizer.step()
    assert model[0].weight.tolist() == [[0, -1.5], [-7, -6]]
    assert model[0].bias.tolist() == [-0.5, -5]
    assert model.state_dict()["0.composite.frozen_weight"][:2].tolist() == [[1, 2], [1, -1]]
    assert model[:2](X).tolist() == [[2, 0]]
    assert model(X).item() == 2


def test_a_second_operation_makes_the_active_member_knowledge_and_changes_nothing(model):
    operated(model)
    with torch.no_grad():
        model[0].weight[0] = torch.tensor([2.0, 1.0])  # a = relu(2*2 + 1*1) = 5, so h_0 = 3 + (5 - 1) = 7
    assert model(X).item() == 57
    operated(model)
    assert model.state_dict()["0.composite.frozen_weight"][:4].tolist() == [[1, 2], [1, -1], [2, 1], [1, -1]]
    assert model.state_dict()["0.weight"][0].tolist() == [1, -1]
    assert model(X).item() == 57  # 3 + (5 - 1) + (1 - 1) = 7


def test_undo_puts_the_old_numbers_back(model):
    report = operated(model)
    surgery.undo(model, report)
    assert model[0].weight.tolist() == [[1, 2], [3, -1]]
    assert model[0].bias.tolist() == [-1, 0]
    assert list(model.state_dict()) == ["0.weight", "0.bias", "2.weight"]
    assert model(X).item() == 53
