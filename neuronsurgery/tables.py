"""Plain-text tables: every value prints as one, as wide as its content allows and never as the terminal is.

The tables are Markdown in ASCII, so that they can be pasted into a paper's notes, an issue or a README.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence

WIDTH = 110
MAX_LISTED = 6


def render(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], lines: Iterable[str] = ()) -> str:
    """Returns a titled table of `rows` under `columns`, followed by `lines` of text.

    Numbers are aligned to the right, floats get three significant digits and `None` is shown as "-".

    >>> print(render("Widths", ["site", "units"], [["fc1", 64]], ["1 site"]))
    Widths
    | site | units |
    |------|-------|
    | fc1  |    64 |
    1 site
    """
    body = [list(row) for row in rows]
    table = [_grid(columns, body)] if body else []
    return "\n".join([title, *table, *lines])


def grouped(label: str, reasons: Mapping[str, str]) -> list[str]:
    """Returns a line per distinct reason, naming the places that share it.

    >>> grouped("declined", {"head": "no activation function", "proj": "no activation function"})
    ['declined: head, proj: no activation function']
    """
    places: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        places.setdefault(reason, []).append(name)
    return [f"{label}: {listed(names)}: {reason}" for reason, names in places.items()]


def counted(count: int, noun: str) -> str:
    """Returns the count with its noun.

    >>> counted(1, "unit"), counted(0, "unit")
    ('1 unit', '0 units')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(items: Sequence[object], limit: int = MAX_LISTED) -> str:
    """Returns the items separated by commas, the first `limit` of them when there are more.

    >>> listed([0, 1, 2, 3], limit=2)
    '0, 1 and 2 more'
    """
    shown = ", ".join(str(item) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def _grid(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    # Imported on first use: rich takes longer to import than the rest of the core.
    from rich.box import MARKDOWN
    from rich.console import Console
    from rich.table import Table

    table = Table(box=MARKDOWN)
    for index, column in enumerate(columns):
        is_number = any(isinstance(row[index], (int, float)) for row in rows)
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(item) for item in row))
    # Without markup and emoji: a site's name may hold brackets and colons.
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None, markup=False, emoji=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip())


def _cell(item: object) -> str:
    if item is None:
        return "-"
    return f"{item:.3g}" if isinstance(item, float) else str(item)
