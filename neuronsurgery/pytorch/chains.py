"""Chains: how a site that spans several children of a Sequential is shared out among them.

A Sequential stays a loop over its children, which hand the frozen rows on. The first part of a chain is the producer,
or a child with a forward of its own that returns the producer's pre-activations; the rest are modules, in this
Sequential or in Sequentials inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from neuronsurgery.pytorch.mirroring import original_class, submodule
from neuronsurgery.pytorch.producers import is_producer

__all__ = ["Chain", "chain_of", "is_sequential"]


@dataclass(frozen=True, eq=False)
class Chain:
    """Who takes part: the Sequentials around, the first part (with the path to it), and the modules that follow.

    `inside` is the producer's path in the first part, "" where that is the producer itself.
    """

    loops: tuple[nn.Module, ...]
    first: nn.Module
    first_path: str
    inside: str
    links: tuple[nn.Module, ...]


def is_sequential(module: nn.Module) -> bool:
    """Whether a module's forward is the loop of nn.Sequential."""
    return original_class(module).forward is nn.Sequential.forward


def chain_of(sequential: nn.Module, producer: str, modules: Sequence[str], origins: Sequence[str]) -> Chain | str:
    """The chain of a site in a Sequential, or why its children cannot hand its rows on.

    `producer` and `modules` are paths in the Sequential; `modules` those of the links, "" for a function; `origins` the
    paths of the inlined children that producer and links come from.
    """
    loops, first, path = [sequential], sequential, ""
    names = producer.split(".")
    while is_sequential(first) and names:
        path = f"{path}.{names[0]}" if path else names[0]
        first, names = submodule(sequential, path), names[1:]
        if is_sequential(first):
            loops.append(first)
    links = []
    behind = zip(modules, origins[1:], strict=True)
    for name in (name for name, origin in behind if not f"{origin}.".startswith(f"{path}.")):
        around = [submodule(sequential, ancestor) for ancestor in _ancestors(name)]
        if not name or not all(is_sequential(module) for module in around):
            return f"its activation function is inside the forward of another child of a Sequential than '{path}'"
        loops += [module for module in around if module not in loops]
        links.append(submodule(sequential, name))
    inside = "" if is_producer(first) else ".".join(names)
    return Chain(tuple(loops), first, path, inside, tuple(links))


def _ancestors(path: str) -> list[str]:
    parts = path.split(".")[:-1]
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))]
