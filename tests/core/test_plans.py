from __future__ import annotations

import pytest

from neuronsurgery.criteria import Criterion, Stagnant, Units
from neuronsurgery.errors import PlanError
from neuronsurgery.plans import Plan, plan
from neuronsurgery.scores import score
from neuronsurgery.selection import Selection, select
from tests.core_values import one_step, sites_of


def selected(num_frozen: int, criterion: Criterion | None = None) -> Selection:
    """Stagnant are units 0, 1 and 2 of fc1, with scores 0.2, 0, 0.1."""
    sites = sites_of(num_frozen, fc1=4)
    return select(score(sites, one_step(sites, fc1=[0.2, 0, 0.1, 3.7]), criterion or Stagnant()))


def test_empty_selection_gives_an_empty_plan() -> None:
    made = plan(select(score(sites_of(fc1=4), None, Units({}))))
    assert (made.units, made.declined, made.notes, made.num_units) == ({}, {}, (), 0)


def test_plan_takes_every_selected_unit_where_there_is_room() -> None:
    made = plan(selected(0))
    assert (made.units, made.num_units) == ({"fc1": (0, 1, 2)}, 3)
    assert (made.declined, made.notes) == ({}, ())
    assert made.max_growth == 4.0
    assert made.criterion == "Stagnant(threshold=0.25, average='scores')"


def test_plan_keeps_the_lowest_scores_where_room_is_short() -> None:
    # 4 units, 16 rows allowed: with 12 live rows 2 more units fit, units 1 and 2
    made = plan(selected(12))
    assert made.units == {"fc1": (1, 2)}
    assert made.notes == ("fc1: 1 of 3 selected units stay out: max_growth=4.0 allows 16 frozen rows, 12 are live",)
    assert made.declined == {}


def test_plan_keeps_the_first_units_where_there_are_no_scores() -> None:
    assert plan(selected(12, Units({"fc1": [3, 2, 0]}))).units == {"fc1": (0, 2)}


@pytest.mark.parametrize("num_frozen", [15, 16, 20])
def test_site_without_room_is_declined(num_frozen: int) -> None:
    made = plan(selected(num_frozen))
    assert made.units == {}
    assert made.notes == ()
    assert made.declined["fc1"].startswith(
        f"3 of 3 selected units stay out: max_growth=4.0 allows 16 frozen rows, {num_frozen} are live; "
    )


@pytest.mark.parametrize(("max_growth", "num_units"), [(0.5, 1), (0.4, 0), (1.0, 2), (1.5, 3), (100, 3)])
def test_frozen_rows_never_exceed_the_bound(max_growth: float, num_units: int) -> None:
    made = plan(selected(0), max_growth=max_growth)
    assert made.num_units == num_units
    assert 2 * made.num_units <= max_growth * 4


def test_plan_declines_what_is_no_site_or_has_no_scores() -> None:
    sites = sites_of(fc1=2, fc2=2, declined={"head": "no activation function behind it"})
    made = plan(select(score(sites, one_step(sites, fc1=[0, 0], fc2=[0, 1]), Stagnant())))
    assert made.units == {"fc2": (0,)}
    assert made.declined == {"head": "no activation function behind it", "fc1": "gradients are all zero"}


def test_plan_tells_how_many_young_units_were_passed_over() -> None:
    sites = sites_of(fc1=4)
    scores = score(sites, one_step(sites, fc1=[0, 0, 0, 1]), Stagnant())
    assert plan(select(scores, ages={"fc1": {0: 1, 2: 3}})).notes == ("fc1: 2 young units passed over",)


@pytest.mark.parametrize("max_growth", [0, -1.0, float("inf"), float("nan")])
def test_max_growth_must_be_finite_and_positive(max_growth: float) -> None:
    with pytest.raises(PlanError, match=f"max_growth is {max_growth}; .* must be finite and > 0"):
        plan(selected(0), max_growth=max_growth)


def test_plan_prints_as_a_table() -> None:
    lines = str(plan(selected(12))).splitlines()
    assert lines[0] == "Plan: operate on 2 units chosen by Stagnant(threshold=0.25, average='scores')"
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == [
        "fc1",
        "relu",
        "1, 2",
        "4",
        "12",
        "16",
        "16",
    ]
    assert lines[4] == "fc1: 1 of 3 selected units stay out: max_growth=4.0 allows 16 frozen rows, 12 are live"


def test_empty_plan_prints_without_a_table() -> None:
    made = Plan({}, {"head": "no activation"}, "Units(units={})", 4.0, (), sites_of(fc1=4))
    assert str(made).splitlines() == [
        "Plan: operate on 0 units chosen by Units(units={})",
        "declined: head: no activation",
    ]
