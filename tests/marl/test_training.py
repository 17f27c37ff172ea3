"""Whole runs: their rhythm, and what does not depend on what."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from marl.environments import TaskSequence, matrix_tasks
from marl.errors import SettingsError
from marl.records import Record
from marl.run import Run, make_run
from marl.run_settings import RunSettings, SurgerySettings, SwitchSettings, TrainingSettings, run_settings
from marl.settings import Algorithm, ReplaySettings
from marl.training import Silent, train

SMALL: dict[str, Any] = {
    "height": 4,
    "width": 4,
    "num_agents": 3,
    "num_stags": 2,
    "episode_limit": 10,
    "punishment": -0.5,
}
KNIFE = SurgerySettings("knife", criterion="lowest", every=7)


class Notes(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.operations: list[tuple[int, Any]] = []
        self.rounds: list[dict[str, Any]] = []

    def on_round(self, run: Run) -> None:
        progress = run.progress
        self.rounds.append({"task": run.task.name, "updates": progress.num_updates, "replay": len(run.replay)})

    def on_operation(self, run: Run, report: object) -> None:
        self.operations.append((run.progress.num_updates, report))

    def on_record(self, run: Run, record: Record) -> None:
        self.records.append(record)


def small(algorithm: Algorithm = "qmix", surgery: SurgerySettings | None = None, **training: Any) -> RunSettings:
    settings = run_settings(algorithm, "predator_prey", **SMALL)
    learning = replace(
        settings.learning,
        agent=replace(settings.learning.agent, hidden_size=8),
        replay=ReplaySettings(capacity=64, batch_size=8),
        exploration=replace(settings.learning.exploration, num_steps=400),
    )
    defaults = {"num_steps": 600, "num_parallel": 8, "evaluate_every": 200, "num_evaluation_episodes": 4}
    return replace(
        settings,
        learning=learning,
        training=TrainingSettings(**(defaults | training)),
        surgery=surgery or SurgerySettings(),
    )


def finished(settings: RunSettings, *listeners: Silent) -> Run:
    run = make_run(settings)
    train(run, *listeners)
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {**run.learner.online.state_dict(), **{f"target.{k}": v for k, v in run.learner.target.state_dict().items()}}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


@pytest.mark.parametrize(("per_update", "per_round"), [(1, [8, 8, 8]), (3, [2, 3, 3]), (16, [0, 1, 0])])
def test_an_update_follows_each_so_many_episodes(per_update: int, per_round: list[int]) -> None:
    notes = Notes()
    finished(small(episodes_per_update=per_update), notes)
    updates = [0, *(note["updates"] for note in notes.rounds)]
    assert [after - before for before, after in pairwise(updates)][:3] == per_round


def test_no_update_is_made_before_a_batch_can_be_drawn_and_none_is_made_up_for() -> None:
    notes, settings = Notes(), small()
    replay = ReplaySettings(capacity=64, batch_size=20)
    finished(replace(settings, learning=replace(settings.learning, replay=replay)), notes)
    assert [note["updates"] for note in notes.rounds][:4] == [0, 0, 8, 16]


def test_the_run_ends_with_the_round_in_which_its_steps_are_full() -> None:
    run = finished(small())
    assert 600 <= run.progress.num_steps < 600 + 8 * SMALL["episode_limit"]
    assert run.epsilon == pytest.approx(0.05)


def test_the_same_settings_give_the_same_run_and_another_seed_another() -> None:
    settings = small()
    one, again, other = finished(settings), finished(settings), finished(replace(settings, seed=1))
    assert_same(weights(one), weights(again))
    assert not torch.equal(weights(one)["agent.head.weight"], weights(other)["agent.head.weight"])


def test_evaluations_and_measurements_change_nothing_of_the_training() -> None:
    assert_same(weights(finished(small())), weights(finished(small(evaluate_every=10_000))))


def test_two_runs_draw_the_same_numbers_until_one_is_operated_on() -> None:
    """The same weights, games, random actions and batches: compared are the updates before the operation."""
    few: dict[str, Any] = {"num_steps": 200, "evaluate_every": 10_000}
    operated, plain = Losses(), Losses()
    finished(small(surgery=replace(KNIFE, every=12), **few), operated)
    finished(small(**few), plain)
    assert operated.losses[0] == plain.losses[0]
    assert operated.losses[-1] != plain.losses[-1]


class Losses(Silent):
    """Keeps the mean loss of each round, of 8 updates."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_round(self, run: Run) -> None:
        self.losses.append(run.averages.take()["learner/loss"])


RETIRING = replace(KNIFE, every=12, retire=8)  # the save in the middle of the third round is in the middle of a fade


WAYS = {"plain": SurgerySettings(), "operated on": KNIFE, "fading": RETIRING}
QUICK = {("vdn", "plain"), ("qmix", "operated on"), ("qplex", "fading")}  # each of both once; all of them are slow


@pytest.mark.parametrize(
    ("algorithm", "surgery"),
    [
        pytest.param(
            algorithm,
            surgery,
            id=f"{algorithm}-{way}",
            marks=() if (algorithm, way) in QUICK else pytest.mark.slow,
        )
        for algorithm in ("vdn", "qmix", "qplex")
        for way, surgery in WAYS.items()
    ],
)
def test_a_run_that_was_saved_in_between_goes_on_as_if_it_had_not_been(
    algorithm: Algorithm, surgery: SurgerySettings, tmp_path: Any
) -> None:
    settings, notes = small(algorithm, surgery), Notes()
    whole = finished(settings, notes)
    half = make_run(settings)
    train(half, is_stopped=lambda: half.progress.round == 3)
    torch.save({"run": half.state_dict(), "replay": half.replay.state_dict()}, tmp_path / "run.pt")
    resumed, more = make_run(settings), Notes()
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed.load_state_dict(state["run"])
    resumed.replay.load_state_dict(state["replay"])
    train(resumed, more)
    assert_same(weights(whole), weights(resumed))
    assert more.records == notes.records[-len(more.records) :]
    assert resumed.operations.counts() == whole.operations.counts()


def test_records_say_where_the_run_stands_and_how_its_units_are_beside_how_they_were() -> None:
    notes = Notes()
    finished(small(surgery=KNIFE), notes)
    record = notes.records[-1]
    assert record["task"] == "predator_prey" and record["updates"] == len(notes.rounds) * 8
    for part in ("agent", "mixer"):
        for condition in ("stagnant", "stagnant_with_bias", "dormant", "grama", "dead"):
            share, grown = record[f"{part}/{condition}"], record[f"{part}/{condition}_grown"]
            assert 0 <= float(share) <= 1 and -1 <= float(grown) <= 1
    assert record["surgery/operations"] == len(notes.operations) > 0
    assert float(record["surgery/frozen_rows"]) == 2 * sum(report.num_units for _, report in notes.operations)
    assert {"learner/loss", "learner/grad_norm", "mixer/min_mixing_gradient", "test/return"} <= record.keys()


def sequence(*payoffs: str, surgery: SurgerySettings | None = None, **training: Any) -> RunSettings:
    settings = small(surgery=surgery, num_steps=64, evaluate_every=32, **training)
    return replace(settings, tasks=matrix_tasks(*payoffs).and_back())


def test_tasks_follow_each_other_and_each_begins_without_the_episodes_of_the_last() -> None:
    notes = Notes()
    finished(sequence("climbing", "qtran"), notes)
    assert [note["task"] for note in notes.rounds] == ["climbing"] * 8 + ["qtran"] * 8 + ["climbing"] * 8
    assert [note["replay"] for note in notes.rounds] == [8, 16, 24, 32, 40, 48, 56, 64] * 3


def test_replay_and_exploration_go_on_over_tasks_where_that_is_asked_for() -> None:
    notes = Notes()
    going_on = SwitchSettings(keep_episodes=None, restart_exploration=False)
    run = finished(replace(sequence("climbing", "qtran"), switch=going_on), notes)
    assert notes.rounds[8]["replay"] == 64
    assert run.epsilon == pytest.approx(1 - 0.95 * 192 / 400)
    again = finished(sequence("climbing", "qtran"))
    assert again.epsilon == pytest.approx(1 - 0.95 * 64 / 400)


@pytest.mark.parametrize(("after", "expected"), [(0, [64, 128]), (5, [69, 133])])
def test_a_change_of_task_is_an_occasion_to_operate(after: int, expected: list[int]) -> None:
    notes = Notes()
    surgery = SurgerySettings("knife", criterion="random", every=None, after_task_change=after)
    finished(sequence("climbing", "qtran", surgery=surgery), notes)
    assert [updates for updates, _ in notes.operations] == expected


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"training": {"num_parallel": 0}}, "num_parallel is 0: it must be at least 1"),
        ({"training": {"num_parallel": 128}}, "128 episodes side by side do not fit into a replay of 64"),
        ({"training": {"num_steps": 5}}, "num_steps is 5, less than one episode"),
        ({"surgery": {"method": "scalpel"}}, "unknown method 'scalpel'"),
        ({"surgery": {"method": "knife", "every": None}}, "knife is never to operate"),
        ({"surgery": {"look": -1}}, "look is -1"),
    ],
)
def test_settings_that_make_no_run_are_refused(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        settings = small(**change.get("training", {}))
        make_run(replace(settings, surgery=SurgerySettings(**change.get("surgery", {}))))


def test_tasks_of_other_sizes_are_no_sequence() -> None:
    tasks = small().tasks.tasks + matrix_tasks("climbing").tasks
    with pytest.raises(SettingsError, match="have to look alike"):
        TaskSequence(tasks)
