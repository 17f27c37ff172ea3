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

from torch import fx, nn

from neuronsurgery.errors import SurgeryError

__all__ = [
    "forbids_inlining",
    "has_hooks",
    "is_hook_call",
    "may_change_input",
    "may_change_output",
    "run_hooks",
    "parallelizes",
    "run_pre_hooks",
    "splits",
]

_CONTAINERS = (list, dict, set, collections.deque)
_FILLING = frozenset("append appendleft add update extend insert __setitem__".split())


def may_change_output(module: nn.Module) -> bool:
    """Whether a forward hook on the module may return a new output, or change the one it gets in place."""
    return any(
        not (shards(hook) or splits(hook)) and (not returns_none(hook) or works_in_place(hook))
        for hook in module._forward_hooks.values()
    )


def shards(hook: Any) -> bool:
    """Whether a hook is one by which FSDP gathers parameters, and passes on what it gets, in another dtype at most."""
    function = function_of(hook)
    return function is not None and function.__module__.startswith("torch.distributed.fsdp.")


def parallelizes(hook: Any) -> bool:
    """Whether a hook is one by which tensor parallelism spreads what goes in or comes out."""
    function = function_of(hook)
    return function is not None and function.__module__.startswith("torch.distributed.tensor.")


def splits(hook: Any) -> bool:
    """Whether a hook is `ColwiseParallel`'s, and leaves each process with the outputs of its own units."""
    if not parallelizes(hook):
        return False
    function: Any = function_of(hook)
    made: Any = inspect.getclosurevars(function).nonlocals.get("output_fn")
    if not isinstance(made, functools.partial) or made.func.__qualname__ != "ColwiseParallel._prepare_output_fn":
        return False
    (layout,), is_local = made.args
    return bool(is_local and layout.is_shard(-1))


def may_change_input(module: nn.Module) -> bool:
    """Whether a forward pre-hook on the module may replace its arguments, or change them in place."""
    return any(not returns_none(hook) or works_in_place(hook) for hook in module._forward_pre_hooks.values())


def forbids_inlining(module: nn.Module) -> bool:
    """Whether hooks of a module need its own call, because they may change what passes, or run in the backward pass."""
    runs_backward = module._backward_hooks or module._backward_pre_hooks
    gathers = any(shards(hook) for hook in module._forward_hooks.values())
    return bool(runs_backward) or gathers or may_change_input(module) or may_change_output(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything runs around the module's forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or forbids_inlining(module)


# -- hooks of a child that has become part of its parent's graph -------------------------------------------------------


def run_pre_hooks(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the forward pre-hooks that an inlined child has now, in torch's order.

    Raises:
        SurgeryError: one of them replaces the arguments.
    """
    hooks: dict[int, Any] = {**_modules._global_forward_pre_hooks, **module._forward_pre_hooks}
    for key, hook in hooks.items():
        named = (kwargs,) if key in module._forward_pre_hooks_with_kwargs else ()
        if hook(module, args, *named) is not None:
            raise SurgeryError(_REPLACES.format("forward pre-hook", type(module).__name__, "arguments"))


def run_hooks(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Run the forward hooks that an inlined child has now, in torch's order.

    Raises:
        SurgeryError: one of them replaces the output.
    """
    hooks: dict[int, Any] = {**_modules._global_forward_hooks, **module._forward_hooks}
    with_kwargs = {*_modules._global_forward_hooks_with_kwargs, *module._forward_hooks_with_kwargs}
    for key, hook in hooks.items():
        if hook(module, args, *((kwargs,) if key in with_kwargs else ()), output) is not None:
            raise SurgeryError(_REPLACES.format("forward hook", type(module).__name__, "output"))


def is_hook_call(node: fx.Node) -> bool:
    """Whether a node of a graph only runs hooks: it reads values, and passes nothing on."""
    return node.target in (run_pre_hooks, run_hooks)


_modules = nn.modules.module
_REPLACES = (
    "a {} registered on {} replaces its {}; the activation function of a composite inside stands in the parent, which "
    "would not see that. Return None from the hook, or undo the operation first"
)


# -- what a hook's code says -------------------------------------------------------------------------------------------


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
