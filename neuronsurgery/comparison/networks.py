"""The network of the comparison: a multilayer perceptron, what it stores, and what a step of it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from neuronsurgery import surgery
from neuronsurgery.demo.digits import stream
from neuronsurgery.demo.networks import producer

__all__ = ["Shape", "Size", "size_of"]


@dataclass(frozen=True)
class Shape:
    """Inputs, units of each hidden layer, outputs; hidden layers are ReLU."""

    num_inputs: int
    hidden: tuple[int, ...]
    num_outputs: int

    @property
    def head(self) -> str:
        """The name of the output layer."""
        return str(2 * len(self.hidden))

    def build(self, seed: int) -> nn.Sequential:
        """The network with the weights of a seed.

        >>> [p.numel() for p in Shape(3, (4,), 2).build(seed=0).parameters()]
        [12, 4, 8, 2]
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(seed, "network").initial_seed())
            layers: list[nn.Module] = []
            for num_inputs, num_outputs in pairwise((self.num_inputs, *self.hidden)):
                layers += [nn.Linear(num_inputs, num_outputs), nn.ReLU()]
            return nn.Sequential(*layers, nn.Linear(self.hidden[-1], self.num_outputs))

    @property
    def size(self) -> Size:
        """What it stores and costs as long as nothing is operated on."""
        sizes = list(pairwise((self.num_inputs, *self.hidden, self.num_outputs)))
        return Size(sum((a + 1) * b for a, b in sizes), sum(3 * a * b for a, b in sizes))

    def widened(self, *, weights: float = 0.0, multiplications: float = 0.0) -> Shape:
        """The narrowest network of these proportions that stores, and costs, at least so much.

        >>> Shape(3, (4,), 2).widened(weights=27).hidden
        (5,)
        """
        first = self.hidden[0]
        width = first
        while True:
            wide = Shape(self.num_inputs, tuple(units * width // first for units in self.hidden), self.num_outputs)
            if wide.size.weights >= weights and wide.size.multiplications >= multiplications:
                return wide
            width += 1


@dataclass(frozen=True)
class Size:
    """Stored weights and biases, frozen ones included; multiplications of one training step on one sample.

    A trained weight takes part in three products: forward, gradient of the input, gradient of the weight. A frozen one
    takes part in the first two.
    """

    weights: float
    multiplications: float

    @staticmethod
    def mean(sizes: Sequence[Size]) -> Size:
        """The mean of several."""
        number = len(sizes)
        return Size(sum(s.weights for s in sizes) / number, sum(s.multiplications for s in sizes) / number)


def size_of(model: nn.Module) -> Size:
    """The size of a network as it is now.

    >>> size_of(Shape(3, (4,), 2).build(seed=0)) == Shape(3, (4,), 2).size
    True
    """
    trained = list(model.parameters())
    frozen = [buffer for name, buffer in model.named_buffers() if ".injection." in name]
    rows = [(site.num_frozen, producer(model, name).in_features) for name, site in surgery.discover(model).items()]
    trained_products, frozen_products = (sum(int(t.numel()) for t in each if t.dim() > 1) for each in (trained, frozen))
    stored = sum(int(each.numel()) for each in (*trained, *frozen))
    return Size(
        stored + sum(number * (inputs + 1) for number, inputs in rows),
        3 * trained_products + 2 * frozen_products + 2 * sum(number * inputs for number, inputs in rows),
    )
