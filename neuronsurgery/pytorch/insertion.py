"""Putting the banks and taps of a program into a traced graph, in place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from neuronsurgery.errors import UntraceableError
from neuronsurgery.pytorch.calls import default_call
from neuronsurgery.pytorch.carrying import carry, produce
from neuronsurgery.pytorch.composites import Composite, UnitPath, check_in_place
from neuronsurgery.pytorch.computing import Computed
from neuronsurgery.pytorch.following import LinkUse
from neuronsurgery.pytorch.links import (
    BatchNorm,
    Coupling,
    Link,
    Norm,
    Reshape,
    SyncBatchNorm,
    UnitFunction,
    is_coupling,
    signature,
)
from neuronsurgery.pytorch.mirroring import Absent, Guard, Steps, original_class, submodule
from neuronsurgery.pytorch.products import Product
from neuronsurgery.pytorch.taps import tap, tap_producer
from neuronsurgery.pytorch.tracing import trace
from neuronsurgery.pytorch.uses import Use, find_uses

__all__ = ["Rewrite", "insert_banks"]


@dataclass(frozen=True)
class Rewrite:
    """One site in one scope: the paths of the producer and of its bank, if any, and whether it is observed.

    `is_open`: the scope returns its pre-activations, for the next child of a Sequential to take on. `product` and
    `reads`, the paths of the bias ("": none) and of the path's own tensors, are what the bank has rows for; so are
    `sources`, what a computed weight may come from beside these: the bank's buffer and the path of each. `opening` are
    the links that an open scope holds.
    """

    producer: str
    bank: str | None
    tapped: bool = False
    is_open: bool = False
    product: Product | None = None
    reads: tuple[str, ...] = ()
    sources: tuple[tuple[str, str], ...] = ()
    opening: tuple[str, ...] = ()


def insert_banks(graph: fx.Graph, scope: nn.Module, rewrites: Collection[Rewrite]) -> tuple[Guard, ...]:
    """Put banks and taps into a traced graph, in place.

    Returns what must hold for the activation functions to stay as they are.

    Raises:
        UntraceableError: this graph uses a rewritten producer in a way that no bank can follow.
    """
    wanted = {rewrite.producer: rewrite for rewrite in rewrites}
    guards: list[Guard] = []
    composites: dict[fx.Node, fx.Node] = {}  # what later sites read, where an activation's node stood
    for use in find_uses(graph, scope):
        if use.producer in wanted:
            if use.path is None and not (use.followed.is_open and wanted[use.producer].is_open):
                raise UntraceableError(f"here '{use.producer}' is used otherwise: {use.problem}")
            _check_made_for(use, scope, wanted[use.producer])
            _check_opening(use, wanted[use.producer])
            guards += [*_path_guards(use, scope), *_shape_guards(use, scope)]
            _insert(graph, use, wanted[use.producer], composites)
    return tuple(guards)


def _check_made_for(use: Use, scope: nn.Module, rewrite: Rewrite) -> None:
    """Refuse a graph that computes this producer from other parameters than those the bank has rows of.

    A forward may choose among several by an argument; a bank holds copies of one choice, which the others would read.
    """
    if rewrite.product is not None and use.product.axes != rewrite.product.axes:
        raise UntraceableError(f"here '{use.producer}' numbers its units by other axes of its weight than elsewhere")
    if rewrite.bank is None or rewrite.product is None:
        return
    expected = [_tensor_at(scope, path) for path in rewrite.reads]
    found = [use.call.bias, *(own.tensor for own in use.own)]
    if use.product != rewrite.product:
        raise UntraceableError(f"here '{use.producer}' computes another product than the one its bank was made for")
    if len(found) != len(expected) or any(a is not b for a, b in zip(found, expected, strict=True)):
        raise UntraceableError(
            f"here '{use.producer}' or what its units pass has other parameters than those its bank was made for"
        )
    _check_sources(use, scope, dict(rewrite.sources))


def _check_opening(use: Use, rewrite: Rewrite) -> None:
    """Children of a Sequential take the rows on from where discovery saw the pre-activation returned."""
    if rewrite.is_open and tuple(signature(link.link) for link in use.links) != rewrite.opening:
        raise UntraceableError(
            f"here what '{use.producer}' computes passes other operations than it did when it was discovered, before "
            "it is returned to a Sequential"
        )


def _check_sources(use: Use, scope: nn.Module, paths: Mapping[str, str]) -> None:
    """A bank names its buffers by the last part of a path alone, which two modules' parameters may share."""
    if use.is_module or use.call.computed is None:  # what a module computes its weight from is its own
        return
    for source, tensor, *_ in use.call.computed.extras:
        if source.name not in paths or _tensor_at(scope, paths[source.name]) is not tensor:
            raise UntraceableError(
                f"here the weight of '{use.producer}' is computed from '{source.path}', of which its bank has no "
                "frozen rows"
            )


def _tensor_at(scope: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(submodule(scope, owner), name) if path else None


def _path_guards(use: Use, scope: nn.Module) -> Iterator[Guard]:
    """The modules from producer to activation are of the class they were, with the settings and tensors they had."""
    for link_use in use.links:
        for path in (*(each.path for each in link_use.own), *_read_directly(link_use)):
            owner, _, name = path.rpartition(".")
            yield _as_it_is(scope, owner, (("attribute", name), ("shape", None)))
        for path in link_use.modules:
            module = submodule(scope, path)
            yield Guard(path, (("class", None),), original_class(module))
            if isinstance(link_use.link, UnitFunction) and link_use.link.steps:
                for guard in trace(module, "forward", default_call(module)).guards:
                    yield replace(guard, module=f"{path}.{guard.module}" if guard.module else path)
            if isinstance(link_use.link, (Norm, BatchNorm)):
                for name in _TENSORS:
                    yield _as_it_is(scope, path, (("attribute", name), ("shape", None)))
            if isinstance(link_use.link, Norm):
                for name in ("eps", "normalized_shape", "num_groups"):
                    yield _as_it_is(scope, path, (("attribute", name),))


_TENSORS = ("weight", "bias", "running_mean", "running_var")
"""What a normalization may have or lack: instances of one class differ in it, and a link has its own for each."""


def _read_directly(use: LinkUse) -> Iterator[str]:
    """The tensors of the scope that a link reads without a value per unit: in another shape they may have one."""
    live = use.link.live if isinstance(use.link, UnitFunction) else ()
    yield from (f"{use.module}.{name}" for name in live)
    yield from (str(other.target) for other in use.others if other.op == "get_attr")


def _as_it_is(scope: nn.Module, path: str, steps: Steps) -> Guard:
    """A guard that holds now."""
    try:
        return Guard(path, steps, Guard(path, steps, None).look(scope))
    except AttributeError:
        return Guard(path, steps, Absent.ABSENT)


def _shape_guards(use: Use, scope: nn.Module) -> Iterator[Guard]:
    """What a weight is computed from has the shape it had: which of its axes numbers the units depends on it."""
    computed = use.call.computed
    for node in () if computed is None or use.is_module else (*computed.nodes, *computed.inner):
        for each in node.all_input_nodes:
            if each.op == "get_attr":
                owner, _, name = str(each.target).rpartition(".")
                found = getattr(submodule(scope, owner), name)
                yield Guard(owner, (("attribute", name), ("attribute", "shape")), found.shape)


def _insert(graph: fx.Graph, use: Use, rewrite: Rewrite, composites: dict[fx.Node, fx.Node]) -> None:
    """Evaluate the bank beside its producer, and sum where the activation comes out; observe what consumers get."""
    if use.is_module:
        z, rows = _rows_of_module(graph, use)
    else:
        z, rows = use.node, _rows_of_function(graph, use, rewrite.bank, composites)
    h = use.last if use.links else z
    if rewrite.bank is not None:
        with graph.inserting_after(rows):
            bank = graph.get_attr(rewrite.bank)
        for index, link_use in enumerate(use.links):
            if link_use.module and link_use.link.tensors:
                with graph.inserting_before(link_use.node):
                    graph.call_function(check_in_place, (bank, graph.get_attr(link_use.module)))
            insert = _insert_coupling if is_coupling(link_use.link) else _insert_link
            h, rows = insert(graph, bank, (index, use.path), link_use, rows, composites)
        if not rewrite.is_open:
            slots = h
            with graph.inserting_after(slots):  # the last link is a function, which the rows have passed by then
                h = graph.call_function(_assembling(use.path), (bank, slots, rows))
            slots.replace_all_uses_with(h, delete_user_cb=lambda user: user is not h)
    if rewrite.is_open:
        _insert_carrying(graph, use, rewrite, h, rows)
    elif rewrite.tapped:
        with graph.inserting_after(h):
            observed = graph.get_attr(use.producer)
        with graph.inserting_after(observed):
            tapped = graph.call_function(_tapping(use), (observed, h))
        h.replace_all_uses_with(tapped, delete_user_cb=lambda user: user is not tapped)
        h = tapped
    composites[use.last] = h


def _tapping(use: Use) -> Callable[[Any, Tensor], Tensor]:
    """The tap of activations that have their units where this graph leaves them: another call may move them."""
    show: Callable[[Any, Tensor, tuple[int, ...]], Tensor] = tap_producer if use.is_module else tap
    product, path = use.product, use.path
    assert path is not None

    def tapped(observed: Any, h: Tensor) -> Tensor:
        return show(observed, h, path.unit_axes(product, h.dim()))

    return tapped


def _insert_carrying(graph: fx.Graph, use: Use, rewrite: Rewrite, slots: fx.Node, rows: fx.Node) -> None:
    """Let the pre-activations that the scope returns carry their rows to whoever has the activation function."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        producer = graph.get_attr(use.producer)
        bank = graph.get_attr(rewrite.bank) if rewrite.bank is not None else None
        carried = graph.call_function(carry, (slots, producer, bank, rows if bank else None, len(use.links)))
    output.replace_input_with(slots, carried)


At = tuple[int, UnitPath | None]
"""Which link of the path this is, and the path that this graph has; None: a part of the bank's own."""


def _assembling(path: UnitPath | None) -> Callable[[Composite, Tensor, Tensor], Tensor]:
    """The layer's activations with composites in place."""

    def assemble(bank: Composite, slots: Tensor, rows: Tensor) -> Tensor:
        return bank.assemble(slots, rows, path)

    return assemble


# -- links -----------------------------------------------------------------------------------------------------------


def _insert_link(
    graph: fx.Graph, bank: fx.Node, at: At, use: LinkUse, rows: fx.Node, composites: dict[fx.Node, fx.Node]
) -> tuple[fx.Node, fx.Node]:
    """Let the rows pass a link beside the slots: before these, as they may work in place on what the rows read too."""
    link = use.link
    live = link.live if isinstance(link, UnitFunction) else ()
    is_after = isinstance(link, (BatchNorm, Reshape))  # whose module counts the batches; which reads the new shape
    with graph.inserting_after(use.node) if is_after else graph.inserting_before(use.node):
        module = graph.get_attr(use.module) if isinstance(link, BatchNorm) else None
    with graph.inserting_after(module) if module else graph.inserting_before(use.node):
        others = [graph.get_attr(f"{use.module}.{name}") for name in live]
        others += [use.node] if isinstance(link, Reshape) else [composites.get(o, o) for o in use.others]
    with graph.inserting_after(module or use.node) if is_after else graph.inserting_before(use.node):
        return use.node, graph.call_function(_passing(at, link), (bank, rows, others, module))


def _passing(at: At, link: Link) -> Callable[[Composite, Tensor, Sequence[Any], nn.Module | None], Tensor]:
    """The step of the rows past the link that this graph has."""

    def passed(bank: Composite, rows: Tensor, others: Sequence[Any], module: nn.Module | None) -> Tensor:
        return bank.passed(at[0], link, rows, others, module, at[1])

    return passed


def _insert_coupling(
    graph: fx.Graph,
    bank: fx.Node,
    at: At,
    use: LinkUse,
    rows: fx.Node,
    composites: dict[fx.Node, fx.Node],
) -> tuple[fx.Node, fx.Node]:
    """Let slots and rows pass a link together, around the operation that the slots alone would have passed."""
    link: Any = use.link
    slots = use.node.args[0]
    assert isinstance(slots, fx.Node)
    if isinstance(link, SyncBatchNorm):
        with graph.inserting_before(use.node):
            module = graph.get_attr(use.module)
            return _pair_in_place_of(graph, use.node, _together(at, link), (bank, module, slots, rows))
    with graph.inserting_before(use.node):
        received = graph.call_function(_entering(at, link), (bank, slots, rows))
        own = [graph.get_attr(each.path) for each in use.own]
    use.node.args = (received, *use.node.args[1:])
    with graph.inserting_after(use.node):
        pair = graph.call_function(_leaving(at, link), (bank, slots, rows, received, use.node, own))
    with graph.inserting_after(pair):
        passed = graph.call_function(operator.getitem, (pair, 0))
    use.node.replace_all_uses_with(passed, delete_user_cb=lambda user: user is not pair)
    with graph.inserting_after(passed):
        return passed, graph.call_function(operator.getitem, (pair, 1))


def _pair_in_place_of(
    graph: fx.Graph, node: fx.Node, function: Callable[..., Any], args: tuple[fx.Node, ...]
) -> tuple[fx.Node, fx.Node]:
    """Slots and rows from one call that stands where a node was."""
    pair = graph.call_function(function, args)
    passed, rows = (graph.call_function(operator.getitem, (pair, place)) for place in (0, 1))
    node.replace_all_uses_with(passed)
    graph.erase_node(node)
    return passed, rows


def _together(at: At, link: SyncBatchNorm) -> Callable[..., tuple[Tensor, Tensor]]:
    def together(bank: Composite, module: nn.Module, slots: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return bank.together(at[0], link, module, slots, rows, at[1])

    return together


def _entering(at: At, link: Coupling) -> Callable[[Composite, Tensor, Tensor], Tensor]:
    def entered(bank: Composite, slots: Tensor, rows: Tensor) -> Tensor:
        return bank.entered(at[0], link, slots, rows, at[1])

    return entered


def _leaving(at: At, link: Coupling) -> Callable[..., tuple[Tensor, Tensor]]:
    def left(
        bank: Composite, slots: Tensor, rows: Tensor, received: Tensor, result: Tensor, own: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        return bank.left(at[0], link, slots, rows, received, result, own, at[1])

    return left


# -- producers -------------------------------------------------------------------------------------------------------


def _rows_of_function(graph: fx.Graph, use: Use, bank: str | None, composites: dict[fx.Node, fx.Node]) -> fx.Node:
    """The frozen rows' pre-activations beside a functional call, before anything may change its input in place."""
    if bank is None:
        return use.node
    computed = use.call.computed
    received = composites.get(use.call.received, use.call.received)
    with graph.inserting_before(use.node):
        if computed is None:
            return graph.call_module(bank, (received,))
        found = graph.get_attr(bank)
        return graph.call_function(_computing(computed), (found, received, list(computed.leaves)))


def _computing(computed: Computed) -> Callable[[Composite, Tensor, Sequence[Any]], Tensor]:
    """The frozen rows' pre-activations with weights that this graph computes."""
    recipe, compute = computed.recipe, computed.compute

    def rows_of(bank: Composite, x: Tensor, live: Sequence[Any]) -> Tensor:
        return bank.computed(x, recipe, compute, live)

    return rows_of


def _rows_of_module(graph: fx.Graph, use: Use) -> tuple[fx.Node, fx.Node]:
    """A module's output, whose node is replaced, and the frozen rows' pre-activations beside it."""
    with graph.inserting_before(use.node):
        module = graph.get_attr(str(use.node.target))
        pair = graph.call_function(produce, (module, *use.node.args), dict(use.node.kwargs))
        z = graph.call_function(operator.getitem, (pair, 0))
        rows = graph.call_function(operator.getitem, (pair, 1))
    use.node.replace_all_uses_with(z)
    graph.erase_node(use.node)
    return z, rows
