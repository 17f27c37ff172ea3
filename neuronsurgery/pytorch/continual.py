"""Continual backpropagation (Dohare et al. 2024): step by step the least useful units give way to fresh ones.

A unit's utility is a running mean of `|h_i|` times the mean size of its outgoing weights. Of the units older than the
maturity a small share is due at each step, and accumulates until it is a whole unit: the one of least utility. What it
handed on in the mean is added to its consumers' biases, so that they see its mean and no longer its variation.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.pytorch.births import load_births, saved_births
from neuronsurgery.pytorch.consuming import Consumer
from neuronsurgery.pytorch.drawing import Init, draw, generator_kept
from neuronsurgery.pytorch.evidence import by_unit, heard
from neuronsurgery.pytorch.fsdp import require_whole
from neuronsurgery.pytorch.layouts import Passed
from neuronsurgery.pytorch.operating import slot_changes
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.renewing import reported, seed_of, silenced
from neuronsurgery.pytorch.stepping import Grounds, grounds_of
from neuronsurgery.pytorch.transaction import Change, Later, Overwrite
from neuronsurgery.reports import Report

__all__ = ["ContinualRunner", "continual_backprop"]


def continual_backprop(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    *,
    rate: float,
    maturity: int,
    decay: float,
    sites: Sequence[str] | None = None,
    init: Init | None = None,
    generator: torch.Generator | None = None,
) -> ContinualRunner:
    """Run continual backpropagation on a model; see `neuronsurgery.surgery.ContinualBackprop`."""
    require_whole(model, "ContinualBackprop")
    grounds = grounds_of(model, optimizer, sites=sites, init=init or _kaiming, generator=generator)
    return ContinualRunner(grounds, rate, maturity, decay)


def _kaiming(weight: Tensor) -> None:
    nn.init.kaiming_uniform_(weight, nonlinearity="relu")


@dataclass
class Running:
    """What is remembered of a site: `utility` and `mean` activation, (num_units,), running and not yet corrected.

    `age`: (num_units,), steps since each unit was replaced, on the host; `due`: how much of a unit is due by now.
    """

    utility: Tensor
    mean: Tensor
    age: NDArray[np.int64]
    due: float = 0.0

    def corrected(self, values: Tensor, decay: float) -> Tensor:
        """Running means without the zero that they started from."""
        weights = torch.from_numpy(1 - decay ** self.age.astype(np.float64))
        return values / weights.to(values).clamp(min=1e-12)

    def lowest(self, count: int, maturity: int, decay: float) -> list[int]:
        """So many mature units of least utility."""
        mature = torch.from_numpy(self.age > maturity).to(self.utility.device)
        ranked = self.corrected(self.utility, decay).masked_fill(~mature, torch.inf).argsort(stable=True)
        return sorted(ranked[:count].tolist())

    def forget(self, units: Sequence[int]) -> None:
        """Begin anew for units that were replaced."""
        index = torch.tensor(units, device=self.utility.device)
        self.utility[index] = self.mean[index] = 0.0
        self.age[list(units)] = 0


class ContinualRunner:
    """Utilities of the units of a model, measured in passes that build a graph, and what is replaced by them."""

    def __init__(self, grounds: Grounds, rate: float, maturity: int, decay: float) -> None:
        self.grounds, self.rate, self.maturity, self.decay = grounds, rate, maturity, decay
        self.num_steps = 0
        self.sites = {name: _running(place) for name, place in grounds.places.items()}
        self.heard = {name: Activations(place) for name, place in grounds.places.items()}
        taps = ExitStack()
        taps.enter_context(heard(grounds.discovery, {id(s.place.weight): s for s in self.heard.values()}))
        self._release = weakref.finalize(self, taps.close)
        self._release.atexit = False

    def close(self) -> None:
        """Take the taps off."""
        self._release()

    def step(self) -> Report | None:
        """See a step; sites that no pass went through since the last one grow no older."""
        self.num_steps += 1
        due = {name: units for name in self.sites if (units := self._due(name))}
        if not due:
            return None
        criterion = f"ContinualBackprop(rate={self.rate}, maturity={self.maturity}, decay={self.decay})"
        report = self._replace(due, criterion)
        for name, units in due.items():
            self.sites[name].due -= len(units)
            self.sites[name].forget(units)
        return report

    def _due(self, name: str) -> list[int]:
        running, place = self.sites[name], self.grounds.places[name]
        sums = self.grounds.pooled(self.heard[name].taken())
        size, signed, count = sums[: len(sums) // 2], sums[len(sums) // 2 : -1], sums[-1]
        if not self.heard[name].num_passes:
            return []
        self.heard[name].num_passes = 0
        running.age += 1
        outgoing = _outgoing(self.grounds.readers[name], place)
        running.utility.lerp_(size / count * outgoing, 1 - self.decay)
        running.mean.lerp_(signed / count, 1 - self.decay)
        num_mature = int((running.age > self.maturity).sum())
        running.due += self.rate * num_mature
        whole = min(int(running.due + 1e-9), num_mature)
        return running.lowest(whole, self.maturity, self.decay) if whole else []

    def _replace(self, due: Mapping[str, Sequence[int]], criterion: str) -> Report:
        subject = self.grounds.subject(due, "ContinualBackprop", criterion)
        with generator_kept(self.grounds.generator):
            seed = seed_of(subject, self.grounds.generator)
            rows: list[Change] = []
            biases: list[Change] = []
            for place, units, readers in subject.sites():
                running = self.sites[place.site.name]
                mean = running.corrected(running.mean, self.decay)[units]
                biases += [Later(_shifted(each, units, mean)) for each in readers if _is_exact(each)]
                fresh, _ = draw(place, units, self.grounds.init, seed)
                rows += slot_changes(place, units, fresh, subject.optimizers)
            return reported(subject, [*biases, *rows, *silenced(subject)], None)

    def state_dict(self) -> dict[str, Any]:
        """All that is remembered."""
        generator = self.grounds.generator
        return {
            "num_steps": self.num_steps,
            "sites": {
                name: {
                    "utility": each.utility.clone(),
                    "mean": each.mean.clone(),
                    "age": torch.from_numpy(each.age.copy()),
                    "due": each.due,
                }
                for name, each in self.sites.items()
            },
            "births": saved_births(self.grounds.optimizers, self.grounds.discovery.model),
            "generator": None if generator is None else generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self.grounds.check_state(state)
        self.num_steps = state["num_steps"]
        for name, each in state["sites"].items():
            own = self.sites[name]
            age = each["age"].cpu().numpy().astype(np.int64).copy()
            device = own.utility.device
            utility, mean = each["utility"].clone().to(device), each["mean"].clone().to(device)
            self.sites[name] = Running(utility, mean, age, float(each["due"]))
        load_births(self.grounds.optimizers, self.grounds.discovery.model, state["births"])
        if self.grounds.generator is not None and state["generator"] is not None:
            self.grounds.generator.set_state(state["generator"].cpu())


class Activations:
    """Sums of `|h|` and of `h` for each unit of a site since they were last taken."""

    def __init__(self, place: Place) -> None:
        self.place, self.offset, self.num_passes = place, len(place.path.links), 0
        self.sums = torch.zeros(2 * place.site.num_units + 1, device=place.weight.device)

    def record(self, h: Tensor, axes: tuple[int, ...] | None = None) -> None:
        """Add a pass that builds a graph."""
        if not (torch.is_grad_enabled() and h.requires_grad):
            return
        axes = axes or self.place.path.unit_axes(self.place.product, h.dim())
        values = by_unit(self.place, h.detach(), axes).float()
        sums = torch.cat([values.abs().sum(1), values.sum(1), values.new_tensor([values.shape[1]])])
        self.sums += torch.where(sums.isfinite().all(), sums, torch.zeros_like(sums))
        self.num_passes += 1

    def taken(self) -> Tensor:
        """The sums, (2 * num_units + 1,), the number of samples last; they begin anew."""
        sums, self.sums = self.sums, torch.zeros_like(self.sums)
        sums[-1].clamp_(min=torch.finfo(sums.dtype).tiny)
        return sums


def _running(place: Place) -> Running:
    zeros = torch.zeros(place.site.num_units, device=place.weight.device)
    return Running(zeros, zeros.clone(), np.zeros(place.site.num_units, dtype=np.int64))


def _outgoing(readers: Sequence[Consumer], place: Place) -> Tensor:
    """The mean size of each unit's outgoing weights, over all of its consumers, (num_units,)."""
    total, count = torch.zeros(place.site.num_units, device=place.weight.device), 0
    for each in readers:
        sizes = each.axes.rows(each.weight.detach().abs().float())
        inputs = sizes.reshape(len(sizes), -1)
        total += inputs.sum(1)[each.columns.to(inputs.device)].sum(1).to(total)
        count += inputs.shape[1] * each.columns.shape[1]
    return total / count


def _is_exact(consumer: Consumer) -> bool:
    """Whether a mean activation has a mean effect on the consumer's biases, which are as many as its outputs."""
    is_apart = consumer.axes.groups == 1 and consumer.bias is not None
    return is_apart and consumer.passed is Passed.LINEAR


def _shifted(consumer: Consumer, units: Tensor, mean: Tensor) -> Any:
    """The change that adds to a consumer's bias what units handed on in the mean, from what they hand on by then."""

    def changes() -> Iterator[Change]:
        bias = consumer.bias
        assert bias is not None
        outgoing = consumer.axes.take(consumer.weight.detach(), consumer.of(units))
        by_entry = outgoing.reshape(*outgoing.shape[:2], -1).sum(2)
        entries = consumer.columns.shape[1]
        handed_on = (by_entry * mean.repeat_interleave(entries)[:, None].to(by_entry)).sum(0)
        yield Overwrite(bias, bias.detach() + handed_on.to(bias))

    return changes
