"""`marl` and `neuronsurgery` are two packages: neither imports the other, but for the one file that will operate."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def imports_of(package: str, other: str) -> Iterator[str]:
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.partition(".")[0] == other for name in names):
                yield path.relative_to(ROOT).as_posix()


def test_only_the_file_that_operates_imports_the_library() -> None:
    statistics = "marl/reproduce/statistics.py"  # the bootstrap that both comparisons have, and no surgery
    assert set(imports_of("marl", "neuronsurgery")) <= {"marl/surgery.py", statistics}
    assert "neuronsurgery.surgery" not in (ROOT / statistics).read_text(encoding="utf-8")
    assert set(imports_of("marl", "torch"))


def test_the_library_does_not_know_the_package() -> None:
    assert not set(imports_of("neuronsurgery", "marl"))
