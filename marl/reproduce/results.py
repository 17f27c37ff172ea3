"""Runs as values and as files: what is to be run, and what came out of it.

A file holds one seed of one work: all settings, the seed, the version of the package and the commit of its code. It is
named after what it depends on, and written whole or not at all, so that whatever has a file need not be run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Protocol

from marl.errors import SettingsError

__all__ = ["Job", "Provenance", "Result", "Results", "Work", "jobs_of"]


class Work(Protocol):
    """What a run does, for any seed: a frozen dataclass of plain values."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    side_by_side: ClassVar[int]
    """Seeds that are trained together, at most; a kill costs that many runs."""

    @property
    def label(self) -> str:
        """What people call it."""

    def run(self, seeds: Sequence[int]) -> Sequence[Mapping[str, Any]]:
        """What came out for each of the seeds, as plain values; the same seeds give the same."""


@dataclass(frozen=True)
class Provenance:
    """Which code made a result."""

    version: str
    """Of the package."""
    commit: str
    """Of the code, with a plus sign where the package had been changed since; `unknown` outside of a repository."""

    @staticmethod
    @cache
    def here() -> Provenance:
        """That of the code that runs now."""
        try:
            found = version("neuronsurgery")
        except PackageNotFoundError:
            found = "unknown"
        return Provenance(found, _commit())


@dataclass(frozen=True)
class Job:
    """Seeds of one work that are run together, side by side where the work can do that."""

    work: Work
    """What each of the seeds does."""
    seeds: tuple[int, ...]
    """Which seeds."""

    @property
    def label(self) -> str:
        """What people call it."""
        return f"{self.work.label}, {_listed(self.seeds)}"


@dataclass(frozen=True)
class Result:
    """What came out of one run."""

    settings: Mapping[str, Any]
    """All that the run depended on but its seed."""
    seed: int
    """Of all random numbers."""
    provenance: Provenance
    """The code that made it."""
    outcome: Mapping[str, Any]
    """What was measured."""


@dataclass(frozen=True)
class Results:
    """A folder of files, one a run."""

    folder: Path
    """Where they are."""

    def path(self, work: Work, seed: int) -> Path:
        """The file of a run, which no other run has."""
        return self.paths(Job(work, (seed,)))[seed]

    def paths(self, job: Job) -> dict[int, Path]:
        """The files of all seeds of a job, by seed."""
        digest = hashlib.sha256(json.dumps(settings_of(job.work), sort_keys=True).encode()).hexdigest()[:12]
        name = re.sub(r"[^a-z0-9]+", "-", job.work.label.lower()).strip("-")
        return {seed: self.folder / f"{name}-{digest}-{seed}.json" for seed in job.seeds}

    def missing(self, job: Job) -> Job | None:
        """The job for those of its seeds that have no file; none where all have."""
        seeds = tuple(seed for seed, path in self.paths(job).items() if not path.is_file())
        return Job(job.work, seeds) if seeds else None

    def do(self, job: Job, provenance: Provenance) -> None:
        """Run what has no file yet, and write it."""
        left = self.missing(job)
        if left is None:
            return
        for seed, outcome in zip(left.seeds, left.work.run(left.seeds), strict=True):
            self.write(left.work, Result(settings_of(left.work), seed, provenance, outcome))

    def write(self, work: Work, result: Result) -> None:
        """Write a file, whole or not at all; one that is there stays as it is."""
        path = self.path(work, result.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")
        if path.is_file():
            unfinished.unlink()
        else:
            unfinished.replace(path)

    def of(self, job: Job) -> list[Result]:
        """What there is of a job, in the order of its seeds.

        Raises:
            SettingsError: a file is no result of that work and seed.
        """
        settings = settings_of(job.work)
        found = [(seed, path, _read(path)) for seed, path in self.paths(job).items() if path.is_file()]
        for seed, path, result in found:
            if result.settings != settings or result.seed != seed:
                raise SettingsError(f"asked for seed {seed} of {job.work.label}, found another run: delete {path}")
        return [result for _, _, result in found]


def jobs_of(works: Iterable[Work], seeds: Sequence[int], *, side_by_side: int) -> list[Job]:
    """Jobs for all seeds of each work, with at most so many side by side, evenly shared out.

    >>> from types import SimpleNamespace
    >>> [job.seeds for job in jobs_of([SimpleNamespace(label="nothing")], range(5), side_by_side=2)]
    [(0, 1), (2, 3), (4,)]
    """
    return [Job(work, part) for work in works for part in _shared_out(seeds, side_by_side)]


def settings_of(work: Work) -> dict[str, Any]:
    """All fields of a work, and its kind, as JSON has them.

    >>> settings_of(Provenance("1.0", "abc"))
    {'kind': 'Provenance', 'version': '1.0', 'commit': 'abc'}
    """
    settings: dict[str, Any] = json.loads(json.dumps({"kind": type(work).__name__, **asdict(work)}))
    return settings


def _shared_out(seeds: Sequence[int], most: int) -> Iterator[tuple[int, ...]]:
    num_parts = -(-len(seeds) // most)
    least, rest = divmod(len(seeds), max(1, num_parts))
    start = 0
    for part in range(num_parts):
        end = start + least + (part < rest)
        yield tuple(seeds[start:end])
        start = end


def _read(path: Path) -> Result:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return Result(**{**data, "provenance": Provenance(**data["provenance"])})
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise SettingsError(f"asked for a result, found a file that is none: delete {path} ({error})") from error


def _listed(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    is_range = list(seeds) == list(range(seeds[0], seeds[0] + len(seeds)))
    return f"seeds {seeds[0]} to {seeds[-1]}" if is_range else f"{len(seeds)} seeds"


def _commit() -> str:
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", str(here))
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
