"""How well tasks in a row are learned, kept and helped by each other, as numbers.

All of them come from one matrix: the mean return (or the share of episodes won) on each game before the first task and
after each. With k = 0 ... K for how many tasks have ended, and g for a game, `R[k, g]` is its entry; the task at place
i, counted from 0, is learned between `R[i]` and `R[i + 1]`. A game that comes again has several *stays*.

Sources: average, backward and forward transfer are equations 2 to 4 of Lopez-Paz and Ranzato 2017 ("Gradient episodic
memory"); forgetting, and what a task gains over fresh networks by the areas under the curves, are those of Wolczyk et
al. 2021 ("Continual World"). They know no games that come again: what we do there is said below.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from marl.all_tasks import TaskReturn
from marl.records import Record

__all__ = ["Matrix", "Stay", "Transfer", "area", "gains", "matrix_of", "transfer_of"]

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Matrix:
    """Returns (or shares of wins) on each game, by how many tasks have ended."""

    tasks: tuple[str, ...]
    """The name of the game at each place of the sequence (K,)."""
    games: tuple[str, ...]
    """Each name once (G,)."""
    values: NDArray[np.float64]
    """(K + 1, G); not a number where nothing was evaluated."""

    def at(self, num_ended: int, game: str) -> float:
        """The entry of a game after so many tasks."""
        return float(self.values[num_ended, self.games.index(game)])


@dataclass(frozen=True)
class Stay:
    """What came of learning one task. What cannot be said, such as the forgetting of the last task, is not a number."""

    place: int
    """Place i of the task in the sequence, from 0."""
    task: str
    """The name g of the game."""
    before: float
    """R[i, g]: at its beginning."""
    end: float
    """R[i + 1, g]: at its end."""
    area: float
    """Mean over the task's steps of the return in its evaluations: the area under the curve, by trapezoids."""
    forward: float
    """R[i, g] - R[0, g]: what others had taught for it; of a game's first stay, and not of the first task."""
    forgotten: float
    """R[i + 1, g] - R[e, g]: what was lost without it; e is when the same game is about to come again, or the end."""


@dataclass(frozen=True)
class Transfer:
    """What came of a sequence; means leave out what cannot be said."""

    stays: tuple[Stay, ...]
    """Each task."""
    average: float
    """Mean of R[K, g] over all games."""
    backward: float
    """Mean of R[K, g] - R[i + 1, g] over the games that were not learned last, with i of the first stay; negative where
    games were forgotten."""
    forward: float
    """Mean over the stays that have it."""
    forgetting: float
    """Mean over the stays that have it."""


def matrix_of(
    returns: Sequence[TaskReturn], tasks: Sequence[str], *, of: Literal["mean_return", "win_rate"] = "mean_return"
) -> Matrix:
    """The matrix of what was measured in a run with these tasks (K,).

    >>> returns = [TaskReturn(0, 0, "a", 1.0, 0.0), TaskReturn(9, 1, "a", 5.0, 0.0), TaskReturn(12, 1, "a", 4.0, 0.0)]
    >>> matrix_of(returns, ["a"]).values.tolist()
    [[1.0], [5.0]]
    """
    games = tuple(dict.fromkeys(tasks))
    values = np.full((len(tasks) + 1, len(games)), np.nan)
    for each in sorted(returns, key=lambda each: -each.steps):  # of several in the middle of a task the first counts
        found = getattr(each, of)
        if found is not None and (each.num_finished or not each.steps):
            values[each.num_finished, games.index(each.task)] = found
    return Matrix(tuple(tasks), games, values)


def transfer_of(matrix: Matrix, records: Sequence[Record] = (), *, column: str = "test/return") -> Transfer:
    """All numbers of a run; `records` are the rows of its log, of which a column gives the areas under the curves.

    >>> values = np.array([[0.0, 0.0], [4.0, 1.0], [3.0, 6.0]])
    >>> found = transfer_of(Matrix(("a", "b"), ("a", "b"), values))
    >>> found.average, found.backward, found.forward, found.forgetting
    (4.5, -1.0, 1.0, 1.0)
    """
    stays = tuple(_stay(matrix, place, records, column) for place in range(len(matrix.tasks)))
    last = len(matrix.tasks)
    ends = {game: matrix.at(last, game) for game in matrix.games}
    backward = [ends[game] - matrix.at(_first(matrix, game) + 1, game) for game in matrix.games]
    learned_last = matrix.games.index(matrix.tasks[-1])
    return Transfer(
        stays,
        average=_mean(ends.values()),
        backward=_mean(backward[:learned_last] + backward[learned_last + 1 :]),
        forward=_mean(stay.forward for stay in stays),
        forgetting=_mean(stay.forgotten for stay in stays),
    )


def gains(transfer: Transfer, references: Mapping[str, float], *, best: float | None = None) -> dict[int, float]:
    """What each first stay gained over fresh networks, whose areas under the curve on the same games are given.

    With the best that can be reached, as a share of what they left to be gained: (area - reference) / (best -
    reference), where 1 is the best share of wins; without it the difference of the areas.

    >>> stay = Stay(1, "b", 0.0, 0.0, area=0.7, forward=0.0, forgotten=0.0)
    >>> round(gains(Transfer((stay,), 0.0, 0.0, 0.0, 0.0), {"b": 0.4}, best=1.0)[1], 3)
    0.5
    """
    found = {}
    for stay in {each.task: each for each in reversed(transfer.stays)}.values():
        if stay.task in references:
            reference = references[stay.task]
            scale = 1.0 if best is None else best - reference
            found[stay.place] = (stay.area - reference) / scale if scale else float("nan")
    return dict(sorted(found.items()))


def area(points: Points) -> float:
    """The mean height of a curve through points (x, y) in the order of x, by the trapezoidal rule.

    >>> area([(0, 0.0), (10, 4.0), (30, 4.0)])
    3.3333333333333335
    """
    if len(points) < 2 or points[-1][0] == points[0][0]:
        return points[-1][1] if points else float("nan")
    steps, heights = (np.array(each, dtype=np.float64) for each in zip(*points, strict=True))
    return float((np.diff(steps) * (heights[1:] + heights[:-1]) / 2).sum() / (steps[-1] - steps[0]))


def _stay(matrix: Matrix, place: int, records: Sequence[Record], column: str) -> Stay:
    game, left = matrix.tasks[place], _left_at(matrix, place)
    before, end = matrix.at(place, game), matrix.at(place + 1, game)
    is_new = 0 < place == _first(matrix, game)
    return Stay(
        place,
        game,
        before,
        end,
        area=area(list(_curve(records, place, column))),
        forward=before - matrix.at(0, game) if is_new else float("nan"),
        forgotten=end - matrix.at(left, game) if left > place + 1 else float("nan"),
    )


def _first(matrix: Matrix, game: str) -> int:
    return matrix.tasks.index(game)


def _left_at(matrix: Matrix, place: int) -> int:
    """How many tasks have ended when the game of a place comes again, or at the end."""
    later = matrix.tasks[place + 1 :]
    game = matrix.tasks[place]
    return place + 1 + (later.index(game) if game in later else len(later))


def _curve(records: Sequence[Record], place: int, column: str) -> Iterator[tuple[float, float]]:
    for record in records:
        if record.get("place") == place and column in record:
            yield float(record["steps"]), float(record[column])


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
