"""torch's own loader as a change that can be taken back: it copies what fits before it raises."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.sharding import is_sharded, sharded_like

__all__ = ["Load"]


class Load:
    """Load a state dict into a model; taken back, every tensor is the one that it was, with the values it had."""

    def __init__(
        self, model: nn.Module, state: Callable[[], Mapping[str, Any]], *, assign: bool = False, strict: bool = True
    ) -> None:
        self.model, self.state, self.assign, self.strict = model, state, assign, strict
        self.before: list[_Kept] = []

    def apply(self) -> None:
        values: dict[int, Tensor] = {}  # tied tensors are kept once
        self.before = [_Kept(module, values) for module in self.model.modules()]
        ties = _ties(self.model) if self.assign else []
        self.model.load_state_dict(self._sharded(self.state()), strict=self.strict, assign=self.assign)
        for (first, name), *others in ties:  # assigned by name, each would be a tensor of its own
            for module, other in others:
                module._parameters[other] = first._parameters[name]

    def _sharded(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state dict with what is whole in it sharded as the model's own parameters are; nothing is sent."""
        own = self.model.named_parameters(remove_duplicate=False)
        sharded = {name: parameter for name, parameter in own if is_sharded(parameter)}
        found = copy.copy(state)
        for name, parameter in sharded.items():
            value = state.get(name)
            if isinstance(value, Tensor) and not is_sharded(value) and value.shape == parameter.shape:
                found[name] = sharded_like(parameter, value)  # type: ignore[index]
        return found

    def revert(self) -> None:
        for kept in self.before:
            kept.put_back()


def _ties(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Who holds each parameter that several modules hold, and under which name."""
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, name))
    return [several for several in holders.values() if len(several) > 1]


class _Kept:
    """One module's own tensors and what it saves beside them."""

    def __init__(self, module: nn.Module, values: dict[int, Tensor]) -> None:
        self.module = module
        self.parameters, self.buffers = dict(module._parameters), dict(module._buffers)
        self.values = [(each, _copied(each, values)) for each in self._tensors()]
        self.attributes = dict(vars(module)) if isinstance(module, Composite) else {}
        tables = (module.growing_tables, module.fixed_tables) if isinstance(module, Composite) else ()
        self.tables = [(held, dict(held)) for held in tables]
        self.counts = [(clock, clock.num_steps) for clock in self.attributes.get("clocks", ()) if clock is not None]
        has_extra_state = type(module).set_extra_state is not nn.Module.set_extra_state
        self.has_extra_state = has_extra_state and not isinstance(module, Composite)
        self.extra_state = copy.deepcopy(module.get_extra_state()) if self.has_extra_state else None

    def _tensors(self) -> list[Tensor]:
        return [each for each in (*self.parameters.values(), *self.buffers.values()) if each is not None]

    def put_back(self) -> None:
        vars(self.module).update(self.attributes)
        own: list[tuple[Any, Any]] = [
            (self.module._parameters, self.parameters),
            (self.module._buffers, self.buffers),
            *self.tables,
        ]
        for held, kept in own:
            held.clear()
            held.update(kept)
        with torch.no_grad():
            for tensor, value in self.values:
                tensor.copy_(value)
        for clock, count in self.counts:
            clock.num_steps = count
        if self.has_extra_state:
            self.module.set_extra_state(self.extra_state)


def _copied(tensor: Tensor, values: dict[int, Tensor]) -> Tensor:
    if id(tensor) not in values:
        values[id(tensor)] = tensor.detach().clone()
    return values[id(tensor)]
