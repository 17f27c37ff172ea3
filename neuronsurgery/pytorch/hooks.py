"""The user's hooks on a module: whether one may change what the module passes on.

A forward hook that returns a value replaces the module's output; the bank would not know of it. Nothing is called to
find out, since a user's hook may count or log: its bytecode says whether it can return anything but None.
"""

from __future__ import annotations

import collections
import dis
import functools
import inspect
import itertools
import types
from typing import Any

from torch import nn

__all__ = ["has_hooks", "may_change_output"]

_CONTAINERS = (list, dict, set, collections.deque)
_FILLING = frozenset("append appendleft add update extend insert __setitem__".split())


def may_change_output(module: nn.Module) -> bool:
    """Whether a forward hook on the module may return a new output, or change the one it gets in place."""
    return any(not returns_none(hook) or works_in_place(hook) for hook in module._forward_hooks.values())


def has_hooks(module: nn.Module) -> bool:
    """Whether anything runs around the module's forward."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def returns_none(hook: Any) -> bool:
    """Whether a callable can be shown to return None: it has no other return, or is a lambda around `list.append`.

    Example:
        >>> seen = []
        >>> returns_none(lambda module, args, output: seen.append(output))
        True
        >>> returns_none(lambda module, args, output: output * 2)
        False
    """
    function = function_of(hook)
    if function is None:
        return False
    instructions = [i for i in dis.get_instructions(function) if i.opname not in _PADDING]
    if function.__name__ == "<lambda>":
        return _only_fills_container(function, instructions)
    for previous, current in itertools.pairwise(instructions):
        if current.opname == "RETURN_VALUE" and not (previous.opname == "LOAD_CONST" and previous.argval is None):
            return False
        if current.opname == "RETURN_CONST" and current.argval is not None:
            return False
    return True


def works_in_place(hook: Any) -> bool:
    """Whether a hook calls a method such as `mul_`."""
    function = function_of(hook)
    return function is None or any(
        name.endswith("_") and not name.endswith("__") for name in function.__code__.co_names
    )


def function_of(hook: Any) -> types.FunctionType | None:
    """The Python function behind a hook: its own, a method's, a partial's, or its class's `__call__`."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    for candidate in (getattr(hook, "__func__", hook), inspect.getattr_static(type(hook), "__call__", None)):
        if isinstance(candidate, types.FunctionType):
            return candidate
    return None


_PADDING = frozenset("CACHE RESUME COPY_FREE_VARS PUSH_NULL PRECALL MAKE_CELL NOP EXTENDED_ARG".split())


def _only_fills_container(function: types.FunctionType, instructions: list[dis.Instruction]) -> bool:
    """Whether a lambda is one call of a container's filling method, the container found by a name outside of it."""
    if len(instructions) < 4 or not instructions[-2].opname.startswith("CALL"):
        return False
    if any("JUMP" in instruction.opname for instruction in instructions):
        return False
    outer = inspect.getclosurevars(function)
    owner = {**outer.globals, **outer.nonlocals}.get(instructions[0].argval)
    return isinstance(owner, _CONTAINERS) and instructions[1].argval in _FILLING
