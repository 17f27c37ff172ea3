"""The networks as surgery finds them: hidden ReLU units are sites, nothing from a generated weight onward is."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from marl.errors import SettingsError
from marl.learner import Learner
from marl.run_settings import SurgerySettings
from marl.settings import AgentSettings, MixerSettings, QMIXSettings, QPLEXSettings, VDNSettings, preset
from marl.stacking import stack_learners
from marl.surgery import Operations
from neuronsurgery import surgery
from tests.marl.batches import made_up_episodes, new_learner

QPLEX_HIDDEN = {f"mixer.transformation.{net}.0" for net in ("weights", "offsets")}


def attention(*layers: str) -> set[str]:
    return {f"mixer.attention.{net}.{layer}" for net in ("keys", "agents", "actions") for layer in layers}


SITES: list[tuple[MixerSettings, AgentSettings, set[str]]] = [
    (VDNSettings(), AgentSettings(), {"agent.encoder.0"}),
    (VDNSettings(), AgentSettings(num_hidden_layers=2), {"agent.encoder.0", "agent.encoder.2"}),
    (VDNSettings(), AgentSettings("feed_forward", num_hidden_layers=2), {"agent.encoder.0", "agent.encoder.2"}),
    (QMIXSettings(), AgentSettings(), {"agent.encoder.0", "mixer.w1.0", "mixer.w2.0", "mixer.v.0"}),
    (QMIXSettings(hypernet_layers=1), AgentSettings(), {"agent.encoder.0", "mixer.v.0"}),
    (QPLEXSettings(adversary_layers=1), AgentSettings(), {"agent.encoder.0", *QPLEX_HIDDEN}),
    (QPLEXSettings(adversary_layers=2), AgentSettings(), {"agent.encoder.0", *QPLEX_HIDDEN, *attention("0")}),
    (
        QPLEXSettings(adversary_layers=3),
        AgentSettings(),
        {"agent.encoder.0", *QPLEX_HIDDEN, *attention("0", "3.weight")},
    ),
]


@pytest.mark.parametrize(("mixer", "agent", "expected"), SITES, ids=lambda value: type(value).__name__)
def test_hidden_relu_units_are_sites_and_nothing_else_is(mixer: Any, agent: Any, expected: set[str]) -> None:
    learner = new_learner(replace(preset("pymarl", "qmix"), mixer=mixer, agent=agent))
    sites = surgery.discover(learner.online)
    assert set(sites) == expected
    assert {sites[name].activation_fn for name in sites} == {"relu"}


@pytest.mark.parametrize(
    "mixer", [QMIXSettings(6, 2, 8), QPLEXSettings(2, 3, 6, 8)], ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize("kind", ["recurrent", "feed_forward"])
def test_an_operation_leaves_loss_and_updates_going(mixer: Any, kind: Any) -> None:
    settings = replace(preset("pymarl", "qmix"), mixer=mixer, agent=AgentSettings(kind, hidden_size=8))
    learner, episodes = new_learner(settings), made_up_episodes()
    learner.update(episodes)
    before = learner.estimate(episodes)
    units = {name: [0, 2] for name in surgery.discover(learner.online)}
    surgery.knife(learner.online, surgery.Units(units), optimizer=learner.optimizer)
    after = learner.estimate(episodes)
    assert (after.agent_qs - before.agent_qs).abs().max() <= 1e-12
    assert (after.q_tot - before.q_tot).abs().max() <= 1e-12
    assert float(learner.update(episodes).loss) == pytest.approx(float(before.loss.detach()), rel=1e-12)
    assert torch.isfinite(learner.estimate(episodes).loss)


CONSUMERS: dict[str, tuple[AgentSettings, dict[str, dict[str, int]]]] = {
    "one layer": (AgentSettings(), {"agent.encoder.0": {"agent.cell.weight_ih": 1}}),
    "two layers": (
        AgentSettings(num_hidden_layers=2),
        {"agent.encoder.0": {"agent.encoder.2": 1}, "agent.encoder.2": {"agent.cell.weight_ih": 1}},
    ),
    "without memory": (AgentSettings("feed_forward", num_hidden_layers=1), {"agent.encoder.0": {"agent.head": 1}}),
}


@pytest.mark.parametrize("name", CONSUMERS)
def test_what_reads_the_agents_units_is_known(name: str) -> None:
    agent, expected = CONSUMERS[name]
    learner = new_learner(replace(preset("pymarl", "vdn"), agent=agent))
    assert surgery.consumers(learner.online).readers == expected


def small_recurrent_learner() -> Learner:
    return new_learner(replace(preset("pymarl", "vdn"), agent=AgentSettings(hidden_size=6)))


def test_agents_see_nothing_of_a_unit_whose_outgoing_weights_are_zero() -> None:
    """As declared: the cell, unrolled by hand, reads its input by these columns and by nothing else."""
    learner, episodes = small_recurrent_learner(), made_up_episodes()
    agent, inputs = learner.online.agent, (episodes["obs"], episodes["actions"])
    weight, incoming = (agent.get_parameter(name) for name in ("cell.weight_ih", "encoder.0.bias"))
    with torch.no_grad():
        weight[:, 2] = 0
        before = agent.unroll(*inputs)
        incoming[2] += 3
        assert torch.equal(agent.unroll(*inputs), before)
        incoming[3] += 3
        assert not torch.allclose(agent.unroll(*inputs), before)


def test_the_agents_input_layer_is_widened_without_a_change_of_the_values() -> None:
    learner, episodes = small_recurrent_learner(), made_up_episodes()
    learner.update(episodes)
    before = learner.estimate(episodes).agent_qs
    report = surgery.widen(learner.online, surgery.Units({"agent.encoder.0": [0, 4]}), optimizer=learner.optimizer)
    assert report.operated == {"agent.encoder.0": (0, 4)}
    assert learner.online.agent.get_parameter("cell.weight_ih").shape == (18, 8)
    assert (learner.estimate(episodes).agent_qs - before).abs().max() <= 1e-12
    weight = learner.online.agent.get_parameter("cell.weight_ih").detach().clone()
    learner.update(episodes)
    assert (learner.online.agent.get_parameter("cell.weight_ih") != weight).any(dim=0).all()


def test_continual_backprop_replaces_units_of_the_agents_input_layer() -> None:
    learner, episodes = small_recurrent_learner(), made_up_episodes()
    with surgery.ContinualBackprop(learner.online, learner.optimizer, rate=0.2, maturity=1) as replacing:
        while not replacing.num_units:
            learner.update(episodes)
            replacing.step()
        assert replacing.last is not None and set(replacing.last.operated) == {"agent.encoder.0"}
        (unit,) = replacing.last.operated["agent.encoder.0"]
    assert not learner.online.agent.get_parameter("cell.weight_ih")[:, unit].any()


def test_operated_agents_become_plain_ones_with_a_wider_input_layer() -> None:
    learner, episodes = small_recurrent_learner(), made_up_episodes()
    surgery.knife(learner.online, surgery.Units({"agent.encoder.0": [1, 3]}), optimizer=learner.optimizer)
    learner.update(episodes)
    before = learner.estimate(episodes).agent_qs
    flat = copy.deepcopy(learner.online.agent)
    report = surgery.flatten(flat)
    assert report.sites["encoder.0"].units_after == 10 and not surgery.composites(flat).num_units
    assert (flat.unroll(episodes["obs"], episodes["actions"]) - before).abs().max() <= 1e-12


def test_seeds_side_by_side_have_no_sites_and_say_why() -> None:
    stacked = stack_learners([small_recurrent_learner(), small_recurrent_learner()])
    sites = surgery.discover(stacked.online)
    assert not sites and "'baddbmm' multiplies" in sites.declined["agent.encoder.0.weight"]
    with pytest.raises(SettingsError, match="have no hidden units of their own"):
        Operations(stacked, SurgerySettings("redo", criterion="dormant", parts=("agent",)), seed=0)
