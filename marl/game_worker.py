"""One game of StarCraft II in a process of its own: the only file that touches the packages `smacv2` and `smac`.

A crash of the game, of its client or of this process ends nothing else. Nothing here needs torch, so that a process
takes as little memory as its game. Requests and replies are tuples that begin with a word; see `serve`.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Seen", "Step", "serve"]

NUM_ATTEMPTS = 10
"""Times that units are waited for at the start of an episode, before the game counts as broken."""


@dataclass(frozen=True)
class Seen:
    """What can be seen between two steps."""

    obs: NDArray[np.float32]
    """(N, O)."""
    state: NDArray[np.float32]
    """(S,)."""
    avail_actions: NDArray[np.bool_]
    """(N, A)."""


@dataclass(frozen=True)
class Step:
    """What a step led to."""

    seen: Seen
    """After it."""
    reward: float
    """Of the team."""
    is_over: bool
    """Whether one of the teams has lost."""
    is_cut_off: bool
    """Whether the time limit ended it."""
    is_won: bool
    """Whether the enemies have lost."""
    num_dead: tuple[int, int]
    """Allies and enemies."""


class BrokenGameError(Exception):
    """The game, or the connection to it, is gone."""


def serve(connection: Connection, client: str, arguments: Mapping[str, Any]) -> None:
    """Answer requests until the other end closes.

    `client` is a class as `module:name`, made with the arguments. Requests are ("info",), ("begin", seed) and ("step",
    actions); replies ("done", value), ("broken", why), after which nobody should ask again, or, for what no other
    process could do, ("refused", why) and ("missing", module).
    """
    if os.name == "posix":
        os.setsid()  # so that whoever ends this process can end its StarCraft with it
    use_any_protobuf()
    try:
        game = _Game(_made(client, arguments))
    except ImportError as error:
        connection.send(("missing", error.name or str(error)))
        return
    except Exception as error:  # whatever it is, it is of another package and no other process would do better
        connection.send(("refused", described(error)))
        return
    answers: dict[str, Callable[..., object]] = {"info": game.info, "begin": game.begin, "step": game.step}
    while True:
        try:
            name, *values = connection.recv()
        except EOFError:
            return game.close()
        connection.send(_answer(answers[name], *values))


def _answer(answer: Callable[..., object], *values: object) -> tuple[str, object]:
    try:
        return "done", answer(*values)
    except FileNotFoundError as error:  # no StarCraft, or no map
        return "refused", described(error)
    except Exception as error:  # the client's, the connection's or the game's
        return "broken", described(error)


def described(error: BaseException) -> str:
    """What an error says, on one line.

    >>> described(ValueError("no    map"))
    'ValueError: no map'
    """
    return " ".join(f"{type(error).__name__}: {error}".split())


def use_any_protobuf() -> None:
    """Let the protocol's old generated code load under protobuf 3.21 and later, as slow Python; before its import.

    Whoever has set the variable has chosen.
    """
    try:
        installed = version("protobuf")
    except PackageNotFoundError:
        return
    found = re.match(r"(\d+)\.(\d+)", installed)
    if found and (int(found[1]), int(found[2])) >= (3, 21):
        os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")


def _made(client: str, arguments: Mapping[str, Any]) -> Any:
    module, _, name = client.partition(":")
    try:
        kind = getattr(import_module(module), name)
    except AttributeError as error:  # another package of the same name, as PyPI's `smac`
        raise ImportError(f"{module} has no {name}", name=module) from error
    return kind(**arguments)


class _Game:
    """A client of SMACv2 (a wrapper that draws teams) or of SMAC, which share their methods."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._distributions: Mapping[str, Any] | None = getattr(client, "env_key_to_distribution_map", None)

    def info(self) -> dict[str, Any]:
        """Sizes, as the package has them."""
        return dict(self._client.get_env_info())

    def begin(self, seed: int) -> Seen:
        """Begin an episode, with teams and places from a seed."""
        self._seed(seed)
        for _ in range(NUM_ATTEMPTS):
            try:
                self._reset()
            except Exception as error:
                # The wrapper's own answer to this error is to call itself, without end and without returning.
                if type(error).__name__ != "CannotResetException":
                    raise
            else:
                return self._seen()
        raise BrokenGameError(f"in {NUM_ATTEMPTS} attempts no units appeared on the map")

    def step(self, actions: NDArray[np.int64]) -> Step:
        """Take the actions (N,) of all agents."""
        reward, is_over, info = self._client.step(actions.tolist())
        if is_over and "battle_won" not in info:  # how both packages end an episode whose connection they lost
            raise BrokenGameError("the connection to StarCraft II was lost")
        is_cut_off = bool(info.get("episode_limit", False))
        dead = int(info.get("dead_allies", 0)), int(info.get("dead_enemies", 0))
        over = bool(is_over) and not is_cut_off
        return Step(self._seen(), float(reward), over, is_cut_off, bool(info["battle_won"]), dead)

    def close(self) -> None:
        """End StarCraft."""
        self._client.close()

    def _reset(self) -> None:
        if self._distributions is None:
            self._client.reset()
            return
        drawn: dict[str, Any] = {}
        for distribution in self._distributions.values():
            drawn |= distribution.generate()
        self._client.env.reset(drawn)

    def _seen(self) -> Seen:
        obs, state = (np.asarray(each, np.float32) for each in (self._client.get_obs(), self._client.get_state()))
        return Seen(obs, state, np.asarray(self._client.get_avail_actions(), np.bool_))

    def _seed(self, seed: int) -> None:
        """Everything that the packages draw from: two global generators, and one of each distribution, unseeded."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        for number, distribution in enumerate(_nested(self._distributions or {})):
            distribution.rng = np.random.default_rng([seed, number])


def _nested(distributions: Mapping[str, Any]) -> Iterator[Any]:
    """Distributions and those inside of them."""
    for distribution in distributions.values():
        if callable(getattr(distribution, "generate", None)):
            yield distribution
            yield from _nested(vars(distribution))
