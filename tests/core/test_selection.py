from __future__ import annotations

import pytest

from neuronsurgery.criteria import Criterion, Dormant, Stagnant, Units
from neuronsurgery.errors import CriterionError
from neuronsurgery.scores import Scores, score
from neuronsurgery.selection import select
from tests.core_values import one_step, sites_of

SITES = sites_of(fc1=4, fc2=2)


def scores_by(criterion: Criterion) -> Scores:
    """Stagnant are units 0, 1 and 2 of fc1 (scores 0, 0.1, 0.2 and 3.7), none of fc2."""
    return score(SITES, one_step(SITES, fc1=[0, 0.1, 0.2, 3.7], fc2=[1, 1]), criterion)


def test_sites_without_a_chosen_unit_are_absent() -> None:
    selection = select(scores_by(Stagnant()))
    assert selection.units == {"fc1": (0, 1, 2)}
    assert selection.passed_over == {}
    assert selection.num_units == 3


def test_units_are_in_ascending_order() -> None:
    assert select(score(SITES, None, Units({"fc1": [3, 0, 2]}))).units == {"fc1": (0, 2, 3)}


@pytest.mark.parametrize(("age", "is_passed_over"), [(0, True), (99, True), (100, False), (101, False)])
def test_units_younger_than_the_cooldown_are_passed_over(age: int, is_passed_over: bool) -> None:
    selection = select(scores_by(Stagnant()), ages={"fc1": {1: age}}, cooldown=100)
    assert selection.units["fc1"] == ((0, 2) if is_passed_over else (0, 1, 2))
    assert selection.passed_over == ({"fc1": 1} if is_passed_over else {})


def test_young_units_that_were_not_chosen_are_not_counted() -> None:
    assert select(scores_by(Stagnant()), ages={"fc1": {3: 0}, "fc2": {0: 0}}).passed_over == {}


def test_site_whose_chosen_units_are_all_young_is_counted_and_absent() -> None:
    selection = select(scores_by(Stagnant()), ages={"fc1": {0: 0, 1: 0, 2: 0}})
    assert (selection.units, selection.passed_over) == ({}, {"fc1": 3})


def test_units_chosen_by_hand_know_no_cooldown() -> None:
    selection = select(score(SITES, None, Units({"fc1": [0]})), ages={"fc1": {0: 0}})
    assert (selection.units, selection.passed_over) == ({"fc1": (0,)}, {})


def test_not_does_not_bring_young_units_back() -> None:
    assert select(scores_by(~Stagnant()), ages={"fc1": {0: 0, 3: 0}}).units == {"fc2": (0, 1)}


def test_cooldown_of_zero_passes_over_nothing() -> None:
    assert select(scores_by(Stagnant()), ages={"fc1": {0: 0}}, cooldown=0).units == {"fc1": (0, 1, 2)}


def test_negative_cooldown_is_refused() -> None:
    with pytest.raises(CriterionError, match="cooldown is -1; it is a number of optimizer steps and must be >= 0"):
        select(scores_by(Stagnant()), cooldown=-1)


def test_selection_prints_as_a_table() -> None:
    lines = str(select(scores_by(Stagnant()), ages={"fc1": {2: 0}})).splitlines()
    assert lines[0] == "2 units selected by Stagnant(threshold=0.25, average='scores')"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    assert cells[0] == [
        "site",
        "units",
        "chosen",
        "share",
        "young passed over",
        "min score",
        "mean score of chosen",
    ]
    assert cells[2] == ["fc1", "4", "2", "50.0%", "1", "0", "0.05"]
    assert cells[3] == ["fc2", "2", "0", "0.0%", "0", "1", "-"]


def test_selection_prints_the_sites_that_could_not_be_scored() -> None:
    scores = score(SITES, one_step(SITES, fc1=[1, 1, 1, 1], fc2=[0, 0]), Stagnant() & ~Stagnant(0.1))
    assert str(select(scores)).splitlines()[-1] == "unscored: fc2: gradients are all zero"


def test_selection_by_hand_prints_without_scores() -> None:
    assert "| fc1  |     4 |      1 | 25.0% |" in str(select(score(SITES, None, Units({"fc1": [0]}))))


def test_selection_of_nothing_prints() -> None:
    assert str(select(score(sites_of(), None, Dormant()))) == "0 units selected by Dormant(threshold=0.025)"
