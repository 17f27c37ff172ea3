"""Parameters that another module holds and swaps in for each forward, as torchrl's multi-agent networks do.

`MultiAgentMLP` keeps its parameters in a `TensorDictParams` and calls an empty shell of a network with them. While a
model is discovered or operated on, they are put where a forward will find them, so that the shell's layers are
producers like any other. Their banks are children of the shell's layers, which stay when the parameters go.

Stacked parameters, one network per agent under vmap, are not swapped in here: there is no layer that holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn

from neuronsurgery.pytorch.mirroring import original_class

__all__ = ["holds_for_others", "swapped_in", "with_parameters_in_place"]

F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def swapped_in(model: nn.Module) -> Iterator[None]:
    """Parameters that agents share are in the layers of their network for as long as the context is open."""
    with ExitStack() as stack:
        own = [each for each in model.modules() if not isinstance(each, torch.jit.ScriptModule)]
        for module in own:
            shell = module._modules.get("_empty_net")
            held: Any = module._modules.get("params")
            if shell is not None and held is not None and holds_for_others(held) and _is_shared(module):
                swap = held.to_module(shell, preserve_module_state=False)
                swap.__enter__()
                stack.callback(swap.__exit__, None, None, None)  # what it returns has no truth value
        yield


def with_parameters_in_place(function: F) -> F:
    """A function of a model, as its first argument, that finds swapped parameters in their layers."""

    @wraps(function)
    def wrapped(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(model, nn.Module):
            return function(model, *args, **kwargs)
        with swapped_in(model):
            return function(model, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def holds_for_others(module: nn.Module) -> bool:
    """Whether a module is tensordict's holder of another module's parameters, known by name."""
    classes = original_class(module).__mro__
    return any(cls.__name__ == "TensorDictParams" and cls.__module__.startswith("tensordict") for cls in classes)


def _is_shared(module: Any) -> bool:
    return bool(getattr(module, "share_params", False))
