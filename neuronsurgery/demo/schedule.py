"""All runs of a demonstration, on several processes.

A wide arm can only start when KNIFE's run of the same seed has ended and said how many weights it stores, so
KNIFE's runs come first and the wide ones as soon as they can.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager
from queue import Empty, Queue

from neuronsurgery.demo.arms import ARMS, ArmName
from neuronsurgery.demo.digits import Experiment
from neuronsurgery.demo.networks import width_of_size
from neuronsurgery.demo.run import Job, OnTask, Run, run

__all__ = ["run_all"]

_POLL_SECONDS = 0.1


def run_all(
    experiment: Experiment,
    arms: Sequence[ArmName],
    *,
    num_seeds: int,
    num_workers: int,
    on_task: OnTask = lambda arm: None,
    on_run: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Runs every arm once per seed on `num_workers` processes (1: in this one); callbacks are called here.

    The runs come back by arm, then by seed, and do not depend on the number of workers.
    Raises `ValueError` for wide arms without KNIFE's.
    """
    if ArmName.KNIFE not in arms and any(ARMS[arm].is_wide for arm in arms):
        raise ValueError("a wide arm was asked for without KNIFE's, which sets its width: add ArmName.KNIFE")
    jobs = [Job(experiment, arm, seed, experiment.num_units) for arm in arms for seed in range(num_seeds)]
    jobs.sort(key=lambda job: job.arm is not ArmName.KNIFE)
    runs = []
    with _workers(num_workers) as (executor, ticks):
        for ended in _ended(jobs, executor, ticks, num_workers, on_task):
            on_run(ended)
            runs.append(ended)
    return sorted(runs, key=lambda run: (arms.index(run.arm), run.seed))


@contextmanager
def _workers(num_workers: int) -> Iterator[tuple[Executor, Queue[ArmName]]]:
    """Yields what runs the jobs, and the queue on which they report their tasks."""
    if num_workers == 1:
        with ThreadPoolExecutor(1) as thread:
            yield thread, Queue()
        return
    # A fork of a process that has used torch's threads can hang; a spawned process starts clean.
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(num_workers, mp_context=context) as processes:
        yield processes, manager.Queue()


def _ended(
    jobs: Sequence[Job], executor: Executor, ticks: Queue[ArmName], num_workers: int, on_task: OnTask
) -> Iterator[Run]:
    """Yields the runs as they end, and keeps every worker busy while there are jobs that can start."""
    ready = [job for job in jobs if not ARMS[job.arm].is_wide]
    held = [job for job in jobs if ARMS[job.arm].is_wide]
    running: set[Future[Run]] = set()
    while ready or running:
        while ready and len(running) < num_workers:
            running.add(executor.submit(_work, ready.pop(0), ticks))
        done, running = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        _report(ticks, on_task)
        for future in done:
            ended = future.result()
            if ended.arm is ArmName.KNIFE:
                ready = _widened(held, ended) + ready
            yield ended


def _work(job: Job, ticks: Queue[ArmName]) -> Run:
    return run(job, ticks.put)


def _report(ticks: Queue[ArmName], on_task: OnTask) -> None:
    while True:
        try:
            on_task(ticks.get_nowait())
        except Empty:
            return


def _widened(held: Sequence[Job], knife: Run) -> list[Job]:
    """Returns the wide jobs of the same seed, at the width that stores what KNIFE's network has come to."""
    num_units = width_of_size(knife.network.num_weights)
    return [Job(job.experiment, job.arm, job.seed, num_units) for job in held if job.seed == knife.seed]
