from __future__ import annotations

import copy
import json
import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from neuronsurgery.choosing import Selected
from neuronsurgery.criteria import Custom, Dormant, GraMa, Lowest, Random, Stagnant, Units
from neuronsurgery.errors import CriterionError, FormatError, SurgeryError
from neuronsurgery.plans import Plan, plan
from neuronsurgery.reports import Report
from neuronsurgery.scores import Scores, score
from neuronsurgery.selection import Selection, select
from neuronsurgery.sites import Site, Sites
from neuronsurgery.values import FrozenMapping, Value, freeze
from tests.core_values import one_step, sites_of

SITES = sites_of(fc1=4, fc2=3, declined={"head": "no activation function behind it"})
SCORES = score(SITES, one_step(SITES, fc1=[0.1, 1, 1, 1.9], fc2=[0, 0, 0]), Stagnant() | Lowest(0.5))
SELECTION = select(SCORES, ages={"fc1": {0: 5}})
PLAN = plan(SELECTION, max_growth=0.5)
REPORT = Report(
    operation=3,
    operated={"fc1": (1,)},
    declined=PLAN.declined,
    errors={"fc1": 2e-7},
    plan=PLAN,
    parameters_before=40,
    parameters_after=40,
    notes=("drawn by reset_parameters",),
    verified=True,
    model_error=1e-7,
)
CRITERIA = [
    Stagnant(0.5, average="ua"),
    Stagnant(bias=True),
    Dormant(0.0),
    GraMa(1.0),
    Lowest(0.25, of=GraMa(0.5)),
    Lowest(0.25, of="dormant"),
    Random(0.5),
    Random(0.5, seed=3),
    Units({"fc1": [0, 3], "fc2": []}),
    Selected("Stagnant(0.25)", {"fc1": (1,)}, {"fc1": {"stagnant": (1.5, 0.5)}}),
    (Stagnant() & ~Dormant()) | Random(0.1, seed=1) & Units({"fc1": [1]}),
]
STAGES = [SITES["fc1"], SITES, SCORES, SELECTION, PLAN, REPORT]


@pytest.mark.parametrize("value", [*STAGES, *CRITERIA], ids=lambda value: type(value).__name__)
def test_json_round_trip_gives_an_equal_value(value: Value) -> None:
    text = value.to_json()
    assert type(value).from_json(text) == value
    assert type(value).from_json(text).to_json() == text


@pytest.mark.parametrize("value", [*STAGES, *CRITERIA], ids=lambda value: type(value).__name__)
def test_copies_and_pickles_are_equal(value: Value) -> None:
    assert copy.deepcopy(value) == value
    assert copy.copy(value) == value
    assert pickle.loads(pickle.dumps(value)) == value


def test_values_that_differ_deep_inside_are_not_equal() -> None:
    other = Report(**{**vars(REPORT), "plan": plan(SELECTION, max_growth=1.0)})
    assert other != REPORT


def test_json_keeps_the_order_of_the_sites() -> None:
    sites = sites_of(b=2, a=2)
    assert list(Sites.from_json(sites.to_json())) == ["b", "a"]


def test_json_names_its_format_and_its_value() -> None:
    data = json.loads(PLAN.to_json())
    assert (data["format"], data["value"]) == (1, "Plan")


def test_json_of_a_newer_format_asks_for_an_upgrade() -> None:
    text = PLAN.to_json().replace('"format": 1', '"format": 2')
    message = "this Plan was written in format 2; this version reads formats up to 1: upgrade neuronsurgery"
    with pytest.raises(FormatError, match=message):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SITES.to_json(), r"a Plan was asked for; the text holds a Sites: pass what Plan\.to_json\(\) wrote"),
        ("[]", "a Plan was asked for; the text holds no value of this package"),
        ("{", "a Plan was asked for; the text is no JSON"),
        ('{"format": 1, "value": "Plan"}', "a Plan has the fields .*; the text has \\[\\]"),
    ],
)
def test_text_that_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        Plan.from_json(text)


def test_text_of_another_criterion_is_refused() -> None:
    with pytest.raises(FormatError, match="a GraMa was asked for; the text holds a Dormant"):
        GraMa.from_json(Dormant().to_json())


def test_text_of_an_unknown_criterion_offers_near_names() -> None:
    with pytest.raises(FormatError, match="no criterion is named 'dorment': did you mean 'dormant'"):
        Dormant.from_json(Dormant().to_json().replace('"dormant"', '"dorment"'))


def test_criterion_that_holds_a_function_has_no_json_form() -> None:
    scores = score(sites_of(fc1=2), None, Custom(lambda scores: {}))
    with pytest.raises(CriterionError, match="has no JSON form, because it holds a function"):
        scores.to_json()


def test_plan_chosen_by_a_function_has_a_json_form() -> None:
    made = plan(select(score(sites_of(fc1=2), None, Custom(lambda scores: {"fc1": [True, False]}))))
    assert Plan.from_json(made.to_json()) == made


@pytest.mark.parametrize("cls", [Scores, Selection, Report])
def test_every_stage_names_itself_in_errors(cls: type[Value]) -> None:
    with pytest.raises(SurgeryError, match=f"a {cls.__name__} was asked for"):
        cls.from_json("nothing")


def test_fields_cannot_be_assigned() -> None:
    with pytest.raises(FrozenInstanceError):
        PLAN.max_growth = 2.0  # type: ignore[misc]


def test_mappings_of_a_value_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        PLAN.units["fc1"] = ()  # type: ignore[index]


def test_value_does_not_follow_the_dict_it_was_built_from() -> None:
    sites = {"fc1": SITES["fc1"]}
    value = Sites(sites)
    sites["fc2"] = SITES["fc2"]
    assert list(value) == ["fc1"]


def test_frozen_mapping_equals_a_dict_and_prints_like_one() -> None:
    mapping = FrozenMapping({"fc1": (0, 3)})
    assert mapping == {"fc1": (0, 3)}
    assert repr(mapping) == "{'fc1': (0, 3)}"


def test_numpy_scalars_in_values_become_plain_numbers() -> None:
    frozen = freeze({"fc1": [np.int64(3), np.float32(0.5)]})
    assert [type(one) for one in frozen["fc1"]] == [int, float]


def test_site_prints_as_a_table() -> None:
    assert "| fc1  |       | Linear   | relu          |     4 |           0 |" in str(SITES["fc1"])


def test_site_is_found_by_name() -> None:
    assert SITES["fc1"] == Site("fc1", "", "Linear", "relu", 4)
