"""The fenced code blocks of a Markdown file, run as a reader would: in order, in one namespace."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Block", "read_blocks", "run_blocks"]

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>.*)$")


@dataclass(frozen=True)
class Block:
    """A fenced block: the words after its opening fence, its text, and the line at which the text starts."""

    path: Path
    line: int
    words: tuple[str, ...]
    text: str

    @property
    def language(self) -> str:
        return self.words[0] if self.words else ""

    @property
    def is_run(self) -> bool:
        return self.language == "python" and "no-run" not in self.words


def read_blocks(path: Path) -> list[Block]:
    blocks = []
    lines = iter(enumerate(path.read_text(encoding="utf-8").splitlines(), start=1))
    for number, line in lines:
        opening = FENCE.match(line)
        if opening is None:
            continue
        indent, fence = len(opening["indent"]), opening["fence"]
        text = []
        for _, inner in lines:
            if inner.strip().startswith(fence) and set(inner.strip()) == {fence[0]}:
                break
            text.append(inner[indent:])
        else:
            raise ValueError(f"{path}:{number}: the fence that opens here is never closed")
        blocks.append(Block(path, number + 1, tuple(opening["info"].split()), "\n".join(text) + "\n"))
    return blocks


def run_blocks(blocks: Sequence[Block]) -> str:
    """Run the Python blocks in order and return what they printed; tracebacks name the page and its line."""
    module = types.ModuleType("document")
    printed = io.StringIO()
    sys.modules[module.__name__] = module  # pickle and dataclasses look a class's module up by its name
    try:
        with contextlib.redirect_stdout(printed):
            for block in blocks:
                if block.is_run:
                    code = compile("\n" * (block.line - 1) + block.text, str(block.path), "exec", dont_inherit=True)
                    exec(code, vars(module))
    finally:
        del sys.modules[module.__name__]
    return printed.getvalue()
