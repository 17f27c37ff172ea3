"""One run of one arm: tasks learned one after another, with the arm's intervention once in each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Adam

from neuronsurgery import surgery
from neuronsurgery.demo.arms import ARMS, ArmName, Intervention
from neuronsurgery.demo.digits import Experiment, Task, stream, tasks
from neuronsurgery.demo.networks import build_network, num_frozen_rows, num_stored_weights

__all__ = ["Job", "Network", "OnTask", "Run", "run", "small_network_arithmetic"]

OnTask = Callable[[ArmName], None]
"""Called after each task of a run."""


@dataclass(frozen=True)
class Job:
    """What a run needs to know."""

    experiment: Experiment
    arm: ArmName
    seed: int
    num_units: int
    """Units of each hidden layer."""


@dataclass(frozen=True)
class Network:
    """A network's size at the end of a run."""

    num_units: int
    """Units of each hidden layer."""
    num_frozen: int
    """Frozen rows, over all layers."""
    num_weights: int
    """Stored weights and biases, frozen ones included."""


@dataclass(frozen=True)
class Run:
    """What came out of a run."""

    arm: ArmName
    seed: int
    accuracies: tuple[float, ...]
    """After each task, the share of its images that get its labels."""
    num_operated: int
    """Units replaced or reset, over all tasks."""
    network: Network
    seconds: float
    """Processor time of learning all tasks."""


def run(job: Job, on_task: OnTask = lambda arm: None) -> Run:
    """Learns the tasks one after another under the job's arm; equal jobs give equal numbers.

    >>> job = Job(Experiment(num_tasks=1, num_images=64, num_epochs=2), ArmName.NONE, seed=0, num_units=8)
    >>> run(job).network
    Network(num_units=8, num_frozen=0, num_weights=754)
    """
    with small_network_arithmetic():
        model = build_network(job.num_units, job.seed)
        optimizer = Adam(model.parameters(), lr=job.experiment.learning_rate, fused=True)
        intervene = ARMS[job.arm].prepare(model, optimizer, stream(job.seed, "surgery"))
        accuracies, num_operated = [], 0
        started = time.thread_time()  # not the clock on the wall: it would charge an arm for its neighbors
        for task in tasks(job.experiment, job.seed):
            num_operated += _learn(model, optimizer, task, intervene)
            accuracies.append(_accuracy(model, task))
            on_task(job.arm)
        seconds = time.thread_time() - started
        network = Network(job.num_units, num_frozen_rows(model), num_stored_weights(model))
    return Run(job.arm, job.seed, tuple(accuracies), num_operated, network, seconds)


def _learn(model: nn.Module, optimizer: Adam, task: Task, intervene: Intervention | None) -> int:
    """Trains on one task, intervening after its first epoch; returns how many units were changed."""
    first, *others = task.epochs
    num_operated = 0
    if intervene is None:
        _train(model, optimizer, task, first)
    else:
        with surgery.observe(model, optimizer) as evidence:
            _train(model, optimizer, task, first)
        num_operated = intervene(evidence)
    for batches in others:
        _train(model, optimizer, task, batches)
    return num_operated


def _train(model: nn.Module, optimizer: Adam, task: Task, batches: Iterable[Tensor]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss = cross_entropy(model(task.images[batch]), task.labels[batch])
        torch.autograd.backward(loss)
        optimizer.step()


@torch.no_grad()
def _accuracy(model: nn.Module, task: Task) -> float:
    return float((model(task.images).argmax(dim=1) == task.labels).double().mean())


@contextmanager
def small_network_arithmetic() -> Iterator[None]:
    """Computes in one thread, whatever the machine has, and without denormal numbers.

    For small networks that is fastest: Adam's moments of dead units become denormal numbers, on which a wide
    network spends half its time.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(num_threads)
