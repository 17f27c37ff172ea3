"""The traces of a default call, as discovery needs them: in both modes, and under several assumptions on sizes.

Discovery has no arguments. Where a forward asks for a size (`for t in range(x.shape[1])`), every size is assumed
to be 2, or what it is compared with for equality; where it asks for the number of axes, that is assumed to be 2 as
well. The verdict must not depend on that, so the forward is traced again with other sizes and numbers of axes, and all
these traces have to agree. A forward may raise an error of its own for some of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from neuronsurgery.errors import UntraceableError
from neuronsurgery.pytorch.calls import default_call, default_leaves, numbers_of_starred
from neuronsurgery.pytorch.scalars import Assumed
from neuronsurgery.pytorch.tracing import Trace, is_raised_by_forward, trace

__all__ = ["default_traces"]

_SIZES = (2, 1, 3)
_NUMBERS_OF_AXES = (2, 1, 3, 4, 5)


def default_traces(
    module: nn.Module, method: str, inline: frozenset[str] = frozenset(), *, runs_hooks: bool = False
) -> list[Trace]:
    """The default call in both modes; numbers are inputs of the graph where that can be traced, else constants.

    A function of `*args` is called with one tensor, or with as many as it takes without an error of its own.
    `runs_hooks` is for graphs that will run, see `trace`.

    Raises:
        UntraceableError: the function cannot be read soundly.
    """
    failure: UntraceableError | None = None
    for num_starred in numbers_of_starred(module, method):
        try:
            return _with_numbers_if_possible(Default(module, method, inline, runs_hooks, num_starred))
        except UntraceableError as error:
            if not is_raised_by_forward(error):
                raise
            failure = failure or error
    assert failure is not None
    raise failure


@dataclass(frozen=True, eq=False)
class Default:
    """A function and its default call, less what is still to be tried out: numbers, mode, sizes."""

    module: nn.Module
    method: str
    inline: frozenset[str]
    runs_hooks: bool
    num_starred: int
    constant_numbers: bool = False
    training: bool | None = None

    @property
    def leaves(self) -> tuple[Any, ...]:
        return default_leaves(self.module, self.method, self.num_starred)

    def assuming(self, size: int, num_axes: int, prefers_equal: bool) -> tuple[Assumed, Trace | UntraceableError]:
        """The trace under an assumption, or why there is none; and the assumption, which knows what it was asked."""
        call = default_call(self.module, self.method, self.constant_numbers, self.num_starred)
        known = Assumed(self.leaves, size, prefers_equal, num_axes)
        ways: dict[str, Any] = {"inline": self.inline, "training": self.training, "runs_hooks": self.runs_hooks}
        try:
            traced = trace(self.module, self.method, call, known=known, **ways)
        except UntraceableError as error:
            if not is_raised_by_forward(error):
                raise
            return known, error
        return known, traced


def _with_numbers_if_possible(default: Default) -> list[Trace]:
    try:
        return _in_both_modes(default)
    except UntraceableError:
        if not any(leaf is not None for leaf in default.leaves):
            raise
    return _in_both_modes(replace(default, constant_numbers=True))


def _in_both_modes(default: Default) -> list[Trace]:
    found = _for_all_sizes(default)
    if not any(traced.reads_mode for traced in found):
        return found
    return [*found, *_for_all_sizes(replace(default, training=not default.module.training))]


def _for_all_sizes(default: Default) -> list[Trace]:
    """The traces for several sizes, and for several numbers of axes where the forward asks for that."""
    found: list[Trace] = []
    failure: UntraceableError | None = None
    for num_axes in _NUMBERS_OF_AXES:
        asked, sizes = False, _SIZES[:1] if found else _SIZES  # other numbers of axes with one size alone
        for size in sizes:
            known, outcome = default.assuming(size, num_axes, prefers_equal=size == _SIZES[0])
            asked = asked or known.asks_num_axes
            if isinstance(outcome, Trace):
                found.append(outcome)
            else:
                failure = failure or outcome
            if isinstance(outcome, Trace) and not outcome.conditions:
                break
        if not asked:
            break
    if not found and failure is not None:
        raise failure
    return found
