"""The page of documentation: its parts are renewed from the runs, and what is said of them is what they show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from marl.cli import app
from marl.errors import SettingsError
from marl.reproduce.engines import InProcess
from marl.reproduce.figures import tuning
from marl.reproduce.figures.figure import Asked
from marl.reproduce.figures.registry import FIGURES
from marl.reproduce.figures.tuning import METHODS, grid, sequences, tuning_jobs
from marl.reproduce.matrix.runs import MatrixRun
from marl.reproduce.publishing import publish
from marl.reproduce.results import Results
from marl.reproduce.summaries import summary
from marl.reproduce.sweep import sweep
from tests.marl.reproduce.drawn import Drawn, figure_of, pretended

ROOT = Path(__file__).parents[3]
ASKED = Asked.of("smoke", 12)
CONTROLS = {"none": Drawn(0.0), "optimizer reset": Drawn(0.1)}
EMPTY = (
    "Before.\n\n<!-- legend -->\n<!-- end of legend -->\n\n<!-- drawn -->\nold\n<!-- end of drawn -->\n\n"
    "<!-- costs -->\n<!-- end of costs -->\n\nAfter.\n"
)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(EMPTY, encoding="utf-8")
    return path


def test_a_part_is_renewed_and_what_is_around_it_stays(page: Path, tmp_path: Path) -> None:
    figure, files = figure_of(**CONTROLS, KNIFE=Drawn(1.0)), Results(tmp_path / "runs")
    sweep(figure.jobs(ASKED, files), files, InProcess())
    assert publish([figure], ASKED, files, page) == ["legend", "drawn", "costs"]
    text = page.read_text()
    assert text.startswith("Before.\n") and text.endswith("\nAfter.\n")
    assert "old" not in text and "| KNIFE |" in text and "In brackets 95 % intervals" in text
    assert "![drawn with 95 % intervals](images/reproduction-drawn.png)" in text
    assert (tmp_path / "images" / "reproduction-drawn.png").read_bytes().startswith(b"\x89PNG")
    publish([figure], ASKED, files, page)
    assert page.read_text() == text


def test_a_part_without_runs_stays_as_it_is(page: Path, tmp_path: Path) -> None:
    assert publish([figure_of(**CONTROLS)], ASKED, Results(tmp_path / "runs"), page) == ["legend", "costs"]
    assert "<!-- drawn -->\nold\n<!-- end of drawn -->" in page.read_text()


def test_a_page_that_is_not_there_or_lacks_a_part_is_refused(page: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="which is not there"):
        publish([], ASKED, Results(tmp_path / "runs"), tmp_path / "other.md")
    page.write_text("<!-- end of legend -->\n<!-- legend -->\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="no part 'legend': put <!-- legend --> and"):
        publish([], ASKED, Results(tmp_path / "runs"), page)


def test_runs_are_counted_where_they_are_needed_first(page: Path, tmp_path: Path) -> None:
    first, files = figure_of(**CONTROLS), Results(tmp_path / "runs")
    second = replace(figure_of(**CONTROLS, KNIFE=Drawn(1.0)), name="second")
    page.write_text(EMPTY + "<!-- second -->\n<!-- end of second -->\n", encoding="utf-8")
    for figure in (first, second):
        sweep(figure.jobs(ASKED, files), files, InProcess())
    publish([first, second], ASKED, files, page)
    seconds = files.of(first.jobs(ASKED, files)[0])[0].outcome["seconds"]
    rows = [line for line in page.read_text().splitlines() if line.startswith("| `")]
    assert rows == [
        "| `tuning` | 0 | 0 |",
        f"| `drawn` | 24 | {24 * seconds / 60:.0f} |",
        f"| `second` | 12 | {12 * seconds / 60:.0f} |",
    ]


def test_what_is_said_of_knife_names_the_arms_that_beat_it(tmp_path: Path) -> None:
    figure = figure_of(**CONTROLS, KNIFE=Drawn(1.0), simple=Drawn(1.5), worse=Drawn(0.5))
    (panel,), files = figure.panels(ASKED, Results(tmp_path)), Results(tmp_path)
    sweep(figure.jobs(ASKED, files), files, InProcess())
    (said,) = summary(panel, panel.results(files, ASKED))
    first, units = said.split("; ")
    own, *controls = (float(word) for word in first.split() if word.lstrip("-")[:1].isdigit())
    assert [own - each for each in controls] == pytest.approx([1.0, 0.9], abs=0.011)
    assert first.startswith("- **KNIFE**: score ") and first.endswith("*confirmed*")
    assert "units 0.50 against 0.50 without and 0.50 with a fresh optimizer: *open*" in units
    assert units.endswith("Better at score: simple by +0.50 (+0.50 to +0.50).")


def test_the_page_of_the_documentation_has_a_part_for_every_figure() -> None:
    text = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    for name in ("legend", "tuning", "costs", *FIGURES):
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- end of {name} -->") == 1, name


def test_the_command_shows_what_is_there_and_runs_nothing(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = figure_of(**CONTROLS, KNIFE=Drawn(1.0))
    monkeypatch.setattr("marl.reproduce.command.figures_of", lambda name: [figure])
    sweep(figure.jobs(ASKED, files := Results(tmp_path / "runs"))[:2], files, InProcess())
    arguments = ["--scale", "smoke", "--seeds", "12", "--output", str(tmp_path), "--page", str(page)]
    done = CliRunner().invoke(app, ["reproduce", "show", *arguments])
    assert done.exit_code == 0, done.output
    assert "page.md: legend, drawn, costs" in done.output
    assert len(list((tmp_path / "runs").glob("*.json"))) == 24
    assert "| optimizer reset |" in page.read_text() and "| KNIFE |" not in page.read_text()


def test_the_table_of_what_was_tried_has_every_setting_on_every_sequence(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MatrixRun, "run", pretended)
    monkeypatch.setitem(tuning.FIRST_SEEDS, "small", 2)
    monkeypatch.setitem(tuning.ALL_SEEDS, "small", 3)
    page.write_text(EMPTY + "<!-- tuning -->\n<!-- end of tuning -->\n", encoding="utf-8")
    asked, files = Asked.of("small"), Results(tmp_path / "runs")
    for _ in range(2):
        sweep(tuning_jobs(asked, files), files, InProcess())
    assert publish([], asked, files, page) == ["legend", "tuning", "costs"]
    rows = [
        line.split(" | ") for line in page.read_text().splitlines() if line.startswith(tuple(f"| {m}" for m in METHODS))
    ]
    assert len(rows) == sum(len(grid(asked, method)) for method in METHODS)
    assert {len(row) for row in rows} == {2 + len(sequences(asked))}
    assert sum(row[2].startswith("**") for row in rows) == len(METHODS) * 8 / 4
