"""The situations of a training run in which operating is tested: `docs/situations.md`, run and written anew.

    python -m benchmarks.situations [--slow] [-n 2]     (or: make situations)

Tests carry the marker `situation(GROUP, WHAT, OUTCOME)`. The command runs exactly those and writes the page only if
every one of them passed; a skip is no pass. With `--print` it runs nothing and prints what the page should be, which
`tests/test_situations.py` compares with the page.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

__all__ = ["GROUPS", "OUTCOMES", "PAGE", "Situation", "SituationError", "collect", "page", "problems"]

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "situations.md"
MARKER = "situation"

GROUPS = (
    "Optimizers",
    "Schedules and wrappers",
    "Precision",
    "Compile and export",
    "Checkpoints and copies",
    "Replicas",
    "When to operate",
    "Checks",
)
"""The page's headings, in order."""

OUTCOMES = {"works": "works", "refused": "refused, with a clear error"}
"""What may come out, and the words for it on the page."""

INTRODUCTION = """\
# Situations

Where in a training run units can be operated on, and what is around the model then. Each row is a claim; the tests
beside it are what holds it. `make situations` runs them all and writes this page, which it does only if every one
passes; those marked *slow* run with `--slow`. **Works**: the operation is carried out and what is around the model goes
on as if nothing had happened. **Refused**: nothing changes, and the error says what to do.
"""


class SituationError(ValueError):
    """Markers that no page can be made of, or tests that cannot be collected."""


@dataclass(frozen=True)
class Situation:
    """One marker on one test."""

    group: str
    what: str
    outcome: str
    file: str
    test: str
    is_slow: bool = False


# -- collecting ------------------------------------------------------------------------------------------------------


def collect(paths: Sequence[str] = ()) -> list[Situation]:
    """Every marker that the tests carry, in the order of the tests; `paths` are files to look at alone.

    Raises:
        SituationError: a file cannot be collected, or a marker has not three words.
    """
    collector, output = Collector(), io.StringIO()
    with contextlib.redirect_stdout(output):
        status = pytest.main(["--collect-only", "-q", "-m", MARKER, "-p", "no:xdist", *paths], plugins=[collector])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SituationError(f"the tests cannot be collected:\n{output.getvalue()}")
    return collector.found


class Collector:
    """A pytest plugin that notes the markers of what is collected."""

    def __init__(self) -> None:
        self.found: list[Situation] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """All that is left of the collection when the expression of `-m` has been applied."""
        for item in session.items:
            for marker in item.iter_markers(MARKER):
                self.found.append(situation_of(item, marker))


def situation_of(item: pytest.Item, marker: pytest.Mark) -> Situation:
    """What a marker says, with the test that carries it: without the parameters of the test."""
    if len(marker.args) != 3 or marker.kwargs or not all(isinstance(word, str) for word in marker.args):
        raise SituationError(f"{item.nodeid}: situation takes GROUP, WHAT and OUTCOME, three strings: {marker}")
    file, *names = item.nodeid.partition("[")[0].split("::")
    return Situation(
        *marker.args, file=file, test="::".join(names), is_slow=item.get_closest_marker("slow") is not None
    )


def problems(found: Iterable[Situation]) -> list[str]:
    """What is wrong with markers: unknown groups or outcomes, and one situation with two outcomes."""
    situations = list(found)
    wrong = [
        f"{each.file}::{each.test}: no {kind} is called {name!r}; there are: {', '.join(known)}"
        for each in situations
        for kind, name, known in (("group", each.group, GROUPS), ("outcome", each.outcome, tuple(OUTCOMES)))
        if name not in known
    ]
    outcomes: dict[tuple[str, str], set[str]] = {}
    for each in situations:
        outcomes.setdefault((each.group, each.what.lower()), set()).add(each.outcome)
    both = [
        f"{group}, {what!r} is both: say in its words what differs"
        for (group, what), o in outcomes.items()
        if len(o) > 1
    ]
    return list(dict.fromkeys([*wrong, *both]))


# -- the page --------------------------------------------------------------------------------------------------------


def page(found: Iterable[Situation]) -> str:
    """The page that shows these situations, grouped.

    Raises:
        SituationError: some of them are invalid.
    """
    situations = list(found)
    if wrong := problems(situations):
        raise SituationError("\n".join(wrong))
    return "\n".join(lines(situations)) + "\n"


def lines(situations: Sequence[Situation]) -> Iterator[str]:
    """The lines of the page: one table, in which a group's name stands before its first row."""
    yield INTRODUCTION
    yield "| | situation | outcome | tests |"
    yield "|---|---|---|---|"
    for group in GROUPS:
        rows: dict[str, list[Situation]] = {}
        for each in situations:
            if each.group == group:
                rows.setdefault(each.what.lower(), []).append(each)
        for index, (_, same) in enumerate(sorted(rows.items())):
            heading = f"**{group}**" if index == 0 else ""
            yield f"| {heading} | {cell(same[0].what)} | {OUTCOMES[same[0].outcome]} | {tests_of(same)} |"


def tests_of(same: Sequence[Situation]) -> str:
    """The names of the tests of one row, each once, by file; slow is one of which every case is."""
    by_file: dict[str, dict[str, bool]] = {}
    for each in same:
        tests = by_file.setdefault(each.file, {})
        tests[each.test] = tests.get(each.test, True) and each.is_slow
    named = {file: [f"`{test}`{' (slow)' * slow}" for test, slow in tests.items()] for file, tests in by_file.items()}
    return "; ".join(f"{Path(file).name}: {', '.join(names)}" for file, names in sorted(named.items()))


def cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|")


# -- the command -----------------------------------------------------------------------------------------------------


@dataclass
class Outcomes:
    """A pytest plugin that notes which tests ran, and what did not pass."""

    passed: set[str] = field(default_factory=set)
    others: dict[str, str] = field(default_factory=dict)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A phase of a test is over; with several processes the first of them hears of it."""
        if not report.passed:
            self.others[report.nodeid] = report.outcome
        elif report.when == "call":
            self.passed.add(report.nodeid)


def main() -> int:
    """Run the marked tests and write the page; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.situations")
    parser.add_argument("--slow", action="store_true", help="run the tests that are marked slow as well")
    parser.add_argument("--print", action="store_true", dest="is_printed", help="run nothing, print the page")
    parser.add_argument("-n", default="2", help="how many processes run the tests")
    parser.add_argument("paths", nargs="*", help="with --print: the only test files to look at")
    arguments = parser.parse_args()
    try:
        text = page(collect(arguments.paths))
    except SituationError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if arguments.is_printed:
        sys.stdout.write(text)
        return 0
    return run_and_write(text, arguments.n, arguments.slow)


def run_and_write(text: str, processes: str, is_slow: bool) -> int:
    """Run the tests; write the page if all passed."""
    outcomes = Outcomes()
    expression = MARKER if is_slow else f"{MARKER} and not slow"
    status = pytest.main(["-q", "-n", processes, "-m", expression], plugins=[outcomes])
    if status != pytest.ExitCode.OK or outcomes.others or not outcomes.passed:
        failed = "".join(f"  {name}: {outcome}\n" for name, outcome in outcomes.others.items())
        sys.stderr.write(f"nothing was written: not every situation passed\n{failed}")
        return int(status) or 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
