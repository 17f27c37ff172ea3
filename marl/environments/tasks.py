"""Tasks in a row: what a learner meets one after the other, with the same networks and mixer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from marl.environments.padding import Padded, sizes
from marl.environments.protocol import Spec, TextEnvironment
from marl.environments.registry import make_environment
from marl.errors import SettingsError

__all__ = ["Task", "TaskSequence", "matrix_tasks"]


@dataclass(frozen=True)
class Task:
    """An environment by name, with its options; not built yet.

    Raises:
        SettingsError: no steps.

    >>> Task("climbing", "matrix_game", {"payoff": "climbing"}).make(batch_size=4).batch_size
    4
    """

    name: str
    """What logs and tables call it."""
    environment: str
    """A name that `make_environment` knows."""
    options: Mapping[str, object] = field(default_factory=dict)
    """The options of that environment."""
    num_steps: int | None = None
    """Steps of the environment for which it is played; none: as many as `training.num_steps`."""
    pad: Mapping[str, int] = field(default_factory=dict)
    """Sizes that it has to the networks where they are larger than its own: `agents`, `actions`, `obs`, `state` and
    `steps` (see `marl.environments.padding`)."""

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.num_steps < 1:
            raise SettingsError(f"num_steps of {self.name} is {self.num_steps}: it must be at least 1")

    def make(self, batch_size: int, *, seed: int = 0) -> TextEnvironment:
        """The environment; raises `SettingsError` as `make_environment` does."""
        environment = make_environment(self.environment, batch_size, seed=seed, **self.options)
        return Padded(environment, self.pad) if self.pad else environment

    def is_same_game(self, other: Task) -> bool:
        """Whether the other one is played by the same rules, though maybe for longer."""
        if (self.environment, self.options.keys(), self.pad) != (other.environment, other.options.keys(), other.pad):
            return False
        return all(np.array_equal(self.options[name], other.options[name]) for name in self.options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class TaskSequence:
    """Tasks in order; one may come again, under the same name.

    Raises:
        SettingsError: no tasks, tasks that one set of networks cannot play, or two games of one name.

    >>> print(matrix_tasks("knife", "qtran", "climbing").and_back())
    knife -> qtran -> climbing -> knife
    """

    tasks: tuple[Task, ...]
    """In the order in which they are learned."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise SettingsError("a sequence needs at least one task; none was given")
        for task in self.tasks[1:]:
            if not task.is_same_game(self.games[task.name]):
                raise SettingsError(f"two tasks are called {task.name!r}, and are different games: name them apart")
        self._require_alike()

    def _require_alike(self) -> None:
        found = {name: _network_sizes(spec) for name, spec in self.specs.items()}
        first = self.tasks[0].name
        for name, each in found.items():
            if each != found[first]:
                largest = {size: max(other[size] for other in found.values()) for size in each}
                both = f"{first} has {found[first]}, {name} has {each}"
                raise SettingsError(
                    f"tasks in a row have to look alike to the networks; {both}: pad each task to {largest}, or choose "
                    "variants of one size"
                )

    @cached_property
    def games(self) -> dict[str, Task]:
        """Every game once, by its name, in the order in which they are first played."""
        games: dict[str, Task] = {}
        for task in self.tasks:
            games.setdefault(task.name, task)
        return games

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """The sizes of each game."""
        return {name: task.make(1).spec for name, task in self.games.items()}

    @property
    def spec(self) -> Spec:
        """The sizes that all tasks share; the episode limit is the first one's."""
        return self.specs[self.tasks[0].name]

    def and_back(self) -> TaskSequence:
        """The same and then the first task again, to see what has been lost."""
        return TaskSequence((*self.tasks, self.tasks[0]))

    def __str__(self) -> str:
        return " -> ".join(task.name for task in self.tasks)


def _network_sizes(spec: Spec) -> dict[str, int]:
    """What networks and mixers are built with: all sizes but the number of steps."""
    return {name: size for name, size in sizes(spec).items() if name != "steps"}


def matrix_tasks(*payoffs: str, **options: object) -> TaskSequence:
    """One-step games by the names of their payoffs, all shown in the same way (`obs` and `state` of `matrix_game`)."""
    return TaskSequence(tuple(Task(name, "matrix_game", {"payoff": name, **options}) for name in payoffs))
