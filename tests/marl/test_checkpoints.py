"""A run that was saved and loaded is the run that went on; what is no such run is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from marl.checkpoints import NAME, VERSION, Saves, load, replacing, save
from marl.configuring import Layer, to_yaml
from marl.errors import CheckpointError
from marl.logs import open_logs, read_csv
from marl.run import Run, make_run
from marl.run_settings import RunSettings
from marl.training import train
from tests.marl.runs import KNIFE, PREDATOR_PREY, Recorder, assert_same_run, differences, rounds, small

ROOT = Path(__file__).parents[2]


def finished(settings: RunSettings) -> tuple[Run, Recorder]:
    run, recorder = make_run(settings), Recorder()
    train(run, recorder)
    return run, recorder


@pytest.fixture(scope="module")
def whole() -> tuple[Run, Recorder]:
    """A run with operations, without a break."""
    return finished(small(KNIFE))


def assert_goes_on_as(whole: tuple[Run, Recorder], *, after: int, folder: Path) -> None:
    """The same run, saved after so many rounds and loaded, ends as it did."""
    run, expected = whole
    begun, before, later = make_run(run.settings), Recorder(), Recorder()
    train(begun, before, is_stopped=rounds(after))
    save(begun, folder)
    resumed = load(folder)
    assert_same_run(resumed, begun)
    train(resumed, later)
    assert_same_run(resumed, run)
    assert before.records + later.records == expected.records
    assert before.num_operations + later.num_operations == expected.num_operations


@pytest.mark.parametrize("num_rounds", [5, 8], ids=["at the end of a task", "in the second task"])
def test_a_run_that_was_saved_loaded_and_finished_is_the_one_without_a_break(
    num_rounds: int, whole: tuple[Run, Recorder], tmp_path: Path
) -> None:
    assert_goes_on_as(whole, after=num_rounds, folder=tmp_path)


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param([KNIFE, PREDATOR_PREY], id="predator-prey, with surgery"),
        pytest.param([{"algorithm": "vdn", "learning": {"targets": {"rate": 0.1}}}], id="vdn with Polyak targets"),
        pytest.param([{"learning": {"optimizer": {"kind": "adam"}}, "algorithm": "qplex"}], id="qplex with Adam"),
    ],
)
def test_other_runs_go_on_as_well(layers: list[Layer], tmp_path: Path) -> None:
    assert_goes_on_as(finished(small(*layers)), after=4, folder=tmp_path)


def test_the_run_operates_before_and_after_it_is_saved(whole: tuple[Run, Recorder]) -> None:
    run, recorder = whole
    assert recorder.num_operations >= 3
    assert run.operations.counts()["surgery/frozen_rows"]
    assert run.settings.surgery.every in range(1, 3 * 8)


def test_runs_that_differ_in_one_weight_are_told_apart() -> None:
    one, other = make_run(small()), make_run(small())
    assert_same_run(one, other)
    other.learner.online.state_dict()["agent.head.bias"][0] += 1e-7
    assert differences(one.state_dict(), other.state_dict()) == ["/learner/online/agent.head.bias"]
    with pytest.raises(AssertionError):
        assert_same_run(one, other)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from marl.checkpoints import Saves
from marl.configuring import configure, read_file
from marl.logs import open_logs
from marl.run import make_run
from marl.training import train

torch.set_num_threads(1)
folder, num_saves, whole = Path(sys.argv[1]), 0, torch.save

def save_and_die(state, path):
    global num_saves
    num_saves += 1
    whole(state, path)
    if num_saves == 2:
        with open(path, "r+b") as file:
            file.truncate(os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_and_die
run = make_run(configure(read_file(folder / "asked.yaml")))
logs = open_logs(folder, run)
train(run, logs.csv, *logs.others, Saves(folder))
"""


def test_a_run_killed_in_the_middle_of_saving_goes_on_from_the_checkpoint_before(
    whole: tuple[Run, Recorder], tmp_path: Path
) -> None:
    run, expected = whole
    (tmp_path / "asked.yaml").write_text(to_yaml(run.settings), encoding="utf-8")
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr.decode()
    assert (tmp_path / f"{NAME}.partial").exists()
    resumed = load(tmp_path)
    assert 0 < resumed.progress.num_steps < run.progress.num_steps
    logs = open_logs(tmp_path, resumed)
    train(resumed, logs.csv, *logs.others, Saves(tmp_path))
    assert_same_run(resumed, run)
    assert_same_run(load(tmp_path), run)
    assert read_csv(tmp_path / "log.csv") == expected.records
    lines = (tmp_path / "operations.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == expected.num_operations


def test_an_error_while_writing_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before", encoding="utf-8")
    with pytest.raises(OSError, match="disk full"), replacing(path) as partial:
        partial.write_text("half", encoding="utf-8")
        raise OSError("disk full")
    assert path.read_text(encoding="utf-8") == "before"


def saved(folder: Path) -> Path:
    save(make_run(small()), folder)
    return folder / NAME


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(kept: float, tmp_path: Path) -> None:
    path = saved(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    with pytest.raises(CheckpointError, match="is damaged, or no checkpoint"):
        load(tmp_path)


@pytest.mark.parametrize("found", [{"version": None}, [1], 5, {"weights": torch.zeros(1)}])
def test_a_file_of_something_else_is_refused(found: object, tmp_path: Path) -> None:
    torch.save(found, tmp_path / NAME)
    with pytest.raises(CheckpointError, match=r"no checkpoint|of version None"):
        load(tmp_path)


def test_what_lacks_a_part_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    state = torch.load(path, weights_only=True)
    del state["run"]["learner"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="it lacks 'learner'"):
        load(tmp_path)


def test_another_version_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    torch.save({**torch.load(path, weights_only=True), "version": VERSION + 1}, path)
    with pytest.raises(CheckpointError, match=f"of version {VERSION + 1}, this program reads version {VERSION}"):
        load(tmp_path)


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, r"was saved with seed 0, and is to go on with 1:"),
        ({"surgery": {"method": "knife"}}, r"surgery.method 'none', and is to go on with 'knife'"),
        ({"learning": {"agent": {"hidden_size": 9}}, "seed": 1}, r"hidden_size 8, .* with 9 \(and 1 more\)"),
        ({"tasks": "matrix_game:knife"}, r"tasks.1.environment 'matrix_game', and is to go on with 'unset'"),
    ],
)
def test_other_settings_are_refused(other: Layer, message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, small(other))


def test_a_run_may_go_on_for_longer(tmp_path: Path) -> None:
    longer = small({"training": {"num_steps": 48}}, {"tasks": "matrix_game"})
    save(finished(small({"tasks": "matrix_game"}))[0], tmp_path)
    run = load(tmp_path, longer)
    assert not run.is_over
    train(run)
    assert_same_learner(run, finished(longer)[0])


def assert_same_learner(one: Run, other: Run) -> None:
    assert differences(one.learner.state_dict(), other.learner.state_dict()) == []


def test_saves_whenever_it_is_time_and_at_the_end(tmp_path: Path) -> None:
    run = make_run(small())
    train(run, Saves(tmp_path), is_stopped=rounds(4))
    assert load(tmp_path).progress.num_steps == 24
    train(run, Saves(tmp_path))
    assert load(tmp_path).is_over
