"""The arms: the interventions see the same units and do different things to them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from neuronsurgery import surgery
from neuronsurgery.demo.arms import ARMS, ArmName
from neuronsurgery.demo.digits import Experiment, stream, tasks
from neuronsurgery.demo.networks import build_network, num_frozen_rows

TASK = next(tasks(Experiment(num_images=128, num_epochs=1, batch_size=32), seed=0))


def intervene(name):
    """Trains a network for one epoch and lets the arm intervene; returns all that a test may look at."""
    model = build_network(32, seed=0)
    optimizer = Adam(model.parameters(), lr=1e-2)
    intervention = ARMS[name].prepare(model, optimizer, stream(0, "surgery"))
    assert intervention is not None
    with surgery.observe(model, optimizer) as evidence:
        for batch in TASK.epochs[0]:
            optimizer.zero_grad()
            cross_entropy(model(TASK.images[batch]), TASK.labels[batch]).backward()
            optimizer.step()
    outputs = model(TASK.images).detach()
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    num_operated = intervention(evidence)
    return model, optimizer, outputs, weights, num_operated


def changed_rows(model, weights):
    return [(old != new).reshape(len(old), -1).any(dim=1) for old, new in zip(weights, model.parameters(), strict=True)]


def test_every_arm_has_a_row():
    assert set(ARMS) == set(ArmName)


@pytest.mark.parametrize("name", [ArmName.NONE, ArmName.WIDE])
def test_an_arm_left_alone_has_no_intervention(name):
    model = build_network(4, seed=0)
    assert ARMS[name].prepare(model, Adam(model.parameters()), stream(0, "surgery")) is None


def test_knife_keeps_the_output_and_adds_two_rows_a_unit():
    model, _, outputs, _, num_operated = intervene(ArmName.KNIFE)
    assert num_operated > 0
    assert num_frozen_rows(model) == 2 * num_operated
    torch.testing.assert_close(model(TASK.images), outputs, rtol=0.0, atol=2e-6 * float(outputs.abs().max()))


def test_a_plain_reset_adds_no_rows_and_changes_the_output():
    model, _, outputs, _, num_operated = intervene(ArmName.RESET)
    assert num_operated > 0
    assert num_frozen_rows(model) == 0
    assert (model(TASK.images) - outputs).abs().max() > 1e-3


def test_a_plain_reset_redraws_the_units_knife_replaces_and_nothing_else():
    knife, _, _, before_knife, num_replaced = intervene(ArmName.KNIFE)
    reset, _, _, before_reset, num_reset = intervene(ArmName.RESET)
    by_knife, by_reset = changed_rows(knife, before_knife), changed_rows(reset, before_reset)
    assert num_reset == num_replaced
    assert all(torch.equal(one, other) for one, other in zip(by_knife, by_reset, strict=True))
    assert sum(int(rows.sum()) for rows in by_reset) == 2 * num_reset  # a row of weights and a bias each


def test_a_plain_reset_gives_its_rows_fresh_moments():
    model, optimizer, _, weights, _ = intervene(ArmName.RESET)
    for parameter, rows in zip(model.parameters(), changed_rows(model, weights), strict=True):
        moments = optimizer.state[parameter]["exp_avg_sq"].reshape(len(parameter), -1)
        assert not moments[rows].any()
        assert moments[~rows].any()
