"""Every error the package raises, so that one `except MarlError` catches them all.

    MarlError (a ValueError)
    |-- SettingsError      an unknown name, a value out of range, settings that do not fit together
    |-- BatchError         episodes whose shapes do not fit what they are given to
    |-- ActionError        actions that an environment cannot take
    |-- GameError          a game outside of this program that cannot be played, or breaks again and again
    |-- CheckpointError    a file that was written for other networks or by another run
    `-- MissingExtraError  ImportError   a package that only an optional part needs

Messages say what was asked, what was found and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class MarlError(ValueError):
    """The root of the package's errors."""


class SettingsError(MarlError):
    """A setting that is unknown or out of range, or that does not fit the others."""


class BatchError(MarlError):
    """Episodes whose shapes do not fit what they are given to."""


class ActionError(MarlError):
    """Actions of the wrong shape or type, out of range, or not available."""


class GameError(MarlError):
    """A game outside of this program that cannot be played here, or that breaks again and again."""


class CheckpointError(MarlError):
    """A saved state that does not fit what it is loaded into."""


class MissingExtraError(MarlError, ImportError):
    """A package that is not installed because only an optional part of this one needs it.

    >>> print(MissingExtraError.of("torchrl"))
    torchrl is not installed; install what the trainer needs with `pip install 'neuronsurgery[marl]'`
    """

    @classmethod
    def of(cls, package: str, *, extra: str = "marl", needed_by: str = "the trainer") -> MissingExtraError:
        """The error for a package that an extra brings."""
        command = f"pip install 'neuronsurgery[{extra}]'"
        return cls(f"{package} is not installed; install what {needed_by} needs with `{command}`")


def suggestion(asked: str, known: Iterable[str]) -> str:
    """The known names that are like the one asked for, or else all of them.

    >>> suggestion("qmx", ["qmix", "vdn"])
    "did you mean 'qmix'?"
    >>> suggestion("ppo", ["qmix", "vdn"])
    "known are 'qmix', 'vdn'"
    """
    names = sorted(known)
    like = get_close_matches(asked, names, n=3)
    if like:
        return f"did you mean {' or '.join(map(repr, like))}?"
    return f"known are {', '.join(map(repr, names))}"
