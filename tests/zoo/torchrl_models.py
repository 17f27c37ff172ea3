"""Networks of `torchrl`.

The library is imported where a network is built, because that takes a second and most tests need none of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.zoo.specimen import Specimen

__all__ = ["SPECIMENS"]


def library() -> Any:
    from torchrl import modules

    return modules


def qmixer() -> nn.Module:
    return library().QMixer(state_shape=(5,), mixing_embed_dim=8, n_agents=3, device="cpu")  # type: ignore[no-any-return]


def mlp() -> nn.Module:
    return library().MLP(6, 3, num_cells=[24, 24])  # type: ignore[no-any-return]


def conv_net() -> nn.Module:
    """Convolutions alone have no head; an MLP takes what they give."""
    m = library()
    net = m.ConvNet(3, num_cells=[8, 12], kernel_sizes=[4, 3], strides=[2, 1])
    return nn.Sequential(net, m.MLP(300, 2, num_cells=[16]))


def multi_agent_mlp(share_params: bool) -> nn.Module:
    net = library().MultiAgentMLP(6, 2, 3, centralized=False, share_params=share_params, depth=2, num_cells=16)
    return net  # type: ignore[no-any-return]


def noisy_mlp() -> nn.Module:
    m = library()
    return m.MLP(6, 3, num_cells=[24, 24], layer_class=m.NoisyLinear, activation_class=nn.ReLU)  # type: ignore[no-any-return]


SPECIMENS = (
    Specimen(
        "QMixer", "torchrl", qmixer, lambda: (torch.randn(4, 3, 1), torch.randn(4, 5)), exempt="range-bearing",
        declined={"hyper_w_1": "range-bearing", "hyper_w_final": "range-bearing", "hyper_b_1": "computed"},
    ),
    Specimen("torchrl MLP", "torchrl", mlp, lambda: (torch.randn(5, 6),)),
    Specimen("torchrl ConvNet", "torchrl", conv_net, lambda: (torch.randn(2, 3, 16, 16),)),
    Specimen("MultiAgentMLP, shared", "torchrl", lambda: multi_agent_mlp(True), lambda: (torch.randn(4, 3, 6),)),
    Specimen(
        "MultiAgentMLP, own weights", "torchrl", lambda: multi_agent_mlp(False), lambda: (torch.randn(4, 3, 6),),
        exempt="stacked", declined={"params.[02].weight": "stacked and swapped in at run time"},
    ),
    Specimen("NoisyLinear MLP", "torchrl", noisy_mlp, lambda: (torch.randn(5, 6),)),
)  # fmt: skip
