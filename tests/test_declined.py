"""The page on declined layers lists every reason that the library can give, and none that it cannot.

Reasons are found in the source: the sentences among the string literals of the files that judge a producer. What stands
in braces in the code, and for `...` on the page, can be anything.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "how-to" / "declined.md"
REFERENCE = ROOT / "docs" / "reference.md"
BACKEND = ROOT / "neuronsurgery" / "pytorch"
# Where a text is a reason for declining if it is not an error that a call raises.
JUDGING = (
    *("following", "recognition", "producers", "survey", "lookahead", "leftovers", "chains", "fused"),
    *("tracing", "mirroring", "ambient", "outside", "scalars", "computing", "computed_calls", "computed_modules"),
)
# Sentences that are parts of others: what enters a pair of brackets, and the label of a thing that may have changed.
PARTS = frozenset({"spectral norm", "an orthogonal parametrization", "the hooks of all modules", ", which X"})


def texts_of(source: str) -> Iterator[tuple[ast.AST, str]]:
    """Every string literal that is no docstring, with X for what is put into it."""
    tree = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node, "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | inner:
            yield node, node.value


def reasons_of(source: str) -> list[str]:
    """The sentences of a file that are reasons: not those of an error, and no list of words."""
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        is_list = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "split"
        if is_list or isinstance(node, ast.Assert) or (isinstance(node, ast.Raise) and raises_an_error(node)):
            skipped |= {place(part) for part in ast.walk(node) if isinstance(part, ast.expr)}
    found = [text for node, text in texts_of(source) if place(node) not in skipped]
    return [text for text in found if " " in text.strip() and text not in PARTS]


def place(node: ast.AST) -> int:
    return getattr(node, "lineno", 0) * 1000 + getattr(node, "col_offset", 0)


def raises_an_error(node: ast.Raise) -> bool:
    """Whether what is raised goes to the user as it is; an Impurity and its like become reasons."""
    function = node.exc.func if isinstance(node.exc, ast.Call) else None
    return isinstance(function, ast.Name) and function.id in ("SurgeryError", "ValueError", "IndexError")


def rows_of(page: str) -> list[str]:
    """The texts in the first cells of the page's tables, and those in sentences of their own that begin a line."""
    cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith(("| `", "`"))]
    return [text for cell in cells for text in re.findall(r"`([^`]+)`", cell) if text != "..."]


def pattern(row: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, row.split("..."))), re.DOTALL)


def without_row(reasons: Iterable[str], rows: Iterable[str]) -> list[str]:
    patterns = [pattern(row) for row in rows]
    return [reason for reason in reasons if not any(each.fullmatch(reason) for each in patterns)]


def page_rows() -> list[str]:
    return rows_of(PAGE.read_text(encoding="utf-8").partition("## Every reason")[2])


@pytest.mark.parametrize("name", JUDGING)
def test_every_reason_of_the_library_is_on_the_page(name: str) -> None:
    assert without_row(reasons_of((BACKEND / f"{name}.py").read_text(encoding="utf-8")), page_rows()) == []


def test_every_reason_on_the_page_is_one_of_the_library() -> None:
    assert made_up(page_rows()) == []


def test_every_error_of_a_call_in_the_reference_is_one_of_the_library() -> None:
    section = REFERENCE.read_text(encoding="utf-8").partition("### Known only when called")[2].partition("\n## ")[0]
    rows = rows_of(section)
    assert len(rows) > 5
    assert made_up(rows) == []
    assert made_up(["no such error"]) == ["no such error"]


def made_up(rows: Iterable[str]) -> list[str]:
    sources = [path.read_text(encoding="utf-8") for path in BACKEND.glob("*.py")]
    texts = [text for source in sources for _, text in texts_of(source)]
    return [row for row in rows if not any(pattern(row).fullmatch(text) for text in texts)]


def test_links_of_the_page_lead_to_its_headings() -> None:
    page = PAGE.read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    assert sorted(set(re.findall(r"\]\(#([^)]*)\)", page)) - anchors) == []


def test_a_reason_without_a_row_is_found() -> None:
    source = (
        '"""A module\'s words are no reason."""\n'
        "def f(name):\n"
        '    words = "just a list".split()\n'
        "    if name:\n"
        '        raise ValueError(f"no reason: {name}")\n'
        "    if words:\n"
        "        raise Impurity(f\"eats '{name}' whole\")\n"
        '    return "known to all" if name else "known to none"\n'
    )
    page = "| reason | meaning |\n|---|---|\n| `known to all`, `eats '...'` | `known to none` |\n"
    assert without_row(reasons_of(source), rows_of(page)) == ["known to none", "eats 'X' whole"]


def test_a_row_stands_for_any_name_but_for_no_other_words() -> None:
    rows = rows_of("`... reads it first`, and\n| `it feeds '...' (...)`, `scripted` | x |")
    assert rows == ["... reads it first", "it feeds '...' (...)", "scripted"]
    assert without_row(["'X' reads it first", "it feeds 'X' (X)", "it feeds 'X'"], rows) == ["it feeds 'X'"]
