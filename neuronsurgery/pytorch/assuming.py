"""The traces of a default call, as discovery needs them: in both modes, and under several assumptions on sizes.

Discovery has no arguments. Where a forward asks for a size (`for t in range(x.shape[1])`), every size is assumed
to be 2, or what it is compared with for equality. The verdict must not depend on that, so the forward is traced again
with 1 and with 3, and all these traces have to agree. A forward may raise an error of its own for some of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from neuronsurgery.errors import UntraceableError
from neuronsurgery.pytorch.calls import Call, default_call, default_leaves
from neuronsurgery.pytorch.scalars import Assumed
from neuronsurgery.pytorch.tracing import Trace, trace

__all__ = ["default_traces"]

_OTHER_SIZES = (1, 3)
Tracing = Callable[..., Trace]


def default_traces(
    module: nn.Module, method: str, inline: frozenset[str] = frozenset(), *, runs_hooks: bool = False
) -> list[Trace]:
    """The default call in both modes; numbers are inputs of the graph where that can be traced, else constants.

    `runs_hooks` is for graphs that will run, see `trace`.

    Raises:
        UntraceableError: the function cannot be read soundly.
    """
    tracing = functools.partial(trace, module, method, inline=inline, runs_hooks=runs_hooks)
    leaves = default_leaves(module, method)
    try:
        return _in_both_modes(tracing, default_call(module, method), leaves, not module.training)
    except UntraceableError:
        if all(leaf is None for leaf in leaves):
            raise
    return _in_both_modes(tracing, default_call(module, method, constant_numbers=True), leaves, not module.training)


def _in_both_modes(tracing: Tracing, call: Call, leaves: tuple[Any, ...], other_mode: bool) -> list[Trace]:
    found = _for_all_sizes(functools.partial(tracing, call), leaves)
    if not any(traced.reads_mode for traced in found):
        return found
    return [*found, *_for_all_sizes(functools.partial(tracing, call, training=other_mode), leaves)]


def _for_all_sizes(tracing: Tracing, leaves: tuple[Any, ...]) -> list[Trace]:
    def assuming(size: int, prefers_equal: bool) -> Trace:
        return tracing(known=Assumed(leaves, size, prefers_equal))

    found, failure = [], None
    try:
        found.append(assuming(2, prefers_equal=True))
        if not found[0].conditions:
            return found
    except UntraceableError as error:
        if not _is_of_the_forward(error):
            raise
        failure = error
    for size in _OTHER_SIZES:
        try:
            found.append(assuming(size, prefers_equal=False))
        except UntraceableError as error:
            if not _is_of_the_forward(error):
                raise
    if failure is not None and not found:
        raise failure
    return found


def _is_of_the_forward(error: UntraceableError) -> bool:
    """Whether the forward raised it itself for a size, as one that checks its input does."""
    return isinstance(error.__cause__, (ValueError, AssertionError, IndexError, RuntimeError))
