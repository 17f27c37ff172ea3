"""What README and docs show is run: every `python` block, in order, file by file.

A block that cannot run says so in its opening fence (`python no-run`) and shows up as a skipped test.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.documents import Block, read_blocks, run_blocks

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
# Anything else could be Python that nobody runs because its language is spelled another way.
LANGUAGES_NOT_RUN = {
    "",
    "text",
    "console",
    "bash",
    "sh",
    "json",
    "toml",
    "yaml",
    "make",
    "bibtex",
    "markdown",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def not_run() -> Sequence[object]:
    blocks = [block for path in DOCUMENTS if path.exists() for block in read_blocks(path)]
    shown = [block for block in blocks if block.language == "python" and not block.is_run]
    params = [pytest.param(block, id=f"{name(block.path)}:{block.line}") for block in shown]
    return params or [pytest.param(None, id="none is")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # what an example writes does not land in the repository
    monkeypatch.setenv("MPLBACKEND", "Agg")
    run_blocks(read_blocks(path))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_every_code_block_is_python_or_of_a_language_that_is_not_run(path: Path) -> None:
    strange = [f"{name(path)}:{block.line} {block.language}" for block in read_blocks(path) if is_strange(block)]
    assert strange == []


def is_strange(block: Block) -> bool:
    is_directive = block.language.startswith("{")
    return block.language not in {"python", *LANGUAGES_NOT_RUN} and not is_directive


@pytest.mark.parametrize("block", not_run())
def test_python_block_marked_no_run(block: Block | None) -> None:
    if block is not None:
        pytest.skip(f"{name(block.path)}:{block.line} is marked no-run")


def test_readme_shows_python_that_is_run() -> None:
    assert any(block.is_run for block in read_blocks(README))


def write(folder: Path, text: str) -> Path:
    path = folder / "page.md"
    path.write_text(text, encoding="utf-8")
    return path


def test_blocks_share_one_namespace_and_no_run_is_left_out(tmp_path: Path) -> None:
    page = write(
        tmp_path,
        "```python\nx = 1\n```\ntext\n```python no-run\nx = 2\n```\n"
        "- item\n\n  ```python\n  print(x)\n  ```\n```text\nx = 3\n```\n",
    )
    assert run_blocks(read_blocks(page)) == "1\n"
    assert "document" not in sys.modules


def test_a_failing_block_names_its_line_in_the_page(tmp_path: Path) -> None:
    page = write(tmp_path, "one\n\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run_blocks(read_blocks(page))
    last = caught.traceback[-1]
    assert (Path(str(last.path)), last.lineno + 1) == (page, 5)


def test_a_longer_fence_holds_a_shorter_one(tmp_path: Path) -> None:
    page = write(tmp_path, "````markdown\n```python\nraise SystemExit\n```\n````\n")
    assert [block.language for block in read_blocks(page)] == ["markdown"]
    assert run_blocks(read_blocks(page)) == ""


def test_an_open_fence_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"page.md:2: the fence that opens here is never closed"):
        read_blocks(write(tmp_path, "text\n```python\nx = 1\n"))


@pytest.mark.parametrize(("fence", "expected"), [("pycon", True), ("py", True), ("python", False), ("{note}", False)])
def test_python_under_another_name_is_strange(fence: str, expected: bool, tmp_path: Path) -> None:
    (block,) = read_blocks(write(tmp_path, f"```{fence}\n```\n"))
    assert is_strange(block) is expected
