"""CCBP: units drift towards fresh draws all the time, the faster the less gradient they receive.

A unit's utility is the mean size of its weights' gradient relative to its layer's mean, as a running mean. Every so
many steps its incoming weights move towards a fresh draw by a share `a`, its outgoing ones towards zero by the same.
Known of the method is its formula; what is not known is said in `neuronsurgery/methods.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.pytorch.drawing import Init, draw, generator_kept
from neuronsurgery.pytorch.fsdp import require_whole
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.renewing import Subject, reported, seed_of
from neuronsurgery.pytorch.stepping import Grounds, grounds_of
from neuronsurgery.pytorch.transaction import Change, Later, WriteRows
from neuronsurgery.reports import Report

__all__ = ["ContinuousRunner", "ccbp"]


def ccbp(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    *,
    rate: float,
    every: int,
    decay: float,
    sharpness: float,
    sites: Sequence[str] | None = None,
    init: Init | None = None,
    generator: torch.Generator | None = None,
) -> ContinuousRunner:
    """Run CCBP on a model; see `neuronsurgery.surgery.CCBP`."""
    require_whole(model, "CCBP")
    grounds = grounds_of(model, optimizer, sites=sites, init=init, generator=generator)
    return ContinuousRunner(grounds, Pace(rate, every, decay, sharpness))


@dataclass(frozen=True)
class Pace:
    """By how much units move, and when: `a = rate * sigmoid(-sharpness (u - 1))` every so many steps."""

    rate: float
    every: int
    decay: float
    sharpness: float

    def shares(self, utility: Tensor) -> Tensor:
        """How far each unit moves towards a fresh one, (num_units,), for utilities of mean 1."""
        return self.rate * torch.sigmoid(-self.sharpness * (utility - 1))


class ContinuousRunner:
    """Running utilities of the units of a model, from the gradients that are there after each step."""

    def __init__(self, grounds: Grounds, pace: Pace) -> None:
        self.grounds, self.pace, self.num_steps = grounds, pace, 0
        self.sites = {
            name: (torch.zeros(p.site.num_units, device=p.weight.device), 0) for name, p in grounds.places.items()
        }

    def step(self) -> Report | None:
        """See a step; sites without a gradient, or whose gradients are zero or not finite, keep their utilities."""
        self.num_steps += 1
        for name, place in self.grounds.places.items():
            self._see(name, place)
        if self.num_steps % self.pace.every:
            return None
        seen = {name: range(len(utility)) for name, (utility, count) in self.sites.items() if count}
        return self._blend(seen) if seen else None

    def _see(self, name: str, place: Place) -> None:
        if place.weight.grad is None:
            return
        rows = place.rows(place.weight.grad)
        sizes = rows.reshape(len(rows), -1).abs().float().mean(1)
        mean = sizes.mean()
        if bool(mean > 0) and bool(mean.isfinite()):
            utility, count = self.sites[name]
            self.sites[name] = utility.lerp(sizes / mean, 1 - self.pace.decay), count + 1

    def _blend(self, units: Mapping[str, Sequence[int]]) -> Report:
        criterion = f"CCBP(rate={self.pace.rate}, every={self.pace.every}, decay={self.pace.decay})"
        subject = self.grounds.subject(units, "CCBP", criterion)
        with generator_kept(self.grounds.generator):
            seed = seed_of(subject, self.grounds.generator)
            fresh = {place.site.name: draw(place, own, self.grounds.init, seed)[0] for place, own, _ in subject.sites()}
            return reported(subject, [Later(lambda: self._changes(subject, fresh))], None)

    def _changes(self, subject: Subject, fresh: Mapping[str, Sequence[Tensor | None]]) -> Iterator[Change]:
        """All sites' rows, then all columns, each from what is there by then; optimizer state is left as it is."""
        shares: dict[str, Tensor] = {}
        for place, units, _ in subject.sites():
            utility, count = self.sites[place.site.name]
            share = shares[place.site.name] = self.pace.shares(utility / (1 - self.pace.decay**count))
            for slots, drawn in zip(place.slots[:2], fresh[place.site.name][:2], strict=True):
                if slots is not None and slots.axes is not None and drawn is not None:
                    old = slots.axes.take(slots.tensor.detach(), units)
                    yield WriteRows(slots.tensor, units, _towards(old, drawn.reshape(old.shape), share), slots.axes)
        for place, units, readers in subject.sites():
            for consumer in readers:
                columns = consumer.of(units)
                old = consumer.axes.take(consumer.weight.detach(), columns)
                share = shares[place.site.name].repeat_interleave(consumer.columns.shape[1]).to(consumer.weight.device)
                yield WriteRows(consumer.weight, columns, _towards(old, torch.zeros_like(old), share), consumer.axes)

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered."""
        generator = self.grounds.generator
        return {
            "num_steps": self.num_steps,
            "sites": {name: {"utility": u.clone(), "count": count} for name, (u, count) in self.sites.items()},
            "generator": None if generator is None else generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.grounds.check_state(state)
        self.num_steps = state["num_steps"]
        self.sites = {
            name: (each["utility"].clone().to(self.grounds.places[name].weight.device), int(each["count"]))
            for name, each in state["sites"].items()
        }
        if self.grounds.generator is not None and state["generator"] is not None:
            self.grounds.generator.set_state(state["generator"].cpu())

    def close(self) -> None:
        """Nothing hangs on the model."""


def _towards(old: Tensor, new: Tensor, share: Tensor) -> Tensor:
    """`(1 - a) old + a new` for rows, (r, ...), with a share for each, (r,)."""
    return old.lerp(new.to(old), share.to(old).reshape(-1, *[1] * (old.dim() - 1)))
