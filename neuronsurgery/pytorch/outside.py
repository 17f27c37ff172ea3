"""What a forward can reach beside its module: globals, closures, classes and objects that its code names.

Before a trace the reachable names and the contents of the containers and objects behind them are noted; afterwards what
changed is put back, and the forward is refused: a graph would not repeat the change. What is reached is found by the
code's own names, through the user's functions and classes, once for each class.

Not seen: what is reached through values (an object in an attribute of an object), and state kept by C extensions.
"""

from __future__ import annotations

import collections
import collections.abc
import dis
import functools
import io
import operator
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from neuronsurgery.pytorch.ambient import is_equal
from neuronsurgery.pytorch.mirroring import Absent, Impurity

__all__ = ["Outside"]


class Outside:
    """The state of what some functions of classes can reach, and of further classes, as it was when this was made."""

    def __init__(self, functions: Iterable[tuple[type, str]], classes: Iterable[type] = ()) -> None:
        self.kept: list[Kept] = []
        self.seen: set[int] = set()
        for cls, method in functions:
            for reached in reach_of(cls, method):
                self.keep(reached)
        for cls in classes:
            self.keep_class(cls)
        for hooks in _GLOBAL_HOOKS:
            self.keep_container("the hooks of all modules", hooks, _DEPTH)

    def keep(self, reached: Reached) -> None:
        """Note a name and what stands behind it, or a class.

        Raises:
            Impurity: a file, an iterator or the handle of a hook stands there, whose state cannot be put back.
        """
        if reached.cls is not None:
            self.keep_class(reached.cls)
            return
        value = reached.read()
        self.kept.append(Kept(reached.label, value, reached.read, reached.write, operator.is_))
        self.keep_contents(reached.label, value)

    def keep_class(self, cls: type) -> None:
        def read() -> dict[str, Any]:
            return {name: value for name, value in vars(cls).items() if not name.startswith("__")}

        self.kept.append(Kept(cls.__name__, read(), read, functools.partial(_reset, cls)))
        for name, value in read().items():
            self.keep_contents(f"{cls.__name__}.{name}", value)

    def keep_contents(self, label: str, value: Any, depth: int = 0) -> None:
        if type(value) in _PLAIN or isinstance(value, _OPAQUE) or id(value) in self.seen or depth > _DEPTH:
            return
        self.seen.add(id(value))
        if isinstance(value, _STATEFUL):
            raise Impurity(f"uses '{label}', a {type(value).__name__}, which has a state of its own")
        for kind, read, write in _STATES:
            if isinstance(value, kind):
                ways = functools.partial(read, value), functools.partial(write, value)
                self.kept.append(Kept(label, ways[0](), *ways, is_equal))
        is_own = isinstance(value, types.SimpleNamespace) or not _is_library(type(value).__module__)
        for found in (value, getattr(value, "__dict__", None) if is_own else None):  # a Logger's own cache may fill
            if isinstance(found, _CONTAINERS):
                self.keep_container(label, found, depth)

    def keep_container(self, label: str, value: Any, depth: int) -> None:
        read = functools.partial(dict if isinstance(value, dict) else list, value)
        self.kept.append(Kept(label, read(), read, functools.partial(_refill, value)))
        if len(value) <= _LIMIT:
            for item in value.values() if isinstance(value, dict) else value:
                self.keep_contents(label, item, depth + 1)

    def put_back(self) -> str:
        """Undo every change; the name of the first thing that had changed, or ""."""
        changed = [kept for kept in self.kept if not kept.is_same(kept.read(), kept.before)]
        for kept in changed:
            kept.write(kept.before)
        return changed[0].label if changed else ""


def _has_same_items(now: Any, before: Any) -> bool:
    """Whether two dictionaries or lists hold the very same objects."""
    if isinstance(before, dict):
        return list(now) == list(before) and all(map(operator.is_, now.values(), before.values()))
    return len(now) == len(before) and all(map(operator.is_, now, before))


@dataclass(eq=False)
class Kept:
    """Something that was noted: what it held, how to look again, how to put it back, and when it is the same."""

    label: str
    before: Any
    read: Callable[[], Any]
    write: Callable[[Any], None]
    is_same: Callable[[Any, Any], bool] = _has_same_items


def _refill(container: Any, old: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, (list, collections.deque)) else container.update)(old)


def _reset(cls: type, old: dict[str, Any]) -> None:
    for name in [name for name in vars(cls) if not name.startswith("__") and name not in old]:
        type.__delattr__(cls, name)
    for name, value in old.items():
        if vars(cls).get(name) is not value:
            type.__setattr__(cls, name, value)


_LIMIT, _DEPTH = 1000, 3  # containers with more items are compared, but not what is inside each item
_CONTAINERS = (list, dict, set, collections.deque)
_PLAIN = frozenset({int, float, complex, str, bytes, bool, type(None), tuple, frozenset, torch.dtype, torch.device})
_OPAQUE = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type, nn.Module, torch.Tensor, property)
_STATEFUL = (collections.abc.Iterator, io.IOBase, RemovableHandle)
_STATES: tuple[tuple[type, Callable[[Any], Any], Callable[[Any, Any], None]], ...] = (
    (random.Random, lambda g: g.getstate(), lambda g, old: g.setstate(old)),
    (np.random.Generator, lambda g: g.bit_generator.state, lambda g, old: setattr(g.bit_generator, "state", old)),
    (np.random.RandomState, lambda g: g.get_state(legacy=False), lambda g, old: g.set_state(old)),
    (torch.Generator, lambda g: [g.get_state()], lambda g, old: g.set_state(old[0])),
    (np.ndarray, lambda a: a.copy() if a.size <= _LIMIT else None, lambda a, old: np.copyto(a, old)),
    # what a trace put into a cache are its own stand-ins for tensors, so the cache has to go
    (functools._lru_cache_wrapper, lambda f: f.cache_info().misses, lambda f, _: f.cache_clear()),
)
_GLOBAL_HOOKS = [
    hooks for name, hooks in vars(nn.modules.module).items() if name.startswith("_global_") and isinstance(hooks, dict)
]


# -- what the code of a class can reach --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reached:
    """A name that code refers to, as a way to read and write it; or a class."""

    label: str
    read: Callable[[], Any] = lambda: None
    write: Callable[[Any], None] = lambda _: None
    cls: type | None = None


@functools.lru_cache(maxsize=4096)
def reach_of(cls: type, method: str) -> tuple[Reached, ...]:
    """What a function of a class can reach, libraries left out."""
    walk = _Walk(cls)
    walk.add_class(cls)
    walk.add_methods(cls, (method,))
    return tuple(walk.found.values())


class _Walk:
    """Follows names from function to function; those of the first class's own functions too."""

    def __init__(self, cls: type) -> None:
        self.cls = cls
        self.found: dict[Any, Reached] = {}
        self.seen: set[int] = set()

    def add_class(self, cls: type) -> None:
        for base in cls.__mro__:
            if not _is_library(base.__module__):
                self.found[id(base)] = Reached(base.__name__, cls=base)

    def add_methods(self, cls: type, names: Iterable[str]) -> None:
        for base in cls.__mro__:
            for name in names if not _is_library(base.__module__) else ():
                if name in vars(base):
                    self.add_function(vars(base)[name])

    def add_function(self, value: Any) -> None:
        """Follow a function, or the ones behind a wrapper, a method or a property."""
        for found in (value, *(getattr(value, name, None) for name in ("__wrapped__", "__func__", "fget"))):
            if isinstance(found, types.FunctionType) and id(found) not in self.seen:
                self.seen.add(id(found))
                self.add_function_itself(found)

    def add_function_itself(self, function: types.FunctionType) -> None:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self.add_cell(name, cell)
        if _is_library(function.__module__):
            return
        self.found[id(function)] = Reached(function.__name__, functools.partial(vars, function))
        for code in _codes(function.__code__):
            stored = _stored_globals(code)
            for name in code.co_names:
                self.add_name(function.__globals__, name, code.co_names, name in stored)
            self.add_methods(self.cls, code.co_names)

    def add_cell(self, name: str, cell: Any) -> None:
        def read() -> Any:
            try:
                return cell.cell_contents
            except ValueError:
                return Absent.ABSENT

        def write(value: Any) -> None:
            cell.cell_contents = value

        value = read()
        if isinstance(value, (types.FunctionType, type)):
            self.follow(value, tuple(vars(value)))
        elif not isinstance(value, _OPAQUE):
            self.found[id(cell)] = Reached(name, read, write)

    def add_name(self, namespace: dict[str, Any], name: str, names: tuple[str, ...], is_stored: bool = False) -> None:
        if name not in namespace and not is_stored:
            return
        value = namespace.get(name)
        if is_stored or not isinstance(value, _OPAQUE):
            self.found[id(namespace), name] = _item(namespace, name)
        self.follow(value, names)

    def follow(self, value: Any, names: tuple[str, ...]) -> None:
        if isinstance(value, types.ModuleType):
            if not _is_library(value.__name__):
                for name in names:
                    if not isinstance(vars(value).get(name), types.ModuleType):
                        self.add_name(vars(value), name, names)
        elif isinstance(value, type):
            self.add_class(value)
            self.add_methods(value, () if issubclass(value, nn.Module) else names)
        elif not isinstance(value, (nn.Module, torch.Tensor)):
            self.add_function(value)


def _item(namespace: dict[str, Any], name: str) -> Reached:
    def write(value: Any) -> None:
        if value is Absent.ABSENT:
            namespace.pop(name, None)
        else:
            namespace[name] = value

    return Reached(name, lambda: namespace.get(name, Absent.ABSENT), write)


def _stored_globals(code: types.CodeType) -> frozenset[str]:
    """The globals that a piece of code assigns or deletes."""
    if not {dis.opmap["STORE_GLOBAL"], dis.opmap["DELETE_GLOBAL"]} & set(code.co_code[::2]):
        return frozenset()
    return frozenset(i.argval for i in dis.get_instructions(code) if i.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"))


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_library(module: str | None) -> bool:
    """Whether a module is torch's, numpy's, einops's, this package's or Python's own."""
    top = (module or "").partition(".")[0]
    return top in _LIBRARIES or top in sys.stdlib_module_names


_LIBRARIES = frozenset({"torch", "numpy", "einops", "neuronsurgery", "builtins"})
