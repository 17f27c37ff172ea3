"""Whether every use of a value passes another producer before anything could rely on its range.

A composite leaves the range of its activation function: after training, some sums of three tanh members lie outside
[-1, 1], some of three `abs` members are negative. So a range-bearing activation is a site only where its value is
shown to enter another layer's weights first: by the traced scopes, from the smallest outward, or, where those end, by
the autograd graph of an example (Linear -> Tanh -> Linear is shown, a Linear -> Tanh head is not).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from neuronsurgery.pytorch.mirroring import original_class, submodule
from neuronsurgery.pytorch.recognition import canonical_name, function_of_module, is_metadata

__all__ = ["Lookahead", "is_of_parameters", "is_shielded_by_autograd"]

# Shape, sum and selection: the value goes on as it is, and whatever follows is looked at in its turn.
PASSING = frozenset(
    "view reshape flatten unflatten permute transpose t swapaxes movedim squeeze unsqueeze expand expand_as repeat "
    "repeat_interleave contiguous clone cat concat concatenate stack hstack vstack chunk split tensor_split unbind "
    "getitem select narrow index_select gather take_along_dim flip roll pad add iadd sub isub neg float half double "
    "bfloat16 to type_as dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout mean sum nansum "
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d boolean_dispatch interpolate "
    "batch_norm layer_norm group_norm rms_norm instance_norm relu leaky_relu elu selu celu gelu silu mish "
    "detach".split()
)
PARTLY_DEFINED = frozenset("sqrt rsqrt log log2 log10 log1p logit acosh reciprocal".split())
PRODUCTS = frozenset(
    "mul imul multiply div truediv divide matmul mm addmm bmm baddbmm linear einsum conv1d conv2d conv3d".split()
)
PASSING_MODULES = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.modules.dropout._DropoutNd,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.Upsample,
    nn.PixelShuffle,
)
MIXING_MODULES = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.modules.rnn.RNNBase,
    nn.modules.rnn.RNNCellBase,
    nn.MultiheadAttention,
)
MIXING = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul mm addmm bmm "
    "baddbmm einsum".split()
)


@dataclass
class Lookahead:
    """The traced scopes of a model, and where each module is called in them."""

    graphs: dict[int, tuple[nn.Module, Sequence[fx.Graph]]]  # id of a scope -> it, its graphs
    callers: dict[int, list[tuple[nn.Module, fx.Node]]]  # id of a module -> the scopes and nodes that call it
    blind: Callable[[nn.Module], str | None]  # a caller of a scope that could not be traced, by name
    pending: list[tuple[nn.Module, fx.Node]] = field(default_factory=list)  # values still to be followed
    harmless: dict[bool, set[int]] = field(default_factory=lambda: {False: set(), True: set()})
    needs_proof: bool = True

    def why_not(self, scope: nn.Module, node: fx.Node, *, needs_proof: bool = True) -> str | None:
        """The use before another producer, in words, that may rely on the range of a node's value; None: no use does.

        With `needs_proof` every use must be known to be harmless; without, only a function that is not defined for
        negative values counts (a ReLU's value under a square root: a composite of ReLUs can be negative).
        """
        self.pending, self.needs_proof = [(scope, node)], needs_proof
        harmless, seen = self.harmless[needs_proof], set[int]()
        while self.pending:
            scope, node = self.pending.pop()
            if id(node) not in seen and id(node) not in harmless:
                seen.add(id(node))
                if reason := _first(self._use(scope, node, user) for user in node.users):
                    return reason
        harmless |= seen  # all that can be reached from these was looked at: the next site need not do it again
        return None

    def _doubt(self, reason: str) -> str | None:
        return reason if self.needs_proof else None

    def _uses(self, scope: nn.Module, node: fx.Node) -> str | None:
        """Follow the value of a node as well: in its turn, since models are deeper than Python's stack."""
        self.pending.append((scope, node))
        return None

    def _use(self, scope: nn.Module, node: fx.Node, user: fx.Node) -> str | None:
        if user.op == "output":
            return self._output(scope, node, user)
        if user.op == "call_module":
            return self._module(scope, node, user)
        name = canonical_name(user)
        if is_metadata(user):
            return None
        if name in MIXING and _weight_is_parameter(user, node):
            return None
        if name in PARTLY_DEFINED or _is_denominator(name, user, node) or _is_fractional_power(name, user):
            return f"'{name}' is not defined for all values"
        if name in PRODUCTS and _other_tensors(user, node):
            return self._doubt(f"'{name}' multiplies it with a computed tensor") or self._uses(scope, user)
        if name in PASSING or name in PRODUCTS:
            return self._uses(scope, user)
        return self._doubt(f"'{name}' may rely on its range")

    def _module(self, scope: nn.Module, node: fx.Node, user: fx.Node) -> str | None:
        path = str(user.target)
        module = submodule(scope, path)
        if isinstance(module, MIXING_MODULES) and (
            isinstance(module, nn.MultiheadAttention) or (user.args[:1] == (node,) and node not in user.args[1:])
        ):
            return None
        if isinstance(module, PASSING_MODULES):
            return self._uses(scope, user)
        if id(module) in self.graphs:
            inner, graphs = self.graphs[id(module)]
            return _first(self._inside(inner, graph, node, user) for graph in graphs)
        if user.args == (node,) and not isinstance(function_of_module(module), str):
            name = getattr(function_of_module(module), "name", "")
            if name in PASSING:
                return self._uses(scope, user)
            return self._doubt(f"'{name}' ({path}) may rely on its range")
        return self._doubt(f"it enters '{path}', which cannot be followed")

    def _inside(self, inner: nn.Module, graph: fx.Graph, node: fx.Node, user: fx.Node) -> str | None:
        if user.kwargs or any(not isinstance(argument, fx.Node) for argument in user.args):
            return self._doubt(f"it enters '{user.target}' in a way that cannot be followed")
        placeholders = [inside for inside in graph.nodes if inside.op == "placeholder"]
        entered = [inside for inside, argument in zip(placeholders, user.args, strict=False) if argument is node]
        return _first(self._uses(inner, inside) for inside in entered)

    def _output(self, scope: nn.Module, node: fx.Node, output: fx.Node) -> str | None:
        label = original_class(scope).__name__
        callers = self.callers.get(id(scope), [])
        if self.needs_proof and (blind := self.blind(scope)):
            return f"it leaves {label} to {blind}, which cannot be traced"
        if not callers:
            return self._doubt(f"it is returned by {label}")
        result: Any = output.args[0]
        if result is node:
            return _first(self._uses(caller, call) for caller, call in callers)
        if isinstance(result, tuple) and node in result:
            return _first(self._item(caller, call, result.index(node)) for caller, call in callers)
        return self._doubt(f"it is returned by {label} inside a structure")

    def _item(self, caller: nn.Module, call: fx.Node, index: int) -> str | None:
        for user in call.users:
            if canonical_name(user) != "getitem":
                return self._doubt("the tuple it is returned in is handed on")
            if user.args[1] == index and (reason := self._uses(caller, user)):
                return reason
        return None


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason), None)


def _is_denominator(name: str, user: fx.Node, value: fx.Node) -> bool:
    return name in ("div", "truediv", "divide") and user.args[0] is not value


def _is_fractional_power(name: str, user: fx.Node) -> bool:
    return name in ("pow", "float_power") and not isinstance(user.args[-1], int)


def _weight_is_parameter(node: fx.Node, value: fx.Node) -> bool:
    others = _other_tensors(node, value)
    return bool(others) and all(map(is_of_parameters, others))


def is_of_parameters(node: fx.Node) -> bool:
    """Whether a value is a parameter or buffer, or computed from such alone."""
    seen, waiting = set[fx.Node](), [node]
    while waiting:
        found = waiting.pop()
        if found.op not in ("get_attr", "call_function", "call_method"):
            return False
        waiting += [each for each in found.all_input_nodes if each not in seen]
        seen.add(found)
    return True


def _other_tensors(node: fx.Node, value: fx.Node) -> list[fx.Node]:
    return [other for other in node.all_input_nodes if other is not value]


# -- by the autograd graph of an example ----------------------------------------------------------------------------

_MIXING_NODES = (
    "AddmmBackward",
    "MmBackward",
    "ConvolutionBackward",
    "BmmBackward",
    "AddmvBackward",
    "MvBackward",
)
_VIEWS = (
    "TBackward",
    "TransposeBackward",
    "PermuteBackward",
    "ViewBackward",
    "UnsafeViewBackward",
    "ToCopyBackward",
)


def is_shielded_by_autograd(outputs: Sequence[Tensor], weight: nn.Parameter) -> bool:
    """Whether the outputs depend on this producer, and only through products with other parameters."""
    return _reaches(outputs, weight, through_producers=True) and not _reaches(outputs, weight, through_producers=False)


def _reaches(outputs: Sequence[Tensor], weight: nn.Parameter, through_producers: bool) -> bool:
    """Whether a path leads from the outputs back to the weight's product, past other parameters' products or not."""
    stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        leaves = list(_own_parameters(node))
        if any(leaf is weight for leaf in leaves):
            return True
        if through_producers or not leaves:
            stack.extend(_edges(node))
    return False


def _own_parameters(node: Any) -> Iterator[Tensor]:
    """The parameters a product multiplies with; none for any other node."""
    if node.name().startswith(_MIXING_NODES):
        for edge in _edges(node):
            yield from _leaves(edge)


def _edges(node: Any) -> Iterator[Any]:
    return (edge for edge, _ in node.next_functions if edge is not None)


def _leaves(node: Any) -> Iterator[Tensor]:
    """The parameter directly behind an edge, through views of it alone."""
    while node.name().startswith(_VIEWS):
        edges = list(_edges(node))
        if len(edges) != 1:
            return
        node = edges[0]
    variable = getattr(node, "variable", None)
    if variable is not None:
        yield variable
