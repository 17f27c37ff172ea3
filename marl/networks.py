"""Agents and their mixer as one module: what learns together, is saved together and is operated on together."""

from __future__ import annotations

from typing import Protocol

from torch import nn

from marl.agents import Agent, AgentInputs, FeedForwardAgent, RecurrentAgent
from marl.mixers import QMIX, QPLEX, VDN, Attention, Mixer, Transformation
from marl.settings import AgentSettings, MixerSettings, QMIXSettings, QPLEXSettings

__all__ = ["Networks", "Sizes", "make_agent", "make_mixer", "make_networks"]


class Sizes(Protocol):
    """What networks need to know of an environment."""

    @property
    def num_agents(self) -> int:
        """Number of agents, N."""

    @property
    def num_actions(self) -> int:
        """Number of actions of each agent, A."""

    @property
    def obs_size(self) -> int:
        """Length of an observation, O."""

    @property
    def state_size(self) -> int:
        """Length of the state, S."""


class Networks(nn.Module):
    """The network that all agents share, and the mixer of their values."""

    def __init__(self, agent: Agent, mixer: Mixer) -> None:
        super().__init__()
        self.agent = agent
        self.mixer = mixer


def make_networks(agent: AgentSettings, mixer: MixerSettings, sizes: Sizes) -> Networks:
    """Networks with weights drawn from torch's global generator.

    Raises:
        SettingsError: layers without units, or hypernetworks of a depth that there is not.

    >>> from types import SimpleNamespace
    >>> sizes = SimpleNamespace(num_agents=8, num_actions=6, obs_size=75, state_size=300)
    >>> networks = make_networks(AgentSettings(), QMIXSettings(), sizes)
    >>> sum(parameter.numel() for parameter in networks.parameters())
    107655
    """
    return Networks(make_agent(agent, sizes), make_mixer(mixer, sizes))


def make_agent(settings: AgentSettings, sizes: Sizes) -> Agent:
    """The agents' network that the settings describe."""
    inputs = AgentInputs(sizes.num_agents, sizes.num_actions, sizes.obs_size, settings.inputs)
    size, num_layers = settings.hidden_size, settings.num_hidden_layers
    if settings.kind == "recurrent":
        return RecurrentAgent(inputs, hidden_size=size, num_input_layers=num_layers)
    return FeedForwardAgent(inputs, hidden_size=size, num_hidden_layers=num_layers)


def make_mixer(settings: MixerSettings, sizes: Sizes) -> Mixer:
    """The mixer that the settings describe."""
    if isinstance(settings, QMIXSettings):
        return QMIX(
            sizes.num_agents,
            sizes.state_size,
            embed_size=settings.embed_size,
            hypernet_layers=settings.hypernet_layers,
            hypernet_size=settings.hypernet_size,
        )
    if isinstance(settings, QPLEXSettings):
        return _make_qplex(settings, sizes)
    return VDN()


def _make_qplex(settings: QPLEXSettings, sizes: Sizes) -> QPLEX:
    attention = Attention(
        sizes.num_agents,
        sizes.num_actions,
        sizes.state_size,
        num_heads=settings.num_heads,
        hidden_sizes=(settings.adversary_size,) * (settings.adversary_layers - 1),
    )
    transformation = Transformation(sizes.num_agents, sizes.state_size, hypernet_size=settings.hypernet_size)
    return QPLEX(attention, transformation if settings.weighted_head else None, minus_one=settings.minus_one)
