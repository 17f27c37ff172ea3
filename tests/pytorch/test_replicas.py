"""Operations on a model that several processes hold: by all of them and alike, or by none, and no one waits for ever.

One launch of two processes does the work of all quick tests in turn; each test looks at what one function returned.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from neuronsurgery import surgery
from neuronsurgery.pytorch.digests import weights_of
from neuronsurgery.surgery import Every, Lowest, Plateau, Units
from tests.processes import NEEDS_FORK, in_processes
from tests.replica_work import (
    LOWEST,
    bank_of,
    batch,
    counting,
    network,
    operated_run,
    pair,
    refusal,
    take,
)
from tests.snapshots import snapshot

pytestmark = NEEDS_FORK
CHOSEN = Units({"0": [1], "2": [0, 3]})


# -- what each process does ------------------------------------------------------------------------------------------


def runs(rank: int) -> list[dict[str, Any]]:
    return [operated_run(rank, seed, 12, wrapped_first=bool(seed % 2)) for seed in range(2)]


def refused(rank: int) -> dict[str, Any]:
    """What each process is told when something goes wrong on one of them, and what of its model changed by it."""
    replica, optimizer = pair(rank)
    take(replica, optimizer, batch(0, rank))
    surgery.knife(replica, CHOSEN, optimizer=optimizer)
    take(replica, optimizer, batch(1, rank))
    generator = torch.Generator().manual_seed(rank)
    knife = functools.partial(surgery.knife, replica, CHOSEN, optimizer=optimizer, generator=generator, cooldown=0)
    told: dict[str, Any] = {}

    def tried(name: str, call: Callable[[], object]) -> None:
        before = snapshot(replica.module, [optimizer], generator)
        told[name] = refusal(call)
        after = snapshot(replica.module, [optimizer], generator)
        told[f"{name}: changed"] = [label for label in before if before[label] != after.get(label)]

    tried("draw", lambda: knife(init=torch.nn.init.zeros_ if not rank else lambda weight: weight.fill_(float("nan"))))
    tried("batch", lambda: knife(verify=torch.zeros(2, 4 + rank)))
    with mock.patch(
        "neuronsurgery.pytorch.operating.num_weights", side_effect=[1, RuntimeError("late") if rank else 2, 2]
    ):
        tried("record", lambda: knife())
    with mock.patch.object(surgery.Report, "__post_init__", side_effect=KeyboardInterrupt if rank else None):
        told["interrupt"] = ""
        try:
            knife()
        except KeyboardInterrupt:
            told["interrupt"] = "interrupted"
        except surgery.DistributedError as error:
            told["interrupt"] = str(error)
    tried("plan", lambda: surgery.knife(replica, Units({"0": [99]}), optimizer=optimizer))
    tried("options", lambda: knife(retire=3 + rank))
    tried("functions", knife if rank else lambda: surgery.consolidate(replica))
    if rank:
        replica.zero_grad()
    tried("evidence", lambda: surgery.knife(replica, "stagnant", optimizer=optimizer, cooldown=0))
    told["number"] = surgery.knife(replica, CHOSEN, optimizer=optimizer).operation
    told["weights"] = weights_of(replica.module)
    return told


def own_initializers(rank: int) -> dict[str, Any]:
    """An initializer that draws on each process what it likes."""
    own = torch.Generator().manual_seed(rank)
    init = lambda weight: weight.copy_(torch.randn(weight.shape, generator=own))  # noqa: E731
    replica, optimizer = pair(rank)
    take(replica, optimizer, batch(0, rank))
    surgery.redo(replica, Units({"0": [5]}), optimizer=optimizer, init=init)
    surgery.knife(replica, CHOSEN, optimizer=optimizer, init=init)
    before = weights_of(replica.module)
    told = refusal(lambda: surgery.reset(replica, ["4"], optimizer=optimizer, init=init))
    return {"weights": before, "same": before == weights_of(replica.module), "told": told}


def diverged(rank: int) -> dict[str, Any]:
    """A frozen row, then a weight, that one process has otherwise."""
    replica, optimizer = pair(rank)
    take(replica, optimizer, batch(0, rank))
    surgery.knife(replica, CHOSEN, optimizer=optimizer)
    found = {"before": [str(each) for each in surgery.check(replica, optimizer).problems]}
    row = bank_of(replica.module, "2").frozen_weight[1]
    row += rank
    found["row"] = [str(each) for each in surgery.check(replica, optimizer).about("replica")]
    found["knife"] = [refusal(lambda: surgery.knife(replica, Units({"0": [2]}), optimizer=optimizer))]
    row -= rank
    with torch.no_grad():
        replica.module[4].bias += rank
    found["weight"] = [each.where for each in surgery.check(replica).about("replica")]
    found["alone"] = [str(each) for each in surgery.check(replica.module).about("replica")]
    return found


def other_structure(rank: int) -> str:
    model = network()
    if rank:
        surgery.knife(model, Units({"0": [1]}))
    return refusal(lambda: surgery.knife(surgery.replicated(model), CHOSEN))


def alone(rank: int) -> dict[str, Any]:
    """A model that nothing wraps, operated on by one process only: the other has no part in it."""
    if rank:
        return {"calls": 0, "notes": []}
    with counting() as sent:
        report = surgery.knife(network(), CHOSEN)
    return {"calls": len(sent.calls), "notes": list(report.notes)}


def traffic(rank: int) -> dict[str, Any]:
    """What an operation on four units of layer 2 sends, whatever the model's size, and what an observation does."""
    found = {}
    for name, width, depth in (("small", 16, 1), ("wide", 160, 1), ("deep", 16, 10)):
        replica, optimizer = pair(rank, network(width, depth))
        take(replica, optimizer, batch(0, rank))
        with counting() as sent:
            surgery.knife(replica, Units({"2": [1, 2, 3, 15]}), optimizer=optimizer)
        found[name] = sent.calls
        with counting() as sent, surgery.observe(replica, optimizer) as evidence:
            take(replica, optimizer, batch(1, rank))
            take(replica, optimizer, batch(2, rank))
        found[f"{name}, observing"] = sent.calls
        with counting() as sent:
            surgery.pooled(replica, evidence)
        found[f"{name}, pooled"] = sent.calls
    return found


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.norm(self.first(x))))
        return out


def buffers(rank: int) -> dict[str, Any]:
    """What DistributedDataParallel sends with each forward, of replicas operated on before and after wrapping."""
    found: dict[str, Any] = {}
    units = Units({"first": [1, 2]})
    for when in ("after", "before", "unknown", "grown"):
        torch.manual_seed(0)
        model = Normed()
        if when in ("before", "unknown"):
            torch.manual_seed(rank if when == "before" else 0)
            surgery.knife(surgery.replicated(model) if when == "before" else model, units)
        replica, optimizer = pair(rank, model)
        take(replica, optimizer, batch(0, rank))
        if when in ("after", "grown"):
            surgery.knife(replica, units, optimizer=optimizer)
        if when == "grown":
            for unit in range(3, 8):
                surgery.knife(replica, Units({"first": [unit]}), optimizer=optimizer)
        take(replica, optimizer, batch(1, rank))
        found[when] = sorted(name for name in replica.named_module_buffers if "composite" in name)
        replica.eval()(batch(2, rank))
        found[f"{when}: held"] = [value.double().tolist() for value in model.state_dict().values()]
    return found


def kinds_of_replicas(rank: int) -> dict[str, Any]:
    """The options of DistributedDataParallel, an operation on the first step and later, and accumulated gradients."""
    found = {}
    for option in ("find_unused_parameters", "static_graph", "gradient_as_bucket_view", "broadcast_buffers"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions of torch call one of them otherwise
            replica, optimizer = pair(rank, **{option: option != "broadcast_buffers"})
        for step in range(4):
            if step in (0, 2):
                report = surgery.knife(replica, CHOSEN, optimizer=optimizer, verify=batch(9, rank))
            with replica.no_sync():
                if option != "static_graph":  # of which torch says that it cannot accumulate so
                    (replica(batch(step, rank)) - 1).square().mean().backward()
            (replica(batch(step + 10, rank)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found[option] = {"weights": weights_of(replica.module), "operation": report.operation}
    return found


def measured(rank: int) -> dict[str, Any]:
    """Evidence of activations and gradients, with and without an optimizer; probing; a look at an example."""
    replica, optimizer = pair(rank)
    accumulated = pair(rank)[0]
    with surgery.observe(replica) as without, surgery.observe(accumulated, optimizer_of(accumulated)) as read:
        for step in range(2):
            take(replica, optimizer, batch(step, rank))
            reduced = [replica.module[i].weight.grad.norm(dim=1) for i in (0, 2)]
        with accumulated.no_sync():
            (accumulated(batch(0, rank)) - 1).square().mean().backward()
        (accumulated(batch(1, rank)) - 1).square().mean().backward()
        optimizer_of(accumulated).step()
    activity = surgery.Quantity.UPDATE_ACTIVITY
    probed = surgery.probe(replica, [batch(5, rank)], lambda model, x: model(x).square().mean())
    surgery.discover(replica, example=batch(5, rank))
    take(replica, optimizer, batch(6, rank))  # which torch would refuse, had a pass of those before been its own
    pooled = surgery.pooled(replica, probed)
    h = surgery.Quantity.ACTIVATION
    return {
        "without": {name: without.measured(name)[activity] for name in without.sites},
        "reduced": reduced,
        "read": {name: read.measured(name)[activity] for name in read.sites},
        "num": [pooled.num_samples("0", h), probed.num_samples("0", h), without.num_steps, read.num_steps],
        "pooled": pooled.measured("0")[h],
        "own": probed.measured("0")[h],
    }


@functools.cache
def optimizer_of(replica: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(replica.parameters(), lr=0.1)


def methods(rank: int) -> dict[str, Any]:
    """Methods beside knife, after each of which the processes hold the same; reports and refusals."""
    found: dict[str, Any] = {}
    replica, optimizer = pair(rank)
    probe = functools.partial(surgery.probe, replica, [batch(0, rank)], lambda model, x: model(x).square().mean())
    how: dict[str, Any] = {"optimizer": optimizer}
    some = {"evidence": None, **how}
    calls: dict[str, Callable[[], Any]] = {
        "redo": lambda: surgery.redo(replica, LOWEST, **{**some, "evidence": probe()}),
        "regrama": lambda: surgery.regrama(replica, Lowest(0.25, of="grama"), **{**some, "evidence": probe()}),
        "reborn": lambda: surgery.reborn(replica, LOWEST, over_active=1.01, **{**some, "evidence": probe()}),
        "random": lambda: surgery.knife(replica, surgery.Random(0.2), **how),
        "stagnant": lambda: surgery.knife(replica, Lowest(0.2), cooldown=0, **how),
        "undo": lambda: surgery.undo(replica, found["last"], **how),
        "retire": lambda: surgery.knife(replica, Units({"2": [1]}), retire=1, **how),
        "consolidate": lambda: surgery.consolidate(replica, batches=[batch(3, rank)], tolerance=0.5, **how),
        "reset": lambda: surgery.reset(replica, ["4"], **how),
        "shrink_and_perturb": lambda: surgery.shrink_and_perturb(replica, **how),
        "reset_optimizer": lambda: surgery.reset_optimizer(replica, **how),
        "restore": lambda: surgery.restore(replica, replica.state_dict(), optimizer),
        "attach": lambda: surgery.attach(replica, optimizer),
        "widen": lambda: refusal(lambda: surgery.widen(replica, Units({"0": [1]}), **how)),
        "plasticity_injection": lambda: surgery.plasticity_injection(replica, "4", **how),
    }
    for name, call in calls.items():
        take(replica, optimizer, batch(len(found), rank))
        report = call()
        found["last"] = report if name == "stagnant" else found.get("last")
        found[name] = [weights_of(replica.module), report if isinstance(report, str) else ""]
    found.pop("last")
    return found


def scheduled(rank: int) -> dict[str, Any]:
    """Schedules: on values that one process has, on gradients, with a target, and one that fails on one process."""
    found: dict[str, Any] = {}
    replica, optimizer = pair(rank)
    target = copy.deepcopy(replica.module)
    act = functools.partial(surgery.Schedule, replica, optimizer)
    with act(Lowest(0.2), operate=Plateau(2), mirrors=target, cooldown=0) as schedule:
        steps = []
        for step in range(8):
            take(replica, optimizer, batch(step, rank))
            report = schedule.step(None if rank else 1.0)
            steps += [step] if report is not None else []
        found["plateau"] = [steps, weights_of(replica.module), weights_of(target), schedule.num_operations]
        found["words"] = refusal(lambda: schedule.step("low" if rank else 1.0))
    mirrors = [copy.deepcopy(replica.module)] if rank else ()  # a target that the second process alone has
    with act(Lowest(0.2), operate=Every(1), cooldown=0, mirrors=mirrors) as schedule:
        take(replica, optimizer, batch(1, rank))
        schedule.step()
    found["own target"] = weights_of(replica.module)
    failing = {"init": torch.nn.init.zeros_ if not rank else torch.Tensor.numpy}
    with act(Lowest(0.2), operate=Every(2), cooldown=0, **failing) as schedule:
        take(replica, optimizer, batch(2, rank))
        schedule.step()
        take(replica, optimizer, batch(3, rank))
        found["failing"] = [refusal(schedule.step), weights_of(replica.module), schedule.num_operations]
    for name, method in (("continual", surgery.ContinualBackprop), ("ccbp", surgery.CCBP)):
        fresh, own = pair(rank)
        runner: Any = method(fresh, own, **({"rate": 0.3, "maturity": 1} if name == "continual" else {"every": 1}))
        for step in range(4):
            take(fresh, own, batch(step, rank))
            runner.step()
        found[name] = weights_of(fresh.module)
    return found


def group_of_one(rank: int) -> dict[str, Any]:
    """A group that the second process is not in; its member operates by itself."""
    group = dist.new_group([0])
    if rank:
        return {"told": refusal(lambda: surgery.replicated(network(), group))}
    return {"told": str(surgery.knife(surgery.replicated(network(), group), CHOSEN).num_units)}


WORK = [
    *(runs, refused, own_initializers, diverged, other_structure, alone, traffic, buffers),
    *(kinds_of_replicas, measured, methods, scheduled, group_of_one),
]


def all_work(rank: int) -> dict[str, Any]:
    return {each.__name__: each(rank) for each in WORK}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[int], Any]], list[Any]]:
    """What each process returned of a piece of work."""
    results = in_processes(all_work, tmp_path_factory.mktemp("replicas"))
    return lambda work: [result[work.__name__] for result in results]
