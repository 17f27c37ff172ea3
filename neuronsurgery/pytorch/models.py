"""Which models can be operated on at all, and what wraps them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from neuronsurgery.errors import ModelError
from neuronsurgery.pytorch.taps import unobserved

__all__ = ["Replicated", "check_model", "left_alone", "random_states_kept", "run_model", "unwrap", "wrappers_of"]


class Replicated(nn.Module):
    """A model of which each process of a group holds a replica, where no wrapper of torch's says so."""

    def __init__(self, module: nn.Module, process_group: Any = None) -> None:
        super().__init__()
        self.module = module
        self.process_group = process_group

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the model itself."""
        return self.module(*args, **kwargs)


_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel, Replicated)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside DDP, DataParallel, `torch.compile` and averaging wrappers; site names are its own."""
    for wrapper in wrappers_of(model):
        model = _held(wrapper)
    return model


def wrappers_of(model: nn.Module) -> Iterator[nn.Module]:
    """What is wrapped around the user's module, the outermost first."""
    while isinstance(model, (torch._dynamo.OptimizedModule, *_WRAPPERS)):
        yield model
        model = _held(model)


def _held(wrapper: Any) -> nn.Module:
    held: nn.Module = wrapper._orig_mod if isinstance(wrapper, torch._dynamo.OptimizedModule) else wrapper.module
    return held


def check_model(model: Any) -> None:
    """Refuse what no operation can work on.

    Raises:
        ModelError: not a module; scripted; lazy and not initialized; quantized; made under inference mode.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, found {type(model).__name__}; pass the model itself")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "the model is scripted (torch.jit): its forward is compiled and cannot be rewritten; operate on the "
            "original module, then script or export it"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ModelError(f"'{name}' is lazy and has no shape yet; run one forward pass first")
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise ModelError(
                f"'{name}' was created under torch.inference_mode and cannot be trained; build or clone "
                "the model outside it"
            )
    quantized = [name for name, m in model.named_modules() if "quantized" in type(m).__module__]
    if quantized and not any(p.is_floating_point() for p in model.parameters()):
        raise ModelError(
            f"the model is quantized ('{quantized[0]}' and {len(quantized) - 1} more): its weights are no parameters; "
            "operate before you quantize"
        )


def run_model(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a tensor, a tuple or list of arguments, or a dictionary of keyword arguments."""
    if isinstance(batch, dict):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Buffers, modes and random states are put back afterwards, and no observation that is open hears of the passes.

    Gradients and weights are the caller's care.
    """
    buffers = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    modes = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    with random_states_kept(devices), unobserved():
        try:
            yield
        finally:
            for owner, name, buffer, before in buffers:
                with torch.no_grad():
                    buffer.copy_(before)
                owner[name] = buffer
            for module, training in modes:
                module.training = training


@contextmanager
def random_states_kept(devices: Sequence[torch.device]) -> Iterator[None]:
    """The random states of Python, numpy and torch (on the CPU and these devices) are put back afterwards."""
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
