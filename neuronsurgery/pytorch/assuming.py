"""The traces of a default call, as discovery needs them: in both modes, and under several assumptions on sizes.

Discovery has no arguments. Where a forward asks for a size (`for t in range(x.shape[1])`), every size is assumed
to be 2, or what it is compared with for equality. The verdict must not depend on that, so the forward is traced again
with 1 and with 3, and all these traces have to agree. A forward may raise an error of its own for some of them.
"""

from __future__ import annotations

from torch import nn

from neuronsurgery.errors import UntraceableError
from neuronsurgery.pytorch.calls import default_call, default_leaves
from neuronsurgery.pytorch.scalars import Assumed
from neuronsurgery.pytorch.tracing import Trace, is_raised_by_forward, trace

__all__ = ["default_traces"]

_OTHER_SIZES = (1, 3)


def default_traces(module: nn.Module, method: str, inline: frozenset[str] = frozenset()) -> list[Trace]:
    """The default call in both modes; numbers are inputs of the graph where that can be traced, else constants.

    Raises:
        UntraceableError: the function cannot be read soundly.
    """
    try:
        return _in_both_modes(module, method, inline, constant_numbers=False)
    except UntraceableError:
        if not any(leaf is not None for leaf in default_leaves(module, method)):
            raise
    return _in_both_modes(module, method, inline, constant_numbers=True)


def _in_both_modes(module: nn.Module, method: str, inline: frozenset[str], constant_numbers: bool) -> list[Trace]:
    found = _for_all_sizes(module, method, inline, constant_numbers, None)
    if not any(traced.reads_mode for traced in found):
        return found
    return [*found, *_for_all_sizes(module, method, inline, constant_numbers, not module.training)]


def _for_all_sizes(
    module: nn.Module, method: str, inline: frozenset[str], constant_numbers: bool, training: bool | None
) -> list[Trace]:
    call = default_call(module, method, constant_numbers)
    leaves = default_leaves(module, method)

    def assuming(size: int, prefers_equal: bool) -> Trace:
        known = Assumed(leaves, size, prefers_equal)
        return trace(module, method, call, inline=inline, training=training, known=known)

    found, failure = [], None
    try:
        found.append(assuming(2, prefers_equal=True))
        if not found[0].conditions:
            return found
    except UntraceableError as error:
        if not is_raised_by_forward(error):
            raise
        failure = error
    for size in _OTHER_SIZES:
        try:
            found.append(assuming(size, prefers_equal=False))
        except UntraceableError as error:
            if not is_raised_by_forward(error):
                raise
    if failure is not None and not found:
        raise failure
    return found
