"""The methods that are compared, and the settings that each is tuned over: six for every one of them.

A setting is a learning rate and one number of the method's own. The number of settings is the tuning budget, equal for
all. Where a method acts now and then, the number is how often, as a share of a task's steps or in tasks, or by which
threshold. It is not told when a task begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Adam

from neuronsurgery import surgery
from neuronsurgery.comparison.learning import Learner
from neuronsurgery.demo.digits import stream

__all__ = ["ARMS", "NUM_SETTINGS", "Arm", "Setting", "Subject"]

NUM_SETTINGS = 6
RATES = (1e-3, 3e-3)
PERIODS = (0.25, 1.0, 4.0)
"""In tasks."""
OFTEN = PERIODS[0]
MOMENTS = (0.25, 0.5, 0.75)
"""In shares of the whole run, for what is done once."""


@dataclass(frozen=True)
class Setting:
    """What a run is tuned by: a learning rate, and a number that the arm says the meaning of."""

    rate: float
    value: float = 0.0


@dataclass(frozen=True, eq=False)
class Subject:
    """What an arm makes a learner of."""

    model: nn.Sequential
    head: str
    """The name of the output layer."""
    num_steps: int
    """Optimizer steps of a task."""
    num_tasks: int
    seed: int

    @property
    def generator(self) -> torch.Generator:
        """For the method's own draws."""
        return stream(self.seed, "surgery")

    @property
    def delay(self) -> int:
        """How many steps of a task are over when a method acts: an eighth of them."""
        return max(1, self.num_steps // 8)

    def period(self, value: float) -> surgery.Every:
        """Every so many tasks."""
        return surgery.Every(max(1, round(value * self.num_steps)))

    def moment(self, value: float) -> surgery.Every:
        """Once in the run."""
        return self.period(value * self.num_tasks)


Prepare = Callable[[Subject, Setting], Learner]


@dataclass(frozen=True)
class Arm:
    """A method in the comparison."""

    prepare: Prepare
    """Makes a learner of a network."""
    tunes: str
    """What the number of a setting is, "" where learning rates alone are tuned."""
    settings: tuple[Setting, ...]
    equals: str = ""
    """Of a control, what it has as much of as KNIFE's network: `"weights"` or `"multiplications"`."""

    def __post_init__(self) -> None:
        assert len(self.settings) == NUM_SETTINGS, "every arm is tuned over as many settings"


def _adam(subject: Subject, setting: Setting) -> Adam:
    return Adam(subject.model.parameters(), lr=setting.rate, fused=True)


def untouched(subject: Subject, setting: Setting) -> Learner:
    """A network that is left alone."""
    return Learner(subject.model, _adam(subject, setting))


def on_units(method: Callable[..., Any], criterion: Any, *, is_once: bool = False, **options: Any) -> Prepare:
    """A method that chooses units, now and then or once."""

    def prepare(subject: Subject, setting: Setting) -> Learner:
        when = subject.moment(setting.value) if is_once else subject.period(setting.value)
        return _operated(subject, setting, method, criterion, operate=when, acts_once=is_once, **options)

    return prepare


def on_units_fading(method: Callable[..., Any], criterion: Any) -> Prepare:
    """A method whose frozen members fade away until it acts again."""

    def prepare(subject: Subject, setting: Setting) -> Learner:
        when = subject.period(setting.value)
        return _operated(subject, setting, method, criterion, operate=when, retire=when.num_steps)

    return prepare


def on_units_below(method: Callable[..., Any], criterion: Callable[[float], Any]) -> Prepare:
    """A method that chooses units four times a task; the number is the threshold of its criterion."""

    def prepare(subject: Subject, setting: Setting) -> Learner:
        return _operated(subject, setting, method, criterion(setting.value), operate=subject.period(OFTEN))

    return prepare


def _operated(
    subject: Subject,
    setting: Setting,
    method: Callable[..., Any],
    criterion: Any,
    *,
    acts_once: bool = False,
    **how: Any,
) -> Learner:
    optimizer = _adam(subject, setting)
    given = {"method": method, "cooldown": 0, "generator": subject.generator, **how}
    begin = partial(surgery.Schedule, subject.model, optimizer, criterion, **given)
    return Learner(subject.model, optimizer, begin=begin, delay=subject.delay, acts_once=acts_once)


def on_layers(method: Callable[..., Any], *, is_once: bool = False, **options: Any) -> Prepare:
    """A method that concerns whole layers; `"head"` among the options' values stands for the output layer."""

    def prepare(subject: Subject, setting: Setting) -> Learner:
        optimizer = _adam(subject, setting)
        when = subject.moment(setting.value) if is_once else subject.period(setting.value)
        given: dict[str, Any] = {name: subject.head if value == "head" else value for name, value in options.items()}
        if method not in (surgery.scale_head, surgery.reset_optimizer):
            given["generator"] = subject.generator
        begin = partial(surgery.Schedule, subject.model, optimizer, None, operate=when, method=method, **given)
        return Learner(subject.model, optimizer, begin=begin, delay=subject.delay, acts_once=is_once)

    return prepare


def at_each_step(make: Callable[..., Any]) -> Prepare:
    """A method that is called at each step and counts by itself; the number is its rate."""

    def prepare(subject: Subject, setting: Setting) -> Learner:
        optimizer = _adam(subject, setting)
        stepping = make(subject.model, optimizer, rate=setting.value, generator=subject.generator)
        return Learner(subject.model, optimizer, schedule=stepping)

    return prepare


def with_penalty(make: Callable[..., Any]) -> Prepare:
    """A penalty that is added to each loss; the number is its strength."""

    def prepare(subject: Subject, setting: Setting) -> Learner:
        return Learner(subject.model, _adam(subject, setting), penalty=make(subject.model, setting.value))

    return prepare


def with_upgd(subject: Subject, setting: Setting) -> Learner:
    """UPGD in the place of Adam; the number is the standard deviation of its noise."""
    optimizer = surgery.upgd(subject.model, setting.rate, sigma=setting.value, generator=subject.generator)
    return Learner(subject.model, optimizer)


def _grid(values: Iterable[float], rates: Iterable[float] = RATES) -> tuple[Setting, ...]:
    return tuple(Setting(rate, value) for rate in rates for value in values)


_RATES_ALONE = tuple(Setting(rate) for rate in (3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2))
_PERIODS, _MOMENTS = _grid(PERIODS), _grid(MOMENTS)
_STRENGTHS = _grid((1e-5, 1e-4, 1e-3))
_PERIOD, _MOMENT, _STRENGTH = "tasks between two actions", "share of the run before it", "strength"

ARMS: Mapping[str, Arm] = {
    "none": Arm(untouched, "", _RATES_ALONE),
    "KNIFE": Arm(on_units(surgery.knife, "stagnant", max_growth=64.0), _PERIOD, _PERIODS),
    "KNIFE, retired": Arm(on_units_fading(surgery.knife, "stagnant"), _PERIOD, _PERIODS),
    "fade to fresh": Arm(on_units_fading(surgery.fade_to_fresh, "stagnant"), _PERIOD, _PERIODS),
    "ReDo": Arm(on_units(surgery.redo, "dormant"), _PERIOD, _PERIODS),
    # By its published threshold, the first, it chose no unit of the first stream at any period: it is tuned instead.
    "ReGraMa": Arm(on_units_below(surgery.regrama, surgery.GraMa), "threshold", _grid((0.01, 0.1, 0.25))),
    "ReBorn": Arm(on_units(surgery.reborn, surgery.Dormant(0.1)), _PERIOD, _PERIODS),
    "continual backpropagation": Arm(at_each_step(surgery.ContinualBackprop), "rate", _grid((1e-5, 1e-4, 1e-3))),
    "CCBP": Arm(at_each_step(surgery.CCBP), "rate", _grid((0.005, 0.015, 0.05))),
    "widening": Arm(on_units(surgery.widen, surgery.Random(0.5), is_once=True), _MOMENT, _MOMENTS),
    "plasticity injection": Arm(on_layers(surgery.plasticity_injection, is_once=True, head="head"), _MOMENT, _MOMENTS),
    "shrink and perturb": Arm(on_layers(surgery.shrink_and_perturb), _PERIOD, _PERIODS),
    "reset": Arm(on_layers(surgery.reset), _PERIOD, _PERIODS),
    "reset of the head": Arm(on_layers(surgery.reset, layers="head"), _PERIOD, _PERIODS),
    "reset of the optimizer": Arm(on_layers(surgery.reset_optimizer), _PERIOD, _PERIODS),
    "scaled head": Arm(on_layers(surgery.scale_head, factor=0.5, layers="head"), _PERIOD, _PERIODS),
    "L2 Init": Arm(with_penalty(surgery.regenerative_regularizer), _STRENGTH, _STRENGTHS),
    "L2": Arm(with_penalty(surgery.l2_regularizer), _STRENGTH, _STRENGTHS),
    "spectral": Arm(with_penalty(surgery.spectral_regularizer), _STRENGTH, _STRENGTHS),
    "UPGD": Arm(with_upgd, "noise", _grid((1e-3, 1e-2), rates=(0.01, 0.03, 0.1))),
    "none, as many weights": Arm(untouched, "", _RATES_ALONE, equals="weights"),
    "none, as many multiplications": Arm(untouched, "", _RATES_ALONE, equals="multiplications"),
}
"""Every method that is compared; a new one is a new row."""
