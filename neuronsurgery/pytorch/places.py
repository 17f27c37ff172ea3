"""Places: the sites of a model with everything that operating on them needs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from torch import nn

from neuronsurgery.pytorch.composites import Composite, Product, UnitPath
from neuronsurgery.pytorch.mirroring import original_class
from neuronsurgery.pytorch.reading import Reading, modules_of
from neuronsurgery.pytorch.uses import PRODUCERS, Use, parameters_of
from neuronsurgery.sites import Site

__all__ = ["Home", "Place", "bank_name", "banks_at", "owners_of", "place_of", "with_own_slopes"]


@dataclass(frozen=True, eq=False)
class Home:
    """A function of a module that holds a whole site: the class, method and graph to rewrite."""

    scope: nn.Module
    scope_name: str
    method: str
    inline: frozenset[str]
    producer: str  # the producer's path in the scope
    offset: int  # how many calls it takes from there to the activation, the last of them


@dataclass(frozen=True, eq=False)
class Place:
    """A site with everything that operating on it needs."""

    site: Site
    weight: nn.Parameter
    bias: nn.Parameter | None
    product: Product
    path: UnitPath
    slopes: tuple[nn.Parameter, ...]  # the path's own parameters
    own_slopes: tuple[bool, ...]  # one value a unit, and read by this site alone: renewed with the slot
    owners: tuple[tuple[nn.Module, str], ...]  # where the bank hangs: every module that owns the weight, and the name
    homes: tuple[Home, ...]

    @property
    def bank(self) -> Composite | None:
        """The frozen members, once the site was operated on."""
        owner, name = self.owners[0]
        bank = owner._modules.get(name)
        return bank if isinstance(bank, Composite) else None

    @property
    def renewed(self) -> tuple[nn.Parameter | None, ...]:
        """The parameters whose slot rows an operation renews: weight, bias, slopes; None where there is none."""
        slopes = (p if own else None for p, own in zip(self.slopes, self.own_slopes, strict=True))
        return (self.weight, self.bias, *slopes)


def place_of(
    name: str,
    weight: nn.Parameter,
    owners: list[tuple[nn.Module, str]],
    entries: list[tuple[Reading, str, Use]],
) -> Place:
    """The place of a weight whose uses agree: the first Sequential among them says how far the activation is."""
    homes = [
        Home(r.scope, r.name, method, r.inline, use.producer, use.path.offset) for r, method, use in entries if use.path
    ]
    reading, _, use = next((e for e in entries if e[0].is_sequential), entries[0])
    assert use.path is not None and use.product is not None
    at = banks_at(owners)
    bank = at[0][0]._modules.get(at[0][1])
    site = Site(
        name=name,
        scope=homes[0].scope_name,
        producer=original_class(owners[0][0]).__name__ if at[0][1] == "composite" else use.product.kind,
        activation_fn=use.path.function.name,
        num_units=weight.shape[0],
        num_frozen=len(bank.rows) if isinstance(bank, Composite) else 0,
    )
    slopes = parameters_of(use, reading.scope)
    unique = {(id(h.scope), h.method, h.producer): h for h in homes}
    return Place(
        site,
        weight,
        use.bias,
        use.product,
        replace(use.path, per_unit=any(slope.numel() > 1 for slope in slopes)),
        slopes,
        (False,) * len(slopes),
        at,
        tuple(unique.values()),
    )


def banks_at(owners: list[tuple[nn.Module, str]]) -> tuple[tuple[nn.Module, str], ...]:
    """Where the bank of a weight hangs: each module that owns the weight, and the name among its children."""
    return tuple((owner, bank_name(owner, attribute)) for owner, attribute in owners)


def bank_name(owner: nn.Module, attribute: str) -> str:
    """The name of the bank among the children of the module that owns the weight."""
    return "composite" if original_class(owner).forward in PRODUCERS else f"{attribute}_composite"


def owners_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every module that owns a parameter, and under which name, by the parameter's id."""
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for _, module in modules_of(model):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append((module, name))
    return owners


def with_own_slopes(places: dict[str, Place]) -> dict[str, Place]:
    """Path parameters belong to a slot only if they have a value per unit and no other site reads them."""
    readers: dict[int, int] = defaultdict(int)
    for place in places.values():
        for slope in place.slopes:
            readers[id(slope)] += 1

    def own(place: Place) -> tuple[bool, ...]:
        return tuple(p.numel() == place.site.num_units > 1 and readers[id(p)] == 1 for p in place.slopes)

    return {name: replace(place, own_slopes=own(place)) for name, place in places.items()}
