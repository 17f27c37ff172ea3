"""Episodes as they are played and remembered."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from marl.agents import Agent, AgentInputs, FeedForwardAgent, RecurrentAgent
from marl.environments import Environment, make_environment
from marl.losses import greedy_actions
from marl.replay import check_layout
from marl.rollout import choose_actions, collect

GAME = {"height": 3, "width": 3, "num_agents": 3, "num_stags": 1, "episode_limit": 15}


def new_game(batch_size: int = 16) -> Environment:
    return make_environment("predator_prey", batch_size, **GAME)


def new_agent(kind: type = RecurrentAgent) -> Agent:
    torch.manual_seed(0)
    agent: Agent = kind(AgentInputs(num_agents=3, num_actions=6, obs_size=75), hidden_size=8)
    return agent


def played(epsilon: float, *, seed: int = 0, kind: type = RecurrentAgent) -> TensorDict:
    return collect(new_game(), new_agent(kind), epsilon=epsilon, seed=seed)


def test_episodes_have_the_layout_of_the_replay_and_both_kinds_of_ends() -> None:
    episodes = played(1.0)
    check_layout(episodes)
    lengths = episodes["mask"].sum(dim=1)
    ended_early = lengths < GAME["episode_limit"]
    assert 0 < ended_early.sum() < len(episodes)
    last = lengths - 1
    rows = torch.arange(len(episodes))
    assert episodes["terminated"][rows, last][ended_early].all()
    assert (episodes["terminated"].sum(dim=1) <= 1).all()
    cut_off = ~episodes["terminated"].any(dim=1)
    assert (lengths[cut_off] == GAME["episode_limit"]).all() and cut_off.any()
    assert not (episodes["reward"] * ~episodes["mask"]).any()


def test_playing_the_actions_again_gives_the_same_rewards_and_sights() -> None:
    episodes, game = played(1.0, seed=5), new_game()
    observation = game.reset(5)
    for step in range(GAME["episode_limit"]):
        going = episodes["mask"][:, step]
        assert torch.equal(observation.obs[going], episodes["obs"][going, step])
        assert torch.equal(observation.state[going], episodes["state"][going, step])
        assert torch.equal(observation.avail_actions[going], episodes["avail_actions"][going, step])
        outcome = game.step(episodes["actions"][:, step])
        assert torch.equal(outcome.reward, episodes["reward"][:, step])
        observation = outcome.observation
        if not episodes["mask"][:, step + 1 :].any():
            break


@pytest.mark.parametrize("kind", [RecurrentAgent, FeedForwardAgent])
def test_agents_act_on_the_values_that_they_learn_with(kind: type) -> None:
    episodes, agent = played(0.0, kind=kind), new_agent(kind)
    with torch.no_grad():
        agent_qs = agent.unroll(episodes["obs"], episodes["actions"])
    expected = greedy_actions(agent_qs, episodes["avail_actions"])[:, :-1]
    happened = episodes["mask"]
    assert torch.equal(expected[happened], episodes["actions"][happened])


def test_the_share_of_random_actions_is_epsilon_and_none_of_them_is_unavailable() -> None:
    agent_qs = torch.zeros(20_000, 1, 4)
    agent_qs[..., 0] = 1.0
    avail_actions = torch.tensor([True, True, False, True]).expand(20_000, 1, 4)
    generator = torch.Generator().manual_seed(0)
    actions = choose_actions(agent_qs, avail_actions, epsilon=0.3, generator=generator)
    counts = torch.bincount(actions.flatten(), minlength=4) / len(actions)
    assert counts[2] == 0
    assert torch.allclose(counts[[1, 3]], torch.tensor(0.1), atol=0.01)


def test_a_seed_gives_the_same_episodes_and_another_others() -> None:
    one, again, other = played(0.5, seed=1), played(0.5, seed=1), played(0.5, seed=2)
    assert all(torch.equal(one[key], again[key]) for key in one.keys())  # noqa: SIM118 - a TensorDict iterates over its rows
    assert not torch.equal(one["obs"], other["obs"])
