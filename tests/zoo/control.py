"""Hand-written networks of reinforcement learning and on plain vectors."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops.layers.torch import EinMix
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo.networks import ActorCritic, Dueling, QmixMixer, QplexMixer, RecurrentAgent, rows
from tests.zoo.specimen import Specimen

__all__ = ["SPECIMENS"]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


class PpoActorCritic(nn.Module):
    """Two tanh networks with orthogonal weights and a state-independent spread, as in PPO on continuous actions."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(orthogonal(8, 16), nn.Tanh(), orthogonal(16, 16), nn.Tanh(), orthogonal(16, 1))
        self.actor_mean = nn.Sequential(orthogonal(8, 16), nn.Tanh(), orthogonal(16, 16), nn.Tanh(), orthogonal(16, 2))
        self.actor_logstd = nn.Parameter(torch.zeros(1, 2))

    def forward(self, x: Tensor) -> Any:
        mean = self.actor_mean(x)
        std = torch.exp(self.actor_logstd.expand_as(mean))
        return mean, std, self.critic(x)


def orthogonal(inner: int, outer: int) -> nn.Linear:
    layer = nn.Linear(inner, outer)
    nn.init.orthogonal_(layer.weight, 2.0**0.5)
    nn.init.constant_(layer.bias, 0.0)
    return layer


class EnsembleLinear(nn.Module):
    """One linear layer for each member of an ensemble: weights (E, in, out), one batched product."""

    def __init__(self, num_members: int, inner: int, outer: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_members, inner, outer) / inner**0.5)
        self.bias = nn.Parameter(torch.zeros(num_members, 1, outer))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class EnsembleCritic(nn.Module):
    """Critics side by side, as in REDQ and EDAC: the input is repeated for each member."""

    def __init__(self, num_members: int = 3) -> None:
        super().__init__()
        self.num_members = num_members
        self.layers = nn.Sequential(
            EnsembleLinear(num_members, 8, 12),
            nn.ReLU(),
            EnsembleLinear(num_members, 12, 12),
            nn.ReLU(),
            EnsembleLinear(num_members, 12, 1),
        )

    def forward(self, state: Tensor, action: Tensor) -> Any:
        x = torch.cat([state, action], dim=-1).unsqueeze(0).repeat_interleave(self.num_members, dim=0)
        return self.layers(x).squeeze(-1)


class EinsumCritic(nn.Module):
    """The same with `torch.einsum` and `torch.bmm` on bare parameters, bias added by hand."""

    def __init__(self, num_members: int = 3) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(num_members, 6, 12) / 6**0.5)
        self.b1 = nn.Parameter(torch.zeros(num_members, 1, 12))
        self.w2 = nn.Parameter(torch.randn(num_members, 12, 12) / 12**0.5)
        self.b2 = nn.Parameter(torch.zeros(num_members, 1, 12))
        self.w3 = nn.Parameter(torch.randn(num_members, 12, 1) / 12**0.5)

    def forward(self, x: Tensor) -> Any:
        h = F.relu(torch.einsum("bi,eio->ebo", x, self.w1) + self.b1)
        h = F.relu(torch.bmm(h, self.w2) + self.b2)
        return torch.bmm(h, self.w3).squeeze(-1)


class EinMixMlp(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021) whose mixing layers are einops' EinMix."""

    def __init__(self, num_patches: int = 6, width: int = 8) -> None:
        super().__init__()
        self.token_norm, self.channel_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.token_mix = nn.Sequential(
            EinMix("b p c -> b q c", weight_shape="p q", bias_shape="q", p=num_patches, q=2 * num_patches),
            nn.GELU(),
            EinMix("b q c -> b p c", weight_shape="q p", bias_shape="p", p=num_patches, q=2 * num_patches),
        )
        self.channel_mix = nn.Sequential(
            EinMix("b p c -> b p d", weight_shape="c d", bias_shape="d", c=width, d=4 * width),
            nn.GELU(),
            EinMix("b p d -> b p c", weight_shape="d c", bias_shape="c", c=width, d=4 * width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mix(self.token_norm(x))
        return x + self.channel_mix(self.channel_norm(x))  # type: ignore[no-any-return]


class SwiGlu(nn.Module):
    """Gate and value projections; only the gate passes an activation function (Shazeer 2020)."""

    def __init__(self, width: int = 8, hidden: int = 24) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))  # type: ignore[no-any-return]


def normed(norm: type[nn.Module] = nn.LayerNorm) -> nn.Sequential:
    """A normalization that couples units stands before each activation function."""
    layers = [nn.Linear(8, 32), norm(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 32), norm(32), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(32, 4))


def batch_normed() -> nn.Sequential:
    layers = [nn.Linear(8, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32)]
    return nn.Sequential(*layers, nn.Dropout(0.2), nn.ELU(), nn.Linear(32, 4))


def weight_normed() -> nn.Sequential:
    hidden = (parametrizations.weight_norm(nn.Linear(i, 32)) for i in (8, 32))
    return nn.Sequential(next(hidden), nn.ReLU(), next(hidden), nn.ReLU(), nn.Linear(32, 4))


def spectral_normed() -> nn.Sequential:
    """A critic whose two hidden layers have spectral norms, its first and last have none."""
    hidden = (parametrizations.spectral_norm(nn.Linear(16, 16)) for _ in range(2))
    layers = [nn.Linear(8, 16), nn.LeakyReLU(0.1), next(hidden), nn.LeakyReLU(0.1), next(hidden), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.Linear(16, 1))


class TiedAutoencoder(nn.Module):
    """The decoder reads the encoder's weights transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(16, 8) / 8**0.5), nn.Parameter(torch.randn(6, 16) / 4.0)
        self.b1, self.b2 = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(6))
        self.b3, self.b4 = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        code = F.relu(F.linear(F.relu(F.linear(x, self.w1, self.b1)), self.w2, self.b2))
        return F.linear(F.relu(F.linear(code, self.w2.t(), self.b3)), self.w1.t(), self.b4)


class Vae(nn.Module):
    """Kingma & Welling 2014: a Gaussian code, drawn by reparametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(24, 3), nn.Linear(24, 3)
        self.decoder = nn.Sequential(nn.Linear(3, 24), nn.ReLU(), nn.Linear(24, 12))

    def forward(self, x: Tensor) -> Any:
        h = self.encoder(x)
        mean, log_variance = self.mean(h), self.log_variance(h)
        code = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return self.decoder(code), mean, log_variance


def vae_loss(output: Any) -> Tensor:
    decoded, mean, log_variance = output
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean()
    return (decoded - 1.0).square().mean() + divergence  # type: ignore[no-any-return]


RANGE = "range-bearing"
SPECTRAL = "spectral norm"
TIED = "also read by"

SPECIMENS = (
    Specimen("MLP", "own", mlp, rows(8)),
    Specimen("MLP, BatchNorm", "own", batch_normed, rows(8)),
    Specimen("MLP, LayerNorm", "own", normed, rows(8)),
    Specimen("MLP, RMSNorm", "own", lambda: normed(nn.RMSNorm), rows(8)),
    Specimen("MLP, weight norm", "own", weight_normed, rows(8)),
    Specimen(
        "MLP, spectral norm", "own", spectral_normed, rows(8), exempt="spectral",
        declined={"2": SPECTRAL, "4": SPECTRAL},
    ),
    Specimen("SwiGLU", "own", SwiGlu, rows(8)),
    Specimen("EinMix mixer", "own", EinMixMlp, lambda: (torch.randn(3, 6, 8),)),
    Specimen(
        "tied autoencoder", "own", TiedAutoencoder, rows(8), exempt="tied", declined={"w1": TIED, "w2": TIED}
    ),
    Specimen("VAE", "own", Vae, rows(12), vae_loss, declined={"log_variance": "read 2 times"}),
    Specimen("dueling DQN", "own", Dueling, rows(4)),
    Specimen("actor-critic", "own", ActorCritic, rows(4)),
    Specimen("PPO actor-critic", "own", PpoActorCritic, rows(8)),
    Specimen("ensemble critic, baddbmm", "own", EnsembleCritic, rows(6, 2)),
    Specimen("ensemble critic, einsum", "own", EinsumCritic, rows(6)),
    Specimen(
        "GRU agent", "own", RecurrentAgent, rows(4, 6), exempt="recurrent", declined={"rnn": "recurrent gates"}
    ),
    Specimen(
        "QMIX mixer", "own", QmixMixer, lambda: (torch.randn(6, 3), torch.randn(6, 5)), exempt="range-bearing",
        declined={"hyper_w_1.2": "QmixMixer.weights", "hyper_w_final.2": "QmixMixer.weights", "hyper_b_1": "computed"},
    ),
    Specimen(
        "QPLEX mixer", "own", QplexMixer,
        lambda: (torch.randn(6, 3), torch.randn(6, 5), torch.rand(6, 6), torch.randn(6, 3)),
        exempt="range-bearing",
        declined={"hyper_w_final.2": RANGE, "si_weight.*": RANGE},
    ),
)  # fmt: skip
