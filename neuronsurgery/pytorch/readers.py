"""Layers that read their input by columns of their own weights, as their class says: no graph shows it.

Torch's recurrent layers are one call each. What others compute in code that cannot be traced, a kernel or a backward
pass of its own, their authors declare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from neuronsurgery.errors import ModelError
from neuronsurgery.pytorch.mirroring import original_class

__all__ = ["Weights", "declare_consumer", "input_weights"]

Weights = Mapping[str, str | None]
"""The names of a layer's parameters that read its input, (outputs, inputs), each with that of the bias beside it."""


def declare_consumer(kind: type[nn.Module], weights: Weights) -> None:
    """Say by which weights the layers of a class read their input; see `neuronsurgery.surgery.declare_consumer`."""
    label = kind.__name__
    if not issubclass(kind, nn.Module):
        raise ModelError(f"expected a class of torch.nn.Module, found {kind!r}; pass the class of the layers")
    if kind.forward.__module__.partition(".")[0] == "torch":
        raise ModelError(f"asked to declare {label}, whose forward is torch's own: such layers need no declaration")
    if not weights:
        raise ModelError(f"asked to declare {label} without a weight: name those that read its input")
    _DECLARED[kind] = dict(weights)


def input_weights(module: nn.Module) -> Weights | None:
    """By which weights a layer reads its input, and nothing else does; None where its class does not say so.

    A subclass may do more with its input: one with a forward of its own is another class.
    """
    cls = original_class(module)
    if cls in _DECLARED:
        return _DECLARED[cls]
    names = _RECURRENT.get(cls.forward)
    return None if names is None else {name: name.replace("weight", "bias") for name in names(module)}


_DECLARED: dict[type, Weights] = {}


def _of_layers(module: Any) -> tuple[str, ...]:
    """Of the first layer, which the others follow."""
    return ("weight_ih_l0", "weight_ih_l0_reverse") if module.bidirectional else ("weight_ih_l0",)


_RECURRENT: dict[Any, Callable[[nn.Module], tuple[str, ...]]] = {
    **dict.fromkeys((each.forward for each in (nn.RNN, nn.LSTM, nn.GRU)), _of_layers),
    **dict.fromkeys((each.forward for each in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)), lambda _: ("weight_ih",)),
}
