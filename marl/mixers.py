"""Mixers: the value of a joint action from the agents' values of their own.

All are called alike, with the values of the actions taken and, for mixers that use them, each agent's best value and
the actions themselves. What mixes is generated from the state by hypernetworks: plain `nn.Sequential`s, whose hidden
ReLU units are ordinary units. `...` stands for any leading dimensions, such as batch and time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn

from marl.errors import SettingsError
from marl.layers import GroupedLinear

__all__ = ["QMIX", "QPLEX", "VDN", "Attention", "Mixer", "Transformation"]

# Keeps generated weights above zero, as in the code of QPLEX.
EPSILON = 1e-10


class Mixer(nn.Module, ABC):
    """What learning needs of a mixer."""

    @abstractmethod
    def forward(self, chosen_qs: Tensor, state: Tensor, *, max_qs: Tensor, actions: Tensor) -> Tensor:
        """The joint value (...) of the actions taken.

        `chosen_qs` (..., N): each agent's value of the action it took; `state` (..., S), any dtype;
        `max_qs` (..., N): each agent's best value among its available actions; `actions` (..., N) int64.
        """


class VDN(Mixer):
    """The sum of the agents' values: Q_tot = sum_i Q_i. Source: Sunehag et al. 2018, section 3.

    >>> qs = torch.tensor([[1.0, 2.0]])
    >>> VDN()(qs, torch.zeros(1, 0), max_qs=qs, actions=torch.zeros(1, 2, dtype=torch.int64))
    tensor([3.])
    """

    def forward(self, chosen_qs: Tensor, state: Tensor, *, max_qs: Tensor, actions: Tensor) -> Tensor:
        return chosen_qs.sum(dim=-1)


class QMIX(Mixer):
    """A network of one hidden layer, monotonic in the agents' values, generated from the state.

    h = ELU(q |W1(s)| + b1(s)) with `embed_size` units, Q_tot = h |w2(s)| + V(s). Hypernetworks have one linear layer,
    or two with `hypernet_size` ReLU units between them. Source: Rashid et al. 2018, section 4 and appendix.

    >>> mixer, qs = QMIX(2, 5), torch.randn(7, 2)
    >>> mixer(qs, torch.randn(7, 5), max_qs=qs, actions=torch.zeros(7, 2, dtype=torch.int64)).shape
    torch.Size([7])
    """

    def __init__(
        self,
        num_agents: int,
        state_size: int,
        *,
        embed_size: int = 32,
        hypernet_layers: int = 2,
        hypernet_size: int = 64,
    ) -> None:
        super().__init__()
        if hypernet_layers not in (1, 2):
            raise SettingsError(f"asked for hypernetworks of {hypernet_layers} layers: QMIX has them with 1 or 2")
        hidden_sizes = (hypernet_size,) * (hypernet_layers - 1)
        self.num_agents = num_agents
        self.w1 = hypernetwork(state_size, num_agents * embed_size, hidden_sizes)
        self.b1 = nn.Linear(state_size, embed_size)
        self.w2 = hypernetwork(state_size, embed_size, hidden_sizes)
        self.v = hypernetwork(state_size, 1, (embed_size,))

    def forward(self, chosen_qs: Tensor, state: Tensor, *, max_qs: Tensor, actions: Tensor) -> Tensor:
        state = state.to(chosen_qs.dtype)
        hidden = F.elu(self.mixing_inputs(chosen_qs, state))
        mixed = einsum(hidden, self.w2(state).abs(), "... e, ... e -> ...")
        q_tot: Tensor = mixed + rearrange(self.v(state), "... 1 -> ...")
        return q_tot

    def mixing_inputs(self, chosen_qs: Tensor, state: Tensor) -> Tensor:
        """What enters the ELU units: (..., N) and (..., S) to (..., E)."""
        state = state.to(chosen_qs.dtype)
        w1 = rearrange(self.w1(state).abs(), "... (n e) -> ... n e", n=self.num_agents)
        inputs: Tensor = einsum(chosen_qs, w1, "... n, ... n e -> ... e") + self.b1(state)
        return inputs


class QPLEX(Mixer):
    """A dueling mixer that can represent every value whose best joint action is made of each agent's best.

    With the agents' values q and best values m transformed by positive weights, Q_tot = sum_i q_i
    + sum_i (q_i - m_i) (lambda_i - 1), lambda > 0 depending on state and joint action. The advantages q - m pass no
    gradient. Source: Wang et al. 2021, equations 7 to 12; that advantages are detached, as in the authors' code.

    `transformation=None` leaves the values as they are; `minus_one=False` drops the 1.

    >>> mixer = QPLEX(Attention(2, 3, 5), Transformation(2, 5))
    >>> qs, actions = torch.randn(7, 2), torch.zeros(7, 2, dtype=torch.int64)
    >>> mixer(qs, torch.randn(7, 5), max_qs=qs + 1, actions=actions).shape
    torch.Size([7])
    """

    def __init__(
        self, attention: Attention, transformation: Transformation | None = None, *, minus_one: bool = True
    ) -> None:
        super().__init__()
        self.attention = attention
        self.transformation = transformation
        self.minus_one = minus_one

    def forward(self, chosen_qs: Tensor, state: Tensor, *, max_qs: Tensor, actions: Tensor) -> Tensor:
        state = state.to(chosen_qs.dtype)
        if self.transformation is not None:
            weights, offsets = self.transformation(state)
            chosen_qs, max_qs = weights * chosen_qs + offsets, weights * max_qs + offsets
        advantages = (chosen_qs - max_qs).detach()
        importance = self.attention(state, actions) - int(self.minus_one)
        q_tot: Tensor = (chosen_qs + advantages * importance).sum(dim=-1)
        return q_tot


class Transformation(nn.Module):
    """Positive weights and offsets for each agent's values, from the state: (..., S) to twice (..., N)."""

    def __init__(self, num_agents: int, state_size: int, *, hypernet_size: int = 64) -> None:
        super().__init__()
        self.weights = hypernetwork(state_size, num_agents, (hypernet_size,))
        self.offsets = hypernetwork(state_size, num_agents, (hypernet_size,))

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.weights(state).abs() + EPSILON, self.offsets(state)


class Attention(nn.Module):
    """The importance lambda > 0 of each agent's advantage: state (..., S) and actions (..., N) to (..., N).

    lambda = sum_k |key_k(s)| sigmoid(agents_k(s)) sigmoid(action_k(s, u)) over `num_heads` heads k, each of three
    networks with `hidden_sizes` ReLU units between their linear layers. Source: Wang et al. 2021, equation 11.
    """

    def __init__(
        self,
        num_agents: int,
        num_actions: int,
        state_size: int,
        *,
        num_heads: int = 4,
        hidden_sizes: tuple[int, ...] = (64,),
    ) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.keys = _heads(state_size, (num_heads, 1), hidden_sizes)
        self.agents = _heads(state_size, (num_heads, num_agents), hidden_sizes)
        self.actions = _heads(state_size + num_agents * num_actions, (num_heads, num_agents), hidden_sizes)

    def forward(self, state: Tensor, actions: Tensor) -> Tensor:
        joint_action = rearrange(F.one_hot(actions, self.num_actions), "... n a -> ... (n a)")
        state_action = torch.cat([state, joint_action.to(state.dtype)], dim=-1)
        keys = self.keys(state).abs() + EPSILON
        shares = self.agents(state).sigmoid() * self.actions(state_action).sigmoid()
        importance: Tensor = reduce(keys * shares, "... k n -> ... n", "sum")
        return importance


def hypernetwork(state_size: int, num_weights: int, hidden_sizes: tuple[int, ...]) -> nn.Module:
    """A network that generates weights from the state: linear layers with ReLU between them.

    >>> hypernetwork(5, 3, (64,))
    Sequential(
      (0): Linear(in_features=5, out_features=64, bias=True)
      (1): ReLU()
      (2): Linear(in_features=64, out_features=3, bias=True)
    )
    """
    sizes = [state_size, *hidden_sizes]
    _check_sizes(*hidden_sizes, num_weights)
    hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(sizes[-1], num_weights))


def _heads(input_size: int, output_shape: tuple[int, int], hidden_sizes: tuple[int, ...]) -> nn.Sequential:
    """A network for each head, as one: (..., input_size) to (..., heads, outputs)."""
    num_heads, _ = output_shape
    _check_sizes(*output_shape, *hidden_sizes)
    first, *others = [*hidden_sizes, output_shape[1]]
    layers: list[nn.Module] = [nn.Linear(input_size, num_heads * first)]
    if others:  # the activation function next to its layer, where surgery looks for it
        layers.append(nn.ReLU())
    layers.append(nn.Unflatten(-1, (num_heads, first)))
    for size, next_size in pairwise([first, *others]):
        layers += [GroupedLinear(num_heads, size, next_size), nn.ReLU()]
    return nn.Sequential(*(layers[:-1] if others else layers))


def _check_sizes(*sizes: int) -> None:
    if min(sizes) < 1:
        raise SettingsError(f"asked for layers of {list(sizes)} units: each needs at least one")
