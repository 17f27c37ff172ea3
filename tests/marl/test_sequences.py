"""Tasks in a row: how long each lasts, what is kept when it ends, and that a run that was killed goes on as if not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from marl.checkpoints import NAME, load, save
from marl.configuring import Layer, configure, from_dict, to_dict, to_yaml
from marl.environments import Task, TaskSequence, matrix_tasks
from marl.errors import CheckpointError, SettingsError
from marl.logs import open_logs, read_csv
from marl.run import Run, make_run
from marl.run_settings import RunSettings
from marl.sequences import SEQUENCES
from marl.tasks_log import NAME as TASKS_NAME
from marl.tasks_log import read_returns
from marl.training import Silent, train
from tests.marl.runs import KNIFE, PREDATOR_PREY, Recorder, assert_same_run, rounds, small

ROOT = Path(__file__).parents[2]
LENGTHS: Layer = {"tasks": {"0": {"num_steps": 16}, "1": {"num_steps": 32}}}


class Switches(Silent):
    """What each round finds in the replay, by task."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int]] = []

    def on_round(self, run: Run) -> None:
        self.found.append((run.task.name, len(run.replay)))


def before_and_after_the_switch(*layers: Layer) -> tuple[Run, Run]:
    """A run at the end of its first of two tasks, and the same at the beginning of the second."""
    runs = []
    for _ in range(2):
        run = make_run(small(*layers))
        train(run, is_stopped=lambda run=run: run.is_task_over)  # type: ignore[misc]
        runs.append(run)
    runs[1].begin_next_task()
    return runs[0], runs[1]


def first_episode_rewards(run: Run, num_episodes: int) -> torch.Tensor:
    rewards: torch.Tensor = run.replay.latest(num_episodes)["reward"]
    return rewards


# -- lengths


def test_each_task_lasts_for_its_own_steps_and_those_of_training_where_it_says_none() -> None:
    switches = Switches()
    settings = small({"tasks": "matrix_game:knife,qtran,climbing"}, LENGTHS)
    train(make_run(settings), switches)
    assert [name for name, _ in switches.found] == ["knife"] * 2 + ["qtran"] * 4 + ["climbing"] * 5
    assert from_dict(to_dict(settings)) == settings


def test_a_task_shorter_than_an_episode_is_refused_by_its_name() -> None:
    with pytest.raises(SettingsError, match=r"tasks.0.num_steps is 4, less than one episode of up to 5 steps"):
        small(PREDATOR_PREY, {"tasks": {"0": {"num_steps": 4}}})


def test_a_task_without_steps_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"tasks.1: num_steps of qtran is 0"):
        small({"tasks": {"1": {"num_steps": 0}}})


def test_two_games_of_one_name_are_refused_and_one_that_comes_again_is_not() -> None:
    one, other = Task("game", "matrix_game", {"payoff": "knife"}), Task("game", "matrix_game", {"payoff": "qtran"})
    with pytest.raises(SettingsError, match="two tasks are called 'game', and are different games"):
        TaskSequence((one, other))
    assert list(TaskSequence((one, one)).games) == ["game"]


# -- what is kept


@pytest.mark.parametrize(("kept", "expected"), [(0, 0), (5, 5), (24, 24), (1000, 24), (None, 24)])
def test_the_replay_keeps_as_many_of_the_latest_episodes_as_asked_for(kept: int | None, expected: int) -> None:
    before, after = before_and_after_the_switch({"switch": {"keep_episodes": kept}})
    assert len(after.replay) == expected
    if expected:
        assert torch.equal(first_episode_rewards(before, expected), first_episode_rewards(after, expected))


def test_episodes_that_were_kept_are_the_first_to_leave() -> None:
    _, run = before_and_after_the_switch({"switch": {"keep_episodes": 5}})
    kept = first_episode_rewards(run, 5)
    train(run, is_stopped=rounds(1))
    assert len(run.replay) == 13
    assert torch.equal(first_episode_rewards(run, 13)[:5], kept)


def test_episodes_of_several_lengths_cannot_be_kept_unless_they_are_padded() -> None:
    game: dict[str, Any] = PREDATOR_PREY["tasks"][0]  # type: ignore[index]
    longer = {**game, "name": "longer", "options": {**game["options"], "episode_limit": 7}}
    keep: Layer = {"switch": {"keep_episodes": None}}
    with pytest.raises(SettingsError, match=r"up to 5 or 7 steps: pad each task to \{'steps': 7\}"):
        small({"tasks": [game, longer]}, keep)
    settings = small({"tasks": [{**game, "pad": {"steps": 7}}, longer]}, keep, {"training": {"num_steps": 40}})
    run = make_run(settings)
    train(run)
    assert run.is_over and len(run.replay) > 8


@pytest.mark.parametrize("is_synced", [True, False])
def test_targets_become_copies_at_a_switch_if_asked_for(is_synced: bool) -> None:
    lazy: Layer = {"learning": {"targets": {"every": 10_000}}, "switch": {"sync_targets": is_synced}}
    before, after = before_and_after_the_switch(lazy, KNIFE)
    online, target = (network.state_dict() for network in (after.learner.online, after.learner.target))
    same = all(torch.equal(online[name], target[name]) for name in online if isinstance(online[name], torch.Tensor))
    assert same is is_synced
    assert before.learner.synced_at == 0 and after.learner.synced_at == (40 if is_synced else 0)


@pytest.mark.parametrize("layers", [[], [KNIFE]], ids=["plain", "operated on"])
@pytest.mark.parametrize("is_reset", [True, False])
def test_the_optimizer_begins_anew_at_a_switch_if_asked_for(is_reset: bool, layers: list[Layer]) -> None:
    adam: Layer = {"learning": {"optimizer": {"kind": "adam"}}, "switch": {"reset_optimizer": is_reset}}
    before, after = before_and_after_the_switch(adam, *layers)
    assert len(before.learner.optimizer.state) > 0
    assert (len(after.learner.optimizer.state) == 0) is is_reset
    train(after)
    steps = {int(state["step"]) for state in after.learner.optimizer.state.values()}
    assert steps == {after.progress.num_updates - (before.progress.num_updates if is_reset else 0)}


def test_what_older_files_say_of_a_switch_means_what_it_meant() -> None:
    old: Layer = {"training": {"clear_replay": False, "restart_exploration": False}}
    switch = small(old).switch
    assert (switch.keep_episodes, switch.restart_exploration, switch.sync_targets) == (None, False, False)
    assert small({"training": {"clear_replay": True}}).switch.keep_episodes == 0
    assert small(old, {"switch": {"keep_episodes": 3}}).switch.keep_episodes == 3


def test_a_checkpoint_of_before_goes_on_without_syncing_targets(tmp_path: Path) -> None:
    run = make_run(small({"switch": {"sync_targets": False}}))
    train(run, is_stopped=rounds(3))
    save(run, tmp_path)
    state = torch.load(tmp_path / NAME, weights_only=True)
    settings = state["settings"]
    del settings["switch"], settings["all_tasks"]
    settings["training"] |= {"clear_replay": True, "restart_exploration": True}
    for task in settings["tasks"]:
        del task["num_steps"], task["pad"]
    torch.save(state, tmp_path / NAME)
    resumed = load(tmp_path)
    assert resumed.settings == run.settings
    train(resumed)
    train(run)
    assert_same_run(resumed, run)


# -- going on


def test_tasks_that_are_over_keep_their_length_and_later_ones_may_change(tmp_path: Path) -> None:
    run = make_run(small(LENGTHS))
    train(run, is_stopped=rounds(3))
    save(run, tmp_path)
    with pytest.raises(CheckpointError, match=r"has left task 0, knife, after its 16 steps, .* had had 24"):
        load(tmp_path, small(LENGTHS, {"tasks": {"0": {"num_steps": 24}}}))
    longer = small(LENGTHS, {"tasks": {"1": {"num_steps": 48}}})
    resumed, whole = load(tmp_path, longer), make_run(longer)
    train(resumed)
    train(whole)
    assert_same_run(resumed, whole)


CHANGES: dict[str, dict[str, Any]] = {
    "free": {"punishment": 0.0},
    "costly": {"punishment": -2.0},
    "alone": {"stag_catchers": 1},
}
GAME: dict[str, Any] = PREDATOR_PREY["tasks"][0]  # type: ignore[index]
THREE: Layer = {
    "tasks": [{**GAME, "name": name, "options": {**GAME["options"], **changes}} for name, changes in CHANGES.items()],
    "training": {"num_steps": 60, "num_parallel": 4, "evaluate_every": 20, "save_every": 30},
    "switch": {"keep_episodes": 6},
    "all_tasks": {"num_episodes": 3, "every": 45},
}
BATTLES: Layer = {
    "tasks": [
        {"name": task.name, "environment": task.environment, "options": dict(task.options)}
        for task in SEQUENCES["smax_races"].tasks[:3]
    ],
    "learning": {"replay": {"batch_size": 8, "capacity": 500}},
    "training": {
        "num_steps": 2_000,
        "num_parallel": 4,
        "evaluate_every": 500,
        "num_evaluation_episodes": 4,
        "save_every": 700,
    },
    "switch": {"keep_episodes": 20},
    "all_tasks": {"num_episodes": 4},
}
MATRIX: Layer = {"tasks": "matrix_game:knife,qtran,climbing", "all_tasks": {"num_episodes": 2}}

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from marl.checkpoints import Saves
from marl.configuring import configure, read_file
from marl.logs import open_logs
from marl.run import make_run
from marl.training import Silent, train

class Dies(Silent):
    def on_round(self, run):
        half = run.settings.num_steps_of(1) // 2
        if run.progress.task == 1 and run.progress.num_task_steps >= half:
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
for folder in map(Path, sys.argv[1:]):
    child = os.fork()
    if not child:
        run = make_run(configure(read_file(folder / "asked.yaml")))
        logs = open_logs(folder, run)
        train(run, logs.csv, *logs.others, Saves(folder), Dies())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


@pytest.mark.situation("Checkpoints and copies", "`marl`: tasks in a row, killed in the second and resumed", "works")
def test_sequences_killed_in_their_second_task_and_resumed_have_the_curves_of_whole_ones(tmp_path: Path) -> None:
    cases = {
        "games with knife": small(MATRIX, KNIFE),
        "games without": small(MATRIX),
        "predators with knife": small(THREE, KNIFE),
        "predators without": small(THREE),
    }
    assert_killed_ones_go_on(cases, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("jaxmarl") is None, reason="needs jaxmarl")
@pytest.mark.parametrize("surgery", [KNIFE, {}], ids=["knife", "without"])
@pytest.mark.situation("Checkpoints and copies", "`marl`: three tasks of SMAX, killed in the second", "works")
def test_a_sequence_on_smax_killed_in_its_second_task_and_resumed_has_the_curves_of_a_whole_one(
    surgery: Layer, tmp_path: Path
) -> None:
    assert_killed_ones_go_on({"battles": small(BATTLES, surgery)}, folder=tmp_path)


def assert_killed_ones_go_on(cases: Mapping[str, RunSettings], *, folder: Path) -> None:
    """Each begun in another process, killed there, and compared with a whole one when it has gone on."""
    for name, settings in cases.items():
        (folder / name).mkdir()
        (folder / name / "asked.yaml").write_text(to_yaml(settings), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-c", KILLED, *(str(folder / name) for name in cases)]
    subprocess.run(command, cwd=ROOT, check=True)
    for name, settings in cases.items():
        assert_same_curves(folder / name, make_run(settings), folder=folder / f"{name}, whole")


def assert_same_curves(killed: Path, whole: Run, *, folder: Path) -> None:
    """A run that goes on from what a killed one left ends with the files and the state of a whole one."""
    recorder = Recorder()
    for run, place in ((whole, folder), (load(killed), killed)):
        assert run.progress.num_steps == 0 or not run.is_over
        logs = open_logs(place, run)
        train(run, logs.csv, *logs.others, recorder)
        save(run, place)
    assert_same_run(load(killed), whole)
    assert read_csv(killed / "log.csv") == read_csv(folder / "log.csv")
    assert str(read_returns(killed / TASKS_NAME)) == str(read_returns(folder / TASKS_NAME))  # as text: nan is nan
    assert len({each.num_finished for each in read_returns(killed / TASKS_NAME)}) == 4
    assert len({record["place"] for record in read_csv(killed / "log.csv")}) == 3


# -- by name


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_by_name_are_games_that_one_set_of_networks_can_play(name: str) -> None:
    tasks = SEQUENCES[name].tasks
    package = {"smax": "jaxmarl", "smacv2": "smacv2", "smac": "smac"}.get(tasks[0].environment)
    if package and find_spec(package) is None:
        pytest.skip(f"needs {package}")
    settings = configure({"algorithm": "qmix", "tasks": name})
    assert settings.tasks == TaskSequence(tasks)
    assert (tasks[-1].name == tasks[0].name) and len(settings.tasks.games) == max(1, len(tasks) - 1)
    assert from_dict(to_dict(settings)) == settings


def test_the_five_matrix_games_have_their_best_actions_elsewhere_than_the_game_before() -> None:
    best = []
    for task in SEQUENCES["matrix_five"].tasks:
        payoff = task.make(1).payoffs[0]  # type: ignore[attr-defined]
        best.append(set(zip(*(payoff == payoff.max()).nonzero(), strict=True)))
    assert len(best) == 6
    assert all(not one & other for one, other in pairwise(best))


def test_what_a_sequence_sets_goes_over_the_preset_and_under_what_is_asked_for() -> None:
    plain = configure({"algorithm": "qmix", "tasks": "matrix_five"})
    asked = configure({"algorithm": "qmix", "training": {"num_steps": 7_000}}, {"tasks": "matrix_five"})
    assert (plain.training.num_steps, plain.learning.exploration.num_steps) == (2_000, 1_000)
    assert (asked.training.num_steps, asked.learning.exploration.num_steps) == (7_000, 1_000)
    other = configure({"algorithm": "qmix", "tasks": "matrix_five"}, {"tasks": "matrix_game:knife"})
    assert other.training.num_steps == 1_000_000


def test_one_task_of_a_sequence_by_name_can_be_changed() -> None:
    settings = configure({"algorithm": "vdn", "tasks": "matrix_five"}, {"tasks": {"1": {"num_steps": 64}}})
    assert settings.num_steps_of(1) == 64 and settings.num_steps_of(2) == 2_000
    assert settings.tasks.tasks[1].options == matrix_tasks("qtran").tasks[0].options
