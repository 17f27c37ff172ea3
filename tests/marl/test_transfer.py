"""Numbers about tasks in a row, on matrices that a reader can check on paper."""

from __future__ import annotations

import math

import numpy as np
import pytest

from marl.all_tasks import TaskReturn
from marl.records import Record
from marl.transfer import Matrix, area, gains, matrix_of, transfer_of

# Two games, and the first again. Rows: at the start, after a, after b, after the second a.
VALUES = np.array([[1.0, 2.0], [9.0, 3.0], [4.0, 8.0], [10.0, 6.0]])
BACK = Matrix(("a", "b", "a"), ("a", "b"), VALUES)


def test_forgetting_is_what_is_lost_until_the_game_comes_again_or_the_end() -> None:
    stays = transfer_of(BACK).stays
    assert [stay.forgotten for stay in stays[:2]] == [9 - 4, 8 - 6] and math.isnan(stays[2].forgotten)
    assert transfer_of(BACK).forgetting == 3.5


def test_forward_transfer_is_what_a_new_game_gains_from_those_before_it() -> None:
    stays = transfer_of(BACK).stays
    assert [math.isnan(stay.forward) for stay in stays] == [True, False, True]
    assert stays[1].forward == transfer_of(BACK).forward == 3 - 2


def test_average_and_backward_transfer_are_those_of_their_equations() -> None:
    found = transfer_of(BACK)
    assert found.average == (10 + 6) / 2
    assert found.backward == 6 - 8  # of b alone, as a was learned last
    three = np.array([[0, 0, 0], [5, 0, 0], [4, 7, 0], [2, 6, 9.0]])
    once = transfer_of(Matrix(("a", "b", "c"), ("a", "b", "c"), three))
    assert once.backward == ((2 - 5) + (6 - 7)) / 2 and once.average == pytest.approx(17 / 3)


def test_one_task_has_nothing_to_transfer() -> None:
    found = transfer_of(Matrix(("a",), ("a",), np.array([[1.0], [5.0]])))
    assert found.average == 5 and all(map(math.isnan, (found.backward, found.forward, found.forgetting)))


def test_areas_are_those_of_the_records_of_each_stay() -> None:
    records: list[Record] = [
        {"steps": 10, "place": 0, "test/return": 0.0},
        {"steps": 20, "place": 0, "test/return": 4.0},
        {"steps": 30, "place": 2, "test/return": 7.0},
    ]
    stays = transfer_of(BACK, records).stays
    assert (stays[0].area, stays[2].area) == (2.0, 7.0) and math.isnan(stays[1].area)
    assert area([(0, 0.0), (10, 10.0), (40, 10.0)]) == (5 * 10 + 10 * 30) / 40


def test_gains_are_over_fresh_networks_and_a_share_where_the_best_is_known() -> None:
    stays = transfer_of(BACK, [{"steps": 1, "place": 1, "test/return": 0.7}])
    assert gains(stays, {"b": 0.4}) == {1: pytest.approx(0.3)}
    assert gains(stays, {"b": 0.4}, best=1.0) == {1: pytest.approx(0.5)}
    assert gains(stays, {}) == {}


def test_the_matrix_holds_what_was_found_first_after_a_task_and_nothing_of_its_middle() -> None:
    found = [(0, 0, 1.0), (5, 0, 2.0), (9, 1, 3.0), (12, 1, 4.0)]
    returns = [TaskReturn(steps, ended, "a", value, 0.0) for steps, ended, value in found]
    assert matrix_of(returns, ["a", "b"]).values[:2, 0].tolist() == [1.0, 3.0]
    assert np.isnan(matrix_of(returns[1:], ["a"]).values[0, 0])  # evaluated too late to be the start
    assert np.isnan(matrix_of(returns, ["a"], of="win_rate").values).all()
