"""The networks as surgery finds them: hidden ReLU units are sites, nothing from a generated weight onward is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from marl.settings import AgentSettings, MixerSettings, QMIXSettings, QPLEXSettings, VDNSettings, preset
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
