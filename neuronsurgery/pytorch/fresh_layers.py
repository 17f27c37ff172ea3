"""Fresh weights for whole layers: what the modules' own initializers give, one of the user's, or stored values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuronsurgery.errors import DrawError
from neuronsurgery.pytorch.drawing import Init, scratch_of, seeded
from neuronsurgery.pytorch.layers import Owned

__all__ = ["Fresh", "fresh_layers"]


@dataclass(frozen=True, eq=False)
class Fresh:
    """A module and the values that its own parameters and buffers have when it is fresh, by their names."""

    owned: Owned
    values: Mapping[str, Tensor]

    def parameters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter with its fresh values."""
        yield from ((parameter, self.values[name]) for name, parameter in self.owned.parameters.items())

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each tensor, buffers too, with its fresh values."""
        yield from ((getattr(self.owned.module, name), values) for name, values in self.values.items())

    def names(self, has_buffers: bool) -> tuple[str, ...]:
        """The names of the tensors, with or without the buffers."""
        return tuple(name for name in self.values if has_buffers or name in self.owned.parameters)


def fresh_layers(
    layers: Sequence[Owned], *, seed: int, init: Init | None = None, initial: Mapping[str, Tensor] | None = None
) -> list[Fresh]:
    """Fresh values for each of the modules; no random state is touched.

    Args:
        layers: the modules.
        seed: what the draw depends on.
        init: fills each parameter of two or more axes in place; others are the module's own, biases without one zero.
        initial: stored values by their names in the model's state dict, instead of a draw.

    Raises:
        DrawError: modules have no `reset_parameters`, or stored values are missing or of another shape.
    """
    if initial is not None:
        return [Fresh(owned, _stored(owned, initial)) for owned in layers]
    unknown = [owned for owned in layers if not _can_draw(owned, init)]
    if unknown:
        raise DrawError(
            f"{', '.join(repr(each.name) for each in unknown)} cannot be drawn anew: {_what(unknown[0])} has no "
            "initializer of its own that could be called (reset_parameters). Pass initial=, a copy of the state dict "
            "that the model had when it was new; or init= for weights of two or more axes; or name other layers"
        )
    with seeded(seed, next(iter(layers[0].parameters.values())).device), torch.no_grad():
        return [Fresh(owned, _draw(owned, init)) for owned in layers]


def _what(owned: Owned) -> str:
    return "a module with parametrized weights" if _is_parametrized(owned.module) else type(owned.module).__name__


def _is_parametrized(module: nn.Module) -> bool:
    return "parametrizations" in module._modules or "ParametrizationList" in {c.__name__ for c in type(module).__mro__}


def _can_draw(owned: Owned, init: Init | None) -> bool:
    if _is_parametrized(owned.module):
        return False
    has_own = callable(getattr(owned.module, "reset_parameters", None))
    return has_own or (init is not None and any(p.dim() > 1 for p in owned.parameters.values()))


def _draw(owned: Owned, init: Init | None) -> dict[str, Tensor]:
    scratch = scratch_of(owned.module)
    if callable(getattr(owned.module, "reset_parameters", None)):
        scratch.reset_parameters()
    else:
        for parameter in scratch._parameters.values():
            if parameter is not None and parameter.dim() < 2:
                parameter.zero_()
    found = {name: scratch._parameters[name].detach() for name in owned.parameters}
    if init is not None and any(p.dim() > 1 for p in found.values()):
        for values in found.values():
            init(values.fill_(torch.nan)) if values.dim() > 1 else values.zero_()
    buffers = owned.module._buffers
    drawn = zip(scratch._buffers.values(), buffers.values(), strict=True)
    moved = [values is not None and before is not None and not torch.equal(values, before) for values, before in drawn]
    return {**found, **{name: scratch._buffers[name] for name, is_new in zip(buffers, moved, strict=True) if is_new}}


def _stored(owned: Owned, initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored values of a module, buffers included where they were stored."""
    prefix = f"{owned.name}." if owned.name else ""
    own = {**owned.parameters, **{name: b for name, b in owned.module._buffers.items() if b is not None}}
    found: dict[str, Tensor] = {}
    for name, tensor in own.items():
        stored = initial.get(prefix + name)
        if stored is None and name not in owned.parameters:
            continue
        if not isinstance(stored, Tensor) or stored.shape != tensor.shape:
            kept = "nothing" if stored is None else f"shape {tuple(getattr(stored, 'shape', ()))}"
            raise DrawError(
                f"initial= holds {kept} for {prefix + name!r}, which has shape {tuple(tensor.shape)}; pass a copy of "
                "the state dict that this model had when it was new"
            )
        found[name] = stored.detach()
    return found
