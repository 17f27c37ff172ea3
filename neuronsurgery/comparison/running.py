"""One run of the comparison: a method with one setting learns one stream of tasks. It leaves a file."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from neuronsurgery.comparison.arms import ARMS, Setting, Subject
from neuronsurgery.comparison.benchmarks import BENCHMARKS, Scale
from neuronsurgery.comparison.learning import Learner
from neuronsurgery.comparison.networks import Shape, Size, size_of
from neuronsurgery.demo.run import small_network_arithmetic

__all__ = ["Job", "Run", "run", "stored"]


@dataclass(frozen=True)
class Job:
    """What a run needs to know, and all that its result depends on."""

    benchmark: str
    arm: str
    setting: Setting
    seed: int
    scale: Scale
    hidden: tuple[int, ...]

    @property
    def file(self) -> str:
        """The name of its file, which another job does not have."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.benchmark}-{self.arm.replace(' ', '-').replace(',', '')}-{self.seed}-{digest}.json"


@dataclass(frozen=True)
class Run:
    """What came out of a run."""

    job: Job
    scores: tuple[float, ...]
    """After each task."""
    size: Size
    """At the end; multiplications are the mean over the tasks."""
    num_actions: int
    """How often the method acted."""
    seconds: float
    """Processor time."""

    @property
    def score(self) -> float:
        """The mean over the second half of the tasks."""
        half = self.scores[len(self.scores) // 2 :]
        return sum(half) / len(half)


def run(job: Job) -> Run:
    """Let a network learn; equal jobs give equal scores."""
    benchmark = BENCHMARKS[job.benchmark]
    shape = Shape(benchmark.shape.num_inputs, job.hidden, benchmark.shape.num_outputs)
    with small_network_arithmetic():
        torch.manual_seed(job.seed)
        model = shape.build(job.seed)
        subject = Subject(model, shape.head, job.scale.num_steps, job.scale.num_tasks, job.seed)
        learner = ARMS[job.arm].prepare(subject, job.setting)
        started = time.thread_time()
        scores, sizes = _learned(learner, job)
        seconds = time.thread_time() - started
        learner.close()
    size = Size(sizes[-1].weights, Size.mean(sizes).multiplications)
    return Run(job, tuple(scores), size, learner.num_actions, seconds)


def _learned(learner: Learner, job: Job) -> tuple[list[float], list[Size]]:
    scores: list[float] = []
    sizes: list[Size] = []
    for score in BENCHMARKS[job.benchmark].scores(learner, job.scale, job.seed):
        scores.append(score)
        sizes.append(size_of(learner.model))
    return scores, sizes


# -- files -----------------------------------------------------------------------------------------------------------


def stored(job: Job, folder: str) -> Run:
    """The run of a job from its file, or run now and written there, whole or not at all."""
    path = Path(folder) / job.file
    if path.is_file():
        return _of_data(json.loads(path.read_text(encoding="utf-8")))
    found = run(job)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(asdict(found), indent=1), encoding="utf-8")
    unfinished.replace(path)
    return found


def _of_data(data: dict[str, Any]) -> Run:
    job = data["job"]
    made = Job(
        **{**job, "setting": Setting(**job["setting"]), "scale": Scale(**job["scale"]), "hidden": tuple(job["hidden"])}
    )
    return Run(made, tuple(data["scores"]), Size(**data["size"]), data["num_actions"], data["seconds"])
