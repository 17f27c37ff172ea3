"""Streams of tasks that keep changing, without a word of when: each gives a score for each task, 1 at best.

- `labels`: digits with labels drawn anew for each task, several passes; the share learned by heart at the end of it
  (after Lyle et al. 2023).
- `pixels`: digits with their pixels permuted anew for each task, one pass; the share told right before it is learned
  (online, after Goodfellow et al. 2013 and Dohare et al. 2024).
- `regression`: the slowly-changing regression of Dohare et al. 2021: a random network of threshold units, of whose
  inputs one flips for each task; the share of variance that is explained online. They learn one sample a step.
- `pole`: CartPole whose observations and actions are permuted and change sign for each task; the mean return over 500.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import cross_entropy

from neuronsurgery.comparison.control import balance
from neuronsurgery.comparison.learning import Learner
from neuronsurgery.comparison.networks import Shape
from neuronsurgery.demo.digits import stream

__all__ = ["BENCHMARKS", "Benchmark", "Scale"]


@dataclass(frozen=True)
class Scale:
    """How long a benchmark is."""

    num_tasks: int
    num_steps: int
    """Optimizer steps of each task."""
    batch_size: int
    """Samples of each step; on the pole, parallel environments."""


@dataclass(frozen=True)
class Benchmark:
    """A stream of tasks."""

    name: str
    shape: Shape
    """Of the network that learns it."""
    scale: Scale
    scores: Callable[[Learner, Scale, int], Iterator[float]]
    """Lets a learner learn the tasks of a seed, and yields a score after each."""
    measures: str
    """What the score is."""


def labels(learner: Learner, scale: Scale, seed: int) -> Iterator[float]:
    """Digits with random labels."""
    images, _ = _digits(seed)
    images = images[: 8 * scale.batch_size]
    drawn, order = stream(seed, "labels"), stream(seed, "order")
    for _ in range(scale.num_tasks):
        targets = torch.randint(10, (len(images),), generator=drawn)
        for batch in _batches(len(images), scale, order):
            learner.learn(cross_entropy(learner.model(images[batch]), targets[batch]))
        with torch.no_grad():
            yield float((learner.model(images).argmax(dim=1) == targets).double().mean())


def pixels(learner: Learner, scale: Scale, seed: int) -> Iterator[float]:
    """Digits with permuted pixels."""
    images, targets = _digits(seed)
    permutations, order = stream(seed, "pixels"), stream(seed, "order")
    for _ in range(scale.num_tasks):
        permuted = images[:, torch.randperm(images.shape[1], generator=permutations)]
        right = 0.0
        for batch in _batches(len(permuted), scale, order):
            outputs = learner.model(permuted[batch])
            right += float((outputs.detach().argmax(dim=1) == targets[batch]).double().mean())
            learner.learn(cross_entropy(outputs, targets[batch]))
        yield right / scale.num_steps


NUM_BITS, NUM_FLIPPING, NUM_HIDDEN, THRESHOLD = 20, 15, 100, 0.7


def regression(learner: Learner, scale: Scale, seed: int) -> Iterator[float]:
    """A network of threshold units whose inputs drift."""
    generator = stream(seed, "target")
    signs = torch.randint(2, (NUM_BITS + 1, NUM_HIDDEN), generator=generator) * 2.0 - 1.0
    out = torch.randint(2, (NUM_HIDDEN,), generator=generator) * 2.0 - 1.0
    limits = (NUM_BITS + 1) * THRESHOLD - (signs < 0).sum(dim=0)
    inputs = stream(seed, "inputs")

    def sampled(flipping: Tensor, number: int) -> tuple[Tensor, Tensor]:
        bits = torch.randint(2, (number, NUM_BITS - NUM_FLIPPING), generator=inputs).float()
        x = torch.cat([flipping.expand(number, -1), bits, torch.ones(number, 1)], dim=1)
        return x, ((x @ signs > limits).float() @ out)[:, None]

    all_bits = torch.randint(2, (4096, NUM_BITS), generator=inputs).float()
    spread = ((torch.cat([all_bits, torch.ones(4096, 1)], dim=1) @ signs > limits).float() @ out).std()
    flipping = torch.randint(2, (NUM_FLIPPING,), generator=generator).float()
    for _ in range(scale.num_tasks):
        place = int(torch.randint(NUM_FLIPPING, (), generator=generator))
        flipping[place] = 1.0 - flipping[place]
        total = 0.0
        for _ in range(scale.num_steps):
            x, y = sampled(flipping, scale.batch_size)
            loss = ((learner.model(x) - y) / spread).square().mean()
            total += min(float(loss.detach()), 10.0)  # one run away must not outweigh a whole comparison
            learner.learn(loss)
        yield 1.0 - total / scale.num_steps


@cache
def _all_digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.as_tensor(found.data, dtype=torch.float32) / 16.0, torch.as_tensor(found.target, dtype=torch.long)


def _digits(seed: int) -> tuple[Tensor, Tensor]:
    """The digits in the order of a seed: (1797, 64) and (1797,)."""
    images, targets = _all_digits()
    order = torch.randperm(len(images), generator=stream(seed, "images"))
    return images[order], targets[order]


def _batches(number: int, scale: Scale, order: torch.Generator) -> Iterator[Tensor]:
    """So many batches as a task has steps, pass after pass."""
    left = scale.num_steps
    while left:
        for batch in torch.split(torch.randperm(number, generator=order), scale.batch_size)[:left]:
            left -= 1
            yield batch


BENCHMARKS: Mapping[str, Benchmark] = {
    each.name: each
    for each in (
        Benchmark("labels", Shape(64, (64, 64, 64), 10), Scale(24, 240, 64), labels, "accuracy at a task's end"),
        Benchmark("pixels", Shape(64, (64, 64, 64), 10), Scale(40, 112, 16), pixels, "accuracy online"),
        Benchmark("regression", Shape(21, (5,), 1), Scale(60, 250, 8), regression, "share of variance online"),
        Benchmark("pole", Shape(4, (64, 64), 3), Scale(8, 500, 8), balance, "mean return / 500"),
    )
}
"""Every benchmark, at its full scale; a new one is a new row."""
