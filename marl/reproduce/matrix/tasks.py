"""Sequences of one-step games, and the games that are played of them.

Payoffs and games are drawn for each seed from generators of their own, so that what one intervention meets every other
meets as well. What the paper leaves open, which five games follow the first, is answered by permutations of that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marl.environments.payoffs import payoff_array
from marl.errors import SettingsError
from marl.seeding import seed_for

__all__ = ["Draws", "Kind", "TaskSettings", "Tasks", "draw", "make_tasks"]

Kind = Literal["literal", "contextual"]

NUM_ONES = 5
"""Entries of a constant observation and state, as in weighted QMIX."""

NUM_AGENTS, NUM_ACTIONS = 2, 3


@dataclass(frozen=True)
class TaskSettings:
    """What is played, one task after the other."""

    kind: Kind
    """`literal`: permutations of the paper's first game, and at last that one again, behind a constant state.
    `contextual`: what is observed says which of several games it is, and all payoffs are drawn anew for each task."""
    num_tasks: int
    """How many tasks; of `literal` the last is the first again."""
    num_updates: int
    """Updates in each of them."""
    does_reset_optimizer: bool = False
    """Whether the optimizer begins anew at each switch, as part of the sequence."""
    batch_size: int = 32
    """Fresh games that an update learns from."""
    num_contexts: int = 32
    """Games that a contextual task consists of."""
    num_features: int = 16
    """Length of what is observed of a context."""

    def __post_init__(self) -> None:
        if self.kind not in ("literal", "contextual"):
            raise SettingsError(f"there are no sequences {self.kind!r}: choose 'literal' or 'contextual'")
        if self.num_tasks < 2 or self.num_updates < 2:
            found = f"{self.num_tasks} tasks of {self.num_updates} updates"
            raise SettingsError(f"asked for {found}: a sequence has at least 2 of at least 2")

    @property
    def name(self) -> str:
        """Of the kind, for tables."""
        return f"{self.kind}, optimizer reset" if self.does_reset_optimizer else self.kind


@dataclass(frozen=True, eq=False)
class Tasks:
    """What R seeds meet."""

    obs: Tensor
    """What is observed of each context, and the state, (R, C, O)."""
    payoffs: Tensor
    """Of each task and context, (R, T, C, A, A)."""

    def deviation(self, task: int) -> Tensor:
        """The standard deviation of a task's payoffs, (R,): the error of whoever always says their mean."""
        return self.payoffs[:, task].flatten(1).std(dim=1, correction=0)


@dataclass(frozen=True, eq=False)
class Draws:
    """The games of one task, U updates of B games, as far as they do not depend on what was learned."""

    contexts: Tensor
    """Which of the contexts, (R, U, B) int64."""
    actions: Tensor
    """What agents do that explore, (R, U, B, N) int64."""
    luck: Tensor
    """Numbers from 0 to 1: whoever's is below epsilon explores, (R, U, B, N)."""


def make_tasks(settings: TaskSettings, seeds: Sequence[int]) -> Tasks:
    """The tasks of these seeds.

    >>> make_tasks(TaskSettings("literal", num_tasks=3, num_updates=2), seeds=[0, 1]).payoffs.shape
    torch.Size([2, 3, 1, 3, 3])
    """
    make = _literal if settings.kind == "literal" else _contextual
    made = [make(settings, np.random.default_rng(seed_for(seed, "games"))) for seed in seeds]
    obs, payoffs = (torch.from_numpy(np.stack(each).astype(np.float32)) for each in zip(*made, strict=True))
    return Tasks(obs, payoffs)


def draw(settings: TaskSettings, seeds: Sequence[int], task: int) -> Draws:
    """The games of a task; the exploration has a generator of its own."""
    shape, num_contexts = (settings.num_updates, settings.batch_size), 1
    if settings.kind == "contextual":
        num_contexts = settings.num_contexts
    contexts, actions, luck = [], [], []
    for seed in seeds:
        games = np.random.default_rng(seed_for(seed, "games", 1 + task))
        exploring = np.random.default_rng(seed_for(seed, "exploration", 1 + task))
        contexts.append(games.integers(num_contexts, size=shape))
        actions.append(exploring.integers(NUM_ACTIONS, size=(*shape, NUM_AGENTS)))
        luck.append(exploring.random(size=(*shape, NUM_AGENTS), dtype=np.float32))
    return Draws(*(torch.from_numpy(np.stack(each)) for each in (contexts, actions, luck)))


Made = tuple[NDArray[np.float64], NDArray[np.float64]]


def _literal(settings: TaskSettings, generator: np.random.Generator) -> Made:
    """The first game, permutations of it of which each has its best joint action elsewhere, the first again."""
    first = payoff_array("knife")
    payoffs = [first]
    while len(payoffs) < settings.num_tasks - 1:
        rows, columns = generator.permutation(NUM_ACTIONS), generator.permutation(NUM_ACTIONS)
        permuted = first[rows][:, columns]
        if permuted.argmax() != payoffs[-1].argmax():
            payoffs.append(permuted)
    return np.ones((1, NUM_ONES)), np.stack([*payoffs, first])[:, None]


def _contextual(settings: TaskSettings, generator: np.random.Generator) -> Made:
    """Each agent's action adds its own part to the payoff, so that a sum of the agents' values can be right."""
    size = (settings.num_tasks, settings.num_contexts, NUM_ACTIONS)
    obs = generator.standard_normal((settings.num_contexts, settings.num_features))
    first, second = generator.standard_normal(size), generator.standard_normal(size)
    return obs, first[..., :, None] + second[..., None, :]
