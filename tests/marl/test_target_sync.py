"""Operations between two updates of the target networks: what stays, what follows, and in which mode to mirror.

The learner's two updates move parameters and buffers, frozen rows among them: a target has frozen rows of its own then,
so that its values stay at an operation, and both come together afterwards. Updates of parameters alone, as in other
code, never move frozen rows: there the target has to share the online network's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from marl.errors import CheckpointError
from marl.learner import Learner
from marl.settings import AgentSettings, MixerSettings, QMIXSettings, QPLEXSettings, VDNSettings, preset
from marl.targets import copy_online, follow_online
from neuronsurgery import surgery
from tests.marl.batches import made_up_episodes, new_learner

Frozen = Literal["own", "shared"]

MIXERS: dict[str, MixerSettings] = {
    "VDN": VDNSettings(),
    "QMIX of one layer": QMIXSettings(6, 1, 8),
    "QMIX of two layers": QMIXSettings(6, 2, 8),
    "QPLEX of three layers": QPLEXSettings(2, 3, 6, 8),
}
every_mixer = pytest.mark.parametrize("name", MIXERS)
EPISODES = made_up_episodes()
RATE = 0.5


def lagging_learner(name: str = "QMIX of two layers") -> Learner:
    """A learner whose target networks are behind its online networks."""
    settings = replace(preset("pymarl", "qmix"), mixer=MIXERS[name], agent=AgentSettings(hidden_size=8))
    learner = new_learner(settings)
    copy_online(learner.target, learner.online)
    learn(learner, 3)
    return learner


def learn(learner: Learner, num_updates: int) -> None:
    for _ in range(num_updates):
        learner.update(EPISODES)


def operate(
    learner: Learner, *, frozen: Frozen = "own", retire: int | None = None, share: float = 0.5
) -> surgery.Report:
    criterion = surgery.Random(share)
    report = surgery.knife(learner.online, criterion, optimizer=learner.optimizer, cooldown=0, retire=retire)
    surgery.mirror(learner.online, onto=learner.target, frozen=frozen)
    return report


def values(learner: Learner) -> Tensor:
    """Joint values of the online networks, and what those of the target networks make of them, and the loss."""
    estimates = learner.estimate(EPISODES)
    parts = (estimates.q_tot, estimates.td_target, estimates.loss)
    return torch.cat([part.detach().flatten() for part in parts])


@torch.no_grad()
def gap(learner: Learner) -> float:
    """Between the agents' and the joint values of online and target networks."""
    actions, state = EPISODES["actions"], EPISODES["state"][:, :-1]
    agent_qs = [networks.agent.unroll(EPISODES["obs"], actions) for networks in (learner.online, learner.target)]
    chosen_qs = agent_qs[0][:, :-1, :, 0]
    joint = [
        networks.mixer(chosen_qs, state, max_qs=chosen_qs + 1, actions=actions)
        for networks in (learner.online, learner.target)
    ]
    return max(float((one - other).abs().max()) for one, other in (agent_qs, joint))


def assert_equal(target: nn.Module, online: nn.Module) -> None:
    """Every tensor of the two, those of the banks too."""
    mine, theirs = (dict([*each.named_parameters(), *each.named_buffers()]) for each in (target, online))
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@every_mixer
def test_no_operation_between_two_syncs_moves_the_loss_and_the_sync_makes_both_equal(name: str) -> None:
    learner = lagging_learner(name)
    for _ in range(3):
        before = values(learner)
        assert operate(learner).num_units > 0
        assert (values(learner) - before).abs().max() <= 1e-12
        learn(learner, 2)
        assert gap(learner) > 1e-4, "the target is to lag behind"
    copy_online(learner.target, learner.online)
    assert_equal(learner.target, learner.online)
    assert gap(learner) == 0


@pytest.mark.parametrize("num_updates", [2, 9], ids=["half way", "behind its end"])
@pytest.mark.parametrize("name", ["VDN", "QMIX of two layers"])
def test_an_operation_in_a_fade_moves_no_loss_and_a_sync_makes_both_equal(name: str, num_updates: int) -> None:
    learner = lagging_learner(name)
    for _ in range(2):  # the second where the fade of the first has got to
        before = values(learner)
        operate(learner, retire=6)
        assert (values(learner) - before).abs().max() <= 1e-12
        learn(learner, num_updates)
        assert gap(learner) > 1e-4, "the target is to lag behind"
    copy_online(learner.target, learner.online)
    assert_equal(learner.target, learner.online)
    assert gap(learner) == 0


def test_operations_in_a_row_may_be_mirrored_at_once() -> None:
    learner = lagging_learner()
    before = values(learner)
    for _ in range(3):
        surgery.knife(learner.online, surgery.Random(0.5), optimizer=learner.optimizer, cooldown=0)
    surgery.mirror(learner.online, onto=learner.target)
    assert (values(learner) - before).abs().max() <= 1e-12
    copy_online(learner.target, learner.online)
    assert_equal(learner.target, learner.online)


def test_operations_that_were_undone_between_two_syncs_leave_targets_in_step() -> None:
    learner = lagging_learner()
    before = values(learner)
    operate(learner)
    report = operate(learner)
    surgery.undo(learner.online, report, optimizer=learner.optimizer)
    surgery.mirror(learner.online, onto=learner.target)
    assert (values(learner) - before).abs().max() <= 1e-12
    learn(learner, 2)
    copy_online(learner.target, learner.online)
    assert_equal(learner.target, learner.online)


def test_an_operation_undone_in_the_online_networks_alone_is_refused_at_the_sync() -> None:
    learner = lagging_learner()
    report = operate(learner)
    surgery.undo(learner.online, report, optimizer=learner.optimizer)
    with pytest.raises(CheckpointError, match=r"composite.* missing"):
        copy_online(learner.target, learner.online)


def test_the_report_of_mirroring_names_what_was_operated_on_undone_and_moved() -> None:
    learner = lagging_learner()
    report = surgery.knife(learner.online, surgery.Random(0.5), optimizer=learner.optimizer)
    made = surgery.mirror(learner.online, onto=learner.target)
    assert made.targets[0].made == report.operated
    assert made.max_moved <= 1e-12
    again = surgery.mirror(learner.online, onto=learner.target)
    assert (again.num_units, again.num_taken_back) == (0, 0)
    assert any("nothing to do" in note for note in again.notes)
    surgery.undo(learner.online, report, optimizer=learner.optimizer)
    undone = surgery.mirror(learner.online, onto=learner.target)
    assert undone.targets[0].taken_back == report.operated
    assert undone.num_units == 0


def test_the_report_says_by_how_much_a_target_moved_that_shares_frozen_rows() -> None:
    learner = lagging_learner()
    report = surgery.knife(learner.online, surgery.Random(0.5), optimizer=learner.optimizer)
    shared = surgery.mirror(learner.online, onto=learner.target, frozen="shared")
    moved = shared.targets[0].moved
    assert set(moved) == set(report.operated)
    assert min(moved.values()) > 1e-6, "each site of the target lags behind"
    assert any("gave up what they lagged behind" in note for note in shared.notes)


Follow = Callable[[nn.Module, nn.Module], None]


def parameters_follow(target: nn.Module, online: nn.Module) -> None:
    """As is usual in other code."""
    with torch.no_grad():
        for slow, new in zip(target.parameters(), online.parameters(), strict=True):
            slow.lerp_(new, RATE)


def parameters_copied(target: nn.Module, online: nn.Module) -> None:
    with torch.no_grad():
        for slow, new in zip(target.parameters(), online.parameters(), strict=True):
            slow.copy_(new)


def state_loaded(target: nn.Module, online: nn.Module) -> None:
    target.load_state_dict(online.state_dict())


FOLLOWING: dict[str, tuple[Follow, Frozen]] = {
    "copy_online": (copy_online, "own"),
    "follow_online": (lambda target, online: follow_online(target, online, rate=RATE), "own"),
    "load_state_dict": (state_loaded, "own"),
    "parameters alone, in part": (parameters_follow, "shared"),
    "parameters alone, copied": (parameters_copied, "shared"),
}
"""Each way in which targets follow, and whose frozen rows they need."""

PARAMETERS_ALONE = [way for way, (_, frozen) in FOLLOWING.items() if frozen == "shared"]


def follow(learner: Learner, update: Follow, num_updates: int = 50) -> None:
    for _ in range(num_updates):
        update(learner.target, learner.online)


@pytest.mark.parametrize("way", FOLLOWING)
def test_targets_come_to_the_online_networks_in_the_mode_for_their_update(way: str) -> None:
    learner = lagging_learner()
    update, frozen = FOLLOWING[way]
    for _ in range(3):
        operate(learner, frozen=frozen)
        learn(learner, 2)
        update(learner.target, learner.online)
    follow(learner, update)
    assert gap(learner) <= 1e-12


@pytest.mark.parametrize("way", FOLLOWING)
def test_targets_follow_on_where_an_operation_is_undone_after_they_moved(way: str) -> None:
    learner = lagging_learner()
    update, frozen = FOLLOWING[way]
    operate(learner, frozen=frozen)
    learn(learner, 2)
    report = operate(learner, frozen=frozen)
    update(learner.target, learner.online)
    learn(learner, 2)
    surgery.undo(learner.online, report, optimizer=learner.optimizer)
    surgery.mirror(learner.online, onto=learner.target, frozen=frozen)
    assert list(learner.target.state_dict()) == list(learner.online.state_dict())
    learn(learner, 2)
    follow(learner, update)
    assert gap(learner) <= 1e-12


@pytest.mark.parametrize("way", PARAMETERS_ALONE)
def test_frozen_rows_of_its_own_leave_a_target_behind_whose_parameters_alone_follow(way: str) -> None:
    learner = lagging_learner()
    operate(learner, frozen="own")
    learn(learner, 2)
    follow(learner, FOLLOWING[way][0])
    assert gap(learner) > 1e-4
    with pytest.raises(surgery.MirrorError):  # and the next operation finds it
        operate(learner, frozen="own")


def scheduled(learner: Learner, *, frozen: Frozen) -> surgery.Schedule:
    return surgery.Schedule(
        learner.online,
        learner.optimizer,
        surgery.Random(0.5),
        operate=surgery.Every(3),
        cooldown=0,
        mirrors=learner.target,
        frozen=frozen,
    )


@pytest.mark.parametrize("way", FOLLOWING)
def test_scheduled_operations_move_no_loss_of_targets_with_rows_of_their_own_and_all_targets_follow(way: str) -> None:
    learner = lagging_learner()
    update, frozen = FOLLOWING[way]
    schedule = scheduled(learner, frozen=frozen)
    for _ in range(9):
        learn(learner, 1)
        before = values(learner)
        schedule.step()
        moved = (values(learner) - before).abs()
        assert (moved if frozen == "own" else moved[: len(moved) // 2]).max() <= 1e-12
    assert schedule.num_operations == 3
    follow(learner, update)
    assert gap(learner) <= 1e-12
    if way == "copy_online":
        assert_equal(learner.target, learner.online)


@pytest.mark.parametrize("way", PARAMETERS_ALONE)
def test_a_schedule_in_the_wrong_mode_stops_at_the_next_operation_and_leaves_both_networks_be(way: str) -> None:
    learner = lagging_learner()
    schedule = scheduled(learner, frozen="own")
    with pytest.raises(surgery.MirrorError, match="frozen='shared'"):
        for _ in range(6):
            learn(learner, 1)
            before = copies(learner)
            schedule.step()
            follow(learner, FOLLOWING[way][0], 1)
    assert schedule.num_operations == 1
    assert all(map(torch.equal, before, copies(learner)))


def copies(learner: Learner) -> list[Tensor]:
    """Every tensor of both networks, as it is now."""
    states = (networks.state_dict() for networks in (learner.online, learner.target))
    return [value.clone() for state in states for value in state.values()]


@pytest.mark.parametrize("frozen", ["own", "shared"])
def test_frozen_rows_of_the_online_networks_move_a_target_at_the_operation(frozen: Frozen) -> None:
    learner = lagging_learner()
    before = values(learner)
    operate(learner, frozen=frozen)
    moved = float((values(learner) - before).abs().max())
    assert moved <= 1e-12 if frozen == "own" else moved > 1e-4


def test_a_target_that_was_not_mirrored_is_refused_at_the_sync_before_anything_changes() -> None:
    learner = lagging_learner()
    surgery.knife(learner.online, surgery.Units({"agent.encoder.0": [1]}))
    before = copies(learner)
    for update in (copy_online, lambda target, online: follow_online(target, online, rate=0.5)):
        with pytest.raises(CheckpointError, match=r"agent\.encoder\.0\.composite"):
            update(learner.target, learner.online)
    assert all(map(torch.equal, before, copies(learner)))
