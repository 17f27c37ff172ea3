"""What methods with running utilities have in common: the sites they act on, the steps they saw, and their state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.errors import ScheduleError, SiteError
from neuronsurgery.plans import MAX_GROWTH, Plan
from neuronsurgery.pytorch import optimizers as optimizer_state
from neuronsurgery.pytorch.consuming import Consumer, consumers_of
from neuronsurgery.pytorch.distributed import group_of
from neuronsurgery.pytorch.drawing import Init, check_drawing
from neuronsurgery.pytorch.models import unwrap
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.renewing import Subject
from neuronsurgery.pytorch.sites import Discovery, explored
from neuronsurgery.pytorch.watching import common_generator
from neuronsurgery.sites import Sites

__all__ = ["Grounds", "grounds_of"]


@dataclass(frozen=True, eq=False)
class Grounds:
    """Where a method acts: the sites whose consumers are known, the optimizers, and the source of draws."""

    discovery: Discovery
    readers: Mapping[str, tuple[Consumer, ...]]
    optimizers: tuple[Optimizer, ...]
    init: Init | None
    generator: torch.Generator | None
    group: dist.ProcessGroup | None

    @property
    def places(self) -> dict[str, Place]:
        """The sites by name."""
        return {name: self.discovery.places[name] for name in self.readers}

    def subject(self, units: Mapping[str, Sequence[int]], method: str, criterion: str) -> Subject:
        """The units to write now, as a plan that was checked."""
        for name in units:
            if self.discovery.places[name].bank is not None:
                raise SiteError(
                    f"site {name!r} has frozen rows by now, which {method} cannot replace: another method was there; "
                    "leave the site to one of them with sites="
                )
        sites = Sites({name: place.site for name, place in self.places.items()}, self.discovery.declined)
        chosen = {name: tuple(own) for name, own in units.items()}
        plan = Plan(chosen, self.discovery.declined, criterion, MAX_GROWTH, (), sites)
        return Subject(self.discovery.model, plan, method, self.optimizers, self.places, self.readers)

    def pooled(self, values: Tensor) -> Tensor:
        """Sums over all replicas."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of a model with other sites.

        Raises:
            ScheduleError: names them.
        """
        own = {name: place.site.num_units for name, place in self.places.items()}
        saved = {name: len(each["utility"]) for name, each in state["sites"].items()}
        if own != saved:
            raise ScheduleError(f"the state is of a model with the sites {saved}; this one has {own}")


def grounds_of(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    *,
    sites: Sequence[str] | None,
    init: Init | None,
    generator: torch.Generator | None,
) -> Grounds:
    """Find the sites of a model whose consumers are known; of a model in DDP all processes draw alike.

    Raises:
        SiteError: there is none, or a named one is none.
        OptimizerError: an optimizer that owns none of the parameters.
    """
    check_drawing(init, generator)
    inner = unwrap(model)
    discovery, survey = explored(inner, include=sites or ())
    names = list(discovery.sites if sites is None else discovery.sites.subset(sites))
    found = {name: consumers_of(survey, discovery.places[name]) for name in names}
    declined = {name: reason for name, reason in found.items() if isinstance(reason, str)}
    readers = {name: each for name, each in found.items() if not isinstance(each, str)}
    if not readers or (sites is not None and declined):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in {**discovery.declined, **declined}.items())
        raise SiteError(f"the outgoing weights of these sites cannot be written. {reasons}")
    optimizers = optimizer_state.as_optimizers(optimizer)
    optimizer_state.check_owners(optimizers, dict(inner.named_parameters()))
    group = group_of(model)
    if group is not None and generator is None:
        generator = common_generator(model)
    places = {name: discovery.places[name] for name in readers}
    return Grounds(
        Discovery(inner, {**discovery.places, **places}, {**discovery.declined, **declined}),
        readers,
        optimizers,
        init,
        generator,
        group,
    )
