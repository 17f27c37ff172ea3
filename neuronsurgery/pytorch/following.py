"""Following a pre-activation through a graph, link by link, to the activation function.

Each link has one value in and one out: everything that reads the value must be part of the link, so that no other
consumer sees a pre-activation. Most links are one node; an activation function that is written out is several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from neuronsurgery.pytorch.hooks import forbids_inlining, has_hooks, may_change_output
from neuronsurgery.pytorch.links import Link, is_coupling
from neuronsurgery.pytorch.mirroring import submodule
from neuronsurgery.pytorch.recognition import (
    SCALING,
    OwnTensor,
    UnitShape,
    UnitSteps,
    canonical_name,
    function_of_module,
    is_metadata,
    is_unitwise,
    link_of_function,
    link_of_module,
    why_not,
)
from neuronsurgery.pytorch.unitwise import Kind

__all__ = ["Followed", "LinkUse", "follow", "is_in_place"]


@dataclass(frozen=True, eq=False)
class LinkUse:
    """One link in a graph: the value that enters, the node whose value comes out, and what else it reads there.

    `own` are the link's own tensors, by their paths in the scope; `others` the tensors from elsewhere; `modules` the
    paths of the modules that are called in it, one where the link is a module; `nodes` all nodes that it is made of.
    """

    link: Link
    value: fx.Node
    node: fx.Node
    own: tuple[OwnTensor, ...] = ()
    others: tuple[fx.Node, ...] = ()
    modules: tuple[str, ...] = ()
    nodes: tuple[fx.Node, ...] = ()

    @property
    def module(self) -> str:
        """The path of the module that the link is, "" where it is a function, or several modules and functions."""
        return self.modules[0] if self.node.op == "call_module" and len(self.modules) == 1 else ""


@dataclass(frozen=True, eq=False)
class Followed:
    """Where a pre-activation leads: to the end of its last link, an activation function, or to a problem.

    `is_open`: the scope returns it as it is, so that its activation function may lie in a caller. `stopped` is the
    child at whose call it went no further.
    """

    links: tuple[LinkUse, ...]
    problem: str = ""
    is_open: bool = False
    stopped: str = ""


def follow(node: fx.Node, scope: nn.Module, shape: UnitShape) -> Followed:
    """Follow the value of a producer's node, whose units are as `shape` says, to its activation function."""
    links: list[LinkUse] = []
    value = node
    while True:
        readers = [user for user in value.users if not is_metadata(user)]
        if not readers:
            return Followed(tuple(links), "its output is not used")
        if any(reader.op == "output" for reader in readers):
            is_open = len(readers) == 1 and readers[0].args[0] is value
            problem = "no activation function: the scope returns its output"
            return Followed(tuple(links), problem if len(readers) == 1 else _read_often(readers), is_open)
        found = _link_at(value, readers, scope, shape)
        if isinstance(found, str):
            stopped = str(readers[0].target) if len(readers) == 1 and readers[0].op == "call_module" else ""
            return Followed(tuple(links), found, stopped=stopped)
        links.append(found)
        if found.link.kind is not Kind.NEUTRAL:
            return Followed(tuple(links))
        value, shape = found.node, shape.past(found.link)


def _link_at(value: fx.Node, readers: Sequence[fx.Node], scope: nn.Module, shape: UnitShape) -> LinkUse | str:
    if len(readers) > 1:
        return _region(value, readers, scope, shape)
    (reader,) = readers
    if reader.op == "call_module":
        return _module_link(reader, value, scope, shape)
    found = link_of_function(reader, value, scope, shape)
    if isinstance(found, str):
        return found
    if found is not None:
        return LinkUse(found[0], value, reader, found[1], nodes=(reader,))
    return _region(value, readers, scope, shape)


def _module_link(node: fx.Node, value: fx.Node, scope: nn.Module, shape: UnitShape) -> LinkUse | str:
    path = str(node.target)
    module = submodule(scope, path)
    if node.args != (value,) or node.kwargs:
        return f"no activation function: it feeds '{path}' with other arguments"
    if "forward" in vars(module):
        return f"the forward of '{path}' was replaced on the instance"
    if module._forward_pre_hooks or may_change_output(module):
        return f"a hook on '{path}' may change what its units pass on"
    found = link_of_module(module, shape)
    if isinstance(found, str):
        return f"no activation function: it feeds '{path}' ({found})"
    link, own = found
    if is_coupling(link) and has_hooks(module):
        return f"a hook on '{path}' would see what stands in for the units there"
    return LinkUse(
        link, value, node, tuple(replace(each, path=f"{path}.{each.path}") for each in own), (), (path,), (node,)
    )


# -- functions, one or several ---------------------------------------------------------------------------------------


def _region(value: fx.Node, readers: Sequence[fx.Node], scope: nn.Module, shape: UnitShape) -> LinkUse | str:
    """The smallest unit-wise function that holds all readers of a value, and lets one result out."""
    steps = UnitSteps(scope, shape)
    steps.enter(value)
    waiting, members = set(readers), list[fx.Node]()
    while waiting:
        node = min(waiting)  # the first in the graph
        waiting.remove(node)
        if problem := _taken_in(node, steps, scope, shape):
            return problem if not members and len(readers) == 1 else _read_often(readers)
        members.append(node)
        if not waiting:
            break
        waiting |= {user for user in node.users if not is_metadata(user)}
    problem = _unsound(value, members, readers, steps)
    modules = tuple(str(node.target) for node in members if node.op == "call_module")
    return problem or LinkUse(
        steps.link(), value, members[-1], tuple(steps.own), tuple(steps.others), modules, tuple(members)
    )


def _taken_in(node: fx.Node, steps: UnitSteps, scope: nn.Module, shape: UnitShape) -> str:
    """Take a node into the steps, or say why it cannot be part of a unit-wise function."""
    if node.op == "call_module":
        module = submodule(scope, str(node.target))
        function = function_of_module(module, shape)
        if isinstance(function, str) or function.others or forbids_inlining(module) or len(node.args) != 1:
            return f"no activation function: it feeds '{node.target}'"
        steps.add_module(node, function)
        return ""
    if not is_unitwise(node):
        return why_not(node)
    return steps.add(node)


def _unsound(value: fx.Node, members: Sequence[fx.Node], readers: Sequence[fx.Node], steps: UnitSteps) -> str:
    """Why rows that took these steps would not be what the slots become."""
    inside = {value, *members}
    last = members[-1]
    if any(user not in inside for node in (value, *members[:-1]) for user in node.users if not is_metadata(user)):
        return _read_often(readers)
    if len(members) > 1 and any(is_in_place(node) for node in members):
        return _read_often(readers)
    is_sum = canonical_name(last) in ("add", "sub", "subtract")
    if len(members) > 1 and is_sum and sum(argument in inside for argument in last.args) > 1:
        return _read_often(readers)
    for other in steps.others:
        if is_generated(other):
            return "a product of two computed tensors enters it: its incoming weights are generated"
    return ""


def _read_often(readers: Sequence[fx.Node]) -> str:
    return f"its pre-activation is read {len(readers)} times, not only by one activation function"


def is_in_place(node: fx.Node) -> bool:
    """Whether a node's function writes into what it gets."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    is_augmented = name in ("iadd", "isub", "imul", "itruediv")
    return is_augmented or (name.endswith("_") and not name.endswith("__")) or bool(node.kwargs.get("inplace"))


_PRODUCTS = SCALING | frozenset("matmul mm bmm addmm baddbmm einsum linear bilinear".split())
_THROUGH = frozenset(
    "add sub subtract neg view reshape flatten unflatten squeeze unsqueeze transpose permute movedim expand contiguous "
    "clone float half bfloat16 double to getitem select chunk split sum mean".split()
)


def is_generated(node: Any) -> bool:
    """Whether a tensor is, up to sums and views, a product of two computed tensors, as a hypernetwork's layer is."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        found = waiting.pop()
        if found.op not in ("call_function", "call_method") or _SUMS in found.meta or found in seen:
            continue
        seen.add(found)
        name = canonical_name(found)
        computed = [a for a in found.all_input_nodes if a.op != "get_attr"]
        if name in _PRODUCTS and len(computed) > 1:
            return True
        if name in _PRODUCTS or name in _THROUGH:
            waiting += computed
    for found in seen:  # so that a residual stream is walked once, not once for every block
        found.meta[_SUMS] = True
    return False


_SUMS = "neuronsurgery_sums"
"""The key of a node's metadata that says that no product of two computed tensors is in it."""
