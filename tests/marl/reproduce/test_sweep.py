"""Sweeps: every run once, whatever is killed or fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from marl.errors import SettingsError
from marl.reproduce.engines import Engine, InProcess, LocalProcesses, make_engine
from marl.reproduce.results import Job, Provenance, Results, jobs_of
from marl.reproduce.sweep import Progress, sweep
from tests.marl.reproduce.sweep_to_kill import NUM_JOBS, jobs
from tests.marl.reproduce.works import Dying, Failing, Noting, noted

ROOT = Path(__file__).parents[3]


def test_a_second_sweep_runs_nothing(tmp_path: Path) -> None:
    notes = str(tmp_path / "notes")
    some = jobs_of([Noting(notes, number=number) for number in range(3)], range(4), side_by_side=3)
    assert sweep(some, Results(tmp_path), InProcess()).num_new == 12
    assert sweep(some, Results(tmp_path), InProcess()).num_new == 0
    assert len(noted(notes)) == 12


def test_only_seeds_without_a_file_are_run(tmp_path: Path) -> None:
    work, results = Noting(str(tmp_path / "notes")), Results(tmp_path)
    sweep([Job(work, (1,))], results, InProcess())
    sweep([Job(work, (0, 1, 2))], results, InProcess())
    assert noted(work.notes) == ["0/1", "0/0", "0/2"]
    assert [result.outcome["doubled"] for result in results.of(Job(work, (0, 1, 2)))] == [0, 2, 4]


def test_a_file_says_what_made_it(tmp_path: Path) -> None:
    work, results = Noting(str(tmp_path / "notes"), number=7), Results(tmp_path)
    sweep([Job(work, (3,))], results, InProcess())
    data = json.loads(results.path(work, 3).read_text())
    assert data["settings"] == {"kind": "Noting", "notes": work.notes, "seconds": 0.0, "number": 7}
    assert data["seed"] == 3
    assert data["provenance"] == {"version": Provenance.here().version, "commit": Provenance.here().commit}
    assert len(data["provenance"]["commit"].rstrip("+")) in (40, len("unknown"))


def test_works_that_differ_in_a_setting_have_files_of_their_own(tmp_path: Path) -> None:
    results = Results(tmp_path)
    works = [Noting("a"), Noting("b"), Noting("a", 1.0), Failing("a"), Dying("a")]
    assert len({results.path(work, seed) for work in works for seed in (0, 1)}) == 10


def test_a_file_of_another_run_is_not_taken_for_the_result(tmp_path: Path) -> None:
    one, other, results = Noting("a"), Noting(str(tmp_path / "notes")), Results(tmp_path)
    results.path(one, 0).write_text(json.dumps({"settings": {}, "seed": 0, "provenance": {}, "outcome": {}}))
    with pytest.raises(SettingsError, match="a file that is none: delete"):
        results.of(Job(one, (0,)))
    sweep([Job(other, (0,))], results, InProcess())
    results.path(one, 0).write_bytes(results.path(other, 0).read_bytes())
    with pytest.raises(SettingsError, match="found another run: delete"):
        results.of(Job(one, (0,)))


@pytest.fixture(params=["in process", "processes"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return InProcess() if request.param == "in process" else LocalProcesses(1)


def test_a_failed_run_is_tried_again_after_the_others(tmp_path: Path) -> None:
    notes = str(tmp_path / "notes")
    some = [Job(Failing(notes, number=9), (0,)), Job(Noting(notes, number=1), (0,))]
    swept = sweep(some, Results(tmp_path), InProcess())
    assert swept.failed == ()
    assert noted(notes) == ["failing", "1/0", "failing", "9/0"]


def test_a_run_that_always_fails_is_reported_and_the_rest_goes_on(tmp_path: Path, engine: Engine) -> None:
    notes = str(tmp_path / "notes")
    some = [Job(Failing(notes, number=9, num_times=9), (0, 1)), Job(Noting(notes, number=1), (0,))]
    seen: list[Progress] = []
    swept = sweep(some, Results(tmp_path), engine, num_retries=2, on_progress=seen.append)
    assert swept.num_new == 1
    assert [(ended.job.seeds, ended.error) for ended in swept.failed] == [
        ((0, 1), "RuntimeError: failing on purpose: 9")
    ]
    assert noted(notes).count("failing") == 3
    assert (seen[0].num_runs, seen[0].num_done) == (3, 0)
    assert (seen[-1].num_done, seen[-1].num_failed) == (1, 2)


def test_a_worker_that_dies_costs_only_its_own_job_a_try(tmp_path: Path) -> None:
    notes = str(tmp_path / "notes")
    some = [Job(Dying(notes, number=9), (0,)), *(Job(Noting(notes, number=n), (0,)) for n in range(2))]
    swept = sweep(some, Results(tmp_path), LocalProcesses(1))
    assert swept.failed == ()
    assert Counter(noted(notes)) == Counter(["dying", "0/0", "1/0", "9/0"])


def test_a_dead_worker_is_named_in_the_report(tmp_path: Path) -> None:
    swept = sweep([Job(Dying(str(tmp_path / "notes")), (0,))], Results(tmp_path), LocalProcesses(1), num_retries=0)
    assert [ended.error for ended in swept.failed] == ["its process died"]


def test_a_killed_sweep_goes_on_and_does_no_run_twice(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.marl.reproduce.sweep_to_kill", str(tmp_path)]
    killed = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "runs").glob("*.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    time.sleep(0.5)  # longer than a job: a worker that outlived its parent would have written another file
    done = sorted(path.name for path in (tmp_path / "runs").glob("*.json"))
    assert 4 <= len(done) < 2 * NUM_JOBS
    swept = sweep(jobs(tmp_path), Results(tmp_path / "runs"), InProcess())
    assert swept.num_new == 2 * NUM_JOBS - len(done)
    ran = Counter(noted(str(tmp_path / "notes")))
    assert len(ran) == 2 * NUM_JOBS
    # what was in flight may have been noted and not written: one job, on one worker
    assert sum(ran.values()) - 2 * NUM_JOBS <= 2


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(SettingsError, match="no engine 'slurm'; choose one of 'local', 'ray'"):
        make_engine("slurm", 1)
    with pytest.raises(SettingsError, match="asked for 0 workers"):
        make_engine("local", 0)
