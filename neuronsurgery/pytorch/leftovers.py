"""Weights that are multiplied with and yet are no one's producer, each with its reason.

Most weights are a producer's, a module's or one that a function takes, and discovery judges these. What is left over
is multiplied with in a forward that cannot be traced (experts in a loop), after an operation that is not read, or in
another module than the one that holds it (parameters swapped in at run time).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from neuronsurgery.pytorch.lookahead import MIXING
from neuronsurgery.pytorch.mirroring import original_class, submodule
from neuronsurgery.pytorch.producers import is_producer
from neuronsurgery.pytorch.reading import Reading, modules_of, targets_of
from neuronsurgery.pytorch.reads import reads_of
from neuronsurgery.pytorch.recognition import canonical_name
from neuronsurgery.pytorch.swapped import holds_for_others

__all__ = ["leftovers", "why_swapped"]

SWAPPED = (
    "its parameters are stacked and swapped in at run time by TensorDictParams (tensordict), one network per agent. "
    "Where agents share them (share_params=True) they can be operated on"
)


def leftovers(model: nn.Module, readings: list[Reading]) -> Iterator[tuple[nn.Parameter, str]]:
    """Parameters of two axes or more that a forward multiplies with, and why they are no producer's weight."""
    for _, module in modules_of(model):
        if holds_for_others(module):
            held = module._parameters.items()
            yield from ((p, SWAPPED) for name, p in held if p is not None and p.dim() > 1 and not name.endswith("bias"))
    for reading in readings:
        if reading.failure is not None:
            reads = reads_of(original_class(reading.scope).forward) or ()
            for read, target in targets_of(reading.scope, reads):
                if not read.is_call and isinstance(target, nn.Parameter) and target.dim() > 1:
                    yield target, str(reading.failure)
        for _, traced in reading.traces:
            yield from _computed_with(traced.graph, reading.scope)


def why_swapped(model: nn.Module, name: str) -> str:
    """Why a producer module without a weight is an empty shell; "" if it is none."""
    module = submodule(model, name)
    if not is_producer(module) or "weight" in module._parameters:
        return ""
    names = name.split(".")
    around = (submodule(model, ".".join(names[:depth])) for depth in range(len(names)))
    return SWAPPED if any(holds_for_others(child) for owner in around for child in owner.children()) else ""


def _computed_with(graph: fx.Graph, scope: nn.Module) -> Iterator[tuple[nn.Parameter, str]]:
    """The weights that a product takes after something else was made of them."""
    made: dict[fx.Node, tuple[nn.Parameter, ...]] = {}  # what comes of parameters and constants alone -> which
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            held: nn.Module | None = submodule(scope, owner)
            parameter = held._parameters.get(name) if isinstance(held, nn.Module) else None
            made[node] = (parameter,) if parameter is not None else ()
        elif node.op in ("call_function", "call_method") and inputs and all(each in made for each in inputs):
            made[node] = tuple(dict.fromkeys(parameter for each in inputs for parameter in made[each]))
        elif node.op in ("call_function", "call_method") and canonical_name(node) in MIXING | {"_grouped_mm"}:
            for each in inputs:
                for parameter in made.get(each, ()):
                    if parameter.dim() > 1:
                        how = str(getattr(each.target, "__name__", each.target))
                        yield parameter, f"'{canonical_name(node)}' multiplies with what '{how}' makes of it"
