"""What a function of a module reads from it, by its source alone: for code that is not, or cannot be, traced.

Other methods of a class may use the same producer as its forward, and a forward that cannot be traced may reach into
a child. Neither may be executed to find out, so the syntax tree is searched for chains such as `self.encoder.fc1`.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from neuronsurgery.pytorch.mirroring import original_class

__all__ = ["Read", "methods_of", "reads_of"]

_COMPUTING = frozenset(
    "linear conv1d conv2d conv3d matmul mm addmm bmm einsum baddbmm functional_call checkpoint".split()
)
_HARMLESS = ("reset", "init", "_init", "extra_repr", "__init__", "__repr__")


@dataclass(frozen=True)
class Read:
    """A chain from `self`: attribute names, or None for a subscript or loop that may reach any child.

    `is_call` if the chain itself is called, else the value went elsewhere: into a computation, a loop, a function.
    """

    chain: tuple[str | None, ...]
    is_call: bool


def methods_of(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The functions a user may call on a module beside its forward, defined by its own classes (not by torch)."""
    yield from _methods_of_class(cast(Any, original_class(module)))


@functools.lru_cache(maxsize=4096)
def _methods_of_class(owner: Any) -> tuple[tuple[str, Callable[..., Any]], ...]:
    seen = {"forward"}
    found: list[tuple[str, Callable[..., Any]]] = []
    for cls in owner.__mro__:
        if cls.__module__.partition(".")[0] in ("torch", "einops", "builtins", "abc", "typing"):
            continue
        for name, value in vars(cls).items():
            function = value.fget if isinstance(value, property) else value
            if name not in seen and inspect.isfunction(function) and not name.startswith(_HARMLESS):
                found.append((name, function))
            seen.add(name)
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def reads_of(function: Callable[..., Any]) -> tuple[Read, ...] | None:
    """Every chain that a function reads from its first argument; None if its source is not to be had."""
    try:
        source = inspect.getsource(function)
        tree = ast.parse(f"if True:\n{source}" if source[:1].isspace() else source)  # text in it may be less indented
    except (OSError, TypeError, SyntaxError):
        return None
    definition = next((n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))), None)
    if definition is None or not definition.args.args:
        return () if definition is not None else None
    owner = definition.args.args[0].arg
    parents = {child: parent for parent in ast.walk(definition) for child in ast.iter_child_nodes(parent)}
    return tuple(
        read
        for node in ast.walk(definition)
        if isinstance(node, ast.Name) and node.id == owner and (read := _read_at(node, parents)) is not None
    )


def _read_at(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Read | None:
    chain: list[str | None] = []
    while True:
        parent = parents.get(node)
        if isinstance(parent, ast.Attribute):
            chain.append(parent.attr)
        elif isinstance(parent, ast.Subscript) and parent.value is node:
            chain.append(_subscript(parent))
        else:
            break
        node = parent
    if isinstance(parent, ast.Call) and parent.func is node:
        return Read(tuple(chain), is_call=True) if chain else None
    return _escape(tuple(chain), node, parent, parents)


def _escape(
    chain: tuple[str | None, ...], node: ast.AST, parent: ast.AST | None, parents: dict[ast.AST, ast.AST]
) -> Read | None:
    """A value that is not called itself: computed with, looped over, or handed on."""
    if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.MatMult):
        return Read(chain, is_call=False)
    if isinstance(parent, (ast.For, ast.comprehension)) and parent.iter is node:
        return Read((*chain, None), is_call=True)
    if isinstance(parent, (ast.Call, ast.keyword)):
        call = parents.get(parent) if isinstance(parent, ast.keyword) else parent
        name = _called_name(call)
        if name == "getattr":
            return Read((*chain, None), is_call=True)
        if name in ("enumerate", "zip", "reversed", "list", "tuple", "iter"):
            return Read((*chain, None), is_call=True)
        if name in _COMPUTING or name in _WITH_OTHER_PARAMETERS:
            return Read(chain, is_call=False)
    return None


_WITH_OTHER_PARAMETERS = ("functional_call", "stack_module_state")
"""What runs a module that it is given with other parameters than the module's own."""


def _called_name(call: ast.AST | None) -> str:
    function = call.func if isinstance(call, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", ""))


def _subscript(node: ast.Subscript) -> str | None:
    index = node.slice
    if isinstance(index, ast.UnaryOp) and isinstance(index.op, ast.USub) and isinstance(index.operand, ast.Constant):
        return f"-{index.operand.value!r}"
    return str(index.value) if isinstance(index, ast.Constant) else None
