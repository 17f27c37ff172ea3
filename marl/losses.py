"""From values to a loss: greedy actions, TD(lambda) targets, means over the steps that happened.

Time is the last axis of joint values (..., B, T), and the one before agents and actions of the agents' values
(..., B, T, N, A). Leading dimensions are seeds, which never mix: a loss has one value for each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["best_values", "greedy_actions", "masked_mean", "td_lambda_targets", "values_of"]


def greedy_actions(agent_qs: Tensor, avail_actions: Tensor) -> Tensor:
    """Each agent's best available action: (..., N, A) and a mask (..., N, A) to int64 (..., N).

    Where nothing is available, as beyond the end of an episode, it is action 0.

    >>> greedy_actions(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[True, False, True]]))
    tensor([2])
    """
    return agent_qs.masked_fill(~avail_actions, -torch.inf).argmax(dim=-1)


def values_of(agent_qs: Tensor, actions: Tensor) -> Tensor:
    """The values of the actions: (..., N, A) and (..., N) to (..., N).

    >>> values_of(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([2]))
    tensor([2.])
    """
    return agent_qs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def best_values(agent_qs: Tensor, avail_actions: Tensor) -> Tensor:
    """Each agent's best value among its available actions: (..., N, A) and a mask (..., N, A) to (..., N).

    Where nothing is available, as beyond the end of an episode, it is that of action 0.

    >>> best_values(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[True, False, True]]))
    tensor([2.])
    """
    best = agent_qs.masked_fill(~avail_actions, -torch.inf).amax(dim=-1)  # several times as fast as an argmax
    return torch.where(best == -torch.inf, agent_qs[..., 0], best)


def td_lambda_targets(
    next_q_tot: Tensor, reward: Tensor, terminated: Tensor, mask: Tensor, *, gamma: float, td_lambda: float
) -> Tensor:
    """What the joint value of each step should have been, (..., B, T).

    `next_q_tot` is the value at the step after each; `mask` says which steps happened. With c_t = 1 unless the
    episode truly ended at t, and the recursion stopped where an episode stops, for whatever reason:

        G_t = r_t + gamma c_t ((1 - lambda) Q_{t+1} + lambda G_{t+1}),  G_{t+1} = Q_{t+1} if step t + 1 never happened

    So a time limit bootstraps from the value behind it and a true end does not. Source: Sutton and Barto 2018, section
    12.3. PyMARL's recursion agrees where all episodes that hit a limit last as long as the batch; of an
    episode cut short of that it drops the bootstrap value, which is kept here.

    >>> one, last = torch.ones(1, 2), torch.tensor([[False, True]])
    >>> td_lambda_targets(8 * one, one, last, one.bool(), gamma=0.5, td_lambda=0.0)
    tensor([[5., 1.]])
    >>> td_lambda_targets(8 * one, one, last, one.bool(), gamma=0.5, td_lambda=1.0)
    tensor([[1.5000, 1.0000]])
    """
    discount = gamma * (~terminated).to(next_q_tot.dtype)
    goes_on = torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], dim=-1)
    share = td_lambda * goes_on.to(next_q_tot.dtype)  # of what follows: the rest of it is the value
    bootstrapped = reward + discount * (1 - share) * next_q_tot
    if td_lambda == 0:
        return bootstrapped
    following = torch.zeros_like(bootstrapped[..., 0])
    targets = []
    for step, factor in zip(reversed(bootstrapped.unbind(-1)), reversed((discount * share).unbind(-1)), strict=True):
        following = torch.addcmul(step, factor, following)
        targets.append(following)
    return torch.stack(targets[::-1], dim=-1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over the steps that happened: (..., B, T) to (...).

    >>> masked_mean(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor(1.5000)
    """
    weight = mask.to(values.dtype)
    return (values * weight).sum(dim=(-2, -1)) / weight.sum(dim=(-2, -1))
