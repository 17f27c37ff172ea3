"""Programs that ask for a dtype or a device while they run, and go on with the graph that was traced for the answer.

The graphs of the outcomes are the same up to the question that tells them apart. So the program is a tree of
**segments**, each the part of a graph between two questions, and nothing runs twice, whatever the answers are.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from neuronsurgery.errors import UntraceableError
from neuronsurgery.pytorch.tracing import Trace

__all__ = ["branching"]

Run = Callable[..., Any]
Compile = Callable[[fx.Graph], Run]


@dataclass(frozen=True, eq=False)
class Segment:
    """A part of a forward: its last value is a question, and what is needed after it, or the forward's result."""

    run: Run
    next: Mapping[bool, Segment | UntraceableError]


def branching(traced: Trace, compiled: Compile) -> Run:
    """The outcomes of a trace, with their banks in place, as one function of (module, *leaves).

    Raises:
        UntraceableError: the banks made them differ before the question that tells them apart.
    """
    if not traced.answers:
        return compiled(traced.graph)
    first = _segment(Tree(traced), (), (), compiled)

    def run(instance: Any, *leaves: Any) -> Any:
        segment: Any = first
        values: Sequence[Any] = leaves
        while segment.next:
            question, *values = segment.run(instance, *values)
            segment = segment.next[bool(question)]
            if isinstance(segment, UntraceableError):
                raise UntraceableError(
                    f"a dtype or device is one for which the composites of this module cannot take effect: {segment}. "
                    "Call it as before, or undo the operation"
                ) from segment
        return segment.run(instance, *values)

    return run


class Tree:
    """The outcomes of a trace by their answers."""

    def __init__(self, traced: Trace) -> None:
        self.outcomes = traced.outcomes
        self.refusals = traced.refusals
        self.nodes = {id(each): list(each.graph.nodes) for each in self.outcomes}

    def under(self, answers: tuple[bool, ...]) -> list[Trace]:
        return [each for each in self.outcomes if each.answers[: len(answers)] == answers]

    def asked_at(self, traced: Trace, depth: int) -> int:
        """The place of a trace's question among its nodes."""
        return self.nodes[id(traced)].index(traced.questions[depth])

    def refusal(self, answers: tuple[bool, ...]) -> UntraceableError:
        reasons = (error for found, error in self.refusals if found[: len(answers)] == answers)
        return next(reasons, UntraceableError("no call had such a dtype or device when it was traced"))


def _segment(tree: Tree, answers: tuple[bool, ...], live: tuple[int, ...], compiled: Compile) -> Segment:
    """The segment after these answers, given the values at some places among the nodes."""
    depth, outcomes = len(answers), tree.under(answers)
    first = outcomes[0]
    start = tree.asked_at(first, depth - 1) + 1 if depth else 0
    nodes = tree.nodes[id(first)]
    if len(first.answers) == depth:
        return Segment(compiled(_part(nodes[start:], nodes, live)), {})
    end = tree.asked_at(first, depth) + 1
    for other in outcomes[1:]:
        if not _is_same_start(nodes[:end], tree.nodes[id(other)][:end]):
            raise UntraceableError("banks would have to be evaluated ahead of a question of dtype that decides on them")
    needed = tuple(sorted(set().union(*(_needed(tree.nodes[id(each)], end) for each in outcomes))))
    part = _part(nodes[start:end], nodes, live, (nodes[end - 1], *(nodes[place] for place in needed)))
    following: dict[bool, Segment | UntraceableError] = {}
    for answer in (False, True):
        then = (*answers, answer)
        is_known = bool(tree.under(then))
        following[answer] = _segment(tree, then, needed, compiled) if is_known else tree.refusal(then)
    return Segment(compiled(part), following)


def _needed(nodes: list[fx.Node], end: int) -> set[int]:
    """The places before `end` whose values are read from there on."""
    places = {node: place for place, node in enumerate(nodes[:end])}
    return {places[each] for node in nodes[end:] for each in node.all_input_nodes if each in places}


def _part(
    own: list[fx.Node], nodes: list[fx.Node], live: tuple[int, ...], results: tuple[fx.Node, ...] = ()
) -> fx.Graph:
    """A graph of some nodes that takes the live values, and returns the results, unless it ends by itself."""
    graph = fx.Graph()
    copies = {nodes[place]: graph.placeholder(f"live_{place}") for place in live}
    for node in own:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    if results:
        graph.output(tuple(copies[node] for node in results))
    return graph


def _is_same_start(some: list[fx.Node], others: list[fx.Node]) -> bool:
    """Whether two beginnings of graphs compute the same, node by node."""
    return len(some) == len(others) and _described(some) == _described(others)


def _described(nodes: list[fx.Node]) -> list[Any]:
    places = {node: place for place, node in enumerate(nodes)}
    return [
        (node.op, _target(node.target), fx.map_arg((node.args, node.kwargs), lambda each: ("node", places[each])))
        for node in nodes
    ]


def _target(target: Any) -> Any:
    """A target, to compare; a function made for a link of a path by its code and what it holds."""
    if isinstance(target, types.FunctionType) and target.__closure__:
        return target.__code__, tuple(cell.cell_contents for cell in target.__closure__)
    return target
