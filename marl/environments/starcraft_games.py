"""Games of StarCraft II in processes of their own, as seen from this one.

`marl.game_worker` is the other side. Processes are spawned, not forked, so that nothing of torch or of another game is
in them; each leads a group that its StarCraft belongs to, so that both end together.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from ast import literal_eval
from collections.abc import Mapping
from functools import cache
from typing import Any

from marl.errors import GameError, MissingExtraError
from marl.game_worker import serve

__all__ = ["Game", "GameBroke", "info_of"]

INSTALL = "docs/how-to/starcraft.md says how, step by step"
PACKAGES: Mapping[str, str] = {
    "smacv2": "pip install git+https://github.com/oxwhirl/smacv2.git",
    "smac": "pip install git+https://github.com/oxwhirl/smac.git (PyPI's smac is another package)",
}
CLOSING = 10.0
"""Seconds that StarCraft is given to end by itself."""


class GameBroke(Exception):  # no error of ours: whoever plays begins another game
    """A game crashed, or does not answer."""


class Game:
    """A process with one game; `send` asks, `receive` waits for the answer."""

    def __init__(self, client: str, arguments: Mapping[str, Any], *, patience: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._client, self._patience = client, patience
        self._process = context.Process(target=serve, args=(theirs, client, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, *request: object) -> None:
        """Ask for something; a game that is gone says so when the answer is received."""
        try:
            self._connection.send(request)
        except OSError:  # the process has ended, maybe with a last word
            return

    def receive(self) -> Any:
        """The answer.

        Raises:
            GameBroke: the game crashed, or took longer than it may.
            GameError: there is no StarCraft or no such map.
            MissingExtraError: the package of the game is not installed.
        """
        try:
            if not self._connection.poll(self._patience):
                raise GameBroke(f"no answer within {self._patience:g} s")
            word, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise GameBroke("its process ended") from error
        match word:
            case "done":
                return value
            case "missing":
                raise self._missing(value)
            case "refused":
                raise GameError(f"{self._client} cannot be played here ({value}): {INSTALL}")
        raise GameBroke(value)

    def close(self) -> None:
        """End the process and its StarCraft."""
        self._connection.close()  # on which an idle one ends by itself
        self._process.join(CLOSING if self._process.is_alive() else 0)
        self._kill()
        self._process.join()

    def kill(self) -> None:
        """End both at once."""
        self._kill()
        self._connection.close()
        self._process.join()

    def _kill(self) -> None:
        number = self._process.pid
        if os.name == "posix" and number is not None:
            with contextlib.suppress(ProcessLookupError):  # all gone, or not yet a group
                os.killpg(number, signal.SIGKILL)
        self._process.kill()

    def _missing(self, module: str) -> MissingExtraError:
        package = self._client.partition(".")[0].partition(":")[0]
        command = PACKAGES.get(package, "")
        found = f"{self._client} cannot be imported, because there is no {module}"
        return MissingExtraError(f"{found}; it is not on PyPI: `{command}`, and {INSTALL}")


@cache
def info_of(client: str, arguments: str, patience: float) -> Mapping[str, Any]:
    """Sizes of a game, for which no StarCraft is needed; asked for once. `arguments` are as `repr` writes them.

    Raises:
        GameError: the game cannot be made.
        MissingExtraError: its package is not installed.
    """
    game = Game(client, literal_eval(arguments), patience=patience)
    game.send("info")
    try:
        found: Mapping[str, Any] = game.receive()
    except GameBroke as error:
        raise GameError(f"{client} does not say its sizes ({error}): {INSTALL}") from error
    finally:
        game.kill()
    return found
