"""Calls: how a function was called, as a value that chooses its graph, and the arguments that the graph takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuronsurgery.errors import UntraceableError
from neuronsurgery.pytorch.mirroring import original_class

__all__ = ["Call", "Description", "default_call", "describe", "is_namedtuple", "unbind"]

Description = Any  # nested tuples; ("tensor",), ("number", type), ("constant", value), or a container of these


@dataclass(frozen=True)
class Call:
    """How a function was called: the names its arguments bind to, and what each of them was, as nested tuples."""

    names: tuple[str, ...]
    description: Description


def default_call(module: nn.Module, method: str = "forward") -> Call:
    """The call with a tensor for each argument that has no default, and the defaults for the rest."""
    names, parts = [], []
    for parameter in _parameters(getattr(original_class(module), method))[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            value: Description = ("dict", (), ())
        elif parameter.kind is parameter.VAR_POSITIONAL:
            value = (tuple, (("tensor",),))
        else:
            value = ("tensor",) if parameter.default is parameter.empty else describe(parameter.default, [])
        names.append(parameter.name)
        parts.append(value)
    return Call(tuple(names), tuple(parts))


@functools.lru_cache(maxsize=4096)
def _parameters(function: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    """The parameters of a function: a model asks for those of the same few functions in every module."""
    return tuple(inspect.signature(function).parameters.values())


def describe(value: Any, leaves: list[Any], constant_numbers: bool = False) -> Description:
    """What an argument is, hashable, for choosing a graph; tensors (and numbers) are appended to `leaves`."""
    if isinstance(value, Tensor):
        leaves.append(value)
        return ("tensor",)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not constant_numbers:
        leaves.append(value)
        return ("number",)
    if isinstance(value, (tuple, list)):
        return (type(value), tuple([describe(item, leaves, constant_numbers) for item in value]))
    if isinstance(value, dict):
        parts = tuple([describe(item, leaves, constant_numbers) for item in value.values()])
        return ("dict", tuple(value), parts)
    if isinstance(value, (type(None), bool, str, int, float, torch.dtype, torch.device)):
        return ("constant", value)
    raise UntraceableError(
        f"an argument of type {type(value).__name__} cannot be part of a traced call; pass tensors, numbers, strings, "
        "None, or tuples, lists and dictionaries of them"
    )


def unbind(function: Callable[..., Any], module: Any, bound: Mapping[str, Any]) -> Any:
    """Call a function of a module with its arguments by name, respecting positional-only and starred ones."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for parameter in _parameters(function)[1:]:
        value = bound[parameter.name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            args.extend(value)
        elif parameter.kind is parameter.VAR_KEYWORD:
            kwargs.update(value)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            kwargs[parameter.name] = value
        else:
            args.append(value)
    return function(module, *args, **kwargs)


def is_namedtuple(kind: type) -> bool:
    """Whether a tuple class is a named tuple, which is built from its items one by one."""
    return "_fields" in vars(kind) or any("_fields" in vars(base) for base in kind.__mro__)
