"""Torch's own transformer layers: which of their functions can be read, and the fused path that goes past them.

The forward of `nn.TransformerEncoderLayer` cannot be traced, and in eval mode without gradients it hands the weights to
one fused kernel. Its feed-forward block is a method of its own that can be traced and rewritten like a forward. An
operated encoder layer does without the kernel, which knows of no bank; where an enclosing `nn.TransformerEncoder`
converts a padded batch to a nested tensor, as it does for the kernel, the layer pads it again for its own forward. So
the container stays as it is, other layers keep the kernel, and padded positions come out as zeros as before.

One difference is left: the kernel takes the whole layer to be in eval mode. Where a dropout inside was put back into
training mode by hand, the operated layer heeds it, as the untouched one does with gradients.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronsurgery.pytorch.mirroring import original_class

__all__ = ["is_fused_layer", "overrides", "readable_method", "why_not_readable"]

FEED_FORWARD = "_ff_block"
LAYERS: tuple[type[nn.Module], ...] = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
_BLOCKS = ("forward", FEED_FORWARD, "_sa_block", "_mha_block")
_FUSED_PARTS: dict[str, type[nn.Module]] = {
    "self_attn": nn.MultiheadAttention,
    "linear1": nn.Linear,
    "linear2": nn.Linear,
    "norm1": nn.LayerNorm,
    "norm2": nn.LayerNorm,
}
_FUSED_FUNCTIONS: dict[int, tuple[Callable[..., Any], type[nn.Module]]] = {1: (F.relu, nn.ReLU), 2: (F.gelu, nn.GELU)}
_FLAG = "activation_relu_or_gelu"  # 0: the fused path is not taken; else a key of the table above


def is_fused_layer(module: nn.Module) -> bool:
    """Whether a module is a transformer layer of torch's; a subclass that overrides one of its blocks is user code."""
    return is_fused_class(cast(Any, original_class(module)))


@functools.lru_cache(maxsize=4096)
def is_fused_class(cls: Any) -> bool:
    """As `is_fused_layer`, of a class."""
    return any(
        issubclass(cls, layer) and all(getattr(cls, name, None) is getattr(layer, name, None) for name in _BLOCKS)
        for layer in LAYERS
    )


def readable_method(module: nn.Module) -> str:
    """The function of a module to trace first: its forward, or the feed-forward block of torch's transformer layers."""
    return FEED_FORWARD if is_fused_layer(module) else "forward"


def why_not_readable(module: nn.Module) -> str:
    """Why a module's functions say nothing about what it computes, "" if they do."""
    label = original_class(module).__name__
    functions = _BLOCKS if is_fused_layer(module) else ("forward",)
    for name in functions:
        if name in vars(module):
            return f"{label}.{name} was replaced on the instance"
    is_encoder_layer = is_fused_layer(module) and isinstance(module, nn.TransformerEncoderLayer)
    return _why_fused_differs(module, label) if is_encoder_layer else ""


def _why_fused_differs(layer: Any, label: str) -> str:
    """Where the fused path computes something else than the feed-forward block, no composite keeps both outputs."""
    flag = vars(layer).get(_FLAG, 0)
    if flag not in _FUSED_FUNCTIONS or not getattr(layer.self_attn, "batch_first", False):
        return ""
    for name, kind in _FUSED_PARTS.items():
        part = getattr(layer, name)
        if original_class(part).forward is not kind.forward or "forward" in vars(part):
            found = original_class(part).__name__
            return f"the fused path of {label} takes its '{name}' for a {kind.__name__}, and it is a {found} of its own"
    function, module = _FUSED_FUNCTIONS[flag]
    activation = layer.activation
    if activation is function or (isinstance(activation, nn.Module) and _is_plain(activation, module)):
        return ""
    return f"the fused path of {label} computes '{function.__name__}', and its activation is another function"


def _is_plain(activation: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether an activation module computes what the kernel does; for GELU that is the exact one."""
    if original_class(activation).forward is not kind.forward or "forward" in vars(activation):
        return False
    return getattr(activation, "approximate", "none") == "none"


# -- operated layers -------------------------------------------------------------------------------------------------


def overrides(cls: Any, methods: tuple[str, ...], has_banks: bool, forward: Callable[..., Any]) -> dict[str, Any]:
    """What the class of an operated encoder layer overrides, so that its banks take effect on every path.

    `forward` is the one that it has without: torch's own, or a rewritten one of a subclass.
    """
    if not has_banks or not issubclass(cls, nn.TransformerEncoderLayer):
        return {}
    if is_fused_class(cls):
        return {"forward": padded(forward), _FLAG: property(_no_fused_path, _keep_flag)}
    return {"forward": padded(forward)} if "forward" in methods else {}


def _no_fused_path(layer: nn.Module) -> int:
    return 0


def _keep_flag(layer: nn.Module, value: int) -> None:
    """What is assigned lies in the instance, for when the original class returns."""
    vars(layer)[_FLAG] = value


def padded(original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of an encoder layer for which a nested batch is padded, and its result nested again."""

    @functools.wraps(original)
    def forward(self: Any, src: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not src.is_nested:
            return original(self, src, *args, **kwargs)
        return _nested_forward(original, self, src, *args, **kwargs)

    return forward


def _nested_forward(original: Callable[..., Any], layer: Any, src: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Torch takes nested batches in the fused path alone: without masks, and not where it would need gradients."""
    call = inspect.signature(original).bind(layer, src, *args, **kwargs)
    call.apply_defaults()
    masks = [call.arguments.get(name) for name in ("src_mask", "src_key_padding_mask")]
    is_masked = "src_key_padding_mask" not in call.arguments or any(mask is not None for mask in masks)
    if is_masked or layer.training or not layer.self_attn.batch_first or src.layout is not torch.strided:
        return original(layer, src, *args, **kwargs)
    lengths = [len(sequence) for sequence in src.unbind()]
    dense = torch.nested.to_padded_tensor(src, 0.0)
    positions = torch.arange(dense.shape[1], device=dense.device)
    call.arguments["src_key_padding_mask"] = positions >= torch.tensor(lengths, device=dense.device)[:, None]
    names = list(call.arguments)
    call.arguments[names[1]] = dense
    result = original(*call.args, **call.kwargs)
    return torch.nested.as_nested_tensor([row[:length] for row, length in zip(result, lengths, strict=True)])
