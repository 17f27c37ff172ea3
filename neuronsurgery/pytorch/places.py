"""Places: the sites of a model with everything that operating on them needs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from neuronsurgery.pytorch.chains import is_sequential
from neuronsurgery.pytorch.composites import Composite, UnitPath, frozen_names
from neuronsurgery.pytorch.computing import Computed, Recipe, Source
from neuronsurgery.pytorch.distributed import taken
from neuronsurgery.pytorch.hooks import splits
from neuronsurgery.pytorch.links import is_statistic
from neuronsurgery.pytorch.mirroring import original_class, submodule
from neuronsurgery.pytorch.producers import is_producer
from neuronsurgery.pytorch.products import Product
from neuronsurgery.pytorch.reading import Reading, modules_of
from neuronsurgery.pytorch.reducing import removable
from neuronsurgery.pytorch.sharding import is_sharded
from neuronsurgery.pytorch.swapped import holds_for_others
from neuronsurgery.pytorch.unit_axes import ROWS, UnitAxes
from neuronsurgery.pytorch.uses import Use
from neuronsurgery.sites import Site

__all__ = ["Home", "Place", "Slots", "bank_name", "banks_at", "owners_of", "place_of"]


@dataclass(frozen=True, eq=False)
class Home:
    """A function of a module that holds a whole site: the class, method and graph to rewrite."""

    scope: nn.Module
    scope_name: str
    method: str
    inline: frozenset[str]
    producer: str  # the producer's path in the scope
    modules: tuple[str, ...]  # the paths of the modules that are its links, "" for a function
    origins: tuple[str, ...] = ()  # of the producer and each link: the inlined child that it comes from, or ""
    product: Product | None = None
    reads: tuple[str, ...] = ()  # the paths of the bias, "" where there is none, and of the links' own tensors
    sources: tuple[tuple[str, str], ...] = ()  # buffer name and path of what computed weights come from beside these


@dataclass(frozen=True, eq=False)
class Slots:
    """The slots of a site in one tensor, a parameter or running statistics.

    `axes` is None for one value that all units share. `fresh` is what a fresh one holds where no initializer of its
    owner says so; None: the layer's mean. `is_own`: nothing else reads it, so that an operation renews the
    rows of its units.
    """

    tensor: Tensor
    owner: nn.Module
    attribute: str
    axes: UnitAxes | None = ROWS
    fresh: float | None = None
    is_own: bool = True
    is_weight: bool = False

    @property
    def is_renewed(self) -> bool:
        """Whether an operation writes fresh values; running statistics stay, as the design asks."""
        return self.is_own and self.axes is not None and not is_statistic(self.attribute)

    @property
    def parameter(self) -> nn.Parameter | None:
        """The parameter whose rows an operation renews, None for any other tensor."""
        return self.tensor if self.is_renewed and isinstance(self.tensor, nn.Parameter) else None

    def take(self, units: Tensor) -> Tensor:
        """The units' rows, (num_units, *row_shape); of a value that all share, that value for each."""
        if self.axes is None:
            return self.rows().expand(len(units))
        return self._shaped(taken(f"rows of {self.attribute!r}", self.tensor, units, self.axes))

    def rows(self) -> Tensor:
        """All units' rows, or the one value that they share, (1,)."""
        axes = self.axes or ROWS
        if is_sharded(self.tensor):
            units = torch.arange(axes.num_units(self.tensor.shape), device=self.tensor.device)
            found = taken(f"{self.attribute!r}", self.tensor, units, axes)
        else:
            found = self.tensor.detach().reshape(1) if self.axes is None else axes.rows(self.tensor.detach())
        return self._shaped(found) if self.axes is not None else found.reshape(1)

    @property
    def row_shape(self) -> torch.Size:
        """The shape of a unit's row, as `take` gives it."""
        if self.axes is None:
            return torch.Size()
        like = torch.empty(self.tensor.shape, device="meta")
        return self._shaped(self.axes.take(like, torch.zeros(1, dtype=torch.long, device="meta"))).shape[1:]

    def _shaped(self, rows: Tensor) -> Tensor:
        """Beside the weight, one value a unit is a vector, whatever axes of size 1 the tensor has."""
        return rows.reshape(len(rows)) if rows.numel() == len(rows) and not self.is_weight else rows


@dataclass(frozen=True, eq=False)
class Place:
    """A site with everything that operating on it needs."""

    site: Site
    weight: nn.Parameter  # of a computed weight the first parameter that it is computed from
    product: Product
    path: UnitPath
    slots: tuple[Slots | None, ...]  # as `buffer_names`; None where there is no bias
    owners: tuple[tuple[nn.Module, str], ...]  # where the bank hangs: every module that owns the weight, and the name
    homes: tuple[Home, ...]
    computed: tuple[Computed, ...] = ()  # the ways in which its weight is computed; none where it is a parameter

    def index(self, units: Sequence[int]) -> Tensor:
        """Units as a tensor beside the weight, (num_units,) int64."""
        return torch.tensor(units, dtype=torch.long, device=self.weight.device)

    @property
    def recipe(self) -> Recipe | None:
        """What the weight is computed from, in all of these ways together."""
        return _merged(self.computed)

    @property
    def buffer_names(self) -> tuple[str, ...]:
        """The bank's buffer for each of the slots: weight, bias, the path's own tensors, then the recipe's others."""
        return frozen_names(self.path, () if self.recipe is None else self.recipe.names)

    @property
    def bias(self) -> Slots | None:
        """The producer's bias, one number per unit; the shift of a norm behind it is none."""
        return self.slots[1]

    @property
    def bank(self) -> Composite | None:
        """The frozen members, once the site was operated on."""
        owner, name = self.owners[0]
        bank = owner._modules.get(name)
        return bank if isinstance(bank, Composite) else None

    @property
    def is_split(self) -> bool:
        """Whether each process computes some of its units only."""
        return any(splits(hook) for owner, _ in self.owners for hook in owner._forward_hooks.values())

    @property
    def renewed(self) -> tuple[Slots | None, ...]:
        """The slots that an operation renews; None where there are none."""
        return tuple(slots if slots is not None and slots.is_renewed else None for slots in self.slots)

    @property
    def passed_modules(self) -> tuple[nn.Module, ...]:
        """The modules on the path that have tensors of their own, in all homes."""
        found: dict[int, nn.Module] = {}
        for home in self.homes:
            for link, path in zip(self.path.links, home.modules, strict=True):
                if path and link.tensors:
                    module = submodule(home.scope, path)
                    found[id(module)] = module
        return tuple(found.values())

    @property
    def path_change(self) -> str:
        """What children of a Sequential pass rows along otherwise than the bank was made for; "" where it is the same.

        A graph is made anew with what stands there now, but children find links in the bank by their place.
        """
        bank = self.bank
        if bank is None or not any(is_sequential(home.scope) for home in self.homes):
            return ""
        made_for, now = (
            " and ".join(cls or link.name for cls, link in zip(path.classes, path.links, strict=True))
            for path in (bank.path, self.path)
        )
        return "" if made_for == now else f"its bank was made for {made_for} behind it, and {now} stands there"

    def rows(self, tensor: Tensor) -> Tensor:
        """All units' rows of the weight or a tensor of its shape, (num_units, *row_shape)."""
        return self.product.axes.rows(tensor.detach())


def place_of(
    name: str,
    weight: nn.Parameter,
    owners: list[tuple[nn.Module, str]],
    entries: list[tuple[Reading, str, Use]],
    is_own: Callable[[Tensor, nn.Module], bool],
) -> Place:
    """The place of a weight whose uses agree: the first Sequential among them says which modules the path passes."""
    computed = tuple(use.call.computed for _, _, use in entries if use.call.computed is not None)
    extras = {each[0].name: each for found in computed for each in found.extras}
    homes = [
        Home(
            r.scope,
            r.name,
            method,
            r.inline,
            use.producer,
            tuple(link.module for link in use.links),
            use.origins,
            use.product,
            (_bias_path(r.scope, use), *(own.path for own in use.own)),
            () if use.is_module else _source_paths(r.scope, {key: tensor for key, (_, tensor, *_) in extras.items()}),
        )
        for r, method, use in entries
    ]
    reading, _, use = next((e for e in entries if e[0].is_sequential), entries[0])
    assert use.path is not None
    at = banks_at(owners)
    bank = at[0][0]._modules.get(at[0][1])
    site = Site(
        name=name,
        scope=homes[0].scope_name,
        producer=original_class(owners[0][0]).__name__ if at[0][1] == "composite" else use.product.kind,
        activation_fn=use.path.name,
        num_units=use.product.axes.num_units(weight.shape),
        num_frozen=len(bank.rows) if isinstance(bank, Composite) else 0,
        num_removable=int(removable(bank).sum()) if isinstance(bank, Composite) else 0,
    )
    slots = (
        Slots(weight, *owners[0], use.product.axes, is_weight=True),
        _bias_slots(use, owners[0][0]),
        *(Slots(own.tensor, *_owner(reading.scope, own.path), own.axes, own.fresh) for own in use.own),
        *(Slots(tensor, module, attribute, _axes(s)) for s, tensor, module, attribute in extras.values()),
    )
    slots = (slots[0], *(each and replace(each, is_own=is_own(each.tensor, each.owner)) for each in slots[1:]))
    # a scope that calls the layer itself is a home beside one that only looks into a child which calls it
    unique = {(id(h.scope), h.method, h.producer, h.origins): h for h in homes}
    return Place(site, weight, use.product, use.path, slots, at, tuple(unique.values()), computed)


def _bias_path(scope: nn.Module, use: Use) -> str:
    """Where the scope has the bias of a producer, "" where there is none."""
    bias = use.call.bias
    if bias is None:
        return ""
    if use.is_module:  # its own parameters only: a scope may hold many producers
        named = submodule(scope, use.producer).named_parameters(remove_duplicate=False)
        return next((f"{use.producer}.{name}" for name, parameter in named if parameter is bias), "")
    read = (str(n.target) for node in use.producing for n in node.all_input_nodes if n.op == "get_attr")
    return next((path for path in read if getattr(*_owner(scope, path), None) is bias), "")


def _source_paths(scope: nn.Module, sources: Mapping[str, Tensor]) -> tuple[tuple[str, str], ...]:
    """Where the scope has what its homes and all others compute the weight from, by the names of the buffers."""
    paths = {id(p): path for path, p in scope.named_parameters(remove_duplicate=False)} if sources else {}
    return tuple((name, paths[id(tensor)]) for name, tensor in sources.items() if id(tensor) in paths)


def _axes(source: Source) -> UnitAxes:
    assert source.axis is not None
    return UnitAxes((source.axis,))


def _merged(computed: tuple[Computed, ...]) -> Recipe | None:
    """A recipe with the stored sources of all."""
    if not computed:
        return None
    stored = {source.name: source for each in computed[1:] for source in each.recipe.sources if source.name}
    recipe = computed[0].recipe
    known = {source.name for source in recipe.sources}
    return replace(recipe, sources=(*recipe.sources, *(s for name, s in stored.items() if name not in known)))


def _bias_slots(use: Use, owner: nn.Module) -> Slots | None:
    bias = use.call.bias
    if bias is None:
        return None
    if use.call.computed is not None:
        return Slots(bias, *use.call.computed.owner_of(bias), use.call.bias_axes)
    attribute = next((name for name, parameter in owner._parameters.items() if parameter is bias), "")
    return Slots(bias, owner, attribute, use.call.bias_axes)


def _owner(scope: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner, _, attribute = path.rpartition(".")
    return submodule(scope, owner), attribute


def banks_at(owners: list[tuple[nn.Module, str]]) -> tuple[tuple[nn.Module, str], ...]:
    """Where the bank of a weight hangs: each module that owns the weight, and the name among its children."""
    return tuple((owner, bank_name(owner, attribute)) for owner, attribute in owners)


def bank_name(owner: nn.Module, attribute: str) -> str:
    """The name of the bank among the children of the module that owns the weight."""
    return "composite" if is_producer(owner) else f"{attribute}_composite"


def owners_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every module that owns a parameter or buffer, and under which name, by the tensor's id."""
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    holders = (module for _, module in modules_of(model) if not holds_for_others(module))
    for module in holders:
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                owners[id(tensor)].append((module, name))
    return owners
