"""What a command is to train: a new run in a folder of its own, or one that goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from marl.checkpoints import NAME, Checkpoint, read
from marl.configuring import Layer, configure, to_dict
from marl.errors import CheckpointError
from marl.run import Run, make_run
from marl.run_settings import RunSettings

__all__ = ["Session", "begin", "resume"]


@dataclass(frozen=True)
class Session:
    """What is to be trained, and where it is saved."""

    settings: RunSettings
    """Of the run."""
    output: Path
    """Where logs and checkpoints go."""
    checkpoint: Checkpoint | None = None
    """What it goes on from."""

    def run(self) -> Run:
        """The run, made or loaded.

        Raises:
            CheckpointError: another run is in the folder, or the one to go on with has other settings.
        """
        if self.checkpoint is not None:
            return self.checkpoint.run(self.settings)
        if (self.output / NAME).exists():
            found = f"{self.output} holds a run already"
            raise CheckpointError(f"{found}: go on with it by --resume, or choose another folder by --output")
        return make_run(self.settings)


def begin(layers: Sequence[Layer], output: Path | None) -> Session:
    """A new run, by default in a folder named after it.

    Raises:
        SettingsError: the layers give no settings.
    """
    settings = configure(*layers)
    return Session(settings, output or _default_output(settings))


def resume(layers: Sequence[Layer], output: Path | None) -> Session:
    """The run in a folder, with its own settings and what the layers say over them.

    Raises:
        CheckpointError: there is no run in it, or none that can be read.
        SettingsError: the layers give no settings.
    """
    output = output or _default_output(configure(*layers))
    checkpoint = read(output)
    return Session(configure(to_dict(checkpoint.settings), *layers), output, checkpoint)


def _default_output(settings: RunSettings) -> Path:
    tasks = "+".join(task.name for task in settings.tasks.tasks)
    return Path("results") / f"{settings.algorithm}-{tasks}-{settings.surgery.method}-{settings.seed}"
