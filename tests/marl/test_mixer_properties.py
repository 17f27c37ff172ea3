"""What surgery may do to mixers, and what it may not: the promises of QMIX, QPLEX and VDN hold through operations.

Hidden units inside hypernetworks are operated on, and leave the range of ReLU as they train. What mixes is made of
them by an absolute value, a sigmoid or an ELU, and the last tests operate on these, by force or by hand: the promises
break, so that the checks do see it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor, nn

from marl.mixers import EPSILON, QMIX, QPLEX, Attention, Mixer, Transformation
from marl.networks import Networks
from marl.settings import AgentSettings, QMIXSettings, QPLEXSettings, Settings, VDNSettings
from neuronsurgery import surgery
from tests.marl.batches import made_up_episodes, new_learner
from tests.marl.properties import A, N, S, falling, igm_gap, igm_gaps, joint_value, made_up, min_slope, slopes, train

UPDATES_AFTER = (20, 20, 200)  # each of the operations, one after the other


def qplex(*hidden_sizes: int) -> QPLEX:
    return QPLEX(Attention(N, A, S, num_heads=2, hidden_sizes=hidden_sizes), Transformation(N, S, hypernet_size=8))


MIXERS: dict[str, Callable[[], Mixer]] = {
    "QMIX of one layer": lambda: QMIX(N, S, embed_size=8, hypernet_layers=1),
    "QMIX of two layers": lambda: QMIX(N, S, embed_size=8, hypernet_size=8),
    "QPLEX of one layer": qplex,
    "QPLEX of two layers": lambda: qplex(8),
    "QPLEX of three layers": lambda: qplex(8, 6),
}
every_mixer = pytest.mark.parametrize("name", MIXERS)


def assert_keeps_its_promise(mixer: Mixer, batch: dict[str, Any]) -> None:
    """Every joint value is largest at each agent's best action, and QMIX rises with each agent's value."""
    assert igm_gap(mixer, batch) <= 1e-9
    if isinstance(mixer, QMIX):
        assert min_slope(mixer, batch) >= -1e-12


@every_mixer
def test_promise_holds_through_operations_and_training_against_it(name: str) -> None:
    mixer, batch = MIXERS[name]().double(), made_up(200)
    optimizer = torch.optim.Adam(mixer.parameters(), lr=1e-2)
    actions = torch.randint(A, (200, N))
    assert_keeps_its_promise(mixer, batch)
    for number, num_updates in enumerate(UPDATES_AFTER):
        before = joint_value(mixer, batch, actions)
        report = surgery.knife(mixer, surgery.Random(0.5), optimizer=optimizer, cooldown=0)
        assert set(report.operated) == set(surgery.discover(mixer)), f"operation {number} passed over sites"
        assert (joint_value(mixer, batch, actions) - before).abs().max() <= 1e-12 * before.abs().max()
        assert_keeps_its_promise(mixer, batch)
        train(mixer, batch, falling, optimizer=optimizer, num_updates=num_updates)
        assert_keeps_its_promise(mixer, batch)
    assert_keeps_its_promise(mixer, made_up(200))


def test_the_promise_holds_though_composite_units_leave_the_range_of_relu() -> None:
    mixer, batch = QMIX(N, S, embed_size=8, hypernet_size=8).double(), made_up(200)
    hidden = surgery.Units({name: range(8) for name in surgery.discover(mixer)})
    surgery.knife(mixer, hidden)
    train(mixer, batch, falling)
    assert isinstance(mixer.w1, nn.Sequential)
    assert (mixer.w1[:2](batch["state"]) < -0.1).double().mean() > 0.03
    assert_keeps_its_promise(mixer, batch)


@pytest.mark.parametrize(
    "settings",
    [VDNSettings(), QMIXSettings(6, 2, 8), QPLEXSettings(2, 3, 6, 8)],
    ids=lambda settings: type(settings).__name__,
)
def test_promise_holds_for_the_values_of_agents_operated_on_with_their_mixer(settings: Any) -> None:
    learner = new_learner(Settings(settings, AgentSettings(hidden_size=8)))
    episodes = made_up_episodes()
    for _ in UPDATES_AFTER:
        report = surgery.knife(learner.online, surgery.Random(0.5), optimizer=learner.optimizer, cooldown=0)
        assert "agent.encoder.0" in report.operated
        for _ in range(20):
            learner.update(episodes)
        assert igm_gap(learner.online.mixer, values_along(learner.online, episodes)) <= 1e-9


@torch.no_grad()
def values_along(networks: Networks, episodes: TensorDict) -> dict[str, Any]:
    """The agents' values at the steps that happened, as a batch of which properties are measured."""
    actions, mask = episodes["actions"], episodes["mask"]
    agent_qs = networks.agent.unroll(episodes["obs"], actions)[:, :-1]
    return {
        "agent_qs": agent_qs[mask],
        "avail_actions": episodes["avail_actions"][:, :-1][mask],
        "state": episodes["state"][:, :-1][mask],
    }


@pytest.mark.parametrize("site", ["w1.2", "w2.2"])
def test_units_in_front_of_the_absolute_value_take_qmix_its_monotonicity_by_force(site: str) -> None:
    mixer, batch = QMIX(N, S, embed_size=8, hypernet_size=8).double(), made_up(500)
    assert "range-bearing" in surgery.discover(mixer).declined[site]
    layer = mixer.get_submodule(site)
    surgery.knife(mixer, surgery.Units({site: range(len(layer.get_parameter("bias")))}))
    assert min_slope(mixer, batch) >= -1e-12, "at surgery itself nothing changes"
    train(mixer, batch, falling)
    assert share_negative(mixer, batch) > 0.05
    assert igm_gap(mixer, batch) > 1e-3


def test_units_in_front_of_the_absolute_value_take_qplex_its_greedy_maximum_by_force() -> None:
    mixer, batch = qplex(8).double(), made_up(500)
    site = "transformation.weights.2"
    assert "range-bearing" in surgery.discover(mixer).declined[site]
    surgery.knife(mixer, surgery.Units({site: range(N)}))
    train(mixer, batch, falling)
    assert share_above_greedy(mixer, batch) > 0.05


class FlatAttention(nn.Module):
    """Attention of one head whose sigmoids come right behind their layers, so that these can be named."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.agents, self.actions = nn.Linear(S, 1), nn.Linear(S, N), nn.Linear(S + N * A, N)

    def forward(self, state: Tensor, actions: Tensor) -> Tensor:
        joint_action = F.one_hot(actions, A).flatten(-2).to(state.dtype)
        share = self.agents(state).sigmoid() * self.actions(torch.cat([state, joint_action], dim=-1)).sigmoid()
        importance: Tensor = (self.key(state).abs() + EPSILON) * share
        return importance


def flat_qplex() -> QPLEX:
    mixer = QPLEX(Attention(N, A, S), Transformation(N, S, hypernet_size=8))
    mixer.attention = FlatAttention()  # type: ignore[assignment]  # it is called alike
    return mixer


@pytest.mark.parametrize("site", ["attention.agents", "attention.actions"])
def test_units_in_front_of_the_sigmoid_take_qplex_its_greedy_maximum_by_force(site: str) -> None:
    mixer, batch = flat_qplex().double(), made_up(500)
    assert "range-bearing" in surgery.discover(mixer).declined[site]
    assert igm_gap(mixer, batch) <= 1e-9
    surgery.knife(mixer, surgery.Units({site: range(N)}))
    assert igm_gap(mixer, batch) <= 1e-9, "at surgery itself nothing changes"
    train(mixer, batch, falling)
    assert share_above_greedy(mixer, batch) > 0.02


class BiasOperatedOn(QMIX):
    """QMIX whose mixing units are composite units, made by hand: the layer in front of the ELU has three biases.

    Their incoming weights are generated and the same for all three members.
    """

    def __init__(self, *, embed_size: int) -> None:
        super().__init__(N, S, embed_size=embed_size)
        self.knowledge, self.compensation = copy.deepcopy(self.b1), nn.Linear(S, embed_size)
        self.b1 = copy.deepcopy(self.compensation)
        for frozen in (self.knowledge, self.compensation):
            frozen.requires_grad_(False)

    def forward(self, chosen_qs: Tensor, state: Tensor, *, max_qs: Tensor, actions: Tensor) -> Tensor:
        active = self.mixing_inputs(chosen_qs, state)
        weighted = active - self.b1(state)
        compensation, knowledge = (weighted + bias(state) for bias in (self.compensation, self.knowledge))
        hidden = F.elu(knowledge) + (F.elu(active) - F.elu(compensation))
        mixed = (hidden * self.w2(state).abs()).sum(dim=-1)
        q_tot: Tensor = mixed + self.v(state).squeeze(-1)
        return q_tot


def test_units_with_generated_weights_take_qmix_its_monotonicity_and_are_refused_even_by_name() -> None:
    with pytest.raises(surgery.SiteError, match="generated"):
        surgery.knife(QMIX(N, S), surgery.Units({"b1": [0]}))
    mixer, batch = BiasOperatedOn(embed_size=8).double(), made_up(2000)
    assert min_slope(mixer, batch) >= -1e-12, "at surgery itself nothing changes"
    train(mixer, batch, falling)
    assert share_negative(mixer, batch) > 0.001


def share_negative(mixer: Mixer, batch: dict[str, Any]) -> float:
    """Of points, where the joint value falls as an agent's value rises."""
    return float((slopes(mixer, batch) < -1e-9).double().mean())


def share_above_greedy(mixer: Mixer, batch: dict[str, Any]) -> float:
    """Of states, where a joint action is worth more than that of each agent's best."""
    return float((igm_gaps(mixer, batch) > 1e-6).double().mean())
