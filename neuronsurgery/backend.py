"""What a framework has to provide: the stages that touch a model. The rest of the core is arithmetic on values.

A backend is a folder beside `pytorch/` that offers these functions; `tests/backend_contract.py` holds it to them.
There is one backend, so there is no registry: `surgery.py` imports it when it is called with a model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from neuronsurgery.composites import Composites
from neuronsurgery.evidence import Evidence
from neuronsurgery.mirrors import MirrorReport
from neuronsurgery.plans import Plan
from neuronsurgery.reports import Report
from neuronsurgery.sites import Sites

__all__ = ["Backend"]


class Backend(Protocol):
    """The functions of a backend; models, optimizers, batches and generators are the framework's own."""

    def discover(self, model: Any, *, include: Collection[str] = (), example: Any = None) -> Sites:
        """The sites of a model, and what is declined."""

    def measure(self, model: Any, sites: Sites) -> Evidence:
        """Evidence from the gradients that are there now."""

    def check_source(self, evidence: Evidence, model: Any) -> None:
        """Refuse evidence of another model."""

    def observe(
        self, model: Any, optimizer: Any = None, *, every: int = 1, sites: Collection[str] = ()
    ) -> AbstractContextManager[Evidence]:
        """Evidence gathered while the model trains."""

    def probe(
        self,
        model: Any,
        batches: Iterable[Any],
        loss_fn: Callable[[Any, Any], Any],
        *,
        sites: Collection[str] = (),
    ) -> Evidence:
        """Evidence from batches of its own, the model left as it was."""

    def ages(self, model: Any, optimizer: Any) -> Mapping[str, Mapping[int, int]]:
        """Site -> composite unit -> optimizer steps since its latest operation."""

    def seed(self, model: Any, generator: Any) -> int:
        """The seed for random choices before the next operation."""

    def operate(
        self,
        model: Any,
        plan: Plan,
        *,
        optimizer: Any = None,
        init: Any = None,
        verify: Any = None,
        generator: Any = None,
    ) -> Report:
        """Carry out a plan, all of it or nothing."""

    def undo(self, model: Any, report: Report, *, optimizer: Any = None) -> Report:
        """Put the old weights of an operation's units back."""

    def mirror(
        self, model: Any, *, onto: Any, frozen: Literal["own", "shared"] = "own", verify: Any = None
    ) -> MirrorReport:
        """Give target networks the structure of a model, all of them or none."""

    def composites(self, model: Any) -> Composites:
        """The composite units of a model."""
