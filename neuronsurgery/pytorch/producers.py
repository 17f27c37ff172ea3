"""Which modules and functions are producers: products of an input with weights that have a row for each unit.

Modules are known by their forward, those of other packages by name, so that nothing is imported for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from neuronsurgery.pytorch.computed_calls import Parts, computed_by, parts_of
from neuronsurgery.pytorch.computed_modules import computed_of, has_computed_weight
from neuronsurgery.pytorch.computing import FIRST_NAMES, Computed
from neuronsurgery.pytorch.hooks import may_change_output, parallelizes
from neuronsurgery.pytorch.mirroring import original_class, submodule
from neuronsurgery.pytorch.products import Contraction, Convolution, Linear, Product
from neuronsurgery.pytorch.recognition import UnitShape, canonical_name
from neuronsurgery.pytorch.unit_axes import UnitAxes

__all__ = [
    "Multiplication",
    "computed_weight_of",
    "is_producer",
    "multiplication_at",
    "product_of_module",
    "shape_of",
    "why_not_computed",
]


@dataclass(frozen=True, eq=False)
class Multiplication:
    """A call of a producer: its input's node, its parameters and their paths, and the product or why there is none."""

    producer: str
    received: fx.Node
    weight: nn.Parameter
    bias: nn.Parameter | None
    product: Product | str
    computed: Computed | None = None  # how, where weight and bias are no parameters but computed from several
    parts: Parts | None = None  # of a functional call, until its kind of product is known

    @property
    def bias_axes(self) -> UnitAxes:
        """Where the units are in the bias."""
        assert self.bias is not None and not isinstance(self.product, str)
        return shape_of(self.product, self.weight).axes_of(self.bias) or UnitAxes()


def multiplication_at(node: fx.Node, scope: nn.Module) -> Multiplication | None:
    """The producer that a node calls, a module or a function of a parameter; None where it calls none."""
    if node.op == "call_module":
        return _of_module(node, submodule(scope, str(node.target)))
    name = canonical_name(node) if node.op in ("call_function", "call_method") else ""
    return _FUNCTIONS[name](node, scope) if name in _FUNCTIONS else None


def shape_of(product: Product, weight: Tensor) -> UnitShape:
    """Where a product's units are in its result."""
    sizes = product.sizes if isinstance(product, Contraction) else (product.axes.num_units(weight.shape),)
    return UnitShape(product.unit_axes, sizes, product.is_stacked)


# -- modules ---------------------------------------------------------------------------------------------------------


def is_producer(module: nn.Module) -> bool:
    """Whether a module's forward is that of a producer."""
    return _kind_of(module) is not None


def _kind_of(module: nn.Module) -> Callable[[Any], Product | str] | None:
    cls = original_class(module)
    found = _MODULES.get(getattr(cls, "forward", None))
    return found or _FOREIGN.get(f"{cls.__module__}.{cls.__name__}")


def _of_module(node: fx.Node, module: nn.Module) -> Multiplication | None:
    if not is_producer(module):
        return None
    received = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("x"))
    computed = computed_weight_of(module)
    weight = module._parameters.get("weight") if computed is None else computed.weight
    if weight is None or not isinstance(received, fx.Node):
        return None
    product = product_of_module(module)
    if not isinstance(product, str) and len(node.args) + len(node.kwargs) > 1:
        product = f"{original_class(module).__name__} is called with an output size of its own"
    bias = module._parameters.get("bias") if computed is None else computed.bias
    if computed is None:
        product = _with_bias(product, weight, bias)
    return Multiplication(str(node.target), received, weight, bias, product, computed)


def computed_weight_of(module: nn.Module) -> Computed | None:
    """How a producer module computes its weight; None where it is a parameter, or `why_not_computed` has a reason."""
    found = _computed(module)
    return found if isinstance(found, Computed) else None


def why_not_computed(module: nn.Module) -> str:
    """Why the units of a producer module whose weight is computed cannot be operated on; "" for any other module."""
    found = _computed(module)
    return found if isinstance(found, str) else ""


def _computed(module: nn.Module) -> Computed | str | None:
    if not is_producer(module) or not has_computed_weight(module):
        return None
    product = product_of_module(module)
    if isinstance(product, str):
        return product
    axes = product.axes
    return computed_of(module, axes.axes[0] if len(axes.axes) == 1 and axes.groups == 1 else None)


def product_of_module(module: nn.Module) -> Product | str:
    """How a producer module computes pre-activations, or why its units cannot be operated on."""
    label = original_class(module).__name__
    if "forward" in vars(module):
        return f"its forward was replaced on the instance ({label})"
    if may_change_output(module):
        if any(parallelizes(hook) for hook in module._forward_hooks.values()):
            return (
                "tensor parallelism spreads what it computes in another way than ColwiseParallel, which leaves each "
                "process with outputs of its own units"
            )
        return "a forward hook on it may change its output"
    kind = _kind_of(module)
    assert kind is not None
    return kind(module)


def _linear(module: Any) -> Product | str:
    weight = module._parameters.get("weight")
    if weight is not None and weight.dim() != 2:
        return f"its weight has {weight.dim()} axes, as one stacked for torch.vmap has"
    return Linear()


def _convolution(module: Any) -> Product | str:
    dims = len(module.kernel_size)
    padded = tuple(module._reversed_padding_repeated_twice) if module.padding_mode != "zeros" else ()
    return Convolution(
        dims,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        module.out_channels // module.groups,
        module.padding_mode,
        padded,
        module.transposed,
        module.output_padding if module.transposed else (),
    )


def _columns(module: Any) -> Product | str:
    return Linear(UnitAxes((1,)))


def _einmix(module: Any) -> Product | str:
    if getattr(module, "pre_rearrange", None) is not None or getattr(module, "post_rearrange", None) is not None:
        return "EinMix with composed axes, (a b), rearranges around its product"
    return _contraction(module.einsum_pattern, module.weight)


_MODULES: dict[Any, Callable[[Any], Product | str]] = {
    nn.Linear.forward: _linear,
    nn.Conv1d.forward: _convolution,
    nn.Conv2d.forward: _convolution,
    nn.Conv3d.forward: _convolution,
    nn.ConvTranspose1d.forward: _convolution,
    nn.ConvTranspose2d.forward: _convolution,
    nn.ConvTranspose3d.forward: _convolution,
}
_FOREIGN: dict[str, Callable[[Any], Product | str]] = {
    "transformers.pytorch_utils.Conv1D": _columns,
    "einops.layers.torch.EinMix": _einmix,
}


# -- functions -------------------------------------------------------------------------------------------------------


def _call(node: fx.Node, scope: nn.Module, received: Any, weight: Any, bias: Any) -> Multiplication | None:
    """A product of an input with a parameter, of a kind yet to be found; with any other weight it is none of ours."""
    parameter = _parameter(weight, scope)
    if not isinstance(received, fx.Node):
        return None
    found = _parameter(bias, scope)
    if parameter is None or (bias is not None and found is None):
        return _computed_call(received, weight, bias, scope, parameter)
    return Multiplication(str(weight.target), received, parameter, found, "")


def _computed_call(
    received: fx.Node, weight: Any, bias: Any, scope: nn.Module, parameter: nn.Parameter | None
) -> Multiplication | None:
    """A product with a weight or a bias that the graph computes, for now under a parameter of the weight's shape."""
    parts = parts_of(weight, bias, scope)
    if parts is None:
        if parameter is None:
            return None
        return Multiplication(str(weight.target), received, parameter, None, "its bias is computed")
    pairs = zip(parts.sources, parts.values, parts.is_trained, strict=True)
    alike = [(node, value) for node, value, is_trained in pairs if is_trained and value.shape == parts.shape]
    if not alike:
        return None
    node, value = alike[0]
    return Multiplication(str(node.target), received, value, None, "", parts=parts)


def _with(call: Multiplication | None, product: Product | str, scope: nn.Module) -> Multiplication | None:
    """The call with its kind of product, unless something is amiss already."""
    if call is None or call.product:
        return call
    if call.parts is not None and not isinstance(product, str):
        return _with_parts(call, call.parts, product, scope)
    return replace(call, product=_with_bias(product, call.weight, call.bias))


def _with_bias(product: Product | str, weight: Tensor, bias: Tensor | None) -> Product | str:
    """The product, unless its bias has other than one number for each unit."""
    if isinstance(product, (str, Convolution)) or bias is None:  # torch gives a convolution's bias its axis itself
        return product
    return product if shape_of(product, weight).axes_of(bias) else "its bias is not one number per unit"


def _with_parts(call: Multiplication, parts: Parts, product: Product, scope: nn.Module) -> Multiplication:
    """The call with the recipe by which the graph computes its weight, or with the reason why there is none."""
    axes = product.axes
    computed = computed_by(parts, axes.axes[0] if len(axes.axes) == 1 and axes.groups == 1 else None, scope)
    if isinstance(computed, str):
        return replace(call, product=computed)
    producer = next(source.path for source in computed.recipe.sources if source.name == FIRST_NAMES[0])
    return replace(
        call, producer=producer, weight=computed.weight, bias=computed.bias, product=product, computed=computed
    )


def _linear_call(node: fx.Node, scope: nn.Module) -> Multiplication | None:
    given = _named(node, ("input", "weight", "bias"))
    return _with(_call(node, scope, given.get("input"), given.get("weight"), given.get("bias")), Linear(), scope)


def _convolution_call(node: fx.Node, scope: nn.Module) -> Multiplication | None:
    kind = canonical_name(node)
    transposed = "transpose" in kind
    tail = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    given = _named(node, ("input", "weight", "bias", "stride", "padding", *tail))
    call = _call(node, scope, given.get("input"), given.get("weight"), given.get("bias"))
    names = ("stride", "padding", "dilation", "groups", "output_padding")
    if call is None or any(isinstance(item, fx.Node) for name in names for item in _items(given.get(name))):
        return call and _with(call, "its stride, padding or dilation is computed", scope)
    dims, groups = int(kind[-2]), given.get("groups", 1)
    num_units = call.weight.shape[1] * groups if transposed else call.weight.shape[0]
    padding = given.get("padding", 0)
    product = Convolution(
        dims,
        _spread(given.get("stride", 1), dims),
        padding if isinstance(padding, str) else _spread(padding, dims),
        _spread(given.get("dilation", 1), dims),
        groups,
        num_units // groups,
        transposed=transposed,
        output_padding=_spread(given.get("output_padding", 0), dims) if transposed else (),
    )
    return _with(call, product, scope)


def _matmul_call(node: fx.Node, scope: nn.Module) -> Multiplication | None:
    """`x @ W`, and `bmm(x, W)` of stacked weights (experts, in, out); a weight on the left where axes are known."""
    given = _named(node, ("input", "other"))
    x, weight = given.get("input"), given.get("other", given.get("mat2", given.get("tensor2")))
    if call := _call(node, scope, x, weight, None):
        return _with(call, _product_with(call.weight), scope)
    call = _call(node, scope, weight, x, None)
    if call is None:
        return None
    if canonical_name(node) == "matmul":
        return _with(call, "its weight multiplies from the left, by an input whose number of axes is not known", scope)
    letters = ("ib", "oi", "ob") if call.weight.dim() == 2 else ("eib", "eoi", "eob")
    return _with(call, _contraction(f"{letters[0]},{letters[1]}->{letters[2]}", call.weight), scope)


def _addmm_call(node: fx.Node, scope: nn.Module) -> Multiplication | None:
    given = _named(node, ("input", "mat1", "mat2"))
    x, weight = given.get("mat1", given.get("batch1")), given.get("mat2", given.get("batch2"))
    call = _call(node, scope, x, weight, given.get("input"))
    if call is not None and (given.get("beta", 1) != 1 or given.get("alpha", 1) != 1):
        return _with(call, "its product is scaled (alpha, beta)", scope)
    return call and _with(call, _product_with(call.weight), scope)


def _product_with(weight: Tensor) -> Product | str:
    """`x @ weight`: (in, out), or with leading axes that number units as well."""
    if weight.dim() == 2:
        return Linear(UnitAxes((1,)))
    if not 3 <= weight.dim() <= 6:
        return f"a product with a weight of {weight.dim()} axes"
    lead = "efgh"[: weight.dim() - 2]
    return _contraction(f"{lead}bi,{lead}io->{lead}bo", weight)


def _einsum_call(node: fx.Node, scope: nn.Module) -> Multiplication | None:
    """Torch's `einsum("bi,io->bo", x, W)` and einops' `einsum(x, W, "b i, i o -> b o")`."""
    texts = [argument for argument in node.args if isinstance(argument, str)]
    operands = [argument for argument in node.args if not isinstance(argument, str)]
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (tuple, list)) else operands
    if len(texts) != 1 or len(operands) != 2 or node.kwargs:
        return None
    pattern = _letters(texts[0]) if isinstance(node.args[-1], str) else texts[0].replace(" ", "")
    if call := _call(node, scope, operands[0], operands[1], None):
        return _with(call, _contraction(pattern, call.weight), scope)
    call = _call(node, scope, operands[1], operands[0], None)
    left, _, right = pattern.partition(",")
    second, arrow, result = right.partition("->")
    return call and _with(call, _contraction(f"{second},{left}{arrow}{result}", call.weight), scope)


def _letters(pattern: str) -> str:
    """Einops' pattern with a letter for each name."""
    names = sorted(set(re.findall(r"[A-Za-z_]\w*", pattern)))
    table = {name: chr(ord("a") + place) for place, name in enumerate(names)}
    return re.sub(r"[A-Za-z_]\w*", lambda found: table[found.group()], pattern).replace(" ", "")


def _contraction(pattern: str, weight: Tensor) -> Product | str:
    """A pattern "x,weight->result" as a product, where it is one; the units' letters number them."""
    unread = f"einsum('{pattern}') is not a product with a row for each unit"
    match = re.fullmatch(r"(\.{3})?([a-zA-Z]+),([a-zA-Z]+)->(\.{3})?([a-zA-Z]+)", pattern)
    if match is None or bool(match[1]) != bool(match[4]):
        return unread
    x, own, result = (text.replace("R", "Q") for text in (match[2], match[3], match[5]))
    letters = [letter for letter in result if letter in own]
    summed = [letter for letter in own if letter not in result]
    is_fine = bool(letters) and all(len(set(text)) == len(text) for text in (x, own, result))
    if not is_fine or any(letter not in x for letter in summed) or "Q" in pattern:
        return unread
    if any(letter not in result + own for letter in x):
        return unread
    return Contraction(x, own, result, tuple(weight.shape[own.index(letter)] for letter in letters))


_FUNCTIONS: dict[str, Callable[[fx.Node, nn.Module], Multiplication | None]] = {
    "linear": _linear_call,
    **{f"conv{dims}d": _convolution_call for dims in (1, 2, 3)},
    **{f"conv_transpose{dims}d": _convolution_call for dims in (1, 2, 3)},
    **dict.fromkeys(("matmul", "mm", "bmm"), _matmul_call),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm_call),
    "einsum": _einsum_call,
}


def _named(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _parameter(argument: Any, scope: nn.Module) -> nn.Parameter | None:
    """The parameter an argument reads directly, else None."""
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return None
    owner, _, name = str(argument.target).rpartition(".")
    return submodule(scope, owner)._parameters.get(name)


def _items(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _spread(value: Any, axes: int) -> tuple[int, ...]:
    items = _items(value)
    return items if len(items) == axes else items * axes
