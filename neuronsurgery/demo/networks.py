"""The demonstration's network, and how its size is counted."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import nn

from neuronsurgery import surgery
from neuronsurgery.demo.digits import NUM_CLASSES, NUM_INPUTS, stream

__all__ = ["build_network", "num_frozen_rows", "num_stored_weights", "producer", "width_of_size"]

NUM_LAYERS = 3


def build_network(num_units: int, seed: int) -> nn.Sequential:
    """Builds three hidden ReLU layers of `num_units` each; equal seeds and widths give equal weights.

    >>> [len(layer.weight) for layer in build_network(5, seed=0) if isinstance(layer, nn.Linear)]
    [5, 5, 5, 10]
    """
    sizes = [NUM_INPUTS] + [num_units] * NUM_LAYERS
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream(seed, "network").initial_seed())
        layers: list[nn.Module] = []
        for num_inputs, num_outputs in pairwise(sizes):
            layers += [nn.Linear(num_inputs, num_outputs), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(num_units, NUM_CLASSES))


def producer(model: nn.Module, site: str) -> nn.Linear:
    """Returns the layer that computes the units of a site."""
    layer = model.get_submodule(site)
    assert isinstance(layer, nn.Linear), "build_network makes linear producers only"
    return layer


def num_frozen_rows(model: nn.Module) -> int:
    """Counts the frozen rows of the network, over all its sites."""
    return sum(site.num_frozen for site in surgery.discover(model).values())


def num_stored_weights(model: nn.Module) -> int:
    """Counts the network's weights and biases, the trained ones and those of the frozen rows.

    >>> num_stored_weights(build_network(2, seed=0))  # 64 * 2 + 2, twice 2 * 2 + 2, 2 * 10 + 10
    172
    """
    trained = sum(parameter.numel() for parameter in model.parameters())
    sites = surgery.discover(model).values()
    return trained + sum(site.num_frozen * (producer(model, site.name).in_features + 1) for site in sites)


def width_of_size(num_weights: int) -> int:
    """Returns the smallest width at which a plain network stores at least `num_weights` weights and biases.

    >>> width_of_size(172), width_of_size(173)
    (2, 3)
    """
    # Of width w it stores square * w**2 + linear * w + NUM_CLASSES.
    square = NUM_LAYERS - 1
    linear = NUM_INPUTS + NUM_LAYERS + NUM_CLASSES
    root = math.sqrt(linear**2 + 4 * square * max(0, num_weights - NUM_CLASSES))
    return max(1, math.ceil((root - linear) / (2 * square)))
