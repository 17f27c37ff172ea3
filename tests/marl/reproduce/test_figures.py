"""Figures: the runs they ask for, what is measured of them, and the pages that come out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure as Canvas
from typer.testing import CliRunner

from marl.cli import app
from marl.errors import SettingsError
from marl.reproduce import comparisons
from marl.reproduce.engines import InProcess
from marl.reproduce.figures import figure1, registry, tuning
from marl.reproduce.figures.arms import CONTROLS, FRESH, measures_of, tasks_of
from marl.reproduce.figures.figure import Asked, Figure, Panel, scores_of
from marl.reproduce.figures.registry import FIGURES, figures_of
from marl.reproduce.figures.tuning import METHODS, Method, grid, ranked, tuned, tuning_jobs
from marl.reproduce.matrix.runs import MatrixRun
from marl.reproduce.matrix.tasks import TaskSettings
from marl.reproduce.reproducing import Reproducing, reproduce
from marl.reproduce.results import Job, Provenance, Result, Results, Work, settings_of
from marl.reproduce.sweep import sweep
from tests.marl.reproduce.drawn import SCORE, UNITS, Drawn, figure_of, made_up, pretended, score_of

SMOKE = Asked.of("smoke")
HERE = Provenance("1.0", "abc")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


CONTROLLED: dict[str, Work] = {"none": Drawn(0.0), "optimizer reset": Drawn(0.1)}


# -- what is asked for


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_every_comparison_has_its_controls_and_no_run_has_seeds_that_were_tuned_on(name: str, tmp_path: Path) -> None:
    for asked in (Asked.of("small"), Asked.of("paper")):
        files = Results(tmp_path)
        for panel in FIGURES[name].panels(asked, files):
            if panel.kind == "comparison":
                assert {panel.nothing, panel.optimizer} <= set(panel.arms)
                assert any("KNIFE" in arm for arm in panel.arms)
            assert all(measure.relative_to in (None, *panel.arms) for measure in panel.measures)
            assert len(panel.measures) >= 2
        seeds = {seed for job in FIGURES[name].jobs(asked, files) for seed in job.seeds}
        assert min(seeds) == 1000 and seeds <= set(asked.seeds)
        assert name not in ("figure1", "figure7", "figure8") or seeds == set(asked.seeds)
        assert seeds.isdisjoint({seed for job in tuning_jobs(asked, files) for seed in job.seeds})


def test_figure_1_compares_with_all_controls() -> None:
    (literal, contextual, reset) = FIGURES["figure1"].panels(Asked.of("small"), Results(Path("/nowhere")))
    for panel in (literal, contextual, reset):
        assert set(CONTROLS) < set(panel.arms)
        assert {"leaky ReLU", "KNIFE, as many at random", "fade to fresh, agents"} < set(panel.arms)
        untuned = ["fade to fresh, best setting", "head scaled, best setting"]
        assert list(panel.missing) == [*untuned, "as wide as KNIFE's"]
    assert [len(set(panel.arms.values())) for panel in (literal, contextual, reset)] == [11, 11, 10]


def test_arms_of_a_panel_differ_in_what_they_are_named_after() -> None:
    for name in FIGURES:
        for panel in FIGURES[name].panels(Asked.of("small"), Results(Path("/nowhere"))):
            works = [work for arm, work in panel.arms.items() if arm != panel.optimizer]
            names = [arm for arm in panel.arms if arm != panel.optimizer]
            twins = [(a, b) for a, one in zip(names, works, strict=True) for b, other in zip(names, works, strict=True)]
            same = {(a, b) for (a, b) in twins if a < b and panel.arms[a] == panel.arms[b]}
            assert same == set(), panel.name


def test_the_wide_control_waits_for_the_runs_that_say_how_wide(tmp_path: Path) -> None:
    files, tasks = Results(tmp_path), tasks_of(SMOKE, "literal")
    panel = figure1.compared("a", SMOKE, tasks, files)
    knife = panel.arms["KNIFE, the paper's reading"]
    for seed, rows in zip(SMOKE.seeds, (4, 8), strict=True):
        outcome = {**made_up(1.0), "rows": {"agent.encoder.0": rows, "mixer.w1.0": 2, "mixer.v.0": 99}}
        files.write(knife, Result(settings_of(knife), seed, HERE, outcome))
    wide = figure1.compared("a", SMOKE, tasks, files).arms["as wide as KNIFE's"]
    assert isinstance(wide, MatrixRun)
    assert (wide.learner.agent_size, wide.learner.hypernet_size) == (8 + 6, 8 + 2)


def test_an_unknown_figure_scale_or_number_of_seeds_is_refused() -> None:
    with pytest.raises(SettingsError, match="no figure 'figure5'"):
        figures_of("figure5")
    with pytest.raises(SettingsError, match="no scale 'huge'; choose one of 'smoke', 'small', 'paper'"):
        Asked.of("huge")
    with pytest.raises(SettingsError, match="an interval needs at least 2"):
        Asked.of("small", 1)


# -- what is measured


def test_measures_of_the_literal_tasks() -> None:
    looks = [
        {"task": task, "update": update, "solved": solved, "agent/stagnant": 0.2 * task, "mixer/stagnant": 0.4}
        for task, ends in enumerate([1, 0, 1, 1])
        for update, solved in ((5, 0.0), (10, float(ends)))
    ]
    solved, stagnant, _ = measures_of("literal")
    assert solved.of({"looks": looks}) == pytest.approx(2 / 3)  # of the tasks after the first, at their ends
    assert stagnant.of({"looks": looks}) == pytest.approx((0.4 + 0.4 + 0.6 + 0.4) / 4)  # in the second half
    assert solved.each_task is not None
    each = {"task 1": True, "task 2": False, "task 3": True, "task 1 again": True}
    assert solved.each_task({"looks": looks}) == each


def test_errors_are_relative_to_fresh_networks_of_the_same_seed() -> None:
    error = measures_of("contextual")[0]
    runs = {
        name: [Result({}, seed, HERE, made_up(score)) for seed, score in enumerate(scores)]
        for name, scores in {"none": (2.0, 6.0), FRESH: (1.0, 2.0)}.items()
    }
    seeds, scores = scores_of(runs, error)
    assert seeds == [0, 1]
    assert {name: own.tolist() for name, own in scores.items()} == {"none": [2.0, 3.0], FRESH: [1.0, 1.0]}
    assert scores_of({"none": runs["none"]}, error)[1] == {}


def test_a_measure_may_be_less_that_of_another_arm_of_the_same_seed() -> None:
    runs = {
        name: [Result({}, seed, HERE, made_up(score)) for seed, score in enumerate(scores)]
        for name, scores in {"none": (2.0, 6.0), FRESH: (0.0, 7.0)}.items()
    }
    less = replace(SCORE, less=FRESH)
    assert {name: own.tolist() for name, own in scores_of(runs, less)[1].items()} == {"none": [2, -1], FRESH: [0, 0]}
    assert scores_of({"none": runs["none"]}, less)[1] == {}


def test_arms_are_compared_on_the_seeds_that_all_have() -> None:
    runs = {
        name: [Result({}, seed, HERE, made_up(float(seed))) for seed in seeds]
        for name, seeds in {"a": (1, 2, 3, 4), "b": (4, 3, 1), "mostly failed": (2,)}.items()
    }
    seeds, scores = scores_of(runs, SCORE)
    assert seeds == [1, 3, 4]
    assert {name: own.tolist() for name, own in scores.items()} == {"a": [1, 3, 4], "b": [1, 3, 4]}


# -- what comes out


def test_a_page_says_what_is_confirmed_and_what_was_not_run(tmp_path: Path) -> None:
    panel = Panel("one", {**CONTROLLED, "better": Drawn(1.0)}, [SCORE, UNITS], {"lost": "nobody built it"}, ["A note."])
    figure = Figure("drawn", "Some are better.", lambda asked, files: [panel])
    done = reproduce(figure, Asked.of("smoke", 8), Reproducing(tmp_path, InProcess()))
    page = done.page.read_text()
    rows = {line.split(" | ")[0].lstrip("| "): line for line in page.splitlines() if line.startswith("|")}
    assert "Claim: Some are better." in page and "A note." in page
    assert "| confirmed |" in rows["better"] and "+1.00 (+1.00 to +1.00) | +0.90 (+0.90 to +0.90)" in rows["better"]
    assert "confirmed" not in rows["none"]
    assert "not run: nobody built it" in rows["lost"]
    assert f"8 seeds; 24 runs took 0.01 hours of processor time; version {Provenance.here().version}" in page
    assert len({line.count("|") for line in page.splitlines() if line.startswith("|")}) == 1
    assert done.picture.read_bytes().startswith(b"\x89PNG")


def test_tasks_that_are_solved_or_not_are_counted_one_by_one() -> None:
    solved = measures_of("literal")[0]
    panel = Panel("one", CONTROLLED, [replace(SCORE, each_task=solved.each_task), UNITS], {})
    scores = {"none": [0.0] * 20 + [1.0] * 10, "optimizer reset": [1.0] * 30}
    runs = {
        name: [Result({}, seed, HERE, made_up(score)) for seed, score in enumerate(each)]
        for name, each in scores.items()
    }
    rows = [row.strip("| ").split(" | ") for row in comparisons.tables(panel, runs) if row.startswith("|")]
    assert rows[-4] == ["arm", "task 1", "task 2", "task 3", "task 1 again"]
    assert rows[-2:] == [["none", *["0.33 (0.19 to 0.51)"] * 4], ["optimizer reset", *["1.00 (0.89 to 1.00)"] * 4]]


@pytest.mark.parametrize(("worst", "scale"), [(2.0, "linear"), (100.0, "log")])
def test_an_arm_that_diverges_makes_axes_logarithmic(worst: float, scale: str) -> None:
    runs = {
        name: [Result({}, seed, HERE, made_up(score)) for seed in range(4)]
        for name, score in {"none": 1.0, "optimizer reset": worst, "KNIFE": 0.5}.items()
    }
    axes = Canvas().subplots(3)
    comparisons.draw(axes, Panel("one", CONTROLLED, [replace(SCORE, curve="error"), UNITS], {}), runs)
    intervals, profiles, ways = axes
    assert [intervals.get_xscale(), profiles.get_xscale(), ways.get_yscale()] == [scale] * 3
    assert all(profile.get_ydata()[0] == 1 for profile in profiles.get_lines())  # all seeds are above the lowest


def test_a_figure_comes_out_without_an_arm_that_fails(tmp_path: Path) -> None:
    figure = figure_of(**CONTROLLED, broken=Drawn(1.0, fails=True), better=Drawn(2.0))
    done = reproduce(figure, SMOKE, Reproducing(tmp_path, InProcess()))
    assert [ended.error for ended in done.failed] == ["RuntimeError: on purpose"]
    page = done.page.read_text()
    assert "| better |" in page and "| broken |" not in page


def test_a_figure_without_any_runs_is_a_page_that_says_so(tmp_path: Path) -> None:
    done = reproduce(figure_of(none=Drawn(0.0, fails=True)), SMOKE, Reproducing(tmp_path, InProcess()))
    assert "No runs yet." in done.page.read_text()


def test_the_command_reproduces_goes_on_and_reports_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FIGURES, "figure1", figure_of(**CONTROLLED, better=Drawn(1.0)))
    monkeypatch.setitem(registry.FIGURES, "figure7", figure_of(**CONTROLLED, broken=Drawn(3.0, fails=True)))
    monkeypatch.setattr("marl.reproduce.command.make_engine", lambda name, workers: InProcess())
    arguments = ["--scale", "smoke", "--seeds", "3", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, ["reproduce", "figure1", *arguments])
    assert done.exit_code == 0, done.output
    assert len(list((tmp_path / "runs").glob("*.json"))) == 9
    assert (tmp_path / "smoke" / "drawn.md").is_file()
    failed = CliRunner().invoke(app, ["reproduce", "figure7", *arguments])
    assert failed.exit_code == 1
    assert "failed: drawn 3.0, seeds 1000 to 1002: RuntimeError: on purpose" in failed.output
    unknown = CliRunner().invoke(app, ["reproduce", "figure9", *arguments])
    assert unknown.exit_code == 2 and "no figure 'figure9'" in unknown.output


@pytest.mark.parametrize("name", ["figure1", "figure7", "figure8"])  # the others are in test_training_runs.py
def test_a_figure_runs_at_the_smallest_scale(name: str, tmp_path: Path) -> None:
    """The first panel of each for real, with all of its arms; the slow test has all panels."""
    figure = replace(FIGURES[name], panels=lambda asked, files: FIGURES[name].panels(asked, files)[:1])
    done = reproduce(figure, SMOKE, Reproducing(tmp_path, InProcess()))
    assert done.failed == ()
    (panel,) = figure.panels(SMOKE, Results(tmp_path / "runs"))
    verdicts, tasks = done.page.read_text().split("Of the seeds")
    for table, num_rows in ((verdicts, len(panel.arms) + len(panel.missing)), (tasks, len(panel.arms))):
        assert len([line for line in table.splitlines() if line.startswith("| ")]) == 2 + num_rows
    did_act = []
    for path in (tmp_path / "runs").glob("*knife-*1000.json"):
        saved = json.loads(path.read_text())
        assert saved["settings"]["intervention"]["act"]["settings"]["method"] == "knife"
        assert [look["task"] for look in saved["outcome"]["looks"]][-1] == 2
        did_act.append(saved["outcome"]["units"] > 0)
        assert sum(saved["outcome"]["rows"].values()) == 2 * saved["outcome"]["units"]
    assert any(did_act) or name == "figure8"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["all", "tuning"])
def test_all_figures_run_at_the_smallest_scale(name: str, tmp_path: Path) -> None:
    command = ["reproduce", name, "--scale", "smoke", "--workers", "2", "--output", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    if name == "all":
        pages = [(tmp_path / "smoke" / f"{figure}.md").read_text() for figure in FIGURES]
        assert all("No runs yet." not in page for page in pages)
        assert "| as wide as KNIFE's | not run" not in pages[0]


# -- tuning


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_are_tuned_in_equally_many_settings_that_differ(method: Method) -> None:
    for scale, size in (("smoke", 2), ("small", 8), ("paper", 3 * 3 * 4 * 3 * 3)):
        found = grid(Asked.of(scale), method)
        assert len(found) == len(set(found)) == size
        assert len({str(each) for each in found}) == size  # and a reader can tell them apart


def test_the_small_grid_of_knife_is_a_part_of_the_open_one() -> None:
    assert set(grid(Asked.of("small"), "KNIFE")) < set(grid(Asked.of("paper"), "KNIFE"))


def test_the_best_of_the_second_round_is_taken_and_only_when_all_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MatrixRun, "run", pretended)
    monkeypatch.setitem(tuning.FIRST_SEEDS, "small", 2)
    monkeypatch.setitem(tuning.ALL_SEEDS, "small", 3)
    asked, files = Asked.of("small"), Results(tmp_path)
    tasks = tasks_of(asked, "literal")
    assert ranked(asked, tasks, files, "KNIFE") == []
    assert tuned(asked, tasks, files, "KNIFE")[1] is None
    first = of_literal(tuning_jobs(asked, files))
    assert {seed for job in first for seed in job.seeds} == {0, 1}
    sweep(first, files, InProcess())
    assert ranked(asked, tasks, files, "KNIFE") == []
    second = of_literal(tuning_jobs(asked, files))
    late = [job for job in second if job not in first]
    assert {seed for job in late for seed in job.seeds} == {2}
    assert len(late) == 3 * 8 / 4 + 1  # and what errors are relative to
    sweep(second, files, InProcess())
    for method in METHODS:
        best, source = tuned(asked, tasks, files, method)
        assert source == "best of 8, tuned on seeds 0 to 2"
        assert best in grid(asked, method) and score_of(best) == max(map(score_of, grid(asked, method)))
    arms = figure1.compared("a", asked, tasks, files).arms
    assert {f"{method}, best setting" for method in METHODS} < set(arms)


def test_tuning_on_fewer_tasks_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MatrixRun, "run", pretended)
    asked, files = Asked.of("small"), Results(tmp_path)
    tasks = tasks_of(asked, "contextual")
    for _ in range(2):
        sweep(tuning_jobs(asked, files), files, InProcess())
    assert str(tuned(asked, tasks, files, "KNIFE")[1]).endswith("tuned on seeds 0 to 15, the first 20 tasks")


def of_literal(jobs: Sequence[Job]) -> list[Job]:
    return [job for job in jobs if isinstance(job.work, MatrixRun) and job.work.tasks.kind == "literal"]


def test_a_sequence_that_is_none_is_refused() -> None:
    with pytest.raises(SettingsError, match="no sequences 'other'"):
        TaskSettings("other", 3, 3)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="at least 2 of at least 2"):
        TaskSettings("literal", 1, 3)
