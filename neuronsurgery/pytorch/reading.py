"""Readings: every scope of a model with its functions as traced, or the reason why they could not be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from neuronsurgery.errors import UntraceableError
from neuronsurgery.pytorch.assuming import default_traces
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.fused import is_fused_layer, readable_method, why_not_readable
from neuronsurgery.pytorch.mirroring import original_class
from neuronsurgery.pytorch.opaque import is_of_einops
from neuronsurgery.pytorch.producers import is_producer
from neuronsurgery.pytorch.reads import Read, methods_of, reads_of
from neuronsurgery.pytorch.tracing import Trace

__all__ = ["CONTAINERS", "Reading", "is_scope", "is_torch", "modules_of", "read", "scopes_of", "targets_of"]


@dataclass(eq=False)
class Reading:
    """One scope: its functions as traced, or why its forward could not be."""

    name: str
    scope: nn.Module
    traces: list[tuple[str, Trace]] = field(default_factory=list)
    inline: frozenset[str] = frozenset()
    failure: UntraceableError | None = None
    unread: dict[str, str] = field(default_factory=dict)  # method -> why it could not be traced

    @property
    def is_sequential(self) -> bool:
        return original_class(self.scope).forward is nn.Sequential.forward

    @property
    def has_forward(self) -> bool:
        """Whether the forward itself was traced, so that what enters the scope can be followed."""
        return any(method == "forward" for method, _ in self.traces)


CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, by its first name, banks and scripted modules left out."""
    left_out = (Composite, torch.jit.ScriptModule)
    return ((name, module) for name, module in model.named_modules() if not isinstance(module, left_out))


def is_torch(module: nn.Module) -> bool:
    """Whether a module's class comes with torch."""
    return original_class(module).__module__.partition(".")[0] == "torch"


def scopes_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules with a forward of their own: the user's, Sequentials, and torch's layers with a readable block."""
    return ((name, module) for name, module in modules_of(model) if is_scope(module))


def is_scope(module: nn.Module) -> bool:
    """Whether a module has a forward of its own, which calls children or functions, and can be read in part."""
    forward: Any = getattr(original_class(module), "forward", None)
    if forward is None or forward is nn.Module.forward or is_producer(module) or is_of_einops(module):
        return False
    return not is_torch(module) or forward is nn.Sequential.forward or is_fused_layer(module)


def read(name: str, scope: nn.Module, inline: frozenset[str] = frozenset()) -> Reading:
    """Trace a scope's forward in both modes, and the methods beside it that compute with the scope's own children."""
    reading = Reading(name, scope, inline=inline)
    if reason := why_not_readable(scope):
        reading.failure = UntraceableError(reason)
        return reading
    main = readable_method(scope)
    try:
        reading.traces = _outcomes(scope, main, inline)
    except UntraceableError as error:
        reading.failure = error
        return reading
    for method, function in methods_of(scope):
        if _may_be_traced(scope, function):
            try:
                reading.traces += _outcomes(scope, method, inline)
            except UntraceableError as error:
                reading.unread[method] = error.reason
    return reading


def _outcomes(scope: nn.Module, method: str, inline: frozenset[str]) -> list[tuple[str, Trace]]:
    """The default traces of a function, one for each outcome of its questions."""
    return [(method, each) for traced in default_traces(scope, method, inline) for each in traced.outcomes]


_SIDE_EFFECTS = frozenset(
    "backward step zero_grad save load open print write append extend update item numpy cpu cuda send exec eval sleep "
    "submit join run fit reset render".split()
)


def _may_be_traced(scope: nn.Module, function: Any) -> bool:
    """Whether a method computes with producers, and can be run on proxies: nothing it names has effects."""
    code = getattr(function, "__code__", None)
    reads = reads_of(function)
    if code is None or reads is None or _SIDE_EFFECTS & set(code.co_names) or code.co_argcount < 2:
        return False
    return any(
        isinstance(target, nn.Module) and read.is_call and is_producer(target)
        for read, target in targets_of(scope, reads)
    )


def targets_of(owner: nn.Module, reads: Sequence[Read]) -> Iterator[tuple[Read, Any]]:
    """What each chain leads to, as far as modules and parameters go; a wildcard leads to every child."""
    for read in reads:
        for target, rest in _follow(owner, read.chain):
            is_call = read.is_call and (not rest or rest == ("forward",))
            is_part = isinstance(target, nn.Parameter) and all(name in _PARTS for name in rest)
            if is_call or (not read.is_call and (not rest or is_part)):
                yield Read(read.chain, read.is_call), target


_PARTS = (None, "T", "mT")  # of a parameter: one of several stacked in it, or its transpose


def _follow(value: Any, chain: tuple[str | None, ...]) -> Iterator[tuple[Any, tuple[str | None, ...]]]:
    if not chain or not isinstance(value, nn.Module):
        yield value, chain
        return
    name, rest = chain[0], chain[1:]
    if name is None:
        for child in value.children():
            yield from _follow(child, rest)
        return
    if isinstance(value, nn.Sequential | nn.ModuleList) and name.lstrip("-").isdigit():
        children = list(value.children())
        if -len(children) <= int(name) < len(children):
            yield from _follow(children[int(name)], rest)
        return
    found: Any = value._modules.get(name)
    if found is None:
        found = value._parameters.get(name)
    if found is not None:
        yield from _follow(found, rest)
    else:
        yield value, chain
