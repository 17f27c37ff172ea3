"""The data and the tasks: scikit-learn's digits (real 8x8 images), with labels drawn anew for every task.

Random labels are the hardest version of a changing task: there is nothing to generalize to, so the accuracy
is measured on the task's own images and says how much of the task the network could still learn. The effect
is known from Lyle et al. 2023 ("Understanding plasticity in neural networks") and Sokar et al. 2023.

Everything random is drawn from a stream of its own (`stream`), so the arms of one seed share images, labels,
order of the batches and initial weights, and differ in the intervention alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor

__all__ = ["NUM_CLASSES", "NUM_INPUTS", "QUICK", "Experiment", "Task", "stream", "tasks"]

NUM_INPUTS = 64
NUM_CLASSES = 10
NUM_AVAILABLE = 1797
_BRIGHTEST = 16.0


@dataclass(frozen=True)
class Experiment:
    """What all runs of a demonstration share; raises ValueError for a size that cannot be run.

    num_tasks: tasks learned one after another. num_images: images of each task, the same in every task of a
    run. num_epochs: passes over each task. batch_size: images per optimizer step. learning_rate: Adam's.
    num_units: units of each of the three hidden layers.

    >>> Experiment(num_tasks=2, num_images=64).num_epochs
    30
    """

    num_tasks: int = 40
    num_images: int = 512
    num_epochs: int = 30
    batch_size: int = 64
    learning_rate: float = 3e-3
    num_units: int = 64

    def __post_init__(self) -> None:
        for name in ("num_tasks", "num_images", "num_epochs", "batch_size", "num_units"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} was asked for; give at least 1")
        if self.num_images > NUM_AVAILABLE:
            raise ValueError(f"num_images={self.num_images} was asked for; the data set has {NUM_AVAILABLE}")


QUICK = Experiment(num_tasks=4, num_images=128, num_epochs=5)
"""Small enough for a look at whether everything runs; too small to say anything about arms."""


@dataclass(frozen=True)
class Task:
    """One task: images with labels, and the batches of each epoch."""

    images: Tensor
    """(num_images, 64), float32 in [0, 1]."""
    labels: Tensor
    """(num_images,), int64 in [0, 10)."""
    epochs: tuple[tuple[Tensor, ...], ...]
    """For each epoch its batches, each the indices of its images."""


def tasks(experiment: Experiment, seed: int) -> Iterator[Task]:
    """Yields the experiment's tasks; the same seed gives the same tasks, whatever happens between them.

    >>> first, second = tasks(Experiment(num_tasks=2, num_images=64, num_epochs=1), seed=0)
    >>> torch.equal(first.images, second.images), torch.equal(first.labels, second.labels)
    (True, False)
    """
    images = _images(experiment.num_images, stream(seed, "images"))
    labels, order = stream(seed, "labels"), stream(seed, "order")
    for _ in range(experiment.num_tasks):
        yield Task(
            images=images,
            labels=torch.randint(NUM_CLASSES, (experiment.num_images,), generator=labels),
            epochs=tuple(_batches(experiment, order) for _ in range(experiment.num_epochs)),
        )


def _batches(experiment: Experiment, generator: torch.Generator) -> tuple[Tensor, ...]:
    order = torch.randperm(experiment.num_images, generator=generator)
    return torch.split(order, experiment.batch_size)


def stream(seed: int, name: str) -> torch.Generator:
    """Returns a generator that depends on the seed and the name only, so that no use of one disturbs another.

    >>> torch.rand(1, generator=stream(0, "labels")) == torch.rand(1, generator=stream(0, "labels"))
    tensor([True])
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _images(num_images: int, generator: torch.Generator) -> Tensor:
    """Draws images without replacement, (num_images, 64) float32 in [0, 1]."""
    pixels = torch.as_tensor(load_digits().data, dtype=torch.float32) / _BRIGHTEST
    return pixels[torch.randperm(len(pixels), generator=generator)[:num_images]]
