"""CSV files that are complete at any time, because each is replaced as a whole."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from marl.checkpoints import replacing

__all__ = ["read_rows", "write_rows"]


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows in place of what was there; the header has all columns, and cells of those that a row lacks are empty.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_rows(Path(folder) / "a.csv", [{"steps": 1}, {"loss": 0.5}])
    ...     read_rows(Path(folder) / "a.csv")
    [{'steps': '1', 'loss': ''}, {'steps': '', 'loss': '0.5'}]
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file, as text; none if there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
