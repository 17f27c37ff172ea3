"""Agents: what they see, what they compute, and that learning sees what acting saw."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from marl.agents import NO_ACTION, Agent, AgentInputs, FeedForwardAgent, InputPart, RecurrentAgent
from marl.errors import BatchError, SettingsError
from tests.marl import reference
from tests.marl.batches import SIZES, made_up_episodes

N, A, SIZE = SIZES.num_agents, SIZES.num_actions, SIZES.obs_size
PARTS: list[tuple[InputPart, ...]] = [
    ("obs",),
    ("obs", "last_action"),
    ("obs", "agent_id"),
    ("last_action", "agent_id"),
    ("obs", "last_action", "agent_id"),
]
AGENTS: dict[str, Callable[[AgentInputs], Agent]] = {
    "recurrent": lambda inputs: RecurrentAgent(inputs, hidden_size=7),
    "recurrent, two input layers": lambda inputs: RecurrentAgent(inputs, hidden_size=7, num_input_layers=2),
    "feed-forward": lambda inputs: FeedForwardAgent(inputs, hidden_size=7),
    "feed-forward, one layer": lambda inputs: FeedForwardAgent(inputs, hidden_size=7, num_hidden_layers=1),
}
every_agent = pytest.mark.parametrize("kind", AGENTS)


def new_agent(kind: str, parts: tuple[InputPart, ...] = ("obs", "last_action", "agent_id")) -> Agent:
    return AGENTS[kind](AgentInputs(N, A, SIZE, parts)).double()


@every_agent
def test_agent_computes_what_a_plain_loop_over_its_formula_does(kind: str) -> None:
    agent, episodes = new_agent(kind), made_up_episodes()
    found = agent.unroll(episodes["obs"], episodes["actions"])
    for episode in range(len(episodes)):
        expected = reference.agent_values(agent.state_dict(), episodes, episode)
        for t, values in enumerate(expected):
            assert (found[episode, t] - torch.stack(values)).abs().max() <= 1e-10


@every_agent
@pytest.mark.parametrize("parts", PARTS, ids=" ".join)
def test_unrolling_gives_what_step_by_step_acting_gave(kind: str, parts: tuple[InputPart, ...]) -> None:
    agent, episodes = new_agent(kind, parts), made_up_episodes()
    obs, actions = episodes["obs"], episodes["actions"]
    unrolled = agent.unroll(obs, actions)
    last_actions, hidden = torch.full_like(actions[:, 0], NO_ACTION), agent.initial_hidden(obs[:, 0])
    for t in range(obs.shape[1]):
        values, hidden = agent(obs[:, t], last_actions, hidden)
        assert (values - unrolled[:, t]).abs().max() <= 1e-12
        last_actions = actions[:, min(t, actions.shape[1] - 1)]


@pytest.mark.parametrize("parts", PARTS, ids=" ".join)
def test_only_the_parts_asked_for_are_seen(parts: tuple[InputPart, ...]) -> None:
    inputs = AgentInputs(N, A, SIZE, parts)
    obs, last_actions = torch.randn(2, N, SIZE), torch.tensor([[0, 3, NO_ACTION], [1, 1, 2]])
    seen = inputs.join(obs, last_actions, torch.float32)
    assert seen.shape == (2, N, inputs.size)
    pieces = dict(zip(parts, seen.split([inputs.sizes[part] for part in parts], dim=-1), strict=True))
    if "obs" in pieces:
        assert torch.equal(pieces["obs"], obs)
    if "last_action" in pieces:
        assert pieces["last_action"][0].tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    if "agent_id" in pieces:
        assert torch.equal(pieces["agent_id"], torch.eye(N).expand(2, N, N))


@every_agent
def test_agents_share_their_weights(kind: str) -> None:
    agent, episodes = new_agent(kind, ("obs", "last_action")), made_up_episodes()
    values = agent.unroll(episodes["obs"], episodes["actions"])
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(
        agent.unroll(episodes["obs"][:, :, order], episodes["actions"][:, :, order]), values[:, :, order]
    )


def test_an_agent_with_memory_has_it_and_one_without_has_none() -> None:
    episodes = made_up_episodes()
    changed = episodes["obs"].clone()
    changed[:, 0] = 7
    for kind, remembers in (("recurrent", True), ("feed-forward", False)):
        agent = new_agent(kind)
        before, after = (agent.unroll(obs, episodes["actions"])[:, 1:] for obs in (episodes["obs"], changed))
        assert torch.equal(before, after) is not remembers


@pytest.mark.parametrize("parts", [(), ("obs", "obs"), ("obs", "reward")])
def test_impossible_inputs_are_refused(parts: tuple[InputPart, ...]) -> None:
    with pytest.raises(SettingsError, match="choose some of"):
        AgentInputs(N, A, SIZE, parts)


@pytest.mark.parametrize(("hidden_size", "num_input_layers"), [(0, 1), (8, 0)])
def test_impossible_sizes_are_refused(hidden_size: int, num_input_layers: int) -> None:
    with pytest.raises(SettingsError, match="at least 1"):
        RecurrentAgent(AgentInputs(N, A, SIZE), hidden_size=hidden_size, num_input_layers=num_input_layers)


def test_observations_of_another_environment_are_refused() -> None:
    with pytest.raises(BatchError, match=r"\(\.\.\., 3, 5\).*found \(2, 4, 5\)"):
        AgentInputs(N, A, SIZE).join(
            torch.zeros(2, N + 1, SIZE), torch.zeros(2, N + 1, dtype=torch.int64), torch.float32
        )
