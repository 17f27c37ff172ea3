"""Target networks: slow copies of the online networks, which supply the values that others are trained toward.

Parameters and buffers are written in place, so that whoever holds a target network keeps holding the current one.
"""

from __future__ import annotations

from torch import Tensor, nn

from marl.errors import CheckpointError

__all__ = ["copy_online", "follow_online"]


def copy_online(target: nn.Module, online: nn.Module) -> None:
    """Make the target equal to the online network. Source: Mnih et al. 2015.

    Raises:
        CheckpointError: the two have different parameters or buffers.

    >>> import torch
    >>> online, target = nn.Linear(2, 3), nn.Linear(2, 3)
    >>> copy_online(target, online)
    >>> torch.equal(target.weight, online.weight)
    True
    """
    for slow, new in _pairs(target, online):
        slow.copy_(new)


def follow_online(target: nn.Module, online: nn.Module, *, rate: float) -> None:
    """Move the target by `rate` of the way to the online network; what is no float is copied. Source: Polyak 1992.

    Raises:
        CheckpointError: the two have different parameters or buffers.

    >>> import torch
    >>> online, target = nn.Linear(1, 1), nn.Linear(1, 1)
    >>> halfway = (online.weight + target.weight) / 2
    >>> follow_online(target, online, rate=0.5)
    >>> torch.allclose(target.weight, halfway)
    True
    """
    for slow, new in _pairs(target, online):
        if slow.is_floating_point():
            slow.lerp_(new, rate)
        else:
            slow.copy_(new)


def _pairs(target: nn.Module, online: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Parameters and buffers of both, matched by name and free of gradients."""
    slow, new = _tensors(target), _tensors(online)
    different = [name for name in slow.keys() | new.keys() if _shape(slow, name) != _shape(new, name)]
    if different:
        name = min(different)
        raise CheckpointError(
            f"asked to update a target network, but its {name!r} is {_shape(slow, name)} and the online network's "
            f"{_shape(new, name)}: change both alike, or make the target anew as a deep copy"
        )
    return [(slow[name], new[name]) for name in slow]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, ...] | str:
    return tuple(tensors[name].shape) if name in tensors else "missing"
