"""What tests let the processes of a group do: models and batches of replicas, and what of them has to be the same.

Processes have seeds and batches of their own, and not as many samples, as processes that train do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from neuronsurgery import surgery
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.digests import weights_of
from neuronsurgery.surgery import Lowest

__all__ = ["Sent", "batch", "counting", "network", "operated_run", "pair", "refusal", "same_everywhere", "take"]

LOWEST = Lowest(0.25, of="dormant")


def network(width: int = 16, depth: int = 1, seed: int = 0) -> nn.Sequential:
    """Linear and ReLU layers in line; `depth` of them of `width` units with as many inputs, between two small ones."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 2))


def batch(step: int, rank: int) -> Tensor:
    """Another one for each process, of another size and scale."""
    return torch.randn(6 + 2 * rank, 4, generator=torch.Generator().manual_seed(10 * step + rank)) * (1 + 3 * rank)


def take(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    optimizer.zero_grad()
    (model(x) - 1).square().mean().backward()
    optimizer.step()


def pair(rank: int, model: nn.Module | None = None, **options: Any) -> tuple[Any, torch.optim.Optimizer]:
    """A replica and its optimizer; from here on each process draws by a seed of its own."""
    model = model or network()
    torch.manual_seed(100 + rank)
    return DistributedDataParallel(model, **options), torch.optim.Adam(model.parameters(), lr=0.01)


def operated_run(rank: int, seed: int, num_steps: int, *, wrapped_first: bool) -> dict[str, Any]:
    """Train, operate on what all measured, train on, operate again by a schedule, train on: what all must share."""
    model = network(seed=seed)
    torch.manual_seed(1000 * seed + rank)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    replica: Any = DistributedDataParallel(model) if wrapped_first else surgery.replicated(model)
    with surgery.observe(replica, optimizer) as evidence:
        for step in range(1 + rank):  # not as many passes either: without a wrapper nothing counts them
            x = batch(1000 * seed + step, rank)
            if wrapped_first:
                take(replica, optimizer, x)
                break
            (replica(x) - 1).square().mean().backward()
    model.zero_grad()
    report = surgery.knife(replica, LOWEST, evidence=evidence, optimizer=optimizer, cooldown=0)
    fresh = {
        name: model.get_submodule(name).get_parameter("weight").detach()[list(units)]
        for name, units in report.operated.items()
    }
    replica = replica if wrapped_first else DistributedDataParallel(model)
    with surgery.Schedule(replica, optimizer, LOWEST, operate=surgery.Every(5), cooldown=0) as schedule:
        for step in range(num_steps):
            take(replica, optimizer, batch(1000 * seed + step + 50, rank))
            schedule.step() if schedule.num_operations < 2 else None
        num_operations = schedule.num_operations
    return {
        "operated": {name: list(units) for name, units in report.operated.items()},
        "fresh": fresh,
        "weights": weights_of(model),
        "num_operations": num_operations,
        "problems": [str(each) for each in surgery.check(replica, optimizer).problems],
    }


def same_everywhere(results: list[Any]) -> bool:
    """Whether all processes returned the same, tensors bit for bit."""
    return all(_plain(each) == _plain(results[0]) for each in results)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, Tensor) else value


def refusal(call: Callable[[], object]) -> str:
    """The error that a call raises, as text; "" where it raises none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# -- what is sent ----------------------------------------------------------------------------------------------------


class Sent:
    """How many collectives were called, and how many bytes each process put in."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self.calls)


@contextmanager
def counting() -> Iterator[Sent]:
    """Count the collectives that Python code calls in this block; those of a reducer or of DDP's buffers are not."""
    sent = Sent()

    def counted(name: str) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[1] if name == "all_gather" else args[0]
            sent.calls.append((name, tensor.numel() * tensor.element_size()))
            return original(*args, **kwargs)

        return mock.patch.object(dist, name, call)

    with counted("all_reduce"), counted("broadcast"), counted("all_gather"):
        yield sent


def bank_of(model: nn.Module, site: str) -> Composite:
    found = model.get_submodule(site).get_submodule("composite")
    assert isinstance(found, Composite)
    return found
