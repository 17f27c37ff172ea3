"""Functional producers whose weight is computed in the graph: `F.linear(x, self.weight * self.mask, self.bias)`.

The operations between trained parameters and the product are taken out of the graph as a function of their own. What
else enters them (a mask, noise drawn in the forward) stays where it is: it is computed once, for slots and rows alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from neuronsurgery.pytorch.computing import Compute, Computed, recipe_of
from neuronsurgery.pytorch.following import is_in_place
from neuronsurgery.pytorch.mirroring import submodule
from neuronsurgery.pytorch.models import random_states_kept
from neuronsurgery.pytorch.recognition import MOVES, canonical_name, is_metadata

__all__ = ["Parts", "computed_by", "parts_of"]

_LIKE = frozenset("randn_like rand_like randint_like zeros_like ones_like empty_like full_like".split())
_MOVING = frozenset(MOVES) | frozenset("t mT T contiguous view reshape flatten clone".split())


@dataclass(frozen=True, eq=False)
class Parts:
    """What a weight and a bias are computed from in a graph, and the nodes that do.

    `sources` are nodes that read trained parameters, one for each, and then the leaves: nodes of all other values.
    `nodes` are all from there to the product, in order; `inner` those that only the leaves need.
    """

    sources: tuple[fx.Node, ...]
    values: tuple[Any, ...]
    is_trained: tuple[bool, ...]
    nodes: tuple[fx.Node, ...]
    inner: tuple[fx.Node, ...]
    compute: Compute
    shape: torch.Size  # of the weight


def parts_of(weight: Any, bias: Any, scope: nn.Module) -> Parts | None:
    """The parts of a weight that is computed from parameters of the scope; None where it is no such weight."""
    if not isinstance(weight, fx.Node) or not isinstance(bias, fx.Node | None):
        return None
    ancestors = _ancestors([weight] if bias is None else [weight, bias])
    trained = dict.fromkeys(ancestors, False)
    for node in ancestors:
        reads = node.op == "get_attr" and _is_trained(_tensor(node, scope))
        trained[node] = reads or (_passes(node) and any(trained[each] for each in node.all_input_nodes))
    nodes = [node for node in ancestors if trained[node] and node.op != "get_attr"]
    if not trained[weight] or any(not _is_function(node) for node in nodes):
        return None
    read = dict.fromkeys(each for node in (*nodes, *_roots(weight, bias)) for each in (node, *node.all_input_nodes))
    parameters = [node for node in read if node.op == "get_attr" and trained[node]]
    leaves = [node for node in read if not trained[node]]
    inner = [node for node in _ancestors(leaves) if node not in parameters]
    if all(canonical_name(node) in _MOVING for node in nodes) and nodes and weight in nodes:
        return None  # another view of a parameter, as a tied decoder reads it
    if not all(_is_settled(leaf) for leaf in leaves):
        return None  # of the input: generated weights
    by_tensor: dict[int, list[fx.Node]] = {}
    for node in parameters:
        by_tensor.setdefault(id(_tensor(node, scope)), []).append(node)
    sources = [*(group[0] for group in by_tensor.values()), *leaves]
    groups = [*by_tensor.values(), *([leaf] for leaf in leaves)]
    compute = _function(groups, nodes, weight, bias)
    own = [_tensor(group[0], scope) for group in by_tensor.values()]
    try:
        values = [*own, *_values_of(leaves, scope, own[0])]
        with torch.no_grad(), random_states_kept([]):
            shape = compute(values)[0].shape
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return None
    is_trained = [True] * len(by_tensor) + [False] * len(leaves)
    return Parts(tuple(sources), tuple(values), tuple(is_trained), tuple(nodes), tuple(inner), compute, shape)


def computed_by(parts: Parts, axis: int | None, scope: nn.Module) -> Computed | str:
    """How the parts compute a weight row by row, or why its units cannot be operated on."""
    if axis is None:
        return "its weight is computed, and several of its axes number the units"
    paths = [str(node.target) if node.op == "get_attr" else node.name for node in parts.sources]
    try:
        with random_states_kept([]):
            found = recipe_of(paths, parts.values, parts.is_trained, parts.compute, axis)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        problem = str(error).partition("\n")[0]
        return f"its weight is computed, which failed on other values ({type(error).__name__}: {problem})"
    if isinstance(found, str):
        return found
    recipe, first, second = found
    owners = [_owner(node, scope) if node.op == "get_attr" else None for node in parts.sources]
    leaves = tuple(node for node, is_trained in zip(parts.sources, parts.is_trained, strict=True) if not is_trained)
    bias = None if second is None else parts.values[second]
    return Computed(
        recipe, parts.values[first], bias, parts.values, tuple(owners), parts.compute, leaves, parts.nodes, parts.inner
    )


# -- the graph -------------------------------------------------------------------------------------------------------


def _roots(weight: fx.Node, bias: fx.Node | None) -> tuple[fx.Node, ...]:
    return (weight,) if bias is None else (weight, bias)


def _ancestors(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes and all that they depend on, in the order of the graph."""
    seen: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    return [node for node in nodes[0].graph.nodes if node in seen] if nodes else []


def _is_function(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and not is_in_place(node)


def _passes(node: fx.Node) -> bool:
    """Whether the values of what a node reads matter, not only their shapes and dtypes."""
    return not is_metadata(node) and canonical_name(node) not in _LIKE


def _is_settled(leaf: fx.Node) -> bool:
    """Whether a value does not depend on the forward's arguments, unless by their dtype or device."""
    if _is_dtype(leaf):
        return True
    ancestors = _ancestors([leaf])
    return all(node.op in ("get_attr", "call_function", "call_method") for node in ancestors)


def _is_dtype(leaf: fx.Node) -> bool:
    return leaf.op == "call_function" and leaf.target is getattr and leaf.args[1] in ("dtype", "device")


def _owner(node: fx.Node, scope: nn.Module) -> tuple[nn.Module, str]:
    path, _, name = str(node.target).rpartition(".")
    return submodule(scope, path), name


def _tensor(node: fx.Node, scope: nn.Module) -> Any:
    owner, name = _owner(node, scope)
    return getattr(owner, name)


def _is_trained(value: Any) -> bool:
    return isinstance(value, nn.Parameter) and value.requires_grad


# -- what it computes ------------------------------------------------------------------------------------------------


def _function(
    groups: Sequence[Sequence[fx.Node]], nodes: Sequence[fx.Node], weight: fx.Node, bias: fx.Node | None
) -> Compute:
    """The nodes as a function of the values of the sources; each source is a group of nodes that read one tensor."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for index, group in enumerate(groups):
        copies |= dict.fromkeys(group, graph.placeholder(f"source_{index}"))
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output((copies[weight], None if bias is None else copies[bias]))
    function = fx.GraphModule(nn.Module(), graph)
    return lambda values: function.forward(*values)


def _values_of(leaves: Sequence[fx.Node], scope: nn.Module, like: Tensor) -> list[Any]:
    """What the leaves give now, computed on copies of the tensors that they read."""
    values: dict[fx.Node, Any] = {}
    wanted = [leaf for leaf in leaves if not _is_dtype(leaf)]
    with torch.no_grad(), random_states_kept([]):
        for node in _ancestors(wanted):
            if node.op == "get_attr":
                values[node] = _tensor(node, scope).detach().clone()
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            is_method = node.op == "call_method"
            function: Any = getattr(args[0], str(node.target)) if is_method else node.target
            values[node] = function(*args[1:] if is_method else args, **kwargs)
    return [getattr(like, str(leaf.args[1])) if _is_dtype(leaf) else values[leaf] for leaf in leaves]
