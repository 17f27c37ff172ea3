"""Putting the banks and taps of a program into a traced graph, in place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

from torch import Tensor, fx, nn

from neuronsurgery.errors import UntraceableError
from neuronsurgery.pytorch.calls import default_call
from neuronsurgery.pytorch.carrying import produce
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.hooks import is_hook_call
from neuronsurgery.pytorch.mirroring import Guard, original_class, submodule
from neuronsurgery.pytorch.taps import tap
from neuronsurgery.pytorch.tracing import trace
from neuronsurgery.pytorch.unitwise import UnitFunction
from neuronsurgery.pytorch.uses import Use, find_uses

__all__ = ["Rewrite", "insert_banks"]


@dataclass(frozen=True, order=True)
class Rewrite:
    """One site in one scope: the paths of the producer and of its bank, if any, and whether it is observed."""

    producer: str
    bank: str | None
    tapped: bool = False


def insert_banks(graph: fx.Graph, scope: nn.Module, rewrites: Collection[Rewrite]) -> tuple[Guard, ...]:
    """Put banks and taps into a traced graph, in place.

    Returns what must hold for the activation functions to stay as they are.

    Raises:
        UntraceableError: this graph uses a rewritten producer in a way that no bank can follow.
    """
    wanted = {rewrite.producer: rewrite for rewrite in rewrites}
    guards: list[Guard] = []
    for use in find_uses(graph, scope):
        if use.producer in wanted:
            if use.end is None:
                raise UntraceableError(f"here '{use.producer}' is used otherwise: {use.problem}")
            guards += _path_guards(use, scope)
            _insert(graph, use, wanted[use.producer])
    return tuple(guards)


def _path_guards(use: Use, scope: nn.Module) -> Iterator[Guard]:
    """The modules from producer to activation are of the class they were, with the settings they had."""
    node = use.node
    while node is not use.end:
        node = next(user for user in node.users if not is_hook_call(user))
        if node.op == "call_module":
            path = str(node.target)
            module = submodule(scope, path)
            yield Guard(path, (("class", None),), original_class(module))
            if not isinstance(module, nn.Identity):
                for guard in trace(module, "forward", default_call(module)).guards:
                    yield replace(guard, module=f"{path}.{guard.module}" if guard.module else path)


def _insert(graph: fx.Graph, use: Use, rewrite: Rewrite) -> None:
    """Evaluate the bank beside its producer, and sum where the activation comes out; observe what consumers get."""
    assert use.end is not None and use.path is not None
    h = use.end
    z = _rows_of_module(graph, use) if use.is_module else _rows_of_function(graph, use, rewrite.bank)
    if rewrite.bank is not None:
        with graph.inserting_before(use.end):
            bank = graph.get_attr(rewrite.bank)
        with graph.inserting_after(use.end):
            h = graph.call_function(_combining(use.path.function), (bank, use.end, z))
        use.end.replace_all_uses_with(h, delete_user_cb=lambda user: user is not h)
    if rewrite.tapped:
        with graph.inserting_after(h):
            parameter = graph.get_attr(f"{rewrite.producer}.weight" if use.is_module else rewrite.producer)
        with graph.inserting_after(parameter):
            tapped = graph.call_function(tap, (parameter, h))
        h.replace_all_uses_with(tapped, delete_user_cb=lambda user: user is not tapped)


def _combining(function: UnitFunction) -> Callable[[Composite, Tensor, Tensor], Tensor]:
    """The sum into composite units by the function that this graph applies to the slots."""

    def combine(bank: Composite, h: Tensor, z: Tensor) -> Tensor:
        return bank.combine(h, z, function)

    return combine


def _rows_of_function(graph: fx.Graph, use: Use, bank: str | None) -> fx.Node | None:
    """The frozen rows' pre-activations beside a functional call, before anything may change its input in place."""
    if bank is None:
        return None
    received = (*use.node.args, use.node.kwargs.get("input"))[0]
    with graph.inserting_after(use.node):
        return graph.call_module(bank, (received,))


def _rows_of_module(graph: fx.Graph, use: Use) -> fx.Node:
    """The frozen rows' pre-activations beside a module's call, whose node is replaced."""
    with graph.inserting_before(use.node):
        module = graph.get_attr(str(use.node.target))
        pair = graph.call_function(produce, (module, *use.node.args), dict(use.node.kwargs))
        z = graph.call_function(operator.getitem, (pair, 0))
        rows = graph.call_function(operator.getitem, (pair, 1))
    use.node.replace_all_uses_with(z)
    graph.erase_node(use.node)
    return rows
