"""Growth over a long life: a thousand operations, what retirement costs in accuracy, what distillation costs in error.

    python -m benchmarks.growth long       # 1,000 operations with training between: drift, rows, memory, step time
    python -m benchmarks.growth retire     # the digits demonstration with rows that retire after N tasks, three seeds
    python -m benchmarks.growth distill    # its networks after 20 tasks, unbounded, distilled to fewer and fewer rows
    python -m benchmarks.growth picture    # docs/images/growth.png from what the last two wrote

Each part keeps its numbers in results/growth and prints a table of what is there. One thread; three or four minutes
of a processor each. Where one is shared, seconds are those of the processor, not of the clock on the wall.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from neuronsurgery import surgery
from neuronsurgery.demo.digits import Experiment, Task, stream, tasks
from neuronsurgery.demo.networks import build_network
from neuronsurgery.demo.run import small_network_arithmetic
from neuronsurgery.pytorch import distilling

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path("results/growth")
PICTURE = Path("docs/images/growth.png")
SEEDS = (0, 1, 2)


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--only", type=int, help="of the lives, or of the seeds: this one alone, beside others")
    RESULTS.mkdir(parents=True, exist_ok=True)
    arguments = parser.parse_args()
    with small_network_arithmetic():
        PARTS[arguments.part](arguments.only)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """One step."""
    optimizer.zero_grad()
    torch.autograd.backward(cross_entropy(model(x), y))
    optimizer.step()


# -- a thousand operations -------------------------------------------------------------------------------------------

BATCH = 256
STEPS_BETWEEN = 2
RETIRE = 32  # optimizer steps: sixteen operations
EVERY = 16  # operations between two consolidations, which leave one row for each unit of a layer
MAX_GROWTH = 2.5
LIVES = (  # way, width, operations
    ("retire", 128, 1000),
    ("consolidate", 128, 1000),
    ("neither", 128, 200),
    ("retire", 512, 1000),
    ("consolidate", 512, 1000),
)


def long(only: int | None) -> None:
    """A thousand operations in two ways; fewer where rows are never removed, and on wider layers."""
    for index, (way, width, num_operations) in enumerate(LIVES):
        if only in (None, index):
            write(f"life {index}", Life(way, width).row(num_operations))
    table = Table(
        *("way", "width", "operations", "drift at one, largest", "rows, most", "at the end", "live MB half way"),
        *("at the end", "step / as wide", "rested: rows", "gradient / untouched", "step / untouched"),
    )
    for path in sorted(RESULTS.glob("life *.json")):
        table.add_row(*map(str, json.loads(path.read_text(encoding="utf-8"))))
    Console(width=210).print(table)


class Life:
    """One network of two hidden layers that learns labels which change, and is operated on all the time."""

    def __init__(self, way: str, width: int) -> None:
        self.way, self.width = way, width
        self.model = network(width)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.generator = torch.Generator().manual_seed(0)
        self.x = next(tasks(Experiment(num_tasks=1, num_images=BATCH, num_epochs=1), 0)).images
        self.y = torch.zeros(BATCH, dtype=torch.long)

    def row(self, num_operations: int) -> tuple[Any, ...]:
        """Live, and say what that came to."""
        drift, most, operated, live = 0.0, 0, 0, []
        for operation in range(num_operations):
            if operation % 20 == 0:
                self.y = torch.randint(10, (BATCH,), generator=self.generator)
            for _ in range(STEPS_BETWEEN):
                train(self.model, self.optimizer, self.x, self.y)
            report = self.operate()
            drift, operated = max(drift, report.max_error), operated + bool(report.num_units)
            if operation % EVERY == EVERY - 1:
                most = max(most, surgery.composites(self.model).num_rows)
                self.consolidate()
            if operation + 1 in (num_operations // 2, num_operations):
                self.consolidate()
                live.append(f"{live_bytes() / 1e6:.2f}")
        rows = surgery.composites(self.model).num_rows
        ratio = self.ratio(rows, timed)
        done = f"{operated} of {num_operations}"
        return self.way, self.width, done, f"{drift:.1e}", most, rows, *live, ratio, *self.rested()

    def rested(self) -> tuple[int, str, str]:
        """The rows left once nothing was operated on while a fade lasts; what the model and a step cost then."""
        for _ in range(RETIRE):
            train(self.model, self.optimizer, self.x, self.y)
        self.consolidate()
        return surgery.composites(self.model).num_rows, self.ratio(0, timed_gradient), self.ratio(0, timed)

    def operate(self) -> Any:
        """On one of 32 units of each layer, at random."""
        return surgery.knife(
            self.model,
            surgery.Random(1 / 32),
            optimizer=self.optimizer,
            cooldown=0,
            retire=RETIRE if self.way == "retire" else None,
            max_growth=MAX_GROWTH,
            verify=self.x,
            generator=self.generator,
        )

    def consolidate(self) -> None:
        """Take out what retired, or distill; in the third way nothing."""
        if self.way == "retire":
            surgery.consolidate(self.model, optimizer=self.optimizer)
        elif self.way == "consolidate":
            surgery.consolidate(self.model, optimizer=self.optimizer, batches=[self.x], max_rows=self.width)

    def ratio(self, rows: int, seconds_of: Callable[..., float]) -> str:
        """Median and quartiles of a time over that of a plain network as wide, taken in turn."""
        plain = network(self.width + rows // 2)
        beside = torch.optim.Adam(plain.parameters(), lr=1e-3)
        ratios = []
        for _ in range(60):
            seconds = [seconds_of(m, o, self.x, self.y) for m, o in ((self.model, self.optimizer), (plain, beside))]
            ratios.append(seconds[0] / seconds[1])
        low, median, high = statistics.quantiles(ratios[10:], n=4)
        return f"{median:.2f} ({low:.2f} to {high:.2f})"


def network(width: int) -> nn.Sequential:
    """Two hidden layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)),
    )


def timed(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """The processor seconds of a step, on one thread."""
    start = time.thread_time()  # not the clock on the wall, which counts what neighbors do
    train(model, optimizer, x, y)
    return time.thread_time() - start


def timed_gradient(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """The same without the optimizer."""
    optimizer.zero_grad()
    start = time.thread_time()
    torch.autograd.backward(cross_entropy(model(x), y))
    return time.thread_time() - start


def live_bytes() -> int:
    """The bytes of all tensors that are alive in this process, each storage once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter) and thing.layout is torch.strided and not thing.is_meta:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


# -- retirement on the demonstration's tasks -------------------------------------------------------------------------

EXPERIMENT = Experiment(num_tasks=20, num_images=256)
STEPS_PER_TASK = EXPERIMENT.num_epochs * -(-EXPERIMENT.num_images // EXPERIMENT.batch_size)
RETIRE_AFTER: dict[str, float | None] = {"0.5": 0.5, "1": 1.0, "2": 2.0, "4": 4.0, "never": None, "no operation": 0.0}
LAST = 5


def retire(only: int | None) -> None:
    """The trade-off between how long rows stay, accuracy and how many there are."""
    for seed in SEEDS if only is None else (only,):
        for name, num_tasks in RETIRE_AFTER.items():
            model, *numbers = retiring(num_tasks, seed)
            torch.save(model, RESULTS / f"{name} {seed}.pt")
            write(f"retire {name} {seed}", numbers)
    table = Table("rows retire after tasks", "accuracy on the last 5 tasks", "frozen rows a unit, at the end")
    for name, runs in retired().items():
        table.add_row(name, *(spread([run[column] for run in runs]) for column in (0, 1)))
    Console().print(table)


def retired() -> dict[str, list[list[float]]]:
    """Accuracies and rows that were kept, by when rows retire."""
    kept = {name: sorted(RESULTS.glob(f"retire {name} *.json")) for name in RETIRE_AFTER}
    return {name: [json.loads(path.read_text(encoding="utf-8")) for path in paths] for name, paths in kept.items()}


def retiring(num_tasks: float | None, seed: int) -> tuple[nn.Module, float, float]:
    """A network after all tasks, its mean accuracy on the last ones, and its frozen rows for each unit.

    `num_tasks`: after how many tasks its rows have retired; None: never; 0: it is not operated on.
    """
    model = build_network(EXPERIMENT.num_units, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=EXPERIMENT.learning_rate, fused=True)
    generator, accuracies = stream(seed, "surgery"), []
    for task in tasks(EXPERIMENT, seed):
        if num_tasks == 0:
            batches(model, optimizer, task, 0, EXPERIMENT.num_epochs)
        else:
            with surgery.observe(model, optimizer) as evidence:
                batches(model, optimizer, task, 0, 1)
            surgery.consolidate(model, optimizer=optimizer)
            steps = None if num_tasks is None else round(num_tasks * STEPS_PER_TASK)
            options: dict[str, Any] = {"evidence": evidence, "max_growth": 64.0, "cooldown": 0, "generator": generator}
            surgery.knife(model, surgery.Stagnant(), optimizer=optimizer, retire=steps, **options)
            batches(model, optimizer, task, 1, EXPERIMENT.num_epochs)
        accuracies.append(accuracy(model, task))
    rows = surgery.composites(model).num_rows / (3 * EXPERIMENT.num_units)
    return model, statistics.mean(accuracies[-LAST:]), rows


def batches(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, first: int, end: int) -> None:
    """Train on some epochs of a task."""
    for epoch in task.epochs[first:end]:
        for batch in epoch:
            train(model, optimizer, task.images[batch], task.labels[batch])


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    """The share of a task's images that get its labels."""
    return float((model(task.images).argmax(dim=1) == task.labels).double().mean())


# -- distillation of its networks ------------------------------------------------------------------------------------

MOST_ROWS = (256, 192, 128, 64, 32, 0)


def distill(only: int | None) -> None:
    """The error of fewer rows, on images that were not seen, and what that costs in accuracy; `retire` runs first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in SEEDS if only is None else (only,):
        model = torch.load(RESULTS / f"never {seed}.pt", weights_only=False)
        *_, task = tasks(EXPERIMENT, seed)
        fresh = unseen(task)
        for most in (None, *MOST_ROWS):
            for way in ("fitted", "chosen") if most else ("fitted",):
                found.setdefault(f"{most} {way}", []).append(distilled(model, task, fresh, most, way))
        write("distill", found)
    table = Table(
        *("at most, a layer", "rows left", "reported error", "on unseen images", "without the fit"),
        "accuracy on the last task",
    )
    for key, runs in found.items():
        name, way = key.split()
        if way == "fitted":
            without = [run["error"] for run in found.get(f"{name} chosen", [])]
            columns = (spread([run[column] for run in runs]) for column in ("rows", "reported", "error"))
            table.add_row(name, *columns, spread(without), spread([run["accuracy"] for run in runs]))
    Console().print(table)


def distilled(model: nn.Module, task: Task, fresh: Tensor, most: int | None, way: str) -> dict[str, Any]:
    """A copy with fewer rows: how many, and by how much each layer's activations moved, the largest of all layers."""
    after, num_steps = copy.deepcopy(model), distilling.NUM_STEPS
    reported = 0.0
    if most is not None:
        distilling.NUM_STEPS = num_steps if way == "fitted" else 0
        report = surgery.consolidate(after, batches=[task.images], tolerance=0.0, max_rows=most)
        distilling.NUM_STEPS = num_steps
        reported = max((site.error for site in report.sites.values()), default=0.0)
    rows = surgery.composites(after).num_rows
    errors = [
        moved(before, now) for before, now in zip(layers(model, model, fresh), layers(model, after, fresh), strict=True)
    ]
    return {"rows": rows, "reported": reported, "error": max(errors), "accuracy": accuracy(after, task)}


@torch.no_grad()
def layers(model: nn.Module, after: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """The hidden activations of `after`, each layer's for the input that it has in `model`."""
    for first in (0, 2, 4):
        own, other = (each[first : first + 2] for each in (model, after))  # type: ignore[index]
        yield other(x)
        x = own(x)


def moved(before: Tensor, after: Tensor) -> float:
    """As reports measure it."""
    return float((after - before).norm() / before.norm())


def unseen(task: Task) -> Tensor:
    """The images of the data set that the run does not hold."""
    every = next(tasks(Experiment(num_tasks=1, num_images=1797, num_epochs=1), 0)).images
    known = {row.numpy().tobytes() for row in task.images}
    return torch.stack([row for row in every if row.numpy().tobytes() not in known])


# -- results ---------------------------------------------------------------------------------------------------------


def write(name: str, found: Any) -> None:
    """Keep the numbers."""
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def spread(values: list[float]) -> str:
    """The mean and the range."""
    if not values:
        return "-"
    digits = 0 if min(values) >= 20 else 2
    mean, low, high = (f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def picture(only: int | None) -> None:
    """Both curves side by side."""
    fewer = json.loads((RESULTS / "distill.json").read_text(encoding="utf-8"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    for name, runs in retired().items():
        accuracies, rows = zip(*runs, strict=True)
        left.plot(statistics.mean(rows), statistics.mean(accuracies), "o", color="C0")
        left.vlines(statistics.mean(rows), min(accuracies), max(accuracies), color="C0")
        label = name if name in ("never", "no operation") else f"N = {name}"
        above = 7 if name in ("0.5", "4") else -13  # neighbors do not share a side
        left.annotate(
            label, (statistics.mean(rows), statistics.mean(accuracies)), (-12, above), textcoords="offset points"
        )
    left.set_xscale("symlog", linthresh=0.1)
    left.set(xlabel="frozen rows a unit, at the end", ylabel="accuracy on the last 5 tasks", ylim=(0, 1.02))
    left.set_title("rows retire after N tasks")
    for way, label in (("chosen", "rows chosen"), ("fitted", "rows chosen and fitted")):
        points = [(mean(runs, "rows"), mean(runs, "error")) for key, runs in fewer.items() if key.endswith(way)]
        right.plot(*zip(*sorted(points), strict=True), "o-", label=label)
    points = [(mean(runs, "rows"), mean(runs, "accuracy")) for key, runs in fewer.items() if key.endswith("fitted")]
    right.plot(*zip(*sorted(points), strict=True), "s--", color="C2", label="accuracy on the last task, fitted")
    right.set(xlabel="frozen rows in the network", ylim=(0, None))
    right.set_title("distilled: error of activations on unseen images")
    right.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110)


def mean(runs: list[dict[str, Any]], column: str) -> float:
    """The mean over the seeds."""
    return statistics.mean(run[column] for run in runs)


PARTS: dict[str, Callable[[int | None], None]] = {
    "long": long,
    "retire": retire,
    "distill": distill,
    "picture": picture,
}

if __name__ == "__main__":
    main()
