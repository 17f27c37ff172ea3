"""Sizes and numbers of a call: passed on they stay symbolic, asked for their value they become conditions.

`range(x.shape[1])` needs an integer. The tracer then takes a value, that of the real argument or, at discovery, an
assumed one, and notes the **condition** under which the graph is the forward: `x.shape[1]` is 7, or
`x.shape[1] > 5` is true. A call for which it does not hold is traced anew.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import fx, nn

from neuronsurgery.pytorch.mirroring import Impurity, original_class, submodule

__all__ = ["Actual", "Assumed", "Condition", "Known", "NeedsInteger", "Scalars"]


class NeedsInteger(TypeError):
    """Code asked a size or number for an integer at a place that is not yet known to need one."""


class Known(Protocol):
    """Where the values of a call's leaves come from: a number, or a tensor's size along an axis, rank or shape."""

    def look(self, leaf: int, axis: Any) -> Any: ...

    def prefer(self, question: Derived) -> None: ...


@dataclass(frozen=True)
class Leaf:
    """A number among the arguments (axis None), or something of a tensor's shape: an axis, "rank" or "shape"."""

    index: int
    axis: Any = None

    def value(self, known: Known) -> Any:
        """The value, as far as it is known."""
        return known.look(self.index, self.axis)


@dataclass(frozen=True)
class Derived:
    """An operator on leaves, constants and what is derived from them."""

    function: Any
    args: tuple[Any, ...]

    def value(self, known: Known) -> Any:
        """The value, as far as its arguments are known."""
        return self.function(*[arg.value(known) if isinstance(arg, (Leaf, Derived)) else arg for arg in self.args])


@dataclass(frozen=True)
class Condition:
    """What a graph takes for granted of the sizes and numbers that it is called with."""

    expression: Leaf | Derived
    found: Any

    def holds(self, leaves: Sequence[Any]) -> bool:
        """Whether the tensors and numbers of a call are as the trace found them."""
        try:
            value = self.expression.value(Actual(leaves))
        except (IndexError, ArithmeticError):  # a tensor of fewer axes
            return False
        return type(value) is type(self.found) and bool(value == self.found)


@dataclass(frozen=True, eq=False)
class Actual:
    """The values of a real call."""

    leaves: Sequence[Any]

    def look(self, leaf: int, axis: Any) -> Any:
        value = self.leaves[leaf]
        if axis is None:
            return value
        if axis == "rank":
            return len(value.shape)
        return value.shape if axis == "shape" else value.shape[axis]

    def prefer(self, question: Derived) -> None:
        """Nothing is free to choose."""


@dataclass(eq=False)
class Assumed:
    """What discovery assumes, which has no arguments: defaults for numbers, and one small size for every axis.

    With `prefers_equal`, a size that the forward compares for equality before it is used is assumed to be equal, as
    `if x.shape[1] != self.channels: raise ...` wants it. The number of axes is one for all tensors; a tensor has no
    further axes once the forward has asked for it.
    """

    defaults: Sequence[Any]
    size: int = 2
    prefers_equal: bool = True
    num_axes: int = 2
    chosen: dict[tuple[int, Any], int] = field(default_factory=dict)
    asked: set[int] = field(default_factory=set)  # the leaves whose number of axes the forward knows

    @property
    def asks_num_axes(self) -> bool:
        """Whether what is computed may depend on a number of axes."""
        return bool(self.asked)

    def look(self, leaf: int, axis: Any) -> Any:
        if axis is None:
            return self.defaults[leaf]
        if isinstance(axis, str):
            self.learn_number_of_axes(leaf)
            sizes = [self.look(leaf, each) for each in range(self.num_axes)] if axis == "shape" else []
            return torch.Size(sizes) if axis == "shape" else self.num_axes
        return self.chosen.setdefault((leaf, self.axis(leaf, axis)), self.size)

    def learn_number_of_axes(self, leaf: int) -> None:
        if leaf not in self.asked:
            self.asked.add(leaf)
            self.chosen = {(i, self.axis(i, axis)): size for (i, axis), size in self.chosen.items()}

    def axis(self, leaf: int, axis: int) -> int:
        """An axis by one number only, where the number of axes is known."""
        if leaf not in self.asked:
            return axis
        if not -self.num_axes <= axis < self.num_axes:
            raise IndexError(f"axis {axis} of a tensor of {self.num_axes} axes")
        return axis % self.num_axes

    def prefer(self, question: Derived) -> None:
        sizes = [arg for arg in question.args if isinstance(arg, Leaf) and isinstance(arg.axis, int)]
        numbers = [arg for arg in question.args if type(arg) is int]
        if self.prefers_equal and question.function in (operator.eq, operator.ne) and sizes and numbers:
            leaf = sizes[0].index
            self.chosen.setdefault((leaf, self.axis(leaf, sizes[0].axis)), numbers[0])


@dataclass(eq=False)
class Scalars:
    """The sizes and numbers in one trace, as expressions over the leaves of its call."""

    module: nn.Module
    known: Known | None
    places: frozenset[Any] = frozenset()  # code and instruction where an integer is needed
    refused: list[Any] = field(default_factory=list)
    leaves: dict[fx.Node, int] = field(default_factory=dict)
    expressions: dict[fx.Node, Leaf | Derived] = field(default_factory=dict)
    shapes: dict[fx.Node, fx.Node] = field(default_factory=dict)  # what gives a shape -> whose shape it is
    slices: dict[fx.Node, tuple[fx.Node, slice]] = field(default_factory=dict)  # what gives a part of one
    conditions: dict[Any, Condition] = field(default_factory=dict)

    def add_leaf(self, node: fx.Node, is_number: bool) -> None:
        self.leaves[node] = len(self.leaves)
        if is_number:
            self.expressions[node] = Leaf(self.leaves[node])

    def ask(self, expression: Leaf | Derived) -> Any:
        """The value, on record from now on.

        Raises:
            Impurity: this trace may not depend on it.
        """
        if self.known is None:
            raise Impurity("control flow on tensor values or shapes (a tensor or a size decides a branch)")
        if isinstance(expression, Derived):
            self.known.prefer(expression)
        value = expression.value(self.known)
        self.conditions[expression] = Condition(expression, value)
        return value

    def integer(self, expression: Leaf | Derived, place: Any) -> int:
        """The value at a place known to need an integer.

        Some of torch's C functions ask any argument for one, and go on without it. So the first time it is refused;
        if the forward fails on that, it is traced again with the place on the list.
        """
        if place not in self.places:
            self.refused.append(place)
            raise NeedsInteger("control flow on tensor values or shapes (Python needs the value of a size)")
        return operator.index(self.ask(expression))

    # -- which nodes are sizes

    def note(self, node: fx.Node) -> bool:
        """Whether a node is a size or number; from now on its expression is known."""
        found = self.expression_of(node)
        if found is not None:
            self.expressions[node] = found
        return node in self.expressions

    def expression_of(self, node: fx.Node) -> Leaf | Derived | None:
        if node.op == "call_method" and node.target in ("size", "dim", "ndimension"):
            axis = (*node.args[1:], node.kwargs.get("dim"), None)[0]
            return self.size(node, node.args[0], "rank" if node.target != "size" else axis)
        if node.op != "call_function":
            return None
        if node.target is getattr and node.args[1] in ("shape", "ndim"):
            return self.size(node, node.args[0], "rank" if node.args[1] == "ndim" else None)
        base: Any = node.args[0] if node.args else None
        if node.target is operator.getitem and base in self.slices:
            return self.size_in_slice(node, *self.slices[base], node.args[1])
        if node.target is operator.getitem and base in self.shapes:
            if isinstance(node.args[1], slice) and not node.all_input_nodes[1:]:
                self.slices[node] = self.shapes[base], node.args[1]
                return None
            return self.size(node, self.shapes[base], node.args[1])
        return self.derived(node) if getattr(node.target, "__module__", "") == "_operator" else None

    def size(self, node: fx.Node, tensor: Any, axis: Any) -> Leaf | None:
        """A tensor's size along an axis, its rank, or (axis None) its shape, if it is that of an argument."""
        found = self.source(tensor, "shape" if axis is None else axis)
        if axis is None:
            self.shapes[node] = tensor
        is_known = found is not None and (axis in (None, "rank") or type(axis) is int)
        return Leaf(self.leaves[found[0]], found[1]) if is_known and found is not None else None

    def size_in_slice(self, node: fx.Node, tensor: fx.Node, part: slice, place: Any) -> Leaf | None:
        """An item of a part of a shape, where both count from the front."""
        start = 0 if part.start is None else part.start
        if part.step not in (None, 1) or not _are_from_the_front(start, place):
            return None
        return self.size(node, tensor, start + place)

    def derived(self, node: fx.Node) -> Derived | None:
        args = [self.expressions.get(arg) if isinstance(arg, fx.Node) else arg for arg in node.args]
        is_plain = all(isinstance(arg, (Leaf, Derived, int, float)) for arg in args)
        return Derived(node.target, tuple(args)) if is_plain and node.all_input_nodes else None

    def length(self, node: fx.Node) -> Leaf | Derived | None:
        """The number of items of a node that is iterated over: axes, a tensor's rows, or the pieces it was cut into."""
        if node in self.shapes or node in self.slices:
            return self.number_of_axes(node)
        name = getattr(node.target, "__name__", node.target)
        cut, arguments = _cut(node) if name in ("unbind", "split", "chunk") else (node, {})
        axis = arguments.get("dim", 0)
        found = self.source(cut, axis) if type(axis) is int else None
        if found is None:
            return None
        size, amount = Leaf(self.leaves[found[0]], found[1]), arguments.get("amount")
        if name in ("split", "chunk"):
            return Derived(_NUM_PIECES[str(name)], (size, amount)) if type(amount) is int else None
        return size

    def number_of_axes(self, node: fx.Node) -> Leaf | Derived | None:
        """How many items a shape has, or a part of one."""
        tensor, part = self.slices.get(node, (self.shapes.get(node), None))
        found = self.source(tensor, "rank")
        if found is None:
            return None
        rank = Leaf(self.leaves[found[0]], "rank")
        return rank if part is None else Derived(_num_in_slice, (rank, part.start, part.stop, part.step))

    # -- whose sizes they are

    def source(self, tensor: Any, axis: Any) -> tuple[fx.Node, Any] | None:
        """The argument, and its axis, whose size a tensor provably has; None if there is no such proof."""
        while isinstance(tensor, fx.Node) and not any(_reshapes_in_place(user) for user in tensor.users):
            if tensor in self.leaves:
                return None if tensor in self.expressions else (tensor, axis)
            if not tensor.args:
                return None
            before, axis = tensor.args[0], self.axis_before(tensor, axis)
            if axis is None:
                return None
            tensor = before
        return None

    def axis_before(self, node: fx.Node, axis: Any) -> Any:
        """The axis of a call's first argument that becomes an axis of its result; None if that cannot be shown."""
        name = str(getattr(node.target, "__name__", node.target)).strip("_")
        if node.op == "call_module":
            return self.axis_before_module(node, submodule(self.module, str(node.target)), axis)
        if name in _SAME_SHAPE:
            return axis
        others = node.args[1:]
        if name in _SAME_SHAPE_WITH_NUMBERS and not any(isinstance(o, fx.Node) for o in others):
            return axis
        if name == "transpose" and _are_from_the_front(axis, *others) and len(others) == 2:
            return {others[0]: others[1], others[1]: others[0]}.get(axis, axis)
        if name == "linear":
            return self.axis_but_last(node, axis)
        return None

    def axis_before_module(self, node: fx.Node, module: nn.Module, axis: Any) -> Any:
        forward = original_class(module).forward
        is_changed = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
        if is_changed or len(node.args) != 1 or node.kwargs:
            return None
        if forward in _SAME_SHAPE_MODULES:
            return axis
        if forward is nn.Linear.forward:
            return self.axis_but_last(node, axis)
        if forward is nn.Embedding.forward and _are_from_the_front(axis):
            return self.axis_within(node.args[0], axis, axis)
        return None

    def axis_but_last(self, node: fx.Node, axis: Any) -> Any:
        if isinstance(axis, str) or axis == -1:
            return axis if axis == "rank" else None
        return self.axis_within(node.args[0], axis, axis + 1) if axis >= 0 else axis

    def axis_within(self, tensor: Any, axis: int, needed: int) -> int | None:
        """The axis, on condition that the argument behind `tensor` has an axis number `needed`."""
        found = self.source(tensor, "rank")
        if found is None:
            return None
        question = Derived(operator.gt, (Leaf(self.leaves[found[0]], "rank"), needed))
        if isinstance(self.known, Actual) and not question.value(self.known):
            return None
        self.conditions[question] = Condition(question, True)
        return axis


def _are_from_the_front(*axes: Any) -> bool:
    return all(type(axis) is int and axis >= 0 for axis in axes)


def _cut(node: fx.Node) -> tuple[Any, dict[str, Any]]:
    """What `unbind`, `split` or `chunk` cuts, and along which axis into what."""
    names = {"unbind": ["dim"]}.get(str(getattr(node.target, "__name__", node.target)), ["amount", "dim"])
    renamed = {"split_size_or_sections": "amount", "split_size": "amount", "chunks": "amount"}
    given = {renamed.get(name, name): value for name, value in node.kwargs.items()}
    return (node.args[0] if node.args else None), {**dict(zip(names, node.args[1:], strict=False)), **given}


def _num_in_slice(length: int, *part: int | None) -> int:
    return len(range(length)[slice(*part)])


def _num_chunks(size: int, chunks: int) -> int:
    return -(-size // max(1, -(-size // chunks)))


_NUM_PIECES = {"split": lambda size, length: -(-size // length), "chunk": _num_chunks}
_SAME_SHAPE = frozenset(
    "relu leaky_relu elu selu gelu silu mish softplus tanh sigmoid hardtanh dropout softmax log_softmax abs exp neg "
    "clone detach contiguous float double half bfloat16 to layer_norm".split()
)
_SAME_SHAPE_WITH_NUMBERS = frozenset("add sub mul truediv pow clamp masked_fill".split())
_SAME_SHAPE_MODULES = frozenset(
    cls.forward
    for cls in (
        *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Identity),
        *(nn.Dropout, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d),
    )
)
_RESHAPING = frozenset(
    "unsqueeze_ squeeze_ t_ transpose_ swapaxes_ swapdims_ resize_ resize_as_ set_ as_strided_ swap_".split()
)


def _reshapes_in_place(user: fx.Node) -> bool:
    return getattr(user.target, "__name__", user.target) in _RESHAPING


# -- sizes given to torch ----------------------------------------------------------------------------------------------


def packed(function: Any) -> Any:
    """A factory that takes its sizes as one tuple where one of them is symbolic: only so torch lets them through."""

    def pack(*args: Any, **kwargs: Any) -> Any:
        return (
            function(args, **kwargs) if any(map(_is_proxy, args[:1])) and len(args) > 1 else function(*args, **kwargs)
        )

    return pack


def packed_method(function: Any) -> Any:
    """A method of tensors that takes its sizes as one tuple where the first of them is symbolic."""

    def pack(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        packs = any(map(_is_proxy, args[:1])) and len(args) > 1
        return function(self, args, **kwargs) if packs else function(self, *args, **kwargs)

    return pack


def _is_proxy(value: Any) -> bool:
    return issubclass(type(value), fx.Proxy)
