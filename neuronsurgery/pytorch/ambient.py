"""What surrounds every forward in a process: streams, switches, clocks, files and random numbers.

A graph would bake in what a forward asked of them and would not repeat what it did to them. So while a forward is
traced, the functions that ask or act are exchanged, for this thread, for ones that refuse; what can be reached without
them is compared and put back. Warnings are the exception: they are dropped. Python shows one once for each place,
so not repeating it is nearly what would happen, and refusing would decline every model that warns of an old argument.

Not seen: files and streams that a module holds under a name of its own (`from sys import stdout`), sockets,
subprocesses, and whatever C extensions keep for themselves.
"""

from __future__ import annotations

import builtins
import contextlib
import io
import logging
import os
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from neuronsurgery.pytorch.mirroring import Impurity

__all__ = ["ambient_untouched", "is_equal"]


@contextlib.contextmanager
def ambient_untouched() -> Iterator[None]:
    """Refuse in this thread what asks or changes process-wide state, and put back what was changed all the same.

    Raises:
        Impurity: the block drew random numbers, or changed a switch, by a way that could not be refused.
    """
    before = [read() for _, read, _, _ in _STATES]
    try:
        with warnings.catch_warnings(), _refusing():
            warnings.simplefilter("ignore")
            yield
    finally:
        changed = [state for state, old in zip(_STATES, before, strict=True) if not is_equal(state[1](), old)]
        for (_, _, write, _), old in zip(_STATES, before, strict=True):
            if changed:
                write(old)
    if changed:
        raise Impurity(changed[0][3])


# -- what is refused ---------------------------------------------------------------------------------------------------

_SEEDING = "seeds a random number generator, or asks for its state"
_REFUSED: tuple[tuple[Any, str, str], ...] = (
    (torch, "is_grad_enabled", "asks torch.is_grad_enabled(), or switches gradients on or off"),
    (torch, "is_inference_mode_enabled", "asks torch.is_inference_mode_enabled()"),
    (torch, "is_autocast_enabled", "asks torch.is_autocast_enabled()"),
    (torch, "get_autocast_dtype", "opens an autocast block, or asks for its dtype"),
    (torch.amp.autocast_mode.autocast, "__enter__", "opens an autocast block"),
    (torch.autograd.grad_mode.inference_mode, "__enter__", "opens an inference_mode block"),
    *(
        (owner, name, _SEEDING)
        for owner in (torch, torch.random)
        for name in "manual_seed seed get_rng_state set_rng_state".split()
    ),
    (torch.random, "fork_rng", _SEEDING),
    *(
        (torch, name, f"calls torch.{name}, which changes a setting of the process")
        for name in "set_default_dtype set_default_device use_deterministic_algorithms set_num_threads".split()
    ),
    (torch, "set_float32_matmul_precision", "changes the precision of products for the process"),
    (builtins, "print", "prints, which a graph would not repeat"),
    (logging.Logger, "_log", "logs, which a graph would not repeat"),
    (builtins, "open", "opens a file"),
    (io, "open", "opens a file"),
    (os, "putenv", "writes into os.environ"),
    (os, "unsetenv", "writes into os.environ"),
    *((time, name, "asks for the time") for name in "time time_ns monotonic perf_counter process_time".split()),
    (time, "sleep", "sleeps"),
)


@contextlib.contextmanager
def _refusing() -> Iterator[None]:
    thread = threading.get_ident()
    exchanged = [(owner, name, vars(owner)[name]) for owner, name, _ in _REFUSED]
    streams = sys.stdout, sys.stderr
    try:
        for (owner, name, found), (_, _, reason) in zip(exchanged, _REFUSED, strict=True):
            setattr(owner, name, _refusal(found, reason, thread))
        sys.stdout, sys.stderr = (_Unwritable(stream, thread) for stream in streams)
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for owner, name, found in exchanged:
            setattr(owner, name, found)


def _refusal(function: Callable[..., Any], reason: str, thread: int) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            raise Impurity(reason)
        return function(*args, **kwargs)

    return refuse


class _Unwritable:
    """A stream as it is for other threads; for the one that traces, writing is refused."""

    def __init__(self, stream: Any, thread: int) -> None:
        self._stream, self._thread = stream, thread

    def write(self, text: Any) -> Any:
        return self._to_stream("write", text)

    def writelines(self, lines: Any) -> Any:
        return self._to_stream("writelines", lines)

    def _to_stream(self, name: str, value: Any) -> Any:
        if threading.get_ident() == self._thread:
            raise Impurity("writes to a standard stream, which a graph would not repeat")
        return getattr(self._stream, name)(value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# -- what is compared and put back -------------------------------------------------------------------------------------


def _generators() -> list[torch.Generator]:
    is_initialized: Callable[[], bool] = torch.cuda.is_initialized
    return [torch.default_generator, *(torch.cuda.default_generators if is_initialized() else ())]


def _torch_random() -> list[Any]:
    return [generator.get_state() for generator in _generators()]


def _set_torch_random(states: list[Any]) -> None:
    for generator, state in zip(_generators(), states, strict=False):
        generator.set_state(state)


_DRAWS = "draws random numbers from Python or numpy"
_STATES: tuple[tuple[str, Callable[[], Any], Callable[[Any], None], str], ...] = (
    ("random", random.getstate, random.setstate, _DRAWS),
    ("numpy.random", lambda: np.random.get_state(legacy=False), np.random.set_state, _DRAWS),
    ("torch.random", _torch_random, _set_torch_random, "draws or seeds torch's random numbers outside of the graph"),
    ("dtype", torch.get_default_dtype, torch.set_default_dtype, "changes the default dtype"),
    ("gradients", torch.is_grad_enabled, torch._C._set_grad_enabled, "switches gradients on or off"),
)


def is_equal(a: Any, b: Any) -> bool:
    """Whether two states, nested tuples and dictionaries of numbers, arrays and tensors, are equal."""
    if isinstance(a, dict):
        return all(is_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, list):
        return all(np.array_equal(one.numpy(), other.numpy()) for one, other in zip(a, b, strict=True))
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else bool(a == b)
