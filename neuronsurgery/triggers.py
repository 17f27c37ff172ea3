"""Triggers: when a schedule operates, and when it looks, as small values that combine with `|` and `&`.

All counts are optimizer steps since the schedule began or last acted, and a trigger that has become due stays due until
the schedule acts. So `Every(1000) & Plateau(10)` is a plateau, and at least 1000 steps since the last time;
`Every(1000) | TaskChange()` is whichever comes first.

>>> print(Every(1000) & Share(0.1) | TaskChange(after=100))
Every(1000) & Share(0.1) | TaskChange(after=100)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from math import inf, isfinite
from typing import Any, ClassVar, Literal

from neuronsurgery.errors import ScheduleError

__all__ = ["EVERY_STEP", "Every", "Last", "Memory", "Moment", "Plateau", "Share", "TaskChange", "Trigger"]

Memory = dict[str, float]
"""What a trigger remembers between steps: plain numbers, so that a checkpoint can hold it."""
Over = Literal["model", "site"]


@dataclass(frozen=True)
class Moment:
    """What triggers are told."""

    since: int
    """Optimizer steps since the schedule began or last acted."""
    memory: Mapping[Trigger, Memory]
    """What each trigger remembers."""
    share: Callable[[Over], float | None]
    """The share of chosen units of the whole model, or the largest of a site; None: too little was looked at."""


class Trigger(ABC):
    """When to operate; triggers combine with `|` (either is due) and `&` (both are due)."""

    @abstractmethod
    def is_due(self, moment: Moment) -> bool:
        """Whether to operate now."""

    @abstractmethod
    def foreseen(self, moment: Moment) -> int | None:
        """In how many steps it may next be due, 0 for now; None: that depends on what is yet to come."""

    def leaves(self) -> Iterator[Trigger]:
        """The triggers that it is combined of, in order."""
        yield self

    def begin(self) -> Memory:
        """What it remembers when a schedule begins, and after it has acted."""
        return {}

    def saw(self, memory: Memory, value: float) -> None:
        """Take note of a value that was passed to `step`."""
        return

    def task_changed(self, memory: Memory, since: int) -> None:
        """Take note of a change of the task."""
        return

    @property
    def asks_scores(self) -> bool:
        """Whether it needs the scores to tell; such parts of a combination are asked last."""
        return any(isinstance(leaf, Share) for leaf in self.leaves())

    def __or__(self, other: Trigger) -> Trigger:
        return Either(self, other) if isinstance(other, Trigger) else NotImplemented

    def __and__(self, other: Trigger) -> Trigger:
        return Both(self, other) if isinstance(other, Trigger) else NotImplemented


class Described:
    """Prints as it is written: the first field as it is, others by name where they differ from their defaults."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._arguments())})"

    def _arguments(self) -> Iterator[str]:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.default is MISSING:
                yield repr(value)
            elif value != field.default:
                yield f"{field.name}={value!r}"


@dataclass(frozen=True, repr=False)
class Every(Described, Trigger):
    """Every so many optimizer steps: when to operate (`operate=`), or which steps to look at (`look=`).

    Raises `ScheduleError` unless the number is a positive integer.

    >>> Every(1000)
    Every(1000)
    """

    num_steps: int

    def __post_init__(self) -> None:
        require_count("Every.num_steps", self.num_steps)

    def is_due(self, moment: Moment) -> bool:
        return moment.since >= self.num_steps

    def foreseen(self, moment: Moment) -> int:
        return max(0, self.num_steps - moment.since)


@dataclass(frozen=True, repr=False)
class Last(Described):
    """Which steps to look at (`look=`): the last `num_steps` before an operation, of these each `every`-th.

    An operation that nobody could foresee, as on a plateau, waits until as many steps have been looked at.
    Raises `ScheduleError` unless both are positive integers.

    >>> Last(100, every=5)
    Last(100, every=5)
    """

    num_steps: int
    every: int = 1

    def __post_init__(self) -> None:
        require_count("Last.num_steps", self.num_steps)
        require_count("Last.every", self.every)
        if self.every > self.num_steps:
            raise ScheduleError(f"Last.every is {self.every}, more than the {self.num_steps} steps that it counts off")


@dataclass(frozen=True, repr=False)
class TaskChange(Described, Trigger):
    """When the task changes, which `schedule.task_changed()` announces, or `after` optimizer steps of the new task.

    With `after`, what was measured before the change is dropped: units are judged by what they do in the new task.
    Raises `ScheduleError` for a negative number.

    >>> TaskChange(after=100)
    TaskChange(after=100)
    """

    after: int = 0

    def __post_init__(self) -> None:
        require_count("TaskChange.after", self.after, least=0)

    def begin(self) -> Memory:
        return {"announced": inf}

    def task_changed(self, memory: Memory, since: int) -> None:
        memory["announced"] = since

    def is_due(self, moment: Moment) -> bool:
        return moment.since >= moment.memory[self]["announced"] + self.after

    def foreseen(self, moment: Moment) -> int | None:
        announced = moment.memory[self]["announced"]
        return None if announced == inf else max(0, int(announced) + self.after - moment.since)


@dataclass(frozen=True, repr=False)
class Plateau(Described, Trigger):
    """When what is passed to `step` has not improved for `patience` values.

    Each value passed counts once, whether it is a loss of every step or a validation loss now and then; an improvement
    is one by more than `min_delta` over the best since the schedule last acted or the task changed. A value that is not
    finite is passed over. Losses of single batches are noisy: pass a running mean of them.

    Args:
        patience: how many values in a row bring no improvement.
        min_delta: what an improvement has to exceed, in units of the value.
        mode: whether a value improves by falling (`"min"`) or rising (`"max"`).

    Raises `ScheduleError` for a patience below 1, a negative min_delta or another mode.

    >>> Plateau(10, mode="max")
    Plateau(10, mode='max')
    """

    patience: int
    min_delta: float = 0.0
    mode: Literal["min", "max"] = "min"

    def __post_init__(self) -> None:
        require_count("Plateau.patience", self.patience)
        if not (isinstance(self.min_delta, (int, float)) and isfinite(self.min_delta) and self.min_delta >= 0):
            raise ScheduleError(f"Plateau.min_delta is {self.min_delta!r}; it must be finite and >= 0")
        if self.mode not in ("min", "max"):
            raise ScheduleError(f"Plateau.mode is {self.mode!r}; it must be 'min' or 'max'")

    def begin(self) -> Memory:
        return {"best": inf, "waited": 0}

    def saw(self, memory: Memory, value: float) -> None:
        value = value if self.mode == "min" else -value
        if not isfinite(value):
            return
        if value < memory["best"] - self.min_delta:
            memory["best"], memory["waited"] = value, 0
        else:
            memory["waited"] += 1

    def task_changed(self, memory: Memory, since: int) -> None:
        memory.update(self.begin())

    def is_due(self, moment: Moment) -> bool:
        return moment.memory[self]["waited"] >= self.patience

    def foreseen(self, moment: Moment) -> int | None:
        return 0 if self.is_due(moment) else None


@dataclass(frozen=True, repr=False)
class Share(Described, Trigger):
    """When more than this share of the units would be chosen: of all the model's, or of any one site's.

    It scores what was measured each `every` steps, young units left out, and what is measured then starts anew.

    Args:
        bound: the share that has to be exceeded, at least 0 and below 1.
        over: `"model"`: the share of the units of all sites; `"site"`: the largest share of a site.
        every: how many optimizer steps lie between two looks at the scores.

    Raises `ScheduleError` for a bound that no share can exceed or that is negative.

    >>> Share(0.1, over="site")
    Share(0.1, over='site')
    """

    bound: float
    over: Over = "model"
    every: int = 100

    def __post_init__(self) -> None:
        if not (isinstance(self.bound, (int, float)) and 0 <= self.bound < 1):
            raise ScheduleError(
                f"Share.bound is {self.bound!r}; it must be at least 0 and below 1, as no share exceeds 1"
            )
        if self.over not in ("model", "site"):
            raise ScheduleError(f"Share.over is {self.over!r}; it must be 'model' or 'site'")
        require_count("Share.every", self.every)

    def begin(self) -> Memory:
        return {"asked": 0}

    def is_due(self, moment: Moment) -> bool:
        if self.foreseen(moment) > 0:
            return False
        share = moment.share(self.over)
        if share is None:
            return False
        moment.memory[self]["asked"] = moment.since
        return share > self.bound

    def foreseen(self, moment: Moment) -> int:
        return max(0, int(moment.memory[self]["asked"]) + self.every - moment.since)


# -- combinations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Pair(Trigger):
    """Two triggers as one."""

    left: Trigger
    right: Trigger

    symbol: ClassVar[str]

    def leaves(self) -> Iterator[Trigger]:
        yield from self.left.leaves()
        yield from self.right.leaves()

    def in_order(self) -> list[Trigger]:
        """Those that need no scores first, so that scores are computed only where they decide."""
        return sorted((self.left, self.right), key=lambda part: part.asks_scores)

    def __repr__(self) -> str:
        return f"{self._operand(self.left)} {self.symbol} {self._operand(self.right)}"

    def _operand(self, part: Trigger) -> str:
        return f"({part})" if isinstance(self, Both) and isinstance(part, Either) else str(part)


class Either(Pair):
    """Due when either is."""

    symbol: ClassVar[str] = "|"

    def is_due(self, moment: Moment) -> bool:
        return any(part.is_due(moment) for part in self.in_order())

    def foreseen(self, moment: Moment) -> int | None:
        known = [steps for part in self.in_order() if (steps := part.foreseen(moment)) is not None]
        return min(known, default=None)


class Both(Pair):
    """Due when both are."""

    symbol: ClassVar[str] = "&"

    def is_due(self, moment: Moment) -> bool:
        return all(part.is_due(moment) for part in self.in_order())

    def foreseen(self, moment: Moment) -> int | None:
        known = [part.foreseen(moment) for part in self.in_order()]
        return None if None in known else max(steps for steps in known if steps is not None)


def require_count(what: str, value: Any, least: int = 1) -> None:
    """Raises `ScheduleError` unless the value is an integer that is not too small."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ScheduleError(f"{what} is {value!r}; it is a number of steps or values and must be an integer >= {least}")


EVERY_STEP = Every(1)
