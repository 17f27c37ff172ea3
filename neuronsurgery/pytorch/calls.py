"""Calls: how a function was called, as a value that chooses its graph, and the arguments that the graph takes."""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neuronsurgery.errors import UntraceableError
from neuronsurgery.pytorch.mirroring import original_class

__all__ = [
    "Call",
    "Description",
    "default_call",
    "default_leaves",
    "describe",
    "contents_of",
    "is_namedtuple",
    "maker",
    "numbers_of_starred",
    "unbind",
]

Description = Any  # nested tuples; ("tensor",), ("number",), ("constant", value, type), or a container of these


@dataclass(frozen=True)
class Call:
    """How a function was called: the names its arguments bind to, and what each of them was, as nested tuples."""

    names: tuple[str, ...]
    description: Description


def default_call(
    module: nn.Module, method: str = "forward", constant_numbers: bool = False, num_starred: int = 1
) -> Call:
    """The call with a tensor for each argument that has no default, some for `*args`, and the defaults for the rest."""
    return _default(module, method, constant_numbers, num_starred)[0]


def default_leaves(module: nn.Module, method: str = "forward", num_starred: int = 1) -> tuple[Any, ...]:
    """The leaves of the default call: None for each tensor, which is unknown, and the numbers."""
    return _default(module, method, False, num_starred)[1]


def numbers_of_starred(module: nn.Module, method: str = "forward") -> tuple[int, ...]:
    """How many tensors a default call may pass for `*args`: what most forwards take first; (1,) where there are none.

    The others are for forwards that raise an error of their own for one, as a mixer of values and states does.
    """
    parameters = _parameters(getattr(original_class(module), method))
    return (1, 2, 3, 0) if any(p.kind is p.VAR_POSITIONAL for p in parameters) else (1,)


def _default(module: nn.Module, method: str, constant_numbers: bool, num_starred: int) -> tuple[Call, tuple[Any, ...]]:
    names: list[str] = []
    parts: list[Description] = []
    leaves: list[Any] = []
    for parameter in _parameters(getattr(original_class(module), method))[1:]:
        if parameter.kind is parameter.VAR_KEYWORD:
            value: Description = ("dict", (), ())
        elif parameter.kind is parameter.VAR_POSITIONAL:
            value = (tuple, (("tensor",),) * num_starred)
            leaves += [None] * num_starred
        elif parameter.default is parameter.empty:
            value = ("tensor",)
            leaves.append(None)
        else:
            value = describe(parameter.default, leaves, constant_numbers)
        names.append(parameter.name)
        parts.append(value)
    return Call(tuple(names), tuple(parts)), tuple(leaves)


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
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _describe_object(value, leaves, constant_numbers)
    if isinstance(value, dict):
        parts = tuple([describe(item, leaves, constant_numbers) for item in value.values()])
        return ("dict", tuple(value), parts)
    if isinstance(value, (type(None), bool, str, int, float, enum.Enum, torch.dtype, torch.device)):
        return ("constant", value, type(value))  # True, 1 and 1.0 are equal, and other kinds of calls
    raise UntraceableError(
        f"an argument of type {type(value).__name__} cannot be part of a traced call; pass tensors, numbers, strings, "
        "None, or tuples, lists, dictionaries and dataclasses of them"
    )


def _describe_object(value: Any, leaves: list[Any], constant_numbers: bool) -> Description:
    """A dataclass by its attributes; one that is a dictionary too holds some of them as its items."""
    attributes, keys = contents_of(value)
    parts = tuple([describe(item, leaves, constant_numbers) for item in attributes.values()])
    return ("object", type(value), tuple(attributes), parts, keys)


def contents_of(value: Any) -> tuple[dict[str, Any], tuple[str, ...] | None]:
    """The attributes of a dataclass, and the names of those that it has as items, None if it is no dictionary.

    Raises:
        UntraceableError: it is a dictionary with other items.
    """
    attributes = {
        name: getattr(value, name)
        for name in dict.fromkeys([*(f.name for f in dataclasses.fields(value)), *getattr(value, "__dict__", ())])
        if getattr(value, name, _ABSENT) is not _ABSENT
    }
    if not isinstance(value, dict):
        return attributes, None
    if any(attributes.get(key, _ABSENT) is not item for key, item in dict.items(value)):
        raise UntraceableError(f"a {type(value).__name__} holds items that are not its attributes")
    return attributes, tuple(dict.keys(value))


_ABSENT = object()


@functools.lru_cache(maxsize=1024)
def maker(cls: type, names: tuple[str, ...], keys: tuple[str, ...] | None) -> Callable[..., Any]:
    """A function that makes an instance from its attributes, without running its constructor a second time."""
    is_ordered = issubclass(cls, collections.OrderedDict)
    base: Any = collections.OrderedDict if is_ordered else dict if issubclass(cls, dict) else object

    def make(*values: Any) -> Any:
        made = base.__new__(cls)
        for name, value in zip(names, values, strict=True):
            object.__setattr__(made, name, value)
            if keys and name in keys:
                base.__setitem__(made, name, value)
        return made

    make.__name__ = make.__qualname__ = f"make_{cls.__name__}"
    return make


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
