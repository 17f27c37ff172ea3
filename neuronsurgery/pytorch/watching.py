"""What a schedule knows of a training run: how many steps were taken, and what was measured of its model in a window.

Hooks on the optimizers count steps and read gradients; taps show activations, only while a window is open and only for
criteria that need them, so that the rest leaves the model's classes and compiled code alone. The hooks hold no strong
reference to a watch: when it is closed or collected, hooks and taps are gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from neuronsurgery.composites import Rows
from neuronsurgery.errors import DistributedError, OptimizerError, ScheduleError
from neuronsurgery.evidence import Evidence, Quantity
from neuronsurgery.pytorch import optimizers as optimizer_state
from neuronsurgery.pytorch.births import load_births, saved_births
from neuronsurgery.pytorch.distributed import agreed_number, group_of, together
from neuronsurgery.pytorch.drawing import check_drawing
from neuronsurgery.pytorch.evidence import ACTIVATIONS, Clock, Scaling, gradients_of, record_step, tapped
from neuronsurgery.pytorch.models import unwrap
from neuronsurgery.pytorch.pooling import pooled
from neuronsurgery.pytorch.reducing import removable
from neuronsurgery.pytorch.sampling import Sampling, Weights
from neuronsurgery.pytorch.sites import Discovery, discover
from neuronsurgery.sites import Sites

__all__ = ["Watch", "ages_of", "common_generator", "watch"]


def watch(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    sites: Collection[str] | None = None,
    needs: Collection[Quantity] = (),
    generator: torch.Generator | None = None,
    scaler: Any = None,
    weights: Weights | None = None,
) -> Watch:
    """Watch a model and its optimizers train; see `neuronsurgery.backend.Watch`.

    Args:
        model: the model; wrappers are taken off.
        optimizer: its optimizer, or several.
        sites: names of the only sites to watch, range-bearing ones included. None: all that are safe.
        needs: what is to be measured while a window is open.
        generator: a generator whose state belongs to the state of the watch. None: of a model in
            DistributedDataParallel, one that all processes seed as the first does, so that they draw alike.
        scaler: the gradient scaler by which losses are multiplied.
        weights: how much each sample of a site's activations counts.

    Raises:
        EvidenceError: weights that are no function.
        SiteError: an unknown site.
        OptimizerError: no optimizer, or none that owns anything of the model or of the sites.
    """
    check_drawing(None, generator)
    sampling = Sampling(scaler, weights)
    inner = unwrap(model)
    found = discover(inner, include=sites or ())
    places = found.learning if sites is None else {name: found.places[name] for name in found.sites.subset(sites)}
    optimizers = optimizer_state.as_optimizers(optimizer)
    if not optimizers:
        raise OptimizerError("a schedule counts the steps of an optimizer, and found None; pass the model's optimizer")
    optimizer_state.check_owners(optimizers, dict(inner.named_parameters()))
    owned = _owned(optimizers)
    if places and not any(id(place.weight) in owned for place in places.values()):
        raise OptimizerError(
            f"no optimizer owns the weight of any of the {len(places)} sites ({', '.join(places)}): nothing of them "
            "trains, so nothing can be measured; pass the optimizer that trains them"
        )
    group = group_of(model)
    if group is not None and generator is None:
        generator = common_generator(model)
    found = Discovery(inner, places, found.declined)
    return Watch(found, optimizers, frozenset(needs), Surroundings(generator, sampling, model, group))


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What a model trains in, beside its optimizers."""

    generator: torch.Generator | None
    sampling: Sampling
    wrapped: nn.Module
    group: dist.ProcessGroup | None
    """The processes that hold replicas of the model."""


class Watch:
    """The counts, the window and the evidence of one schedule.

    A **round** is one step of each optimizer that steps; it ends when one steps again, or at `end_round`. Several
    optimizers that take turns so count once, and a step that a gradient scaler skips does not count.
    """

    def __init__(
        self,
        discovery: Discovery,
        optimizers: Sequence[Optimizer],
        needs: frozenset[Quantity],
        surroundings: Surroundings,
    ) -> None:
        self.discovery, self.optimizers, self.needs = discovery, tuple(optimizers), needs
        self.surroundings, self.generator = surroundings, surroundings.generator
        self.evidence = Evidence(discovery.sites, source=weakref.ref(discovery.model))
        self.num_steps = 0
        self.is_open = False
        self._clock = Clock(1)
        self._stepped: set[int] = set()
        self._taps = ExitStack()
        self._rows = self._rows_now()
        handles = list(_hooked(self, optimizers))
        self._release = weakref.finalize(self, _release, handles, self._taps)
        self._release.atexit = False

    # -- steps

    def before_step(self, optimizer: Optimizer) -> None:
        """Read the gradients as the optimizer is about to use them."""
        if id(optimizer) in self._stepped:
            self.end_round()
        if self.is_open and self._clock.is_on:
            owned = _owned([optimizer])
            places = {name: place for name, place in self.discovery.places.items() if id(place.weight) in owned}
            record_step(self.evidence, places, gradients_of(places, self.needs), Scaling.of_optimizer(optimizer))

    def after_step(self, optimizer: Optimizer) -> None:
        """Count the step, if it was one."""
        if not _was_skipped(optimizer):
            self._stepped.add(id(optimizer))

    def end_round(self) -> int:
        """The steps counted so far; a round that is under way is over."""
        if self._stepped:
            self._stepped.clear()
            self.num_steps += 1
            self._clock.step += self.is_open
        return self.num_steps

    # -- the window

    def open(self, every: int) -> None:
        """Measure from now on each `every`-th step, the next one first; where it is open already, that goes on."""
        if self.is_open:
            return
        self.restart()
        self._clock.every = every
        if self.needs & ACTIVATIONS:
            self._taps.enter_context(tapped(self.discovery, self.evidence, self._clock, self.surroundings.sampling))
        self.is_open = True

    def shut(self) -> None:
        """Measure no longer, and forget what was measured."""
        self._taps.close()
        self.is_open = False
        self.restart()

    def restart(self) -> None:
        """Forget what was measured; a window that is open goes on with its first step."""
        self._follow_sizes()
        self.evidence.forget_all()
        self._clock.step = 0
        self._rows = self._rows_now()

    def _follow_sizes(self) -> None:
        """Look at the model anew where a method has made its layers wider."""
        places = self.discovery.places
        if all(each.product.axes.num_units(each.weight.shape) == each.site.num_units for each in places.values()):
            return
        is_tapped = self.is_open and bool(self.needs & ACTIVATIONS)
        self._taps.close()
        found = discover(self.discovery.model, include=list(places))
        kept = {name: found.places[name] for name in places if name in found.places}
        self.discovery = Discovery(found.model, kept, found.declined)
        self.evidence = Evidence(self.discovery.sites, source=weakref.ref(found.model))
        if is_tapped:
            sampling = self.surroundings.sampling
            self._taps.enter_context(tapped(self.discovery, self.evidence, self._clock, sampling))

    @property
    def num_seen(self) -> int:
        """How many steps of the window are over, measured or not."""
        return self._clock.step

    def forget_changed(self) -> list[str]:
        """Forget what was measured of sites that were operated on, undone or loaded since; their names."""
        rows = self._rows_now()
        changed = [name for name in rows if rows[name] is not self._rows[name]]
        for name in changed:
            self.evidence.forget(name)
        self._rows = rows
        return changed

    @property
    def has_evidence(self) -> bool:
        """Whether anything was measured of any site."""
        return any(self.evidence.measured(name) for name in self.evidence.sites)

    def pooled(self) -> Evidence:
        """What was measured, of all replicas together: their gradients agree, their activations do not."""
        if self.surroundings.group is None:
            return self.evidence
        return pooled(self.surroundings.wrapped, self.evidence, self.needs)

    def agreed(self, value: Any) -> float | None:
        """A value as a number, the mean over all replicas that have one, so that their schedules do the same."""
        group = self.surroundings.group
        if group is None:
            return _number(value)
        return mean_of_all(value, group, next(self.discovery.model.parameters()).device)

    # -- the model

    @property
    def sites(self) -> Sites:
        """The sites as they are now."""
        rows = self._rows_now()
        return Sites(
            {
                name: replace(
                    place.site,
                    num_frozen=0 if (own := rows[name]) is None else len(own),
                    num_removable=0 if place.bank is None else int(removable(place.bank).sum()),
                )
                for name, place in self.discovery.places.items()
            },
            self.discovery.declined,
        )

    def operations(self) -> dict[str, dict[int, int]]:
        """Site -> composite unit -> its latest operation."""
        return {name: rows.latest() for name, rows in self._rows_now().items() if rows is not None}

    def ages(self) -> dict[str, dict[int, int]]:
        """As `neuronsurgery.backend.Backend.ages`, of the sites watched."""
        return ages_of(self.discovery, self.optimizers)

    def _rows_now(self) -> dict[str, Rows | None]:
        banks = {name: place.bank for name, place in self.discovery.places.items()}
        return {name: None if bank is None else bank.rows for name, bank in banks.items()}

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and strings, from which `load_state_dict` goes on, also in the middle of a window."""
        return {
            "num_steps": self.num_steps,
            "stepped": [index for index, optimizer in enumerate(self.optimizers) if id(optimizer) in self._stepped],
            "is_open": self.is_open,
            "every": self._clock.every,
            "num_seen": self._clock.step,
            "evidence": self.evidence.state_dict(),
            "births": saved_births(self.optimizers, self.discovery.model),
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; what was counted and measured here is forgotten."""
        evidence = _on_devices(state["evidence"], self.discovery)
        self.evidence.load_state_dict(evidence)  # first: it refuses what does not fit
        self.shut()
        if state["is_open"]:
            self.open(state["every"])
        self.evidence.load_state_dict(evidence)
        self._clock.step, self.num_steps = state["num_seen"], state["num_steps"]
        self._stepped = {id(self.optimizers[index]) for index in state["stepped"]}
        load_births(self.optimizers, self.discovery.model, state["births"])
        if self.generator is not None:
            self.generator.set_state(state["generator"].cpu())

    def close(self) -> None:
        """Take hooks and taps off."""
        self.is_open = False
        self._release()


def _number(value: Any) -> float | None:
    """A number, or a tensor of one element, as a number.

    Raises:
        ScheduleError: it is neither.
    """
    try:
        return None if value is None else float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ScheduleError(
            f"step takes a number or a tensor of one element, found {type(value).__name__}: {error}"
        ) from error


def mean_of_all(value: Any, group: dist.ProcessGroup, device: torch.device) -> float | None:
    """The mean of the values of those processes that have one, in one all-reduce of 24 bytes; None where none has.

    Raises:
        ScheduleError: what this process has is no number; DistributedError: what another one has.
    """
    number, wrong = None, None
    try:
        number = _number(value)
    except ScheduleError as error:
        wrong = error
    own = [0.0 if number is None else number, float(number is not None), float(wrong is not None)]
    shared = torch.tensor(own, dtype=torch.float64, device=device)
    dist.all_reduce(shared, group=group)
    total, count, num_wrong = shared.tolist()
    if wrong is not None:
        raise wrong
    if num_wrong:
        raise DistributedError(f"{int(num_wrong)} of {group.size()} processes passed step a value that is no number")
    return total / count if count else None


def common_generator(model: nn.Module) -> torch.Generator:
    """A generator that all processes that hold a model seed as the first of them does."""
    with together(model):
        seed = agreed_number("the seed of a generator", torch.initial_seed() % 2**62)
    return torch.Generator().manual_seed(seed)


def ages_of(discovery: Discovery, optimizers: Sequence[Optimizer]) -> dict[str, dict[int, int]]:
    """Optimizer steps since the latest operation on each composite unit, where they are counted.

    Units whose birth lies ahead of the count are left out, and so count as old: they were born before an optimizer or a
    clock that was not saved with them was started anew.
    """
    found: dict[str, dict[int, int]] = {}
    for name, place in discovery.places.items():
        now = optimizer_state.age_clock(optimizers, place.weight)
        if place.bank is None or now is None:
            continue
        rows = place.bank.rows
        born = dict(zip(rows.unit.tolist(), rows.steps(0), strict=True))  # in order: the latest operation stays
        found[name] = {unit: now - step for unit, step in born.items() if step is not None and step <= now}
    return found


def _on_devices(evidence: Mapping[str, Any], discovery: Discovery) -> dict[str, Any]:
    """The sums of each site on the device of its weight, where more will be added."""
    return {
        **evidence,
        "sums": {
            name: pytree.tree_map_only(Tensor, _to(discovery.places[name].weight.device), of_site)
            if name in discovery.places
            else of_site
            for name, of_site in evidence["sums"].items()
        },
        **{key: int(evidence[key]) for key in ("num_steps", "num_skipped")},
    }


def _to(device: torch.device) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(device)


def _owned(optimizers: Iterable[Optimizer]) -> set[int]:
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def _was_skipped(optimizer: Optimizer) -> bool:
    """Whether a fused kernel was told of an overflow by a gradient scaler; it then leaves everything as it is.

    Reading that waits for the device, as a scaler does itself for an optimizer that is not fused.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return isinstance(found_inf, Tensor) and bool(found_inf.any())


def _hooked(watch: Watch, optimizers: Iterable[Optimizer]) -> Iterable[RemovableHandle]:
    """Hooks that refer to the watch weakly, and run outside of a compiled step."""
    alive = weakref.ref(watch)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def before(optimizer: Optimizer, *_: Any) -> None:
        if (found := alive()) is not None:
            found.before_step(optimizer)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after(optimizer: Optimizer, *_: Any) -> None:
        if (found := alive()) is not None:
            found.after_step(optimizer)

    for optimizer in optimizers:
        yield optimizer.register_step_pre_hook(before)
        yield optimizer.register_step_post_hook(after)


def _release(handles: Iterable[RemovableHandle], taps: ExitStack) -> None:
    for handle in handles:
        handle.remove()
    taps.close()
