"""Records: the row of numbers that a run leaves behind at each evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from tensordict import TensorDict

from marl.diagnostics import diagnose
from marl.evaluation import evaluate, returns_of
from marl.generated import all_shares
from marl.learner import Update
from marl.seeding import seed_for

if TYPE_CHECKING:
    from marl.run import Run

__all__ = ["Averages", "Record", "take_record"]

Record = dict[str, float | int | str]
"""Name of a column -> its value; names have the form `group/name`."""


@dataclass
class Averages:
    """Means over what happened since the last record.

    >>> averages = Averages()
    >>> averages.add("train/return", 3.0, weight=2)
    >>> averages.add("train/return", 0.0)
    >>> averages.take(), averages.take()
    ({'train/return': 2.0}, {})
    """

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Name -> sum of weighted values, sum of weights."""

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        """Count a value."""
        total, weights = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (total + weight * value, weights + weight)

    def add_episodes(self, episodes: TensorDict) -> None:
        """Count what episodes of training were worth, and how long they were."""
        self.add("train/return", float(returns_of(episodes).mean()), len(episodes))
        self.add("train/length", float(episodes["mask"].sum(dim=-1).float().mean()), len(episodes))
        if "won" in episodes:
            self.add("train/win_rate", float(episodes["won"].float().mean()), len(episodes))

    def add_update(self, update: Update) -> None:
        """Count what an update did."""
        for each in fields(update):
            self.add(f"learner/{each.name}", float(getattr(update, each.name)))

    def take(self) -> dict[str, float]:
        """The means, which begin anew."""
        means = {name: total / weight for name, (total, weight) in self.sums.items()}
        self.sums = {}
        return means


def take_record(run: Run) -> Record:
    """Evaluate a run: returns of greedy episodes, what was averaged since the last time, and the state of its units."""
    progress = run.progress
    where: Record = {
        "steps": progress.num_steps,
        "episodes": progress.num_episodes,
        "updates": progress.num_updates,
        "task": run.task.name,
        "place": progress.task,
        "epsilon": run.epsilon,
    }
    with run.operations.unobserved():
        seen = {**_test(run), **_diagnosed(run), **_units(run)}
    return {**where, **seen, **run.averages.take(), **run.operations.counts()}


def _test(run: Run) -> Record:
    result = evaluate(
        run.evaluation_environment,
        run.agent,
        seed=seed_for(run.settings.seed, "evaluation", run.progress.round),
        num_episodes=run.settings.training.num_evaluation_episodes,
    )
    length = float(result.lengths.float().mean())
    won: Record = {} if result.win_rate is None else {"test/win_rate": result.win_rate}
    return {
        "test/return": result.mean_return,
        "test/standard_error": result.standard_error,
        "test/length": length,
        **won,
    }


def _diagnosed(run: Run) -> Record:
    found = diagnose(run.learner, run.recent_episodes())
    values = {each.name: getattr(found, each.name) for each in fields(found)}
    return {f"mixer/{name}": float(value) for name, value in values.items() if value is not None}


def _units(run: Run) -> Record:
    """Shares of units, and how much they have grown since before the first update."""
    now = all_shares(run.learner, run.recent_episodes())
    grown = {f"{name}_grown": share - run.at_start[name] for name, share in now.items() if name in run.at_start}
    return {**now, **grown}
