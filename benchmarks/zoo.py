"""How much of the models people train is operable: `docs/zoo.md`, measured and written anew.

    python -m benchmarks.zoo        (or: make zoo)

Hidden units are counted by watching each model run, independently of discovery; `tests/test_zoo.py` asserts what the
page says, and its thresholds.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from rich.progress import track

from tests.zoo import SPECIMENS
from tests.zoo.measuring import Census, Operated, census, operated

PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
LIBRARIES = ("torch", "transformers", "stable-baselines3", "torchrl", "einops")

INTRODUCTION = """\
# The zoo

How many hidden units of the models people train can be operated on, model by model. `make zoo` measures and writes
this page; `tests/test_zoo.py` holds it to its numbers: at least 80 % of the hidden units of each model that is not
exempt, and 95 % of those of all of them. All models are at their random initialization and small; their structure
is what counts.

## How hidden units are counted

Not by asking discovery. Each model runs once on an example batch while every operation that reaches torch's
dispatcher is watched, those inside recurrent layers and torch's own transformer layers included
(`tests/zoo/observing.py`):

- A product of a computed tensor with a weight (a linear layer, a convolution, `x @ W`, `bmm`, `einsum` ...) begins
  units: one for each column of what the weight was contracted to, or each output channel. A weight is a parameter,
  or what was computed from parameters and buffers alone (a transpose, a weight norm, added noise).
- Operations that move elements move the units with them. Arithmetic with anything else, normalization, dropout, and
  pooling over one unit's own values leave them. Where two products meet in one element, as in `W x + U h` or where
  a residual is added before the activation function, their two units are the same unit and count once.
- The units that arrive at an activation function are the hidden units, each counted once however often it is
  computed. Every element-wise nonlinearity is an activation function here, `abs`, `exp` and `clamp` included;
  powers, roots and logarithms are not, because norms and likelihoods are made of them. Softmax and attention couple
  units and count nothing.

So the gates of a GRU count, three for each number of its state, and so does a head whose `abs` keeps a mixer
monotone, although neither can become a composite unit. A unit is operable if it is in a site that discovery found,
an example given; what is not is listed with the reason discovery gives, and the tests hold each reason to a table
of what is true.

## How operating is measured

All operable units of a model are operated on at once, then twice a random half of them, with training steps in
between. The error is the largest change of any output by any of the three operations, relative to the output's
scale ([equivalence](equivalence.md)): in training mode under the same seed, in evaluation, and in evaluation
without gradients, where torch takes its fused paths. At most 1e-12 is allowed, and 2e-6 for the models that compute
in float32. Then 20 steps of Adam follow: every value of an active member that received a gradient moves, nothing
frozen does. The seconds are those of one discovery without an example, on one core.
"""


def main() -> None:
    """Measure every specimen and write the page."""
    torch.set_num_threads(1)
    measured = [(census(each), operated(each)) for each in track(SPECIMENS, "measuring the zoo")]
    PAGE.write_text("\n".join(page(measured)) + "\n", encoding="utf-8")


def page(measured: list[tuple[Census, Operated]]) -> Iterator[str]:
    """The lines of the page."""
    yield INTRODUCTION
    yield "## The models"
    yield ""
    yield f"With {', '.join(f'{each} {version(each)}' for each in LIBRARIES)}, CPython {platform.python_version()}."
    yield ""
    yield "| model | code | hidden units | operable | share | error, train | error, eval | seconds | exempt |"
    yield "|---|---|---|---|---|---|---|---|---|"
    yield from (row(*each) for each in measured)
    counts = [found for found, _ in measured]
    yield total("all that are not exempt", [each for each in counts if each.specimen.exempt is None])
    yield total("all", counts)
    yield ""
    yield from reasons(counts)


def row(found: Census, done: Operated) -> str:
    """One model's line."""
    specimen = found.specimen
    evaluated = max(done.errors["eval"], done.errors["served"])
    numbers = f"{found.num_hidden} | {found.num_operable} | {found.share:.0%}"
    measured = f"{done.errors['train']:.1e} | {evaluated:.1e} | {found.seconds:.2f}"
    return f"| {specimen.name} | {specimen.origin} | {numbers} | {measured} | {specimen.exempt or ''} |"


def total(label: str, counts: list[Census]) -> str:
    """The line that sums models up."""
    hidden, operable = sum(each.num_hidden for each in counts), sum(each.num_operable for each in counts)
    seconds = sum(each.seconds for each in counts)
    return f"| **{label}** | | {hidden} | {operable} | {operable / hidden:.1%} | | | {seconds:.2f} | |"


def reasons(counts: list[Census]) -> Iterator[str]:
    """What is declined, and why, in discovery's own words."""
    yield "## What is declined"
    yield ""
    yield "| model | producer | hidden units | reason |"
    yield "|---|---|---|---|"
    for found in counts:
        for producer, each in found.declined.items():
            yield f"| {found.specimen.name} | `{producer}` | {each.num_units} | {shown(each.reason)} |"


def shown(reason: str) -> str:
    """A reason in a table: files by their name alone, wherever they are installed."""
    return re.sub(r"(?<=\()/\S*/", "", reason).replace("|", "\\|") or "not listed"


if __name__ == "__main__":
    main()
