"""A page of documentation whose tables are never typed: what came out of the runs is written between its marks.

A part lies between `<!-- NAME -->` and `<!-- end of NAME -->`. Parts without runs stay as they are, so that whoever has
the runs of one figure can renew that one. What is around the parts is written by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from marl.errors import SettingsError
from marl.reproduce.comparisons import line
from marl.reproduce.figures.figure import Asked, Figure
from marl.reproduce.figures.tuning import METHODS, grid, sequences, tried, tuning_jobs
from marl.reproduce.results import Results, Work
from marl.reproduce.showing import legend, save_picture, sections

__all__ = ["publish"]


def publish(figures: Sequence[Figure], asked: Asked, files: Results, page: Path) -> list[str]:
    """Renew the parts of a page that there are runs for, with their pictures beside it; returns the names of the parts.

    Raises:
        SettingsError: the page is not there, or lacks the marks of a part.
        MissingExtraError: matplotlib is not installed.
    """
    if not page.is_file():
        raise SettingsError(f"asked to renew {page}, which is not there: run this from the root of the repository")
    text, parts = page.read_text(encoding="utf-8"), {"legend": [legend()]}
    for figure in figures:
        if _has_runs(figure, asked, files):
            picture = Path("images") / f"reproduction-{figure.name}.png"
            (page.parent / picture).parent.mkdir(parents=True, exist_ok=True)
            save_picture(figure, asked, files, page.parent / picture)
            shown = f"![{figure.name} with 95 % intervals]({picture.as_posix()})"
            parts[figure.name] = [shown, "", *sections(figure, asked, files, level=3)]
    if table := list(_tuning(asked, files)):
        parts["tuning"] = table
    parts["costs"] = list(_costs(figures, asked, files))
    for name, lines in parts.items():
        text = _with_part(text, name, lines)
    page.write_text(text, encoding="utf-8")
    return list(parts)


def _has_runs(figure: Figure, asked: Asked, files: Results) -> bool:
    jobs = figure.jobs(asked, files)
    return any((left := files.missing(job)) is None or len(left.seeds) < len(job.seeds) for job in jobs)


def _costs(figures: Sequence[Figure], asked: Asked, files: Results) -> Iterator[str]:
    """Runs that are there and what they took, each counted where it is needed first."""
    yield line(["command", "runs that none above has", "processor minutes"])
    yield line(["---"] * 3)
    seen: set[tuple[Work, int]] = set()
    for name, jobs in [
        ("tuning", tuning_jobs(asked, files)),
        *((each.name, each.jobs(asked, files)) for each in figures),
    ]:
        took = {(job.work, run.seed): float(run.outcome["seconds"]) for job in jobs for run in files.of(job)}
        yield line(
            [f"`{name}`", f"{len(took.keys() - seen):,}", f"{sum(took[each] for each in took.keys() - seen) / 60:.0f}"]
        )
        seen |= took.keys()


def _with_part(text: str, name: str, lines: Sequence[str]) -> str:
    r"""The page with other lines between two marks.

    >>> _with_part("<!-- one -->\nold\n<!-- end of one -->\n", "one", ["new"])
    '<!-- one -->\n\nnew\n\n<!-- end of one -->\n'
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, has_end, after = rest.partition(end)
    if not (found and has_end):
        raise SettingsError(f"the page has no part {name!r}: put {begin} and {end} where it belongs")
    return "\n".join([f"{before}{begin}", "", *lines, "", f"{end}{after}"]).replace("\n\n\n", "\n\n")


def _tuning(asked: Asked, files: Results) -> Iterator[str]:
    """All settings that were tried, and how each did on every sequence; nothing before all of one sequence is done."""
    tasks = sequences(asked)
    columns = [{m: tried(asked, each, files, m) for m in METHODS} for each in tasks]
    if not any(of for column in columns for of in column.values()):
        return
    yield line(["method", "setting", *(each.name for each in tasks)])
    yield line(["---"] * (2 + len(tasks)))
    for method in METHODS:
        for setting in grid(asked, method):
            yield line([method, str(setting), *(column[method].get(setting, "") for column in columns)])
