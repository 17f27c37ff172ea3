"""Figures of whole runs: what they ask for, what is kept of a run, and what is shown."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from marl.errors import SettingsError
from marl.reproduce.engines import InProcess
from marl.reproduce.figures import figure2, figure3, figure4, figure6
from marl.reproduce.figures.figure import Asked
from marl.reproduce.figures.registry import FIGURES
from marl.reproduce.reproducing import Reproducing, reproduce
from marl.reproduce.results import Results, settings_of
from marl.reproduce.training.arms import BATTLES, DRIFTS, HUNTS, STATIONARY, arms_of_drift, arms_of_stationary
from marl.reproduce.training.runs import TrainingRun

SMOKE, SMALL, PAPER = (Asked.of(scale) for scale in ("smoke", "small", "paper"))
NOWHERE = Results(Path("/nowhere"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("asked", [SMOKE, SMALL, PAPER])
def test_every_arm_is_a_run_that_can_be_configured(asked: Asked) -> None:
    for games, arms in [(each, arms_of_drift) for each in DRIFTS] + [(each, arms_of_stationary) for each in STATIONARY]:
        if games is not HUNTS and asked is not SMOKE:
            pytest.importorskip("jaxmarl", reason="battles need jaxmarl")
        for name, run in arms(games, asked).arms.items():
            settings = run.settings(seed=1)
            assert settings.seed == 1 and settings.algorithm == "qmix"
            assert (settings.surgery.method == "none") == (name == "none" or settings.switch.reset_optimizer), name
            assert settings.training.evaluate_every * run.num_looks <= settings.num_steps_of(0)


def test_arms_differ_in_what_is_done_and_in_nothing_else() -> None:
    for games in (*DRIFTS, *STATIONARY):
        arms = (arms_of_drift if games in DRIFTS else arms_of_stationary)(games, SMALL).arms
        assert len({run.intervention for run in arms.values()}) == len(arms)
        assert len({(run.games, run.assigned, run.algorithm, run.num_looks) for run in arms.values()}) == 1


def test_figures_of_the_same_games_share_their_runs() -> None:
    works = {name: {job.work for job in FIGURES[name].jobs(SMALL, NOWHERE)} for name in FIGURES}
    assert works["figure2"] < works["figure6"] and works["figure3"] == works["figure4"] < works["figure6"]


def test_seeds_are_as_many_as_a_game_is_worth_unless_a_number_is_asked_for() -> None:
    (panel,) = figure2.FIGURE2.panels(SMALL, NOWHERE)
    assert panel.seeds(SMALL, "none") == (1000, 1001, 1002)
    assert panel.seeds(Asked.of("small", 7), "none") == tuple(range(1000, 1007))
    growing = figure3.FIGURE3.panels(SMALL, NOWHERE)[0]
    assert [len(growing.seeds(SMALL, games.name)) for games in (BATTLES, HUNTS)] == [3, 5]


def test_a_run_keeps_as_many_looks_at_each_task_for_every_seed_and_does_the_same_again() -> None:
    run = arms_of_drift(HUNTS, SMOKE).arms["KNIFE, the paper's reading"]
    first, other = run.run([1000, 1001])
    (again,) = run.run([1000])
    for outcome in (first, other):
        assert [(look["task"], look["update"]) for look in outcome["looks"]] == [
            (task, 30 * number) for task in range(4) for number in range(1, 3)
        ]
        assert outcome["rows"]["all"] > 0 and outcome["updates"] > 0
        assert {"return", "agent/stagnant", "mixer/generated_stagnant_grown"} <= set(outcome["looks"][-1])
        assert [each["num_finished"] for each in outcome["tasks"]] == [each for each in range(5) for _ in range(3)]
    without_time = [{**outcome, "seconds": 0} for outcome in (first, again, other)]
    assert str(without_time[0]) == str(without_time[1]) != str(without_time[2])  # as text: nan is nan


def test_what_identifies_a_run_is_what_the_command_line_would_take() -> None:
    run = TrainingRun("one", ("tasks=matrix_game:climbing",), ("surgery.method=knife", "surgery.criterion=stagnant"))
    assert run.label == "one, qmix, knife stagnant"
    assert settings_of(run)["intervention"] == ["surgery.method=knife", "surgery.criterion=stagnant"]
    with pytest.raises(SettingsError, match="sets nothing"):
        TrainingRun("one", ("tasks",)).settings(seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Figures of whole runs at the smallest scale."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("figures")
    how = Reproducing(folder, InProcess())
    for figure in (figure6.FIGURE6, figure2.FIGURE2, figure3.FIGURE3, figure4.FIGURE4):
        assert reproduce(figure, SMOKE, how).failed == ()
    return folder


def test_pages_and_pictures_come_out(folder: Path) -> None:
    for name in ("figure2", "figure3", "figure4", "figure6"):
        assert (folder / "smoke" / f"{name}.png").stat().st_size > 10_000
    battles = (folder / "smoke" / "figure6.md").read_text(encoding="utf-8")
    for arm in arms_of_drift(HUNTS, SMOKE).arms:
        assert f"| {arm} |" in battles
    shares = (folder / "smoke" / "figure3.md").read_text(encoding="utf-8")
    assert "| agents | hypernetworks | mixing units | hypernetworks less agents |" in shares


def test_growth_is_since_before_the_first_update(folder: Path) -> None:
    files = Results(folder / "runs")
    growing = figure3.FIGURE3.panels(SMOKE, files)[0]
    for name, runs in growing.results(files, SMOKE).items():
        for run in runs:
            last = run.outcome["looks"][-1]
            agents, networks, mixing, more = (measure.of(run.outcome) for measure in growing.measures)
            assert (agents, networks) == (last["agent/stagnant_grown"], last["mixer/stagnant_grown"]), name
            assert more == pytest.approx(networks - agents)
            assert mixing == last["mixer/generated_stagnant_grown"]
