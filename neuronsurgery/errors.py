"""Every error the package raises, so that one `except SurgeryError` catches them all.

The tree (the second parent is the built-in a Python user would expect):

    SurgeryError
    |-- CriterionError      ValueError     an unknown or invalid criterion, a threshold out of range
    |-- EvidenceError       ValueError     no gradients, a quantity not measured, evidence of another model
    |-- SiteError           ValueError     an unknown site or unit
    |-- PlanError           ValueError     a plan that does not fit the model
    |-- OptimizerError      ValueError     an optimizer that owns none of the parameters, or that couples rows
    |-- ScheduleError       ValueError     a schedule that can never act, or the state of another one
    |-- DrawError           ValueError     an initializer or a generator that draws no fresh weights
    |-- ModelError          TypeError      no module; lazy, quantized, scripted or inference tensors
    |-- EquivalenceError                   the output moved beyond the tolerance; everything was rolled back
    |-- UndoError           ValueError     a later operation intervened
    |-- StateError          RuntimeError   a saved state that does not fit, or that was cast or averaged
    |-- CheckError          RuntimeError   problems that surgery.check found, and that there must not be
    |-- MirrorError         ValueError     a target that does not fit the model, or follows it in another way
    |-- DistributedError    RuntimeError   processes that hold one model failed, or did not do the same
    |-- FormatError         ValueError     text that is not the JSON of the value asked for
    `-- UntraceableError    RuntimeError   a forward that cannot be read soundly

Messages say what was asked, what was found and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SurgeryError(Exception):
    """The root of the package's errors."""


class CriterionError(SurgeryError, ValueError):
    """A criterion that is unknown or invalid, or a threshold out of range."""


class EvidenceError(SurgeryError, ValueError):
    """Evidence that lacks what a criterion needs, or that was measured on another model."""


class SiteError(SurgeryError, ValueError):
    """A site or a unit that the model does not have."""


class PlanError(SurgeryError, ValueError):
    """A plan that does not fit the model."""


class OptimizerError(SurgeryError, ValueError):
    """An optimizer that owns none of the model's parameters, or that couples rows."""


class ScheduleError(SurgeryError, ValueError):
    """A schedule that can never act, that was closed or cannot be copied, or the state of another schedule."""


class DrawError(SurgeryError, ValueError):
    """An initializer or a generator that draws no fresh weights."""


class ModelError(SurgeryError, TypeError):
    """A model that cannot be operated on: no module; lazy, quantized, scripted or inference tensors."""


class EquivalenceError(SurgeryError):
    """An output that moved beyond the tolerance; the operation was rolled back."""


class UndoError(SurgeryError, ValueError):
    """An operation that can no longer be undone because a later one intervened."""


class StateError(SurgeryError, RuntimeError):
    """A saved state that does not fit the model; a structure that was cast, averaged, or written by a newer version."""


class CheckError(SurgeryError, RuntimeError):
    """A model or an optimizer that `surgery.check` finds problems in, raised by `require()`."""


class MirrorError(SurgeryError, ValueError):
    """A target that does not fit its model, or that follows it in a way that its frozen rows were not made for."""


class DistributedError(SurgeryError, RuntimeError):
    """An operation of several processes that failed on some, or that would have left them with different models."""


class FormatError(SurgeryError, ValueError):
    """Text that is not the JSON of the value asked for, or that a newer version wrote."""


class UntraceableError(SurgeryError, RuntimeError):
    """A forward, or a new way of calling it, that cannot be read soundly.

    Attributes: `reason` in plain words; `file` and `line` of the code that cannot be read, where known.

    >>> print(UntraceableError("the forward branches on a tensor", file="net.py", line=12))
    the forward branches on a tensor (net.py:12)
    """

    def __init__(self, reason: str, file: str | None = None, line: int | None = None) -> None:
        self.reason = reason
        self.file = file
        self.line = line
        super().__init__(reason, file, line)

    def __str__(self) -> str:
        if self.file is None:
            return self.reason
        return f"{self.reason} ({self.file}{'' if self.line is None else f':{self.line}'})"


def near_names(asked: str, known: Iterable[str], limit: int = 8) -> str:
    """Offers the known names nearest to the one asked for, or else lists the known ones.

    >>> near_names("stagnent", ["stagnant", "dormant", "grama"])
    "did you mean 'stagnant'?"
    >>> near_names("output", ["fc1", "fc2"])
    "known: 'fc1', 'fc2'"
    """
    names = list(known)
    folded = {name.lower(): name for name in names}
    near = [folded[name] for name in get_close_matches(asked.lower(), folded, n=3)]
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    if not names:
        return "there are none"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"known: {', '.join(map(repr, names[:limit]))}{more}"
