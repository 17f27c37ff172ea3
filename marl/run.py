"""A run: everything that training is made of, how far it has come, and its state as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from tensordict import TensorDict

from marl.agents import Agent
from marl.environments.protocol import Environment, close
from marl.environments.tasks import Task
from marl.learner import Learner, make_learner
from marl.networks import make_networks
from marl.records import Averages
from marl.replay import EpisodeReplay
from marl.rollout import whole
from marl.run_settings import RunSettings
from marl.seeding import seed_for
from marl.surgery import Operations, load_learner, reset_optimizer

__all__ = ["Progress", "Run", "make_run"]

Event = Literal["evaluate", "save", "all_tasks"]


def make_run(settings: RunSettings) -> Run:
    """A run at its beginning.

    Raises:
        SettingsError: settings that make no game or no networks, or surgery that finds nothing to operate on.

    >>> from marl.run_settings import run_settings
    >>> make_run(run_settings("qmix", "predator_prey_tiny")).epsilon
    1.0
    """
    learning, spec = settings.learning, settings.tasks.spec
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(settings.seed, "weights"))
        learner = make_learner(make_networks(learning.agent, learning.mixer, spec), learning)
    replay = EpisodeReplay(learning.replay.capacity, seed=seed_for(settings.seed, "replay"))
    operations = Operations(learner, settings.surgery, seed=seed_for(settings.seed, "surgery"))
    return Run(settings, learner, replay, operations)


@dataclass
class Progress:
    """How far a run has come."""

    round: int = 0
    """Times that parallel episodes were played."""
    task: int = 0
    """Place of the task in its sequence."""
    num_steps: int = 0
    """Steps of the environment."""
    num_task_steps: int = 0
    """Those of the present task."""
    num_episodes: int = 0
    """Episodes played."""
    num_updates: int = 0
    """Updates of the learner."""
    num_unlearned: int = 0
    """Episodes played since the last update was due."""
    last: dict[Event, int] = field(default_factory=dict)
    """Steps of the environment when it was last time to do something."""


class Run:
    """Networks, their learner, memory and operations, and the games of the present task."""

    def __init__(self, settings: RunSettings, learner: Learner, replay: EpisodeReplay, operations: Operations) -> None:
        self.settings = settings
        self.learner = learner
        self.replay = replay
        self.operations = operations
        self.progress = Progress()
        self.averages = Averages()
        self.at_start: dict[str, float] = {}
        """Shares of units in each condition before the first update."""
        self._open_games()

    # -- where it stands

    @property
    def agent(self) -> Agent:
        """The network that plays."""
        return self.learner.online.agent

    @property
    def task(self) -> Task:
        """What is played now."""
        return self.settings.tasks.tasks[self.progress.task]

    @property
    def epsilon(self) -> float:
        """The share of random actions in the next round."""
        progress, again = self.progress, self.settings.switch.restart_exploration
        return self.settings.learning.exploration.epsilon(progress.num_task_steps if again else progress.num_steps)

    @property
    def games_seed(self) -> int:
        """Of the next round's games and random actions."""
        return seed_for(self.settings.seed, "games", self.progress.round)

    @property
    def is_task_over(self) -> bool:
        """Whether the present task has had its steps."""
        return self.progress.num_task_steps >= self.settings.num_steps_of(self.progress.task)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to do."""
        return self.is_task_over and self.progress.task == len(self.settings.tasks.tasks) - 1

    def is_time_to(self, event: Event) -> bool:
        """Whether enough was played since the last time; if so, this is the next."""
        training, last = self.settings.training, self.progress.last
        intervals = {"evaluate": training.evaluate_every, "save": training.save_every}
        every = intervals.get(event, self.settings.all_tasks.every)
        if every is None or self.progress.num_steps - last.get(event, 0) < every:
            return False
        last[event] = self.progress.num_steps
        return True

    # -- what training does with it

    def add(self, episodes: TensorDict) -> int:
        """Remember a round of episodes; returns how many updates are due.

        Until a batch can be drawn none are, and they are not made up for.
        """
        progress, num_steps = self.progress, int(episodes["mask"].sum())
        if num_steps:
            self.averages.add_episodes(whole(episodes))
            begun = episodes[episodes["mask"].any(dim=1)]  # without games that broke at once
            self.replay.add(begun.exclude("won", "broken"))  # which are of episodes, not of their steps
        progress.round += 1
        progress.num_steps += num_steps
        progress.num_task_steps += num_steps
        progress.num_episodes += len(episodes)
        progress.num_unlearned += len(episodes)
        num_due, progress.num_unlearned = divmod(progress.num_unlearned, self.settings.training.episodes_per_update)
        return num_due if len(self.replay) >= self.settings.learning.replay.batch_size else 0

    def recent_episodes(self) -> TensorDict:
        """The latest episodes, as many as in a batch or as there are: what measurements look at."""
        return self.replay.latest(min(self.settings.learning.replay.batch_size, len(self.replay)))

    def begin_next_task(self) -> object | None:
        """Go on to the next task; returns the report if units were operated on for it."""
        self.progress.task += 1
        self.progress.num_task_steps = 0
        switch = self.settings.switch
        if switch.keep_episodes is not None:
            self.replay.keep_latest(switch.keep_episodes)
        self.close()
        self._open_games()
        report = self.operations.task_changed()
        if switch.reset_optimizer:
            reset_optimizer(self.learner)
        if switch.sync_targets:  # last, so that the targets are copies of what the next task begins with
            self.learner.sync_targets(self.progress.num_episodes)
        return report

    def close(self) -> None:
        """Close the games, some of which have processes of their own; those of the next task are opened by it."""
        close(self.environment)
        close(self.evaluation_environment)

    def _open_games(self) -> None:
        training = self.settings.training
        self.environment: Environment = self.task.make(training.num_parallel)
        self.evaluation_environment: Environment = self.task.make(training.num_evaluation_episodes)

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """All but the replay's episodes: tensors, numbers and strings (`weights_only=True` loads it)."""
        return {
            "learner": self.learner.state_dict(),
            "operations": self.operations.state_dict(),
            "progress": asdict(self.progress),
            "averages": dict(self.averages.sums),
            "at_start": dict(self.at_start),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state; the replay is loaded for itself.

        Raises:
            CheckpointError: the state is that of a run with other settings.
        """
        load_learner(self.learner, state["learner"])
        self.operations.load_state_dict(state["operations"])
        self.progress = Progress(**state["progress"])
        self.averages, self.at_start = Averages(dict(state["averages"])), dict(state["at_start"])
        self.close()
        self._open_games()
