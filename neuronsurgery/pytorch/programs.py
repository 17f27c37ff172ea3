"""Rewritten forwards: the generated classes that make banks take effect, while the object stays the user's own.

One subclass per (class, program) is generated and cached. A scope's functions choose a graph by the kind of call and by
the guards of the trace, tracing the original again when a new kind arrives. In a Sequential the children do the work
themselves, so that it stays a loop over them, and slices, appended children and loops of the user's own behave: a
producer's output carries its frozen rows along, and the activation function behind it adds them in.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import fx, nn

from neuronsurgery.errors import SurgeryError, UntraceableError
from neuronsurgery.pytorch.assuming import default_traces
from neuronsurgery.pytorch.branching import branching
from neuronsurgery.pytorch.calls import Call, default_call, describe, is_namedtuple, numbers_of_starred
from neuronsurgery.pytorch.carrying import FORWARDS, Role
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.fused import overrides
from neuronsurgery.pytorch.insertion import Rewrite, insert_banks
from neuronsurgery.pytorch.mirroring import GENERATED, Guard, class_without_rewrite, original_class, submodule
from neuronsurgery.pytorch.scalars import Actual, Condition
from neuronsurgery.pytorch.tracing import Trace, trace

__all__ = ["Program", "generated_class", "rewritten_class"]


@dataclass(frozen=True)
class Program:
    """What a generated class does: its role, and as a scope its sites, the methods concerned and what it inlines."""

    role: Role
    rewrites: tuple[Rewrite, ...] = ()
    methods: tuple[str, ...] = ()
    inline: frozenset[str] = frozenset()
    is_open: bool = False  # a Sequential inside another, which may end between a producer and its activation
    present: frozenset[str] = frozenset()  # the children and parameters that there are, which a forward may ask


def rewritten_class(instance: nn.Module, program: Program) -> type[nn.Module]:
    """The generated class for an instance, with the graphs of its default calls ready in both modes.

    Raises:
        UntraceableError: the default call cannot be traced with these sites.
    """
    if program.methods:
        program = replace(program, present=frozenset(_present(instance, program.inline)))
    cls = generated_class(cast(Any, class_without_rewrite(instance)), program)
    for entry in cls._neuronsurgery_entries.values():  # type: ignore[attr-defined]
        entry.prepare(instance)
    return cls


def _present(instance: nn.Module, inline: frozenset[str]) -> Iterator[str]:
    """What a scope and the children that its graphs take in have: instances that differ in it share no graph."""
    for path in ("", *inline):
        module = submodule(instance, path)
        for name, value in (*module._modules.items(), *module._parameters.items(), *module._buffers.items()):
            if value is not None and not isinstance(value, Composite):
                yield f"{path}.{name}" if path else name


@functools.cache
def generated_class(cls: Any, program: Program) -> type:
    """The subclass of `cls` that runs `program`; one for all instances, so that compiled code and pickles agree."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    own = FORWARDS.get(program.role)
    methods = [method for method in program.methods if own is None or method != "forward"]
    entries = {method: Entry(cls, method, program) for method in methods}
    namespace: dict[str, Any] = {
        **names,
        "_neuronsurgery_original": cls,
        "_neuronsurgery_program": program,
        "_neuronsurgery_entries": entries,
        **{method: entry.function() for method, entry in entries.items()},
    }
    if own is not None:
        namespace["forward"] = own(cls.forward)
    has_banks = any(rewrite.bank is not None for rewrite in program.rewrites)
    namespace |= overrides(cls, program.methods, has_banks, namespace.get("forward", cls.forward))
    generated: type[nn.Module] = type(cls)(cls.__name__, (Rewritten, cls), namespace)
    setattr(generated, GENERATED, generated)
    return generated


class Rewritten(nn.Module):
    """The first base of every generated class: pickling and copying go through the original class.

    It derives from nn.Module only so that instances keep their layout and their class can be exchanged.
    """

    _neuronsurgery_original: type[nn.Module]
    _neuronsurgery_program: Program

    def __init_subclass__(cls) -> None:
        """Not passed on: generating a class must not run the user's subclass hook."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        cls, original = type(self), self._neuronsurgery_original
        arguments = tuple(original if argument is cls else argument for argument in reduced[1])
        return (_rebuilt, (self._neuronsurgery_program, reduced[0], arguments), *reduced[2:])


def _rebuilt(program: Program, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Make an instance as its original class would, then exchange the class."""
    instance = function(*arguments)
    object.__setattr__(instance, "__class__", generated_class(cast(Any, class_without_rewrite(instance)), program))
    return instance


# -- graphs ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Graph:
    """A compiled graph, and the guards and the conditions on sizes and numbers under which it is the forward."""

    guards: tuple[Guard, ...]
    conditions: tuple[Condition, ...]
    run: Callable[..., Any]


@dataclass(eq=False)
class Entry:
    """One rewritten function of a generated class, with a graph per kind of call."""

    cls: type
    method: str
    program: Program
    graphs: dict[Any, list[Graph]] = field(default_factory=dict)
    bank_guards: tuple[Guard, ...] = field(init=False)
    literal: set[Any] = field(default_factory=set)  # kinds of calls whose numbers cannot be inputs of a graph

    def function(self) -> Callable[..., Any]:
        """The function that takes the original's place: same signature, choosing a graph."""
        original = inspect.getattr_static(self.cls, self.method)
        parameters = list(inspect.signature(original).parameters.values())
        owner, names = parameters[0].name, tuple(p.name for p in parameters[1:])
        defaults = {f"_default_{p.name}": p.default for p in parameters if p.default is not p.empty}
        signature = inspect.Signature(
            [
                p.replace(
                    annotation=p.empty,
                    default=_Name(f"_default_{p.name}") if p.default is not p.empty else p.empty,
                )
                for p in parameters
            ]
        )
        values = "".join(f"{name}, " for name in names)
        source = f"def {self.method}{signature}:\n    return _dispatch({owner}, _entry, _names, ({values}))\n"
        scope = {"_dispatch": dispatch, "_entry": self, "_names": names, **defaults}
        exec(compile(source, f"<neuronsurgery {self.cls.__qualname__}.{self.method}>", "exec"), scope)
        return functools.wraps(original)(scope[self.method])

    def __post_init__(self) -> None:
        """Note what holds as long as the banks are where they were: they go with a layer that is replaced."""
        paths = [rewrite.bank.rpartition(".") for rewrite in self.program.rewrites if rewrite.bank is not None]
        self.bank_guards = tuple(
            Guard(owner, (("attribute", name), ("class", None)), Composite) for owner, _, name in paths
        )

    def has_banks(self, instance: nn.Module) -> bool:
        """Whether the banks are there."""
        return all(guard.holds(instance) for guard in self.bank_guards)

    def prepare(self, instance: nn.Module) -> None:
        """Trace the default call in both modes, so that the first real call is already fast and cannot fail."""
        numbers = numbers_of_starred(instance, self.method)
        kinds = [default_call(instance, self.method, c, n).description for c in (False, True) for n in numbers]
        if all(self.find(instance, kind, None) is None for kind in kinds):
            for traced in default_traces(instance, self.method, self.program.inline, runs_hooks=True):
                self.add(instance, traced)

    def find(self, instance: nn.Module, description: Any, leaves: list[Any] | None) -> Graph | None:
        """The graph for a kind of call with these tensors and numbers, or (None) with any, before the banks hang."""
        if leaves is not None and not self.has_banks(instance):
            return None
        for graph in self.graphs.get(description, ()):
            if all(guard.holds(instance) for guard in graph.guards) and (
                leaves is None or all(condition.holds(leaves) for condition in graph.conditions)
            ):
                return graph
        return None

    def trace(self, instance: nn.Module, call: Call, leaves: list[Any]) -> Graph:
        """Trace the original function for a new kind of call, or for new sizes and numbers."""
        inline, known = self.program.inline, Actual(leaves)
        return self.add(instance, trace(instance, self.method, call, inline=inline, known=known, runs_hooks=True))

    def add(self, instance: nn.Module, traced: Trace) -> Graph:
        """Put the banks into a traced graph and keep it."""
        found = (insert_banks(each.graph, instance, self.program.rewrites) for each in traced.outcomes)
        guards = (*traced.guards, *itertools.chain(*found))
        run = branching(traced, functools.partial(compiled, label=f"{self.cls.__qualname__}.{self.method}"))
        graph = Graph(guards, traced.conditions, run)
        graphs = self.graphs.setdefault(traced.call.description, [])
        graphs.append(graph)
        del graphs[:-_MAX_GRAPHS]
        return graph


_MAX_GRAPHS = 128  # for one kind of call: a loop over time steps has a graph for each length


class _Name:
    """Prints as a bare name where a signature shows a default."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def dispatch(instance: nn.Module, entry: Entry, names: tuple[str, ...], values: tuple[Any, ...]) -> Any:
    """Run the graph for this call; numbers are inputs of the graph where that can be traced, else part of its kind."""
    leaves: list[Any] = []
    description = tuple([describe(value, leaves) for value in values])
    if entry.literal and description in entry.literal:
        leaves = []
        description = tuple([describe(value, leaves, True) for value in values])
    graph = entry.find(instance, description, leaves)
    if graph is not None:
        return graph.run(instance, *leaves)
    return _dispatch_rarely(instance, entry, names, values)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _dispatch_rarely(instance: nn.Module, entry: Entry, names: tuple[str, ...], values: tuple[Any, ...]) -> Any:
    if not entry.has_banks(instance):
        raise _missing_bank(instance, entry.bank_guards)
    failure: UntraceableError | None = None
    kind: Any = None
    for constant_numbers in (False, True):
        leaves: list[Any] = []
        description = tuple([describe(value, leaves, constant_numbers) for value in values])
        try:
            graph = entry.find(instance, description, leaves)
            graph = graph or entry.trace(instance, Call(names, description), leaves)
        except UntraceableError as error:
            failure, kind = failure or error, description
            continue
        if constant_numbers:
            entry.literal.add(kind)
        return graph.run(instance, *leaves)
    raise UntraceableError(
        f"{entry.cls.__qualname__}.{entry.method} was called in a new way that cannot be traced, so the composites of "
        f"this module cannot take effect: {failure}. Call it as before, or undo the operation"
    ) from failure


def _missing_bank(scope: nn.Module, guards: Collection[Guard]) -> SurgeryError:
    """The error that names the bank which a forward was rewritten for and cannot find."""
    guard = next(guard for guard in guards if not guard.holds(scope))
    path = ".".join(filter(None, (guard.module, guard.steps[0][1])))
    return SurgeryError(
        f"the bank '{path}' of this {original_class(scope).__qualname__} is gone: the layer "
        "it belongs to was replaced after the operation (by LoRA, a quantized or another layer), and its composite "
        "units with it. Put the layer back, or undo the operation before you replace it"
    )


def compiled(graph: fx.Graph, label: str) -> Callable[..., Any]:
    """The graph as a Python function of (module, *leaves)."""
    code = graph.python_code(root_module="self")
    scope = dict(code.globals) | {kind.__name__: kind for node in graph.nodes for kind in _named_tuples(node.args)}
    exec(compile(code.src, f"<neuronsurgery graph of {label}>", "exec"), scope)
    return scope["forward"]  # type: ignore[no-any-return]


def _named_tuples(value: Any) -> Iterator[type]:
    """The classes of named tuples in an argument; inside a dictionary torch.fx prints them by their bare name."""
    if isinstance(value, (tuple, list, dict)):
        if is_namedtuple(type(value)):
            yield type(value)
        for item in value.values() if isinstance(value, dict) else value:
            yield from _named_tuples(item)
