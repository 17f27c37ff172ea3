from __future__ import annotations

from typing import Any

import pytest

from neuronsurgery.plans import Plan
from neuronsurgery.reports import Report
from tests.core_values import sites_of

PLAN = Plan({"fc1": (0, 3), "fc2": (1,)}, {}, "Random(fraction=0.1, seed=None)", 4.0, (), sites_of(6, fc1=64, fc2=8))
DECLINED = {**{f"norm{index}": "no activation function" for index in range(9)}, "gate": "range-bearing"}


def report_with(**changes: Any) -> Report:
    fields = {
        "operation": 2,
        "operated": PLAN.units,
        "declined": {},
        "errors": {"fc1": 3e-8, "fc2": 0.0},
        "plan": PLAN,
        "parameters_before": 900,
        "parameters_after": 900,
        "notes": (),
        "verified": False,
        "model_error": None,
    }
    return Report(**{**fields, **changes})


def test_report_counts_units_and_finds_the_largest_error() -> None:
    assert (report_with().num_units, report_with().max_error) == (3, 3e-8)


@pytest.mark.parametrize(("model_error", "expected"), [(1e-6, 1e-6), (1e-9, 3e-8), (None, 3e-8)])
def test_largest_error_includes_that_of_the_whole_model(model_error: float | None, expected: float) -> None:
    assert report_with(model_error=model_error).max_error == expected


def test_report_of_nothing_has_no_error() -> None:
    report = report_with(operated={}, errors={})
    assert (report.num_units, report.max_error) == (0, 0.0)


def test_report_prints_as_a_table() -> None:
    lines = str(report_with()).splitlines()
    assert lines[0] == "Operation 2: 3 units operated on, chosen by Random(fraction=0.1, seed=None)"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:5]]
    assert cells[0] == [
        "site",
        "activation_fn",
        "units operated / units",
        "frozen rows after",
        "relative error",
    ]
    assert cells[2] == ["fc1", "relu", "2 / 64", "10", "3e-08"]
    assert cells[3] == ["fc2", "relu", "1 / 8", "8", "0"]
    assert lines[5] == "parameters: 900 before, 900 after"


def test_report_says_that_the_trace_is_unverified() -> None:
    assert "trace: unverified (pass verify=batch to compare the whole model)" in str(report_with())


def test_report_says_how_well_the_whole_model_agreed() -> None:
    text = str(report_with(verified=True, model_error=1.25e-7))
    assert "trace: verified on a batch, relative error 1.25e-07" in text


def test_report_prints_its_notes() -> None:
    assert "fc1: drawn anew" in str(report_with(notes=("fc1: drawn anew",))).splitlines()


def test_report_groups_the_declined_that_share_a_reason() -> None:
    lines = str(report_with(declined=DECLINED)).splitlines()
    assert lines[-2:] == [
        "declined: norm0, norm1, norm2, norm3, norm4, norm5 and 3 more: no activation function",
        "declined: gate: range-bearing",
    ]


def test_wide_tables_fold_long_names_and_lose_nothing() -> None:
    name = ".".join(["encoder"] * 20)
    widths: dict[str, Any] = {name: 4}
    plan = Plan({name: (0,)}, {}, "Random(fraction=0.1)", 4.0, (), sites_of(**widths))
    text = str(report_with(plan=plan, operated=plan.units, errors={name: 0.0}))
    assert max(map(len, text.splitlines())) <= 110
    column = "".join(line.strip("|").split("|")[0].strip() for line in text.splitlines() if line.startswith("|"))
    assert name in column
