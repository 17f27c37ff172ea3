"""What a training step costs after surgery, against a network that was as wide from the start.

The floor that the design names is a plain layer of width H + r, r the frozen rows of the bank: frozen rows need no
weight gradient and no optimizer state, so a step should come in under it. Both networks, and the untouched one, take
turns in one run; what is printed are medians of ratios of neighboring steps, with their quartiles.

    python benchmarks/training_step.py
"""

from __future__ import annotations

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from neuronsurgery import surgery

NUM_STEPS = 60
WARM_UP = 5
CASES = [  # width, batch size, share of units operated on, times
    (64, 32, 0.25, 1),
    (64, 32, 1.0, 4),
    (256, 256, 0.25, 1),
    (256, 256, 1.0, 1),
    (256, 256, 1.0, 4),
    (1024, 256, 0.25, 1),
    (1024, 256, 1.0, 1),
]


def main() -> None:
    """Measure every case and print the table."""
    torch.set_num_threads(1)
    table = Table("width", "batch", "frozen rows", "operated / untouched", "operated / as wide", title="Adam step")
    for width, batch_size, share, times in CASES:
        num_frozen = int(2 * share * times * width)
        operated, untouched, wide = (Trainer(w, batch_size) for w in (width, width, width + num_frozen))
        operated.operate(share, times)
        row = (width, batch_size, num_frozen, _ratios(operated, untouched), _ratios(operated, wide))
        table.add_row(*map(str, row))
    Console().print(table)


class Trainer:
    """A network of two hidden layers with its optimizer and a batch."""

    def __init__(self, width: int, batch_size: int) -> None:
        layers = (nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.x, self.y = torch.randn(batch_size, 64), torch.randn(batch_size, 1)

    def operate(self, share: float, times: int) -> None:
        """Operate on a random share of all units, several times, rows young under Adam from then on."""
        self.step()
        for _ in range(times):
            surgery.knife(self.model, surgery.Random(share), optimizer=self.optimizer, max_growth=64.0, cooldown=0)

    def step(self) -> float:
        """One training step; returns its seconds."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        nn.functional.mse_loss(self.model(self.x), self.y).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return time.perf_counter() - start


def _ratios(one: Trainer, other: Trainer) -> str:
    """Median and quartiles of the ratio of two steps taken in turn."""
    for _ in range(WARM_UP):
        one.step(), other.step()
    ratios = [one.step() / other.step() for _ in range(NUM_STEPS)]
    low, median, high = statistics.quantiles(ratios, n=4)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
