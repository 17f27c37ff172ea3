"""What is operated on in agents and mixers, on what evidence, and what the target networks have of it."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from marl.environments import matrix_tasks
from marl.errors import CheckpointError, SettingsError
from marl.learner import Learner
from marl.networks import Networks
from marl.records import take_record
from marl.run import make_run
from marl.run_settings import SurgerySettings, run_settings
from marl.settings import (
    Algorithm,
    HardTargets,
    MixerSettings,
    PolyakTargets,
    QMIXSettings,
    QPLEXSettings,
    TargetSettings,
    preset,
)
from marl.surgery import Operations, load_learner, operable_sites, unit_shares
from marl.training import Silent, train
from neuronsurgery import surgery
from neuronsurgery.pytorch.composites import Composite
from tests.marl.batches import made_up_episodes, new_learner

SMALL: dict[str, MixerSettings] = {"qmix": QMIXSettings(6, 2, 8), "qplex": QPLEXSettings(2, 2, 6, 8)}


def small_learner(algorithm: Algorithm = "qmix", targets: TargetSettings | None = None) -> Learner:
    settings = preset("pymarl", algorithm)
    agent = replace(settings.agent, hidden_size=8)
    mixer = SMALL.get(algorithm, settings.mixer)
    return new_learner(replace(settings, agent=agent, mixer=mixer, targets=targets or HardTargets()))


def operations(learner: Learner, **settings: Any) -> Operations:
    defaults: dict[str, Any] = {"method": "knife", "criterion": "lowest", "every": 3}
    return Operations(learner, SurgerySettings(**(defaults | settings)), seed=0)


def learn(learner: Learner, operating: Operations, num_updates: int) -> list[Any]:
    """The reports of the operations."""
    episodes, reports = made_up_episodes(), []
    for _ in range(num_updates):
        operating.see(episodes)
        learner.update(episodes)
        report = operating.step()
        reports += [] if report is None else [report]
    return reports


AGENT = ("agent.encoder.0",)
QMIX_MIXER = ("mixer.w1.0", "mixer.w2.0", "mixer.v.0")


@pytest.mark.parametrize(
    ("parts", "expected"), [(("agent",), AGENT), (("mixer",), QMIX_MIXER), (("agent", "mixer"), AGENT + QMIX_MIXER)]
)
def test_only_the_parts_asked_for_are_operated_on(parts: tuple[Any, ...], expected: tuple[str, ...]) -> None:
    learner = small_learner()
    assert tuple(operable_sites(learner, *parts)) == expected
    (report,) = learn(learner, operations(learner, parts=parts), 3)
    assert set(report.operated) == set(expected)
    assert set(surgery.composites(learner.online).members) == set(expected)


@pytest.mark.parametrize("criterion", ["stagnant", "dormant", "grama", "lowest", "random", "all"])
def test_each_criterion_chooses_units(criterion: str) -> None:
    learner = small_learner()
    threshold = None if criterion in ("lowest", "random", "all") else 0.9
    (report,) = learn(learner, operations(learner, criterion=criterion, threshold=threshold), 3)
    num_units = sum(site.num_units for site in operable_sites(learner, "agent", "mixer").values())
    assert report.num_units == num_units if criterion == "all" else 0 < report.num_units < num_units


def test_a_threshold_of_none_is_the_one_that_the_criterion_has() -> None:
    learner = small_learner()
    operating = operations(learner, criterion="stagnant", bias=True)
    assert "threshold=0.25" in str(operating) and "bias=True" in str(operating)


@pytest.mark.parametrize("targets", [HardTargets(), PolyakTargets(0.1)], ids=["hard", "polyak"])
@pytest.mark.parametrize("algorithm", ["qmix", "qplex", "vdn"])
def test_an_operation_moves_neither_loss_nor_target_and_the_target_follows_on(
    algorithm: Algorithm, targets: TargetSettings
) -> None:
    learner, episodes = small_learner(algorithm, targets), made_up_episodes()
    operating = operations(learner, criterion="all")
    learn(learner, operating, 2)
    operating.see(episodes)
    learner.update(episodes)
    before = learner.estimate(episodes)
    assert operating.step() is not None
    after = learner.estimate(episodes)
    assert (after.q_tot - before.q_tot).abs().max() <= 1e-12
    assert (after.td_target - before.td_target).abs().max() <= 1e-12
    learn(learner, operating, 2)
    for _ in range(400):
        learner.update_targets(num_episodes=10**6)
    online, target = (networks.state_dict() for networks in (learner.online, learner.target))
    assert online.keys() == target.keys()
    assert all(torch.allclose(online[name], target[name], rtol=0, atol=1e-12) for name in online if online[name].ndim)


def test_target_and_online_stay_equal_in_fades_and_after_rows_were_removed() -> None:
    learner, episodes = small_learner(), made_up_episodes()
    operating = operations(learner, criterion="lowest", threshold=0.5, every=6, cooldown=0, retire=4)
    rows = []
    for update in range(1, 25):
        operating.see(episodes)
        learner.update(episodes)
        before = learner.estimate(episodes)
        report = operating.step()
        if report is not None:
            surgery.consolidate(learner.online, mirrors=[learner.target], optimizer=learner.optimizer)
        after = learner.estimate(episodes)
        assert (after.q_tot - before.q_tot).abs().max() <= 1e-12
        assert (after.td_target - before.td_target).abs().max() <= 1e-12
        assert (report is not None) == (update % 6 == 0)
        learner.update_targets(num_episodes=1000 * update)  # a copy after each update, fading or not
        assert same_values(learner, episodes)
        rows.append(surgery.composites(learner.online).num_rows)
        assert surgery.composites(learner.target).num_rows == rows[-1]
    assert rows[5] == rows[11] == rows[17] == rows[23] > 0  # those of one operation, not of four


def same_values(learner: Learner, episodes: TensorDict) -> bool:
    with torch.no_grad():
        online, target = (
            networks.agent.unroll(episodes["obs"], episodes["actions"]) for networks in (learner.online, learner.target)
        )
    return torch.equal(online, target)


def test_online_and_target_share_the_fresh_draw() -> None:
    learner = small_learner()
    learn(learner, operations(learner, criterion="all"), 3)
    online, target = learner.online.state_dict(), learner.target.state_dict()
    name = "agent.encoder.0"
    assert torch.equal(online[f"{name}.weight"], target[f"{name}.weight"])
    knowledge = f"{name}.composite.frozen_weight"
    assert not torch.equal(online[knowledge], target[knowledge])  # each has its own


def with_garbage(episodes: TensorDict) -> TensorDict:
    """Other observations and states wherever nothing happened any more."""
    spoiled, mask = episodes.clone(), episodes["mask"]
    after = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)  # what was seen before or after a step
    spoiled["obs"][~after] = 250
    spoiled["state"][~after] = 1e4
    return spoiled


@pytest.mark.parametrize("algorithm", ["qmix", "qplex"])
def test_padding_does_not_enter_the_shares(algorithm: Algorithm) -> None:
    learner, episodes = small_learner(algorithm), made_up_episodes()
    assert not torch.equal(with_garbage(episodes)["obs"], episodes["obs"])
    assert unit_shares(learner, with_garbage(episodes)) == pytest.approx(unit_shares(learner, episodes))


def test_padding_and_agents_that_see_nothing_do_not_enter_the_choice() -> None:
    def chosen(episodes: TensorDict) -> Any:
        learner = small_learner()
        operating = operations(learner, criterion="dormant", threshold=0.8, parts=("agent",), every=1)
        operating.see(episodes)
        learner.update(episodes)
        return operating.step().operated["agent.encoder.0"]  # type: ignore[union-attr]

    episodes = made_up_episodes()
    assert chosen(with_garbage(episodes)) == chosen(episodes)

    blind = episodes.clone()
    blind["obs"][:, :, 0] = 0
    expected = expected_dormant(blind, threshold=0.8)
    assert chosen(blind) == expected


def expected_dormant(episodes: TensorDict, threshold: float) -> tuple[int, ...]:
    """By a plain loop over what agents see who are in the game, at steps that happened."""
    agent = small_learner().online.agent
    before = torch.cat([torch.full_like(episodes["actions"][:, :1], -1), episodes["actions"]], dim=1)
    total, count = torch.zeros(8, dtype=torch.float64), 0
    for b, t in episodes["mask"].nonzero().tolist():
        for n in range(3):
            if episodes["obs"][b, t, n].any():
                inputs = agent.inputs.join(episodes["obs"][b, t], before[b, t], torch.float64)[n]  # type: ignore[operator, union-attr]
                total += agent.encoder(inputs).detach()  # type: ignore[operator]
                count += 1
    scores = total / count / (total / count).mean()
    return tuple((scores <= threshold).nonzero().flatten().tolist())


def test_measuring_leaves_the_learner_as_it_was() -> None:
    learner, episodes = small_learner(), made_up_episodes()
    learner.update(episodes)
    weights = {name: value.clone() for name, value in learner.online.state_dict().items()}
    gradients = gradients_of(learner)
    unit_shares(learner, episodes)
    assert all(torch.equal(value, weights[name]) for name, value in learner.online.state_dict().items())
    assert all(map(torch.equal, gradients, gradients_of(learner)))


def gradients_of(learner: Learner) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in learner.online.parameters() if parameter.grad is not None]


def test_dead_units_are_those_that_never_fire() -> None:
    learner, episodes = small_learner(), made_up_episodes()
    with torch.no_grad():
        learner.online.agent.encoder[0].bias[:3] = -1e3  # type: ignore[union-attr, index]
    before = unit_shares(learner, episodes)
    assert before["agent/dead"] == pytest.approx(3 / 8)
    assert before["agent/stagnant"] >= 3 / 8


def test_a_state_of_zeros_is_refused_for_hypernetworks_with_the_remedy() -> None:
    settings = run_settings("qmix", "matrix_game", payoff="climbing", state="zeros")
    settings = replace(settings, surgery=SurgerySettings("knife"))
    with pytest.raises(SettingsError, match='state="ones"'):
        train(make_run(settings))
    agents_only = replace(settings, surgery=SurgerySettings("knife", parts=("agent",)))
    short = replace(agents_only, training=replace(settings.training, num_steps=64, evaluate_every=10_000))
    train(make_run(short))


@pytest.mark.parametrize("criterion", ["stagnant", "dormant"])
def test_operations_that_are_dropped_are_gone_though_activations_were_observed(criterion: str) -> None:
    learner = small_learner()
    operating = operations(learner, criterion=criterion)
    learn(learner, operating, 1)
    dropped = weakref.ref(operating)
    del operating
    gc.collect()
    assert dropped() is None


@pytest.mark.parametrize("part", ["agent", "mixer"])
@pytest.mark.parametrize("method", ["redo", "regrama", "reborn"])
def test_methods_that_write_outgoing_weights_operate_on_agents_and_hypernetworks(method: str, part: Any) -> None:
    learner = small_learner()
    before = {name: value.clone() for name, value in learner.target.state_dict().items()}
    criterion = {"redo": "dormant", "regrama": "grama", "reborn": "dormant"}[method]
    settings = {"method": method, "criterion": criterion, "threshold": 0.9, "parts": (part,)}
    (report,) = learn(learner, operations(learner, **settings), 3)
    assert report.num_units and set(report.operated) <= set({"agent": AGENT, "mixer": QMIX_MIXER}[part])
    assert surgery.composites(learner.online).num_units == 0
    assert all(torch.equal(value, before[name]) for name, value in learner.target.state_dict().items())
    if part == "agent" and method != "reborn":
        columns = learner.online.get_parameter("agent.cell.weight_ih")[:, report.operated["agent.encoder.0"]]
        assert not columns.any()


@pytest.mark.parametrize("environment", ["matrix_game", "predator_prey_tiny"])
@pytest.mark.parametrize("algorithm", ["vdn", "qmix"])
def test_redo_operates_on_the_agents_of_a_run(algorithm: Algorithm, environment: str) -> None:
    settings = run_settings(algorithm, environment)
    redo = SurgerySettings("redo", criterion="dormant", threshold=0.5, parts=("agent",), every=2)
    num_steps = {"matrix_game": 40, "predator_prey_tiny": 1700}[environment]
    short = replace(settings.training, num_steps=num_steps, evaluate_every=10_000)
    run = make_run(replace(settings, surgery=redo, training=short))
    operations = Operated()
    train(run, operations)
    assert operations.units and all(set(report) == {"agent.encoder.0"} for report in operations.units)


def test_what_a_record_measures_is_no_part_of_what_units_are_chosen_by() -> None:
    settings = run_settings("qmix", "matrix_game")
    redo = SurgerySettings("redo", criterion="dormant", threshold=0.9, every=50)
    training = replace(settings.training, num_steps=64, evaluate_every=10_000)
    train(run := make_run(replace(settings, surgery=redo, training=training)), Silent())
    before = heard(run)
    take_record(run)
    assert before["activation"]["total"].any()
    torch.testing.assert_close(heard(run), before, rtol=0, atol=0)


def heard(run: Any) -> Any:
    return run.operations.state_dict()["watch"]["evidence"]["sums"]["agent.encoder.0"]


class Operated(Silent):
    def __init__(self) -> None:
        self.units: list[Any] = []

    def on_operation(self, run: Any, report: Any) -> None:
        self.units += [report.operated] if report.operated else []


def test_a_method_without_known_consumers_is_refused_with_the_reason() -> None:
    learner = small_learner("qplex")
    consumers = surgery.consumers(learner.online)
    assert "agent.encoder.0" in consumers.readers and set(consumers.declined) == {
        f"mixer.attention.{net}.0" for net in ("keys", "agents", "actions")
    }
    hooked = small_learner()
    hooked.online.agent.cell.register_forward_pre_hook(lambda _, args: (args[0].flip(-1), *args[1:]))  # type: ignore[union-attr]
    with pytest.raises(SettingsError, match=r"redo writes the outgoing weights .*agent.encoder.0: .*or knife"):
        operations(hooked, method="redo", criterion="dormant", parts=("agent",))


@pytest.mark.parametrize("method", ["reset", "shrink_and_perturb", "reset_optimizer"])
def test_methods_of_whole_layers_concern_the_layers_asked_for(method: str) -> None:
    learner = small_learner()
    plain: dict[str, torch.Tensor] = {}
    operated: dict[str, torch.Tensor] = {}
    for kept, settings in ((plain, {"method": "none"}), (operated, {"method": method, "layers": ("agent.head",)})):
        learner = small_learner()
        reports = learn(learner, operations(learner, **settings), 3)
        kept |= {name: value.clone() for name, value in learner.online.state_dict().items()}
        assert len(reports) == (method != "none" and kept is operated)
    changed = {name for name in plain if not torch.equal(plain[name], operated[name])}
    assert changed == (set() if method == "reset_optimizer" else {"agent.head.weight", "agent.head.bias"})
    head = learner.optimizer.state[dict(learner.online.named_parameters())["agent.head.weight"]]
    assert (not head or not any(value.any() for value in head.values())) == (method != "shrink_and_perturb")


def test_units_that_fade_to_fresh_ones_fall_silent_online_and_in_the_target_with_the_next_sync() -> None:
    learner, episodes = small_learner(), made_up_episodes()
    settings = {"method": "fade_to_fresh", "criterion": "all", "parts": ("agent",), "retire": 3, "every": 2}
    operating = operations(learner, **settings, cooldown=0)
    learn(learner, operating, 1)
    operating.see(episodes)
    learner.update(episodes)
    online = learner.estimate(episodes).q_tot
    assert operating.step() is not None
    assert (learner.estimate(episodes).q_tot - online).abs().max() > 1e-3
    assert fades_of(learner.online) == {0.0, 1.0} and fades_of(learner.target) == {1.0}
    learner.update_targets(num_episodes=10**6)
    assert fades_of(learner.target) == {0.0, 1.0} and same_values(learner, episodes)
    learn(learner, operating, 3)
    assert surgery.consolidate(learner.online, mirrors=[learner.target], optimizer=learner.optimizer).num_rows > 0


def fades_of(networks: Networks) -> set[float]:
    banks = [each for each in networks.modules() if isinstance(each, Composite)]
    return {value for bank in banks for value in bank.live_fade().tolist()}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"method": "redo", "retire": 5}, "only knife and fade_to_fresh"),
        ({"method": "fade_to_fresh"}, "set retire"),
        ({"method": "knife", "layers": ("agent",)}, "set parts"),
    ],
)
def test_options_of_other_methods_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        SurgerySettings(**settings)


def test_a_mixer_without_units_of_its_own_cannot_be_operated_on() -> None:
    with pytest.raises(SettingsError, match="have no hidden units of their own"):
        operations(small_learner("vdn"), parts=("mixer",))


def test_shares_of_a_mixer_without_units_are_not_reported() -> None:
    assert {name.partition("/")[0] for name in unit_shares(small_learner("vdn"), made_up_episodes())} == {"agent"}


def test_a_state_saved_with_surgery_is_refused_without_and_the_other_way_round() -> None:
    with_surgery = operations(small_learner())
    with pytest.raises(CheckpointError, match="saved with surgery"):
        Operations(small_learner(), SurgerySettings(), seed=0).load_state_dict(with_surgery.state_dict())
    with pytest.raises(CheckpointError, match="saved without surgery"):
        operations(small_learner()).load_state_dict({})
    with pytest.raises(CheckpointError, match="other settings"):
        operations(small_learner(), every=4).load_state_dict(with_surgery.state_dict())


def test_networks_of_other_sizes_are_refused_and_nothing_is_changed() -> None:
    learner, other = small_learner(), small_learner("qplex")
    learn(learner, operations(learner), 3)
    before = {name: value.clone() for name, value in other.online.state_dict().items()}
    with pytest.raises(CheckpointError, match="does not fit"):
        load_learner(other, learner.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in other.online.state_dict().items())


def test_a_task_of_another_payoff_is_announced() -> None:
    settings = replace(run_settings("qmix", "matrix_game", payoff="climbing"), tasks=matrix_tasks("climbing", "qtran"))
    run = make_run(replace(settings, surgery=SurgerySettings("knife", criterion="random", after_task_change=0)))
    assert run.begin_next_task() is not None
