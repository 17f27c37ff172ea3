"""A sweep on a local Ray cluster of several workers, one of which is killed in the middle."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from marl.errors import MissingExtraError, SettingsError
from marl.reproduce.engines import Ray, _join_or_start
from marl.reproduce.results import Job, Results
from marl.reproduce.sweep import sweep
from tests.marl.reproduce.works import Failing, Pausing, noted

NUM_JOBS = 8


@pytest.fixture
def ray() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    # workers import the tests' works from here
    runtime = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[3])}}
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False, runtime_env=runtime)
    yield ray
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own, of its processes and sockets
def test_a_sweep_outlives_a_killed_worker_of_ray(ray: Any, tmp_path: Path) -> None:
    notes = str(tmp_path / "notes")
    some = [Job(Pausing(notes, 1.0, number), (0, 1)) for number in range(NUM_JOBS)]
    some.append(Job(Failing(notes, number=99, num_times=9), (0,)))
    killed: list[int] = []

    def kill_one() -> None:
        while not (pids := [line for line in noted(notes) if line.startswith("pid")]):
            time.sleep(0.05)
        killed.append(int(pids[0].removeprefix("pid")))
        os.kill(killed[0], signal.SIGKILL)

    threading.Thread(target=kill_one, daemon=True).start()
    swept = sweep(some, Results(tmp_path / "runs"), Ray(3), num_retries=1)
    assert len(killed) == 1
    assert swept.num_new == 2 * NUM_JOBS
    assert [ended.job.label for ended in swept.failed] == ["noting 99, seed 0"]
    assert "failing on purpose" in str(swept.failed[0].error)
    begun = Counter(line for line in noted(notes) if line.startswith("begun"))
    assert sum(begun.values()) == NUM_JOBS + 1  # what was killed began again, nothing else
    assert len({line for line in noted(notes) if line.startswith("pid")}) >= 3
    assert sweep(some[:NUM_JOBS], Results(tmp_path / "runs"), Ray(3)).num_new == 0


def test_without_ray_the_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"neuronsurgery\[ray\]"):
        list(Ray(1).run([], lambda job: None))


def test_a_cluster_that_is_named_and_cannot_be_joined_is_no_reason_to_start_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[dict[str, Any]] = []

    class Lonely:
        @staticmethod
        def init(**options: Any) -> None:
            begun.append(options)
            if "address" in options:
                raise ConnectionError("nobody answers")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(SettingsError, match=r"10\.0\.0\.1:6379, which cannot be joined .*nobody answers"):
        _join_or_start(Lonely, 3)
    monkeypatch.delenv("RAY_ADDRESS")
    _join_or_start(Lonely, 3)
    assert [each.get("num_cpus") for each in begun] == [None, None, 3]
