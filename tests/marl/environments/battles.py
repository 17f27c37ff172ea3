"""SMAX in tests: whether it is there, and compiled code that the processes of a test run share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from marl.environments import Smax, SmaxSettings

WITHOUT = "needs `pip install 'neuronsurgery[smax]'`"
NEEDS_SMAX = pytest.mark.skipif(find_spec("jaxmarl") is None, reason=WITHOUT)
SETTINGS = SmaxSettings(scenario="3m")
NUM_BATTLES = 4
"""As many in every quick test, so that one program serves all of them."""


def battles(settings: SmaxSettings = SETTINGS, *, seed: int = 0) -> Smax:
    """The battles that are compiled already."""
    return Smax(settings, NUM_BATTLES, seed=seed)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Keeps compiled code in a folder, where one process at a time looks for it and adds to it."""
    import fcntl  # not on Windows, where none of this is run

    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
