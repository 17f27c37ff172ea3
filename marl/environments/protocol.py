"""What every environment is: B episodes of a team, side by side and in lockstep.

All episodes begin together at `reset` and take one step together at `step`. An episode that has ended stays as it is,
with reward 0, until the next `reset`; its actions are ignored. So a rollout is a plain loop over time, and an episode
is as long as its steps before `terminated` or `truncated` turned true.

Shapes: B episodes, N agents, A actions, O the size of an observation, S the size of the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marl.errors import ActionError, SettingsError


@dataclass(frozen=True)
class Spec:
    """The sizes that networks and replay are built with."""

    num_agents: int
    """N."""
    num_actions: int
    """A, the same for every agent; an agent that has fewer finds the others never available."""
    obs_size: int
    """O."""
    state_size: int
    """S."""
    episode_limit: int
    """The most steps of an episode."""
    obs_dtype: torch.dtype = torch.float32
    """Grids are `torch.uint8`, to be made floats inside the networks only: a quarter of the memory."""
    state_dtype: torch.dtype = torch.float32
    """As `obs_dtype`, for the state."""


@dataclass(frozen=True)
class Observation:
    """What can be seen between two steps. Neither the environment nor its user writes to these tensors."""

    obs: Tensor
    """(B, N, O): what each agent sees."""
    state: Tensor
    """(B, S): what only the learner sees."""
    avail_actions: Tensor
    """(B, N, A), bool: the actions that may be taken next; at least one of each agent.

    In the observation with which an episode ends these are still its own, as a time limit is bootstrapped from them;
    in those after it only one action is left, which does nothing.
    """


@dataclass(frozen=True)
class Outcome:
    """What a step led to."""

    observation: Observation
    """What can be seen after the step."""
    reward: Tensor
    """(B,), float32: the reward of the whole team; 0 for episodes that had ended before."""
    terminated: Tensor
    """(B,), bool: the episode is over, so nothing is bootstrapped; stays true until `reset`."""
    truncated: Tensor
    """(B,), bool: the time limit cut off an episode that would have gone on; stays true until `reset`."""
    won: Tensor | None = None
    """(B,), bool: the team has won, which stays true until `reset`; none where there is nothing to be won."""
    broken: Tensor | None = None
    """(B,), bool: the game broke in this step or before, so that nothing is known of the step in which it did. The
    episode is truncated before that step, with the observation from then. None where games do not break."""


class Environment(Protocol):
    """B episodes in lockstep."""

    spec: Spec
    batch_size: int

    def reset(self, seed: int | None = None) -> Observation:
        """Begins B new episodes; with a seed from there, without one going on with the random numbers in use."""
        ...

    def step(self, actions: Tensor) -> Outcome:
        """Takes actions (B, N), int64, in all episodes; those of ended episodes are ignored.

        Raises `ActionError` for the wrong shape, a type that is no integer, and for actions that are not available.
        """
        ...


class TextEnvironment(Environment, Protocol):
    """An environment whose episodes people can look at; every one that `make_environment` knows."""

    def text(self, episode: int = 0) -> str:
        """What one episode looks like now, as lines of text."""
        ...


@runtime_checkable
class Closeable(Protocol):
    """Something that holds on to processes or files until it is closed."""

    def close(self) -> None:
        """Let go of them; a second time does nothing."""


def close(environment: Environment) -> None:
    """Close an environment, if there is anything to be closed."""
    if isinstance(environment, Closeable):
        environment.close()


def checked_batch_size(batch_size: int) -> int:
    """The batch size, if there is at least one episode in it.

    >>> checked_batch_size(0)
    Traceback (most recent call last):
    marl.errors.SettingsError: 0 parallel episodes were asked for; at least 1 is needed
    """
    if batch_size < 1:
        raise SettingsError(f"{batch_size} parallel episodes were asked for; at least 1 is needed")
    return batch_size


def checked_actions(actions: Tensor, avail_actions: Tensor, ended: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The actions (B, N), if every episode that goes on can take them; those of ended episodes may be anything.

    `avail_actions` is (B, N, A), bool, and `ended` (B,), bool.

    >>> everything, none = torch.ones(1, 2, 3, dtype=torch.bool), np.zeros(1, dtype=bool)
    >>> checked_actions(torch.tensor([[0, 3]]), everything, none)
    Traceback (most recent call last):
    marl.errors.ActionError: agent 1 of episode 0 took action 3; available to it: 0, 1, 2
    """
    if actions.shape != avail_actions.shape[:2] or actions.is_floating_point() or actions.dtype == torch.bool:
        expected = tuple(avail_actions.shape[:2])
        raise ActionError(f"integer actions of shape {expected} are needed; got {actions.dtype} {tuple(actions.shape)}")
    taken: NDArray[np.int64] = actions.long().numpy(force=True)
    allowed = is_available(taken, avail_actions.numpy()) | ended[:, None]
    if not allowed.all():
        episode, agent = np.argwhere(~allowed)[0].tolist()
        options = ", ".join(map(str, avail_actions[episode, agent].nonzero()[:, 0].tolist()))
        found = taken[episode, agent]
        raise ActionError(f"agent {agent} of episode {episode} took action {found}; available to it: {options}")
    return taken


def is_available(taken: NDArray[np.int64], available: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether each of the actions (B, N) is among those available (B, N, A)."""
    num_actions = available.shape[2]
    exists = taken.view(np.uint64) < num_actions  # a negative number becomes a very large one
    entries = np.arange(0, available.size, num_actions).reshape(taken.shape) + taken
    if not exists.all():
        entries = np.where(exists, entries, 0)
    allowed: NDArray[np.bool_] = available.reshape(-1)[entries] & exists
    return allowed


class Clock:
    """Which of B episodes have ended, and how.

    >>> clock = Clock(batch_size=2, episode_limit=2)
    >>> clock.start()
    >>> clock.tick(np.array([True, False]))
    >>> clock.tick(np.array([False, False]))
    >>> clock.terminated.tolist(), clock.truncated.tolist()
    ([True, False], [False, True])
    """

    def __init__(self, batch_size: int, episode_limit: int) -> None:
        self._batch_size, self._episode_limit = batch_size, episode_limit
        self._time: int | None = None

    def start(self) -> None:
        """Begins all episodes."""
        self._time = 0
        self.terminated = np.zeros(self._batch_size, dtype=np.bool_)
        self.truncated = np.zeros(self._batch_size, dtype=np.bool_)

    @property
    def time(self) -> int:
        """Steps since the start."""
        return self._time or 0

    @property
    def ended(self) -> NDArray[np.bool_]:
        """(B,): whether each episode has ended; raises `ActionError` where none was begun."""
        if self._time is None:
            raise ActionError("a step was asked for before the first reset; call reset() first")
        return self.terminated | self.truncated

    def tick(self, is_over: NDArray[np.bool_], is_cut_off: NDArray[np.bool_] | bool = False) -> None:
        """Counts a step, after which these episodes (B,) are over, and those cut off by another limit than the clock's.

        Time stands still where all have ended.
        """
        going = ~self.ended
        self._time = self.time + bool(going.any())
        self.terminated = self.terminated | (is_over & going)
        self.truncated = ~self.terminated & (self.truncated | is_cut_off | (self._time >= self._episode_limit))

    def state_dict(self) -> dict[str, Any]:
        """Time and endings, as numbers and lists; raises `ActionError` where no episode was begun."""
        _ = self.ended
        return {"time": self.time, "terminated": self.terminated.tolist(), "truncated": self.truncated.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self._time = state["time"]
        self.terminated, self.truncated = np.array(state["terminated"]), np.array(state["truncated"])


def outcome(
    observation: Observation, reward: NDArray[np.float32], clock: Clock, *, won: NDArray[np.bool_] | None = None
) -> Outcome:
    """What a step led to, from the reward (B,), who has ended and, where that can be, who has won."""
    return Outcome(
        observation=observation,
        reward=torch.from_numpy(reward),
        terminated=torch.from_numpy(clock.terminated),
        truncated=torch.from_numpy(clock.truncated),
        won=None if won is None else torch.from_numpy(won),
    )
