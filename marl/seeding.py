"""Seeds for each purpose, from the one seed of a run.

Weights, games, exploration, replay and surgery draw from generators of their own, so that two runs that differ in one
of them share the numbers of the others.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

__all__ = ["Purpose", "seed_for"]

Purpose = Literal["weights", "games", "evaluation", "replay", "surgery", "all_tasks"]

PURPOSES: tuple[Purpose, ...] = ("weights", "games", "evaluation", "replay", "surgery", "all_tasks")


def seed_for(seed: int, purpose: Purpose, number: int = 0) -> int:
    """The seed, below 2^31, of the `number`-th use of a run's seed for a purpose.

    >>> seed_for(0, "games", 1) == seed_for(0, "games", 1)
    True
    >>> len({seed_for(seed, purpose, 7) for seed in range(10) for purpose in PURPOSES})
    60
    """
    words = np.random.SeedSequence([seed, PURPOSES.index(purpose), number]).generate_state(1)
    return int(words[0] >> np.uint32(1))
