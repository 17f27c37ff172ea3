"""Which operations act on each unit alone, and which link of a path a module or a function of a graph is.

An activation function is recognized by the torch function it ends in, whether it was called as a module, a function
or a method; one written out (`z * sigmoid(z)`) by its values. Free functions may become composites anywhere; the
range of the others carries meaning (a sigmoid gate, a tanh head, an `abs` that keeps a mixer monotone), so they are
sites only where every use passes another producer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from neuronsurgery.errors import UntraceableError
from neuronsurgery.pytorch.calls import default_call
from neuronsurgery.pytorch.hooks import is_hook_call
from neuronsurgery.pytorch.links import BatchNorm, Dropout, Link, Move, Norm, Reshape, SyncBatchNorm, UnitFunction
from neuronsurgery.pytorch.mirroring import Guard, original_class, submodule
from neuronsurgery.pytorch.tracing import trace
from neuronsurgery.pytorch.unit_axes import UnitAxes
from neuronsurgery.pytorch.unitwise import Earlier, Kind, Other, PerUnit, Step, evaluate, qualified_name

__all__ = [
    "OwnTensor",
    "UnitShape",
    "UnitSteps",
    "canonical_name",
    "function_of_module",
    "is_metadata",
    "is_unitwise",
    "link_of_function",
    "link_of_module",
    "why_not",
]

FREE = frozenset(
    "relu leaky_relu prelu elu selu celu gelu silu mish hardswish softshrink hardshrink tanhshrink threshold".split()
)
RANGE_BEARING = frozenset(
    "abs absolute arctan asinh arcsinh atan clamp clamp_max clamp_min clip cos cosh erf erfc exp exp2 expit expm1 "
    "hardsigmoid hardtanh log log10 log1p log2 logit logsigmoid pow reciprocal relu6 rsqrt sigmoid sign "
    "sin sinc sinh softplus softsign sqrt square tan tanh maximum minimum".split()
)
NEUTRAL = frozenset(
    "add sub subtract mul multiply div divide truediv neg negative contiguous clone identity float double half "
    "bfloat16 to type_as masked_fill where".split()
)
COMPARISONS = frozenset("gt ge lt le eq ne greater greater_equal less less_equal".split())
ALIASES = {"_threshold": "threshold", "log_sigmoid": "logsigmoid", "rsub": "sub"} | {
    f"i{name}": name for name in ("add", "sub", "mul", "truediv")
}
COUPLING = frozenset("softmax log_softmax softmin glu normalize batch_norm instance_norm local_response_norm".split())
RANDOM = frozenset("alpha_dropout feature_alpha_dropout rrelu bernoulli".split())
SCALING = frozenset("mul multiply div divide truediv".split())
METADATA = frozenset(
    "size dim shape numel getattr stride is_floating_point ndimension device dtype type is_contiguous".split()
)
MOVES = {"transpose": "transpose", "swapaxes": "transpose", "swapdims": "transpose", "permute": "permute"} | {
    "movedim": "movedim",
    "moveaxis": "movedim",
}
DROPOUTS = frozenset("dropout dropout1d dropout2d dropout3d".split())


# -- where the units are ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class UnitShape:
    """The axes of a pre-activation that number its units, counted from the end, and how many there are along each."""

    axes: tuple[int, ...] | None  # None: not known, past a transpose of axes counted from the front
    sizes: tuple[int, ...]
    is_stacked: bool = False  # rows have theirs on the last axis instead

    def axes_of(self, tensor: Tensor) -> UnitAxes | None:
        """Where the units are in a tensor that has one value for each and broadcasts; None for any other."""
        if self.axes is None or any(-axis > tensor.dim() for axis in self.axes):
            return None
        sizes = tuple(tensor.shape[axis] for axis in self.axes)
        if sizes != self.sizes or tensor.numel() != functools.reduce(int.__mul__, sizes):
            return None
        return UnitAxes(tuple(axis + tensor.dim() for axis in self.axes))

    def past(self, link: Link) -> UnitShape:
        """The same past a link."""
        if not isinstance(link, Move) or self.axes is None:
            return self
        is_from_end = link.name != "permute" and all(int(a) < 0 for a in link.arguments)
        if link.name != "permute" and not is_from_end:
            return replace(self, axes=None)
        num_axes = len(link.arguments[0]) if link.name == "permute" else 16
        return replace(self, axes=tuple(link.axis_after(axis, num_axes) for axis in self.axes))


@dataclass(frozen=True, eq=False)
class OwnTensor:
    """A tensor of the path: its label, its path in the scope, and where its units are; None: one value for all.

    `fresh` is what a fresh one holds where no module's own initializer says so; None: the layer's mean.
    """

    label: str
    path: str
    tensor: Tensor
    axes: UnitAxes | None
    fresh: float | None = None


# -- modules ---------------------------------------------------------------------------------------------------------


def link_of_module(module: nn.Module, shape: UnitShape) -> tuple[Link, tuple[OwnTensor, ...]] | str:
    """The link that a module with a single input is, with its own tensors (paths in the module), or why it is none."""
    forward: Any = getattr(original_class(module), "forward", None)
    if isinstance(module, nn.Identity):
        return UnitFunction((), "identity", Kind.NEUTRAL), ()
    if forward in _DROPOUTS:
        return Dropout(), ()
    if forward in _BATCH_NORMS:
        return _batch_norm(module, shape)
    if forward in _NORMS:
        name, setting = _NORMS[forward]
        size: Any = getattr(module, setting)
        weights = [("weight", module._parameters.get("weight")), ("bias", module._parameters.get("bias"))]
        return _norm(name, (size,) if isinstance(size, int) else tuple(size), module.eps, weights, shape)  # type: ignore[arg-type]
    found = function_of_module(module, shape)
    if isinstance(found, str):
        return found
    return found.link(), tuple(found.own)


_DROPOUTS = {kind.forward for kind in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)}
_BATCH_NORMS = {
    nn.BatchNorm1d.forward: False,
    nn.SyncBatchNorm.forward: False,
    nn.InstanceNorm1d.forward: True,
}
_NORMS: dict[Any, tuple[str, str]] = {
    nn.LayerNorm.forward: ("layer_norm", "normalized_shape"),
    nn.RMSNorm.forward: ("rms_norm", "normalized_shape"),
    nn.GroupNorm.forward: ("group_norm", "num_groups"),
}


def _batch_norm(module: Any, shape: UnitShape) -> tuple[Link, tuple[OwnTensor, ...]] | str:
    label = original_class(module).__name__
    is_instance = _BATCH_NORMS[original_class(module).forward]
    if shape.is_stacked or module.num_features != shape.sizes[-1]:
        return f"{label} normalizes {module.num_features} features, which are not its units"
    if is_instance and shape.axes == (-1,):
        return f"{label} couples the units of a linear layer"
    tensors = {**module._parameters, **module._buffers}
    labels = [n for n in ("weight", "bias", "running_mean", "running_var") if tensors.get(n) is not None]
    own = tuple(OwnTensor(name, name, tensors[name], UnitAxes()) for name in labels)
    is_synced = original_class(module).forward is nn.SyncBatchNorm.forward
    return (SyncBatchNorm if is_synced else BatchNorm)(label, tuple(labels), module.eps, is_instance), own


def _norm(
    name: str,
    size: tuple[int, ...],
    eps: float | None,
    weights: Iterable[tuple[str, Tensor | None]],
    shape: UnitShape,
) -> tuple[Link, tuple[OwnTensor, ...]] | str:
    """A coupling normalization of the units: layer and root mean square over the last axes, or over groups."""
    if shape.is_stacked or shape.axes is None:
        return f"'{name}' over units that are numbered by several axes, or moved"
    axis, num_units = shape.axes[0], shape.sizes[0]
    if name != "group_norm" and (-axis > len(size) or size[axis] != num_units):
        return f"'{name}' over axes {size} couples other values than its units"
    own = []
    for label, tensor in weights:
        if tensor is not None:
            if name == "group_norm" and tensor.numel() != num_units:
                return f"'{name}' normalizes {tensor.numel()} channels, which are not its {num_units} units"
            own.append(OwnTensor(label, label, tensor, UnitAxes((max(tensor.dim() + axis, 0),))))
    return Norm(name, size, eps, tuple(each.label for each in own)), tuple(own)


def function_of_module(module: nn.Module, shape: UnitShape | None = None) -> UnitSteps | str:
    """The unit-wise function a module applies to its single input, or the reason why it is none."""
    shape = UnitShape(None, ()) if shape is None else shape
    if isinstance(module, torch.jit.ScriptModule):
        return "a scripted module"
    if any(parameter.numel() > max(parameter.shape, default=1) for parameter in module.parameters()):
        return f"{original_class(module).__name__} is not unit-wise"  # it holds matrices: no need to trace it
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
    if traced.answers:
        return f"{original_class(module).__name__} is another function for another dtype or device"
    found = _function_of_graph(traced.graph, module, shape)
    if likeness is not None:
        alike = _KNOWN.setdefault(likeness, [])
        del alike[: -_MOST_ALIKE + 1]
        alike.append((traced.guards, found))
    return found


_KNOWN: dict[Any, list[tuple[tuple[Guard, ...], UnitSteps | str]]] = {}
"""What was found of torch's own modules, and the guards under which the next one like them is the same."""
_MOST_ALIKE = 16  # settings of one class that are kept (slopes, modes)


def _likeness(module: nn.Module) -> Any:
    """What a trace may depend on beside its guards; None for a user's class, and where there are tensors of its own."""
    cls = original_class(module)
    if cls.__module__.partition(".")[0] != "torch" or module._modules or module._parameters or module._buffers:
        return None
    return cls, cls.forward


def _function_of_graph(graph: fx.Graph, module: nn.Module, shape: UnitShape) -> UnitSteps | str:
    """A graph of one input whose every operation is unit-wise, as steps."""
    label = original_class(module).__name__
    steps = UnitSteps(module, shape, label)
    for node in graph.nodes:
        if node.op == "placeholder":
            steps.enter(node)
        elif node.op == "output":
            if node.args[0] is not steps.last:
                return f"{label} is not unit-wise"
        elif node.op == "call_module":
            return f"{label} is not unit-wise"
        elif node.op != "get_attr":
            if not is_unitwise(node):
                return why_not(node)
            if problem := steps.add(node):
                return problem
    if any(other.op != "get_attr" for other in steps.others):
        return f"{label} is not unit-wise"
    return steps


# -- functions -------------------------------------------------------------------------------------------------------


def link_of_function(
    node: fx.Node, value: fx.Node, scope: nn.Module, shape: UnitShape
) -> tuple[Link, tuple[OwnTensor, ...]] | str | None:
    """The norm, dropout or move that a node applies to a value, why it cannot be one, or None: another function."""
    name = canonical_name(node)
    if name in DROPOUTS:
        return (Dropout(), ()) if node.args[:1] == (value,) else f"'{name}' of something else"
    if name in MOVES:
        arguments = node.args[1:]
        if name == "permute":
            arguments = arguments if isinstance(arguments[0], (tuple, list)) else (arguments,)
        if shape.is_stacked or node.kwargs or not all(isinstance(a, (int, tuple, list)) for a in arguments):
            return f"no activation function: '{name}' reads it first"
        return Move(MOVES[name], tuple(arguments)), ()
    if name in ("view", "reshape", "unsqueeze", "flatten") and _keeps_units_last(name, node, shape):
        return Reshape(name, shape.sizes[0]), ()
    if name in ("layer_norm", "group_norm", "rms_norm"):
        return _norm_function(name, node, value, scope, shape)
    return None


def _keeps_units_last(name: str, node: fx.Node, shape: UnitShape) -> bool:
    """Whether a new shape leaves the units alone on the last axis, as far as its arguments say."""
    if shape.is_stacked or shape.axes != (-1,) or node.kwargs:
        return False
    if name in ("view", "reshape"):
        sizes = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        return bool(sizes) and isinstance(sizes[-1], int) and sizes[-1] == shape.sizes[0]
    if name == "unsqueeze":
        return isinstance(node.args[1], int) and node.args[1] != -1
    return len(node.args) == 3 and isinstance(node.args[2], int) and node.args[2] != -1


def _norm_function(
    name: str, node: fx.Node, value: fx.Node, scope: nn.Module, shape: UnitShape
) -> tuple[Link, tuple[OwnTensor, ...]] | str:
    names = ("input", "size", "weight", "bias", "eps") if name != "rms_norm" else ("input", "size", "weight", "eps")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    size = given.get("size", given.get("normalized_shape", given.get("num_groups")))
    weights = [(label, _attribute(given.get(label), scope)) for label in ("weight", "bias")]
    computed = any(isinstance(given.get(label), fx.Node) and found is None for label, found in weights)
    computed |= node.args[:1] != (value,)
    eps = given.get("eps", None if name == "rms_norm" else 1e-5)
    if computed or isinstance(eps, fx.Node) or not isinstance(size, (int, tuple, list, torch.Size)):
        return f"'{name}' couples units, with settings that are computed"
    found = _norm(name, (size,) if isinstance(size, int) else tuple(size), eps, weights, shape)
    if isinstance(found, str):
        return found
    link, own = found
    return link, tuple(replace(each, path=str(given[each.label].target)) for each in own)


def _attribute(argument: Any, scope: nn.Module) -> Tensor | None:
    """The tensor of the scope that an argument reads directly, else None."""
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    owner, _, name = str(argument.target).rpartition(".")
    found = getattr(submodule(scope, owner), name)
    return found if isinstance(found, Tensor) else None


class UnitSteps:
    """Collects the operations between one value and one result, each unit-wise, as the steps of a unit function."""

    def __init__(self, scope: nn.Module, shape: UnitShape, label: str = "") -> None:
        self.scope, self.shape, self.label = scope, shape, label
        self.values: dict[fx.Node, Earlier] = {}
        self.steps: list[Step] = []
        self.names: list[str] = []
        self.own: list[OwnTensor] = []
        self.others: list[fx.Node] = []
        self.last: fx.Node | None = None

    def enter(self, value: fx.Node) -> None:
        """The value that the steps start from."""
        self.values[value] = Earlier(0)
        self.last = value

    def add(self, node: fx.Node) -> str:
        """Take a node in as a step; the reason why it cannot be one, or ""."""
        name = canonical_name(node)
        function = qualified_name(node.target, name, node.op == "call_method")
        if function is None:
            return f"no activation function: '{name}' reads it first"
        if name in SCALING and any(self._is_computed(a) for a in (*node.args, *node.kwargs.values())):
            return f"'{name}' multiplies it with a computed tensor: its incoming weights are generated"
        args = tuple(self._argument(argument, name) for argument in node.args)
        kwargs = tuple((key, self._argument(a, name)) for key, a in node.kwargs.items() if key != "inplace")
        self._take(node, Step(function, args, kwargs), name)
        return ""

    def add_module(self, node: fx.Node, function: UnitSteps) -> None:
        """Take in a module's unit-wise function of one of the values."""
        path, shift = str(node.target), len(self.steps)
        entered = self.values[node.args[0]]  # type: ignore[index]

        def moved(a: Any) -> Any:
            if isinstance(a, Earlier):
                return Earlier(a.index + shift) if a.index else entered
            return PerUnit(a.index + num_own) if isinstance(a, PerUnit) else a

        num_own = len(self.own)
        self.own += [replace(each, path=f"{path}.{each.path}") for each in function.own]
        for step, name in zip(function.steps, function.names, strict=True):
            kwargs = tuple((key, moved(a)) for key, a in step.kwargs)
            self._take(node, Step(step.function, tuple(map(moved, step.args)), kwargs), name)
        if not function.steps:
            self.values[node], self.last = entered, node

    def _take(self, node: fx.Node, step: Step, name: str) -> None:
        self.steps.append(step)
        self.names.append(name)
        self.values[node] = Earlier(len(self.steps))
        self.last = node

    def _is_computed(self, argument: Any) -> bool:
        return isinstance(argument, fx.Node) and argument not in self.values and argument.op != "get_attr"

    def _argument(self, argument: Any, name: str) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        if argument in self.values:
            return self.values[argument]
        tensor = _attribute(argument, self.scope)
        if isinstance(tensor, nn.Parameter):
            is_slope = name == "prelu" and tensor.numel() > 1
            axes = UnitAxes() if is_slope else None if name == "prelu" else self.shape.axes_of(tensor)
            if axes is not None or tensor.numel() == 1:
                fresh = _FRESH.get(name)
                self.own.append(OwnTensor(str(argument.target), str(argument.target), tensor, axes, fresh))
                return PerUnit(len(self.own) - 1)
        if argument not in self.others:
            self.others.append(argument)
        return Other(self.others.index(argument))

    @property
    def kind(self) -> Kind:
        """Whether the whole may become composites anywhere."""
        return self._named()[1]

    @property
    def name(self) -> str:
        """The activation function, or what the whole is called."""
        return self._named()[0]

    def _named(self) -> tuple[str, Kind]:
        nonlinear = [name for name in self.names if name not in NEUTRAL]
        products = [s for s in self.steps if sum(isinstance(a, Earlier) for a in s.args) > 1]
        if not nonlinear and not products:
            return self.label or (self.names[-1] if self.names else "identity"), Kind.NEUTRAL
        if len(nonlinear) == 1 and not products:
            return nonlinear[0], Kind.FREE if nonlinear[0] in FREE else Kind.RANGE_BEARING
        known = "" if self.own or self.others else _known_by_values(tuple(self.steps))
        if known:
            return known, Kind.FREE
        return self.label or self.names[-1], Kind.RANGE_BEARING  # compound: its range is not known

    def link(self) -> UnitFunction:
        """The steps as a link; tensors are labeled by their last name, the same in every scope that reaches it."""
        labels = tuple(each.label.rsplit(".", 1)[-1] for each in self.own)
        live = tuple(str(other.target) for other in self.others) if self.label else ()
        name, kind = self._named()
        per_unit = tuple(each.axes is not None for each in self.own)
        return UnitFunction(tuple(self.steps), name, kind, labels, live, len(self.others), per_unit)


_FRESH = {"add": 0.0, "sub": 0.0, "subtract": 0.0, "prelu": 0.25}
"""What is added to a fresh unit's pre-activation, and the slope that torch gives a fresh PReLU."""


@functools.lru_cache(maxsize=512)
def _known_by_values(steps: tuple[Step, ...]) -> str:
    """The free function that steps without tensors of their own compute, told by its values; "" if it is none."""
    grid = torch.linspace(-6.0, 6.0, 97, dtype=torch.float64)
    try:
        values = evaluate(steps, grid.clone(), (), (), -1)
    except (RuntimeError, TypeError, ValueError):
        return ""
    for name, function in _FREE_BY_VALUES:
        if values.shape == grid.shape and torch.allclose(values.double(), function(grid), rtol=0, atol=1e-6):
            return name
    return ""


_FREE_BY_VALUES: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = (
    ("relu", F.relu),
    ("silu", F.silu),
    ("gelu", F.gelu),
    ("gelu", functools.partial(F.gelu, approximate="tanh")),
    ("gelu", lambda z: z * torch.sigmoid(1.702 * z)),
    ("mish", F.mish),
    ("hardswish", F.hardswish),
    ("elu", F.elu),
    ("selu", F.selu),
    *(("leaky_relu", functools.partial(F.leaky_relu, negative_slope=slope)) for slope in (0.01, 0.1, 0.2)),
)


def is_unitwise(node: fx.Node) -> bool:
    """Whether a node's function acts on each element alone, once it is known what its arguments are."""
    if node.op not in ("call_function", "call_method"):
        return False
    return canonical_name(node) in FREE | RANGE_BEARING | NEUTRAL | COMPARISONS


def is_metadata(node: fx.Node) -> bool:
    """Whether a node asks a tensor for its shape, dtype or device only, or shows it to a hook that changes nothing."""
    if is_hook_call(node):
        return True
    if node.op not in ("call_function", "call_method") or canonical_name(node) not in METADATA:
        return False
    return not (
        canonical_name(node) == "getattr" and node.args[1] in ("T", "mT", "H", "mH", "data", "grad", "real", "imag")
    )


def canonical_name(node: fx.Node) -> str:
    """`relu` for F.relu, torch.relu_, x.relu() and nn.ReLU's own call alike; `expit` for torch.special.expit."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    name = name.strip("_") if name.startswith("__") else name.rstrip("_").removeprefix("special_")
    return ALIASES.get(name, name)


def why_not(node: fx.Node) -> str:
    """Why a function is no link of a path."""
    name = canonical_name(node)
    if name in COUPLING:
        return f"'{name}' couples units"
    if name in RANDOM:
        return f"'{name}' is random"
    return f"no activation function: '{name}' reads it first"
