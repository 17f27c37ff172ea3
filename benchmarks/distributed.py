"""What processes that hold one model send each other, and how long that takes: per observation and per operation.

The collectives by themselves, at several sizes, with the latency and the time per byte that fit them; what observations
and operations take at 1, 2 and 4 processes, beside what the fit says of their collectives; and how the work that each
process does by itself grows with the model. Processes are
forked, of a gloo group, one thread each. Where there are fewer cores than processes, or others work beside them, they
wait for a turn, in every collective anew; so the fit is to the fastest round of each collective, and beside the time
that an operation takes stands the processor time of its own work. Times are medians over rounds of the slowest process.

    python -m benchmarks.distributed                  # prints the tables
    python -m benchmarks.distributed --json FILE      # also writes what was measured
"""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel

from neuronsurgery import surgery
from tests.processes import in_processes
from tests.replica_work import batch, counting, network, take

PROCESSES = (1, 2, 4)
SIZES = (48, 4_096, 65_536, 1_048_576, 8_388_608)
ROUNDS = 101
OPERATIONS = 5
MODELS = {"4 units of 40": (32, 1, 4), "4 units of 328": (32, 10, 4), "4 units of 1,032": (1_024, 1, 4)}
MODELS |= {"256 units of 1,032": (1_024, 1, 256)}

OWN_WORK = ((64, 2, 1), (64, 32, 1), (64, 32, 32), (1_024, 2, 1), (2_048, 2, 1), (2_048, 2, 2))

Measured = dict[str, Any]


def main() -> None:
    """Measure, fit and print."""
    measured = {num: _measured(num) for num in PROCESSES}
    alpha, beta = fit({num: each["collectives"] for num, each in measured.items()})
    console = Console(width=140)
    console.print(_collectives(measured))
    console.print(f"fit: alpha {alpha * 1e6:.0f} microseconds a message, beta {beta * 1e9:.2f} nanoseconds a byte")
    console.print(f"{os.cpu_count()} cores, gloo over the loopback device, torch {torch.__version__}\n")
    console.print(_operations(measured, alpha, beta))
    console.print(_alone())
    if "--json" in sys.argv:
        Path(sys.argv[-1]).write_text(json.dumps({"alpha": alpha, "beta": beta, "measured": measured}))


# -- the model of cost -----------------------------------------------------------------------------------------------


def messages(kind: str, num: int) -> float:
    """How many messages follow each other in a collective of small ones: up and down a tree, or down only."""
    return math.ceil(math.log2(num)) * (2 if kind == "all_reduce" else 1) if num > 1 else 0


def passes(kind: str, num: int) -> float:
    """How many times its bytes pass each process in a collective of large ones."""
    return (2 * (num - 1) / num if kind == "all_reduce" else 1) if num > 1 else 0


def predicted(calls: Sequence[tuple[str, int]], num: int, alpha: float, beta: float) -> float:
    """Seconds that collectives, by kind and bytes, take one after the other."""
    return sum(alpha * messages(kind, num) + beta * passes(kind, num) * size for kind, size in calls)


def fit(collectives: Mapping[int, Mapping[str, Mapping[str, float]]]) -> tuple[float, float]:
    """Alpha and beta of least relative squares, from the seconds by number of processes, kind and size."""
    rows, seconds = [], []
    for num, kinds in collectives.items():
        for kind, sizes in kinds.items():
            for size, taken in sizes.items() if num > 1 else ():
                rows.append([messages(kind, num), passes(kind, num) * int(size)])
                seconds.append(taken)
    weights = 1 / np.array(seconds)
    found, *_ = np.linalg.lstsq(np.array(rows) * weights[:, None], np.ones(len(seconds)), rcond=None)
    return float(found[0]), float(found[1])


# -- measuring -------------------------------------------------------------------------------------------------------


def _measured(num: int) -> Measured:
    """What a group of so many processes takes, the slowest process in each round."""
    with tempfile.TemporaryDirectory() as folder:
        results: list[Measured] = in_processes(_work, Path(folder), num)
    collectives = {
        kind: {str(size): _fastest([each["collectives"][kind][size] for each in results]) for size in SIZES}
        for kind in ("all_reduce", "broadcast")
    }
    models = {
        name: {
            what: {
                "calls": [list(call) for call in results[0]["models"][name][what]["calls"]],
                "seconds": _slowest([each["models"][name][what]["seconds"] for each in results]),
                "own": _slowest([each["models"][name][what]["own"] for each in results]),
            }
            for what in ("observation", "operation")
        }
        for name in MODELS
    }
    return {"collectives": collectives, "models": models}


def _slowest(seconds: Sequence[Sequence[float]]) -> float:
    return statistics.median(max(each) for each in zip(*seconds, strict=True))


def _fastest(seconds: Sequence[Sequence[float]]) -> float:
    return min(max(each) for each in zip(*seconds, strict=True))


def _work(rank: int) -> Measured:
    torch.set_num_threads(1)
    collectives = {
        "all_reduce": {size: list(_timed(lambda data: dist.all_reduce(data), size)) for size in SIZES},
        "broadcast": {size: list(_timed(lambda data: dist.broadcast(data, 0), size)) for size in SIZES},
    }
    return {"collectives": collectives, "models": {name: _model(rank, *how) for name, how in MODELS.items()}}


def _timed(exchange: Callable[[torch.Tensor], object], size: int) -> Iterator[float]:
    data = torch.zeros(size, dtype=torch.uint8)
    for _ in range(ROUNDS):
        yield _taken(lambda: exchange(data))[0]


def _taken(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds and processor seconds of a call that all processes begin together."""
    dist.barrier()
    start, busy = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - busy


def _model(rank: int, width: int, depth: int, num_units: int) -> Measured:
    """An observation, pooled, and an operation on units of one layer, of one model."""
    model = network(width, depth)
    replica, optimizer = DistributedDataParallel(model), torch.optim.Adam(model.parameters())
    observing: list[tuple[float, float]] = []
    operating: list[tuple[float, float]] = []
    units = surgery.Units({"2": list(range(num_units))})
    for step in range(OPERATIONS):
        with surgery.observe(replica, optimizer) as evidence:
            take(replica, optimizer, batch(step, rank))
        with counting() as observed:
            observing.append(_taken(lambda seen=evidence: surgery.pooled(replica, seen)))
        knife = functools.partial(surgery.knife, replica, units, optimizer=optimizer, max_growth=1e9)
        with counting() as operated:
            operating.append(_taken(knife))
        surgery.consolidate(replica, optimizer=optimizer)  # so that each operation finds as many rows
    return {
        what: {"calls": sent.calls, "seconds": [all_of_it for all_of_it, _ in taken], "own": [own for _, own in taken]}
        for what, sent, taken in (("observation", observed, observing), ("operation", operated, operating))
    }


def _own_work(width: int, depth: int, num_sites: int) -> tuple[float, float]:
    """Processor seconds of an operation on four units of each of so many square layers, and of copying one of these."""
    model = network(width, depth + 1)
    optimizer = torch.optim.Adam(model.parameters())
    take(model, optimizer, batch(0, 0))
    units = surgery.Units({str(2 * site + 4): [0, 1, 2, 3] for site in range(num_sites)})
    weight, seconds, copying = model.get_submodule("4").get_parameter("weight").detach(), [], []
    for _ in range(OPERATIONS):
        start = time.process_time()
        surgery.knife(model, units, optimizer=optimizer, max_growth=1e9)
        seconds.append(time.process_time() - start)
        start = time.process_time()
        weight.clone()
        copying.append(time.process_time() - start)
        surgery.consolidate(model, optimizer=optimizer)
    return min(seconds), min(copying)


# -- tables ----------------------------------------------------------------------------------------------------------


def _collectives(measured: Mapping[int, Measured]) -> Table:
    table = Table(
        "collective", "bytes", *(f"{num} processes, ms" for num in measured), title="collectives, the fastest round"
    )
    for kind in ("all_reduce", "broadcast"):
        for size in map(str, SIZES):
            shown = [f"{each['collectives'][kind][size] * 1e3:.3f}" for each in measured.values()]
            table.add_row(kind, f"{int(size):,}", *shown)
    return table


def _alone() -> Table:
    columns = ("width", "square layers", "of these operated on", "ms of own work", "ms of copying one layer")
    table = Table(*columns, title="one process, one thread, no group: the fastest round")
    for width, depth, num_sites in OWN_WORK:
        times = (f"{seconds * 1e3:.2f}" for seconds in _own_work(width, depth, num_sites))
        table.add_row(f"{width:,}", str(depth), str(num_sites), *times)
    return table


def _operations(measured: Mapping[int, Measured], alpha: float, beta: float) -> Table:
    columns = ("what", "processes", "collectives", "bytes", "ms", "ms of own work", "ms of collectives, by the fit")
    table = Table(*columns, title="observations, pooled, and operations")
    for name in MODELS:
        for what in ("observation", "operation"):
            for num, each in measured.items():
                own = each["models"][name][what]
                calls = own["calls"]
                fitted = predicted(calls, num, alpha, beta)
                times = [f"{value * 1e3:.2f}" for value in (own["seconds"], own["own"], fitted)]
                size = f"{sum(size for _, size in calls):,}"
                table.add_row(f"{what}: {name}", str(num), str(len(calls)), size, *times)
    return table


if __name__ == "__main__":
    main()
