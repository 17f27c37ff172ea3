"""Which class each module of an operated or observed model must have, and the changes that give it that class."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn

from neuronsurgery.pytorch.carrying import Role
from neuronsurgery.pytorch.insertion import Rewrite
from neuronsurgery.pytorch.mirroring import original_class, submodule
from neuronsurgery.pytorch.places import Home, bank_name
from neuronsurgery.pytorch.programs import Program, rewritten_class
from neuronsurgery.pytorch.sites import Discovery
from neuronsurgery.pytorch.taps import is_observed
from neuronsurgery.pytorch.transaction import Change, SetClass

__all__ = ["class_changes"]


def class_changes(discovery: Discovery, banked: Collection[str]) -> list[Change]:
    """Exchange the class of every module that must apply a bank, or no longer does."""
    observed = [name for name, place in discovery.places.items() if is_observed(place.weight)]
    wanted = programs_for(discovery, banked, tapped=observed)
    changes: list[Change] = []
    for module in discovery.model.modules():
        cls = rewritten_class(module, wanted[module]) if module in wanted else original_class(module)
        if type(module) is not cls:
            changes.append(SetClass(module, cls))
    return changes


def programs_for(discovery: Discovery, banked: Collection[str], tapped: Collection[str]) -> dict[nn.Module, Program]:
    """For each scope that holds a site with a bank, or one to observe, the program of its class."""
    homes: dict[nn.Module, list[tuple[Home, Rewrite]]] = {}
    for name, place in discovery.places.items():
        if name in banked or name in tapped:
            for home in place.homes:
                bank = bank_path(home) if name in banked else None
                homes.setdefault(home.scope, []).append((home, Rewrite(home.producer, bank, name in tapped)))
    programs = {module: Program(role) for module, role in children_roles(homes)}
    return programs | {
        scope: Program(
            Role.SEQUENTIAL if is_sequential(scope) else Role.SCOPE,
            rewrites=tuple(sorted({rewrite for _, rewrite in found}, key=lambda r: r.producer)),
            methods=tuple(sorted({home.method for home, _ in found})),
            inline=frozenset().union(*(home.inline for home, _ in found)),
        )
        for scope, found in homes.items()
    }


def is_sequential(scope: nn.Module) -> bool:
    """Whether a scope's forward is the loop of nn.Sequential."""
    return original_class(scope).forward is nn.Sequential.forward


def children_roles(homes: Mapping[nn.Module, Sequence[tuple[Home, Rewrite]]]) -> Iterator[tuple[nn.Module, Role]]:
    """In a Sequential, the producers and what stands between them and their consumers take the rows on themselves."""
    for scope, found in homes.items():
        if is_sequential(scope):
            for home, _ in found:
                if home.method == "forward":
                    yield submodule(scope, home.producer), Role.PRODUCER
                    for name in home.modules:
                        yield submodule(scope, name), Role.PATH


def bank_path(home: Home) -> str:
    """Where the scope finds the bank of one of its producers."""
    owner, _, last = home.producer.rpartition(".")
    parent = submodule(home.scope, owner)
    if last in parent._modules:
        return f"{home.producer}.composite"
    name = bank_name(parent, last)
    return f"{owner}.{name}" if owner else name
