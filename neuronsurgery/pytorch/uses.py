"""The producers in one traced forward, and what each of their outputs passes on the way to its consumers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from neuronsurgery.pytorch.composites import UnitPath
from neuronsurgery.pytorch.following import Followed, LinkUse, follow
from neuronsurgery.pytorch.mirroring import original_class, submodule
from neuronsurgery.pytorch.producers import Multiplication, multiplication_at, shape_of
from neuronsurgery.pytorch.products import Product
from neuronsurgery.pytorch.recognition import OwnTensor
from neuronsurgery.pytorch.tracing import INLINED

__all__ = ["Use", "find_uses", "get_attr_reads"]


@dataclass(frozen=True, eq=False)
class Use:
    """One call of a producer in a graph, and where its output leads.

    A use that can be part of a site has a `path`, and as `end` the node of its activation; any other has a `problem`.
    """

    node: fx.Node
    call: Multiplication
    followed: Followed
    path: UnitPath | None = None

    @property
    def producer(self) -> str:
        """Its path in the scope: a module's, or a parameter's for a functional call."""
        return self.call.producer

    @property
    def weight(self) -> nn.Parameter:
        return self.call.weight

    @property
    def product(self) -> Product:
        assert not isinstance(self.call.product, str)
        return self.call.product

    @property
    def problem(self) -> str:
        return self.followed.problem

    @property
    def links(self) -> tuple[LinkUse, ...]:
        return self.followed.links

    @property
    def end(self) -> fx.Node:
        """The node of its activation."""
        return self.links[-1].node

    @property
    def last(self) -> fx.Node:
        """The node of the last link, or of the producer itself where there is none."""
        return self.links[-1].node if self.links else self.node

    @property
    def origins(self) -> tuple[str, ...]:
        """For the producer and each link, the path of the inlined child that it comes from, "" for the scope itself."""
        return tuple(node.meta.get(INLINED, "") for node in (self.node, *(link.node for link in self.links)))

    @property
    def own(self) -> tuple[OwnTensor, ...]:
        """The tensors of all links, in the order of the path's labels; paths in the scope."""
        return tuple(each for link in self.links for each in link.own)

    @property
    def producing(self) -> tuple[fx.Node, ...]:
        """The node of the product, and those that compute its weight."""
        computed = self.call.computed
        return (self.node,) if computed is None else (self.node, *computed.nodes, *computed.inner)

    @property
    def is_module(self) -> bool:
        """Whether the producer is called as a module; else it is a function on a parameter."""
        return self.node.op == "call_module"


def find_uses(graph: fx.Graph, scope: nn.Module) -> list[Use]:
    """Every call of a producer in the graph of a scope's forward, followed to its activation."""
    calls = ((node, multiplication_at(node, scope)) for node in graph.nodes)
    return [_use(node, call, scope) for node, call in calls if call is not None]


def _use(node: fx.Node, call: Multiplication, scope: nn.Module) -> Use:
    if isinstance(call.product, str):
        return Use(node, call, Followed((), call.product))
    followed = follow(node, scope, shape_of(call.product, call.weight))
    if followed.problem:
        return Use(node, call, followed)
    return Use(node, call, followed, UnitPath(tuple(u.link for u in followed.links), _classes(followed, scope)))


def _classes(followed: Followed, scope: nn.Module) -> tuple[str, ...]:
    """The class of each link that is one module's call, "" for functions."""
    return tuple(
        original_class(submodule(scope, use.module)).__qualname__ if use.module else "" for use in followed.links
    )


def get_attr_reads(graph: fx.Graph, scope: nn.Module) -> Iterator[tuple[fx.Node, Tensor]]:
    """Every node that reads a tensor of the scope directly, with that tensor."""
    for node in graph.nodes:
        if node.op == "get_attr":
            value: Any = scope
            for name in str(node.target).split("."):
                value = getattr(value, name)
            if isinstance(value, torch.Tensor):
                yield node, value
