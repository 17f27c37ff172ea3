"""What an operation does under each optimizer: the table of `docs/how-to/optimizers.md`, measured and written anew.

    python -m benchmarks.optimizers

`tests/pytorch/test_every_optimizer.py` holds each row to what the table says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from neuronsurgery.errors import OptimizerError
from neuronsurgery.pytorch.corrections import family_of
from neuronsurgery.pytorch.coupled import coupled_of
from neuronsurgery.pytorch.replaying import learn
from tests.optimizer_rows import (
    COUPLED,
    EXACT,
    KINDS,
    REFUSED,
    SHAPE,
    Make,
    gradient,
    library_warnings,
    measured,
    overwrite,
    take_step,
)

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "optimizers.md"

HEADER = (
    "| optimizer | operated rows | first | peak | other rows, first step | after 50 steps |",
    "|---|---|---|---|---|---|",
)


def lines() -> Iterator[str]:
    """The rows of the table, one for each optimizer."""
    yield from HEADER
    for name, make in {**EXACT, **COUPLED}.items():
        found = [measured(make, kind, whole=name in COUPLED) for kind in KINDS]
        first, peak = (max(sizes) for sizes in zip(*((one.first, one.peak) for one in found), strict=True))
        yield (
            f"| {name} | {rule(make)} | {first:.2f} | {peak:.2f} | "
            f"{_share(max(one.others_first for one in found))} | {_share(max(one.others_last for one in found))} |"
        )
    for name, make in REFUSED.items():
        yield f"| {name} | {rule(make)} | | | | |"


def rule(make: Make) -> str:
    """What operated rows get from the optimizer, in a few words."""
    parameter = nn.Parameter(torch.randn(SHAPE))
    optimizer = make([parameter])
    take_step(optimizer, parameter, gradient(0, "random", SHAPE))
    family, coupled = family_of(optimizer), coupled_of(optimizer)
    if coupled is not None:
        return "no momentum" if "zero" in coupled.entries.values() else "the other rows' mean second moment"
    if family is not None:
        is_damped = family.first_step and optimizer.param_groups[0]["dampening"]
        return (
            "fresh state; " + "age in the bias corrections"
            if family.ages
            else "fresh state" + ("; first step undamped" if is_damped else "")
        )
    try:
        overwrite(optimizer, parameter)
    except OptimizerError:
        return "refused"
    found = learn(optimizer, optimizer.param_groups[0], parameter)
    return "fresh state" + ("; steps replayed at their age" if found.ages else "; first step replayed" * found.first)


def _share(deviation: float) -> str:
    return "identical" if deviation == 0.0 else f"{deviation:.0%}"


if __name__ == "__main__":
    torch.manual_seed(0)
    with library_warnings():
        before, after = PAGE.read_text().split(HEADER[0])
        rest = [line for line in after.splitlines(keepends=True) if not line.startswith("|")]
        PAGE.write_text(before + "\n".join(lines()) + "".join(rest))
