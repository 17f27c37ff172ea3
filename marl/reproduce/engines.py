"""Engines: where jobs are run. Each yields a job as it ends, with what went wrong if anything did.

Nothing is scheduled here: a pool of processes or Ray hands out the jobs. A worker that dies takes with it the jobs
that it had, and no other.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_end
from typing import Any, Protocol

from marl.errors import MissingExtraError, SettingsError
from marl.reproduce.results import Job

__all__ = ["ENGINES", "Ended", "Engine", "InProcess", "LocalProcesses", "Ray", "make_engine"]

Do = Callable[[Job], None]
"""Runs a job and leaves its files."""

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Ended:
    """A job that is done, or failed."""

    job: Job
    """Which one."""
    error: str | None = None
    """What went wrong; none if nothing did."""


class Engine(Protocol):
    """Runs jobs somewhere."""

    def run(self, jobs: Sequence[Job], do: Do) -> Iterator[Ended]:
        """Each job as it ends, in any order."""


def make_engine(name: str, num_workers: int) -> Engine:
    """The engine of that name.

    Raises:
        SettingsError: there is none, or it is to have no workers.
        MissingExtraError: it needs a package that is not installed.

    >>> make_engine("local", 2)
    LocalProcesses(num_workers=2)
    """
    if name not in ENGINES:
        raise SettingsError(f"there is no engine {name!r}; choose one of {', '.join(map(repr, ENGINES))}")
    if num_workers < 1:
        raise SettingsError(f"asked for {num_workers} workers: at least 1 is needed")
    return ENGINES[name](num_workers)


@dataclass(frozen=True)
class InProcess:
    """Jobs one after the other, in this process."""

    def run(self, jobs: Sequence[Job], do: Do) -> Iterator[Ended]:
        for job in jobs:
            yield _attempted(job, do)


@dataclass(frozen=True)
class LocalProcesses:
    """Processes on this machine, with a thread each."""

    num_workers: int
    """How many."""

    def run(self, jobs: Sequence[Job], do: Do) -> Iterator[Ended]:
        waiting = deque(jobs)
        while waiting:  # again with new processes if one of them died
            # A fork of a process that has used torch's threads can hang; a spawned process starts clean.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(self.num_workers, mp_context=context, initializer=_begin_worker) as pool:
                yield from self._until_broken(pool, waiting, do)

    def _until_broken(self, pool: ProcessPoolExecutor, waiting: deque[Job], do: Do) -> Iterator[Ended]:
        running: dict[Future[Ended], Job] = {}
        is_broken = False
        while running or (waiting and not is_broken):
            # no more at a time than there are workers, so that a death costs no more
            while waiting and not is_broken and len(running) < self.num_workers:
                try:
                    running[pool.submit(_attempted, waiting[0], do)] = waiting[0]
                    waiting.popleft()
                except BrokenProcessPool:
                    is_broken = True
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield _ended(future, running.pop(future))


@dataclass(frozen=True)
class Ray:
    """Tasks on the Ray cluster that is running, or else on one of `num_workers` workers on this machine.

    Tasks of a node that dies are run again by Ray itself. All nodes have to see the folder of results.
    """

    num_workers: int
    """Of the cluster that is started where none is running."""
    max_retries: int = 3
    """How often Ray runs a task again whose worker died."""

    def run(self, jobs: Sequence[Job], do: Do) -> Iterator[Ended]:
        ray = _imported_ray()
        if not ray.is_initialized():
            _join_or_start(ray, self.num_workers)
        environment = {"env_vars": dict.fromkeys(THREADS, "1")}
        task = ray.remote(num_cpus=1, max_retries=self.max_retries, runtime_env=environment)(_attempted_alone)
        running = {task.remote(job, do): job for job in jobs}
        while running:
            (reference, *_), _ = ray.wait(list(running), num_returns=1)
            job = running.pop(reference)
            try:
                yield ray.get(reference)
            except ray.exceptions.RayError as error:
                yield Ended(job, _described(error))


ENGINES: dict[str, Callable[[int], Engine]] = {"local": LocalProcesses, "ray": Ray}


def _attempted(job: Job, do: Do) -> Ended:
    try:
        do(job)
    except Exception as error:  # whatever it is, the other jobs go on and the report names it
        return Ended(job, _described(error))
    return Ended(job)


def _attempted_alone(job: Job, do: Do) -> Ended:
    """As `_attempted`, where nobody has set up the process."""
    _use_one_thread()
    return _attempted(job, do)


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# -- processes on this machine


def _begin_worker() -> None:
    _use_one_thread()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _use_one_thread() -> None:
    """As torch will find it, or at once where it is imported already."""
    os.environ.update(dict.fromkeys(THREADS, "1"))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _end_with_parent() -> None:
    """A worker whose parent was killed would otherwise finish its job, and then wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_end([parent.sentinel])
        os._exit(1)


def _ended(future: Future[Ended], job: Job) -> Ended:
    error = future.exception()
    if error is None:
        return future.result()
    what = "its process died" if isinstance(error, BrokenProcessPool) else _described(error)
    return Ended(job, what)


# -- Ray


def _imported_ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError:
        raise MissingExtraError.of("ray", extra="ray", needed_by="the engine of that name") from None
    return ray


def _join_or_start(ray: Any, num_workers: int) -> None:
    """Join the cluster that RAY_ADDRESS names, or one on this machine; only where none is named start one.

    Raises:
        SettingsError: the cluster that is named cannot be joined.
    """
    named = os.environ.get("RAY_ADDRESS")
    try:
        ray.init(address="auto", log_to_driver=False)
    except ConnectionError as error:
        if named:
            raise SettingsError(
                f"RAY_ADDRESS names the Ray cluster {named}, which cannot be joined ({_described(error)}): start it, "
                "or give this process the RAY_AUTH_MODE and the token that it was started with"
            ) from error
        ray.init(num_cpus=num_workers, include_dashboard=False, log_to_driver=False)
