"""Checkpoints: a run as one file, which is there as a whole or not at all.

Networks, optimizer, operations, progress and the replay are of one moment because they are in one file, and it replaces
the previous one in one step: whoever kills a run while it saves finds the checkpoint before.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from marl.configuring import flat, from_dict, to_dict
from marl.errors import CheckpointError, SettingsError
from marl.run import Run, make_run
from marl.run_settings import RunSettings
from marl.training import Silent

__all__ = ["NAME", "Checkpoint", "Saves", "load", "read", "replacing", "save"]

NAME = "checkpoint.pt"
VERSION = 1
"""Of the layout of the file; to be raised with every change of what is in it."""

MAY_CHANGE = re.compile(r"training\.save_every|(training|tasks\.\d+)\.num_steps")
"""What a run can go on with in another way, as long as no task that is over would have been of another length."""


def save(run: Run, folder: Path) -> None:
    """Write a run to `checkpoint.pt` in a folder, in place of what was there."""
    state = {
        "version": VERSION,
        "settings": to_dict(run.settings),
        "run": run.state_dict(),
        "replay": run.replay.state_dict(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / NAME) as path:
        torch.save(state, path)


def load(folder: Path, settings: RunSettings | None = None) -> Run:
    """The run that was saved in a folder; trained on, it does what it would have done without a break.

    `settings` are those that it is to go on with, by default its own.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, of another version, or of a run with other settings.
    """
    return read(folder).run(settings)


def read(folder: Path) -> Checkpoint:
    """A checkpoint, of which no run is made yet.

    Raises:
        CheckpointError: there is none, it is damaged, or of another version.
    """
    path = folder / NAME
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint in {folder}; a run that was trained has saved its {NAME} there")
    try:
        state = torch.load(path, weights_only=True)
        version = state["version"]
    except (OSError, RuntimeError, UnpicklingError, EOFError, KeyError, TypeError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged, or no checkpoint of a run: train anew, or use a copy") from error
    if version != VERSION:
        raise CheckpointError(
            f"{path} is of version {version}, this program reads version {VERSION}: use the program that wrote it"
        )
    try:
        return Checkpoint(path, from_dict(state["settings"]), state)
    except SettingsError as error:
        raise CheckpointError(f"{path} has settings that this program does not know: {error}") from error


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds."""

    path: Path
    """Where it is."""
    settings: RunSettings
    """Those of the run."""
    state: Mapping[str, Any]
    """All that the run knew."""

    def run(self, settings: RunSettings | None = None) -> Run:
        """The run as it was, to go on with these settings, by default its own.

        Raises:
            CheckpointError: settings under which the past would have been another.
        """
        settings = self.settings if settings is None else settings
        self._require_same(settings)
        try:
            self._require_same_past(settings)
            run = make_run(settings)
            run.load_state_dict(self.state["run"])
            run.replay.load_state_dict(self.state["replay"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{self.path} is damaged, it lacks {error}: train anew, or use a copy") from error
        return run

    def _require_same(self, settings: RunSettings) -> None:
        saved, asked = flat(self.settings), flat(settings)
        different = sorted(
            name
            for name in saved.keys() | asked.keys()
            if not MAY_CHANGE.fullmatch(name) and (name not in saved or name not in asked or saved[name] != asked[name])
        )
        if different:
            name, more = different[0], f" (and {len(different) - 1} more)" if different[1:] else ""
            raise CheckpointError(
                f"{self.path} was saved with {name} {saved.get(name, 'unset')!r}, and is to go on with "
                f"{asked.get(name, 'unset')!r}{more}: go on with its own settings, or begin a new run in another folder"
            )

    def _require_same_past(self, settings: RunSettings) -> None:
        for place in range(self.state["run"]["progress"]["task"]):
            was, asked = self.settings.num_steps_of(place), settings.num_steps_of(place)
            if was != asked:
                name = settings.tasks.tasks[place].name
                raise CheckpointError(
                    f"{self.path} has left task {place}, {name}, after its {was} steps, and is to go on as if it had "
                    f"had {asked}: change the steps of later tasks only, as by tasks.{place + 1}.num_steps"
                )


class Saves(Silent):
    """Saves the run whenever it is time to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_save(self, run: Run) -> None:
        save(run, self._folder)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write a file to, which becomes `path` in one step once it is complete.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder, replacing(Path(folder) / "a.txt") as partial:
    ...     _ = partial.write_text("whole")
    ...     (Path(folder) / "a.txt").exists()
    False
    """
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    with partial.open("rb") as written:
        os.fsync(written.fileno())  # so that not even a power cut finds the new name on half of the data
    os.replace(partial, path)
