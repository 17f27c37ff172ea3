"""Methods that change whole layers: reset, reset of the optimizer alone, a scaled head, shrink and perturb.

They choose no units and so need no sites. As an operation, each is planned and refused first, then made in small
changes that can be taken back; parameters keep their identity, and the optimizer's state follows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.errors import DrawError, ModelError
from neuronsurgery.layer_reports import LayerReport
from neuronsurgery.pytorch import optimizers as optimizer_state
from neuronsurgery.pytorch.drawing import Init, check_drawing, generator_kept, seed_for
from neuronsurgery.pytorch.forgetting import born_with_parameters, copies_of, forget
from neuronsurgery.pytorch.fresh_layers import Fresh, fresh_layers
from neuronsurgery.pytorch.fsdp import require_whole
from neuronsurgery.pytorch.hanging import take_down
from neuronsurgery.pytorch.injecting import taken_out
from neuronsurgery.pytorch.layers import Layers, Owned, layers_of
from neuronsurgery.pytorch.models import check_model, unwrap
from neuronsurgery.pytorch.operating import banked_names, banks_of
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.producers import is_producer
from neuronsurgery.pytorch.rewriting import class_changes
from neuronsurgery.pytorch.sites import discover
from neuronsurgery.pytorch.swapped import with_parameters_in_place
from neuronsurgery.pytorch.transaction import Change, Overwrite, run

__all__ = ["reset", "reset_optimizer", "scale_head", "shrink_and_perturb"]

Optimizers = Optimizer | Sequence[Optimizer] | None


@dataclass(frozen=True, eq=False)
class Subject:
    """What was asked for: the model out of its wrappers, the layers, and the optimizers that own their parameters."""

    model: nn.Module
    layers: list[Owned]
    optimizers: tuple[Optimizer, ...]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [each for owned in self.layers for each in owned.parameters.values()]

    def banked(self) -> list[Place]:
        """The places of the layers that carry a bank."""
        if not banks_of(self.model):
            return []
        concerned = set(map(id, self.parameters))
        return [
            place
            for place in discover(self.model).places.values()
            if place.bank is not None and any(s is not None and id(s.tensor) in concerned for s in place.renewed)
        ]

    def notes(self) -> Iterator[str]:
        names = {f"{o.name}.{name}".lstrip("."): p for o in self.layers for name, p in o.parameters.items()}
        missing = optimizer_state.unowned(self.optimizers, names)
        if self.optimizers and missing:
            yield f"no optimizer owns {', '.join(missing)}: they will not train"


def subject(model: nn.Module, layers: Layers, optimizer: Optimizers, example: Any) -> Subject:
    """Find what was asked for, and refuse what cannot be changed."""
    check_model(model)
    model = unwrap(model)
    optimizers = optimizer_state.as_optimizers(optimizer)
    optimizer_state.check_owners(optimizers, dict(model.named_parameters()))
    return Subject(model, layers_of(model, layers, example), optimizers)


@with_parameters_in_place
def reset(
    model: nn.Module,
    layers: Layers = None,
    *,
    optimizer: Optimizers = None,
    example: Any = None,
    init: Init | None = None,
    initial: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> LayerReport:
    """Give layers fresh weights; see `neuronsurgery.surgery.reset`."""
    require_whole(model, "reset")
    asked = subject(model, layers, optimizer, example)
    places = asked.banked()

    def planned(fresh: list[Fresh]) -> Iterator[Change]:
        for each in fresh:
            yield from (Overwrite(tensor, values) for tensor, values in each.pairs())
        yield from _without_gradients(asked)
        yield from forget(asked.optimizers, asked.parameters)
        for place in places:
            yield from take_down(place)
        if places:
            gone = {place.site.name for place in places}
            discovery = discover(asked.model)
            yield from class_changes(discovery, banked_names(discovery) - gone)
        yield from taken_out(asked.model, asked.parameters)

    notes = [f"{p.site.name}: {len(p.bank.rows)} frozen rows are gone" for p in places if p.bank is not None]
    if not asked.optimizers:
        notes.append("no optimizer was given: it keeps its state of the old weights")
    return _drawn("reset", asked, planned, notes, init=init, initial=initial, generator=generator)


@with_parameters_in_place
def shrink_and_perturb(
    model: nn.Module,
    layers: Layers = None,
    *,
    shrink: float = 0.8,
    perturb: float = 0.2,
    optimizer: Optimizers = None,
    example: Any = None,
    init: Init | None = None,
    initial: Mapping[str, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> LayerReport:
    """Scale layers down and add a part of fresh weights; see `neuronsurgery.surgery.shrink_and_perturb`."""
    require_whole(model, "shrink_and_perturb")
    for name, value in (("shrink", shrink), ("perturb", perturb)):
        if not 0 <= value <= 1:
            raise ModelError(f"{name} is {value!r}; it is a factor from 0 to 1")
    asked = subject(model, layers, optimizer, example)

    def planned(fresh: list[Fresh]) -> Iterator[Change]:
        for each in fresh:
            for parameter, values in each.parameters():
                for tensor in (parameter, *copies_of(asked.optimizers, parameter)):
                    yield Overwrite(tensor, tensor.detach() * shrink + values.to(tensor) * perturb)
        yield from _without_gradients(asked)

    banked = asked.banked()
    notes = [f"{place.site.name}: its frozen rows stay as they are" for place in banked]
    return _drawn(
        "shrink_and_perturb", asked, planned, notes, init=init, initial=initial, generator=generator, has_buffers=False
    )


@with_parameters_in_place
def scale_head(
    model: nn.Module,
    factor: float,
    layers: Layers = 1,
    *,
    optimizer: Optimizers = None,
    example: Any = None,
) -> LayerReport:
    """Multiply the weights and biases of output layers; see `neuronsurgery.surgery.scale_head`."""
    require_whole(model, "scale_head")
    if not 0 < factor < float("inf"):
        raise ModelError(f"factor is {factor!r}; it is a positive number")
    asked = subject(model, layers, optimizer, example)
    for owned in asked.layers:
        if not is_producer(owned.module) or "composite" in owned.module._modules:
            found = "a layer with frozen rows" if is_producer(owned.module) else type(owned.module).__name__
            raise ModelError(
                f"{owned.name!r} is {found}: its output would not be scaled with its parameters. Name linear and "
                "convolution layers without composite units"
            )
    changes: list[Change] = [
        Overwrite(tensor, tensor.detach() * factor)
        for parameter in asked.parameters
        for tensor in (parameter, *copies_of(asked.optimizers, parameter))
    ]
    return run([*changes, *_without_gradients(asked)], lambda: _report("scale_head", asked))


@with_parameters_in_place
def reset_optimizer(
    model: nn.Module, layers: Layers = None, *, optimizer: Optimizers, example: Any = None
) -> LayerReport:
    """Give the optimizer the state of a fresh one; see `neuronsurgery.surgery.reset_optimizer`."""
    require_whole(model, "reset_optimizer")
    asked = subject(model, layers, optimizer, example)
    changes = forget(asked.optimizers, asked.parameters)
    changes += [born_with_parameters(place, asked.optimizers, asked.parameters) for place in asked.banked()]
    return run(changes, lambda: _report("reset_optimizer", asked))


# -- what they share -------------------------------------------------------------------------------------------------


def _drawn(
    method: str,
    asked: Subject,
    planned: Callable[[list[Fresh]], Iterator[Change]],
    notes: Sequence[str],
    *,
    generator: torch.Generator | None,
    has_buffers: bool = True,
    **drawing: Any,
) -> LayerReport:
    """Draw fresh layers, make the changes that they are used for, and report; a fault takes back the generator too."""
    check_drawing(drawing["init"], generator)
    with generator_kept(generator):
        seed = seed_for(generator, _checksum(asked.parameters))
        fresh = fresh_layers(asked.layers, seed=seed, **drawing)
        _refuse_unfinite(fresh)
        names = {each.owned.name: each.names(has_buffers) for each in fresh}
        return run(list(planned(fresh)), lambda: _report(method, asked, notes, names))


def _checksum(parameters: Sequence[nn.Parameter]) -> int:
    """A number for the weights there are: without a generator, later draws differ as the weights do."""
    return zlib.crc32(parameters[0].detach().float().cpu().numpy().tobytes())


def _refuse_unfinite(fresh: Sequence[Fresh]) -> None:
    for each in fresh:
        if not all(bool(values.isfinite().all()) for _, values in each.pairs()):
            raise DrawError(
                f"the fresh weights of {each.owned.name!r} are not finite: init= and reset_parameters must fill all of "
                "a tensor in place, and initial= hold finite numbers"
            )


def _without_gradients(asked: Subject) -> Iterator[Change]:
    """Gradients of the old weights say nothing of the new ones."""
    for parameter in asked.parameters:
        if parameter.grad is not None:
            yield Overwrite(parameter.grad, torch.zeros_like(parameter.grad))


def _report(
    method: str, asked: Subject, notes: Sequence[str] = (), names: Mapping[str, tuple[str, ...]] | None = None
) -> LayerReport:
    changed = names or {owned.name: tuple(owned.parameters) for owned in asked.layers}
    modules = {owned.name: owned.module for owned in asked.layers}
    held = [getattr(modules[layer], name) for layer, own in changed.items() for name in own]
    return LayerReport(method, changed, sum(each.numel() for each in held), (*notes, *asked.notes()))
