"""Training: the algorithm as the papers write it down. What it works with is a `marl.run.Run`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from marl.all_tasks import TaskReturn, is_evaluated, take_returns
from marl.generated import all_shares
from marl.records import Record, take_record
from marl.rollout import collect
from marl.run import Run

__all__ = ["Listener", "Silent", "train"]


class Listener(Protocol):
    """Whoever wants to know how a run goes: logs, progress bars, checkpoints."""

    def on_round(self, run: Run) -> None:
        """Some episodes were played and learned from."""

    def on_operation(self, run: Run, report: object) -> None:
        """Units were operated on; the report is one of `neuronsurgery`."""

    def on_record(self, run: Run, record: Record) -> None:
        """The run was evaluated."""

    def on_returns(self, run: Run, returns: Sequence[TaskReturn]) -> None:
        """The run was evaluated on all of its tasks."""

    def on_save(self, run: Run) -> None:
        """It is time to save the run."""


class Silent:
    """A listener who does nothing, for others to be derived from."""

    def on_round(self, run: Run) -> None: ...

    def on_operation(self, run: Run, report: object) -> None: ...

    def on_record(self, run: Run, record: Record) -> None: ...

    def on_returns(self, run: Run, returns: Sequence[TaskReturn]) -> None: ...

    def on_save(self, run: Run) -> None: ...


def never() -> bool:
    """No."""
    return False


def train(run: Run, *listeners: Listener, is_stopped: Callable[[], bool] = never) -> None:
    """Play and learn until the run is over; one that was loaded goes on where it was saved.

    `is_stopped` is asked before each round; if it says so, training ends there, where the run can be saved.

    >>> from dataclasses import replace
    >>> from marl.run import make_run
    >>> from marl.run_settings import TrainingSettings, run_settings
    >>> settings = run_settings("vdn", "matrix_game", payoff="climbing")
    >>> run = make_run(replace(settings, training=TrainingSettings(num_steps=320)))
    >>> train(run)
    >>> run.progress.num_episodes, run.progress.num_updates
    (320, 320)
    """
    while not (run.is_over or is_stopped()):
        if run.is_task_over:
            _tell_of_operation(run, run.begin_next_task(), listeners)
        if run.progress.round == 0:
            _tell_of_returns(run, listeners)
        episodes = collect(run.environment, run.agent, epsilon=run.epsilon, seed=run.games_seed)
        num_updates_due = run.add(episodes)
        if num_updates_due and not run.at_start:
            run.at_start = all_shares(run.learner, run.recent_episodes())
        for _ in range(num_updates_due):
            _tell_of_operation(run, update(run), listeners)
        for listener in listeners:
            listener.on_round(run)
        if run.is_time_to("evaluate") or run.is_task_over:
            record = take_record(run)
            for listener in listeners:
                listener.on_record(run, record)
        if run.is_time_to("all_tasks") or run.is_task_over:
            _tell_of_returns(run, listeners)
        if run.is_time_to("save") or run.is_over:
            for listener in listeners:
                listener.on_save(run)


def update(run: Run) -> object | None:
    """One step of learning, and an operation if it is time for one, whose report is returned."""
    batch = run.replay.sample(run.settings.learning.replay.batch_size)
    run.operations.see(batch)
    run.averages.add_update(run.learner.update(batch))
    report = run.operations.step()
    run.learner.update_targets(run.progress.num_episodes)
    run.progress.num_updates += 1
    return report


def _tell_of_returns(run: Run, listeners: tuple[Listener, ...]) -> None:
    if is_evaluated(run):
        returns = take_returns(run)
        for listener in listeners:
            listener.on_returns(run, returns)


def _tell_of_operation(run: Run, report: object | None, listeners: tuple[Listener, ...]) -> None:
    if report is not None:
        for listener in listeners:
            listener.on_operation(run, report)
