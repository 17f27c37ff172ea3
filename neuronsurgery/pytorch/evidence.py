"""Measuring a model's units: from the gradients that are there, while it trains, or on batches of its own.

Row norms are read from parameters and their gradients, in a step hook where there is an optimizer (then they are
accumulated, reduced and unscaled). Activations are observed through rewritten forwards for as long as a context is
open, and only in passes that build a graph, so that rollouts and evaluations do not enter. No hook stays on the model.

Of a weight that is computed from several parameters the first is measured, the direction of a weight norm or the mean
of a noisy layer: the weight itself has no gradient that is kept.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from neuronsurgery.errors import EvidenceError
from neuronsurgery.evidence import WITH_BIAS, Evidence, Quantity
from neuronsurgery.pytorch import optimizers as optimizer_state
from neuronsurgery.pytorch.distributed import added
from neuronsurgery.pytorch.fsdp import is_gathered, stand_in
from neuronsurgery.pytorch.models import left_alone, run_model, unwrap, wrappers_of
from neuronsurgery.pytorch.operating import banked_names
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.rewriting import class_changes
from neuronsurgery.pytorch.sampling import EVEN, Sampling, Weights, sums_by_unit
from neuronsurgery.pytorch.sharding import held, is_sharded, shard_of, squared_norms
from neuronsurgery.pytorch.sites import Discovery, check_banks_in_place, discover
from neuronsurgery.pytorch.swapped import swapped_in
from neuronsurgery.pytorch.taps import Sink, listening
from neuronsurgery.pytorch.transaction import run
from neuronsurgery.pytorch.unit_axes import ROWS, UnitAxes

__all__ = [
    "ACTIVATIONS",
    "Clock",
    "Scaling",
    "check_source",
    "evidence_of_gradients",
    "by_unit",
    "example_outputs",
    "gradients_of",
    "heard",
    "observe",
    "probe",
    "record_step",
    "tapped",
]

ACTIVATIONS = frozenset({Quantity.ACTIVATION, Quantity.ACTIVATION_GRADIENT})
"""What is measured through taps; the other quantities are read from gradients alone."""

Norms: TypeAlias = tuple[Tensor, Tensor]
"""The 2-norms of a site's rows and of their gradients, each (num_units,)."""


def evidence_of_gradients(discovery: Discovery) -> Evidence:
    """One step of evidence from the gradients that the model's parameters hold now.

    Raises:
        EvidenceError: no site's weight has a gradient.
    """
    present = gradients_of(discovery.learning)
    if discovery.learning and not present.weights:
        raise EvidenceError(
            f"no gradients are present: all {len(discovery.learning)} sites' weights have .grad None. Call "
            "loss.backward() first, or measure with surgery.observe(model, optimizer) in training or "
            "surgery.probe(model, batches, loss_fn), and pass evidence="
        )
    evidence = Evidence(discovery.sites, source=weakref.ref(discovery.model))
    plain, with_bias = _norms(discovery.learning, present)
    evidence.record_step(plain, with_bias=with_bias)
    return evidence


def check_source(evidence: Evidence, model: nn.Module) -> None:
    """Refuse evidence that was measured on another model.

    Raises:
        EvidenceError: the evidence names another model.
    """
    source = evidence.source
    if isinstance(source, weakref.ref) and source() is not model:
        raise EvidenceError(
            "this is evidence of another model: it was measured on another object (a copy, or one that no longer "
            "exists). Measure on the model you operate on"
        )


def norms_of(slots: Sequence[tuple[Tensor, UnitAxes | None]]) -> list[Tensor]:
    """The 2-norms of all units' rows of tensors, (num_units,) each; of sharded ones in one exchange of these numbers.

    Of None as axes, one value that all units share.
    """
    shared = [(tensor, axes or ROWS) for tensor, axes in slots if is_sharded(tensor)]
    if not shared:
        return [_own_norms(tensor, axes) for tensor, axes in slots]
    squares = [squared_norms(tensor, _own_norms(held(tensor), axes), axes) for tensor, axes in shared]
    found = iter(added("norms of rows", squares, shared[0][0]))
    return [
        next(found).sqrt().to(torch.promote_types(tensor.dtype, torch.float32))
        if is_sharded(tensor)
        else _own_norms(tensor, axes)
        for tensor, axes in slots
    ]


def _own_norms(tensor: Tensor, axes: UnitAxes | None) -> Tensor:
    return row_norms(tensor.detach().reshape(1) if axes is None else axes.rows(tensor.detach()))


def row_norms(values: Tensor) -> Tensor:
    """2-norms of a weight's rows in float32 or better: (num_units, ...) -> (num_units,)."""
    flat = values.detach().flatten(1) if values.dim() > 1 else values.detach()[:, None]
    norms: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=torch.promote_types(flat.dtype, torch.float32))
    return norms


@dataclass(frozen=True, eq=False)
class Gradients:
    """The gradients of weights, and of the biases beside them, by the sites' names."""

    weights: dict[str, Tensor]
    biases: dict[str, Tensor] | None
    """Those that there are; None: biases are not measured."""


def _norms(places: dict[str, Place], gradients: Gradients) -> tuple[dict[str, Norms], dict[str, Norms]]:
    """The norms of rows and their gradients, and the same with the biases, of no site where they are not measured."""
    asked: dict[tuple[str, str], tuple[Tensor, UnitAxes | None]] = {}
    for name, gradient in gradients.weights.items():
        place = places[name]
        asked[name, "weight"] = (place.weight, place.product.axes)
        asked[name, "gradient"] = (gradient, place.product.axes)
        if gradients.biases is not None and place.bias is not None:
            asked[name, "bias"] = (place.bias.tensor, place.bias.axes)
            if (of_bias := gradients.biases.get(name)) is not None:
                asked[name, "gradient of bias"] = (of_bias, place.bias.axes)
    norms = dict(zip(asked, norms_of(list(asked.values())), strict=True))
    plain = {name: (norms[name, "weight"], norms[name, "gradient"]) for name in gradients.weights}
    if gradients.biases is None:
        return plain, {}
    return plain, {
        name: (
            _joined(weight, norms.get((name, "bias"))),
            _joined(gradient, norms.get((name, "gradient of bias"))),
        )
        for name, (weight, gradient) in plain.items()
    }


def _joined(norm: Tensor, bias: Tensor | None) -> Tensor:
    """Norms with one more entry; a bias without a gradient stands still, and no bias adds nothing."""
    return norm if bias is None else torch.hypot(norm, bias.to(norm))


def record_step(
    evidence: Evidence, places: dict[str, Place], gradients: Gradients, scaling: Scaling | None = None
) -> None:
    """One step; the gradients are `scaling.scale` times as large as they should be, and count if none overflowed."""
    scaling = scaling or Scaling()
    plain, with_bias = (
        {name: (w, scaling.unscaled(g)) for name, (w, g) in norms.items()} for norms in _norms(places, gradients)
    )
    if plain:
        flags = [g.isfinite().all() for _, g in plain.values()]  # stay on the device: nothing waits for it
        if scaling.found_inf is not None:
            flags.append(scaling.found_inf.reshape(()) == 0)
        usable = torch.stack([flag.to(flags[0].device) for flag in flags]).all()
        evidence.record_step(plain, usable=usable, with_bias=with_bias)


@dataclass(frozen=True, eq=False)
class Scaling:
    """How a gradient scaler left the gradients: 0-d tensors, or None where there is nothing to know."""

    scale: Tensor | None = None
    found_inf: Tensor | None = None

    @staticmethod
    def of_optimizer(optimizer: Optimizer) -> Scaling:
        """What `torch.amp.GradScaler` tells an optimizer that unscales by itself, as fused ones do, while it steps.

        Others are called only with gradients that are unscaled and finite.
        """
        return Scaling(getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None))

    @staticmethod
    def of_scaler(scaler: Any, device: torch.device) -> Scaling:
        """The scale that losses are multiplied by now, asked for in a way that does not wait for the device."""
        return Scaling() if scaler is None else Scaling(scaler.scale(torch.ones((), device=device)))

    def unscaled(self, values: Tensor) -> Tensor:
        """The values divided by the scale."""
        return values if self.scale is None else values / self.scale.to(values)


def gradients_of(places: dict[str, Place], needs: Collection[Quantity] = WITH_BIAS) -> Gradients:
    """The gradients that the weights of these places hold now, and the biases if what is needed asks for them."""
    weights = _present({name: place.weight.grad for name, place in places.items()})
    if not WITH_BIAS & set(needs):
        return Gradients(weights, None)
    biases = {name: place.bias.tensor.grad for name, place in places.items() if place.bias is not None}
    return Gradients(weights, _present(biases))


def _present(gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


# -- while training --------------------------------------------------------------------------------------------------


@contextmanager
def observe(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    *,
    every: int = 1,
    sites: Collection[str] = (),
    needs: Collection[Quantity] = frozenset(Quantity),
    scaler: Any = None,
    weights: Weights | None = None,
) -> Iterator[Evidence]:
    """Measure while the model trains; see `neuronsurgery.surgery.observe`."""
    if every < 1:
        raise EvidenceError(f"every={every}: measure every first, second, ... step, so pass 1 or more")
    sampling = Sampling(scaler, weights)
    model = unwrap(model)
    discovery = discover(model, include=sites)
    check_banks_in_place(discovery)
    optimizers = optimizer_state.as_optimizers(optimizer)
    optimizer_state.check_owners(optimizers, dict(model.named_parameters()))
    if not optimizers and is_gathered(model):
        raise EvidenceError(
            "observe(model) sees gradients as they arrive at parameters, and FSDP reduces them beside these. Pass the "
            "optimizer: observe(model, optimizer)"
        )
    evidence = Evidence(discovery.sites, source=weakref.ref(model))
    clock = Clock(every)
    with ExitStack() as stack:
        if ACTIVATIONS & set(needs):
            stack.enter_context(tapped(discovery, evidence, clock, sampling))
        if optimizers:
            stack.enter_context(_after_optimizer_steps(optimizers, discovery, evidence, clock, needs))
        else:
            stack.enter_context(_after_backward(discovery, evidence, clock, scaler, needs))
        yield evidence


class Clock:
    """Counts steps, and says whether the current one is measured."""

    def __init__(self, every: int) -> None:
        self.every, self.step = every, 0

    @property
    def is_on(self) -> bool:
        return self.step % self.every == 0


@contextmanager
def _after_optimizer_steps(
    optimizers: Sequence[Optimizer],
    discovery: Discovery,
    evidence: Evidence,
    clock: Clock,
    needs: Collection[Quantity],
) -> Iterator[None]:
    """Read the gradients as each optimizer is about to use them; several optimizers' sites make one step each."""

    def reader(optimizer: Optimizer) -> Callable[..., None]:
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        places = {name: place for name, place in discovery.learning.items() if id(place.weight) in owned}

        def read(*_: Any) -> None:
            if clock.is_on:
                record_step(evidence, places, gradients_of(places, needs), Scaling.of_optimizer(optimizer))
            if optimizer is optimizers[-1]:
                clock.step += 1

        return read

    with _installed([optimizer.register_step_pre_hook(reader(optimizer)) for optimizer in optimizers]):
        yield


@contextmanager
def _after_backward(
    discovery: Discovery, evidence: Evidence, clock: Clock, scaler: Any, needs: Collection[Quantity]
) -> Iterator[None]:
    """Without an optimizer every backward pass is a step: its gradients are complete when the engine is done."""
    pending: list[bool] = []
    later = torch.autograd.Variable._execution_engine.queue_callback

    def finish() -> None:
        # After what others asked for until now: replicas reduce their gradients then.
        later(record)

    def record() -> None:
        pending.clear()
        if clock.is_on and (gradients := gradients_of(discovery.learning, needs)).weights:
            scaling = Scaling.of_scaler(scaler, next(iter(gradients.weights.values())).device)
            record_step(evidence, discovery.learning, gradients, scaling)
        clock.step += 1

    def arrived(_: Tensor) -> None:
        if not pending:
            pending.append(True)
            later(finish)

    handles = [
        place.weight.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
        for place in discovery.learning.values()
    ]
    with _installed(handles):
        yield


@contextmanager
def _installed(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Hooks that are taken off when the context closes."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# -- activations -----------------------------------------------------------------------------------------------------


@contextmanager
def tapped(discovery: Discovery, evidence: Evidence, clock: Clock, sampling: Sampling = EVEN) -> Iterator[None]:
    """Let the activations of every site flow through taps for as long as the context is open."""
    sinks = {
        id(place.weight): SiteSink(name, place, evidence, clock, sampling) for name, place in discovery.learning.items()
    }
    with heard(discovery, sinks):
        yield


@contextmanager
def heard(discovery: Discovery, sinks: Mapping[int, Sink]) -> Iterator[None]:
    """Let sinks hear the activations of sites, by the ids of their weights, for as long as the context is open."""
    try:
        with listening(sinks, _stand_ins(discovery)):
            _rewrite(discovery)
            yield
    finally:  # for the banks that are there by now, and for those who still listen
        _rewrite(discovery)


def _stand_ins(discovery: Discovery) -> dict[int, Callable[[], Any]]:
    """What a forward pass has in the place of each sharded weight, by the weight's id."""
    return {
        id(place.weight): functools.partial(stand_in, place.weight, discovery.model)
        for place in discovery.places.values()
        if is_sharded(place.weight)
    }


def _rewrite(discovery: Discovery) -> None:
    """Give every module the class that banks and listeners ask for now."""
    with swapped_in(discovery.model):
        run(class_changes(discovery, banked_names(discovery)))


class SiteSink:
    """Adds the activations of one site, and the gradients that arrive at them, to the evidence."""

    def __init__(self, name: str, place: Place, evidence: Evidence, clock: Clock, sampling: Sampling) -> None:
        self.name, self.evidence, self.clock, self.sampling = name, evidence, clock, sampling
        self.place = place
        self.offset = len(place.path.links)

    def record(self, h: Tensor, axes: tuple[int, ...] | None = None) -> None:
        if not (self.clock.is_on and torch.is_grad_enabled() and h.requires_grad):
            return
        axes = axes or self.place.path.unit_axes(self.place.product, h.dim())
        weights = self.sampling.of(self.name, h.detach(), axes)
        self.add(h.detach(), axes, weights)
        # The weights of these very activations: a forward may come in between, and a module be called more than once.
        h.register_hook(lambda gradient: self.add_gradient(gradient.detach(), axes, weights))  # type: ignore[no-untyped-call]

    def add(self, h: Tensor, axes: tuple[int, ...], weights: Tensor | None) -> None:
        total, count = sums_by_unit(by_unit(self.place, h.abs(), axes), weights)
        self._count(self._of_all(total), count, Quantity.ACTIVATION)

    def add_gradient(self, gradient: Tensor, axes: tuple[int, ...], weights: Tensor | None) -> None:
        total, count = sums_by_unit(by_unit(self.place, gradient.abs(), axes), weights)
        total = Scaling.of_scaler(self.sampling.scaler, total.device).unscaled(total)
        self._count(self._of_all(total), count, Quantity.ACTIVATION_GRADIENT)

    def _of_all(self, total: Tensor) -> Tensor:
        """Sums for all units, where this process computes some of them: times the processes, which all add theirs."""
        if not self.place.is_split:
            return total
        weight: Any = self.place.weight
        found = total.new_zeros(self.place.site.num_units)
        found[shard_of(weight).rows(self.place.product.axes)] = total * weight.device_mesh.size()
        return found

    def _count(self, total: Tensor, count: Tensor | int, quantity: Quantity) -> None:
        counts = total.isfinite().all()  # a pass that overflows, as under a gradient scaler, does not
        total = torch.where(counts, total, torch.zeros_like(total))
        self.evidence.record_samples(self.name, total, torch.where(counts, count, 0), quantity)


def by_unit(place: Place, h: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The activations of each unit, (num_units, num_samples), of those that have their units on these axes."""
    rows = h.movedim(axes, tuple(range(len(axes)))).flatten(0, len(axes) - 1)
    return rows.reshape(len(rows), -1)


# -- on batches of its own -------------------------------------------------------------------------------------------


def probe(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    *,
    sites: Collection[str] = (),
    weights: Weights | None = None,
) -> Evidence:
    """Measure on batches without training; see `neuronsurgery.surgery.probe`."""
    if isinstance(batches, Tensor):
        raise EvidenceError(
            "batches is a tensor; pass a list of batches, [batch], so that its rows are not taken for them"
        )
    sampling = Sampling(weights=weights)
    inner, measured = unwrap(model), without_replica(model)
    if is_gathered(inner):
        raise EvidenceError(
            "probe(model, ...) runs backward passes of its own, after which FSDP would reduce their gradients into "
            "those of training. Measure in training: surgery.observe(model, optimizer)"
        )
    discovery = discover(inner, include=sites)
    check_banks_in_place(discovery)
    if not discovery.learning:
        raise EvidenceError(
            f"nothing to measure: of {len(discovery.places)} sites none has weights that learn, and "
            f"{len(discovery.declined)} layers are declined; surgery.discover(model) says why"
        )
    evidence = Evidence(discovery.sites, source=weakref.ref(inner))
    with left_alone(inner), tapped(discovery, evidence, Clock(1), sampling):
        for batch in batches:
            with torch.enable_grad():
                loss = loss_fn(measured, batch)
            _check_loss(loss)
            record_step(evidence, discovery.learning, _gradients_by(loss, discovery.learning))
    if evidence.num_steps + evidence.num_skipped == 0:
        raise EvidenceError(
            "probe found no batch, or none whose loss depends on a site's weights; nothing was measured"
        )
    return evidence


def _gradients_by(loss: Tensor, places: dict[str, Place]) -> Gradients:
    """The gradients of a loss, written nowhere."""
    weights = {name: place.weight for name, place in places.items()}
    biases = {name: place.bias.tensor for name, place in places.items() if place.bias is not None}
    found = iter(torch.autograd.grad(loss, [*weights.values(), *biases.values()], allow_unused=True))
    of_weights, of_biases = ({name: next(found) for name in each} for each in (weights, biases))
    return Gradients(_present(of_weights), _present(of_biases))


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise EvidenceError(f"loss_fn(model, batch) must return a scalar tensor, it returned {found}")
    if not loss.requires_grad:
        raise EvidenceError("loss_fn(model, batch) returned a loss without a graph; do not detach it or use no_grad")


def example_outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """The output tensors of a forward pass with their graph, the model left as it was."""
    inner = without_replica(model)
    with left_alone(unwrap(model)), torch.enable_grad():
        return [t for t in pytree.tree_leaves(run_model(inner, batch)) if isinstance(t, Tensor)]


def without_replica(model: nn.Module) -> nn.Module:
    """The model out of a wrapper that would take a pass for one of training, whose gradients it waits for."""
    replicas = [each for each in wrappers_of(model) if isinstance(each, nn.parallel.DistributedDataParallel)]
    return replicas[-1].module if replicas else model
