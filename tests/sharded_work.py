"""What tests let processes do with sharded models: the same to a plain one, and what the two have apart afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from neuronsurgery import surgery
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.sharding import whole
from neuronsurgery.surgery import Lowest, Units

__all__ = ["Feed", "apart", "blocks", "inputs", "mesh_of_all", "operated_run", "parallel", "shard", "train", "weights"]

FIRST, SECOND = Units({"0.up": [1, 6], "2": [0, 3]}), Units({"0.up": [1, 2], "1.up": [4]})


class Feed(nn.Module):
    """The feed-forward part of a block."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(4, width), nn.Linear(width, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(self.activation(self.up(x)))
        return result


def blocks(seed: int = 0, width: int = 8) -> nn.Sequential:
    """Two feed-forward parts, then a layer whose activation function stands beside it; 7 units do not split evenly."""
    torch.manual_seed(seed)
    return nn.Sequential(Feed(width), Feed(width), nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 2))


def inputs(seed: int, num: int = 8) -> Tensor:
    return torch.randn(num, 4, generator=torch.Generator().manual_seed(seed))


def mesh_of_all() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def shard(model: Any, **options: Any) -> Any:
    """`fully_shard` on the parts and on the whole."""
    options = {"mesh": mesh_of_all()} | options
    for part in (model[0], model[1], model[2]):
        fully_shard(part, **options)
    return fully_shard(model, **options)


def parallel(model: Any) -> Any:
    """The feed-forward parts with units over processes."""
    plan = {f"{part}.{name}": kind() for part in (0, 1) for name, kind in _PLAN.items()}
    return parallelize_module(model, mesh_of_all(), plan)


_PLAN = {"up": ColwiseParallel, "down": RowwiseParallel}


def train(model: Any, optimizer: Any, num_steps: int, start: int = 0) -> None:
    for step in range(start, start + num_steps):
        optimizer.zero_grad()
        (model(inputs(step)) - 1).square().mean().backward()
        optimizer.step()


def operated_run(
    model: Any,
    sharded: Callable[[Any], Any] = lambda model: model,
    kind: Callable[..., Any] = torch.optim.Adam,
    *,
    operates_first: bool = False,
    num_steps: int = 12,
) -> dict[str, Any]:
    """A model operated on four times while it trains, by hand and by what was measured; what it is then."""
    if operates_first:
        surgery.knife(model, Units({"0.up": [1, 6]}))
    sharded(model)
    optimizer = kind(model.parameters(), lr=0.01)
    if operates_first:
        surgery.attach(model, optimizer)
    train(model, optimizer, 3)
    reports = [surgery.knife(model, FIRST, optimizer=optimizer, verify=inputs(1))]
    train(model, optimizer, 5, 10)
    reports.append(surgery.knife(model, "stagnant", optimizer=optimizer, cooldown=0, retire=6))
    with surgery.observe(model, optimizer) as evidence:
        train(model, optimizer, 4, 20)
    dormant = Lowest(0.3, of="dormant")
    reports.append(surgery.knife(model, dormant, evidence=evidence, optimizer=optimizer, cooldown=0, max_growth=9.0))
    train(model, optimizer, 2, 30)
    reports.append(surgery.knife(model, SECOND, optimizer=optimizer, max_growth=9.0))
    train(model, optimizer, num_steps, 40)
    return {
        "weights": weights(model),
        "output": model(inputs(2)).detach(),
        "operated": [{name: list(units) for name, units in each.operated.items()} for each in reports],
        "sizes": [[each.parameters_before, each.parameters_after] for each in reports],
        "problems": [str(each) for each in surgery.check(model, optimizer).problems],
    }


def weights(model: Any) -> dict[str, Tensor]:
    """All parameters and frozen rows in use, whole."""
    frozen = {
        f"{name}.{buffer}": value.clone()
        for name, bank in model.named_modules()
        if isinstance(bank, Composite)
        for buffer in bank.buffer_names()
        if (value := bank.live(buffer)) is not None
    }
    return frozen | {name: whole(parameter).detach().clone() for name, parameter in model.named_parameters()}


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two runs' weights and outputs; infinite where they differ in what they did."""
    if one["operated"] != other["operated"] or one["weights"].keys() != other["weights"].keys():
        return float("inf")
    pairs = [(one["output"], other["output"])] + [(one["weights"][k], other["weights"][k]) for k in one["weights"]]
    return max(float((a - b).abs().max()) for a, b in pairs)
