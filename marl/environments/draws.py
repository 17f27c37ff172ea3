"""Random numbers for parallel episodes, such that an episode is the same whatever runs beside it.

A generator shared by a batch deals its numbers out in turn, so that the third episode changes with the number of
episodes. Here every episode has a stream of its own: number i of a stream is a hash of its key plus i times a
constant, which is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), and which
a few operations on whole arrays compute for all episodes at once.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

STRIDE = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio, made odd
MASK = 2**64 - 1


class Streams:
    """One stream of 64-bit random words per episode: a function of the seed, the place in the batch, and how many
    episodes were begun there since the seed was given.

    >>> few, many = Streams(2, seed=7), Streams(64, seed=7)
    >>> few.begin(), many.begin()
    (None, None)
    >>> bool((few.draw(5) == many.draw(5)[:2]).all())
    True
    """

    def __init__(self, batch_size: int, seed: int) -> None:
        self.batch_size = batch_size
        self._lanes = lane_keys(batch_size, seed)

    def begin(self, seed: int | None = None) -> None:
        """Begins the next episodes; with a seed its first ones, as after construction with that seed."""
        if seed is not None:
            self._lanes = lane_keys(self.batch_size, seed)
        self._lanes = self._lanes + np.uint64(STRIDE)
        self._position = scramble(self._lanes)

    def draw(self, count: int) -> Words:
        """The next words of every stream, (B, count)."""
        words = scramble(self._position[:, None] + multiples(count))
        self._position = self._position + np.uint64(count * STRIDE & MASK)
        return words


@cache
def multiples(count: int) -> Words:
    """The first multiples of the constant, modulo 2^64."""
    return np.arange(1, count + 1, dtype=np.uint64) * np.uint64(STRIDE)


def lane_keys(batch_size: int, seed: int) -> Words:
    """What the streams of a seed, taken modulo 2^64, begin from: one word for each place in the batch."""
    root = scramble(np.array([seed & MASK], dtype=np.uint64))
    return scramble(root + multiples(batch_size))


def scramble(words: Words) -> Words:
    """The output function of SplitMix64, elementwise.

    >>> [hex(word) for word in scramble(np.array([STRIDE], dtype=np.uint64)).tolist()]
    ['0xe220a8397b1dcdaf']
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def shuffled(words: Words) -> NDArray[np.intp]:
    """A random order of the entries along the last axis of the words: the order of their values.

    >>> shuffled(np.array([[30, 10, 20]], dtype=np.uint64)).tolist()
    [[1, 2, 0]]
    """
    return words.argsort(axis=-1)
