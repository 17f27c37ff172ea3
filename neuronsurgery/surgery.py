"""The door: operate on a model's units in one call, or stage by stage.

    model --discover--> Sites --score--> Scores --select--> Selection --plan--> Plan --operate--> Report

Each stage returns a frozen, printable value, and uses only what is left of it; `knife` is all of them in one line.
The composite unit is KNIFE's (arXiv 2606.25335): a frozen knowledge member, a fresh trainable active member and a
frozen compensation member, whose sum equals the old unit at the moment of surgery.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, cast

from neuronsurgery.checks import Check, Problem
from neuronsurgery.choosing import Custom, Random, Units
from neuronsurgery.combining import Criterion
from neuronsurgery.composites import Composites, Member
from neuronsurgery.consolidations import Consolidated, Consolidation
from neuronsurgery.consumers import Consumers
from neuronsurgery.criteria import as_criterion
from neuronsurgery.errors import (
    CheckError,
    CriterionError,
    DistributedError,
    DrawError,
    EquivalenceError,
    EvidenceError,
    FormatError,
    MirrorError,
    ModelError,
    OptimizerError,
    PlanError,
    ScheduleError,
    SiteError,
    StateError,
    SurgeryError,
    UndoError,
    UntraceableError,
)
from neuronsurgery.evidence import OF_GRADIENTS, Evidence, Quantity
from neuronsurgery.flattenings import Flattened, Flattening
from neuronsurgery.layer_reports import LayerReport
from neuronsurgery.measuring import REBORN, Dormant, GraMa, Lowest, Stagnant
from neuronsurgery.mirrors import Mirrored, MirrorReport
from neuronsurgery.plans import MAX_GROWTH, Plan, plan
from neuronsurgery.reports import Report
from neuronsurgery.schedules import Act, Scheduling, Settings, needs_of
from neuronsurgery.scores import Scores, over
from neuronsurgery.scores import score as _score
from neuronsurgery.selection import COOLDOWN, Selection, select
from neuronsurgery.sites import Site, Sites
from neuronsurgery.stepping import Stepping
from neuronsurgery.triggers import EVERY_STEP, Every, Last, Plateau, Share, TaskChange, Trigger

if TYPE_CHECKING:
    from neuronsurgery.backend import Backend

__all__ = [
    "CCBP",
    "Check",
    "CheckError",
    "Composites",
    "Consolidated",
    "Consolidation",
    "Consumers",
    "ContinualBackprop",
    "Criterion",
    "CriterionError",
    "DistributedError",
    "Dormant",
    "DrawError",
    "EquivalenceError",
    "Every",
    "Evidence",
    "EvidenceError",
    "Flattened",
    "Flattening",
    "FormatError",
    "GraMa",
    "Last",
    "LayerReport",
    "Lowest",
    "Member",
    "MirrorError",
    "MirrorReport",
    "Mirrored",
    "ModelError",
    "OptimizerError",
    "Plan",
    "PlanError",
    "Plateau",
    "Problem",
    "Quantity",
    "Random",
    "Report",
    "Schedule",
    "ScheduleError",
    "Scores",
    "Selection",
    "Share",
    "Site",
    "SiteError",
    "Sites",
    "Stagnant",
    "StateError",
    "SurgeryError",
    "TaskChange",
    "Trigger",
    "UndoError",
    "Units",
    "UntraceableError",
    "accept",
    "attach",
    "check",
    "composites",
    "consolidate",
    "consumers",
    "declare_consumer",
    "discover",
    "fade_to_fresh",
    "flatten",
    "knife",
    "l2_regularizer",
    "mirror",
    "observe",
    "operate",
    "plan",
    "plasticity_injection",
    "pooled",
    "probe",
    "reborn",
    "redo",
    "regenerative_regularizer",
    "regrama",
    "replicated",
    "reset",
    "reset_optimizer",
    "restore",
    "scale_head",
    "score",
    "select",
    "shrink_and_perturb",
    "spectral_regularizer",
    "undo",
    "unobserved",
    "upgd",
    "widen",
]


P = ParamSpec("P")
T = TypeVar("T")


def _together(function: Callable[P, T]) -> Callable[P, T]:
    """A function of a model, its first argument, that all processes that hold the model do together, or none."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        model = args[0] if args else kwargs.get("model")
        if model is None or not _backend(model).is_shared(model):
            return function(*args, **kwargs)
        with _backend(model).together(model):
            return function(*args, **kwargs)

    return wrapped


@_together
def knife(
    model: Any,
    criterion: Criterion | str | Callable[[Scores], Mapping[str, Any]],
    *,
    evidence: Evidence | None = None,
    optimizer: Any = None,
    sites: Iterable[str] | None = None,
    max_growth: float = MAX_GROWTH,
    cooldown: int = COOLDOWN,
    retire: int | None = None,
    init: Any = None,
    verify: Any = None,
    generator: Any = None,
) -> Report:
    """Replace the units that a criterion chooses by composite units, in place; the model's output does not change.

    Args:
        model: any `torch.nn.Module`, unmodified; wrappers (DDP, compiled modules) are taken off.
        criterion: a criterion, its lower-case name (`"stagnant"`, `"dormant"`, `"grama"`), or a function from `Scores`
            to a mask per site.
        evidence: what was measured, from `observe` or `probe`. None: the gradients that are there now.
        optimizer: the optimizer of the model, or several; the operated rows get the state of fresh ones.
        sites: names of the only sites to consider. Naming a range-bearing site accepts it. None: all that are safe.
        max_growth: the bound on a site's live frozen rows, as a multiple of its width.
        cooldown: how many optimizer steps after its last operation a unit is passed over; counted with `optimizer=`.
        retire: over how many optimizer steps the frozen members that this operation adds fade to zero, linearly; it
            needs `optimizer=`. Then they are inert, and the next `consolidate` removes them. None: they stay.
        init: fills a fresh weight of the layer's shape in place, as `torch.nn.init` functions do; biases start at
            zero. None: the layer's own `reset_parameters`.
        verify: a batch (a tensor, a tuple of arguments, a dictionary of keywords) on which the whole model is compared
            before and after, in its current mode. None: each composite is checked on random inputs alone.
        generator: a `torch.Generator` for the fresh draws. None: seeded from `torch.initial_seed()` and the number
            of the operation. No global random state is touched.

    Returns:
        The report: what was operated on, what was declined and why, and the measured error.

    Raises:
        SurgeryError: one of its children, before anything changed or after everything was put back.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> x = torch.randn(16, 4)
        >>> before = model(x)
        >>> report = knife(model, Units({"0": [1, 5]}), optimizer=optimizer, verify=x)
        >>> report.operated["0"], bool(torch.allclose(model(x), before, atol=1e-6))
        ((1, 5), True)
    """
    backend, wanted = _backend(model), as_criterion(criterion)
    selection = _selected(
        model,
        wanted,
        evidence=evidence,
        sites=sites,
        example=verify,
        cooldown=(cooldown, optimizer),
        generator=generator,
    )
    chosen = plan(selection, max_growth=max_growth)
    how = {"optimizer": optimizer, "retire": retire, "init": init, "verify": verify, "generator": generator}
    return backend.operate(model, chosen, **how)


@_together
def fade_to_fresh(
    model: Any,
    criterion: Criterion | str | Callable[[Scores], Mapping[str, Any]],
    *,
    retire: int,
    evidence: Evidence | None = None,
    optimizer: Any = None,
    sites: Iterable[str] | None = None,
    max_growth: float = MAX_GROWTH,
    cooldown: int = COOLDOWN,
    init: Any = None,
    verify: Any = None,
    generator: Any = None,
) -> Report:
    """Let fresh units fade in where the chosen ones were, over so many optimizer steps: retirement without knowledge.

    It is `knife(..., retire=N)` less the knowledge members, the control that shows what they are worth: a unit falls
    silent and becomes a fresh one as its compensation member fades. The output moves by what the units handed on.
    Consumers are left alone. What the composite units knew from operations before is dropped as well.

    Args:
        model: as for `knife`.
        criterion: as for `knife`.
        retire: over how many optimizer steps the compensation members fade to zero, linearly.
        evidence: as for `knife`.
        optimizer: as for `knife`; it is needed, as its steps are counted.
        sites: as for `knife`.
        max_growth: as for `knife`.
        cooldown: as for `knife`.
        init: as for `knife`.
        verify: a batch on which the report says by how much the output moved.
        generator: as for `knife`.

    Raises:
        SurgeryError: one of its children, before anything changed or after everything was put back.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> x = torch.randn(16, 4)
        >>> _ = fade_to_fresh(model, Units({"0": [1, 5]}), retire=100, optimizer=optimizer, verify=x)
        >>> model[:2](x)[:, [1, 5]].abs().max().item()
        0.0
    """
    backend, wanted = _backend(model), as_criterion(criterion)
    around = {"example": verify, "cooldown": (cooldown, optimizer), "generator": generator}
    selection = _selected(model, wanted, evidence=evidence, sites=sites, **around)
    chosen = plan(selection, max_growth=max_growth)
    how = {"optimizer": optimizer, "retire": retire, "init": init, "verify": verify, "generator": generator}
    return backend.operate(model, chosen, method="fade_to_fresh", **how)


@_together
def redo(
    model: Any,
    criterion: Criterion | str | Callable[[Scores], Mapping[str, Any]] = "dormant",
    *,
    evidence: Evidence | None = None,
    optimizer: Any = None,
    sites: Iterable[str] | None = None,
    init: Any = None,
    verify: Any = None,
    generator: Any = None,
) -> Report:
    """Draw the chosen units' incoming weights anew and zero their outgoing ones (ReDo, Sokar et al. 2023).

    Both get the optimizer state of fresh weights. The output changes by what the units handed on. Sites whose consumers
    are not known (`consumers`) are declined.

    Args:
        model: any `torch.nn.Module`, unmodified; wrappers (DDP, compiled modules) are taken off.
        criterion: as for `knife`; its default is `Dormant(threshold=0.025)`.
        evidence: what was measured, from `observe` or `probe`; dormant units are told by activations.
        optimizer: the optimizer of the model, or several.
        sites: as for `knife`; a site that is named and has no known consumers is an error.
        init: as for `knife`. None: the layer's own `reset_parameters`, weight and bias.
        verify: a batch on which the report says by how much the output moved.
        generator: as for `knife`. None: seeded from `torch.initial_seed()` and the weights that are replaced.

    Raises:
        SurgeryError: one of its children, before anything changed or after everything was put back.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> evidence = probe(model, [torch.randn(16, 4)], lambda model, x: model(x).square().mean())
        >>> report = redo(model, Lowest(0.25, of="dormant"), evidence=evidence)
        >>> report.num_units, int((model[2].weight == 0).all(0).sum())
        (2, 2)
    """
    chosen, _ = _planned(model, criterion, evidence=evidence, sites=sites, verify=verify, generator=generator)
    how = {"optimizer": optimizer, "init": init, "verify": verify, "generator": generator}
    return _backend(model).reset_units(model, chosen, method="redo", **how)


@_together
def regrama(
    model: Any,
    criterion: Criterion | str | Callable[[Scores], Mapping[str, Any]] = "grama",
    *,
    evidence: Evidence | None = None,
    optimizer: Any = None,
    sites: Iterable[str] | None = None,
    init: Any = None,
    verify: Any = None,
    generator: Any = None,
) -> Report:
    """Reset units as `redo` does, chosen by the gradients of their activations (ReGraMa, Liu et al. 2025).

    Args and errors are those of `redo`; the default criterion is `GraMa(threshold=0.01)`.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> evidence = probe(model, [torch.randn(16, 4)], lambda model, x: model(x).square().mean())
        >>> regrama(model, Lowest(0.5, of="grama"), evidence=evidence).num_units
        4
    """
    chosen, _ = _planned(model, criterion, evidence=evidence, sites=sites, verify=verify, generator=generator)
    how = {"optimizer": optimizer, "init": init, "verify": verify, "generator": generator}
    return _backend(model).reset_units(model, chosen, method="regrama", **how)


@_together
def reborn(
    model: Any,
    criterion: Criterion | str | Callable[[Scores], Mapping[str, Any]] = REBORN,
    *,
    over_active: float = 3.0,
    per_donor: int = 5,
    scale: tuple[float, float] = (0.3, 0.8),
    evidence: Evidence | None = None,
    optimizer: Any = None,
    sites: Iterable[str] | None = None,
    init: Any = None,
    verify: Any = None,
    generator: Any = None,
) -> Report:
    """Let dormant units take over shares of what over-active ones hand on (ReBorn, Qin et al. 2024).

    A chosen unit takes the incoming weights and bias of an over-active one, times a factor, and a share of each of its
    outgoing weights, divided by it. Units for which there is no donor are reset as by `redo`. The output stays where
    the activation function is positively homogeneous (ReLU and its leaky kin) and what the chosen units handed on was
    nothing; elsewhere it moves, and the report says so.

    Args:
        model: as for `redo`.
        criterion: as for `redo`; it must score units as `Dormant` does. The default is `Dormant(threshold=0.1)`.
        over_active: donors are units whose score is above it.
        per_donor: how many units take part of one donor at most.
        scale: the range from which factors are drawn, uniformly.
        evidence: as for `redo`.
        optimizer: as for `redo`.
        sites: as for `redo`.
        init: as for `redo`, for units without a donor.
        verify: as for `redo`.
        generator: as for `redo`.

    Raises:
        CriterionError: a criterion without scores of dormancy, or numbers out of range.
        SurgeryError: one of its children, before anything changed or after everything was put back.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     model[0].bias[:2] = torch.tensor([-100.0, 100.0])     # one unit never fires, one always does
        >>> x = torch.randn(16, 4)
        >>> evidence = probe(model, [x], lambda model, x: model(x).square().mean())
        >>> before = model(x)
        >>> report = reborn(model, Dormant(1e-6), evidence=evidence)
        >>> report.operated["0"], bool(torch.allclose(model(x), before, rtol=1e-4))
        ((0,), True)
    """
    _require_reborn(over_active, per_donor, scale)
    chosen, selection = _planned(model, criterion, evidence=evidence, sites=sites, verify=verify, generator=generator)
    donors = {name: over(selection.scores, name, over_active) for name in chosen.units}
    how = {"optimizer": optimizer, "init": init, "verify": verify, "generator": generator}
    return _backend(model).reborn(model, chosen, donors, scale=scale, per_donor=per_donor, **how)


@_together
def widen(
    model: Any,
    criterion: Criterion | str | Callable[[Scores], Mapping[str, Any]],
    *,
    evidence: Evidence | None = None,
    optimizer: Any = None,
    sites: Iterable[str] | None = None,
    verify: Any = None,
    generator: Any = None,
) -> Report:
    """Split the chosen units in two, so that their layers are wider and the output stays (Net2Net, Chen et al. 2016).

    A new unit copies the incoming weights, and a random part of each outgoing weight is its own. Parameters stay the
    same objects and grow, as their state in the optimizer does; what is new has the state of fresh weights. It is the
    control for capacity. What knows sizes from elsewhere (a view written out, DDP, a saved state) does not follow.

    Args:
        model: as for `redo`.
        criterion: the units to split; `Random(0.25)` is the paper's way.
        evidence: as for `redo`.
        optimizer: the optimizer of the model, or several; without it, one that exists will fail at its next step.
        sites: as for `redo`.
        verify: a batch on which the whole model is compared before and after, in its current mode.
        generator: as for `redo`.

    Raises:
        EquivalenceError: the output on the `verify` batch moved; everything was put back.
        SurgeryError: another of its children, before anything changed or after everything was put back.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(16, 4)
        >>> before = model(x)
        >>> report = widen(model, Random(0.25), verify=x)
        >>> model[0].out_features, bool(torch.allclose(model(x), before, atol=1e-6))
        (10, True)
    """
    chosen, _ = _planned(model, criterion, evidence=evidence, sites=sites, verify=verify, generator=generator)
    return _backend(model).widen(model, chosen, optimizer=optimizer, verify=verify, generator=generator)


def consumers(model: Any, *, include: Collection[str] = ()) -> Consumers:
    """Find which layers read the units of each site, and for which sites that cannot be shown, with the reason.

    Methods that zero, share or copy outgoing weights operate on the former only; `knife` needs no consumers.

    Args:
        model: any `torch.nn.Module`.
        include: as for `discover`.

    Example:
        >>> import torch
        >>> convolution, head = torch.nn.Conv2d(1, 3, 2), torch.nn.Linear(27, 2)
        >>> found = consumers(torch.nn.Sequential(convolution, torch.nn.ReLU(), torch.nn.Flatten(), head))
        >>> found.readers
        {'0': {'3': 9}}
    """
    return _backend(model).consumers(model, include=include)


def declare_consumer(kind: type, weights: Mapping[str, str | None]) -> None:
    """Say by which weights the layers of a class read their input, where their forward cannot be followed.

    A recurrent layer with a backward pass of its own is one, or a layer around a compiled kernel. Where no one says so,
    sites that such a layer reads are declined by methods that write outgoing weights. Nothing checks what is declared:
    of the first argument of a call, `(..., inputs)`, the layer may use nothing but its products with these weights, and
    no other of its tensors may have an entry for each input. A class derived from this one is to be declared again.

    Args:
        kind: a class of `torch.nn.Module`.
        weights: the names of its parameters that read the input, each `(outputs, inputs)`, with the name of the bias
            `(outputs,)` that is added to the product, None where there is none.

    Raises:
        ModelError: no class of `torch.nn.Module`, one whose forward is torch's, or no weights.

    Example:
        >>> import torch
        >>> class Fused(torch.nn.GRUCell):
        ...     def forward(self, x):
        ...         product = x.detach().numpy() @ self.weight_ih.detach().numpy().T
        ...         return torch.from_numpy(product) + self.bias_ih
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), Fused(3, 2))
        >>> consumers(model).declined
        {'0': "it enters '2' in a way that cannot be followed"}
        >>> declare_consumer(Fused, {"weight_ih": "bias_ih"})
        >>> consumers(model).readers
        {'0': {'2.weight_ih': 1}}
    """
    if not isinstance(kind, type) or not _is_of_torch(kind):
        raise ModelError(f"expected a class of torch.nn.Module, found {kind!r}; pass the class of the layers")
    _torch_backend().declare_consumer(kind, weights)


def discover(model: Any, *, include: Collection[str] = (), example: Any = None) -> Sites:
    """Find the sites of a model, and the reason for every producer that is none.

    Args:
        model: any `torch.nn.Module`.
        include: names of range-bearing producers (a `Linear -> Tanh` head) to accept as sites.
        example: a batch whose forward pass may show that a range-bearing value enters another layer first, where the
            model's own code cannot be traced.

    Example:
        >>> import torch
        >>> sites = discover(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)))
        >>> list(sites), sites.declined["2"]
        (['0'], 'no activation function: the scope returns its output')
    """
    return _backend(model).discover(model, include=include, example=example)


def observe(
    model: Any,
    optimizer: Any = None,
    every: int = 1,
    *,
    sites: Collection[str] = (),
    criterion: Criterion | str | None = None,
    scaler: Any = None,
    weights: Callable[[str, Any], Any] | None = None,
) -> AbstractContextManager[Evidence]:
    """Measure a model while it trains, for as long as the `with` block is open.

    With an optimizer, gradients are read as it is about to use them (accumulated, unscaled, reduced over ranks), once a
    step; steps whose gradients are not finite are skipped and counted. Without one, every backward pass is a step.
    Activations are measured in passes that build a graph only, so that rollouts and evaluations do not enter; what else
    is no training goes into `unobserved()`.

    Args:
        model: the model that trains.
        optimizer: its optimizer, or several.
        every: measure every so many steps.
        sites: names of range-bearing producers to measure as well.
        criterion: measure no more than it needs: for `"stagnant"` gradients only, so that the model's forwards are left
            alone. None: all that can be measured.
        scaler: the `torch.amp.GradScaler` by which losses are multiplied. What an optimizer reads is unscaled without
            it; with it, so are the gradients of activations (`GraMa`), and those that are read without an optimizer.
        weights: `weights(site, h)` is called for each tensor of activations h that is measured, and returns how much
            its samples count, for activations (`Dormant`) and their gradients (`GraMa`): non-negative numbers or bools,
            shaped as h without its units' axis (an axis of size 1 stands for any), or None where all count the same.
            What has weight 0, as padding has, may hold anything, also NaN. A weight that is not above 0 counts as 0.

    Raises:
        EvidenceError: as the model runs, weights that fit no activations.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with observe(model, optimizer) as evidence:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(16, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> evidence.num_steps
        3
    """
    needs = frozenset(Quantity) if criterion is None else needs_of(as_criterion(criterion))
    around = {"scaler": scaler, "weights": weights}
    return _backend(model).observe(model, optimizer, every=every, sites=sites, needs=needs, **around)


def unobserved() -> AbstractContextManager[None]:
    """Keep passes out of what is measured: diagnostics and other passes with a graph that are no training.

    Observations and schedules that are open hear no activations in the `with` block, nor the gradients that arrive at
    them; one that is opened in the block does. Passes under `torch.no_grad()` are not measured anyway, and `probe`
    keeps its own apart. What a backward pass leaves in `.grad` counts as ever: use `torch.autograd.grad`.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with observe(model) as evidence:
        ...     model(torch.randn(16, 4)).sum().backward()
        ...     with unobserved():
        ...         _ = model(torch.randn(500, 4))
        >>> evidence.num_samples("0", Quantity.ACTIVATION)
        16
    """
    return _torch_backend().unobserved()


def probe(
    model: Any,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Any],
    *,
    sites: Collection[str] = (),
    weights: Callable[[str, Any], Any] | None = None,
) -> Evidence:
    """Measure a model on batches, one step each, without training it.

    Args:
        model: the model, in the mode to measure it in.
        batches: an iterable of batches.
        loss_fn: `loss_fn(model, batch)` runs the model and returns a scalar loss with its graph.
        sites: names of range-bearing producers to measure as well.
        weights: as for `observe`.

    Gradients, buffers, random states and modes are left as they were, and an observation or schedule that is open hears
    nothing of these passes.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> evidence = probe(model, [torch.randn(16, 4)], lambda model, x: model(x).square().mean())
        >>> evidence.num_samples("0", Quantity.ACTIVATION), model[0].weight.grad is None
        (16, True)
    """
    return _backend(model).probe(model, batches, loss_fn, sites=sites, weights=weights)


class Schedule(Scheduling):
    """When to look at a model in training and when to operate on it: call `step` after each optimizer step.

    What is counted are optimizer steps that were taken: one that a gradient scaler skips is none, several backward
    passes that accumulate are one, and several optimizers that take turns count once. A fresh window of steps is
    measured before each operation, of what the criterion needs only: `"stagnant"` reads gradients in a hook of the
    optimizer and leaves the model's classes and compiled code alone; criteria of activations have the model's forwards
    observed while a window is open; `Units` and `Random` need nothing. No state dict of the model shows any of that.

    Args:
        model: the model that trains; wrappers (DDP, compiled modules) are taken off.
        optimizer: its optimizer, or several.
        criterion: as for `knife`. None: the method concerns whole layers and is called as `method(model, ...)`, so that
            nothing is measured (`reset`, `shrink_and_perturb`, `scale_head`, `reset_optimizer`).
        operate: when: `Every`, `TaskChange`, `Plateau`, `Share`, combined with `|` and `&`.
        look: which steps are measured: `Every(k)`, each k-th since the last operation (the default is each), or
            `Last(n)`, the last n before it.
        sites: as for `knife`.
        cooldown: for how many steps of the schedule a fresh unit is passed over.
        max_units: the most units that one operation takes, those of lowest score first. None: no bound.
        max_share: the largest share of a site's units that one operation takes. None: no bound.
        dry_run: return what would be done, a `Plan`, and leave the model alone.
        verify: as for `knife`, or a function that returns a batch.
        on_report: is called with each report, in a dry run with each plan.
        method: a function in the manner of `knife`: `fade_to_fresh`, `redo`, `regrama`, `reborn`, `widen`. Or one that
            sees each step, `ContinualBackprop` or `CCBP`, with `criterion=None` and `operate=Every(1)`; what it
            remembers becomes part of the schedule's state. Then call `step` before gradients are zeroed.
        mirrors: target, average or teacher networks, one or several, that are given the model's structure after each
            operation, as by `mirror`.
        frozen: as for `mirror`.
        generator: as for `knife`; its state becomes part of the schedule's. None, for a model that several processes
            hold: one that all seed alike.
        scaler: as for `observe`.
        weights: as for `observe`; what is measured before an operation, in each window anew.
        options: passed on to the method: `max_growth=`, `init=` ...

    Raises:
        ScheduleError: a schedule that could never act, or options that the method does not take.
        SiteError: a name that is no site, or a model without any.
        OptimizerError: no optimizer that trains any of the sites.
        MirrorError: a mirror that cannot take over the model's structure.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> schedule = Schedule(model, optimizer, Lowest(0.25), operate=Every(10), look=Last(5))
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(16, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     report = schedule.step()
        >>> report.num_units, schedule.num_steps
        (2, 10)
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        criterion: Criterion | str | Callable[[Scores], Mapping[str, Any]] | None,
        *,
        operate: Trigger,
        look: Every | Last = EVERY_STEP,
        sites: Iterable[str] | None = None,
        cooldown: int = COOLDOWN,
        max_units: int | None = None,
        max_share: float | None = None,
        dry_run: bool = False,
        verify: Any = None,
        on_report: Callable[[Any], object] | None = None,
        method: Callable[..., Any] = knife,
        mirrors: Any = (),
        frozen: Literal["own", "shared"] = "own",
        generator: Any = None,
        scaler: Any = None,
        weights: Callable[[str, Any], Any] | None = None,
        **options: Any,
    ) -> None:
        wanted = None if criterion is None else as_criterion(criterion)
        settings = Settings(wanted, operate, look, cooldown, max_units, max_share)
        names = _names(sites)
        if isinstance(wanted, Units):
            names = list(dict.fromkeys(_forced(names, wanted)))
        backend = _backend(model)
        with backend.together(model):
            found = backend.discover(model, include=names or ())
            found = found if names is None else found.subset(names)
            if wanted is not None:
                _require_sites(found)
                wanted.check(found)
            follow = functools.partial(backend.mirror, model, onto=mirrors, frozen=frozen) if mirrors != () else None
            if follow is not None:
                backend.check_mirrors(model, onto=mirrors, sites=list(found))
            around = {"generator": generator, "scaler": scaler, "weights": weights}
            needs = frozenset[Quantity]() if wanted is None else needs_of(wanted)
            watch = backend.watch(model, optimizer, sites=names, needs=needs, **around)
        given = {"optimizer": optimizer, "sites": names, "generator": watch.generator, **options}
        arguments = {name: value for name, value in given.items() if value is not None}
        act = Act(method, arguments, wanted is not None, verify, dry_run, on_report, follow)
        super().__init__(model, backend, watch, settings, act.running(model, settings))


class ContinualBackprop(Stepping):
    """Replace the least useful units little by little (continual backpropagation, Dohare et al. 2024).

    Call `step` after each optimizer step. A unit's utility is a running mean of its absolute activation times the mean
    size of its outgoing weights. Of the units that are mature, a share `rate` is due at each step; when a whole unit
    is, that of least utility is drawn anew and silenced as by `redo`, and what it handed on in the mean is added to its
    consumers' biases. Activations are measured in passes that build a graph.

    Args:
        model: the model that trains; wrappers (DDP, compiled modules) are taken off.
        optimizer: its optimizer, or several; what is written gets the state of fresh weights. None: left as it is.
        rate: the share of a site's mature units that is replaced at each step.
        maturity: for how many steps a unit is left alone after it was replaced.
        decay: of the running means.
        sites: names of the only sites to consider. None: all whose consumers are known.
        init: as for `knife`. None: `torch.nn.init.kaiming_uniform_` for ReLUs, biases zero.
        generator: as for `redo`; its state becomes part of this one's.

    Raises:
        CriterionError: numbers out of range.
        SiteError: no site whose consumers are known, or a named one that is none.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> replacing = ContinualBackprop(model, optimizer, rate=0.05, maturity=5)
        >>> for _ in range(20):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(16, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     report = replacing.step()
        >>> replacing.num_units
        5
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any = None,
        *,
        rate: float = 1e-4,
        maturity: int = 100,
        decay: float = 0.99,
        sites: Iterable[str] | None = None,
        init: Any = None,
        generator: Any = None,
    ) -> None:
        settings: dict[str, Any] = {"rate": rate, "maturity": maturity, "decay": decay}
        _require_rates(rate=rate, decay=decay)
        if maturity < 0:
            raise CriterionError(f"maturity is {maturity}; it is a number of steps and must be >= 0")
        how = {"sites": _names(sites), "init": init, "generator": generator}
        backend = _backend(model)
        with backend.together(model):
            runner = backend.continual_backprop(model, optimizer, **settings, **how)
        super().__init__(runner, settings)


class CCBP(Stepping):
    """Move every unit towards a fresh one all the time, those of little gradient faster (CCBP).

    Call `step` after each optimizer step, before gradients are zeroed. A unit's utility u is the mean size of its
    incoming weights' gradient relative to its layer's mean, as a running mean. Every so many steps its incoming weights
    and bias move towards a fresh draw by the share `rate * sigmoid(-sharpness (u - 1))`, its outgoing weights towards
    zero by the same. Optimizer state is left as it is.

    Args:
        model: the model that trains; wrappers (DDP, compiled modules) are taken off.
        optimizer: its optimizer, or several, to check that it owns the model's parameters.
        rate: the largest share.
        every: how many steps lie between two moves.
        decay: of the running means.
        sharpness: how fast the share falls with utility.
        sites: names of the only sites to consider. None: all whose consumers are known.
        init: as for `knife`.
        generator: as for `redo`; its state becomes part of this one's.

    Raises:
        CriterionError: numbers out of range.
        SiteError: no site whose consumers are known, or a named one that is none.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> moving = CCBP(model, optimizer, every=1)
        >>> model(torch.randn(16, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> moving.step().num_units
        8
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any = None,
        *,
        rate: float = 0.015,
        every: int = 1000,
        decay: float = 0.99,
        sharpness: float = 16.0,
        sites: Iterable[str] | None = None,
        init: Any = None,
        generator: Any = None,
    ) -> None:
        settings: dict[str, Any] = {"rate": rate, "every": every, "decay": decay, "sharpness": sharpness}
        _require_rates(rate=rate, decay=decay)
        if every < 1:
            raise CriterionError(f"every is {every}; it is a number of steps and must be >= 1")
        how = {"sites": _names(sites), "init": init, "generator": generator}
        backend = _backend(model)
        with backend.together(model):
            runner = backend.ccbp(model, optimizer, **settings, **how)
        super().__init__(runner, settings)


def replicated(model: Any, group: Any = None) -> Any:
    """Say that each process of a group holds a replica of this model, so that operations are done by all, or by none.

    `DistributedDataParallel` says that by itself. This is for a model that is operated on before it is wrapped, and for
    replicas that are held together in another way: pass the result wherever a model goes, on all processes alike.

    Args:
        model: any `torch.nn.Module`; it stays as it is.
        group: a `torch.distributed` process group. None: all processes.

    Returns:
        A module around the model.

    Raises:
        DistributedError: `torch.distributed` was not initialized, or this process is no member of the group.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> replicated(model)
        Traceback (most recent call last):
            ...
        neuronsurgery.errors.DistributedError: replicated(model) names the processes of a group, and there is none: ...
    """
    return _backend(model).replicated(model, group)


def pooled(model: Any, evidence: Evidence) -> Evidence:
    """Return what all processes that hold a model measured of it: means over all samples, with the count of each.

    `knife` and `Schedule` do that themselves, when they decide. Call it on all processes, between `observe` or `probe`
    and `score`. Gradients that an optimizer uses are the same on all of them already, and are left as they are.

    Args:
        model: the model, as `DistributedDataParallel` or `replicated` wrapped it; else there is one process.
        evidence: what this process measured.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> evidence = probe(model, [torch.randn(16, 4)], lambda model, x: model(x).square().mean())
        >>> pooled(model, evidence).num_samples("0", Quantity.ACTIVATION)
        16
    """
    return _backend(model).pooled(model, evidence)


def score(
    sites: Sites, evidence: Evidence | None, criterion: Any, *, model: Any = None, generator: Any = None
) -> Scores:
    """Give every unit of the sites its score by a criterion.

    Args:
        sites: what to score.
        evidence: what was measured of them; None for a criterion that needs nothing.
        criterion: a criterion, its name, or a function from `Scores` to masks.
        model: the model, to check that the evidence is its own, and for the seed of random criteria.
        generator: a `torch.Generator` for random criteria, used with `model=`.

    Example:
        >>> sites = Sites({"fc1": Site("fc1", "", "Linear", "relu", num_units=4)})
        >>> score(sites, None, Units({"fc1": [2]})).unscored
        {}
    """
    if model is None:
        return _score(sites, evidence, as_criterion(criterion))
    backend = _backend(model)
    if evidence is not None:
        backend.check_source(evidence, model)
    return _score(sites, evidence, as_criterion(criterion), seed=backend.seed(model, generator))


@_together
def operate(
    model: Any,
    plan: Plan,
    optimizer: Any = None,
    *,
    retire: int | None = None,
    init: Any = None,
    verify: Any = None,
    generator: Any = None,
) -> Report:
    """Carry out a plan: the one verb that changes a model. All of it happens, or nothing.

    Args:
        model: the model the plan was made for, or one of the same structure.
        plan: what to operate on.
        optimizer: the model's optimizer, or several; the operated rows get the state of fresh ones.
        retire: as for `knife`.
        init: as for `knife`.
        verify: as for `knife`.
        generator: as for `knife`.

    Raises:
        PlanError: the plan does not fit the model.
        EquivalenceError: an output moved beyond the tolerance of its dtype.
        OptimizerError: an optimizer owns none of the parameters, or its state couples rows.
    """
    how = {"optimizer": optimizer, "retire": retire, "init": init, "verify": verify, "generator": generator}
    return _backend(model).operate(model, plan, **how)


@_together
def consolidate(
    model: Any,
    *,
    mirrors: Any = (),
    optimizer: Any = None,
    batches: Iterable[Any] | None = None,
    tolerance: float = 1e-3,
    max_rows: int | None = None,
) -> Consolidation:
    """Take frozen rows that contribute nothing out of a model and its mirrors, in place: all of them, or none.

    By weights alone go rows that have retired, and pairs of equal rows with opposite signs, which are there where an
    active member never moved between two operations; the output changes by rounding. With `batches=` pairs go too that
    give nearly the same on these (near-duplicates, and rows that never fire or are constant); the output changes, by
    what the report says. With `max_rows=` as well, a site that still has more rows is distilled: those that matter
    least go, and the others are fitted to what all of them gave on the batches. Where no row is left the bank goes as
    well: the layer has its original keys, class and speed.
    The first knowledge row of a unit that a LayerNorm or its kin refers to goes only once retired.

    Args:
        model: the operated model; wrappers (DDP, compiled modules) are taken off.
        mirrors: networks with the same structure, one or several; the same rows go from them.
        optimizer: the model's optimizer, or several: rows that still fade go on with its steps, also where a copy or a
            resume has lost the hook.
        batches: an iterable of batches as for `verify=` of `knife`, on which rows are compared in the model's current
            mode. None: nothing goes by data.
        tolerance: how far apart two rows' activations may be on the batches to go, as a root mean square relative to
            that of the layer's units.
        max_rows: how many frozen rows a site may keep; None: any number. Needs `batches=`, of which each fourth sample
            is kept from the fit to tell the error. Mirrors get the fitted rows. Units of which a row fades stay as they
            are; where a fit is not possible (a norm over units, half precision, computed weights) rows go without one.

    Returns:
        The report: site by site how many rows went and why, and by how much that moved what.

    Raises:
        MirrorError: a mirror holds other rows than the model.
        EquivalenceError: an output moved that must not; nothing was changed.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> report = knife(model, Units({"0": [1, 5]}), optimizer=optimizer, retire=3)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(16, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> consolidate(model, optimizer=optimizer).num_rows, list(model.state_dict())
        (4, ['0.weight', '0.bias', '2.weight', '2.bias'])
    """
    return _backend(model).consolidate(
        model, mirrors=mirrors, optimizer=optimizer, batches=batches, tolerance=tolerance, max_rows=max_rows
    )


def flatten(model: Any, *, verify: Any = None) -> Flattening:
    """Make a model plain and wider, without banks, in place: frozen rows become units of their own, for deployment.

    Where all consumers of a site are linear, the frozen rows become further rows of the producer, and the consumers get
    their unit's columns again, times the row's sign and what a fade has left of it. The layer has its original keys and
    class, and its output stays to rounding. A site of which that is not so keeps its bank, with the reason in the
    report. Parameters stay the same objects, of another size. What was frozen is a parameter like any other then, which
    training would move: flatten what you deploy, and a copy where training is to go on.

    Args:
        model: the operated model; compiled modules are taken off.
        verify: a batch as for `verify=` of `knife`: the whole model's outputs are compared.

    Returns:
        The report: site by site how much wider it is, who reads it, and by how much its activations moved.

    Raises:
        ModelError: a model in DistributedDataParallel, or with banks that no longer belong to a site.
        OptimizerError: an optimizer that was passed to an operation, and so has hooks of its own, still trains it.
        EquivalenceError: an output moved by more than rounding; nothing was changed.

    Example:
        >>> import copy, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = knife(model, Units({"0": [1, 5]}))
        >>> plain = copy.deepcopy(model)
        >>> flatten(plain, verify=torch.randn(16, 4)).sites["0"].units_after
        12
        >>> plain
        Sequential(
          (0): Linear(in_features=4, out_features=12, bias=True)
          (1): ReLU()
          (2): Linear(in_features=12, out_features=2, bias=True)
        )
    """
    return _backend(model).flatten(model, verify=verify)


@_together
def undo(model: Any, operation: Report | int | None = None, optimizer: Any = None) -> Report:
    """Put the old weights of an operation's units back, and take its frozen rows out of the banks.

    What the active members learned since is gone. Their rows get the optimizer state of fresh ones. An operation can be
    undone as long as none of its units was operated on later; operations on other units are no obstacle.

    Args:
        model: the operated model; wrappers (DDP, compiled modules) are taken off.
        operation: the report of the operation; or its number, as reports, `composites(model).operations` and members
            have it; None: the last. By number all that the banks hold of it is undone: units of which a consolidation
            took the rows are not among them, and the report says which were.
        optimizer: the model's optimizer, or several.

    Raises:
        UndoError: a later operation intervened on one of the units (undo that one first), its frozen rows have begun to
            fade, or it is not in the model.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> reports = [knife(model, Units({"0": units})) for units in ([1, 5], [2], [5])]
        >>> composites(model).operations
        {1: {'0': (1, 5)}, 2: {'0': (2,)}, 3: {'0': (5,)}}
        >>> undo(model).operated, undo(model, 1).operated, undo(model, reports[1]).operated
        ({'0': (5,)}, {'0': (1, 5)}, {'0': (2,)})
    """
    return _backend(model).undo(model, operation, optimizer=optimizer)


@_together
def reset(
    model: Any,
    layers: str | Iterable[str] | int | None = None,
    *,
    optimizer: Any = None,
    example: Any = None,
    init: Any = None,
    initial: Mapping[str, Any] | None = None,
    generator: Any = None,
) -> LayerReport:
    """Give whole layers fresh weights and a fresh optimizer state; the model's output changes.

    Frozen rows and injections of these layers go, and so do running statistics: the layers are as new. With
    `Schedule(model, optimizer, None, operate=Every(n), method=reset, layers=...)` they are reset periodically.
    Source: Nikishin et al. 2022, who keep the replay buffer and reset the last layers, or all of them.

    Args:
        model: any `torch.nn.Module`; wrappers (DDP, compiled modules) are taken off.
        layers: names of modules, with all that is in them; a number, of the last layers before an output, which needs
            `example=`; None: the whole model.
        optimizer: the optimizer of the model, or several: its state of these parameters becomes a fresh one's.
        example: a batch, as `verify=` of `knife`, whose forward pass shows which layers are the last.
        init: fills a fresh weight of two or more axes in place; biases start at zero. None: the modules' own
            `reset_parameters`.
        initial: a copy of the state dict that the model had when it was new, to go back to instead of a draw.
        generator: a `torch.Generator` for the draw. None: seeded from `torch.initial_seed()` and the weights that go.

    Raises:
        SiteError: there are no such layers.
        DrawError: a module has no initializer of its own and no weights were given.
        OptimizerError: an optimizer owns none of the parameters, or keeps state that cannot be made fresh.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> reset(model, 1, example=torch.randn(16, 4)).layers
        ('2',)
    """
    return _backend(model).reset(
        model, layers, optimizer=optimizer, example=example, init=init, initial=initial, generator=generator
    )


@_together
def shrink_and_perturb(
    model: Any,
    layers: str | Iterable[str] | int | None = None,
    *,
    shrink: float = 0.8,
    perturb: float = 0.2,
    optimizer: Any = None,
    example: Any = None,
    init: Any = None,
    initial: Mapping[str, Any] | None = None,
    generator: Any = None,
) -> LayerReport:
    """Multiply weights by `shrink` and add `perturb` times fresh ones: `w <- shrink w + perturb w_fresh`.

    The optimizer's state stays, as in the sources (`reset_optimizer` makes it fresh); copies of the weights that it
    keeps follow. With `initial=` this is the reset of MARR (reset replay). Source: Ash & Adams 2020, whose noise is
    a draw of the initializer here; defaults of D'Oro et al. 2023 and MARR 2024.

    Args:
        model: as for `reset`.
        layers: as for `reset`.
        shrink: the factor of the weights there are, from 0 to 1.
        perturb: the factor of the fresh ones, from 0 to 1.
        optimizer: the optimizer of the model, or several, whose copies of the weights follow.
        example: as for `reset`.
        init: as for `reset`.
        initial: stored weights in the place of fresh ones, as for `reset`.
        generator: as for `reset`.

    Raises:
        SurgeryError: as of `reset`.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> before = model[0].weight.detach().clone()
        >>> report = shrink_and_perturb(model, shrink=0.5, perturb=0.0)
        >>> torch.equal(model[0].weight, 0.5 * before)
        True
    """
    return _backend(model).shrink_and_perturb(
        model,
        layers,
        shrink=shrink,
        perturb=perturb,
        optimizer=optimizer,
        example=example,
        init=init,
        initial=initial,
        generator=generator,
    )


@_together
def scale_head(
    model: Any,
    factor: float,
    layers: str | Iterable[str] | int = 1,
    *,
    optimizer: Any = None,
    example: Any = None,
) -> LayerReport:
    """Multiply weights and biases of output layers, and so their output, by a factor.

    A control: much of what fancier methods gain on saturated outputs comes from smaller ones alone. The optimizer's
    state stays; copies of the weights that it keeps follow.

    Args:
        model: as for `reset`.
        factor: a positive number.
        layers: names of linear or convolution layers, or a number of last ones, which needs `example=`.
        optimizer: the optimizer of the model, or several.
        example: as for `reset`.

    Raises:
        SiteError: there are no such layers.
        ModelError: a layer's output is not proportional to its parameters.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(16, 4)
        >>> before = model(x)
        >>> report = scale_head(model, 0.5, "2")
        >>> torch.equal(model(x), 0.5 * before)
        True
    """
    return _backend(model).scale_head(model, factor, layers, optimizer=optimizer, example=example)


@_together
def reset_optimizer(
    model: Any,
    layers: str | Iterable[str] | int | None = None,
    *,
    optimizer: Any,
    example: Any = None,
) -> LayerReport:
    """Give an optimizer the state of a fresh one for a model's parameters, and leave the weights as they are.

    A control: what a reset gains beyond it comes from the weights. Learning rates and other settings stay.

    Args:
        model: as for `reset`.
        layers: as for `reset`; None: all parameters of the model, and what is counted for all of them together.
        optimizer: the optimizer of the model, or several.
        example: as for `reset`.

    Raises:
        OptimizerError: an optimizer owns none of the parameters, or keeps state that cannot be made fresh.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> model(torch.randn(16, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> report = reset_optimizer(model, optimizer=optimizer)
        >>> len(optimizer.state)
        0
    """
    return _backend(model).reset_optimizer(model, layers, optimizer=optimizer, example=example)


@_together
def plasticity_injection(
    model: Any,
    head: str,
    *,
    optimizer: Any = None,
    init: Any = None,
    verify: Any = None,
    generator: Any = None,
) -> LayerReport:
    """Give a module fresh weights, with frozen copies beside it so that its output does not change.

    `h(x)` becomes `h(x) + h1(x) - h2(x)`: h keeps the old weights and is frozen, h1 is fresh and trained, h2 a frozen
    copy of h1. h1 are the module's own parameters, edited in place: the optimizer knows them, and their state becomes a
    fresh one's. h and h2 are buffers, children of the module (of a Sequential, of its first layer). A module may be
    injected into several times. Source: Nikishin et al. 2023.

    Args:
        model: any `torch.nn.Module`; wrappers (DDP, compiled modules) are taken off.
        head: the name of a module whose output is a tensor or tensors: a layer, a Sequential, a network.
        optimizer: the optimizer of the model, or several.
        init: as for `reset`.
        verify: a batch on which the whole model is compared before and after, in its current mode.
        generator: a `torch.Generator` for the draw. None: seeded from `torch.initial_seed()` and the number of the
            injection.

    Raises:
        ModelError: the module holds dropout or composite units, or shares weights with the rest of the model.
        DrawError: a module in it has no initializer of its own.
        EquivalenceError: the output moved on the batch; everything was put back.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(16, 4)
        >>> before, old = model(x), model[2].weight.detach().clone()
        >>> report = plasticity_injection(model, "2", verify=x)
        >>> torch.equal(model(x), before), torch.equal(model[2].weight, old)
        (True, False)
    """
    return _backend(model).inject(model, head, optimizer=optimizer, init=init, verify=verify, generator=generator)


def regenerative_regularizer(
    model: Any,
    strength: float,
    layers: str | Iterable[str] | None = None,
    *,
    initial: Mapping[str, Any] | None = None,
) -> Any:
    """Make a penalty towards the weights of now: `strength |w - w_0|^2`, to be added to each loss (L2 Init).

    Source: Kumar et al. 2023. Norms and scales are left out, as in its code. The strength is swept there; there is no
    default.

    Args:
        model: the model, when it is new; its weights are copied.
        strength: what the squared distance is multiplied by, summed over weights and biases.
        layers: names of modules, with all that is in them; None: the whole model.
        initial: stored weights in the place of those of now.

    Returns:
        A module to call without arguments, which returns the penalty as a scalar. Its state dict holds the weights
        that it pulls to: save it with the model's.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> penalty = regenerative_regularizer(model, 0.01)
        >>> loss = model(torch.randn(16, 4)).square().mean() + penalty()
        >>> penalty().item()
        0.0
    """
    return _backend(model).regenerative(model, strength, layers, initial=initial)


def l2_regularizer(model: Any, strength: float, layers: str | Iterable[str] | None = None) -> Any:
    """Make a penalty towards zero: `strength |w|^2`, to be added to each loss; used as `regenerative_regularizer` is.

    Under Adam this is not what its decoupled decay does (Loshchilov & Hutter 2019).

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[3.0, 4.0]])), model.bias.zero_()
        >>> l2_regularizer(model, 0.5)().item()
        12.5
    """
    return _backend(model).l2(model, strength, layers)


def spectral_regularizer(
    model: Any,
    strength: float,
    layers: str | Iterable[str] | None = None,
    *,
    exponent: int = 2,
    num_iterations: int = 1,
) -> Any:
    """Make a penalty towards singular values of one, to be added to each loss; used as `regenerative_regularizer` is.

    `strength` times the sum of `(sigma^k - 1)^2` of each weight's largest singular value and `|b|^(2 k)` of each bias.
    Weights of more than two axes are matrices of one row for each entry of the first. Source: Lewandowski et al. 2025.

    Args:
        model: the model.
        strength: what the penalty is multiplied by.
        layers: as for `regenerative_regularizer`.
        exponent: k.
        num_iterations: steps of the power iteration with each call; it goes on from where it stood.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        >>> round(spectral_regularizer(model, 1.0)().item(), 4)
        9.0
    """
    return _backend(model).spectral(model, strength, layers, exponent=exponent, num_iterations=num_iterations)


def upgd(
    model: Any,
    lr: float = 1e-5,
    *,
    weight_decay: float = 1e-3,
    beta_utility: float = 0.999,
    sigma: float = 1e-3,
    generator: Any = None,
) -> Any:
    """Make an optimizer of a model's parameters, UPGD: the more useful a weight, the less it is moved and perturbed.

    With utility u, a running mean of `-g w`, and `s = sigmoid(u / max u)` over all parameters, a step is
    `w <- (1 - lr weight_decay) w - 2 lr (g + noise) (1 - s)`. Source: Elsayed & Mahmood 2024, first-order global
    utility; defaults of their code. For other parameters than all of a model's there is
    `neuronsurgery.pytorch.upgd.UPGD`.

    Args:
        model: the model.
        lr: the step size.
        weight_decay: decoupled decay.
        beta_utility: the decay of the running mean.
        sigma: the standard deviation of the noise.
        generator: a `torch.Generator` for the noise. None: torch's own.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = upgd(model, 0.01)
        >>> model(torch.randn(16, 4)).square().mean().backward()
        >>> optimizer.step()
    """
    return _backend(model).upgd(
        model.parameters(),
        lr,
        weight_decay=weight_decay,
        beta_utility=beta_utility,
        sigma=sigma,
        generator=generator,
    )


@_together
def restore(model: Any, state_dict: Mapping[str, Any], optimizer: Any = None, *, prefix: str = "") -> Composites:
    """Load a state dict strictly, with the structure that was saved in it, onto a model that need not have it.

    The model may be fresh, or operated on in another way: it has the composite units of the state dict afterwards, and
    no others. All of it happens, or nothing. Tensors take the dtype and the device of the model's own; a model
    on the meta device receives the saved tensors themselves.

    Args:
        model: the model, built as it was when saved; wrappers (DDP, compiled modules) are taken off, of names as well.
        state_dict: names to tensors, from `model.state_dict()`, `torch.load(..., weights_only=True)` or safetensors.
        optimizer: the model's optimizer, or several, to `attach`; load their own state first.
        prefix: restore from the entries whose names begin so: `"model."` of a Lightning checkpoint.

    Returns:
        The composite units that the model has now.

    Raises:
        StateError: a bank that does not fit the model, or whose structure was cast, averaged, cut or written by a
            newer version.
        RuntimeError: torch's own, for weights that are missing, unexpected or of another shape.

    Example:
        >>> import torch
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> trained = build()
        >>> report = knife(trained, Units({"0": [1, 5]}))
        >>> resumed = build()
        >>> restore(resumed, trained.state_dict()).num_units
        2
        >>> x = torch.randn(16, 4)
        >>> torch.equal(resumed(x), trained(x))
        True
    """
    return _backend(model).restore(model, state_dict, optimizer, prefix=prefix)


def accept(model: Any) -> None:
    """Let the model's own `load_state_dict` take over structure, for frameworks that call it themselves.

    From now on a strict load of a state dict with other composite units than the model has, called on the model or on
    a module that holds it, restores as `restore` does. A state dict without composite units loads as usual. Copies and
    pickles of the model accept as well. Calling it again changes nothing.

    Args:
        model: the model, before its framework loads it: in the constructor of a Lightning module, `accept(self)`.

    Example:
        >>> import torch
        >>> def build():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> trained, resumed = build(), build()
        >>> report = knife(trained, Units({"0": [1, 5]}))
        >>> accept(resumed)
        >>> resumed.load_state_dict(trained.state_dict())
        <All keys matched successfully>
    """
    _backend(model).accept(model)


@_together
def attach(model: Any, optimizer: Any) -> None:
    """Install on an optimizer the step hooks that the operated rows of its model need.

    Operating with `optimizer=` does that. A process that resumes from a checkpoint, a copy and a pickle have none:
    there young rows would be updated by the step count of old ones, and SGD's steps not be counted.

    Args:
        model: the operated model, with its parameters in the optimizer.
        optimizer: its optimizer, or several; load their own state first. Calling it again changes nothing.

    Raises:
        OptimizerError: an optimizer owns none of the parameters, or is none: of a wrapper, pass what it wraps.

    Example:
        >>> import copy, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> report = knife(model, Units({"0": [1, 5]}), optimizer=optimizer)
        >>> copied = copy.deepcopy(model)
        >>> optimizer_of_copy = torch.optim.AdamW(copied.parameters())
        >>> optimizer_of_copy.load_state_dict(optimizer.state_dict())
        >>> attach(copied, optimizer_of_copy)
    """
    _backend(model).attach(model, optimizer)


@_together
def check(model: Any, optimizer: Any = None, *, mirrors: Any = ()) -> Check:
    """Look for what goes wrong in silence around an operated model: nothing changes, no forward pass is run.

    Of a model that several processes hold (DDP, `replicated`), call it on all of them: they compare what they hold.

    Trainable parameters that no optimizer owns or that several do, frozen rows that something could move, banks that
    have no effect or disagree with their layer, step hooks and ages that a copy or a resume has lost, old weights
    written back into slots, rows and optimizer state that are not finite, target networks of another structure.

    Args:
        model: any `torch.nn.Module`; wrappers (DDP, compiled modules) are taken off.
        optimizer: its optimizer, or several. None: nothing is said of parameters without one.
        mirrors: networks that should have the same structure, one or several.

    Returns:
        The check: true if there is no problem. `.problems` say where, what was found and what to do; `.require()`
        raises `CheckError` if there are any.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
        >>> found = check(model, optimizer)
        >>> found.ok, found.problems[0].where
        (False, '2.weight, 2.bias')
    """
    return _backend(model).check(model, optimizer, mirrors=mirrors)


def mirror(model: Any, *, onto: Any, frozen: Literal["own", "shared"] = "own", verify: Any = None) -> MirrorReport:
    """Give target, average or teacher networks the structure of an operated model: all of them, or none.

    Call it after each operation on the model, and after each `undo`, before the target is next updated. Operations that
    both have stay as they are; those that the model no longer has are taken back. Optimizers are not concerned.

    Args:
        model: the network that was operated on.
        onto: the target, or several, built as the model was; wrappers (DDP, compiled, `AveragedModel`) are taken off.
        frozen: whose frozen rows a target holds. `"own"`: its knowledge is its own old unit, so its output does not
            change; for targets whose frozen rows follow the model's: copied or averaged by state dict. `"shared"`: the
            model's, and so are the slots of these units, so its output moves by what they lagged behind; for targets of
            which parameters alone are averaged or copied.
        verify: a batch, as for `knife`, on which each target is compared before and after. Under `"own"` beyond the
            tolerance of its dtype is an error, where nothing was taken back; else the report says by how much it moved.

    Returns:
        The report: for each target the units, site by site, and by how much they moved.

    Raises:
        MirrorError: a target of other structure, one that was operated on by itself, the model itself; under `"own"`
            also a target whose parameters alone have followed the model since it was last mirrored.
        EquivalenceError: an output moved that must not; everything was put back.

    Example:
        >>> import copy, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> target = copy.deepcopy(model).requires_grad_(False)
        >>> report = knife(model, Units({"0": [1, 5]}))
        >>> mirror(model, onto=target).num_units
        2
        >>> target.load_state_dict(model.state_dict())
        <All keys matched successfully>
    """
    return _backend(model).mirror(model, onto=onto, frozen=frozen, verify=verify)


def composites(model: Any) -> Composites:
    """List the composite units of a model, member by member."""
    return _backend(model).composites(model)


def _backend(model: Any) -> Backend:
    """The backend that a model belongs to, imported only now.

    Raises:
        ModelError: the model is no torch.nn.Module.
    """
    if not _is_of_torch(type(model)):
        found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise ModelError(f"expected a torch.nn.Module, found {found}; pass the model itself")
    return _torch_backend()


def _is_of_torch(kind: type) -> bool:
    return any(cls.__module__.partition(".")[0] == "torch" for cls in kind.__mro__)


def _torch_backend() -> Backend:
    import neuronsurgery.pytorch

    return cast("Backend", neuronsurgery.pytorch)


def _selected(
    model: Any,
    wanted: Criterion,
    *,
    evidence: Evidence | None,
    sites: Iterable[str] | None,
    example: Any = None,
    cooldown: tuple[int, Any] = (0, None),
    generator: Any = None,
) -> Selection:
    """The units that a criterion chooses now; `cooldown` in steps of the optimizer beside it."""
    backend = _backend(model)
    names = _names(sites)
    found = backend.discover(model, include=_forced(names, wanted), example=example)
    if names is not None:
        found = found.subset(names)
    _require_sites(found)
    if evidence is not None:
        found = _as_measured(found, evidence, _forced(names, wanted))
        evidence = backend.pooled(model, evidence, needs_of(wanted))
    else:
        evidence = _evidence_now(backend, model, found, wanted)
    scores = score(found, evidence, wanted, model=model, generator=generator)
    steps, optimizer = cooldown
    return select(scores, ages=backend.ages(model, optimizer), cooldown=steps)


def _planned(
    model: Any,
    criterion: Any,
    *,
    evidence: Evidence | None,
    sites: Iterable[str] | None,
    verify: Any,
    generator: Any,
) -> tuple[Plan, Selection]:
    """The plan of a method that writes outgoing weights; sites that the user named must have consumers."""
    wanted = as_criterion(criterion)
    names = _names(sites)
    selection = _selected(model, wanted, evidence=evidence, sites=names, example=verify, generator=generator)
    if named := _forced(names, wanted):
        _backend(model).consumers(model, include=named).require(named)
    return plan(selection), selection


def _forced(names: list[str] | None, criterion: Criterion) -> list[str]:
    """The sites that the user named: in `sites=`, or unit by unit."""
    return [*(names or []), *(criterion.units if isinstance(criterion, Units) else [])]


def _names(sites: Iterable[str] | None) -> list[str] | None:
    return None if sites is None else [sites] if isinstance(sites, str) else list(sites)


def _require_rates(*, rate: float, decay: float) -> None:
    if not 0 < rate <= 1 or not 0 <= decay < 1:
        raise CriterionError(f"rate={rate} is a share, above 0 and at most 1, and decay={decay} at least 0 and below 1")


def _require_reborn(over_active: float, per_donor: int, scale: tuple[float, float]) -> None:
    if not over_active > 1:
        raise CriterionError(f"over_active is {over_active}; scores have mean 1, so donors are above that")
    if per_donor < 1 or not 0 < scale[0] <= scale[1]:
        raise CriterionError(f"per_donor={per_donor} must be at least 1, and scale={scale} a range of positive factors")


def _require_sites(sites: Sites) -> None:
    if not sites:
        reasons = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in list(sites.declined.items())[:5])
        raise SiteError(f"no site to operate on was found. {reasons or 'The model has no Linear or convolution layer'}")


def _as_measured(sites: Sites, evidence: Evidence, named: list[str]) -> Sites:
    """Without sites that only the `verify=` batch showed, after the measuring; what was named stays, to be refused."""
    reason = "it was not measured: name it in sites= of observe or probe"
    missing = {name: reason for name in sites if name not in evidence.sites and name not in named}
    if len(missing) == len(sites):
        return sites  # evidence of another model
    return Sites({n: site for n, site in sites.items() if n not in missing}, {**sites.declined, **missing})


def _evidence_now(backend: Backend, model: Any, sites: Sites, criterion: Criterion) -> Evidence | None:
    """The gradients that are there, for a criterion that asks for them; a function takes what there is."""
    if criterion.needs & OF_GRADIENTS:
        return backend.measure(model, sites)
    if any(isinstance(leaf, Custom) for leaf in criterion.leaves()):
        with suppress(EvidenceError):
            return backend.measure(model, sites)
    return None
