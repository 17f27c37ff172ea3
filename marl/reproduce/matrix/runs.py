"""Runs of matrix games in sequence: what a figure asks for, and how it is done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from marl.learner import Learner
from marl.reproduce.matrix.interventions import NOTHING, Intervention, Layers, Units
from marl.reproduce.matrix.learners import LearnerSettings, episodes_of, make_one, update
from marl.reproduce.matrix.outcomes import measure
from marl.reproduce.matrix.seeds import Seeds, norms_of
from marl.reproduce.matrix.tasks import Draws, Tasks, TaskSettings, draw, make_tasks
from marl.seeding import seed_for
from marl.surgery import Norms, Seen, unit_shares_of_norms

__all__ = ["MatrixRun"]

NUM_LAST, LAST_STRIDE = 20, 5
"""Updates at the end of a task whose gradients tell which units are stagnant, and each how-manieth of them."""


@dataclass(frozen=True)
class MatrixRun:
    """Agents that learn one-step games in sequence, with an intervention at each switch.

    >>> from marl.reproduce.matrix.tasks import TaskSettings
    >>> MatrixRun(TaskSettings("literal", num_tasks=6, num_updates=1500)).label
    'literal, qmix, none'
    """

    tasks: TaskSettings
    """What is learned."""
    learner: LearnerSettings = field(default_factory=LearnerSettings)
    """By whom."""
    intervention: Intervention = NOTHING
    """What is done at each switch."""
    num_looks: int = 1
    """How often each task is measured, evenly, the last time at its end."""

    side_by_side: ClassVar[int] = 16

    @property
    def label(self) -> str:
        """What people call it."""
        return f"{self.tasks.name}, {self.learner.algorithm}, {self.intervention.name}"

    def run(self, seeds: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        """What each seed knew after each task, and what it took."""
        return _Running(self, tuple(seeds)).outcomes()


class _Running:
    """Seeds on their way through the tasks."""

    def __init__(self, settings: MatrixRun, numbers: tuple[int, ...]) -> None:
        self.settings, self.numbers = settings, numbers
        self.tasks: Tasks = make_tasks(settings.tasks, numbers)
        obs_size = self.tasks.obs.shape[-1]
        self.seeds = Seeds([make_one(settings.learner, obs_size, number) for number in numbers])
        self.norms: list[Norms] = []
        self.games: tuple[Tensor, Tensor, Tensor] | None = None
        self.looks: list[list[dict[str, Any]]] = [[] for _ in numbers]
        self.num_units = [0] * len(numbers)

    def outcomes(self) -> list[dict[str, Any]]:
        """Let them learn."""
        started = time.process_time()
        for task in range(self.settings.tasks.num_tasks):
            self._learn(task)
        seconds = (time.process_time() - started) / len(self.numbers)
        return [
            {
                "looks": self.looks[seed],
                "units": self.num_units[seed],
                "rows": {site: len(each.unit) for site, each in self.seeds.rows[seed].items()},
                "seconds": seconds,
            }
            for seed in range(len(self.numbers))
        ]

    def _learn(self, task: int) -> None:
        tasks, when = self.settings.tasks, self.settings.intervention.when
        draws, self.norms = draw(tasks, self.numbers, task), []
        if task and tasks.does_reset_optimizer:
            self.seeds.forget_moments()
        for number in range(tasks.num_updates):
            if task and when.is_now(number):
                self._intervene(task, number)
            self._update(task, number, draws)
            is_last = (tasks.num_updates - 1 - number) % LAST_STRIDE == 0 and number >= tasks.num_updates - NUM_LAST
            if is_last or (task and when.is_seen(number + 1) and isinstance(self.settings.intervention.act, Units)):
                self.norms.append(self.seeds.norms())
            if (number + 1) * self.settings.num_looks % tasks.num_updates < self.settings.num_looks:
                self._look(task, number + 1)

    def _update(self, task: int, number: int, draws: Draws) -> None:
        contexts, payoffs, obs = draws.contexts[:, number], self.tasks.payoffs[:, task], self.tasks.obs
        seen = obs if obs.shape[1] == 1 else _taken(obs, contexts)
        epsilon = self.settings.learner.epsilon(number, self.settings.tasks.num_updates)

        def choose(agent_qs: Tensor) -> tuple[Tensor, Tensor]:
            actions = draws.actions[:, number]
            if epsilon < 1:
                greedy = agent_qs.argmax(dim=-1).expand_as(actions)
                actions = torch.where(draws.luck[:, number] < epsilon, actions, greedy)
            games = torch.arange(len(contexts)).unsqueeze(1), contexts, *actions.unbind(-1)
            reward = payoffs[games]
            self.games = (seen, actions, reward)
            return actions, reward

        update(self.seeds.together, seen, choose)
        self.seeds.count_step()

    def _intervene(self, task: int, number: int) -> None:
        intervention = self.settings.intervention
        if intervention.act is None:
            return
        if isinstance(intervention.act, Layers) and intervention.act.method == "reset_optimizer":
            self.seeds.forget_moments()
            return
        drawn = task * self.settings.tasks.num_updates + number
        act = self._on_layers if isinstance(intervention.act, Layers) else self._on_units
        self.seeds.operate(partial(act, drawn), lack=intervention.lack)
        self.norms = []

    def _on_layers(self, drawn: int, seed: int, learner: Learner) -> None:
        act = self.settings.intervention.act
        assert isinstance(act, Layers)
        act.act(learner, tuple(self.seeds.sites), seed_for(self.numbers[seed], "surgery", drawn))

    def _on_units(self, drawn: int, seed: int, learner: Learner) -> None:
        act, games = self.settings.intervention.act, self.games
        assert isinstance(act, Units) and games is not None
        own = episodes_of(*(each[seed] for each in games))
        seen = Seen(norms_of(self.norms, seed), own, self.seeds.sites)
        self.num_units[seed] += act.act(learner, seen, seed_for(self.numbers[seed], "surgery", drawn))

    def _look(self, task: int, number: int) -> None:
        found = measure(self.seeds, self.tasks, task)
        for seed, looks in enumerate(self.looks):
            entry: dict[str, Any] = {"task": task, "update": number, **found.of(seed)}
            if number == self.settings.tasks.num_updates:
                latest = self.norms[-(NUM_LAST // LAST_STRIDE) :]
                entry |= unit_shares_of_norms(self.seeds.sites, norms_of(latest, seed))
            looks.append(entry)


def _taken(values: Tensor, places: Tensor) -> Tensor:
    """Rows (R, B, O) of values (R, C, O) at places (R, B)."""
    return values.gather(1, places.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
