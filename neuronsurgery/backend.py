"""What a framework has to provide: the stages that touch a model. The rest of the core is arithmetic on values.

A backend is a folder beside `pytorch/` that offers these functions; `tests/backend_contract.py` holds it to them.
There is one backend, so there is no registry: `surgery.py` imports it when it is called with a model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from neuronsurgery.checks import Check
from neuronsurgery.composites import Composites
from neuronsurgery.consolidations import Consolidation
from neuronsurgery.consumers import Consumers
from neuronsurgery.evidence import Evidence, Quantity
from neuronsurgery.flattenings import Flattening
from neuronsurgery.layer_reports import LayerReport
from neuronsurgery.mirrors import MirrorReport
from neuronsurgery.plans import Plan
from neuronsurgery.reports import Report
from neuronsurgery.sites import Sites
from neuronsurgery.stepping import Runner

__all__ = ["Backend", "Watch"]


class Watch(Protocol):
    """What a schedule knows of a training run: steps, and what was measured in a window of them."""

    num_steps: int
    """How many steps were taken; several optimizers that take turns count once."""
    is_open: bool
    """Whether the window is open: steps are measured."""
    evidence: Evidence
    """What was measured since the window was opened or restarted."""
    needs: frozenset[Quantity]
    """What is measured."""
    generator: Any
    """The source of random numbers whose state is part of the state, or None."""

    @property
    def sites(self) -> Sites:
        """The sites watched, as they are now."""

    @property
    def num_seen(self) -> int:
        """How many steps of the window are over, measured or not."""

    @property
    def has_evidence(self) -> bool:
        """Whether anything was measured of any site."""

    def end_round(self) -> int:
        """End the step that is under way, and return how many were taken."""

    def open(self, every: int) -> None:
        """Open the window: each `every`-th step is measured, the next one first."""

    def shut(self) -> None:
        """Close the window and forget what was measured."""

    def restart(self) -> None:
        """Forget what was measured."""

    def forget_changed(self) -> list[str]:
        """Forget what was measured of sites that were operated on, undone or loaded since; their names."""

    def pooled(self) -> Evidence:
        """What was measured, of all replicas together."""

    def agreed(self, value: Any) -> float | None:
        """A value as a number, on which all replicas agree; None where none of them has one."""

    def ages(self) -> Mapping[str, Mapping[int, int]]:
        """As `Backend.ages`, of the sites watched."""

    def operations(self) -> Mapping[str, Mapping[int, int]]:
        """Site -> composite unit -> its latest operation."""

    def state_dict(self) -> dict[str, Any]:
        """Counts, window and evidence as tensors, numbers and strings."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, after the model's and the optimizers'."""

    def close(self) -> None:
        """Leave nothing on the model or the optimizers."""


class Backend(Protocol):
    """The functions of a backend; models, optimizers, batches and generators are the framework's own."""

    def discover(self, model: Any, *, include: Collection[str] = (), example: Any = None) -> Sites:
        """The sites of a model, and what is declined."""

    def measure(self, model: Any, sites: Sites) -> Evidence:
        """Evidence from the gradients that are there now."""

    def check_source(self, evidence: Evidence, model: Any) -> None:
        """Refuse evidence of another model."""

    def observe(
        self,
        model: Any,
        optimizer: Any = None,
        *,
        every: int = 1,
        sites: Collection[str] = (),
        needs: Collection[Quantity] = frozenset(Quantity),
        scaler: Any = None,
        weights: Any = None,
    ) -> AbstractContextManager[Evidence]:
        """Evidence gathered while the model trains."""

    def probe(
        self,
        model: Any,
        batches: Iterable[Any],
        loss_fn: Callable[[Any, Any], Any],
        *,
        sites: Collection[str] = (),
        weights: Any = None,
    ) -> Evidence:
        """Evidence from batches of its own, the model left as it was."""

    def unobserved(self) -> AbstractContextManager[None]:
        """A block whose passes no observation that is open hears of."""

    def ages(self, model: Any, optimizer: Any) -> Mapping[str, Mapping[int, int]]:
        """Site -> composite unit -> optimizer steps since its latest operation."""

    def seed(self, model: Any, generator: Any) -> int:
        """The seed for random choices before the next operation."""

    def replicated(self, model: Any, group: Any = None) -> Any:
        """A model as one that the processes of a group hold replicas of."""

    def is_shared(self, model: Any) -> bool:
        """Whether what is done to a model concerns other processes as well."""

    def together(self, model: Any) -> AbstractContextManager[None]:
        """A block that all processes that hold a model do, or none of them; a model that nothing wraps is alone."""

    def pooled(self, model: Any, evidence: Evidence, needs: Collection[Quantity] = frozenset(Quantity)) -> Evidence:
        """What all processes that hold a model measured of it."""

    def agreed_units(self, point: str, units: Mapping[str, Sequence[int]]) -> Mapping[str, tuple[int, ...]]:
        """In such a block the units that the first process chose, elsewhere these."""

    def operate(
        self,
        model: Any,
        plan: Plan,
        *,
        optimizer: Any = None,
        retire: int | None = None,
        init: Any = None,
        verify: Any = None,
        generator: Any = None,
        method: str = "knife",
    ) -> Report:
        """Carry out a plan, all of it or nothing; the other method that leaves frozen rows is `fade_to_fresh`."""

    def consumers(self, model: Any, *, include: Collection[str] = ()) -> Consumers:
        """Which layers read the units of each site."""

    def declare_consumer(self, kind: type, weights: Mapping[str, str | None]) -> None:
        """By which weights the layers of a class read their input."""

    def reset_units(
        self,
        model: Any,
        plan: Plan,
        *,
        method: str,
        optimizer: Any = None,
        init: Any = None,
        verify: Any = None,
        generator: Any = None,
    ) -> Report:
        """Draw the units of a plan anew and zero their outgoing weights, all of it or nothing."""

    def reborn(
        self,
        model: Any,
        plan: Plan,
        donors: Mapping[str, Sequence[int]],
        *,
        scale: tuple[float, float],
        per_donor: int,
        optimizer: Any = None,
        init: Any = None,
        verify: Any = None,
        generator: Any = None,
    ) -> Report:
        """Give the units of a plan shares of the work of donors, all of it or nothing."""

    def continual_backprop(
        self,
        model: Any,
        optimizer: Any,
        *,
        rate: float,
        maturity: int,
        decay: float,
        sites: Sequence[str] | None = None,
        init: Any = None,
        generator: Any = None,
    ) -> Runner:
        """Replace the least useful units little by little."""

    def ccbp(
        self,
        model: Any,
        optimizer: Any,
        *,
        rate: float,
        every: int,
        decay: float,
        sharpness: float,
        sites: Sequence[str] | None = None,
        init: Any = None,
        generator: Any = None,
    ) -> Runner:
        """Move all units towards fresh ones, the less useful the faster."""

    def widen(
        self, model: Any, plan: Plan, *, optimizer: Any = None, verify: Any = None, generator: Any = None
    ) -> Report:
        """Split the units of a plan in two, all of it or nothing."""

    def reset(
        self,
        model: Any,
        layers: Any = None,
        *,
        optimizer: Any = None,
        example: Any = None,
        init: Any = None,
        initial: Any = None,
        generator: Any = None,
    ) -> LayerReport:
        """Give layers fresh weights and fresh optimizer state."""

    def shrink_and_perturb(
        self,
        model: Any,
        layers: Any = None,
        *,
        shrink: float,
        perturb: float,
        optimizer: Any = None,
        example: Any = None,
        init: Any = None,
        initial: Any = None,
        generator: Any = None,
    ) -> LayerReport:
        """Scale layers down and add a part of fresh weights."""

    def scale_head(
        self, model: Any, factor: float, layers: Any = 1, *, optimizer: Any = None, example: Any = None
    ) -> LayerReport:
        """Multiply the weights and biases of output layers."""

    def reset_optimizer(self, model: Any, layers: Any = None, *, optimizer: Any, example: Any = None) -> LayerReport:
        """Give the optimizer the state of a fresh one."""

    def inject(
        self,
        model: Any,
        head: str,
        *,
        optimizer: Any = None,
        init: Any = None,
        verify: Any = None,
        generator: Any = None,
    ) -> LayerReport:
        """Give a module fresh weights beside frozen copies, so that its output stays."""

    def regenerative(self, model: Any, strength: float, layers: Any = None, *, initial: Any = None) -> Any:
        """A penalty towards the weights of now."""

    def l2(self, model: Any, strength: float, layers: Any = None) -> Any:
        """A penalty towards zero."""

    def spectral(
        self, model: Any, strength: float, layers: Any = None, *, exponent: int = 2, num_iterations: int = 1
    ) -> Any:
        """A penalty towards singular values of one."""

    def upgd(
        self, params: Any, lr: float, *, weight_decay: float, beta_utility: float, sigma: float, generator: Any = None
    ) -> Any:
        """An optimizer that spares useful weights."""

    def consolidate(
        self,
        model: Any,
        *,
        mirrors: Any = (),
        optimizer: Any = None,
        batches: Any = None,
        tolerance: float = 1e-3,
        max_rows: int | None = None,
    ) -> Consolidation:
        """Take frozen rows that contribute nothing out of a model and its mirrors, all of them or none."""

    def flatten(self, model: Any, *, verify: Any = None) -> Flattening:
        """Make a model plain and wider where its banks allow."""

    def undo(self, model: Any, operation: Report | int | None = None, *, optimizer: Any = None) -> Report:
        """Put the old weights of an operation's units back: a report's, one of that number, or the last."""

    def watch(
        self,
        model: Any,
        optimizer: Any,
        *,
        sites: Collection[str] | None = None,
        needs: Collection[Quantity] = (),
        generator: Any = None,
        scaler: Any = None,
        weights: Any = None,
    ) -> Watch:
        """Watch a model and its optimizers train."""

    def restore(
        self, model: Any, state_dict: Mapping[str, Any], optimizer: Any = None, *, prefix: str = ""
    ) -> Composites:
        """Take over a saved state and its structure, whole or not at all."""

    def accept(self, model: Any) -> None:
        """Let the model's own loader take over structure."""

    def attach(self, model: Any, optimizer: Any) -> None:
        """Install on an optimizer what the operated rows of its model need."""

    def check(self, model: Any, optimizer: Any = None, *, mirrors: Any = ()) -> Check:
        """What stands in the way of a model and its optimizers, nothing changed."""

    def check_mirrors(self, model: Any, *, onto: Any, sites: Collection[str]) -> None:
        """Refuse target networks that could not be given the structure of a model operated on at these sites."""

    def mirror(
        self, model: Any, *, onto: Any, frozen: Literal["own", "shared"] = "own", verify: Any = None
    ) -> MirrorReport:
        """Give target networks the structure of a model, all of them or none."""

    def composites(self, model: Any) -> Composites:
        """The composite units of a model."""
