"""Environments by name: what a command line or a file of settings can ask for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from marl.environments.matrix_game import Features, MatrixGame, TwoStepGame
from marl.environments.payoffs import PayoffLike
from marl.environments.predator_prey import PredatorPrey
from marl.environments.predator_prey_settings import VARIANTS
from marl.environments.protocol import TextEnvironment
from marl.environments.qtran_predator_prey import QTRAN_VARIANTS, QtranPredatorPrey
from marl.environments.smax import Smax
from marl.environments.smax_settings import SmaxSettings
from marl.environments.starcraft import Starcraft
from marl.environments.starcraft_settings import SmacSettings, Smacv2Settings
from marl.errors import SettingsError, suggestion


def make_environment(name: str, batch_size: int, *, seed: int = 0, **options: object) -> TextEnvironment:
    """The environment of a name, with B = `batch_size` parallel episodes.

    Options are the fields of `PredatorPreySettings`, `QtranPredatorPreySettings` and `SmaxSettings`, or the arguments
    of the functions below for matrix games. Raises `SettingsError` for unknown names and options and for values that
    make no game, and `MissingExtraError` where a game needs a package that is not installed.

    >>> make_environment("predator_prey", 32, punishment=0.0).spec.obs_size
    75
    >>> make_environment("predator_prey", 32, punish=0.0)
    Traceback (most recent call last):
    marl.errors.SettingsError: predator_prey has no option 'punish'; did you mean 'punishment'?
    """
    if name not in ENVIRONMENTS:
        raise SettingsError(f"there is no environment {name!r}; {suggestion(name, ENVIRONMENTS)}")
    entry = ENVIRONMENTS[name]
    for option in options:
        if option not in entry.options:
            raise SettingsError(f"{name} has no option {option!r}; {suggestion(option, entry.options)}")
    if type(batch_size) is not int or type(seed) is not int:
        raise SettingsError(f"batch_size {batch_size!r} and seed {seed!r} have to be whole numbers")
    return entry.make(batch_size, seed=seed, **options)


@dataclass(frozen=True)
class Entry:
    """An environment that can be asked for."""

    make: Callable[..., TextEnvironment]
    """Takes the batch size, a seed and the options."""
    options: tuple[str, ...]
    """The names of the options."""


def matrix_game(
    batch_size: int, *, seed: int, payoff: PayoffLike = "qtran", obs: Features = "ones", state: Features = "ones"
) -> TextEnvironment:
    """One game of one step: its payoff by name or as numbers, and what is shown of it."""
    return MatrixGame([payoff], batch_size, obs=obs, state=state, seed=seed)


def contextual_matrix_game(
    batch_size: int,
    *,
    seed: int,
    payoffs: Sequence[PayoffLike] = ("two_state_1", "two_state_2"),
    obs: Features = "context",
    state: Features = "context",
) -> TextEnvironment:
    """One of several games of one step, drawn anew in every episode, with its number shown to all.

    By default the two-state game of QTRAN's code.
    """
    return MatrixGame(payoffs, batch_size, obs=obs, state=state, seed=seed)


def two_step_game(
    batch_size: int, *, seed: int, payoffs: Sequence[PayoffLike] = ("two_step_a", "two_step_b")
) -> TextEnvironment:
    """The game of two steps in which the first agent chooses what the second step is about; by default QMIX's."""
    return TwoStepGame(payoffs, batch_size, seed=seed)


def _by_arguments(make: Callable[..., TextEnvironment]) -> Entry:
    arguments = tuple(inspect.signature(make).parameters)
    return Entry(make, tuple(argument for argument in arguments if argument not in ("batch_size", "seed")))


def _by_fields(game: Callable[..., TextEnvironment], settings: Any) -> Entry:
    def make(batch_size: int, *, seed: int, **options: object) -> TextEnvironment:
        return game(replace(settings, **options), batch_size, seed=seed)

    return Entry(make, tuple(field.name for field in fields(settings)))


ENVIRONMENTS = {
    "matrix_game": _by_arguments(matrix_game),
    "contextual_matrix_game": _by_arguments(contextual_matrix_game),
    "two_step_game": _by_arguments(two_step_game),
    **{name: _by_fields(PredatorPrey, settings) for name, settings in VARIANTS.items()},
    **{name: _by_fields(QtranPredatorPrey, settings) for name, settings in QTRAN_VARIANTS.items()},
    "smax": _by_fields(Smax, SmaxSettings()),
    # Those that need StarCraft II.
    "smacv2": _by_fields(Starcraft, Smacv2Settings()),
    "smac": _by_fields(Starcraft, SmacSettings()),
}
