"""einops, whose functions a trace records as one node each: their own code asks for shapes that are not known yet.

They are recorded however the user's code came by them (`from einops import rearrange`, a partial, an attribute): while
a forward is traced, the functions' code is exchanged for one that asks the tracer first. einops itself is never
imported here.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from neuronsurgery.pytorch.mirroring import original_class

__all__ = ["einops_recorded", "is_imported", "is_of_einops"]

_NAMES = ("rearrange", "reduce", "repeat", "einsum", "pack", "unpack", "parse_shape")
Record = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextlib.contextmanager
def einops_recorded(record: Record) -> Iterator[None]:
    """Give calls of einops's functions with stand-ins for tensors to `record`."""
    einops = sys.modules.get("einops")
    functions = {name: getattr(einops, name, None) for name in _NAMES}
    exchanged = {n: f for n, f in functions.items() if isinstance(f, types.FunctionType) and f.__closure__ is None}
    codes = {name: function.__code__ for name, function in exchanged.items()}
    _RUNNING.clear()
    _RUNNING.update({name: _Running(f, _copied(f), record) for name, f in exchanged.items()})
    try:
        for name, function in exchanged.items():
            function.__code__ = _asking_code(name)
        yield
    finally:
        for name, function in exchanged.items():
            function.__code__ = codes[name]
        _RUNNING.clear()  # it refers to the model


def is_imported() -> bool:
    """Whether anyone has imported einops by now; a forward may do so itself, and is then traced again."""
    return "einops" in sys.modules


def is_of_einops(module: nn.Module) -> bool:
    """Whether a module is one of einops's layers, which stay opaque."""
    return original_class(module).__module__.partition(".")[0] == "einops"


class _Running:
    """A function of einops while its code is exchanged, with a copy that runs the code it had."""

    def __init__(self, function: Any, copied: Any, record: Record) -> None:
        self.function, self.copied, self.record = function, copied, record

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_symbolic = any(issubclass(type(leaf), fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs)))
        if is_symbolic:
            return self.record(self.function, args, kwargs)
        return self.copied(*args, **kwargs)


_RUNNING: dict[str, _Running] = {}


def ask(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the exchanged code calls."""
    return _RUNNING[name].call(args, kwargs)


def _copied(function: types.FunctionType) -> types.FunctionType:
    copied = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _asking_code(name: str) -> types.CodeType:
    scope: dict[str, Any] = {}
    source = f"def {name}(*args, **kwargs):\n    from {__name__} import ask\n    return ask({name!r}, args, kwargs)\n"
    exec(compile(source, __file__, "exec"), scope)
    code: types.CodeType = scope[name].__code__
    return code
