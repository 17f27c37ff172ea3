"""The producers in one traced forward, and what each of their outputs passes on the way to its consumers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from neuronsurgery.pytorch.composites import Product, UnitPath
from neuronsurgery.pytorch.hooks import is_hook_call, may_change_output
from neuronsurgery.pytorch.mirroring import original_class, submodule
from neuronsurgery.pytorch.recognition import canonical_name, function_of_module, function_of_node
from neuronsurgery.pytorch.unitwise import IDENTITY, Kind, UnitFunction

__all__ = ["PRODUCERS", "Use", "find_uses", "product_of_module"]

PRODUCERS: dict[Any, str] = {
    nn.Linear.forward: "linear",
    nn.Conv1d.forward: "conv1d",
    nn.Conv2d.forward: "conv2d",
    nn.Conv3d.forward: "conv3d",
}
_FUNCTIONS = frozenset(PRODUCERS.values())


@dataclass(frozen=True, eq=False)
class Use:
    """One call of a producer in a graph.

    `producer` is its path in the scope (a module's, or a parameter's for a functional call); `received` the node of its
    input. A use that can be part of a site has an `end`, the node of its activation; any other a `problem`.
    `is_open` marks a pre-activation that the scope returns as it is: its activation may lie in a caller.
    """

    producer: str
    node: fx.Node
    received: fx.Node
    weight: nn.Parameter
    bias: nn.Parameter | None
    product: Product | None
    end: fx.Node | None = None
    path: UnitPath | None = None
    parameters: tuple[str, ...] = ()
    problem: str = ""
    is_open: bool = False

    @property
    def is_module(self) -> bool:
        """Whether the producer is called as a module; else it is a function on a parameter."""
        return self.node.op == "call_module"


def find_uses(graph: fx.Graph, scope: nn.Module) -> list[Use]:
    """Every call of a producer in the graph of a scope's forward, followed to its activation."""
    return [_followed(use, scope) for node in graph.nodes if (use := _use_at(node, scope)) is not None]


# -- producers -------------------------------------------------------------------------------------------------------


def _use_at(node: fx.Node, scope: nn.Module) -> Use | None:
    if node.op == "call_module":
        return _module_use(node, submodule(scope, str(node.target)))
    if node.op == "call_function" and canonical_name(node) in _FUNCTIONS:
        return _function_use(node, scope)
    return None


def _module_use(node: fx.Node, module: nn.Module) -> Use | None:
    if getattr(original_class(module), "forward", None) not in PRODUCERS:
        return None
    weight = module._parameters.get("weight")
    received = node.args[0] if node.args else node.kwargs.get("input")
    if weight is None or not isinstance(received, fx.Node):
        return None
    product = product_of_module(module)
    problem = product if isinstance(product, str) else ""
    bias = module._parameters.get("bias")
    known = None if isinstance(product, str) else product
    return Use(str(node.target), node, received, weight, bias, known, problem=problem)


def product_of_module(module: nn.Module) -> Product | str:
    """How a producer module computes pre-activations, or why its units cannot be operated on."""
    label = original_class(module).__name__
    if "forward" in vars(module):
        return f"its forward was replaced on the instance ({label})"
    for name in ("weight", "bias"):
        if name not in module._parameters:
            return f"its {name} is computed (a parametrization, weight norm, spectral norm or pruning)"
    if may_change_output(module):
        return "a forward hook on it may change its output"
    kind = PRODUCERS[original_class(module).forward]
    if kind == "linear":
        return Product("linear")
    if module.groups != 1:
        return f"a grouped convolution (groups={module.groups})"
    return Product(
        kind,
        module.stride,  # type: ignore[arg-type]
        module.padding,  # type: ignore[arg-type]
        module.dilation,  # type: ignore[arg-type]
        module.padding_mode,  # type: ignore[arg-type]
        tuple(module._reversed_padding_repeated_twice),  # type: ignore[arg-type]
    )


def _function_use(node: fx.Node, scope: nn.Module) -> Use | None:
    """A functional call on a parameter; on any other weight it is no producer of ours."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    arguments: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    weight, bias = _parameter(arguments.get("weight"), scope), _parameter(arguments.get("bias"), scope)
    received = arguments.get("input")
    if weight is None or not isinstance(received, fx.Node):
        return None
    product = _product_of_call(canonical_name(node), arguments, bias)
    problem = product if isinstance(product, str) else ""
    known = None if isinstance(product, str) else product
    return Use(str(arguments["weight"].target), node, received, weight, bias, known, problem=problem)


def _parameter(argument: Any, scope: nn.Module) -> nn.Parameter | None:
    """The parameter an argument reads directly, else None."""
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    owner, _, name = str(argument.target).rpartition(".")
    return submodule(scope, owner)._parameters.get(name)


def _product_of_call(kind: str, arguments: dict[str, Any], bias: nn.Parameter | None) -> Product | str:
    if arguments.get("bias") is not None and bias is None:
        return "its bias is computed"
    constants = [arguments.get(name) for name in ("stride", "padding", "dilation", "groups")]
    if any(isinstance(item, fx.Node) for value in constants for item in _items(value)):
        return "its stride, padding or dilation is computed"
    if kind == "linear":
        return Product("linear")
    if arguments.get("groups", 1) != 1:
        return f"a grouped convolution (groups={arguments['groups']})"
    axes = int(kind[4])
    stride, padding, dilation = (
        value if isinstance(value, str) else _spread(value, axes)
        for value in (arguments.get("stride", 1), arguments.get("padding", 0), arguments.get("dilation", 1))
    )
    return Product(kind, stride, padding, dilation)  # type: ignore[arg-type]


def _items(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _spread(value: Any, axes: int) -> tuple[int, ...]:
    items = _items(value)
    return items if len(items) == axes else items * axes


# -- from producer to activation -------------------------------------------------------------------------------------


def _followed(use: Use, scope: nn.Module) -> Use:
    """The use with the activation it ends in, or with the problem that stands in its way."""
    if use.problem:
        return use
    function = IDENTITY
    parameters: tuple[str, ...] = ()
    node, offset = use.node, 0
    while True:
        users = [user for user in node.users if not is_hook_call(user)]
        if len(users) != 1:
            return replace(use, problem=_unread_or_shared(len(users)))
        user = users[0]
        if user.op == "output":
            is_open = user.args[0] is node
            return replace(use, problem="no activation function: the scope returns its output", is_open=is_open)
        found = _function_at(user, node, scope)
        if isinstance(found, str):
            return replace(use, problem=found)
        step, names, module = found
        function, parameters, node, offset = step.after(function), (*parameters, *names), user, offset + 1
        if step.kind is not Kind.NEUTRAL:
            activation_class = original_class(module).__qualname__ if module is not None else ""
            path = UnitPath(replace(function, parameters=()), offset, activation_class)
            path = replace(path, function=replace(function, parameters=_labels(parameters)))
            return replace(use, end=node, path=path, parameters=parameters)


def _labels(parameters: tuple[str, ...]) -> tuple[str, ...]:
    """Path parameters by their last name: the same in every scope that reaches the site."""
    return tuple(name.rsplit(".", 1)[-1] for name in parameters)


def _unread_or_shared(num_users: int) -> str:
    if num_users == 0:
        return "its output is not used"
    return f"its pre-activation is read {num_users} times, not only by one activation function"


Found = tuple[UnitFunction, tuple[str, ...], nn.Module | None]


def _function_at(node: fx.Node, value: fx.Node, scope: nn.Module) -> Found | str:
    """The unit-wise function at a node, its parameters as paths in the scope, and its module where it has one."""
    if node.op != "call_module":
        found = function_of_node(node, value)
        return found if isinstance(found, str) else (found, found.parameters, None)
    path = str(node.target)
    module = submodule(scope, path)
    if node.args != (value,) or node.kwargs:
        return f"no activation function: it feeds '{path}' with other arguments"
    if "forward" in vars(module):
        return f"the forward of '{path}' was replaced on the instance"
    if module._forward_pre_hooks or may_change_output(module):
        return f"a hook on '{path}' may change what its units pass on"
    function = function_of_module(module)
    if isinstance(function, str):
        return f"no activation function: it feeds '{path}' ({function})"
    return function, tuple(f"{path}.{name}" for name in function.parameters), module


def parameters_of(use: Use, scope: nn.Module) -> tuple[nn.Parameter, ...]:
    """The path's own parameters (a PReLU's slope)."""
    return tuple(_resolved(scope, name) for name in use.parameters)


def _resolved(scope: nn.Module, name: str) -> nn.Parameter:
    owner, _, last = name.rpartition(".")
    parameter = submodule(scope, owner)._parameters[last]
    assert parameter is not None
    return parameter


def get_attr_reads(graph: fx.Graph, scope: nn.Module) -> Iterator[tuple[fx.Node, Tensor]]:
    """Every node that reads a tensor of the scope directly, with that tensor."""
    for node in graph.nodes:
        if node.op == "get_attr":
            value: Any = scope
            for name in str(node.target).split("."):
                value = getattr(value, name)
            if isinstance(value, torch.Tensor):
                yield node, value
