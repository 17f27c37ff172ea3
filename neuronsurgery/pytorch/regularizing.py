"""Penalties to be added to a loss: towards the initial weights, towards zero, towards singular values of one.

They pull a network back to where it could learn, without choosing units or changing weights themselves. What they
concern are the weights and biases of layers; norms and scales, which have parameters of one axis alone, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neuronsurgery.errors import ModelError
from neuronsurgery.pytorch.fresh_layers import Fresh, fresh_layers
from neuronsurgery.pytorch.layers import Layers, Owned, layers_of
from neuronsurgery.pytorch.models import check_model, unwrap

__all__ = ["Penalty", "l2", "regenerative", "spectral"]

_FIRST_ITERATIONS = 32
"""Steps of the power iteration before the first call, from a random vector; later ones go on from the last."""


class Penalty(nn.Module):
    """The squared distance of parameters from anchors, times a strength; anchors of zero are not stored.

    Called without arguments it returns the penalty, a scalar with its graph. The parameters are the model's own and
    not the penalty's; its state dict holds the anchors, so that a resumed run is pulled to where the first was.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], strength: float, anchors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.pulled, self.strength = dict(parameters), strength
        for name, anchor in anchors.items():
            self.register_buffer(_key(name), anchor.detach().clone())

    def forward(self) -> Tensor:
        """The penalty now."""
        return self.strength * torch.stack([self.of(name, one) for name, one in self.pulled.items()]).sum()

    def of(self, name: str, parameter: nn.Parameter) -> Tensor:
        """What one parameter adds, before the strength."""
        anchor = self._buffers.get(_key(name))
        return (parameter if anchor is None else parameter - anchor).square().sum()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModelError(
            "a penalty can be neither copied nor pickled, as it belongs to the parameters of one model; save its "
            "state_dict(), and make one anew for a copy of the model"
        )


class SpectralPenalty(Penalty):
    """`(sigma ** exponent - 1) ** 2` of each weight's largest singular value, `|b| ** (2 exponent)` of each bias.

    The singular value is found by power iteration: the vectors are kept, a step of it is taken with each call.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], strength: float, exponent: int, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        weights = {name: one for name, one in parameters.items() if one.dim() > 1}
        vectors = {name: torch.randn(len(one), generator=generator).to(one) for name, one in weights.items()}
        super().__init__(parameters, strength, vectors)
        self.exponent, self.steps = exponent, steps
        for name, one in weights.items():
            self._turn(name, one, _FIRST_ITERATIONS)

    def of(self, name: str, parameter: nn.Parameter) -> Tensor:
        if parameter.dim() < 2:
            return parameter.square().sum() ** self.exponent
        left, right = self._turn(name, parameter, self.steps)
        largest = left @ (parameter.flatten(1) @ right)
        return (largest**self.exponent - 1).square()

    @torch.no_grad()
    def _turn(self, name: str, parameter: nn.Parameter, steps: int) -> tuple[Tensor, Tensor]:
        """Take steps towards the singular vectors of the largest value, keep the left one, and return both."""
        kept, weight = self._buffers[_key(name)], parameter.detach().flatten(1)
        assert kept is not None
        left = kept.clone()
        for _ in range(steps):
            right = nn.functional.normalize(weight.T @ left, dim=0)
            left = nn.functional.normalize(weight @ right, dim=0)
        kept.copy_(left)
        return left, right


def regenerative(
    model: nn.Module, strength: float, layers: Layers = None, *, initial: Mapping[str, Tensor] | None = None
) -> Penalty:
    """A penalty towards the weights of now; see `neuronsurgery.surgery.regenerative_regularizer`."""
    found = _layers(model, layers, strength)
    anchors = _named(found) if initial is None else _stored(fresh_layers(found, seed=0, initial=initial))
    return Penalty(_named(found), strength, anchors)


def l2(model: nn.Module, strength: float, layers: Layers = None) -> Penalty:
    """A penalty towards zero; see `neuronsurgery.surgery.l2_regularizer`."""
    return Penalty(_named(_layers(model, layers, strength)), strength, {})


def spectral(
    model: nn.Module, strength: float, layers: Layers = None, *, exponent: int = 2, num_iterations: int = 1
) -> Penalty:
    """A penalty towards singular values of one; see `neuronsurgery.surgery.spectral_regularizer`."""
    for name, value in (("exponent", exponent), ("num_iterations", num_iterations)):
        if value < 1:
            raise ModelError(f"{name} is {value!r}; it is at least 1")
    return SpectralPenalty(_named(_layers(model, layers, strength)), strength, exponent, num_iterations)


def _layers(model: nn.Module, layers: Layers, strength: float) -> list[Owned]:
    if not 0 <= strength < float("inf"):
        raise ModelError(f"strength is {strength!r}; it is a number from 0 on, by which the penalty is multiplied")
    check_model(model)
    found = layers_of(unwrap(model), layers)
    return [owned for owned in found if any(one.dim() > 1 for one in owned.parameters.values())]


def _named(layers: list[Owned]) -> dict[str, nn.Parameter]:
    pairs = ((owned.name, name, one) for owned in layers for name, one in owned.parameters.items())
    return {f"{layer}.{name}" if layer else name: one for layer, name, one in pairs}


def _stored(fresh: list[Fresh]) -> dict[str, Tensor]:
    def pairs() -> Iterator[tuple[str, Tensor]]:
        for each in fresh:
            for name in each.owned.parameters:
                key = f"{each.owned.name}.{name}" if each.owned.name else name
                yield key, each.values[name].to(each.owned.parameters[name])

    return dict(pairs())


def _key(name: str) -> str:
    """A buffer's name may hold no dot."""
    return name.replace(".", "/")
