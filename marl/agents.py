"""The agents' utility networks, one set of weights for all agents.

An agent sees its observation, and by choice its last action and its own index, and values each of its actions. While
acting it is called step by step; while learning it is unrolled over whole episodes at once, all time steps through
each layer together, and only the recurrent cell goes from step to step. Source: Rashid et al. 2018 (QMIX), section 4.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from marl.errors import BatchError, SettingsError
from marl.recurrence import GRUCell

__all__ = ["NO_ACTION", "Agent", "AgentInputs", "FeedForwardAgent", "InputPart", "RecurrentAgent"]

InputPart = Literal["obs", "last_action", "agent_id"]
INPUT_PARTS: tuple[InputPart, ...] = ("obs", "last_action", "agent_id")

NO_ACTION = -1
"""The last action at the first step of an episode, whose one-hot code is all zeros."""


class Agent(nn.Module, ABC):
    """What acting and learning need of agents: called step by step, or unrolled over episodes."""

    @abstractmethod
    def initial_hidden(self, obs: Tensor) -> Tensor:
        """The hidden state at the start of an episode: zeros (..., B, N, H) for observations (..., B, N, O)."""

    @abstractmethod
    def forward(self, obs: Tensor, last_actions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Values (..., B, N, A) and hidden state (..., B, N, H) after one more observation.

        `obs` (..., B, N, O), any dtype; `last_actions` (..., B, N) int64, `NO_ACTION` at an episode's first step;
        `hidden` (..., B, N, H).
        """

    @abstractmethod
    def unroll(self, obs: Tensor, actions: Tensor) -> Tensor:
        """Values (..., B, T + 1, N, A) along whole episodes, from a hidden state of zeros.

        `obs` (..., B, T + 1, N, O), any dtype; `actions` (..., B, T, N) int64.
        """


@dataclass(frozen=True)
class AgentInputs:
    """What agents see, in the order of `parts`: observation, last action (one-hot), own index (one-hot).

    >>> inputs = AgentInputs(num_agents=2, num_actions=3, obs_size=4)
    >>> inputs.size
    9
    >>> inputs.join(torch.ones(1, 2, 4, dtype=torch.uint8), torch.tensor([[2, NO_ACTION]]), torch.float32)
    tensor([[[1., 1., 1., 1., 0., 0., 1., 1., 0.],
             [1., 1., 1., 1., 0., 0., 0., 0., 1.]]])
    """

    num_agents: int
    """How many agents share the weights, N."""
    num_actions: int
    """How many actions each of them has, A."""
    obs_size: int
    """Length of an observation, O."""
    parts: tuple[InputPart, ...] = INPUT_PARTS
    """What of the three is seen."""

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in INPUT_PARTS]
        if unknown or not self.parts or len(set(self.parts)) < len(self.parts):
            raise SettingsError(f"inputs are to be {list(self.parts)}: choose some of {list(INPUT_PARTS)}, each once")

    @property
    def sizes(self) -> dict[InputPart, int]:
        """Length of each part."""
        return {"obs": self.obs_size, "last_action": self.num_actions, "agent_id": self.num_agents}

    @property
    def size(self) -> int:
        """Length of the input."""
        return sum(self.sizes[part] for part in self.parts)

    def join(self, obs: Tensor, last_actions: Tensor, dtype: torch.dtype) -> Tensor:
        """The input (..., N, size) for observations (..., N, O) and last actions (..., N).

        Raises:
            BatchError: observations of another shape.
        """
        if obs.shape[-2:] != (self.num_agents, self.obs_size):
            expected = f"(..., {self.num_agents}, {self.obs_size})"
            raise BatchError(f"asked for observations {expected} (agents, values), found {tuple(obs.shape)}")
        joined = torch.empty(*obs.shape[:-1], self.size, dtype=dtype, device=obs.device)
        pieces = torch.split(joined, [self.sizes[part] for part in self.parts], dim=-1)
        for part, piece in zip(self.parts, pieces, strict=True):  # written in place: each is read and cast once
            piece.copy_(self._part(part, obs, last_actions))
        return joined

    def _part(self, part: InputPart, obs: Tensor, last_actions: Tensor) -> Tensor:
        if part == "obs":
            return obs
        if part == "last_action":
            return last_actions.unsqueeze(-1) == torch.arange(self.num_actions, device=obs.device)
        ids = torch.eye(self.num_agents, dtype=torch.bool, device=obs.device)
        return ids.expand(*obs.shape[:-2], -1, -1)


class Joined(nn.Module):
    """`AgentInputs.join` as a layer: a part of its own where a network is read layer by layer.

    >>> joined = Joined(AgentInputs(num_agents=2, num_actions=3, obs_size=4))
    >>> joined(torch.zeros(5, 2, 4), torch.zeros(5, 2, dtype=torch.int64), torch.float32).shape
    torch.Size([5, 2, 9])
    """

    def __init__(self, inputs: AgentInputs) -> None:
        super().__init__()
        self.inputs = inputs

    def forward(self, obs: Tensor, last_actions: Tensor, dtype: torch.dtype) -> Tensor:
        return self.inputs.join(obs, last_actions, dtype)


class RecurrentAgent(Agent):
    """Linear layers with ReLU, a GRU cell, a linear head: `Agent` with memory.

    One input layer is the agent of PyMARL; two are that of ReBorn.

    >>> agent = RecurrentAgent(AgentInputs(num_agents=2, num_actions=3, obs_size=4))
    >>> agent.unroll(torch.zeros(5, 8, 2, 4), torch.zeros(5, 7, 2, dtype=torch.int64)).shape
    torch.Size([5, 8, 2, 3])
    """

    def __init__(self, inputs: AgentInputs, *, hidden_size: int = 64, num_input_layers: int = 1) -> None:
        super().__init__()
        self.inputs = inputs
        self.hidden_size = hidden_size
        self.joined = Joined(inputs)
        self.encoder = _hidden_layers(inputs.size, hidden_size, num_input_layers)
        self.cell = GRUCell(hidden_size, hidden_size)
        self.head = nn.Linear(hidden_size, inputs.num_actions)

    def initial_hidden(self, obs: Tensor) -> Tensor:
        return self.head.weight.new_zeros(*obs.shape[:-1], self.hidden_size)

    def forward(self, obs: Tensor, last_actions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder(self.joined(obs, last_actions, self.head.weight.dtype))
        rows = [rearrange(each, "... b n h -> ... (b n) h") for each in (features, hidden)]
        hidden = self.cell(*rows).reshape(hidden.shape)
        return self.head(hidden), hidden

    def unroll(self, obs: Tensor, actions: Tensor) -> Tensor:
        # time first, so that each step of the cell reads one piece of memory
        obs = rearrange(obs, "... b t n o -> ... t b n o")
        last_actions = rearrange(_last_actions(actions), "... b t n -> ... t b n")
        features = self.encoder(self.joined(obs, last_actions, self.head.weight.dtype))
        values = self.head(self.cell(rearrange(features, "... t b n h -> ... t (b n) h")))
        agent_qs: Tensor = rearrange(values, "... t (b n) a -> ... b t n a", n=self.inputs.num_agents)
        return agent_qs


class FeedForwardAgent(Agent):
    """Linear layers with ReLU and a linear head: `Agent` without memory, its hidden state is empty.

    >>> agent = FeedForwardAgent(AgentInputs(num_agents=2, num_actions=3, obs_size=4))
    >>> agent.unroll(torch.zeros(5, 8, 2, 4), torch.zeros(5, 7, 2, dtype=torch.int64)).shape
    torch.Size([5, 8, 2, 3])
    """

    def __init__(self, inputs: AgentInputs, *, hidden_size: int = 64, num_hidden_layers: int = 2) -> None:
        super().__init__()
        self.inputs = inputs
        self.joined = Joined(inputs)
        self.encoder = _hidden_layers(inputs.size, hidden_size, num_hidden_layers)
        self.head = nn.Linear(hidden_size, inputs.num_actions)

    def initial_hidden(self, obs: Tensor) -> Tensor:
        return self.head.weight.new_zeros(*obs.shape[:-1], 0)

    def forward(self, obs: Tensor, last_actions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(self.encoder(self.joined(obs, last_actions, self.head.weight.dtype))), hidden

    def unroll(self, obs: Tensor, actions: Tensor) -> Tensor:
        agent_qs: Tensor
        agent_qs, _ = self(obs, _last_actions(actions), self.initial_hidden(obs))
        return agent_qs


def _hidden_layers(input_size: int, hidden_size: int, num_layers: int) -> nn.Sequential:
    sizes = [input_size] + [hidden_size] * num_layers
    if num_layers < 1 or hidden_size < 1:
        raise SettingsError(f"asked for {num_layers} hidden layers of {hidden_size} units: both must be at least 1")
    return nn.Sequential(*(layer for size in sizes[:-1] for layer in (nn.Linear(size, hidden_size), nn.ReLU())))


def _last_actions(actions: Tensor) -> Tensor:
    """What was done before each observation: (..., B, T, N) to (..., B, T + 1, N)."""
    first = torch.full_like(actions[..., :1, :], NO_ACTION)
    return torch.cat([first, actions], dim=-2)
