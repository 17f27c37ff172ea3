"""The payoffs of one-step games by name, each with where it was published.

A payoff is an array with one axis per agent: entry (a, b) is the reward of the whole team if the first agent takes
action a and the second action b.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from marl.errors import SettingsError, suggestion

Matrix = tuple[tuple[float, ...], ...]
# A name of `PAYOFFS`, or numbers nested as deeply as there are agents.
PayoffLike: TypeAlias = "str | torch.Tensor | NDArray[np.float32] | Sequence[object]"


@dataclass(frozen=True)
class Payoff:
    """A published payoff of two agents."""

    matrix: Matrix
    """Rows are the first agent's actions."""
    source: str
    """The paper it comes from."""


DYNAMICS = "The dynamics of reinforcement learning in cooperative multiagent systems, AAAI 1998"


def _penalty(penalty: float) -> Payoff:
    return Payoff(((penalty, 0, 10), (0, 2, 0), (10, 0, penalty)), f"{DYNAMICS}, the penalty game")


def _qrelation(consolation: float) -> Payoff:
    matrix = ((8, -12, -12), (-12, 0, 0), (-12, 0, consolation))
    return Payoff(matrix, "QRelation's code: the second best is as far off as in QTRAN's game, and worth more")


PAYOFFS = {
    # Read from a fragment of the paper's text in which the rows ran together; the other games are not public.
    "knife": Payoff(((-10, -10, 12), (-9, -12, -8), (-4, -8, -11)), "KNIFE 2026, the first of its five tasks"),
    "qtran": Payoff(((8, -12, -12), (-12, 0, 0), (-12, 0, 0)), "Son et al. 2019, table 1a; also in QPLEX and WQMIX"),
    "qplex_1": Payoff(((10.4, 0, 10), (0, 10, 10), (10, 10, 10)), "Wang et al. 2021, the code's matrix_game_1"),
    "qplex_3": Payoff(((8, -12, -12), (-12, 6, 0), (-12, 0, 6)), "Wang et al. 2021, the code's matrix_game_3"),
    "pymarl2": Payoff(((12, -0.1, -0.1), (-0.1, 0, 0), (-0.1, 0, 0)), "PyMARL2's default, which QMIX solves"),
    "pymarl2_hard": Payoff(((12, -12, -12), (-12, 0, 0), (-12, 0, 0)), "PyMARL2's first alternative"),
    "pymarl2_flat": Payoff(((12, 0, 10), (0, 0, 10), (10, 10, 10)), "PyMARL2's second alternative"),
    "qrelation": Payoff(((2.5, 0, -100), (0, 2, 0), (-100, 0, 3)), "QRelation's code"),
    "qrelation_7.9": _qrelation(7.9),
    "qrelation_7.99": _qrelation(7.99),
    "qrelation_7.999": _qrelation(7.999),
    "qrelation_9": _qrelation(9),
    "climbing": Payoff(
        ((11, -30, 0), (-30, 7, 0), (0, 6, 5)), f"{DYNAMICS}, the climbing game as in the collection matrix-games"
    ),
    "climbing_1998": Payoff(((11, -30, 0), (-30, 7, 6), (0, 0, 5)), f"{DYNAMICS}, the climbing game"),
    "penalty_0": _penalty(0),
    "penalty_25": _penalty(-25),
    "penalty_50": _penalty(-50),
    "penalty_75": _penalty(-75),
    "penalty_100": _penalty(-100),
    "two_step_a": Payoff(((7, 7), (7, 7)), "Rashid et al. 2018, the two-step game, state 2A"),
    "two_step_b": Payoff(((0, 1), (1, 8)), "Rashid et al. 2018, the two-step game, state 2B"),
    "two_state_1": Payoff(((10, 8, 5), (8, 6, 3), (5, 3, 0)), "QTRAN's code, the first of two states"),
    "two_state_2": Payoff(((0, 3, 5), (3, 6, 8), (5, 8, 10)), "QTRAN's code, the second of two states"),
}


def payoff_array(payoff: PayoffLike) -> NDArray[np.float32]:
    """The payoff of a name or of nested numbers, (A_1, ..., A_N), float32.

    >>> payoff_array("qtran").shape
    (3, 3)
    >>> payoff_array([[[1, 2]], [[3, 4]]]).shape  # three agents with two, one and two actions
    (2, 1, 2)
    >>> payoff_array("qtan")
    Traceback (most recent call last):
    marl.errors.SettingsError: there is no payoff 'qtan'; did you mean 'qtran'?
    """
    if isinstance(payoff, str):
        if payoff not in PAYOFFS:
            raise SettingsError(f"there is no payoff {payoff!r}; {suggestion(payoff, PAYOFFS)}")
        payoff = PAYOFFS[payoff].matrix
    if isinstance(payoff, torch.Tensor):
        payoff = payoff.numpy(force=True)
    try:
        array: NDArray[np.float32] = np.array(payoff, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{payoff!r} is no payoff; give numbers in rows of equal length") from error
    if array.ndim == 0 or array.size == 0:
        raise SettingsError(f"a payoff of shape {array.shape} has no actions; give a non-empty axis per agent")
    if not np.isfinite(array).all():
        raise SettingsError("a payoff has to be finite; found infinite or undefined numbers")
    return array


def stacked_payoffs(payoffs: Sequence[PayoffLike]) -> NDArray[np.float32]:
    """The payoffs (C, A_1, ..., A_N).

    >>> stacked_payoffs(["qtran", "two_step_a"])
    Traceback (most recent call last):
    marl.errors.SettingsError: payoffs of one game need one shape; found (3, 3) and (2, 2)
    """
    arrays = [payoff_array(payoff) for payoff in payoffs]
    shapes = dict.fromkeys(array.shape for array in arrays)
    if not arrays:
        raise SettingsError("a game needs at least one payoff; none was given")
    if len(shapes) > 1:
        raise SettingsError(f"payoffs of one game need one shape; found {' and '.join(map(str, shapes))}")
    return np.stack(arrays)
