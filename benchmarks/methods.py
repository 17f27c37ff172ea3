"""Write the table of methods into `docs/methods.md`, from their registry (or: make methods)."""

from __future__ import annotations

from pathlib import Path

from neuronsurgery.methods import table

PAGE = Path(__file__).parents[1] / "docs" / "methods.md"


def main() -> None:
    """Put the table that the registry makes now in the place of the one on the page; the text above it stays."""
    PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def page_with_table(page: str) -> str:
    """The page with the table as it should be, which is its last part."""
    return f"{page.partition('| method |')[0]}{table()}\n"


if __name__ == "__main__":
    main()
