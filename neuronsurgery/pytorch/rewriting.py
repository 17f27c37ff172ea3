"""Which class each module of an operated or observed model must have, and the changes that give it that class."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from neuronsurgery.pytorch.carrying import Role
from neuronsurgery.pytorch.chains import Chain, chain_of, is_sequential
from neuronsurgery.pytorch.insertion import Rewrite
from neuronsurgery.pytorch.links import Link, signature
from neuronsurgery.pytorch.mirroring import class_without_rewrite, submodule
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
        cls = rewritten_class(module, wanted[module]) if module in wanted else class_without_rewrite(module)
        if type(module) is not cls:
            changes.append(SetClass(module, cls))
    return changes


def programs_for(discovery: Discovery, banked: Collection[str], tapped: Collection[str]) -> dict[nn.Module, Program]:
    """For each module that has a part in a site with a bank, or in one to observe, the program of its class."""
    parts: dict[nn.Module, Part] = {}
    for name, place in discovery.places.items():
        if name in banked or name in tapped:
            for home in place.homes:
                for module, part in _parts_of(home, place.path.links, name in banked, name in tapped):
                    parts[module] = parts[module].joined(part) if module in parts else part
    return {module: part.program() for module, part in parts.items()}


@dataclass(frozen=True)
class Part:
    """What one module does for one site, or for several."""

    role: Role
    rewrites: frozenset[Rewrite] = field(default_factory=frozenset)
    methods: frozenset[str] = field(default_factory=frozenset)
    inline: frozenset[str] = field(default_factory=frozenset)
    is_open: bool = False

    def joined(self, other: Part) -> Part:
        """Both: who loops over carrying children for one site may be a graph's scope for another's method."""
        role = other.role if self.role is Role.SCOPE else self.role
        rewrites, methods = self.rewrites | other.rewrites, self.methods | other.methods
        return Part(role, rewrites, methods, self.inline | other.inline, self.is_open or other.is_open)

    def program(self) -> Program:
        """As a value that names a class."""
        rewrites = tuple(sorted(self.rewrites, key=lambda rewrite: rewrite.producer))
        return Program(self.role, rewrites, tuple(sorted(self.methods)), self.inline, self.is_open)


def _parts_of(home: Home, links: Sequence[Link], has_bank: bool, tapped: bool) -> Iterator[tuple[nn.Module, Part]]:
    """Who takes part in a home: its scope alone, or in a Sequential its children."""
    if not is_sequential(home.scope) or home.method != "forward":
        bank = bank_path(home.scope, home.producer) if has_bank else None
        rewrites = frozenset({Rewrite(home.producer, bank, tapped, False, home.product, home.reads, home.sources)})
        role = Role.SEQUENTIAL if is_sequential(home.scope) else Role.SCOPE
        yield home.scope, Part(role, rewrites, frozenset({home.method}), home.inline)
        return
    chain = chain_of(home.scope, home.producer, home.modules, home.origins)
    assert isinstance(chain, Chain)
    outer, *inner = chain.loops
    yield outer, Part(Role.SEQUENTIAL)
    yield from ((loop, Part(Role.SEQUENTIAL, is_open=True)) for loop in inner)
    if chain.inside:
        bank = bank_path(chain.first, chain.inside) if has_bank else None
        inside = f"{chain.first_path}."
        reads = [path for path in home.reads if not path or path.startswith(inside)]
        shortened = tuple(path.removeprefix(inside) for path in reads)
        sources = tuple((name, path.removeprefix(inside)) for name, path in home.sources if path.startswith(inside))
        opening = tuple(signature(link) for link in links[: len(links) - len(chain.links)])
        rewrites = frozenset({Rewrite(chain.inside, bank, tapped, True, home.product, shortened, sources, opening)})
        inline = frozenset(path.removeprefix(inside) for path in home.inline if path.startswith(inside))
        yield chain.first, Part(Role.SCOPE, rewrites, frozenset({"forward"}), inline)
    else:
        yield chain.first, Part(Role.PRODUCER)
    yield from ((module, Part(Role.PATH)) for module in chain.links)


def bank_path(scope: nn.Module, producer: str) -> str:
    """Where a scope finds the bank of one of its producers."""
    owner, _, last = producer.rpartition(".")
    parent = submodule(scope, owner)
    if last in parent._modules:
        return f"{producer}.composite"
    name = bank_name(parent, last)
    return f"{owner}.{name}" if owner else name
