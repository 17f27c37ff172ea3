"""Rollouts: B episodes played side by side, as what the replay remembers."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from marl.agents import NO_ACTION, Agent
from marl.environments.protocol import Environment, Observation
from marl.losses import greedy_actions

__all__ = ["choose_actions", "collect", "whole"]


@torch.no_grad()
def collect(environment: Environment, agent: Agent, *, epsilon: float, seed: int) -> TensorDict:
    """B episodes from start to end, laid out as in `marl.replay` and padded to the longest that there can be.

    `epsilon` is the share of random actions. Where episodes can be won, or games can break, there are the entries "won"
    and "broken" (B,), bool; they are about whole episodes, and none of the replay's. What happens depends on the agents
    and the seed only, so that a run which was stopped between two rollouts goes on as if it had not been.

    >>> from marl.agents import AgentInputs, FeedForwardAgent
    >>> from marl.environments import make_environment
    >>> environment = make_environment("predator_prey_tiny", batch_size=3)
    >>> agent = FeedForwardAgent(AgentInputs(num_agents=4, num_actions=6, obs_size=75))
    >>> collect(environment, agent, epsilon=1.0, seed=0)["obs"].shape
    torch.Size([3, 61, 4, 75])
    """
    generator = torch.Generator().manual_seed(seed)
    observation = environment.reset(seed)
    episodes = _empty_episodes(environment)
    hidden = agent.initial_hidden(observation.obs)
    actions = torch.full(observation.avail_actions.shape[:-1], NO_ACTION)
    going = torch.ones(environment.batch_size, dtype=torch.bool)
    for step in range(environment.spec.episode_limit):
        _write(observation, episodes, step)
        agent_qs, hidden = agent(observation.obs, actions, hidden)
        actions = choose_actions(agent_qs, observation.avail_actions, epsilon=epsilon, generator=generator)
        outcome = environment.step(actions)
        mask = going if outcome.broken is None else going & ~outcome.broken
        happened = {"actions": actions, "reward": outcome.reward, "terminated": outcome.terminated & going}
        for key, value in {**happened, "mask": mask}.items():
            episodes[key][:, step] = value
        observation, going = outcome.observation, ~(outcome.terminated | outcome.truncated)
        if not going.any():
            break
    _write(observation, episodes, step + 1)
    of_episodes = {"won": outcome.won, "broken": outcome.broken}
    return episodes.update({name: value for name, value in of_episodes.items() if value is not None})


def whole(episodes: TensorDict) -> TensorDict:
    """Those of some episodes whose games did not break: the ones whose returns mean something. All, if all did.

    >>> broken = TensorDict({"mask": torch.ones(2, 1), "broken": torch.tensor([True, False])}, [2])
    >>> len(whole(broken)), len(whole(broken[:1]))
    (1, 1)
    """
    if "broken" not in episodes or episodes["broken"].all():
        return episodes
    return episodes[~episodes["broken"]]


def choose_actions(
    agent_qs: Tensor, avail_actions: Tensor, *, epsilon: float, generator: torch.Generator | None = None
) -> Tensor:
    """Each agent's best available action, or with probability `epsilon` any: (..., N, A) twice to int64 (..., N).

    >>> choose_actions(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[True, False, True]]), epsilon=0.0)
    tensor([2])
    """
    best = greedy_actions(agent_qs, avail_actions)
    if epsilon == 0:
        return best
    any_of_them = torch.rand(avail_actions.shape, generator=generator).masked_fill(~avail_actions, -1.0).argmax(-1)
    return torch.where(torch.rand(best.shape, generator=generator) < epsilon, any_of_them, best)


def _empty_episodes(environment: Environment) -> TensorDict:
    spec, batch_size, num_steps = environment.spec, environment.batch_size, environment.spec.episode_limit
    steps, longer = (batch_size, num_steps), (batch_size, num_steps + 1)
    entries = {
        "obs": torch.zeros(*longer, spec.num_agents, spec.obs_size, dtype=spec.obs_dtype),
        "state": torch.zeros(*longer, spec.state_size, dtype=spec.state_dtype),
        "avail_actions": torch.zeros(*longer, spec.num_agents, spec.num_actions, dtype=torch.bool),
        "actions": torch.zeros(*steps, spec.num_agents, dtype=torch.int64),
        "reward": torch.zeros(*steps),
        "terminated": torch.zeros(*steps, dtype=torch.bool),
        "mask": torch.zeros(*steps, dtype=torch.bool),
    }
    return TensorDict(entries, batch_size=[batch_size])


def _write(observation: Observation, episodes: TensorDict, step: int) -> None:
    episodes["obs"][:, step] = observation.obs
    episodes["state"][:, step] = observation.state
    episodes["avail_actions"][:, step] = observation.avail_actions
