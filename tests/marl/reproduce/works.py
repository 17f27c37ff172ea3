"""Works for tests of sweeps, importable by their worker processes. They note each run in a file."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar


@dataclass(frozen=True)
class Noting:
    """Notes that it ran, waits, and doubles its seed."""

    notes: str
    seconds: float = 0.0
    number: int = 0
    side_by_side: ClassVar[int] = 16

    @property
    def label(self) -> str:
        return f"noting {self.number}"

    def run(self, seeds: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        time.sleep(self.seconds)
        note(self.notes, *(f"{self.number}/{seed}" for seed in seeds))
        return [{"doubled": 2 * seed} for seed in seeds]


@dataclass(frozen=True)
class Failing(Noting):
    """Raises as often as it is told, then runs."""

    num_times: int = 1

    def run(self, seeds: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        note(self.notes, "failing")
        if noted(self.notes).count("failing") <= self.num_times:
            raise RuntimeError(f"failing\non purpose: {self.number}")
        return super().run(seeds)


@dataclass(frozen=True)
class Dying(Noting):
    """Ends its process, the first time."""

    def run(self, seeds: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        if "dying" not in noted(self.notes):
            note(self.notes, "dying")
            os._exit(9)
        return super().run(seeds)


@dataclass(frozen=True)
class Pausing(Noting):
    """Notes its process and that it begins, before it waits."""

    def run(self, seeds: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        note(self.notes, f"pid{os.getpid()}", f"begun{self.number}")
        return super().run(seeds)


def note(path: str, *lines: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))


def noted(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").split() if Path(path).is_file() else []
