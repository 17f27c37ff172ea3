"""The comparison of methods: fair by construction, the same every time, and going on where it was stopped."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from neuronsurgery import cli, surgery
from neuronsurgery.comparison import planning
from neuronsurgery.comparison.arms import ARMS, NUM_SETTINGS, Setting, Subject
from neuronsurgery.comparison.benchmarks import BENCHMARKS, Scale
from neuronsurgery.comparison.learning import Learner
from neuronsurgery.comparison.networks import Shape, size_of
from neuronsurgery.comparison.planning import Comparison, compare, num_runs
from neuronsurgery.comparison.running import Job, Run, run, stored
from neuronsurgery.comparison.showing import page
from neuronsurgery.comparison.statistics import estimate, interquartile_mean, mean
from neuronsurgery.methods import METHODS

TINY = Scale(num_tasks=2, num_steps=6, batch_size=8)


def job(arm: str = "none", benchmark: str = "labels", seed: int = 0, scale: Scale = TINY) -> Job:
    return Job(benchmark, arm, ARMS[arm].settings[0], seed, scale, BENCHMARKS[benchmark].shape.hidden)


# -- what is compared ------------------------------------------------------------------------------------------------


def test_every_method_of_the_registry_is_compared() -> None:
    """By what the arms call: a method that is added to the registry needs an arm, or a reason here."""
    called = {name for name in METHODS if f"surgery.{name}" in Path(planning.__file__).with_name("arms.py").read_text()}
    assert set(METHODS) - called == set()


def test_every_arm_is_tuned_over_as_many_settings() -> None:
    assert {len(set(arm.settings)) for arm in ARMS.values()} == {NUM_SETTINGS}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_learns_and_acts_as_often_as_its_setting_says(arm: str) -> None:
    found = run(job(arm))
    assert len(found.scores) == 2 and all(0 <= score <= 1 for score in found.scores)
    if ARMS[arm].tunes.startswith("tasks"):
        assert found.num_actions <= 6  # every 0.25 * 6 steps, and 12 steps in all
        assert found.num_actions > 0 or arm == "ReGraMa"  # which finds no inactive unit in so few steps
    elif ARMS[arm].tunes.startswith("share"):
        assert found.num_actions == 1
    else:
        assert found.num_actions == 0


@pytest.mark.parametrize("arm", ["KNIFE", "continual backpropagation", "shrink and perturb", "UPGD"])
def test_equal_jobs_give_equal_scores(arm: str) -> None:
    first = run(job(arm))
    torch.manual_seed(12345)
    assert run(job(arm)).scores == first.scores


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_arms_of_a_seed_see_the_same_tasks_and_another_seed_others(benchmark: str) -> None:
    one, other, another = (run(job(arm, benchmark, seed)) for arm, seed in (("none", 0), ("none", 0), ("none", 1)))
    assert one.scores == other.scores != another.scores


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_a_network_that_does_not_learn_scores_low(benchmark: str) -> None:
    chosen = BENCHMARKS[benchmark]
    model = chosen.shape.build(0)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    still = Learner(model, torch.optim.SGD(model.parameters(), lr=0.0))
    assert max(chosen.scores(still, TINY, 0)) < 0.4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("benchmark", "least"), [("labels", 0.95), ("pixels", 0.6), ("regression", 0.55), ("pole", 0.25)]
)
def test_a_task_that_is_trained_for_long_is_learned(benchmark: str, least: float) -> None:
    scale = replace(BENCHMARKS[benchmark].scale, num_tasks=1, num_steps=1500)
    found = run(replace(job(benchmark=benchmark, scale=scale), setting=Setting(3e-3)))
    assert found.scores[0] > least


# -- sizes -----------------------------------------------------------------------------------------------------------


def test_sizes_of_an_operated_network_by_hand() -> None:
    model = Shape(3, (4,), 2).build(0)
    surgery.knife(model, surgery.Units({"0": [0, 1]}))
    size = size_of(model)  # 3 * 4 + 4 + 4 * 2 + 2 = 26 weights, four frozen rows of 3 + 1
    assert (size.weights, size.multiplications) == (26 + 16, 3 * (12 + 8) + 2 * 12)
    surgery.plasticity_injection(model, "2")
    assert size_of(model).weights == 26 + 16 + 2 * 10
    assert size_of(model).multiplications == 84 + 2 * 2 * 8


def test_controls_have_at_least_as_much_as_the_reference_and_hardly_more() -> None:
    shape = BENCHMARKS["labels"].shape
    wide = shape.widened(weights=20_000)
    assert wide.size.weights >= 20_000 > shape.widened(weights=wide.size.weights - 400).size.weights - 400
    assert shape.widened(weights=shape.size.weights) == shape


# -- rounds and files ------------------------------------------------------------------------------------------------


def fake(monkeypatch: pytest.MonkeyPatch, best: dict[str, float]) -> list[Job]:
    """Runs that score their learning rate, but for a best one of some methods; the jobs that were run."""
    ran: list[Job] = []

    def runs(jobs: list[Job], **_: Any) -> list[Run]:
        ran.extend(jobs)
        made = []
        for each in jobs:
            is_best = each.setting.rate == best.get(each.arm)
            size = replace(BENCHMARKS[each.benchmark].shape.size, weights=30_000, multiplications=50_000)
            made.append(Run(each, (0.0, 1.0 if is_best else each.setting.rate), size, 0, 1.0))
        return made

    monkeypatch.setattr(planning, "_done", runs)
    return ran


def test_tuning_uses_other_seeds_and_equal_numbers_of_runs_and_its_best_setting_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = fake(monkeypatch, {"KNIFE": 1e-3, "none": 2e-3})
    arms = ("none", "KNIFE", "none, as many weights", "none, as many multiplications")
    comparison = Comparison(arms=arms, benchmarks=("labels",), num_seeds=3, num_tuning_seeds=2)
    outcome = compare(comparison, tmp_path, num_workers=1)
    assert len(ran) == num_runs(comparison) == 4 * (6 * 2 + 3)
    tuning, final = ([each for each in ran if (each.seed >= 1000) is is_tuning] for is_tuning in (True, False))
    assert {arm: sum(each.arm == arm for each in tuning) for arm in arms} == dict.fromkeys(arms, 12)
    assert {each.seed for each in final} == {0, 1, 2}
    assert outcome.chosen["labels", "KNIFE"].rate == 1e-3 and outcome.chosen["labels", "none"].rate == 2e-3
    assert {each.setting for each in final if each.arm == "KNIFE"} == {outcome.chosen["labels", "KNIFE"]}
    shape = BENCHMARKS["labels"].shape
    widths = {each.arm: each.hidden for each in ran}
    assert widths["none"] == widths["KNIFE"] == shape.hidden
    assert widths[arms[2]] == shape.widened(weights=30_000).hidden
    assert widths[arms[3]] == shape.widened(multiplications=50_000).hidden


def test_a_run_that_has_a_file_is_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = stored(job("KNIFE"), str(tmp_path))
    monkeypatch.setattr("neuronsurgery.comparison.running.run", None)
    assert stored(job("KNIFE"), str(tmp_path)) == first
    with pytest.raises(TypeError):
        stored(job("KNIFE", seed=1), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [job("KNIFE").file]


def test_every_part_of_a_job_is_in_the_name_of_its_file() -> None:
    one = job()
    others = [
        job(arm="KNIFE"),
        job(seed=1),
        job(benchmark="pixels"),
        replace(one, setting=Setting(0.5)),
        replace(one, scale=replace(TINY, num_steps=7)),
        replace(one, hidden=(65, 64, 64)),
    ]
    assert len({each.file for each in (one, *others)}) == 7


def test_a_run_that_is_stopped_leaves_no_half_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(json, "dumps", stop)
    with pytest.raises(KeyboardInterrupt):
        stored(job(), str(tmp_path))
    assert list(tmp_path.glob("*.json")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ("nothing",)}, "nothing was asked for; there are none, KNIFE"),
        ({"benchmarks": ()}, "nothing was asked for"),
        ({"arms": ("none, as many weights",)}, "without KNIFE"),
    ],
)
def test_what_cannot_be_compared_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Comparison(**options)


# -- intervals -------------------------------------------------------------------------------------------------------


def test_interquartile_mean_leaves_a_quarter_out_on_either_side() -> None:
    assert interquartile_mean(np.array([[9.0, 1.0], [2.0, 3.0], [4.0, -7.0], [5.0, 6.0]])) == 3.5  # 2, 3, 4, 5


def test_draws_stay_within_a_benchmark() -> None:
    apart = np.array([[0.0, 10.0]] * 5)  # without strata a draw would mix the two
    found = estimate(apart, mean)
    assert (found.value, found.low, found.high) == (5.0, 5.0, 5.0)


def test_an_interval_holds_about_as_much_as_it_says() -> None:
    generator = np.random.default_rng(1)
    scores = generator.normal(size=(25, 4))
    found = estimate(scores, mean)
    spread = scores.std(axis=0, ddof=1) / np.sqrt(25)  # of each benchmark's mean
    expected = 1.96 * np.sqrt((spread**2).sum()) / 4
    assert found.high - found.low == pytest.approx(2 * expected, rel=0.15)
    assert found.low < scores.mean() < found.high


def test_intervals_are_those_of_rliable() -> None:
    library, metrics = (importlib.import_module(f"rliable.{name}") for name in ("library", "metrics"))
    scores = np.random.default_rng(2).uniform(size=(10, 3))
    points, intervals = library.get_interval_estimates(
        {"a": scores}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=4000
    )
    found = estimate(scores, interquartile_mean, num_draws=4000)
    assert points["a"][0] == pytest.approx(found.value, abs=1e-9)
    assert intervals["a"][:, 0] == pytest.approx([found.low, found.high], abs=0.01)


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_writes_table_and_figure_and_goes_on_from_its_files(tmp_path: Path) -> None:
    options = ["--quick", "--seeds", "2", "--tuning-seeds", "1", "--workers", "1", "--out", str(tmp_path)]
    chosen = ["--benchmark", "labels", "--benchmark", "regression", "--method", "KNIFE", "--method", "none"]
    controls = ["--method", "none, as many weights"]
    first = CliRunner().invoke(cli.app, ["compare-methods", *options, *chosen])
    assert first.exit_code == 0, first.output
    assert "| KNIFE | 0." in first.output and "labels, none (0.0003, 0), seed 1000: " in first.output
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert len(files) == 2 * 2 * (1 + 2)
    again = CliRunner().invoke(cli.app, ["compare-methods", *options, *chosen, *controls])
    assert again.exit_code == 0, again.output
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert (tmp_path / "methods.md").read_text() in again.output.replace("\r", "")


def test_a_method_that_there_is_not_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["compare-methods", "--method", "hope", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "hope was asked for; there are none, KNIFE, KNIFE, retired" in result.output


def test_the_page_states_what_was_tuned_and_what_won(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch, {"KNIFE": 1e-3})
    comparison = Comparison(arms=("none", "KNIFE"), benchmarks=("pole",), num_seeds=2)
    found = page(compare(comparison, tmp_path, num_workers=1))
    assert "| none | 0.01 (0.01 to 0.01) | 0.01 (0.01 to 0.01) |" in found
    assert "Each method was tuned over 6 settings on 2 other seeds" in found
    assert "| KNIFE | 0.001, 0.003 | tasks between two actions | 0.25, 1, 4 | 0.001, 0.25 |" in found


@pytest.mark.slow
def test_workers_do_not_change_what_comes_out(tmp_path: Path) -> None:
    comparison = Comparison(
        arms=("none", "KNIFE"), benchmarks=("labels",), num_seeds=2, num_tuning_seeds=1, shrink=40, num_settings=2
    )
    one, two = (compare(comparison, tmp_path / str(number), num_workers=number) for number in (1, 2))
    assert {pair: [each.scores for each in runs] for pair, runs in one.runs.items()} == {
        pair: [each.scores for each in runs] for pair, runs in two.runs.items()
    }


@pytest.mark.parametrize("arm", ["reset", "ReDo"])
def test_no_method_acts_with_the_last_step_of_a_task(arm: str) -> None:
    shape = Shape(3, (8,), 2)
    for period in (0.25, 1.0):
        subject = Subject(shape.build(0), shape.head, num_steps=8, num_tasks=3, seed=0)
        learner = ARMS[arm].prepare(subject, Setting(1e-3, period))
        acted = []
        for number in range(24):
            before = learner.num_actions
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
            learner.learn(learner.model(x).square().mean())
            acted += [number % 8] if learner.num_actions > before else []
        learner.close()
        assert 7 not in acted
        assert acted or arm == "ReDo"


def test_an_arm_that_acts_once_leaves_its_schedule_afterwards() -> None:
    shape = Shape(3, (8,), 2)
    subject = Subject(shape.build(0), shape.head, num_steps=4, num_tasks=2, seed=0)
    learner = ARMS["plasticity injection"].prepare(subject, Setting(1e-3, 0.25))
    for _ in range(9):
        learner.learn(learner.model(torch.ones(4, 3)).square().mean())
    assert learner.num_actions == 1 and learner.schedule is None
