"""Evaluation on all tasks of a sequence: what has been kept of earlier ones, and what helps with later ones.

Each task is played greedily on games of its own, which are the same every time, so that what changes between two times
is what was learned. Nothing of the training is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from marl.environments.protocol import close
from marl.environments.tasks import Task
from marl.evaluation import Evaluation, evaluate
from marl.seeding import seed_for

if TYPE_CHECKING:
    from marl.run import Run

__all__ = ["TaskReturn", "is_evaluated", "take_returns"]

BATCH_SIZE = 100
"""Episodes that are played side by side, at most."""


@dataclass(frozen=True)
class TaskReturn:
    """How well a run plays one task at one time."""

    steps: int
    """Steps of the environment that the run had taken."""
    num_finished: int
    """Tasks of the sequence that had come to their end by then."""
    task: str
    """The name of the task that is played, whichever is learned at that time."""
    mean_return: float
    """Over all episodes."""
    standard_error: float
    """Of the mean return; not a number for a single episode."""
    win_rate: float | None = None
    """The share of episodes that were won; none where there is nothing to be won."""


def is_evaluated(run: Run) -> bool:
    """Whether a run is evaluated on all of its tasks: if there are several, unless its settings say never."""
    return len(run.settings.tasks.games) > 1 and run.settings.all_tasks.num_episodes > 0


def take_returns(run: Run) -> list[TaskReturn]:
    """How well a run plays each task now; those that are still to come only if its settings say so.

    >>> from marl.configuring import configure
    >>> from marl.run import make_run
    >>> run = make_run(configure({"algorithm": "vdn", "tasks": "matrix_game:knife,qtran"}))
    >>> [(each.task, each.num_finished) for each in take_returns(run)]
    [('knife', 0), ('qtran', 0)]
    """
    progress, num_episodes = run.progress, run.settings.all_tasks.num_episodes
    found = []
    for number, task in enumerate(run.settings.tasks.games.values()):
        if task.name in _asked_for(run):
            seed = seed_for(run.settings.seed, "all_tasks", number)
            result = _evaluation(run, task, seed=seed, num_episodes=num_episodes)
            values = result.mean_return, result.standard_error, result.win_rate
            found.append(TaskReturn(progress.num_steps, progress.task + run.is_task_over, task.name, *values))
    return found


def _asked_for(run: Run) -> set[str]:
    tasks = run.settings.tasks.tasks
    return {task.name for task in (tasks if run.settings.all_tasks.unseen else tasks[: run.progress.task + 1])}


def _evaluation(run: Run, task: Task, *, seed: int, num_episodes: int) -> Evaluation:
    environment = task.make(min(num_episodes, BATCH_SIZE))
    try:
        return evaluate(environment, run.agent, seed=seed, num_episodes=num_episodes)
    finally:
        close(environment)
