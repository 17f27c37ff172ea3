"""Where activations are observed: rewritten forwards pass them through `tap`, which is idle unless someone listens.

Listeners are found by the identity of the producer's weight, so that a deep copy made meanwhile (a target network) is
never measured with the original, and nothing stays on the model when the observation ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["Sink", "is_observed", "listening", "observed_weight", "offset_of", "tap", "tap_producer", "unobserved"]


class Sink(Protocol):
    """Receives the activations of one site; `offset` is how many links it has.

    `axes` are those of the units in these activations, None: where the site's own path leaves them.
    """

    offset: int

    def record(self, h: Tensor, axes: tuple[int, ...] | None = None) -> None: ...


_SINKS: dict[int, tuple[Sink, ...]] = {}
_MUTED: dict[int, Sink] = {}
_STAND_INS: dict[int, Callable[[], object]] = {}
_NONE: Mapping[int, Callable[[], object]] = MappingProxyType({})


@torch.compiler.disable  # type: ignore[untyped-decorator]
def tap(weight: nn.Parameter, h: Tensor, axes: tuple[int, ...] | None = None) -> Tensor:
    """Show the activations of the site with this weight to its listeners, if there are any, and pass them on."""
    for sink in _SINKS.get(_key(weight), ()):
        if id(sink) not in _MUTED:
            sink.record(h, axes)
    return h


@torch.compiler.disable  # type: ignore[untyped-decorator]
def tap_producer(producer: nn.Module, h: Tensor, axes: tuple[int, ...] | None = None) -> Tensor:
    """As `tap`, for the site of a producer module."""
    weight = observed_weight(producer)
    return h if weight is None else tap(weight, h, axes)


# What `torch.compiler.disable` calls its reason, where it has one: torch's error under fullgraph=True shows it.
_ADVICE = "an observation reads activations while the model runs; until it ends, compile without fullgraph=True"
tap._torchdynamo_disable_msg = tap_producer._torchdynamo_disable_msg = _ADVICE


def is_observed(weight: nn.Parameter) -> bool:
    """Whether anyone listens to the site with this weight."""
    return id(weight) in _SINKS


def offset_of(weight: nn.Parameter | None) -> int:
    """How many links the site of this weight has if it is being observed; 0 for any other."""
    sinks = _SINKS.get(_key(weight)) if _SINKS else None
    return sinks[0].offset if sinks else 0


def observed_weight(module: nn.Module) -> nn.Parameter | None:
    """The weight by which a producer is observed: its own, or the first that its weight is computed from."""
    if not _SINKS:
        return None
    weight = module._parameters.get("weight")
    found = module.parameters() if weight is None else (weight,)
    return next((parameter for parameter in found if _key(parameter) in _SINKS), None)


def _key(weight: nn.Parameter | None) -> int:
    """Under which listeners are found: of what stands in for a sharded weight in a pass, that of the weight."""
    if id(weight) in _SINKS or weight is None:
        return id(weight)
    return next((key for key, current in _STAND_INS.items() if current() is weight), id(weight))


@contextmanager
def listening(sinks: Mapping[int, Sink], stand_ins: Mapping[int, Callable[[], object]] = _NONE) -> Iterator[None]:
    """Let each sink hear the site whose weight has that id; the caller keeps the weights alive.

    `stand_ins`: by the same ids, what gives the tensor that a forward pass has in a weight's place.
    """
    before = {key: _SINKS.get(key, ()) for key in sinks}
    _STAND_INS.update((key, current) for key, current in stand_ins.items() if key in sinks)
    for key, sink in sinks.items():
        _SINKS[key] = (*before[key], sink)
    try:
        yield
    finally:
        for key, sink in sinks.items():
            left = tuple(other for other in _SINKS.get(key, ()) if other is not sink)
            if left:
                _SINKS[key] = left
            else:
                _SINKS.pop(key, None)
                _STAND_INS.pop(key, None)


@contextmanager
def unobserved() -> Iterator[None]:
    """Let those who listen now hear nothing; who begins in here does. See `neuronsurgery.surgery.unobserved`."""
    muted = {id(sink): sink for sinks in _SINKS.values() for sink in sinks if id(sink) not in _MUTED}
    _MUTED.update(muted)
    try:
        yield
    finally:
        for key in muted:
            del _MUTED[key]
