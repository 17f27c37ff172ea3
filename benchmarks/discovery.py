"""How long it takes to find the sites of large models: no forward pass, and a time that grows with the model's size.

The marks to keep under: 2 seconds for 100 transformer blocks, 10 seconds for 10,000 modules. Every model is built and
discovered anew several times; what is printed are medians with the fastest and the slowest.

    python benchmarks/discovery.py
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from neuronsurgery import surgery

NUM_RUNS = 5
WIDTH = 8


def main() -> None:
    """Measure every model, or those named as arguments, and print the table."""
    torch.set_num_threads(1)
    table = Table("model", "modules", "sites", "declined", "seconds", title="discovery")
    for name, build in MODELS.items():
        if not sys.argv[1:] or name in sys.argv[1:]:
            table.add_row(name, *_row(build))
    Console().print(table)


def _row(build: Callable[[], nn.Module]) -> tuple[str, ...]:
    seconds = []
    for _ in range(NUM_RUNS):
        model = build()
        start = time.perf_counter()
        sites = surgery.discover(model)
        seconds.append(time.perf_counter() - start)
    spread = f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
    return str(len(list(model.modules()))), str(len(sites)), str(len(sites.declined)), spread


# -- models ----------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mixed(x).chunk(3, dim=-1)
        out: Tensor = self.out(F.scaled_dot_product_attention(q, k, v))
        return out


class Mlp(nn.Module):
    """The feed-forward half of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.up(x)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), Mlp()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Stack(nn.Module):
    """Blocks in a list, with embeddings and a head that shares their weight."""

    def __init__(self, make: Callable[[], nn.Module], num_blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList([make() for _ in range(num_blocks)])
        self.head = nn.Linear(WIDTH, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Any:
        x = self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def generate(self, x: Tensor, num_steps: int) -> Tensor:
        """A function beside the forward that no trace can read."""
        for _ in range(num_steps):
            x = torch.cat([x, self(x)[:, -1:].argmax(-1)], 1)
        return x


class Small(nn.Module):
    """A residual block of four modules, its own included."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return x + self.down(self.act(self.up(x)))


class Nested(nn.Module):
    """A level that holds the next one."""

    def __init__(self, inner: nn.Module | None) -> None:
        super().__init__()
        self.enter, self.inner = nn.Linear(WIDTH, WIDTH), inner

    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.enter(x))
        return h if self.inner is None else self.inner(h)


def torch_encoder() -> nn.Module:
    """Layers of torch's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH), 100)


def flat() -> nn.Module:
    """One Sequential of 10,000 children."""
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) if i % 2 == 0 else nn.ReLU() for i in range(10_000)])


def nested() -> nn.Module:
    """200 levels."""
    model = None
    for _ in range(200):
        model = Nested(model)
    assert model is not None
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "100 transformer blocks": lambda: Stack(Block, 100),
    "100 encoder layers of torch": torch_encoder,
    "Sequential of 10,000": flat,
    "2,500 blocks of 4 modules": lambda: Stack(Small, 2_500),
    "200 levels": nested,
}


if __name__ == "__main__":
    main()
