"""Which operations act on each unit alone, and which activation function a module or a node applies.

An activation function is recognized by the torch function it ends in, whether it was called as a module, a function
or a method. Free functions may become composites anywhere; the range of the others carries meaning (a sigmoid gate,
a tanh head, an `abs` that keeps a mixer monotone), so they are sites only where every use passes another producer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from neuronsurgery.errors import UntraceableError
from neuronsurgery.pytorch.calls import default_call
from neuronsurgery.pytorch.mirroring import Guard, original_class
from neuronsurgery.pytorch.tracing import trace
from neuronsurgery.pytorch.unitwise import (
    IDENTITY,
    Earlier,
    Kind,
    PerUnit,
    Step,
    UnitFunction,
    qualified_name,
)

__all__ = ["canonical_name", "function_of_module", "function_of_node"]

FREE = frozenset(
    "relu leaky_relu prelu elu selu celu gelu silu mish hardswish softshrink hardshrink tanhshrink threshold".split()
)
RANGE_BEARING = frozenset(
    "abs absolute arctan asinh arcsinh atan clamp clamp_max clamp_min clip cos cosh erf erfc exp exp2 expit expm1 "
    "hardsigmoid hardtanh log log10 log1p log2 logit logsigmoid pow reciprocal relu6 rsqrt sigmoid sign "
    "sin sinc sinh softplus softsign sqrt square tan tanh".split()
)
NEUTRAL = frozenset("add sub subtract mul multiply div divide truediv neg negative contiguous clone identity".split())
ALIASES = {"_threshold": "threshold", "log_sigmoid": "logsigmoid"}
COUPLING = frozenset("softmax log_softmax softmin glu normalize layer_norm group_norm rms_norm batch_norm".split())
RANDOM = frozenset("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout rrelu".split())


def function_of_node(node: fx.Node, value: fx.Node) -> UnitFunction | str:
    """The unit-wise function that `node` applies to `value`, or the reason why it is none."""
    name = canonical_name(node)
    if name not in FREE | RANGE_BEARING | NEUTRAL:
        return _why_not(name)
    parameters: list[str] = []
    try:
        step = _step(node, {value: Earlier(0)}, parameters)
    except LookupError:
        return f"another tensor enters at '{name}', between producer and activation"
    return UnitFunction((step,), name, kind_of(name), tuple(parameters))


def function_of_module(module: nn.Module) -> UnitFunction | str:
    """The unit-wise function a module applies to its single input, or the reason why it is none."""
    if isinstance(module, nn.Identity):
        return IDENTITY
    if isinstance(module, torch.jit.ScriptModule):
        return "a scripted module"
    likeness = _likeness(module)
    for guards, known in _KNOWN.get(likeness, ()):
        if all(guard.holds(module) for guard in guards):
            return known
    call = default_call(module)
    if [part for part in call.description if part == ("tensor",)] != [("tensor",)]:
        return f"{original_class(module).__name__} takes other than one tensor"
    try:
        traced = trace(module, "forward", call)
    except UntraceableError as error:
        return f"{original_class(module).__name__} is not unit-wise ({error.reason})"
    found = _function_of_graph(traced.graph, original_class(module).__name__)
    if likeness is not None:
        alike = _KNOWN.setdefault(likeness, [])
        del alike[: -_MOST_ALIKE + 1]
        alike.append((traced.guards, found))
    return found


_KNOWN: dict[Any, list[tuple[tuple[Guard, ...], UnitFunction | str]]] = {}
"""What was found of torch's own modules, and the guards under which the next one like them is the same."""
_MOST_ALIKE = 16  # settings of one class that are kept (slopes, modes)


def _likeness(module: nn.Module) -> Any:
    """What a trace may depend on beside its guards; None for a user's class, which may read anything."""
    cls = original_class(module)
    if cls.__module__.partition(".")[0] != "torch" or module._modules:
        return None
    tensors = (*module._parameters.items(), *module._buffers.items())
    return cls, cls.forward, tuple((name, None if t is None else (t.shape, t.dtype)) for name, t in tensors)


def _function_of_graph(graph: fx.Graph, label: str) -> UnitFunction | str:
    """A graph of one input whose every operation is unit-wise, as a unit function."""
    values: dict[fx.Node, Any] = {}
    steps: list[Step] = []
    names: list[str] = []
    parameters: list[str] = []
    result: Any = None
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = Earlier(0)
        elif node.op == "output":
            result = node.args[0]
        elif node.op in ("call_function", "call_method"):
            name = canonical_name(node)
            if name not in FREE | RANGE_BEARING | NEUTRAL:
                return _why_not(name)
            try:
                steps.append(_step(node, values, parameters))
            except LookupError:
                return f"{label} is not unit-wise"
            values[node] = Earlier(len(steps))
            names.append(name)
        elif node.op == "call_module":
            return f"{label} is not unit-wise"
    if result not in values or values[result] != Earlier(len(steps)):
        return f"{label} is not unit-wise"
    return _classified(tuple(steps), names, tuple(parameters), label)


def _classified(
    steps: tuple[Step, ...], names: list[str], parameters: tuple[str, ...], label: str
) -> UnitFunction | str:
    nonlinear = [name for name in names if name not in NEUTRAL]
    products = [s for s in steps if sum(isinstance(a, Earlier) for a in s.args) > 1]
    if not nonlinear and not products:
        return UnitFunction(steps, label, Kind.NEUTRAL, parameters)
    if len(nonlinear) == 1 and not products:
        return UnitFunction(steps, nonlinear[0], kind_of(nonlinear[0]), parameters)
    return UnitFunction(steps, label, Kind.RANGE_BEARING, parameters)  # compound: its range is not known


def _step(node: fx.Node, values: dict[fx.Node, Any], parameters: list[str]) -> Step:
    """A node as a step; LookupError if it is no function of torch, or takes a tensor from elsewhere.

    Whether it works in place does not matter to the rows of a bank.
    """
    name = canonical_name(node)
    function = qualified_name(node.target, name, node.op == "call_method")
    if function is None:
        raise LookupError(name)
    convert = _arguments(values, parameters, name)
    kwargs = {key: convert(value) for key, value in node.kwargs.items() if key != "inplace"}
    return Step(function, tuple(map(convert, node.args)), tuple(kwargs.items()))


def _arguments(values: dict[fx.Node, Any], parameters: list[str], name: str) -> Callable[[Any], Any]:
    """How an argument of a node reads as an argument of a step; LookupError for a tensor from elsewhere."""

    def convert(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        if argument in values:
            return values[argument]
        if argument.op == "get_attr" and name == "prelu":
            parameters.append(str(argument.target))
            return PerUnit(len(parameters) - 1)
        raise LookupError(argument)

    return convert


def kind_of(name: str) -> Kind:
    """Whether a unit-wise function is free, range-bearing, or no nonlinearity at all."""
    if name in NEUTRAL:
        return Kind.NEUTRAL
    return Kind.FREE if name in FREE else Kind.RANGE_BEARING


def canonical_name(node: fx.Node) -> str:
    """`relu` for F.relu, torch.relu_, x.relu() and nn.ReLU's own call alike; `expit` for torch.special.expit."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    name = name.strip("_") if name.startswith("__") else name.rstrip("_").removeprefix("special_")
    return ALIASES.get(name, name)


def _why_not(name: str) -> str:
    if name in COUPLING:
        return f"'{name}' couples units"
    if name in RANDOM:
        return f"'{name}' is random"
    return f"no activation function: '{name}' reads it first"
