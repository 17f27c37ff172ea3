from __future__ import annotations

import numpy as np

from marl.environments.draws import Streams, shuffled
from marl.environments.hunting import ESCAPES, NUM_CHOICES


def test_words_are_evenly_spread_over_lanes_episodes_and_draws() -> None:
    streams = Streams(50, seed=0)
    words = []
    for _ in range(20):
        streams.begin()
        words.append(np.concatenate([streams.draw(7), streams.draw(13)], axis=1))
    drawn = np.array(words)
    assert len(np.unique(drawn)) == drawn.size
    counts = np.bincount((drawn % 12).astype(np.intp).reshape(-1), minlength=12)
    assert counts.sum() == 20_000
    assert ((counts - 20_000 / 12) ** 2 / (20_000 / 12)).sum() < 31.3  # chi-squared with 11 degrees of freedom, 0.1 %


def test_draws_one_by_one_are_those_drawn_together() -> None:
    one, other = Streams(3, seed=5), Streams(3, seed=5)
    one.begin()
    other.begin()
    assert np.array_equal(np.concatenate([one.draw(1), one.draw(2)], axis=1), other.draw(3))


def test_seeds_of_any_size_and_sign_are_taken() -> None:
    first = []
    for seed in (0, 1, -1, 2**63, 2**64 - 1, 2**70 + 5):
        streams = Streams(1, seed)
        streams.begin()
        first.append(int(streams.draw(1)[0, 0]))
    assert first[2] == first[4]  # -1 modulo 2^64
    assert len(set(first)) == 5


def test_every_order_is_as_likely() -> None:
    streams = Streams(6000, seed=3)
    streams.begin()
    orders = shuffled(streams.draw(3))
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5  # chi-squared with 5 degrees of freedom, 0.1 %


def test_prey_chooses_evenly_among_its_free_neighbors() -> None:
    table = ESCAPES.reshape(16, NUM_CHOICES)
    for surroundings, moves in enumerate(table.tolist()):
        free = [move for move in range(4) if not surroundings >> move & 1]
        assert [moves.count(move) for move in free] == [12 // len(free)] * len(free) if free else moves == [4] * 12
