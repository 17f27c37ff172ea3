"""Small networks of every shape people train, each with what discovery must find in it.

An `Animal` names a network, how to build it and a batch, the sites that must be found, and for each other producer a
piece of the reason for which it must be declined. Tests walk over the whole zoo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

__all__ = ["ZOO", "Animal", "animals"]


@dataclass(frozen=True)
class Animal:
    """One network: its name, how to build it, the arguments it takes, and what discovery must say of it."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], tuple[Any, ...]]
    sites: Mapping[str, str]  # producer -> activation function
    declined: Mapping[str, str] = field(default_factory=dict)  # producer -> words of the reason

    def __str__(self) -> str:
        return self.name


def rows(*sizes: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: tuple(torch.randn(5, size) for size in sizes)


def images(channels: int, *sizes: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(3, channels, *sizes),)


# -- heads, branches, sharing ----------------------------------------------------------------------------------------


class MultiHead(nn.Module):
    """One trunk, one head per task; registered heads first, so that the order of modules misleads."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"a": nn.Linear(6, 2), "b": nn.Linear(6, 3)})
        self.trunk = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.trunk(x))
        return {name: head(h) for name, head in self.heads.items()}


class Dueling(nn.Module):
    """Value and advantage streams with hidden layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.value_out = nn.Linear(5, 1)
        self.advantage_out = nn.Linear(5, 3)
        self.trunk = nn.Linear(4, 6)
        self.value_hidden = nn.Linear(6, 5)
        self.advantage_hidden = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.trunk(x))
        value = self.value_out(self.value_hidden(h).relu())
        advantage = self.advantage_out(F.leaky_relu(self.advantage_hidden(h), 0.1))
        return value + advantage - advantage.mean(-1, keepdim=True)


class Residual(nn.Module):
    """Blocks in a ModuleList; the sum is taken after the activation's consumer."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock() for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Any:
        return x + self.down(F.silu(self.up(x)))


class TwinParameters(nn.Module):
    """Two modules, one Parameter each for weight and bias."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 1)
        self.right.weight, self.right.bias = self.left.weight, self.left.bias

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.out(torch.relu(self.left(x)) - torch.relu(self.right(y)))


class Siamese(nn.Module):
    """One module called twice in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.out = nn.Linear(4, 6), nn.Linear(6, 1)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.out(F.elu(self.encoder(x)) * F.elu(self.encoder(y)))


class SharedByParents(nn.Module):
    """Two parents hold one child module."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.actor = nn.Sequential(shared, nn.Linear(6, 2))
        self.critic = nn.Sequential(shared, nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Any:
        return self.actor(x), self.critic(x)


class RecurrentAgent(nn.Module):
    """PyMARL's agent: settings in a namespace, a GRU cell behind the hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.args = SimpleNamespace(rnn_hidden_dim=6, n_actions=3)
        self.fc1 = nn.Linear(4, self.args.rnn_hidden_dim)
        self.rnn = nn.GRUCell(self.args.rnn_hidden_dim, self.args.rnn_hidden_dim)
        self.fc2 = nn.Linear(self.args.rnn_hidden_dim, self.args.n_actions)

    def init_hidden(self) -> Tensor:
        return self.fc1.weight.new(1, self.args.rnn_hidden_dim).zero_()

    def forward(self, inputs: Tensor, hidden_state: Tensor) -> Any:
        x = F.relu(self.fc1(inputs))
        h_in = hidden_state.reshape(-1, self.args.rnn_hidden_dim)
        h = self.rnn(x, h_in)
        return self.fc2(h), h


class Dense(nn.Module):
    """Each layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 5), nn.Linear(9, 3), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Any:
        x = torch.cat([x, F.gelu(self.first(x))], dim=-1)
        x = torch.cat([x, F.mish(self.second(x))], dim=-1)
        return self.out(x)


class TransformerMlp(nn.Module):
    """The block of a transformer, with attention that declines and an MLP that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.0), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Any:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class CleanRlAgent(nn.Module):
    """No forward: methods only, as in CleanRL's ppo.py."""

    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))
        self.actor = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))

    def get_value(self, x: Tensor) -> Any:
        return self.critic(x)

    def get_action_and_value(self, x: Tensor, action: Tensor | None = None) -> Any:
        logits = self.actor(x)
        probs = torch.distributions.Categorical(logits=logits)
        if action is None:
            action = probs.sample()
        return action, probs.log_prob(action), probs.entropy(), self.critic(x)


class UntraceableRoot(nn.Module):
    """As in Stable-Baselines3: a root that branches on values, its networks in Sequential children."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.action = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        if float(x.detach().abs().max()) > 1e6:
            raise ValueError("observations are not normalized")
        return self.action(self.policy(x))


class Straddle(nn.Module):
    """The producer ends a child, the activation is the parent's."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6))
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.relu(self.body(x)))


class FunctionalWeights(nn.Module):
    """A layer as a bare Parameter, and a convolution's weight read by F.conv1d."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 2, 3) * 0.3)
        self.matrix = nn.Parameter(torch.randn(6, 20) * 0.3)
        self.offset = nn.Parameter(torch.randn(6) * 0.3)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        h = F.conv1d(x, self.kernel, padding=1).relu()
        return self.out(F.softplus(F.linear(h.flatten(1), self.matrix, self.offset)))


class ActorCritic(nn.Module):
    """`value()` beside `forward()`, both through one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.actor, self.critic = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Any:
        return self.actor(F.relu(self.hidden(x)))

    def value(self, x: Tensor) -> Any:
        return self.critic(F.relu(self.hidden(x)))


# -- what must be declined -------------------------------------------------------------------------------------------


class ReadTwice(nn.Module):
    """`relu(z) + z`, and a pre-activation read by two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.crelu, self.out = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        z = self.skip(x)
        z = F.relu(z) + z
        z = self.crelu(z)
        return self.out(torch.cat([F.relu(z), F.relu(-z)], -1))


class TiedDecoder(nn.Module):
    """An autoencoder whose decoder reads the encoder's weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Any:
        return F.linear(F.relu(self.encoder(x)), self.encoder.weight.t())


class TiedEmbedding(nn.Module):
    """A language model's decoder shares the embedding's weight; here an activation follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.decoder = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Any:
        return F.relu(self.decoder(self.embedding(tokens)))


def computed_weights() -> nn.Module:
    """Spectral norm, weight norm, pruning: weights that are no parameters."""
    spectral = parametrizations.spectral_norm(nn.Linear(4, 5))
    weighted = parametrizations.weight_norm(nn.Linear(5, 6))
    pruned = nn.Linear(6, 5)
    prune.l1_unstructured(pruned, "weight", amount=2)
    return nn.Sequential(spectral, nn.ReLU(), weighted, nn.ReLU(), pruned, nn.ReLU(), nn.Linear(5, 2))


def old_norms() -> nn.Module:
    """The hook-based spectral norm, which adds a pre-hook and a plain attribute `weight`."""
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 2))


def frozen_layer() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    network[0].requires_grad_(False)
    return network


class HookedStraddle(Straddle):
    """As Straddle, with a backward hook on the child that holds the producer: it cannot be inlined."""

    def __init__(self) -> None:
        super().__init__()
        self.body.register_full_backward_hook(_observe)


def _observe(module: nn.Module, args: Any, output: Any) -> None:
    """A hook that changes nothing."""


def changed_by_hook() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    network[0].register_forward_hook(lambda module, args, output: output * 2.0)
    network[3].register_forward_hook(lambda module, args, output: output * 2.0)
    return network


def instance_forward() -> nn.Module:
    """A wrapper put its own forward on one layer, as mixed-precision libraries do."""
    network = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    inner = network[0].forward
    network[0].forward = lambda x: inner(x) * 0.5
    return network


class Gates(nn.Module):
    """A tanh head, a softplus scale, a sigmoid gate, an exp: ranges that carry meaning."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean, self.scale = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)
        self.gate, self.rate = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.body(x))
        gated = torch.sigmoid(self.gate(h)) * torch.exp(self.rate(h))
        return torch.tanh(self.mean(h)), F.softplus(self.scale(h)), gated


class Attended(nn.Module):
    """A softmax couples units; a fast path would bypass an encoder layer's linears."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.logits = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return torch.softmax(self.logits(self.encoder(x)), -1)


class Partly(nn.Module):
    """A layer for a later stage that nothing calls yet."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare, self.out = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.used(x)))


# -- mixers ----------------------------------------------------------------------------------------------------------


class QmixMixer(nn.Module):
    """QMIX's monotonic mixing network with hypernetworks of one or two layers; `positive` keeps weights >= 0."""

    def __init__(
        self,
        num_agents: int = 3,
        state_size: int = 5,
        embed_size: int = 4,
        hyper_layers: int = 2,
        positive: str = "abs",
    ) -> None:
        super().__init__()
        self.num_agents, self.embed_size, self.positive = num_agents, embed_size, positive

        def hypernetwork(size: int) -> nn.Module:
            if hyper_layers == 1:
                return nn.Linear(state_size, size)
            return nn.Sequential(nn.Linear(state_size, 8), nn.ReLU(), nn.Linear(8, size))

        self.hyper_w_1 = hypernetwork(num_agents * embed_size)
        self.hyper_w_final = hypernetwork(embed_size)
        self.hyper_b_1 = nn.Linear(state_size, embed_size)
        self.V = nn.Sequential(nn.Linear(state_size, embed_size), nn.ReLU(), nn.Linear(embed_size, 1))

    def made_positive(self, w: Tensor) -> Tensor:
        if self.positive == "abs":
            return torch.abs(w)
        return F.softplus(w) if self.positive == "softplus" else torch.exp(w)

    def weights(self, states: Tensor) -> tuple[Tensor, Tensor]:
        w1 = self.made_positive(self.hyper_w_1(states)).view(-1, self.num_agents, self.embed_size)
        w_final = self.made_positive(self.hyper_w_final(states)).view(-1, self.embed_size, 1)
        return w1, w_final

    def forward(self, agent_qs: Tensor, states: Tensor) -> Any:
        agent_qs = agent_qs.view(-1, 1, self.num_agents)
        w1, w_final = self.weights(states)
        b1 = self.hyper_b_1(states).view(-1, 1, self.embed_size)
        hidden = F.elu(torch.bmm(agent_qs, w1) + b1)
        v = self.V(states).view(-1, 1, 1)
        return (torch.bmm(hidden, w_final) + v).view(-1, 1)


class QplexWeights(nn.Module):
    """QPLEX's importance weights: per head, |key| * sigmoid(agents) * sigmoid(actions), summed over heads."""

    def __init__(self, num_agents: int = 3, state_size: int = 5, num_actions: int = 2, num_kernel: int = 2) -> None:
        super().__init__()
        self.num_agents = num_agents

        def extractor(size_in: int, size_out: int) -> nn.Module:
            return nn.Sequential(nn.Linear(size_in, 8), nn.ReLU(), nn.Linear(8, size_out))

        joint = state_size + num_agents * num_actions
        self.key_extractors = nn.ModuleList(extractor(state_size, 1) for _ in range(num_kernel))
        self.agents_extractors = nn.ModuleList(extractor(state_size, num_agents) for _ in range(num_kernel))
        self.action_extractors = nn.ModuleList(extractor(joint, num_agents) for _ in range(num_kernel))

    def forward(self, states: Tensor, actions: Tensor) -> Any:
        data = torch.cat([states, actions], dim=1)
        heads = []
        for key, agents, action in zip(
            self.key_extractors, self.agents_extractors, self.action_extractors, strict=True
        ):
            x_key = torch.abs(key(states)).repeat(1, self.num_agents) + 1e-10
            x_agents = torch.sigmoid(agents(states))
            x_action = torch.sigmoid(action(data))
            heads.append(x_key * x_agents * x_action)
        return torch.stack(heads, dim=1).view(-1, len(heads), self.num_agents).sum(dim=1)


class QplexMixer(nn.Module):
    """Advantages weighted by positive lambdas: the greedy joint action is that of the agents."""

    def __init__(self, num_agents: int = 3, state_size: int = 5) -> None:
        super().__init__()
        self.num_agents = num_agents
        self.si_weight = QplexWeights(num_agents, state_size)
        self.hyper_w_final = nn.Sequential(nn.Linear(state_size, 8), nn.ReLU(), nn.Linear(8, num_agents))
        self.V = nn.Sequential(nn.Linear(state_size, 8), nn.ReLU(), nn.Linear(8, num_agents))

    def forward(self, agent_qs: Tensor, states: Tensor, actions: Tensor, max_q_i: Tensor) -> Any:
        w_final = torch.abs(self.hyper_w_final(states)).view(-1, self.num_agents) + 1e-10
        v = self.V(states).view(-1, self.num_agents)
        agent_qs, max_q_i = w_final * agent_qs + v, w_final * max_q_i + v
        adv_w_final = self.si_weight(states, actions).view(-1, self.num_agents)
        adv_tot = ((agent_qs - max_q_i).detach() * (adv_w_final - 1.0)).sum(dim=1)
        return agent_qs.sum(dim=1) + adv_tot


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
        nn.SELU(),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
        nn.PReLU(5),
        nn.Linear(5, 2),
    )


def other_convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2, dilation=2),
        nn.PReLU(),
        nn.Conv1d(4, 4, 3, groups=2),
        nn.ReLU(),
        nn.ConvTranspose1d(4, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
    )


def complex_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5, dtype=torch.complex64), nn.Tanh(), nn.Linear(5, 2, dtype=torch.complex64))


def mlp(activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 2))


HEAD = "no activation function"

ZOO = (
    Animal("mlp", mlp, rows(4), {"0": "relu", "2": "relu"}, {"4": HEAD}),
    Animal("tanh mlp", lambda: mlp(nn.Tanh), rows(4), {"0": "tanh", "2": "tanh"}, {"4": HEAD}),
    Animal("multi-head", MultiHead, rows(4), {"trunk": "relu"}, {"heads.a": HEAD, "heads.b": HEAD}),
    Animal(
        "dueling",
        Dueling,
        rows(4),
        {"trunk": "relu", "value_hidden": "relu", "advantage_hidden": "leaky_relu"},
        {"value_out": HEAD, "advantage_out": "read 2 times"},
    ),
    Animal(
        "residual",
        Residual,
        rows(4),
        {"blocks.0.up": "silu", "blocks.1.up": "silu"},
        {"blocks.0.down": HEAD, "blocks.1.down": HEAD, "head": HEAD},
    ),
    Animal("two modules, one Parameter", TwinParameters, rows(4, 4), {"left": "relu"}, {"out": HEAD}),
    Animal("one module called twice", Siamese, rows(4, 4), {"encoder": "elu"}, {"out": HEAD}),
    Animal(
        "one module, two parents",
        SharedByParents,
        rows(4),
        {"actor.0.0": "relu"},
        {"actor.1": HEAD, "critic.1": HEAD},
    ),
    Animal("GRU agent", RecurrentAgent, rows(4, 6), {"fc1": "relu"}, {"fc2": HEAD, "rnn": "recurrent gates"}),
    Animal("dense", Dense, rows(4), {"first": "gelu", "second": "mish"}, {"out": HEAD}),
    Animal(
        "convolutions",
        convolutions,
        images(2, 8, 8),
        {"0": "relu", "3": "selu", "6": "prelu"},
        {"8": HEAD},
    ),
    Animal(
        "other convolutions",
        other_convolutions,
        images(2, 16),
        {"0": "prelu", "2": "relu", "4": "relu"},
        {},
    ),
    Animal(
        "transformer MLP",
        TransformerMlp,
        lambda: (torch.randn(2, 3, 8),),
        {"mlp.0": "gelu"},
        {"mlp.3": HEAD, "attention": "fused attention", "attention.out_proj": "fused attention"},
    ),
    Animal(
        "attended",
        Attended,
        lambda: (torch.randn(2, 3, 8),),
        {"encoder.linear1": "relu"},
        {
            "encoder.linear2": HEAD,
            "encoder.self_attn": "fused attention",
            "encoder.self_attn.out_proj": "fused attention",
            "logits": "'softmax' couples units",
        },
    ),
    Animal("untraceable root", UntraceableRoot, rows(4), {"policy.0": "relu"}, {"action": "cannot be traced"}),
    Animal("straddle", Straddle, rows(4), {"body.0": "relu", "body.2": "relu"}, {"out": HEAD}),
    Animal(
        "functional weights",
        FunctionalWeights,
        images(2, 4),
        {"kernel": "relu", "matrix": "softplus"},
        {"out": HEAD},
    ),
    Animal("actor-critic", ActorCritic, rows(4), {"hidden": "relu"}, {"actor": HEAD, "critic": HEAD}),
    Animal(
        "read twice",
        ReadTwice,
        rows(4),
        {},
        {"skip": "read 2 times", "crelu": "read 2 times", "out": HEAD},
    ),
    Animal("tied decoder", TiedDecoder, rows(4), {}, {"encoder": "its weight is also read by"}),
    Animal(
        "tied embedding",
        TiedEmbedding,
        lambda: (torch.tensor([[1, 2], [3, 4]]),),
        {},
        {"decoder": "its weight is also read by 'embedding', a Embedding"},
    ),
    Animal(
        "computed weights",
        computed_weights,
        rows(4),
        {"2": "relu", "4": "relu"},
        {"0": "its weight is computed (spectral norm)", "6": HEAD},
    ),
    Animal("old spectral norm", old_norms, rows(4), {}, {"0": "its weight is computed", "2": HEAD}),
    Animal("frozen layer", frozen_layer, rows(4), {"2": "relu"}, {"0": "frozen", "4": HEAD}),
    Animal("hooked straddle", HookedStraddle, rows(4), {"body.0": "relu"}, {"body.2": HEAD, "out": HEAD}),
    Animal(
        "changed by hooks",
        changed_by_hook,
        rows(4),
        {},
        {"0": "a forward hook on it may change its output", "2": "a hook on '3' may change", "4": HEAD},
    ),
    Animal(
        "instance forward",
        instance_forward,
        rows(4),
        {"2": "relu"},
        {"0": "its forward was replaced on the instance", "4": HEAD},
    ),
    Animal(
        "gates",
        Gates,
        rows(4),
        {"body": "tanh"},
        {"mean": "range-bearing", "scale": "range-bearing", "gate": "range-bearing", "rate": "range-bearing"},
    ),
    Animal(
        "partly used",
        Partly,
        rows(4),
        {"used": "relu"},
        {"spare": "no traced forward calls it", "out": HEAD},
    ),
    Animal(
        "complex",
        complex_layers,
        lambda: (torch.randn(3, 4, dtype=torch.complex64),),
        {},
        {"0": "complex weights", "2": "complex weights"},
    ),
    Animal(
        "QMIX",
        QmixMixer,
        lambda: (torch.randn(6, 3), torch.randn(6, 5)),
        {"hyper_w_1.0": "relu", "hyper_w_final.0": "relu", "V.0": "relu"},
        {
            "hyper_w_1.2": "used by QmixMixer.weights",
            "hyper_w_final.2": "used by QmixMixer.weights",
            "hyper_b_1": "a product of two computed tensors",
            "V.2": "a product of two computed tensors",
        },
    ),
    Animal(
        "QMIX, one-layer hypernetworks",
        lambda: QmixMixer(hyper_layers=1),
        lambda: (torch.randn(6, 3), torch.randn(6, 5)),
        {"V.0": "relu"},
        {
            "hyper_w_1": "range-bearing",
            "hyper_w_final": "range-bearing",
            "hyper_b_1": "a product of two computed tensors",
            "V.2": "a product of two computed tensors",
        },
    ),
)


def animals(*names: str) -> list[Animal]:
    """The animals of these names, all of them by default."""
    return [animal for animal in ZOO if not names or animal.name in names]
