"""What a value may pass between its activation function and a consumer, and where its units are afterwards.

One function for each kind of operation: it takes the call and the layout before it, and returns the layout after it, or
a reason. An operation that is in no table may mix units, and is a reason as well.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch.nn.functional as F
from torch import fx, nn

from neuronsurgery.pytorch.hooks import may_change_input, may_change_output
from neuronsurgery.pytorch.layouts import Layout, Passed
from neuronsurgery.pytorch.lookahead import is_of_parameters
from neuronsurgery.pytorch.mirroring import original_class, submodule
from neuronsurgery.pytorch.producers import multiplication_at
from neuronsurgery.pytorch.recognition import (
    DROPOUTS,
    FREE,
    NEUTRAL,
    RANGE_BEARING,
    SCALING,
    canonical_name,
    function_of_module,
    is_metadata,
)

__all__ = ["past", "width_of"]


class Others(Protocol):
    """What can be asked of other values in the scope of a call."""

    def width(self, node: fx.Node, scope: nn.Module, axis: int) -> int | None:
        """How many entries a value has along an axis counted from the end; None where that is not known."""

    def is_partner(self, node: fx.Node, scope: nn.Module, layout: Layout) -> bool:
        """Whether a layer makes a value, entry by entry, for the one node that reads it."""


@dataclass(frozen=True)
class Call:
    """A function or module that reads a value: its name, its other arguments, and whom to ask about these."""

    node: fx.Node
    value: fx.Node
    scope: nn.Module
    name: str
    others: Others

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.node.args[1:]

    def given(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by its place (the value's own is 0) or its name."""
        return self.node.args[place] if len(self.node.args) > place else self.node.kwargs.get(name, default)


def past(node: fx.Node, value: fx.Node, scope: nn.Module, layout: Layout, others: Others) -> Layout | str:
    """The layout of what a node makes of a value, or why its units cannot be told there."""
    if node.op == "call_module":
        return _past_module(node, value, scope, layout)
    call = Call(node, value, scope, _DISPATCHED.get(node.target, canonical_name(node)), others)
    for names, function in _FUNCTIONS:
        if call.name in names:
            return function(call, layout)
    return f"'{call.name}' reads it, which may mix units"


# -- modules ---------------------------------------------------------------------------------------------------------


def _past_module(node: fx.Node, value: fx.Node, scope: nn.Module, layout: Layout) -> Layout | str:
    path = str(node.target)
    module = submodule(scope, path)
    label = f"'{path}' ({original_class(module).__name__})"
    if node.args != (value,) or node.kwargs or "forward" in vars(module):
        return f"it enters {label} in a way that cannot be followed"
    if may_change_input(module) or may_change_output(module):
        return f"a hook on {label} may change what its units pass on"
    if isinstance(module, nn.Flatten):
        return layout.flattened(module.start_dim, module.end_dim)
    for kinds, dims, passed in _POOLS:
        if isinstance(module, kinds):
            size = dims or _dims_of(module)
            return layout.past(passed) if -layout.axis > size else f"{label} pools over its units"
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return layout.past(Passed.OWN)
    if isinstance(module, (nn.modules.dropout._DropoutNd, nn.Identity)):
        return layout
    if any(True for _ in module.parameters()):
        return f"{label} reads it, which may mix units"
    function = function_of_module(module)
    if isinstance(function, str) or function.others:
        return f"{label} reads it, which may mix units"
    return layout.past(Passed.HOMOGENEOUS if isinstance(module, (nn.ReLU, nn.LeakyReLU)) else Passed.UNITWISE)


def _dims_of(module: nn.Module) -> int:
    """Over how many axes a pooling module pools: its name ends in `2d`."""
    name = original_class(module).__name__
    return int(name[-2]) if name[-1] == "d" and name[-2].isdigit() else 3


_POOLS: tuple[tuple[Any, int, Passed], ...] = (
    ((nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd), 0, Passed.LINEAR),
    ((nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd), 0, Passed.HOMOGENEOUS),
    ((nn.Upsample,), 2, Passed.LINEAR),
)


# -- functions -------------------------------------------------------------------------------------------------------


def _elementwise(call: Call, layout: Layout) -> Layout | str:
    """A function of each entry; other tensors in it may be parameters alone."""
    others = [each for each in call.node.all_input_nodes if each is not call.value]
    computed = [each for each in others if not is_of_parameters(each)]
    if computed and call.name in ("add", "sub"):
        return "it is added to another tensor, a residual say: what reads the sum reads that too"
    if computed and call.name in SCALING and not _is_divisor(call):
        return _scaled(call, computed[0], layout)
    if computed:
        return f"'{call.name}' combines it with a computed tensor: what reads the result reads that too"
    passed = Passed.OWN if others else _PASSED.get(call.name, Passed.UNITWISE)
    if call.name in SCALING and not others and _is_positive_number(call):
        passed = Passed.HOMOGENEOUS
    return layout.past(passed)


def _is_divisor(call: Call) -> bool:
    return call.name in SCALING - {"mul", "multiply"} and call.node.args[:1] != (call.value,)


def _scaled(call: Call, other: fx.Node, layout: Layout) -> Layout | str:
    """Past a product, which is nothing where the unit is nothing: what reads it reads the unit, with a factor.

    The factor is one for all units (a mask, attention over time), or what another layer makes for this product alone:
    the other half of a gated unit. A factor that is read elsewhere too has units, or features, of its own there.
    """
    if _is_in_place(call.node) and sum(not is_metadata(user) for user in call.value.users) > 1:
        return f"'{call.name}' changes it in place, for others that read it too"
    if call.others.width(other, call.scope, layout.axis) == 1:
        return layout.past(Passed.HOMOGENEOUS)
    if call.others.is_partner(other, call.scope, layout):
        return layout.past(Passed.OWN)
    return f"'{call.name}' combines it with a computed tensor: what reads the result reads that too"


def _is_in_place(node: fx.Node) -> bool:
    if node.op == "call_method":
        return str(node.target).endswith("_")
    return node.target in (operator.imul, operator.itruediv)


def _is_positive_number(call: Call) -> bool:
    numbers = [each for each in call.node.args if isinstance(each, (int, float))]
    return len(numbers) == 1 and numbers[0] > 0 and call.node.args[0] is call.value


_PASSED = dict.fromkeys("contiguous clone identity float double half bfloat16 to type_as detach".split(), Passed.LINEAR)
_PASSED |= dict.fromkeys(("relu", "leaky_relu"), Passed.HOMOGENEOUS)


def _unchanged(call: Call, layout: Layout) -> Layout | str:
    return layout


_DISPATCHED: dict[Any, str] = {
    getattr(F, name): name for name in (f"{kind}max_pool{dims}d" for kind in ("", "adaptive_") for dims in (1, 2, 3))
}
"""Functions that torch makes from two, and that have no name of their own."""


def _pooled(call: Call, layout: Layout) -> Layout | str:
    dims = int(call.name[-2]) if call.name[-1] == "d" else -layout.axis - 1  # `interpolate`: over all behind channels
    if -layout.axis <= max(dims, 1):
        return f"'{call.name}' pools over its units"
    return layout.past(Passed.HOMOGENEOUS if "max" in call.name else Passed.LINEAR)


def _flattened(call: Call, layout: Layout) -> Layout | str:
    start, end = call.given(1, "start_dim", 0), call.given(2, "end_dim", -1)
    if not isinstance(start, int) or not isinstance(end, int):
        return "how it is flattened is computed"
    return layout.flattened(start, end)


def _reshaped(call: Call, layout: Layout) -> Layout | str:
    """`view(batch, -1)`, which flattens, and shapes that leave the units alone on the last axis."""
    sizes = _items(call.arguments)
    if call.node.kwargs or not sizes or isinstance(sizes[0], (tuple, list)):
        return f"'{call.name}' gives it a shape that cannot be followed"
    is_fixed = layout.is_fixed or (isinstance(sizes[-1], int) and sizes[-1] > 0)
    layout = replace(layout, is_fixed=is_fixed)
    is_plain = layout.axis == -1 and layout.outer == layout.inner == 1 and (layout.lead, layout.tail) == (0, 0)
    if is_plain and sizes[-1] == layout.num_units and (layout.before, layout.after) == (0, 0):
        return replace(layout, num_axes=len(sizes))
    is_batch = isinstance(sizes[0], fx.Node) or sizes[0] == -1
    if len(sizes) == 2 and is_batch and (sizes[1] == -1) != (sizes[0] == -1):
        return layout.flattened(1, -1)
    return f"'{call.name}' gives it a shape that cannot be followed"


def _joined(call: Call, layout: Layout) -> Layout | str:
    pieces, axis = call.node.args[0], call.given(1, "dim", call.node.kwargs.get("axis", 0))
    if not isinstance(pieces, (tuple, list)) or not isinstance(axis, int):
        return "what it is concatenated with is computed"
    at = [place for place, piece in enumerate(pieces) if piece is call.value]
    if len(at) != 1:
        return "it is concatenated with itself"
    where = layout.position(axis)
    if where is None and axis == 0:
        return layout
    where = layout.axis if where is None else where  # a sum of entries that does not fit will tell
    if where != layout.axis:
        return "it is concatenated with others along another axis: what reads it reads them by the same weights"
    widths = [call.others.width(piece, call.scope, where) if isinstance(piece, fx.Node) else None for piece in pieces]
    return layout.joined(widths[: at[0]], widths[at[0] + 1 :])


def _reduced(call: Call, layout: Layout) -> Layout | str:
    axes = call.given(1, "dim", call.node.kwargs.get("axis"))
    keeps = call.given(2, "keepdim", False)
    found = [axes] if isinstance(axes, int) else list(axes) if isinstance(axes, (tuple, list)) else []
    if not found or not all(isinstance(axis, int) for axis in found) or not isinstance(keeps, bool):
        return f"'{call.name}' reduces it over axes that are not known"
    after = layout.reduced(found, keeps)
    return after if isinstance(after, str) else after.past(_REDUCED[call.name])


_REDUCED = {"mean": Passed.LINEAR, "sum": Passed.LINEAR, "amax": Passed.HOMOGENEOUS, "amin": Passed.HOMOGENEOUS}


def _permuted(call: Call, layout: Layout) -> Layout | str:
    order = _items(call.arguments)
    if not all(isinstance(axis, int) for axis in order):
        return "how its axes are permuted is computed"
    return layout.permuted(order)


def _rearranged(call: Call, layout: Layout) -> Layout | str:
    """einops: the axis of the units may move, and others may be merged into it."""
    pattern = call.given(1, "pattern")
    if not isinstance(pattern, str) or pattern.count("->") != 1 or call.node.args[:1] != (call.value,):
        return "how it is rearranged is not known"
    before, after = (axes_of_pattern(side) for side in pattern.split("->"))
    axis = layout.axis + len(before)
    has_other_axes = ["..."] not in before and layout.num_axes not in (None, len(before))
    if axis < 0 or ["..."] in before[axis:] or before[axis] == ["1"] or has_other_axes:
        return f"which of the axes of '{pattern}' is that of its units is not known"
    own, *parts = before[axis]
    place = next((place for place, names in enumerate(after) if own in names), None)
    if parts or place is None or ["..."] in after[place:]:
        return f"where '{pattern}' leaves its units cannot be followed"
    if axis > 0 and before[0][0] in after[place]:
        return "it is flattened together with the batch"
    num_axes = None if ["..."] in after else len(after)
    is_fixed = layout.is_fixed or own in call.node.kwargs
    at = after[place].index(own)
    layout = replace(layout, num_axes=num_axes, axis=place - len(after), is_fixed=is_fixed)
    return layout.merged(at > 0, at < len(after[place]) - 1)


def axes_of_pattern(side: str) -> list[list[str]]:
    """One side of a pattern of einops, axis by axis, each with the names that it is made of, axes of one entry apart.

    >>> axes_of_pattern("... (b n) h 1")
    [['...'], ['b', 'n'], ['h'], ['1']]
    """
    found: list[list[str]] = []
    is_open = False
    for token in side.replace("(", " ( ").replace(")", " ) ").split():
        if token in "()":
            is_open = token == "("
            found += [[]] if is_open else []
        elif is_open:
            found[-1] += [] if token == "1" else [token]
        else:
            found.append([token])
    return [names or ["1"] for names in found]


def _transposed(call: Call, layout: Layout) -> Layout | str:
    axes = _items(call.arguments)
    if len(axes) != 2 or not all(isinstance(axis, int) for axis in axes):
        return "which of its axes are exchanged is not known"
    return layout.transposed(*axes)


def _squeezed(call: Call, layout: Layout) -> Layout | str:
    """An axis of one entry goes or comes."""
    axis = call.given(1, "dim")
    if not isinstance(axis, int):
        return f"'{call.name}' changes axes that are not known"
    step = 1 if call.name == "unsqueeze" else -1
    num_axes = None if layout.num_axes is None else layout.num_axes + step
    place = axis
    if axis >= 0 and num_axes is not None:
        place = axis - max(num_axes, num_axes - step)
    if place >= 0:
        return layout if layout.axis == -1 and axis in (0, 1) else f"'{call.name}' changes axes that are not known"
    if step < 0 and place == layout.axis:
        return f"'{call.name}' takes the axis of its units away"
    moves = place >= layout.axis if step > 0 else place > layout.axis
    return replace(layout, num_axes=num_axes, axis=layout.axis - step if moves else layout.axis)


def _taken(call: Call, layout: Layout) -> Layout | str:
    """`h[:, -1]`: part of what is ahead of the units' axis."""
    index = call.node.args[1] if isinstance(call.node.args[1], tuple) else (call.node.args[1],)
    if layout.axis != -1 or not all(isinstance(each, (int, slice)) for each in index):
        return "a part is taken of it that cannot be followed"
    if layout.num_axes is not None and len(index) >= layout.num_axes:
        return "a part is taken of its units"
    dropped = sum(isinstance(each, int) for each in index)
    return replace(layout, num_axes=None if layout.num_axes is None else layout.num_axes - dropped)


def _averaged(call: Call, layout: Layout) -> Layout | str:
    """`bmm(weights, h)`: sums over what is ahead of the units, with computed weights that are the same for all."""
    has_axes = call.name == "bmm" or (layout.num_axes is not None and layout.num_axes > 1)
    if call.node.args[0] is call.value or call.node.args[1:] != (call.value,) or layout.axis != -1 or not has_axes:
        return f"'{call.name}' reads it otherwise than to average it, which may mix units"
    return layout.past(Passed.HOMOGENEOUS)


_FUNCTIONS: tuple[tuple[frozenset[str], Callable[[Call, Layout], Layout | str]], ...] = (
    (DROPOUTS | {"alpha_dropout", "feature_alpha_dropout"}, _unchanged),
    (
        frozenset(
            "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d "
            "adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
            "interpolate".split()
        ),
        _pooled,
    ),
    (frozenset({"flatten"}), _flattened),
    (frozenset({"view", "reshape"}), _reshaped),
    (frozenset({"cat", "concat", "concatenate"}), _joined),
    (frozenset(_REDUCED), _reduced),
    (frozenset({"permute"}), _permuted),
    (frozenset({"rearrange"}), _rearranged),
    (frozenset({"transpose", "swapaxes", "swapdims"}), _transposed),
    (frozenset({"squeeze", "unsqueeze"}), _squeezed),
    (frozenset({"getitem"}), _taken),
    (frozenset({"bmm", "matmul"}), _averaged),
    ((FREE | RANGE_BEARING | NEUTRAL | {"detach"}) - {"prelu", "masked_fill", "where"}, _elementwise),
)


def _items(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Sizes or axes that were given one by one, or as one sequence."""
    is_one = len(arguments) == 1 and isinstance(arguments[0], (tuple, list))
    return tuple(arguments[0]) if is_one else tuple(arguments)


# -- sizes of other values -------------------------------------------------------------------------------------------


def width_of(node: fx.Node, scope: nn.Module, axis: int, depth: int = 64) -> int | None:
    """How many entries a value has along an axis counted from the end: back to the producer that made them."""
    call = multiplication_at(node, scope)
    if call is not None and not isinstance(call.product, str) and not call.product.is_stacked:
        is_units = axis == call.product.unit_axes[0]
        return call.product.axes.num_units(call.weight.shape) if is_units else None
    if depth == 0 or node.op not in ("call_module", "call_function", "call_method") or not node.args:
        return None
    if node.op == "call_module":
        module: Any = submodule(scope, str(node.target))
        if isinstance(module, nn.Embedding):
            return int(module.embedding_dim) if axis == -1 else None
        is_known = isinstance(_past_module(node, node.args[0], scope, Layout(1, axis, None)), Layout)  # type: ignore[arg-type]
        is_known &= not isinstance(module, nn.Flatten) and isinstance(node.args[0], fx.Node)
        return width_of(node.args[0], scope, axis, depth - 1) if is_known else None  # type: ignore[arg-type]
    name = canonical_name(node)
    if name in ("cat", "concat", "concatenate"):
        return _joint_width(node, scope, axis, depth)
    if _is_of_one_entry(node, name, axis):
        return 1
    is_same = name in ("softmax", "log_softmax")
    is_same |= any(name in names for names, function in _FUNCTIONS if function in (_unchanged, _elementwise, _pooled))
    first = node.args[0]
    return width_of(first, scope, axis, depth - 1) if is_same and isinstance(first, fx.Node) else None


def _is_of_one_entry(node: fx.Node, name: str, axis: int) -> bool:
    """Whether an axis has just been made, or all that was along it reduced to one number."""
    along = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keeps = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    axes = along if isinstance(along, (tuple, list)) else (along,)
    return axis in axes and (name == "unsqueeze" or (name in _REDUCED and keeps is True))


def _joint_width(node: fx.Node, scope: nn.Module, axis: int, depth: int) -> int | None:
    pieces, along = node.args[0], node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if not isinstance(pieces, (tuple, list)) or along not in (axis, 1):  # 1: the channels, or the last of two axes
        return None
    widths = [width_of(piece, scope, axis, depth - 1) if isinstance(piece, fx.Node) else None for piece in pieces]
    known = [width for width in widths if width is not None]
    return sum(known) if len(known) == len(widths) else None
