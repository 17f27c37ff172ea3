"""Schedules of a model in DistributedDataParallel: all processes do the same, on what all of them measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from neuronsurgery import surgery
from neuronsurgery.surgery import Every, Lowest, Plateau
from tests.processes import NEEDS_FORK, in_processes
from tests.snapshots import bits

WORLD = 2
ACTIVATION = surgery.Quantity.ACTIVATION


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 2))


def batch(step: int, rank: int) -> Tensor:
    """Another one for each process, of which the second sees larger inputs."""
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * step + rank)) * (1 + 9 * rank)


def take(model: nn.Module, optimizer: Any, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss: Tensor = (model(x) - 1).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def summary(model: nn.Module, schedule: surgery.Schedule) -> dict[str, Any]:
    last = schedule.last
    assert isinstance(last, surgery.Report)
    return {
        "weights": {name: str(bits(value)) for name, value in model.state_dict().items() if isinstance(value, Tensor)},
        "operated": {name: list(units) for name, units in last.operated.items()},
        "num_operations": schedule.num_operations,
    }


def criterion_of_activations(rank: int) -> dict[str, Any]:
    model = network()
    torch.manual_seed(100 + rank)  # as is usual, so that dropout differs
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = surgery.Schedule(replica, optimizer, Lowest(0.25, of="dormant"), operate=Every(3))
    for step in range(5):
        take(replica, optimizer, batch(step, rank))
        schedule.step()
    return summary(model, schedule)


def weighted_samples(rank: int) -> dict[str, Any]:
    model = network()
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    weights = torch.linspace(0, 0.9, 8) * rank  # the first process sees nothing but padding
    criterion = Lowest(0.25, of="dormant")
    with surgery.Schedule(replica, optimizer, criterion, operate=Every(9), weights=lambda site, h: weights) as schedule:
        take(replica, optimizer, batch(0, rank))
        pooled = schedule._watch.pooled()
        return {"0": pooled.measured("0")[ACTIVATION], "samples": pooled.num_samples("0", ACTIVATION)}


def plateau_of_own_losses(rank: int) -> dict[str, Any]:
    model = network()
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = surgery.Schedule(replica, optimizer, surgery.Random(0.25), operate=Plateau(2))
    for step in range(6):
        take(replica, optimizer, batch(step, rank))
        schedule.step(step if rank else -3 * step)  # rising here, falling there: falling on average
    assert schedule.num_operations == 0
    for step in range(3):
        take(replica, optimizer, batch(step, rank))
        schedule.step(rank)  # 0.5 on average, on all of them above the best
    return summary(model, schedule)


@NEEDS_FORK
@pytest.mark.situation("Replicas", "DDP, schedule on weighted activations", "works")
def test_samples_of_all_processes_keep_their_weights(tmp_path: Path):
    results = in_processes(weighted_samples, tmp_path)
    h, weights = network()[:2](batch(0, 1)).detach().abs(), torch.linspace(0, 0.9, 8)
    for result in results:
        torch.testing.assert_close(result["0"].float(), (weights @ h) / weights.sum(), rtol=1e-5, atol=1e-6)
        assert result["samples"] == pytest.approx(3.6)


@NEEDS_FORK
@pytest.mark.situation("Replicas", "DDP, schedule on activations", "works")
def test_all_processes_operate_on_the_units_of_lowest_score_over_all_their_batches(tmp_path: Path):
    results = in_processes(criterion_of_activations, tmp_path)
    assert results[0] == results[1]
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with surgery.observe(model, optimizer) as evidence:
        for step in range(3):  # one process with both halves of the batch takes the same steps
            take(model, optimizer, torch.cat([batch(step, rank) for rank in range(WORLD)]))
    scores = surgery.score(surgery.discover(model), evidence, Lowest(0.25, of="dormant"))
    expected = surgery.select(scores).units
    assert results[0]["operated"] == {name: list(units) for name, units in expected.items()}


@NEEDS_FORK
@pytest.mark.situation("Replicas", "DDP, schedule on a plateau", "works")
def test_all_processes_see_a_plateau_at_the_same_step(tmp_path: Path):
    results = in_processes(plateau_of_own_losses, tmp_path)
    assert results[0] == results[1]
    assert results[0]["num_operations"] == 1
