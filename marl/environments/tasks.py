"""Tasks in a row: what a learner meets one after the other, with the same networks and mixer.

How long each lasts is no property of the tasks; training decides it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from marl.environments.protocol import Spec, TextEnvironment
from marl.environments.registry import make_environment
from marl.errors import SettingsError


@dataclass(frozen=True)
class Task:
    """An environment by name, with its options; not built yet.

    >>> Task("climbing", "matrix_game", {"payoff": "climbing"}).make(batch_size=4).batch_size
    4
    """

    name: str
    """What logs and tables call it."""
    environment: str
    """A name that `make_environment` knows."""
    options: Mapping[str, object] = field(default_factory=dict)
    """The options of that environment."""

    def make(self, batch_size: int, *, seed: int = 0) -> TextEnvironment:
        """The environment; raises `SettingsError` as `make_environment` does."""
        return make_environment(self.environment, batch_size, seed=seed, **self.options)


@dataclass(frozen=True)
class TaskSequence:
    """Tasks in order; one may come again. Raises `SettingsError` for tasks that one set of networks cannot play.

    >>> print(matrix_tasks("knife", "qtran", "climbing").and_back())
    knife -> qtran -> climbing -> knife
    """

    tasks: tuple[Task, ...]
    """In the order in which they are learned."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise SettingsError("a sequence needs at least one task; none was given")
        for task in self.tasks[1:]:
            first, found = self.spec, task.make(1).spec
            if sizes(first) != sizes(found):
                both = f"{self.tasks[0].name} has {sizes(first)}, {task.name} has {sizes(found)}"
                raise SettingsError(f"tasks in a row have to look alike to the networks; {both}")

    @property
    def spec(self) -> Spec:
        """The sizes that all tasks share; the episode limit is the first one's."""
        return self.tasks[0].make(1).spec

    def and_back(self) -> TaskSequence:
        """The same and then the first task again, to see what has been lost."""
        return TaskSequence((*self.tasks, self.tasks[0]))

    def __str__(self) -> str:
        return " -> ".join(task.name for task in self.tasks)


def sizes(spec: Spec) -> dict[str, int]:
    """What networks and mixers are built with.

    >>> sizes(Spec(num_agents=2, num_actions=3, obs_size=5, state_size=4, episode_limit=1))
    {'agents': 2, 'actions': 3, 'obs': 5, 'state': 4}
    """
    return {
        "agents": spec.num_agents,
        "actions": spec.num_actions,
        "obs": spec.obs_size,
        "state": spec.state_size,
    }


def matrix_tasks(*payoffs: str, **options: object) -> TaskSequence:
    """One-step games by the names of their payoffs, all shown in the same way (`obs` and `state` of `matrix_game`)."""
    return TaskSequence(tuple(Task(name, "matrix_game", {"payoff": name, **options}) for name in payoffs))
