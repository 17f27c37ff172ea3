"""A sweep in a process of its own, for a test to kill: `python -m tests.marl.reproduce.sweep_to_kill FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from marl.reproduce.engines import LocalProcesses
from marl.reproduce.results import Job, Results
from marl.reproduce.sweep import sweep
from tests.marl.reproduce.works import Noting

NUM_JOBS = 8


def jobs(folder: Path) -> list[Job]:
    return [Job(Noting(str(folder / "notes"), 0.2, number), (0, 1)) for number in range(NUM_JOBS)]


if __name__ == "__main__":
    where = Path(sys.argv[1])
    sweep(jobs(where), Results(where / "runs"), LocalProcesses(1))
