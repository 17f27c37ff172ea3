"""Settings of a whole run: what is learned by whom, for how long, and what is operated on.

`RunSettings` is what a file of settings holds and what a checkpoint is checked against; each part goes to the one
piece of the program that it describes. The file is long because each field says what it means.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from marl.environments.tasks import Task, TaskSequence
from marl.errors import SettingsError
from marl.settings import Algorithm, PresetName, Settings, preset

__all__ = [
    "BANK_METHODS",
    "CRITERIA",
    "LAYER_METHODS",
    "METHODS",
    "UNIT_METHODS",
    "AllTasksSettings",
    "RunSettings",
    "SurgerySettings",
    "SwitchSettings",
    "TrainingSettings",
    "run_settings",
]

BANK_METHODS = ("knife", "fade_to_fresh")
"""Methods of units that leave frozen rows, and the outgoing weights alone."""
UNIT_METHODS = (*BANK_METHODS, "redo", "regrama", "reborn")
LAYER_METHODS = ("reset", "reset_optimizer", "shrink_and_perturb")
METHODS = ("none", *UNIT_METHODS, *LAYER_METHODS)
CRITERIA = ("stagnant", "dormant", "grama", "lowest", "random", "all")

Part = Literal["agent", "mixer"]


@dataclass(frozen=True)
class TrainingSettings:
    """How much is played, learned, evaluated and saved."""

    num_steps: int = 1_000_000
    """Steps of the environment, of all parallel episodes together, in each task that does not say its own."""
    num_parallel: int = 32
    """Episodes played side by side, with the networks as they were before them."""
    episodes_per_update: int = 1
    """Episodes collected for each update; 1 is the rhythm of PyMARL, which plays one by one."""
    evaluate_every: int = 10_000
    """Steps of the environment from one evaluation to the next, at least."""
    num_evaluation_episodes: int = 32
    """Greedy episodes of an evaluation."""
    save_every: int = 100_000
    """Steps of the environment from one checkpoint to the next, at least."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "num_parallel", "episodes_per_update", "evaluate_every", "save_every"):
            _require_at_least(1, name, getattr(self, name))
        _require_at_least(1, "num_evaluation_episodes", self.num_evaluation_episodes)


@dataclass(frozen=True)
class SwitchSettings:
    """What is kept when a task ends and the next begins. The paper does not say; these are our defaults.

    Weights are always kept.
    """

    keep_episodes: int | None = 0
    """Episodes of earlier tasks that stay in the replay, the latest; none: all that it holds. By default none, as the
    usual replay of 5,000 episodes would outlast several of the shorter tasks."""
    restart_exploration: bool = True
    """Whether epsilon begins anew, as nothing else would find what is now worth doing."""
    reset_optimizer: bool = False
    """Whether the optimizer forgets its moments; by default it goes on, as nobody tells a learner of a new task."""
    sync_targets: bool = True
    """Whether the target networks become copies at once, whenever they would be next; else the new task's values are
    first learned from networks that are older than the task."""

    def __post_init__(self) -> None:
        if self.keep_episodes is not None:
            _require_at_least(0, "keep_episodes", self.keep_episodes)


@dataclass(frozen=True)
class AllTasksSettings:
    """How a run is evaluated on all tasks of its sequence, if there are several: before the first and after each."""

    num_episodes: int = 32
    """Greedy episodes of each task, always of the same games; 0: never."""
    every: int | None = None
    """Steps of the environment from one such evaluation to the next, beside those at the tasks' ends; none: no more."""
    unseen: bool = True
    """Whether tasks that are still to come are evaluated as well, which forward transfer is measured by."""

    def __post_init__(self) -> None:
        _require_at_least(0, "num_episodes", self.num_episodes)
        if self.every is not None:
            _require_at_least(1, "every", self.every)


@dataclass(frozen=True)
class SurgerySettings:
    """What is operated on, when, and how. The paper leaves open when and how long to look; these are our defaults."""

    method: str = "none"
    """What is done to the chosen units, or to whole layers; `none` only measures."""
    criterion: str = "stagnant"
    """What chooses units: a score below a threshold, the lowest scores, chance, or `all`."""
    threshold: float | None = None
    """Of the score relative to its layer's mean, or the fraction of units for `lowest` and `random`; none: the
    criterion's own, a quarter for the two that take a fraction."""
    bias: bool = False
    """Whether `stagnant` and `lowest` count a unit's bias as one of its weights."""
    parts: tuple[Part, ...] = ("agent", "mixer")
    """Hidden units of the agents' network, of the mixer's hypernetworks, or of both."""
    every: int | None = 1000
    """Updates from one operation to the next; none: not by number."""
    after_task_change: int | None = None
    """Updates into a new task after which there is an operation, on what was measured in it; 0: at the change, on what
    was measured before it; none: a change of task is no occasion."""
    look: int | None = None
    """Updates before an operation that are measured; none: all since the last operation."""
    cooldown: int = 100
    """Updates for which a fresh unit is passed over."""
    layers: tuple[str, ...] = ()
    """Modules that methods of whole layers concern, such as `agent.head`; none: the parts."""
    max_share: float | None = None
    """The largest share of a layer's units in one operation; none: no bound."""
    max_growth: float = 4.0
    """Frozen rows that a layer may have, in multiples of its width; of methods that leave them."""
    retire: int | None = None
    """Updates over which frozen members fade away; none: they stay, as in the paper. `fade_to_fresh` needs it."""

    def __post_init__(self) -> None:
        _require_choice("method", self.method, METHODS)
        _require_choice("criterion", self.criterion, CRITERIA)
        for part in self.parts:
            _require_choice("part", part, ("agent", "mixer"))
        for name in ("every", "look", "retire"):
            value = getattr(self, name)
            if value is not None:
                _require_at_least(1, name, value)
        if self.retire is not None and self.method not in BANK_METHODS:
            raise SettingsError(
                f"retire is {self.retire}, and only {' and '.join(BANK_METHODS)} leave anything to retire: unset it"
            )
        if self.retire is None and self.method == "fade_to_fresh":
            raise SettingsError("fade_to_fresh needs the number of updates over which units fade in: set retire")
        if self.layers and self.method not in LAYER_METHODS:
            raise SettingsError(f"layers are for {', '.join(LAYER_METHODS)}; {self.method} chooses units: set parts")
        if self.method != "none" and self.every is None and self.after_task_change is None:
            raise SettingsError(f"{self.method} is never to operate: set every or after_task_change")


@dataclass(frozen=True)
class RunSettings:
    """All that a run is made from; the same settings give the same run."""

    algorithm: Algorithm
    """VDN, QMIX or QPLEX."""
    learning: Settings
    """The learner and what feeds it."""
    tasks: TaskSequence
    """What is played, one after the other."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    """How much is played and learned."""
    switch: SwitchSettings = field(default_factory=SwitchSettings)
    """What is kept from one task to the next."""
    all_tasks: AllTasksSettings = field(default_factory=AllTasksSettings)
    """How earlier and later tasks are evaluated."""
    surgery: SurgerySettings = field(default_factory=SurgerySettings)
    """What is operated on."""
    seed: int = 0
    """Of all random numbers."""

    def __post_init__(self) -> None:
        _require_at_least(0, "seed", self.seed)
        num_parallel, capacity = self.training.num_parallel, self.learning.replay.capacity
        if num_parallel > capacity:
            raise SettingsError(
                f"{num_parallel} episodes side by side do not fit into a replay of {capacity}: lower "
                "training.num_parallel or raise learning.replay.capacity"
            )
        for place, task in enumerate(self.tasks.tasks):
            self._require_an_episode(place, task)
        limits = {spec.episode_limit for spec in self.tasks.specs.values()}
        if self.switch.keep_episodes != 0 and len(limits) > 1:
            raise SettingsError(
                f"episodes are to be kept from task to task, and have up to {' or '.join(map(str, sorted(limits)))} "
                f"steps: pad each task to {{'steps': {max(limits)}}}, or set switch.keep_episodes to 0"
            )

    def _require_an_episode(self, place: int, task: Task) -> None:
        limit, num_steps = self.tasks.specs[task.name].episode_limit, self.num_steps_of(place)
        if limit > num_steps:
            where = "training.num_steps" if task.num_steps is None else f"tasks.{place}.num_steps"
            raise SettingsError(f"{where} is {num_steps}, less than one episode of up to {limit} steps: raise it")

    def num_steps_of(self, place: int) -> int:
        """Steps of the environment for which the task at a place of the sequence is played."""
        return self.tasks.tasks[place].num_steps or self.training.num_steps


def run_settings(
    algorithm: Algorithm, environment: str, *, base: PresetName = "pymarl", seed: int = 0, **options: object
) -> RunSettings:
    """The settings of a run in one environment, with a preset's learner; `options` are the environment's.

    Raises:
        SettingsError: unknown names, or options that make no game.

    >>> run_settings("qmix", "predator_prey", punishment=0.0).learning.mixer
    QMIXSettings(embed_size=32, hypernet_layers=2, hypernet_size=64)
    """
    tasks = TaskSequence((Task(environment, environment, options),))
    return RunSettings(algorithm, preset(base, algorithm), tasks, seed=seed)


def _require_choice(what: str, asked: object, choices: tuple[str, ...]) -> None:
    if asked not in choices:
        raise SettingsError(f"unknown {what} {asked!r}: choose one of {', '.join(map(repr, choices))}")


def _require_at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise SettingsError(f"{name} is {value}: it must be at least {least}")
