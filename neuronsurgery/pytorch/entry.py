"""What the door calls: the stages of the PyTorch backend, in terms of the core's values."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from neuronsurgery.composites import Composites
from neuronsurgery.evidence import Evidence
from neuronsurgery.pytorch import evidence as measuring
from neuronsurgery.pytorch import optimizers as optimizer_state
from neuronsurgery.pytorch.attaching import attach
from neuronsurgery.pytorch.consolidating import consolidate
from neuronsurgery.pytorch.continual import continual_backprop
from neuronsurgery.pytorch.continuous import ccbp
from neuronsurgery.pytorch.distributed import agreed_units, is_shared, replicated, together
from neuronsurgery.pytorch.drawing import check_drawing, own_seed
from neuronsurgery.pytorch.evidence import observe, probe
from neuronsurgery.pytorch.flattening import flatten
from neuronsurgery.pytorch.injecting import inject
from neuronsurgery.pytorch.inspecting import check
from neuronsurgery.pytorch.mirrors import check_mirrors, mirror
from neuronsurgery.pytorch.models import check_model, unwrap
from neuronsurgery.pytorch.operating import banks_of, next_operation, operate, undo
from neuronsurgery.pytorch.pooling import pooled
from neuronsurgery.pytorch.readers import declare_consumer
from neuronsurgery.pytorch.regularizing import l2, regenerative, spectral
from neuronsurgery.pytorch.renewing import consumers, reset_units
from neuronsurgery.pytorch.resetting import reset, reset_optimizer, scale_head, shrink_and_perturb
from neuronsurgery.pytorch.sharing import reborn
from neuronsurgery.pytorch.sites import Discovery
from neuronsurgery.pytorch.sites import discover as survey
from neuronsurgery.pytorch.state import accept, restore
from neuronsurgery.pytorch.taps import unobserved
from neuronsurgery.pytorch.upgd import UPGD
from neuronsurgery.pytorch.watching import ages_of, watch
from neuronsurgery.pytorch.widening import widen
from neuronsurgery.sites import Sites

__all__ = [
    "accept",
    "ages",
    "agreed_units",
    "attach",
    "ccbp",
    "check",
    "check_mirrors",
    "check_source",
    "composites",
    "consolidate",
    "consumers",
    "continual_backprop",
    "declare_consumer",
    "discover",
    "flatten",
    "inject",
    "is_shared",
    "l2",
    "measure",
    "mirror",
    "observe",
    "operate",
    "pooled",
    "probe",
    "reborn",
    "regenerative",
    "replicated",
    "reset",
    "reset_optimizer",
    "reset_units",
    "restore",
    "scale_head",
    "seed",
    "shrink_and_perturb",
    "spectral",
    "together",
    "undo",
    "unobserved",
    "upgd",
    "watch",
    "widen",
]


def discover(model: nn.Module, *, include: Collection[str] = (), example: Any = None) -> Sites:
    """The sites of a model; see `neuronsurgery.surgery.discover`."""
    return _survey(model, include, example).sites


def _survey(model: nn.Module, include: Collection[str], example: Any = None) -> Discovery:
    check_model(model)
    outputs = [] if example is None else measuring.example_outputs(model, example)
    return survey(model, include=include, outputs=outputs)


def measure(model: nn.Module, sites: Sites) -> Evidence:
    """Evidence from the gradients that the parameters of these sites hold now."""
    return measuring.evidence_of_gradients(_survey(model, sites))


def check_source(evidence: Evidence, model: nn.Module) -> None:
    """Refuse evidence of another model."""
    measuring.check_source(evidence, unwrap(model))


def ages(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer] | None) -> dict[str, dict[int, int]]:
    """Optimizer steps since the latest operation on each composite unit, where they are counted."""
    optimizers = optimizer_state.as_optimizers(optimizer)
    if not optimizers or not banks_of(unwrap(model)):
        return {}
    return ages_of(survey(unwrap(model)), optimizers)


def seed(model: nn.Module, generator: torch.Generator | None) -> int:
    """The seed for choices made before the next operation on this model; the generator is for that to advance."""
    check_drawing(None, generator)
    state = None if generator is None else generator.get_state()
    found = own_seed(generator, next_operation(unwrap(model)))
    if generator is not None and state is not None:
        generator.set_state(state)
    return found


def composites(model: nn.Module) -> Composites:
    """Every composite unit of a model; see `neuronsurgery.surgery.composites`."""
    check_model(model)
    places = survey(unwrap(model)).places
    return Composites({name: place.bank.rows.members() for name, place in places.items() if place.bank is not None})


def upgd(
    params: Any,
    lr: float,
    *,
    weight_decay: float,
    beta_utility: float,
    sigma: float,
    generator: torch.Generator | None = None,
) -> Optimizer:
    """An optimizer that spares useful weights; see `neuronsurgery.surgery.upgd`."""
    return UPGD(params, lr, weight_decay=weight_decay, beta_utility=beta_utility, sigma=sigma, generator=generator)
