"""Reading one forward with torch.fx, shallowly: children stay opaque, every impurity is recorded or refused.

`trace` runs the class's own function on a mirror of the module, with proxies for tensors, and returns the graph, the
guards under which that graph is the forward, and the places it came from. What a graph cannot repeat soundly (control
flow on values, attribute writes, Python's random numbers, `no_grad` blocks ...) raises `Untraceable` with the reason
and the line that caused it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import dis
import inspect
import itertools
import linecache
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer, TraceError
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property

from neuronsurgery.errors import UntraceableError
from neuronsurgery.pytorch.ambient import ambient_untouched
from neuronsurgery.pytorch.calls import Call, Description, contents_of, is_namedtuple, maker, unbind
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.hooks import run_hooks, run_pre_hooks
from neuronsurgery.pytorch.mirroring import (
    Guard,
    Impurity,
    Mirror,
    Reads,
    child_names,
    mirror_of,
    modules_under,
    original_class,
    path_of,
    submodule,
    unswallowed,
)
from neuronsurgery.pytorch.opaque import einops_recorded, is_imported
from neuronsurgery.pytorch.outside import Outside
from neuronsurgery.pytorch.questions import MOST_OUTCOMES, Questions, compares_by_identity, is_fact, own_tensors
from neuronsurgery.pytorch.scalars import Actual, Condition, Known, Scalars, packed, packed_method

__all__ = ["INLINED", "Trace", "is_raised_by_forward", "trace"]

INLINED = "neuronsurgery_inlined"
"""The key of a node's metadata under which stands the path of the inlined child that it comes from."""


@dataclass(frozen=True)
class Trace:
    """A forward as a graph, for one kind of call, and the guards under which it is that forward.

    Where dtypes, devices or shapes decide a branch, it is the graph for some `answers` to the `questions`, nodes of it.
    Those for other answers stand in `others`, and in `refusals` why there is none; guards and conditions are of all.
    """

    graph: fx.Graph
    call: Call
    guards: tuple[Guard, ...]
    conditions: tuple[Condition, ...] = ()
    questions: tuple[fx.Node, ...] = ()
    answers: tuple[bool, ...] = ()
    others: tuple[Trace, ...] = ()
    refusals: tuple[tuple[tuple[bool, ...], UntraceableError], ...] = ()

    @property
    def outcomes(self) -> tuple[Trace, ...]:
        """All the graphs: the one here, and those for other answers."""
        return (self, *self.others)

    @property
    def reads_mode(self) -> bool:
        """Whether the forward asked for `training` anywhere, so that the other mode is another graph."""
        return any(guard.steps == (("attribute", "training"),) for guard in self.guards)


def trace(
    module: nn.Module,
    method: str,
    call: Call,
    *,
    inline: frozenset[str] = frozenset(),
    training: bool | None = None,
    known: Known | None = None,
    runs_hooks: bool = False,
) -> Trace:
    """The graph of `type(module).method` for one kind of call, its children opaque but for those named in `inline`.

    `training` is the mode to trace in, None for the module's own. `known` says where the values of sizes and numbers
    come from that decide what is computed; without it, nothing may depend on them. `runs_hooks` adds calls of the
    hooks that inlined children have, for a graph that will run.

    Raises:
        UntraceableError: the function cannot be read soundly; the error carries reason, file and line.
    """
    found: list[Trace] = []
    refusals: list[tuple[tuple[bool, ...], UntraceableError]] = []
    pending: list[tuple[bool, ...]] = [()]
    while pending:
        prescribed = pending.pop(0)

        def tracer_with(places: frozenset[Any], answers: tuple[bool, ...] = prescribed) -> Tracer:
            scalars = Scalars(module, known, places)
            return Tracer(module, inline, training, scalars, questions=Questions(answers), runs_hooks=runs_hooks)

        questions, outcome = _outcome(tracer_with, method, call)
        if isinstance(outcome, Trace):
            found.append(outcome)
        elif isinstance(known, Actual) or is_raised_by_forward(outcome):  # a call may never come to that branch
            refusals.append((tuple(questions.answers), outcome))
        else:
            raise outcome
        answers = questions.answers
        pending += [(*answers[:place], not answers[place]) for place in range(len(prescribed), len(answers))]
        if len(found) + len(refusals) + len(pending) > MOST_OUTCOMES:
            label = f"{original_class(module).__name__}.{method}"
            raise UntraceableError(f"{label} cannot be traced: dtypes, devices or shapes decide too many branches")
    return _joined(found, refusals)


def _joined(found: list[Trace], refusals: list[tuple[tuple[bool, ...], UntraceableError]]) -> Trace:
    """The outcomes as one trace, under the guards and conditions of all."""
    if not found:
        raise refusals[0][1]
    if not found[0].answers:
        return found[0]
    guards = {(guard.module, guard.steps): guard for each in found for guard in each.guards}
    conditions = {condition.expression: condition for each in found for condition in each.conditions}
    return dataclasses.replace(
        found[0],
        guards=tuple(guards.values()),
        conditions=tuple(conditions.values()),
        others=tuple(found[1:]),
        refusals=tuple(refusals),
    )


def is_raised_by_forward(error: UntraceableError) -> bool:
    """Whether the forward raised the cause itself, as one that checks its input does; no stand-in for a tensor did."""
    cause = error.__cause__
    if isinstance(cause, (ValueError, AssertionError, IndexError, RuntimeError)):
        return not isinstance(cause, RecursionError)
    place = cause.__traceback__ if cause is not None and not isinstance(cause, Impurity) else None
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None or _is_library(place.tb_frame.f_code.co_filename):
        return False
    is_own = not place.tb_frame.f_code.co_filename.startswith(_OWN)
    return is_own and dis.opname[place.tb_frame.f_code.co_code[place.tb_lasti]] == "RAISE_VARARGS"


def _outcome(
    tracer_with: Callable[[frozenset[Any]], Tracer], method: str, call: Call
) -> tuple[Questions, Trace | UntraceableError]:
    """The trace for some answers, or why there is none, and the questions; `tracer_with` takes places of integers."""
    places: frozenset[Any] = frozenset()
    while True:
        has_einops = is_imported()
        tracer = tracer_with(places)
        try:
            return tracer.questions, _traced(tracer, method, call)
        except UntraceableError as error:
            new = frozenset(tracer.scalars.refused[-1:]) - places
            needs_integer = tracer.scalars.known is not None and new and isinstance(error.__cause__, TypeError)
            if not needs_integer and has_einops == is_imported():
                return tracer.questions, error
            places |= new


def _traced(tracer: Tracer, method: str, call: Call) -> Trace:
    module = tracer.module
    function = inspect.getattr_static(original_class(module), method)
    try:
        with unswallowed(), _surroundings(tracer, method), Recording(tracer):
            bound = tracer.placeholders(call)
            result = unbind(function, tracer.mirror, bound)
            tracer.create_node("output", "output", (tracer.create_arg(result),), {})
            tracer.check_unchanged()
    except (Exception, Impurity) as error:  # whatever a forward raises when it meets a proxy is its reason
        raise _untraceable(error, module, method) from error
    guards, conditions = tracer.reads.guards.values(), tracer.scalars.conditions.values()
    asked = tracer.questions
    return Trace(tracer.graph, call, tuple(guards), tuple(conditions), tuple(asked.asked), tuple(asked.answers))


@contextlib.contextmanager
def _surroundings(tracer: Tracer, method: str) -> Iterator[None]:
    """All that is exchanged, noted and put back around a forward; one trace at a time, as it concerns the process."""
    recorded = einops_recorded(tracer.call_opaque)
    with _ALONE, ambient_untouched(), _sizes_packed(), recorded, _outside_untouched(tracer, method):
        yield


_ALONE = threading.RLock()


@contextlib.contextmanager
def _sizes_packed() -> Iterator[None]:
    """Let torch's factories take symbolic sizes one by one, as they take integers."""
    functions = {name: getattr(torch, name) for name in _FACTORIES}
    try:
        for name, function in functions.items():
            setattr(torch, name, packed(function))
        for name in _SIZED_METHODS:
            setattr(Tensor, name, packed_method(getattr(Tensor, name)))
        yield
    finally:
        for name, function in functions.items():
            setattr(torch, name, function)
        for name in _SIZED_METHODS:
            if name in vars(Tensor):  # else an interrupt came first
                delattr(Tensor, name)


_FACTORIES = ("zeros", "ones", "empty", "rand", "randn")
_SIZED_METHODS = ("expand", "new_zeros", "new_ones", "new_empty")  # torch.Tensor inherits them


@contextlib.contextmanager
def _outside_untouched(tracer: Tracer, method: str) -> Iterator[None]:
    """Put back what the forward changed of globals, closures and classes, and refuse it."""
    inlined = [(original_class(submodule(tracer.module, path)), "forward") for path in sorted(tracer.inline)]
    outside = Outside([(original_class(tracer.module), method), *inlined], [type(tracer.mirror)])
    changed = ""
    try:
        yield
    finally:
        changed = outside.put_back()
    if changed:
        raise Impurity(f"changes '{changed}', which lies outside of the module")


def _untraceable(error: Exception | Impurity, module: nn.Module, method: str) -> UntraceableError:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OWN)]
    own = [f for f in frames if not _is_library(f.filename)]
    reason = str(error).split("\n")[0] or type(error).__name__
    if isinstance(error, TraceError):
        reason = f"control flow on tensor values or shapes ({reason})"
    place = (own[-1].filename, own[-1].lineno) if own else (None, None)
    label = f"{original_class(module).__name__}.{method}"
    return UntraceableError(f"{label} cannot be traced: {reason}", *place)


def _is_library(filename: str) -> bool:
    """Whether a file is one of torch's, numpy's, einops's or Python's own, so that no user wrote the line."""
    is_python = filename.startswith((_STANDARD, "<frozen")) and "site-packages" not in filename
    return is_python or any(f"site-packages{os.sep}{name}{os.sep}" in filename for name in _LIBRARIES)


_OWN = os.path.dirname(__file__)
_STANDARD = os.path.dirname(os.__file__)
_LIBRARIES = ("torch", "numpy", "einops")


# -- the tracer ------------------------------------------------------------------------------------------------------


class Tracer(GraphAppendingTracer):
    """Records a forward run on a mirror; torch.fx's own Tracer patches nn.Module for the whole process."""

    def __init__(
        self,
        module: nn.Module,
        inline: frozenset[str],
        training: bool | None,
        scalars: Scalars,
        *,
        questions: Questions,
        runs_hooks: bool,
    ) -> None:
        super().__init__(fx.Graph())
        self.module, self.inline, self.scalars = module, inline, scalars
        self.inlined: list[str] = []
        self.mirror, self.mirrors = mirror_of(module, self, training)
        self.reads = Reads(self.mirrors)
        self.known_tensors: set[fx.Node] = set()
        self.questions, self.runs_hooks = questions, runs_hooks
        self.made: list[tuple[str, Any, tuple[tuple[str, Any], ...], Any]] = []  # dataclasses among the arguments
        self.registered: dict[int, tuple[Tensor, str]] = {}
        for name, tensor in _registered_tensors(module):
            self.registered.setdefault(id(tensor), (tensor, name))

    def mirrored(self, root: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
        for original in modules_under(root):
            if id(original) in self.mirrors and not isinstance(original, torch.jit.ScriptModule):
                yield original, self.mirrors[id(original)]

    def check_unchanged(self) -> None:
        """Refuse a forward that wrote attributes, or into what it read or was given."""
        self.reads.check_unchanged(self.mirrored(self.module))
        for label, made, before, keys in self.made:
            now, items = contents_of(made)
            is_same = len(now) == len(before) and all(now.get(name) is value for name, value in before)
            if not is_same or items != keys:
                raise Impurity(f"writes into '{label}'")

    # what the mirror reports

    def read_attribute(self, module: Mirror, name: str, value: Any) -> Any:
        return self.reads.take(path_of(module), (("attribute", name),), value)

    def read_children(self, module: Mirror) -> None:
        path, steps = path_of(module), (("children", None),)
        if (path, steps) not in self.reads.guards:  # a loop over indices asks at each of them
            self.reads.note(path, steps, child_names(module))  # type: ignore[arg-type]

    def call_module(self, module: Mirror, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = path_of(module)
        if not path:
            raise Impurity("calls itself")
        if path in self.inline:
            with self.inside(path):
                return self.inlined_call(module, path, args, kwargs)
        self.reads.check_unchanged(self.mirrored(submodule(self.module, path)))  # no functional_call at work
        return self.create_proxy("call_module", path, args, kwargs)

    def inlined_call(self, module: Mirror, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A child as part of this graph, its hooks around it as `nn.Module.__call__` runs them."""
        if self.runs_hooks:
            child = self.create_node("get_attr", path, (), {})
            received = child, self.create_arg(args), self.create_arg(kwargs)
            self.create_node("call_function", run_pre_hooks, received, {})
        result = module.forward(*args, **kwargs)
        if self.runs_hooks:
            self.create_node("call_function", run_hooks, (*received, self.create_arg(result)), {})
        return result

    @contextlib.contextmanager
    def inside(self, path: str) -> Iterator[None]:
        """While the forward of an inlined child runs: its nodes say whose they are."""
        self.inlined.append(path)
        try:
            yield
        finally:
            self.inlined.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        if self.inlined:
            node.meta[INLINED] = self.inlined[-1]
        return node

    # what torch reports

    def call_function(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(function, "__name__", "")
        if name == "__set__":
            raise Impurity(f"assigns the '{function.__self__.__name__}' of a tensor")  # type: ignore[attr-defined]
        if name == "_set_grad_enabled":
            raise Impurity("switches gradients on or off inside the forward")
        if name == "__get__":
            return self.read_property(function.__self__.__name__, args[0])  # type: ignore[attr-defined]
        if not is_tensor_method_or_property(function):
            return self.create_proxy("call_function", function, args, kwargs)
        if name in _VALUE_READS:
            raise Impurity(f"reads the values of a tensor ({name.strip('_')})")
        if name in _SHAPE_READS and issubclass(type(args[0]), Tensor):  # a proxy only claims to be one
            return function(*args, **kwargs)
        return self.create_proxy("call_method", name, args, kwargs)

    def call_opaque(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a function of a library as it is, whatever it does."""
        return self.create_proxy("call_function", function, args, kwargs)

    def read_property(self, name: str, tensor: Tensor) -> Any:
        if name in ("shape", "ndim"):
            return getattr(tensor, name)
        if name == "dtype" and compares_by_identity(_users_frame()):
            raise Impurity(_BY_IDENTITY)
        return self.create_proxy("call_function", getattr, (tensor, name), {})

    # what torch.fx asks

    def placeholders(self, call: Call) -> dict[str, Any]:
        return {name: self.placeholder(name, part) for name, part in zip(call.names, call.description, strict=True)}

    def placeholder(self, name: str, part: Description) -> Any:
        kind = part[0]
        if kind == "constant":
            return part[1]
        if kind == "dict":
            entries = {k: self.placeholder(f"{name}_{k}", p) for k, p in zip(part[1], part[2], strict=True)}
            self.reads.watch(name, entries)
            return entries
        if kind in ("tensor", "number"):
            node = self.create_node("placeholder", name, (), {})
            self.known_tensors |= {node} if kind == "tensor" else set()
            self.scalars.add_leaf(node, is_number=kind == "number")
            return self.proxy(node)
        if kind == "object":
            parts = zip(part[2], part[3], strict=True)
            attributes = {key: self.placeholder(f"{name}_{key}", value) for key, value in parts}
            made = maker(part[1], part[2], part[4])(*attributes.values())
            self.made.append((name, made, tuple(attributes.items()), part[4]))
            return made
        items = [self.placeholder(f"{name}_{index}", item) for index, item in enumerate(part[1])]
        if issubclass(kind, list):
            self.reads.watch(name, items)
            return items
        return kind(*items) if is_namedtuple(kind) else kind(items)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if self.gives_tensor(node):
            self.known_tensors.add(node)
        if self.scalars.note(node):
            return ScalarProxy(node, self)
        return TensorProxy(node, self) if node in self.known_tensors else OpaqueProxy(node, self)

    def gives_tensor(self, node: fx.Node) -> bool:
        """Whether a recorded call is known to return one tensor."""
        if node.op == "call_module":
            return isinstance(submodule(self.module, str(node.target)), (nn.Linear, nn.modules.conv._ConvNd))
        name = str(getattr(node.target, "__name__", node.target)).strip("_")
        if name == "getitem":
            base: Any = node.args[0]
            return base in self.known_tensors or getattr(base.target, "__name__", base.target) in _PIECES
        return name in _TENSOR_RESULTS and not self.known_tensors.isdisjoint(node.all_input_nodes)

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if issubclass(kind, fx.Proxy):
            return a.node
        if issubclass(kind, Tensor):
            return self.tensor_node(a)
        if issubclass(kind, (tuple, list)) and kind is not torch.Size:
            items = [self.create_arg(item) for item in a]
            return kind(*items) if is_namedtuple(kind) else (tuple(items) if issubclass(kind, tuple) else items)
        if kind is dict:
            return {self.create_arg(k): self.create_arg(v) for k, v in a.items()}
        if dataclasses.is_dataclass(kind):
            attributes, keys = contents_of(a)
            values = tuple(self.create_arg(value) for value in attributes.values())
            return self.create_node("call_function", maker(kind, tuple(attributes), keys), values, {})
        if kind is collections.OrderedDict:
            return self.create_node("call_function", kind, (list(map(self.create_arg, a.items())),), {})
        if kind is slice:
            return slice(*(self.create_arg(part) for part in (a.start, a.stop, a.step)))
        if kind in _ARGUMENTS or a is Ellipsis or isinstance(a, (torch.Size, range)):
            return a
        raise Impurity(f"passes or returns a {kind.__name__}")

    def tensor_node(self, tensor: Tensor) -> fx.Node:
        known = self.registered.get(id(tensor)) or self.reads.tensors.get(id(tensor))
        if known is None:
            raise Impurity("uses a tensor that is neither an argument nor an attribute of the module")
        node = self.create_node("get_attr", known[1], (), {})
        self.known_tensors.add(node)
        return node

    def to_bool(self, obj: fx.Proxy) -> bool:
        if obj.node in self.scalars.expressions:
            return bool(self.scalars.ask(self.scalars.expressions[obj.node]))
        if is_fact(obj.node):
            return self.answer(obj.node)
        raise Impurity("control flow on tensor values or shapes (a tensor or a size decides a branch)")

    def answer(self, fact: fx.Node) -> bool:
        """Whether something is so of dtypes, devices or shapes: a guard for own tensors, a question for all others."""
        own = own_tensors(fact)
        if own is None:
            return self.questions.answer(fact)
        with torch._C.DisableTorchFunction():  # or asking would be recorded
            values = {node: getattr(self.own_tensor(node.args[0]), str(node.args[1])) for node in own}
        for node, value in values.items():
            owner, _, name = str(node.args[0].target).rpartition(".")  # type: ignore[union-attr]
            self.reads.note(owner, (("attribute", name), ("attribute", str(node.args[1]))), value)
        return bool(_evaluated(fact, values))

    def own_tensor(self, node: Any) -> Tensor:
        known = (*self.registered.values(), *self.reads.tensors.values())
        return next(tensor for tensor, name in known if name == node.target)

    def fact(self, node: fx.Node, name: str, frame: Any) -> Any:
        """What is known of a stand-in's dtype or device since the forward asked; None if nothing is."""
        if name == "dtype" and compares_by_identity(frame):
            raise Impurity(_BY_IDENTITY)
        return self.questions.known(node, name)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        frame = inspect.currentframe()
        assert frame is not None and frame.f_back is not None
        return _unpacked(obj, frame.f_back.f_back) or iter([obj[k] for k in range(self.length(obj))])  # type: ignore[index]

    def length(self, obj: fx.Proxy) -> int:
        """The number of items of a tensor, or of the pieces it was cut into, where it can be known."""
        expression = self.scalars.length(obj.node) if self.scalars.known is not None else None
        if expression is None:
            raise Impurity(
                "control flow on tensor values or shapes (loops over a tensor or a size, or asks its length)"
            )
        return int(self.scalars.ask(expression))


_BY_IDENTITY = "compares a dtype by 'is', which cannot be recorded; '==' can"


def _users_frame() -> Any:
    """The innermost frame of code that is neither this package's nor a library's."""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_OWN) or _is_library(frame.f_code.co_filename)
    ):
        frame = frame.f_back
    return frame


def _evaluated(fact: Any, values: dict[fx.Node, Any]) -> Any:
    """What a fact is, given what the module's tensors answer."""
    if not isinstance(fact, fx.Node) or fact in values:
        return values[fact] if isinstance(fact, fx.Node) else fact
    return fact.target(*fx.map_arg(fact.args, lambda node: _evaluated(node, values)))  # type: ignore[operator]


def _unpacked(obj: Any, frame: Any) -> Iterator[Any] | None:
    """`a, b = proxy` can be recorded, as the bytecode says how many; None for any other iteration."""
    while frame is not None and frame.f_code.co_filename == fx.proxy.__file__:
        frame = frame.f_back
    if frame is not None:
        instructions = {i.offset: i for i in dis.get_instructions(frame.f_code)}
        instruction = instructions.get(frame.f_lasti)
        while instruction is not None and instruction.opname == "CACHE":
            instruction = instructions.get(instruction.offset + 2)
        if instruction is not None and instruction.opname == "UNPACK_SEQUENCE":
            return (obj[index] for index in range(instruction.argval))
    return None


class OpaqueProxy(fx.Proxy):
    """The value of a recorded call, whose type is not known while tracing: a question about it is refused."""

    def __getattr__(self, name: str) -> Any:
        if name in ("dtype", "device"):
            found = self.tracer.fact(self.node, name, sys._getframe(1))  # type: ignore[attr-defined]
            return OpaqueAttribute(self, name) if found is None else found
        return OpaqueAttribute(self, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if not is_type_question(inspect.currentframe()):
            return OpaqueProxy
        raise Impurity("asks for the type of a value that is known only when it runs")

    def __len__(self) -> int:
        return self.tracer.length(self)  # type: ignore[attr-defined, no-any-return]

    def __index__(self) -> int:
        # no Impurity: some of torch's C functions ask, and go on without an answer
        raise TypeError("control flow on tensor values or shapes (Python needs an integer known only when it runs)")

    def __hash__(self) -> int:
        raise Impurity("uses a tensor or a size as a key, or gives it to a function that caches")


class ScalarProxy(OpaqueProxy):
    """A size or a number of the call: Python may ask for its value, and the graph then holds for that value."""

    def ask(self) -> Any:
        """The value, which becomes a condition of the graph."""
        return self.tracer.scalars.ask(self.tracer.scalars.expressions[self.node])  # type: ignore[attr-defined]

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.ask()) if is_type_question(inspect.currentframe()) else ScalarProxy

    def __index__(self) -> int:
        caller = sys._getframe(1)
        scalars: Scalars = self.tracer.scalars  # type: ignore[attr-defined]
        return scalars.integer(scalars.expressions[self.node], (caller.f_code, caller.f_lasti))

    def __int__(self) -> int:
        return int(self.ask())

    def __float__(self) -> float:
        return float(self.ask())

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.ask(), digits)


class TensorProxy(OpaqueProxy):
    """A tensor argument: `isinstance(x, torch.Tensor)` is true of it, as it will be of the argument."""

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "ndim"):
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        if name in ("dtype", "device"):
            found = self.tracer.fact(self.node, name, sys._getframe(1))  # type: ignore[attr-defined]
            return OpaqueAttribute(self, name) if found is None else found
        return super().__getattr__(name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return Tensor if is_type_question(inspect.currentframe()) else TensorProxy


def is_type_question(frame: Any) -> bool:
    """Whether `__class__` is read for Python code that asks for the type: by isinstance, match or attribute access.

    Some of torch's C functions (torch.pow, torch.where ...) read it too, and unpack what claims to be a tensor, which
    ends the process. So the source of the very call that runs decides.

    Raises:
        Impurity: the calling function uses isinstance, and its source is not to be had.
    """
    code, position = frame.f_back.f_code, frame.f_back.f_lasti
    if dis.opname[code.co_code[position]] in ("LOAD_ATTR", "LOAD_METHOD", "MATCH_CLASS"):
        return True
    if "isinstance" not in code.co_names:
        return False
    text = _text_of_call(code, position)
    if not text:
        raise Impurity("asks isinstance of a tensor in a function whose source is not to be had")
    return text.startswith("isinstance(")


def _text_of_call(code: Any, position: int) -> str:
    """The source that the instruction at a position comes from, up to the end of its first line; "" if unknown."""
    if sys.version_info < (3, 11):
        return ""
    line, _, column, _ = next(itertools.islice(code.co_positions(), position // 2, None))
    lines = linecache.getlines(code.co_filename)
    if line is None or column is None or line > len(lines):
        return ""
    text: str = lines[line - 1].encode()[column:].decode()
    return text


class OpaqueAttribute(fx.proxy.Attribute):
    """An attribute of a proxy, or a method about to be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.attr in _VALUE_READS:
            raise Impurity(f"reads the values of a tensor ({self.attr})")
        return super().__call__(*args, **kwargs)


_VALUE_READS = frozenset(
    "item tolist numpy __bool__ __int__ __float__ __index__ __complex__ __contains__ __array__ backward "
    "register_hook requires_grad_ retain_grad data_ptr __iter__ storage untyped_storage __reduce_ex__ "
    "__deepcopy__ __dlpack__ set_".split()
)
_SHAPE_READS = frozenset(
    "size dim ndimension numel nelement __len__ stride is_floating_point is_complex element_size __hash__".split()
)
_TENSOR_RESULTS = frozenset(
    "add sub mul truediv neg pow matmul abs exp linear conv1d conv2d conv3d relu leaky_relu elu gelu silu tanh sigmoid "
    "softplus dropout view reshape flatten transpose permute squeeze unsqueeze cat stack float detach clone "
    "rearrange reduce repeat einsum".split()
)
_PIECES = frozenset({"unbind", "split", "chunk"})
_ARGUMENTS = frozenset(
    {int, float, complex, str, bool, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
)


class Recording(TorchFunctionMode):
    """Sends every torch function called inside it to the tracer, also those without a proxy (factories, parameters)."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.tracer.call_function(func, args, kwargs or {})


def _registered_tensors(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Each parameter and buffer once, by its first qualified name; frozen rows are none of the forward's business."""
    for prefix, module in root.named_modules():
        if not isinstance(module, Composite):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    yield (f"{prefix}.{name}" if prefix else name), tensor
