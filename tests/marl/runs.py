"""Runs that take a second, and whether two of them are the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from marl.configuring import Layer, configure
from marl.records import Record
from marl.run import Run
from marl.run_settings import RunSettings
from marl.training import Silent

MATRIX_GAMES: Layer = {
    "algorithm": "qmix",
    "tasks": "matrix_game:knife,qtran",
    "learning": {
        "agent": {"hidden_size": 8},
        "mixer": {"embed_size": 4, "hypernet_size": 8},
        "replay": {"batch_size": 8, "capacity": 24},
        "targets": {"every": 20},
    },
    "training": {
        "num_steps": 40,
        "num_parallel": 8,
        "evaluate_every": 24,
        "num_evaluation_episodes": 4,
        "save_every": 24,
    },
}
PREDATOR_PREY: Layer = {
    "tasks": [
        {
            "name": "predator_prey",
            "environment": "predator_prey_tiny",
            "options": {"height": 3, "width": 3, "num_agents": 2, "num_stags": 1, "episode_limit": 5},
        }
    ],
    "training": {"num_steps": 160, "num_parallel": 4, "evaluate_every": 40, "save_every": 60},
}
KNIFE: Layer = {
    "surgery": {"method": "knife", "criterion": "lowest", "every": 22, "after_task_change": 0, "cooldown": 3},
}


def small(*layers: Layer) -> RunSettings:
    """Two matrix games in a row, unless the layers say otherwise."""
    return configure(MATRIX_GAMES, *layers)


def rounds(number: int) -> Callable[[], bool]:
    """Stops training after so many rounds."""
    asked = iter(range(number + 1))
    return lambda: next(asked) == number


class Recorder(Silent):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.num_operations = 0

    def on_record(self, run: Run, record: Record) -> None:
        self.records.append(record)

    def on_operation(self, run: Run, report: object) -> None:
        self.num_operations += 1


def assert_same_run(one: Run, other: Run) -> None:
    """Weights, optimizer, operations, progress and replay are equal bit for bit."""
    assert differences(one.state_dict(), other.state_dict()) == []
    assert differences(one.replay.state_dict(), other.replay.state_dict()) == []


def differences(one: object, other: object, path: str = "") -> list[str]:
    """Paths at which two nested values differ."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        return [] if same else [path]
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if list(one) != list(other):
            return [path]
        return [found for key in one for found in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [path]
        return [found for n, each in enumerate(one) for found in differences(each, other[n], f"{path}/{n}")]
    one, other = (each.item() if isinstance(each, torch.Tensor) and not each.ndim else each for each in (one, other))
    return [] if type(one) is type(other) and one == other else [path]  # counts may be loaded as plain numbers
