"""What is measured of a specimen: the share of its hidden units that are operable, and how far operating moves it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.utils import _pytree as pytree

from neuronsurgery import surgery
from neuronsurgery.pytorch.swapped import swapped_in
from tests.assertions import Outcome, outcome, output_errors
from tests.zoo.observing import Hidden, hidden_units
from tests.zoo.specimen import Batch, Specimen, run

__all__ = ["Census", "Declined", "Operated", "census", "operated", "producers_of"]


@dataclass(frozen=True)
class Declined:
    """Hidden units of one producer that are not operable, and why; no reason where discovery does not list it."""

    num_units: int
    reason: str


@dataclass(frozen=True)
class Census:
    """The hidden units of a specimen, and what discovery makes of them."""

    specimen: Specimen
    num_hidden: int
    num_operable: int
    declined: Mapping[str, Declined]
    unseen: tuple[str, ...]
    """Sites of which no unit was seen to enter an activation function: they would be a mistake in either count."""
    seconds: float
    """What discovery took, without an example."""

    @property
    def share(self) -> float:
        """The share of the hidden units that are operable."""
        return self.num_operable / self.num_hidden


def census(specimen: Specimen) -> Census:
    """Count a specimen's hidden units by watching it run, and its sites by discovery, each on a model of its own."""
    batch = specimen.example()
    hidden = hidden_units(specimen.make(), lambda model: run(model, batch))
    model = specimen.make()
    start = time.perf_counter()
    surgery.discover(model)
    seconds = time.perf_counter() - start
    sites = surgery.discover(model, example=batch)
    return _judged(specimen, hidden, sites, _aliases(model), seconds)


def _judged(
    specimen: Specimen, hidden: Hidden, sites: surgery.Sites, aliases: Mapping[str, list[str]], seconds: float
) -> Census:
    num_operable, declined, seen = 0, dict[str, Declined](), set[str]()
    for parameters, num_units in hidden.units.items():
        names = [name for parameter in parameters for name in aliases[parameter]]
        found = [name for name in names if name in sites]
        seen.update(found)
        if found:
            num_operable += num_units
        else:
            name = next((name for name in names if name in sites.declined), names[0])
            before = declined[name].num_units if name in declined else 0
            declined[name] = Declined(before + num_units, sites.declined.get(name, ""))
    unseen = tuple(name for name in sites if name not in seen)
    return Census(specimen, hidden.num_units, num_operable, declined, unseen, seconds)


def producers_of(model: nn.Module, site: str) -> list[str]:
    """The parameters that hold the units of a site, by name."""
    return [name for name, aliases in _aliases(model).items() if site in aliases and not _is_bias(name)]


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2].startswith("bias")


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """What discovery may call the producer that owns a parameter: the module, or the parameter, by any of its names."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    aliases: dict[str, list[str]] = {name: [] for name in first.values()}
    with swapped_in(model):  # names that parameters have only while they are used count as well
        named = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in named:
        plain = name.partition(".parametrizations.")[0]
        owner = plain if plain != name else plain.rpartition(".")[0]
        aliases[first[id(parameter)]] += [*([owner] if owner else []), name]
    return aliases


# -- operating -------------------------------------------------------------------------------------------------------


NUM_STEPS_BETWEEN = 3
"""Training steps between operations: an active member that never moved cancels its compensation exactly."""


@dataclass(frozen=True, eq=False)
class Operated:
    """A specimen after all of its operable units were operated on at once, and half of them twice more."""

    specimen: Specimen
    model: nn.Module
    optimizer: Optimizer
    errors: Mapping[str, float]
    """Mode -> the largest error of an output over the operations, relative to its scale (`tests.assertions`)."""
    num_operated: tuple[int, ...]
    """How many units each operation replaced."""
    first_slots: Mapping[str, Tensor]
    """The parameters right after the first operation."""
    sites: surgery.Sites

    def step(self) -> Tensor:
        """One training step; the gradients stay."""
        self.optimizer.zero_grad()
        loss = self.specimen.loss(run(self.model, self.specimen.example()))
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def operated(specimen: Specimen) -> Operated:
    """Operate on everything, then on two random halves, training in between; compare outputs around each operation."""
    model, batch = specimen.make(), specimen.example()
    optimizer = Adam(model.parameters(), lr=1e-3)
    errors, counts = dict[str, float](), list[int]()
    slots = dict[str, Tensor]()
    subject = Operated(specimen, model, optimizer, errors, (), slots, surgery.discover(model, example=batch))
    for criterion in (surgery.Random(1.0), surgery.Random(0.5, seed=1), surgery.Random(0.5, seed=2)):
        before = _outcomes(model, batch)
        counts.append(_operate(model, batch, criterion, optimizer))
        slots = slots or {name: p.detach().clone() for name, p in model.named_parameters()}
        for mode, after in _outcomes(model, batch).items():
            errors[mode] = max([errors.get(mode, 0.0), *output_errors(before[mode], after)])
        for _ in range(NUM_STEPS_BETWEEN):
            subject.step()
    return replace(subject, num_operated=tuple(counts), first_slots=slots)


def _operate(model: nn.Module, batch: Batch, criterion: surgery.Criterion, optimizer: Optimizer) -> int:
    sites = surgery.discover(model, example=batch)
    if not sites:
        return 0
    chosen = surgery.select(surgery.score(sites, None, criterion), cooldown=0)
    return surgery.operate(model, surgery.plan(chosen, max_growth=16.0), optimizer).num_units


def _outcomes(model: nn.Module, batch: Batch) -> dict[str, Outcome]:
    """What the model gives from one seed in training, in evaluation, and in evaluation as it is served.

    Served means without gradients and unobserved, as only then torch takes its fused paths.
    """
    train, evaluated = outcome(model.train(), batch), outcome(model.eval(), batch)
    served = Outcome(tuple(_served(model, batch)), evaluated.scales, ())
    model.train()
    return {"train": train, "eval": evaluated, "served": served}


def _served(model: nn.Module, batch: Batch) -> Iterable[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        return [t for t in pytree.tree_leaves(run(model, batch)) if isinstance(t, Tensor)]
