"""Fresh rows of what a computed weight comes from: as the class's own initializer would leave them.

A parametrized, weight-normed or pruned layer is initialized as its class does without that, and what is stored follows
as if the norm were put on then: g is the norm of v. A layer with parameters of its own kind (mean and scale of a noisy
layer) initializes them itself. What no initializer reaches is drawn like the layer is now, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from neuronsurgery.pytorch.computed_modules import is_parametrized, norm_hooks, stand_in
from neuronsurgery.pytorch.computing import FIRST_NAMES, Computed
from neuronsurgery.pytorch.mirroring import original_class
from neuronsurgery.pytorch.places import Place

__all__ = ["fresh_sources"]


def fresh_sources(place: Place, init: Callable[[Tensor], object] | None) -> tuple[dict[str, Tensor], str]:
    """A fresh tensor for each stored source of a place, by the name of the bank's buffer, and a note for the report.

    `init` fills a weight of the producer's whole shape in place; biases are then zero. The caller sees to `no_grad` and
    to the random state.
    """
    owner, name = place.owners[0]
    computed = place.computed[0]
    is_module = name == "composite"
    if is_module and (norm_hooks(owner) or "parametrizations" in owner._modules):
        found = _of_plain_layer(owner, computed, init)
    else:
        found = _of_own_initializer(owner, computed, init)
    fresh, notes = {}, []
    for source, value in zip(computed.recipe.sources, computed.values, strict=True):
        if not source.name:
            continue
        whole = found.get(id(value))
        if whole is None or not bool(whole.isfinite().all()):
            whole = _like_now(value, is_first=source.name == FIRST_NAMES[0])
            notes.append(source.path)
        fresh[source.name] = whole
    note = f"{place.site.name}: no initializer of its own for {', '.join(notes)}; drew what is like the layer now"
    return fresh, note if notes else ""


def _like_now(value: Tensor, *, is_first: bool) -> Tensor:
    """Normal with the layer's standard deviation for what stands for the weight, the layer's mean for all else."""
    current = value.detach().float()
    if not is_first:
        return torch.full_like(value, float(current.mean()), requires_grad=False)
    std = float(current.std() if current.numel() > 1 else current.abs())
    return torch.empty_like(value, requires_grad=False).normal_(0.0, std)


def _unfilled(like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.full_like(like, torch.nan, requires_grad=False))


# -- a layer of its own kind -----------------------------------------------------------------------------------------


def _of_own_initializer(
    owner: nn.Module, computed: Computed, init: Callable[[Tensor], object] | None
) -> dict[int, Tensor]:
    """What `reset_parameters` makes of a scratch copy of the module, by the ids of the tensors they are fresh for."""
    scratch = stand_in(owner, {name: _unfilled(p) for name, p in owner._parameters.items() if p is not None})
    scratch.__dict__["_buffers"] = {name: b if b is None else b.clone() for name, b in owner._buffers.items()}
    reset = getattr(scratch, "reset_parameters", None)
    if callable(reset):
        try:
            reset()
        except Exception:  # the user's own code on a copy without values: what it does not fill is drawn otherwise
            scratch = stand_in(owner, {name: _unfilled(p) for name, p in owner._parameters.items() if p is not None})
    found = {id(p): scratch._parameters[name].detach() for name, p in owner._parameters.items() if p is not None}
    if init is not None:
        found[id(computed.weight)] = _filled(init, computed.weight)
        if computed.bias is not None:
            found[id(computed.bias)] = torch.zeros_like(computed.bias, requires_grad=False)
    return found


def _filled(init: Callable[[Tensor], object], like: Tensor) -> Tensor:
    weight = torch.full_like(like, torch.nan, requires_grad=False)
    init(weight)
    return weight


# -- a layer of torch's with something put on ------------------------------------------------------------------------


def _of_plain_layer(owner: nn.Module, computed: Computed, init: Callable[[Tensor], object] | None) -> dict[int, Tensor]:
    plain = _plain(owner, computed)
    if init is not None:
        plain._parameters["weight"] = nn.Parameter(_filled(init, computed.weight))
        if plain._parameters["bias"] is not None:
            plain._parameters["bias"] = nn.Parameter(torch.zeros_like(plain.bias))
    elif callable(getattr(plain, "reset_parameters", None)):
        plain.reset_parameters()
    names = [name for name in ("weight", "bias") if plain._parameters[name] is not None]
    return {
        id(value): fresh for name in names for value, fresh in _taken_apart(owner, name, getattr(plain, name).detach())
    }


def _plain(owner: nn.Module, computed: Computed) -> Any:
    """The layer as it was before anything computed its weight, with parameters that are not filled yet."""
    cls = original_class(owner)
    if "parametrizations" in owner._modules:
        cls = cls.__bases__[0]  # torch exchanges the class for one derived from it
    weight, bias = computed.compute(computed.values)
    plain: Any = object.__new__(cls)
    plain.__dict__.update({name: value for name, value in vars(owner).items() if name not in ("weight", "bias")})
    parameters = {"weight": _unfilled(weight), "bias": None if bias is None else _unfilled(bias)}
    plain.__dict__.update(_parameters=parameters, _modules={}, _buffers={})
    return plain


def _taken_apart(owner: nn.Module, name: str, fresh: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The stored tensors of a layer's weight or bias, each with what it holds where the result is `fresh`."""
    if is_parametrized(owner, name):
        own: Any = owner._modules["parametrizations"]
        stored = own[name]._parameters
        scratch = stand_in(own[name], {key: _unfilled(value) for key, value in stored.items()})
        if any(getattr(step, "right_inverse", None) is None for step in own[name]):
            return
        scratch.right_inverse(fresh.clone())
        yield from ((value, scratch._parameters[key].detach()) for key, value in stored.items())
    elif name in owner._parameters:
        yield owner._parameters[name], fresh  # type: ignore[misc]
    for hook in norm_hooks(owner):
        if isinstance(hook, WeightNorm) and hook.name == name:
            yield getattr(owner, f"{name}_v"), fresh
            yield getattr(owner, f"{name}_g"), torch.norm_except_dim(fresh, 2, hook.dim)
        elif getattr(hook, "_tensor_name", None) == name:
            yield getattr(owner, f"{name}_orig"), fresh
