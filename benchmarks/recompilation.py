"""How often torch.compile compiles a model anew while it is operated on, and what a growing bank costs in room.

A model of two operable layers is compiled as one graph, with `fullgraph=True`, and operated on again and again; after
each operation it runs once. Counted are the graphs that reach the backend. Capacities are the first layer's bank's.

    python benchmarks/recompilation.py [NUM_OPERATIONS]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from neuronsurgery import surgery

WIDTH = 16
PATTERNS: dict[str, Callable[[int], dict[str, list[int]]]] = {
    "one unit, every time": lambda i: {"0": [0], "2": [0]},
    "each unit in turn": lambda i: {"0": [i % WIDTH], "2": [i % WIDTH]},
    "one layer after the other": lambda i: {("0", "2")[i // 10 % 2]: [i % WIDTH]},
    "a quarter of the units at a time": lambda i: {"0": [(i + j) % WIDTH for j in range(WIDTH // 4)]},
}


def main() -> None:
    """Count for every pattern and print the table."""
    num_operations = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    columns = ("operations", "on", "first capacity", "last capacity", "recompilations", "live share of rows")
    table = Table(*columns, title="torch.compile(fullgraph=True)")
    for pattern in PATTERNS:
        table.add_row(str(num_operations), pattern, *map(str, count(pattern, num_operations)))
    Console(width=140).print(table)


def count(pattern: str, num_operations: int) -> tuple[int, int, int, str]:
    """First and last capacity of the first layer's bank, recompilations, and the mean share of its rows in use."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))
    backend = CompileCounterWithBackend("eager")
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(8, 4)
    compiled(x)
    rooms, shares = [], []
    for index in range(num_operations):
        surgery.knife(model, surgery.Units(PATTERNS[pattern](index)), max_growth=1e6)
        compiled(x)
        bank: Any = model.get_submodule("0.composite")
        rooms.append(len(bank.frozen_weight))
        shares.append(len(bank.rows) / rooms[-1])
    return rooms[0], rooms[-1], backend.frame_count - 1, f"{sum(shares) / len(shares):.2f}"


if __name__ == "__main__":
    main()
