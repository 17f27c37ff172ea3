"""Games of one step, given by what each joint action earns, and QMIX's game of two steps.

What the agents and the mixer are shown of such a game is a convention that differs between publications, and matters:
a mixer's hypernetwork has nothing to work with but the biases where the state is all zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marl.environments.draws import Streams
from marl.environments.payoffs import PayoffLike, stacked_payoffs
from marl.environments.protocol import Clock, Observation, Outcome, Spec, checked_actions, checked_batch_size, outcome
from marl.errors import SettingsError, suggestion

Features = Literal["ones", "zeros", "step", "one_hot_step", "context"]
"""What is shown: 5 ones (weighted QMIX), a zero per agent (the state of QPLEX), the number of the step (the
observation of QPLEX), the same as one-hot of 2 (PyMARL2), or the context as one-hot of C."""

NUM_ONES = 5
Numbers = NDArray[np.intp]
Bools = NDArray[np.bool_]


class MatrixGame:
    """B games of one step, each of which is one of C contexts, drawn evenly at its start.

    `payoffs` are C payoffs of one shape (A_1, ..., A_N), by name or as numbers; agent i's actions from A_i on are never
    available. `obs` and `state` say what is shown. Afterwards action 0 alone is available, and does nothing.
    Raises `SettingsError` for payoffs that differ in shape and for unknown features.

    >>> game = MatrixGame(["qtran"], batch_size=2)
    >>> tuple(game.reset().state.shape)
    (2, 5)
    >>> game.step(torch.tensor([[0, 0], [0, 1]])).reward
    tensor([  8., -12.])
    """

    def __init__(
        self,
        payoffs: Sequence[PayoffLike],
        batch_size: int,
        *,
        obs: Features = "ones",
        state: Features = "ones",
        seed: int = 0,
    ) -> None:
        self.payoffs = stacked_payoffs(payoffs)
        self.batch_size = checked_batch_size(batch_size)
        self._shown = (checked_features(obs), checked_features(state))
        obs_size, state_size = (self._features(kind, 0, np.zeros(1, np.intp)).shape[1] for kind in self._shown)
        self.spec = Spec(
            num_agents=self.payoffs.ndim - 1,
            num_actions=max(self.payoffs.shape[1:]),
            obs_size=obs_size,
            state_size=state_size,
            episode_limit=1,
        )
        self._streams = Streams(batch_size, seed)
        self._clock = Clock(batch_size, self.spec.episode_limit)

    @property
    def max_return(self) -> float:
        """What the best joint action earns, on average over the contexts.

        >>> MatrixGame(["two_step_a", "two_step_b"], batch_size=1).max_return
        7.5
        """
        return float(self.payoffs.reshape(len(self.payoffs), -1).max(axis=1).mean())

    def reset(self, seed: int | None = None) -> Observation:
        """Begins B new episodes; with a seed from there, without one going on with the random numbers in use."""
        self._streams.begin(seed)
        self._contexts = (self._streams.draw(1)[:, 0] % len(self.payoffs)).astype(np.intp)
        self._clock.start()
        return self._observe()

    def step(self, actions: Tensor) -> Outcome:
        """Takes actions (B, N), int64; raises `ActionError` for others. After the first step nothing happens."""
        ended = self._clock.ended
        taken = checked_actions(actions, self._avail_actions, ended)
        reward = np.zeros(self.batch_size, dtype=np.float32)
        if not ended.any():  # all end with their first step
            reward = self.payoffs[(self._contexts, *taken.T)]
        self._clock.tick(np.ones(self.batch_size, dtype=np.bool_))
        return outcome(self._observe(), reward, self._clock)

    def text(self, episode: int = 0) -> str:
        """The payoff that one episode is about, for people."""
        return str(self.payoffs[self._contexts[episode]])

    def _observe(self) -> Observation:
        obs, state = (self._features(kind, self._clock.time, self._contexts) for kind in self._shown)
        self._avail_actions = available_actions(self.payoffs.shape[1:], self._clock.ended)
        return shown_to_all(obs, state, self._avail_actions)

    def _features(self, kind: Features, time: int, contexts: Numbers) -> NDArray[np.float32]:
        """What is shown (B, F) in these contexts (B,)."""
        match kind:
            case "ones":
                row = np.ones(NUM_ONES)
            case "zeros":
                row = np.zeros(self.payoffs.ndim - 1)
            case "step":
                row = np.array([time])
            case "one_hot_step":
                row = np.eye(2)[time]
            case "context":
                return np.eye(len(self.payoffs), dtype=np.float32)[contexts]
        return np.tile(row.astype(np.float32), (len(contexts), 1))


class TwoStepGame:
    """B games of two steps: the first agent's first action chooses which of its payoffs the second step is about.

    The first step earns nothing. All see the same, a one-hot of which state they are in, out of 1 + C; after the end
    zeros. Source: Rashid et al. 2018, section 5, where action 0 leads to state 2A and action 1 to state 2B.

    >>> game = TwoStepGame(["two_step_a", "two_step_b"], batch_size=2)
    >>> game.reset().state.tolist()
    [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    >>> game.step(torch.tensor([[0, 1], [1, 0]])).observation.state.tolist()
    [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    >>> game.step(torch.tensor([[1, 1], [1, 1]])).reward
    tensor([7., 8.])
    """

    def __init__(self, payoffs: Sequence[PayoffLike], batch_size: int, *, seed: int = 0) -> None:
        self.payoffs = stacked_payoffs(payoffs)
        self.batch_size = checked_batch_size(batch_size)
        num_states = 1 + len(self.payoffs)
        if len(self.payoffs) != self.payoffs.shape[1]:
            found = f"{self.payoffs.shape[1]} actions for {len(self.payoffs)} payoffs"
            raise SettingsError(f"the first agent's actions choose a payoff; found {found}, give as many of each")
        self.spec = Spec(
            num_agents=self.payoffs.ndim - 1,
            num_actions=max(self.payoffs.shape[1:]),
            obs_size=num_states,
            state_size=num_states,
            episode_limit=2,
        )
        self.max_return = float(self.payoffs.max())
        self._clock = Clock(batch_size, self.spec.episode_limit)

    def reset(self, seed: int | None = None) -> Observation:
        """Begins B new episodes, in which nothing is left to chance."""
        self._states = np.zeros(self.batch_size, dtype=np.intp)
        self._clock.start()
        return self._observe()

    def step(self, actions: Tensor) -> Outcome:
        """Takes actions (B, N), int64; raises `ActionError` for others. After the second step nothing happens."""
        ended = self._clock.ended
        taken = checked_actions(actions, self._avail_actions, ended)
        reward = np.zeros(self.batch_size, dtype=np.float32)
        match self._clock.time:
            case 0:
                self._states = 1 + taken[:, 0]
            case 1:
                reward = self.payoffs[(self._states - 1, *taken.T)]
        self._clock.tick(np.full(self.batch_size, self._clock.time == 1))
        return outcome(self._observe(), reward, self._clock)

    def text(self, episode: int = 0) -> str:
        """The state that one episode is in, for people."""
        state = self._states[episode]
        return str(self.payoffs[state - 1]) if state else f"choosing among {len(self.payoffs)} payoffs"

    def _observe(self) -> Observation:
        ended = self._clock.ended
        seen = np.eye(self.spec.state_size, dtype=np.float32)[self._states] * ~ended[:, None]
        self._avail_actions = available_actions(self.payoffs.shape[1:], ended)
        return shown_to_all(seen, seen, self._avail_actions)


def checked_features(kind: Features) -> Features:
    """The features, if there are such."""
    if kind not in get_args(Features):
        raise SettingsError(f"there are no features {kind!r} to show; {suggestion(str(kind), get_args(Features))}")
    return kind


def available_actions(shape: Sequence[int], ended: Bools) -> Tensor:
    """Which actions agents with these numbers of actions have, (B, N, A), bool; after the end only action 0."""
    actions = np.arange(max(shape))
    available = np.tile(actions < np.array(shape)[:, None], (len(ended), 1, 1))
    available[ended] = actions == 0
    return torch.from_numpy(available)


def shown_to_all(obs: NDArray[np.float32], state: NDArray[np.float32], avail_actions: Tensor) -> Observation:
    """The observation of agents that all see the same, obs (B, O)."""
    per_agent = np.repeat(obs[:, None], avail_actions.shape[1], axis=1)
    return Observation(torch.from_numpy(per_agent), torch.from_numpy(state), avail_actions)
