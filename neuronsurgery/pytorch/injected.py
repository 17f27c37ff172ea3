"""What an injection leaves behind: the frozen copies, and the class whose forward adds them up."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

from torch import nn
from torch.utils._pytree import tree_map

from neuronsurgery.pytorch.mirroring import submodule

__all__ = ["CHILD", "Injected", "Injection", "injected_class", "is_frozen_copy"]

CHILD = "injection"
"""The name of the child that holds the frozen copies."""


def is_frozen_copy(model: nn.Module, name: str) -> bool:
    """Whether what has this name is inside the frozen copies of an injection."""
    parts = name.split(".")
    return any(isinstance(submodule(model, ".".join(parts[:depth])), Injection) for depth in range(len(parts)))


class Injection(nn.Module):
    """The frozen copies of a module: what it knew, and what its fresh weights were at first."""

    def __init__(self, knowledge: nn.Module, compensation: nn.Module) -> None:
        super().__init__()
        self.knowledge, self.compensation = knowledge, compensation


class Injected(nn.Module):
    """The first base of every class that adds frozen copies to a module; pickling goes by the original class."""

    _neuronsurgery_injected: type[nn.Module]
    _neuronsurgery_holder: str

    def __init_subclass__(cls) -> None:
        """Not passed on: generating a class must not run the user's subclass hook."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        cls, original = type(self), self._neuronsurgery_injected
        arguments = tuple(original if argument is cls else argument for argument in reduced[1])
        return (_rebuilt, (self._neuronsurgery_holder, reduced[0], arguments), *reduced[2:])


def _rebuilt(holder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    instance = function(*arguments)
    object.__setattr__(instance, "__class__", injected_class(cast(Any, type(instance)), holder))
    return instance


@functools.cache
def injected_class(cls: Any, holder: str) -> type:
    """The subclass of `cls` whose forward adds the frozen copies that hang on the child at `holder`; one for all."""
    original = cls.forward
    signature = inspect.signature(original)
    owner, *others = signature.parameters.values()
    given = ", ".join(_passed_on(each) for each in others)
    defaults = {f"_default_{p.name}": p.default for p in others if p.default is not p.empty}
    shown = [p.replace(annotation=p.empty, default=_Bare(p) if p.default is not p.empty else p.empty) for p in others]
    head = inspect.Signature([owner.replace(annotation=owner.empty), *shown])
    source = (
        f"def forward{head}:\n"
        f"    _frozen = _submodule({owner.name}, _holder).{CHILD}\n"
        f"    _active = _original({owner.name}, {given})\n"
        f"    return _added(_frozen.knowledge({given}), _active, _frozen.compensation({given}))\n"
    )
    scope = {"_submodule": submodule, "_holder": holder, "_original": original, "_added": added, **defaults}
    exec(compile(source, f"<neuronsurgery injection into {cls.__qualname__}>", "exec"), scope)
    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "_neuronsurgery_injected": cls,
        "_neuronsurgery_holder": holder,
        "forward": functools.wraps(original)(cast(Any, scope["forward"])),
    }
    generated: type[nn.Module] = type(cls)(cls.__name__, (Injected, cls), namespace)
    return generated


def _passed_on(parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_POSITIONAL:
        return f"*{parameter.name}"
    if parameter.kind is parameter.VAR_KEYWORD:
        return f"**{parameter.name}"
    return f"{parameter.name}={parameter.name}" if parameter.kind is parameter.KEYWORD_ONLY else parameter.name


class _Bare:
    """Prints as a bare name where a signature shows a default."""

    def __init__(self, parameter: inspect.Parameter) -> None:
        self.name = f"_default_{parameter.name}"

    def __repr__(self) -> str:
        return self.name


def added(knowledge: Any, active: Any, compensation: Any) -> Any:
    """`k + (a - c)` of tensors, or of each tensor in structures of them; the difference is exact zero at first."""
    if isinstance(active, (tuple, list, dict)):
        return tree_map(added, knowledge, active, compensation)
    return active if active is None else knowledge + (active - compensation)
