"""Whole runs of `marl`: what a figure asks for, and what is kept of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from marl.all_tasks import TaskReturn
from marl.configuring import Layer, assignments, configure, to_dict
from marl.records import Record
from marl.run import Run, make_run
from marl.run_settings import RunSettings
from marl.settings import Algorithm
from marl.training import Silent, train

__all__ = ["TrainingRun"]

GROUPS = ("agent/", "mixer/", "surgery/", "test/")
"""Columns of records that are kept."""


@dataclass(frozen=True)
class TrainingRun:
    """A run as `python -m marl train` would do it with the same assignments and seed.

    >>> run = TrainingRun("one game", ("tasks=matrix_game:climbing", "training.num_steps=64"))
    >>> run.label, run.settings(seed=3).seed
    ('one game, qmix, none', 3)
    """

    games: str
    """What is played, in a few words."""
    assigned: tuple[str, ...]
    """Settings of games and learner, as `--set` takes them."""
    intervention: tuple[str, ...] = ()
    """Settings of what is done about lost plasticity."""
    algorithm: Algorithm = "qmix"
    """Who learns."""
    num_looks: int = 5
    """How often each task is evaluated, evenly, the last time at its end."""

    side_by_side: ClassVar[int] = 1
    """Seeds are trained one after the other."""

    @property
    def label(self) -> str:
        """What people call it."""
        return f"{self.games}, {self.algorithm}, {self._done or 'none'}"

    @property
    def _done(self) -> str:
        pairs = (each.partition("=") for each in self.intervention)
        named = ("surgery.method", "surgery.criterion", "surgery.layers", "surgery.retire", "switch.reset_optimizer")
        return " ".join(value if value != "true" else "optimizer reset" for name, _, value in pairs if name in named)

    def settings(self, seed: int) -> RunSettings:
        """All settings of the run of a seed.

        Raises:
            SettingsError: an assignment that sets nothing, or no run that is as they say.
        """
        base: Layer = {"algorithm": self.algorithm, "seed": seed}
        asked = configure(base, *assignments([*self.assigned, *self.intervention]))
        every = max(1, min(map(asked.num_steps_of, range(len(asked.tasks.tasks)))) // self.num_looks)
        often: Layer = {"training": {"evaluate_every": every}}
        return configure(base, *assignments([*self.assigned, *self.intervention]), often)

    def run(self, seeds: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        """How well each seed played and what became of its units, over time."""
        return [self._outcome(seed) for seed in seeds]

    def _outcome(self, seed: int) -> dict[str, Any]:
        start = time.process_time()
        settings = self.settings(seed)
        run, kept = make_run(settings), _Kept()
        train(run, kept)
        run.close()
        lengths = [settings.num_steps_of(place) for place in range(len(settings.tasks.tasks))]
        return {
            "looks": list(_looks(kept.records, lengths, self.num_looks)),
            "tasks": [vars(each) for each in kept.returns],
            "rows": {"all": int(kept.records[-1].get("surgery/frozen_rows", 0))},
            "seconds": time.process_time() - start,
            "updates": run.progress.num_updates,
            "settings": to_dict(settings),
        }


@dataclass
class _Kept(Silent):
    """What was told while a run went on."""

    records: list[Record] = field(default_factory=list)
    returns: list[TaskReturn] = field(default_factory=list)

    def on_record(self, run: Run, record: Record) -> None:
        self.records.append({**record, "update": run.progress.num_task_steps})

    def on_returns(self, run: Run, returns: Sequence[TaskReturn]) -> None:
        self.returns += returns


def _looks(records: Sequence[Record], lengths: Sequence[int], num_looks: int) -> Iterator[dict[str, Any]]:
    """As many looks at each task for every seed: the record that is nearest in time to when it should have been.

    Episodes are not cut short, so that evaluations come a little late, and not equally so for all seeds.
    """
    for place, length in enumerate(lengths):
        own = [record for record in records if record["place"] == place]
        for number in range(1, num_looks + 1):
            due = round(length * number / num_looks)
            record = min(own, key=lambda each: abs(float(each["update"]) - due))
            yield {"task": place, "update": due, **_plain(record)}


def _plain(record: Record) -> dict[str, float]:
    kept = {name: float(value) for name, value in record.items() if name.startswith(GROUPS)}
    return {name.removeprefix("test/"): value for name, value in kept.items()}
