"""Which parameters a model multiplies with, seen by watching torch's functions while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

__all__ = ["multiplied_parameters"]

PRODUCTS = frozenset(
    "linear bilinear matmul __matmul__ __rmatmul__ mm bmm mv addmm baddbmm einsum tensordot _grouped_mm grouped_mm "
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d gru lstm rnn_tanh rnn_relu gru_cell "
    "lstm_cell rnn_tanh_cell rnn_relu_cell multi_head_attention_forward".split()
)

ADDING = frozenset("addmv addmm baddbmm".split())
"""Products whose first argument is added, not multiplied with."""


def multiplied_parameters(model: nn.Module, run: Callable[[nn.Module], Any]) -> set[str]:
    """The names of the parameters of two axes or more with which a run of a model multiplies something computed."""
    watch = _Watch(model)
    with watch:
        run(model)
    return watch.multiplied


class _Watch(TorchFunctionMode):
    """Follows what is made of parameters alone, up to the products that take it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.multiplied: set[str] = set()
        self.made: dict[int, tuple[Tensor, frozenset[str]]] = {  # tensors are held, so that ids stay their own
            id(parameter): (parameter, frozenset([name])) for name, parameter in model.named_parameters()
        }
        self.wide = {name for name, p in model.named_parameters() if p.dim() > 1}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        args = args[1:] if getattr(func, "__name__", "") in ADDING else args
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = [self.made[id(t)][1] for t in tensors if id(t) in self.made]
        sources = frozenset().union(*known)
        if getattr(func, "__name__", "") in PRODUCTS and len(known) < len(tensors):
            self.multiplied |= sources & self.wide
        elif tensors and len(known) == len(tensors):
            for output in pytree.tree_leaves(result):
                if isinstance(output, Tensor) and id(output) not in self.made:
                    self.made[id(output)] = (output, sources)
        return result
