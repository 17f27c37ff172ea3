"""Producer modules whose weight is computed: parametrized, normed by a hook, pruned, or a property of the class.

Their own code computes the weights of frozen rows too, on a **stand-in**: a module of the same class and settings, in
which rows and gathered buffers take the places of the parameters and buffers. So what that code goes by (the mode, an
exploration type) holds for the rows as it does for the slots.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from neuronsurgery.errors import SurgeryError, UntraceableError
from neuronsurgery.pytorch.calls import default_call
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.computing import Computed, recipe_of
from neuronsurgery.pytorch.mirroring import original_class, submodule
from neuronsurgery.pytorch.models import random_states_kept
from neuronsurgery.pytorch.tracing import trace

__all__ = [
    "computed_of",
    "computing",
    "frozen_rows",
    "has_computed_weight",
    "is_parametrized",
    "norm_hooks",
    "stand_in",
]

HOOKS = (WeightNorm, BasePruningMethod)
_COUPLING = {
    parametrizations._SpectralNorm: "spectral norm",
    parametrizations._Orthogonal: "an orthogonal parametrization",
    SpectralNorm: "spectral norm",
}


def has_computed_weight(module: nn.Module) -> bool:
    """Whether a producer's weight or bias is no parameter of its own."""
    return "weight" not in module._parameters or "bias" not in module._parameters


def computed_of(module: nn.Module, axis: int | None) -> Computed | str:
    """How a producer computes its weight row by row, or why its units cannot be operated on.

    `axis` numbers the units in the weight; None where several axes do.
    """
    if reason := _unreadable(module):
        return reason
    if axis is None:
        return "its weight is computed, and several of its axes number the units"
    found = list(_tensors(module))
    paths, owners, values = [p for p, *_ in found], [(o, n) for _, o, n, _ in found], [v for *_, v in found]
    if any(value.device.type == "meta" for value in values):
        return "its weight is on the meta device"
    is_stored = [isinstance(value, nn.Parameter) and value.requires_grad for value in values]
    recipes = []
    for training in (not module.training, module.training):
        compute = computing(stand_in(module, {}, training), tuple(paths))
        try:
            with random_states_kept([]):
                recipe = recipe_of(paths, values, is_stored, compute, axis)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            problem = str(error).partition("\n")[0]
            return f"its weight is computed, which failed on other values ({type(error).__name__}: {problem})"
        if isinstance(recipe, str):
            return recipe
        recipes.append(recipe)
    if recipes[0] != recipes[1]:
        return "its weight is computed, from other parameters in training than in evaluation"
    known, first, second = recipes[0]
    weight: Any = values[first]
    bias: Any = None if second is None else values[second]
    return Computed(known, weight, bias, tuple(values), tuple(owners), computing(module, tuple(paths)))


def _unreadable(module: nn.Module) -> str:
    """Why the code that computes a weight cannot be relied on to depend on what the module shows alone."""
    parts = [part for _, part in _descendants(module)] + list(module._forward_pre_hooks.values())
    for part in parts:
        if type(part) in _COUPLING:
            return f"its weight is computed ({_COUPLING[type(part)]}), and its units are coupled"
    set_by_hooks = {getattr(hook, "name", getattr(hook, "_tensor_name", "")) for hook in norm_hooks(module)}
    for name in ("weight", "bias"):
        if isinstance(vars(module).get(name), Tensor) and name not in set_by_hooks:
            return f"its {name} is computed elsewhere: it is a plain attribute, which a hook or other code assigns"
    if _is_known(module):
        return ""
    inline = frozenset(path for path, _ in _descendants(module))
    try:
        for training in (False, True):
            trace(module, "forward", default_call(module), inline=inline, training=training)
    except UntraceableError as error:
        return f"its weight is computed, and the code that does cannot be read: {error.reason}"
    return ""


def _is_known(module: nn.Module) -> bool:
    """Whether the weight is computed by torch's own weight norm or pruning, or by a layer known by name."""
    cls = original_class(module)
    if f"{cls.__module__}.{cls.__name__}" in _FOREIGN or norm_hooks(module):
        return True
    steps = [part for _, part in _descendants(module) if not isinstance(part, _PARAMETRIZATION_LISTS)]
    return bool(steps) and all(isinstance(step, parametrizations._WeightNorm) for step in steps)


_FOREIGN = frozenset({"torchrl.modules.models.exploration.NoisyLinear"})
_PARAMETRIZATION_LISTS = (nn.ModuleDict, nn.utils.parametrize.ParametrizationList)


def norm_hooks(module: nn.Module) -> list[Any]:
    """The hooks of torch's own that compute a parameter of the module before its forward."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, HOOKS)]


def is_parametrized(module: nn.Module, name: str) -> bool:
    """Whether a parametrization computes the attribute."""
    lists = module._modules.get("parametrizations")
    return lists is not None and name in lists._modules


def _descendants(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, part in module.named_modules():
        if path and not isinstance(part, Composite) and path.partition(".")[0] != "composite":
            yield path, part


def _tensors(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Every parameter and buffer of a producer and its parametrizations: path, owner, attribute and value."""
    for path, part in (("", module), *_descendants(module)):
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, part, name, tensor


# -- the module's own code on other tensors --------------------------------------------------------------------------


def computing(module: nn.Module, paths: tuple[str, ...]) -> Any:
    """The module's weight and bias as a function of the tensors at these paths."""
    return functools.partial(_compute, module, paths)


def _compute(module: nn.Module, paths: tuple[str, ...], values: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    other = stand_in(module, dict(zip(paths, values, strict=True)))
    for hook in norm_hooks(module):
        hook(other, ())
    return _attribute(other, "weight"), _attribute(other, "bias")


def _attribute(module: Any, name: str) -> Any:
    if is_parametrized(module, name):  # not by way of torch's cache, which goes by the identity of the module
        return module.parametrizations[name].forward()
    return getattr(module, name)


def stand_in(module: nn.Module, tensors: Mapping[str, Tensor], training: bool | None = None) -> Any:
    """A module of the same class and settings with other tensors at these paths; all else is shared.

    `training` is its mode, None for the module's own.
    """
    made: Any = object.__new__(original_class(module))
    own = {path: tensor for path, tensor in tensors.items() if "." not in path}
    inner: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        child, _, rest = path.partition(".")
        if rest:
            inner.setdefault(child, {})[rest] = tensor
    children = dict(module._modules)
    for child in children if training is not None else inner:
        if isinstance(children[child], nn.Module) and not isinstance(children[child], Composite):
            children[child] = stand_in(submodule(module, child), inner.get(child, {}), training)
    made.__dict__.update(
        module.__dict__,
        _parameters={name: own.get(name, value) for name, value in module._parameters.items()},
        _buffers={name: own.get(name, value) for name, value in module._buffers.items()},
        _modules=children,
    )
    if training is not None:
        made.__dict__["training"] = training
    return made


def frozen_rows(producer: nn.Module, bank: Composite, x: Tensor) -> Tensor:
    """The pre-activations of a bank's rows, with weights that are computed as the producer computes its own now.

    Raises:
        SurgeryError: the producer no longer computes its weight from what it did when the bank was made.
    """
    assert bank.recipe is not None
    sources = bank.recipe.sources
    present = {path: value for path, _, _, value in _tensors(producer)}
    if missing := ", ".join(source.path for source in sources if source.path not in present):
        raise SurgeryError(
            f"the bank of this {original_class(producer).__name__} was made while its weight was computed from "
            f"{missing}, which it no longer has (a parametrization, a weight norm or a pruning was removed); undo the "
            "operation before you remove it"
        )
    live = [present[source.path] for source in sources if not source.name]
    return bank.computed(x, bank.recipe, computing(producer, tuple(source.path for source in sources)), live)
