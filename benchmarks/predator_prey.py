"""QMIX on predator-prey with punishment, exploring for long and for a short while: curves, a table and a picture.

Both settings differ in nothing but the steps over which epsilon falls. With a punishment for lone catchers agents that
stop exploring early learn not to catch at all (relative overgeneralization).

    python -m benchmarks.predator_prey [--workers 2]   # about an hour and a half on two cores; finished runs are kept
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.training import bootstrap
from marl.records import Record
from marl.run import Run, make_run
from marl.run_settings import RunSettings, TrainingSettings, run_settings
from marl.training import Silent, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEEDS = (0, 1, 2)
EXPLORING = {"epsilon over 1M steps": 1_000_000, "epsilon over 50k steps": 50_000}
NUM_STEPS = 1_000_000
EPISODES_PER_UPDATE = 2  # half as many updates as PyMARL makes, for the time that it takes
RESULTS = Path("results/predator_prey")
PICTURE = Path("docs/images/predator-prey.png")
COLUMNS = ("steps", "updates", "epsilon", "test/return", "train/return", "agent/stagnant", "mixer/dead")

Curve = list[tuple[float, float]]


def main() -> None:
    """Run what is missing, then print the table and draw the picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2)
    RESULTS.mkdir(parents=True, exist_ok=True)
    missing = [(steps, seed) for seed in SEEDS for steps in EXPLORING.values() if not path(steps, seed).exists()]
    with multiprocessing.get_context("spawn").Pool(parser.parse_args().workers) as pool:
        pool.starmap(run_one, missing, chunksize=1)
    curves = {name: [read(path(steps, seed)) for seed in SEEDS] for name, steps in EXPLORING.items()}
    Console().print(table_of(curves))
    draw(curves)


def settings_of(exploring: int, seed: int) -> RunSettings:
    """The preset of PyMARL, but for epsilon and for the rhythm of updates."""
    settings = run_settings("qmix", "predator_prey", seed=seed)
    exploration = replace(settings.learning.exploration, num_steps=exploring)
    training = TrainingSettings(NUM_STEPS, episodes_per_update=EPISODES_PER_UPDATE, evaluate_every=25_000)
    return replace(settings, learning=replace(settings.learning, exploration=exploration), training=training)


def run_one(exploring: int, seed: int) -> None:
    """Train, and write the records when the run is over."""
    torch.set_num_threads(1)
    notes = Notes()
    train(make_run(settings_of(exploring, seed)), notes)
    unfinished = path(exploring, seed).with_suffix(".part")
    with unfinished.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(notes.records)
    unfinished.rename(path(exploring, seed))


class Notes(Silent):
    """Keeps the records."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def on_record(self, run: Run, record: Record) -> None:
        self.records.append(record)


def path(exploring: int, seed: int) -> Path:
    """Where the records of a run are."""
    return RESULTS / f"epsilon-{exploring}-seed-{seed}.csv"


def read(file: Path) -> Curve:
    """Steps and returns of greedy episodes."""
    with file.open(encoding="utf-8", newline="") as lines:
        return [(float(row["steps"]), float(row["test/return"])) for row in csv.DictReader(lines)]


def table_of(curves: dict[str, list[Curve]]) -> Table:
    """Mean returns of the last five evaluations."""
    table = Table(
        "exploration", "each seed", "mean", "95 % interval", title=f"QMIX after {NUM_STEPS:,} steps (maximum 40)"
    )
    for name, seeds in curves.items():
        means = [float(np.mean([value for _, value in curve[-5:]])) for curve in seeds]
        low, high = bootstrap(means)
        table.add_row(
            name, ", ".join(f"{mean:.1f}" for mean in means), f"{np.mean(means):.1f}", f"{low:.1f} to {high:.1f}"
        )
    return table


def draw(curves: dict[str, list[Curve]]) -> None:
    """Every seed thin, the mean of each setting thick."""
    figure, axes = plt.subplots(figsize=(7, 4))
    grid = np.linspace(50_000, NUM_STEPS, 39)
    for color, (name, seeds) in zip(("tab:blue", "tab:orange"), curves.items(), strict=True):
        values = np.array([np.interp(grid, *np.array(curve).T) for curve in seeds])
        axes.plot(grid, values.T, color=color, alpha=0.35, linewidth=1)
        axes.plot(grid, values.mean(axis=0), color=color, linewidth=2, label=f"{name} (mean of {len(seeds)} seeds)")
    axes.axhline(40, color="gray", linestyle=":", linewidth=1)
    axes.set_xlabel("steps of the environment")
    axes.set_ylabel("return of greedy episodes")
    axes.legend()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    main()
