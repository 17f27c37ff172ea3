"""The page of situations says what the markers on the tests say, and every row has a test.

Nothing is run here: markers are collected, from the test files in which the word stands at all.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import situations
from benchmarks.situations import GROUPS, PAGE, Collector, Outcomes, Situation, SituationError, page, problems

ROOT = Path(__file__).parents[1]
WORKS = Situation("Optimizers", "Adam, fused", "works", "tests/pytorch/test_optimizers.py", "test_fused")


def marked_files() -> list[str]:
    found = (path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))
    return sorted(str(path.relative_to(ROOT)) for path in found if "situation(" in path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def collected() -> str:
    """The page as the markers have it now, collected in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.situations", "--print", *marked_files()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # names groups and outcomes that there are not
    return done.stdout


def test_the_page_says_what_the_markers_say(collected: str) -> None:
    assert PAGE.read_text(encoding="utf-8") == collected, "run `make situations`"


def test_every_row_of_the_page_has_a_test_and_the_groups_stand_in_order(collected: str) -> None:
    rows = [line.strip("| ").split(" | ") for line in collected.splitlines() if line.startswith("| ")][1:]
    assert rows and all("`test_" in row[-1] for row in rows)
    headings = [row[0].strip("*") for row in rows if row[0].startswith("**")]
    assert headings == [group for group in GROUPS if group in headings]


# -- the parts of it -------------------------------------------------------------------------------------------------


def test_a_situation_that_several_tests_cover_is_one_row_with_each_of_them_once() -> None:
    other = Situation("Optimizers", "Adam, Fused", "works", "tests/pytorch/test_precision.py", "test_amp", is_slow=True)
    assert page([WORKS, WORKS, other]).splitlines()[-1] == (
        "| **Optimizers** | Adam, fused | works | test_optimizers.py: `test_fused`; test_precision.py: "
        "`test_amp` (slow) |"
    )


def test_a_test_is_slow_on_the_page_if_all_of_its_cases_are() -> None:
    slow = dataclasses.replace(WORKS, is_slow=True)
    assert "`test_fused` (slow)" in page([slow, slow])
    assert "`test_fused` |" in page([slow, WORKS]) and "`test_fused` |" in page([WORKS, slow])


def test_groups_stand_in_their_order_and_rows_in_that_of_the_alphabet() -> None:
    def named(group: str, what: str) -> Situation:
        return Situation(group, what, "refused", "tests/test_a.py", "test_x")

    shown = page([named("Checks", "b"), named("Precision", "z"), named("Checks", "a|c"), named("Precision", "y")])
    assert [line.split(" | ")[:2] for line in shown.splitlines()[-4:]] == [
        ["| **Precision**", "y"],
        ["| ", "z"],
        ["| **Checks**", "a\\|c"],
        ["| ", "b"],
    ]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Situation("Optimisers", "Adam", "works", "f.py", "test_x"), "no group is called 'Optimisers'"),
        (Situation("Checks", "Adam", "fails", "f.py", "test_x"), "no outcome is called 'fails'"),
        (Situation("Optimizers", "adam, FUSED", "refused", "f.py", "test_x"), "'adam, fused' is both"),
    ],
)
def test_what_no_page_can_be_made_of_is_named(wrong: Situation, said: str) -> None:
    assert problems([WORKS]) == []
    (problem,) = problems([WORKS, wrong])
    assert said in problem
    with pytest.raises(SituationError, match=said):
        page([WORKS, wrong])


def test_a_marker_without_three_words_is_named_with_its_test(request: pytest.FixtureRequest) -> None:
    item: Any = request.node
    with pytest.raises(SituationError, match=r"test_a_marker_without_three_words.*GROUP, WHAT and OUTCOME"):
        situations.situation_of(item, pytest.mark.situation("Checks", "two").mark)


def test_parameters_are_no_part_of_a_tests_name_and_every_marker_counts() -> None:
    markers = [pytest.mark.situation("Checks", word, "works").mark for word in ("near", "far")]
    item = SimpleNamespace(
        nodeid="tests/test_a.py::test_x[a::b]",
        iter_markers=lambda name: iter(markers),
        get_closest_marker=lambda name: None,
    )
    collector, session = Collector(), SimpleNamespace(items=[item])
    collector.pytest_collection_finish(session)  # type: ignore[arg-type]
    assert [(each.what, each.test) for each in collector.found] == [("near", "test_x"), ("far", "test_x")]


@pytest.mark.parametrize("outcome", ["failed", "skipped"])
def test_nothing_is_written_unless_every_test_passed(
    outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: list[str], plugins: list[Outcomes]) -> int:
        assert "situation and not slow" in arguments
        for name, result in (("a", "passed"), ("b", what)):
            report = SimpleNamespace(nodeid=name, outcome=result, passed=result == "passed", when="call")
            plugins[0].pytest_runtest_logreport(report)
        return int(what == "failed")

    monkeypatch.setattr(situations, "PAGE", tmp_path / "situations.md")
    monkeypatch.setattr(pytest, "main", run)
    what = outcome
    assert situations.run_and_write("text", "1", False) == 1 and not (tmp_path / "situations.md").exists()
    assert f"b: {outcome}" in capsys.readouterr().err
    what = "passed"
    assert situations.run_and_write("text", "1", False) == 0
    assert (tmp_path / "situations.md").read_text(encoding="utf-8") == "text"
