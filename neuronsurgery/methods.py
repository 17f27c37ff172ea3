"""The registry of methods: what each changes, whether the output stays, what it costs, and where it comes from.

People choose a method by comparing. Those that choose units take a model and a criterion as `knife` does, those that
concern whole layers a model alone; both serve a `Schedule`. What tells them apart is a row here. The page
`docs/methods.md` is made of them (`make methods`); a test holds it, and the defaults, to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from neuronsurgery.measuring import REBORN
from neuronsurgery.values import Value

__all__ = ["METHODS", "Method", "table"]


@dataclass(frozen=True)
class Method(Value):
    """One method, as a row of the table of methods.

    >>> METHODS["knife"].needs_consumers
    False
    """

    name: str
    """The name of the function or class that `surgery` offers."""
    changes: str
    """What it writes."""
    preserves: str
    """Whether the output stays: `"yes"`, `"no"`, or under which condition."""
    grows: str
    """What is added, `"no"` where nothing is."""
    needs_consumers: bool
    """Whether it writes into the layers that read the units, which then have to be known."""
    source: str
    """Author and year, and where the defaults come from."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Argument -> its default, as in the signature; those that every method has are left out."""
    deviations: str = "none"
    """Where it departs from its source, and why."""


_ROWS = (
    Method(
        name="knife",
        changes="the unit's incoming weights and bias; its old ones and a copy of the fresh ones become frozen rows",
        preserves="yes",
        grows="two frozen rows a unit",
        needs_consumers=False,
        source="arXiv 2606.25335",
        defaults={"max_growth": 4.0, "cooldown": 100, "retire": None},
    ),
    Method(
        name="fade_to_fresh",
        changes="as knife with `retire=`, less the knowledge members: a unit falls silent, and a fresh one fades in",
        preserves="no",
        grows="two rows a unit, until they have retired",
        needs_consumers=False,
        source="control",
        defaults={"max_growth": 4.0, "cooldown": 100},
    ),
    Method(
        name="redo",
        changes="the unit's incoming weights and bias, drawn anew; its outgoing weights, zero",
        preserves="no",
        grows="no",
        needs_consumers=True,
        source="ReDo: Sokar et al. 2023",
        defaults={"criterion": "dormant"},
        deviations="the threshold is 0.025, where published runs have 0, 0.025 or 0.1; weights and biases are drawn by "
        "the layer's own initializer; Adam's bias correction starts anew for what was written, and for nothing else",
    ),
    Method(
        name="regrama",
        changes="as redo, chosen by gradients of activations",
        preserves="no",
        grows="no",
        needs_consumers=True,
        source="ReGraMa: Liu et al. 2025",
        defaults={"criterion": "grama"},
        deviations="as redo; norms between weights and activation function are reset with their unit, others are left",
    ),
    Method(
        name="reborn",
        changes="incoming weights of dormant units, scaled copies of a donor's; their outgoing weights, shares of its",
        preserves="for positively homogeneous activation functions, where the dormant units handed nothing on",
        grows="no",
        needs_consumers=True,
        source="ReBorn: Qin et al. 2024, as its code has it",
        defaults={"criterion": REBORN, "over_active": 3.0, "per_donor": 5, "scale": (0.3, 0.8)},
        deviations="on all sites, not on a mixer alone; optimizer state of what was written is a fresh one's; declined "
        "behind norms",
    ),
    Method(
        name="widen",
        changes="nothing of what is there but outgoing weights, of which a copy of the unit takes a part",
        preserves="yes",
        grows="one unit for each that is split, all of it trained",
        needs_consumers=True,
        source="Net2WiderNet: Chen et al. 2016",
        deviations="outgoing weights are shared out at random, not equally, so that no noise is needed; units may be "
        "chosen by a criterion",
    ),
    Method(
        name="ContinualBackprop",
        changes="as redo, the least useful unit when one is due; its mean effect is added to its consumers' biases",
        preserves="no",
        grows="no",
        needs_consumers=True,
        source="Dohare et al. 2024, as its code has it (contribution utility)",
        defaults={"rate": 1e-4, "maturity": 100, "decay": 0.99},
        deviations="any optimizer, corrected; fractions of units accumulate; no bias is corrected behind a maximum, a "
        "nonlinear function, a norm, or by a grouped convolution",
    ),
    Method(
        name="CCBP",
        changes="incoming weights and biases move towards a fresh draw, outgoing ones towards zero, by a share that "
        "falls with gradient",
        preserves="no",
        grows="no",
        needs_consumers=True,
        source="the formula alone, as a package has it",
        defaults={"rate": 0.015, "every": 1000, "decay": 0.99, "sharpness": 16.0},
        deviations="not known, and chosen here: biases move as weights do, each move draws anew, running means are "
        "corrected for where they started",
    ),
    Method(
        name="reset",
        changes="all weights, biases and running statistics of the layers, drawn anew or as stored",
        preserves="no",
        grows="no; frozen rows and injections of the layers go",
        needs_consumers=False,
        source="Nikishin et al. 2022",
        defaults={"layers": None},
        deviations="which layers are the last is told by an example's graph; the optimizer's state is a fresh one's "
        "in any class, counts of steps included",
    ),
    Method(
        name="reset_optimizer",
        changes="the optimizer's state alone",
        preserves="yes",
        grows="no",
        needs_consumers=False,
        source="control",
        defaults={"layers": None},
    ),
    Method(
        name="scale_head",
        changes="weights and biases of output layers, times a factor",
        preserves="no: it is scaled",
        grows="no",
        needs_consumers=False,
        source="control",
        defaults={"layers": 1},
    ),
    Method(
        name="shrink_and_perturb",
        changes="all weights and biases of the layers: scaled down, and a part of fresh or stored ones added",
        preserves="no",
        grows="no",
        needs_consumers=False,
        source="Ash & Adams 2020; defaults of D'Oro et al. 2023 and MARR (2024)",
        defaults={"layers": None, "shrink": 0.8, "perturb": 0.2},
        deviations="the noise is a draw of each layer's initializer, not a normal of one width; the optimizer's state "
        "stays",
    ),
    Method(
        name="plasticity_injection",
        changes="all weights and biases of a module; the old and a copy of the fresh become frozen copies",
        preserves="yes",
        grows="two frozen copies of the module",
        needs_consumers=False,
        source="Nikishin et al. 2023",
        deviations="the trained copy lives in the module's own parameters, and their optimizer state is a fresh one's; "
        "running statistics stay; modules with dropout are refused",
    ),
    Method(
        name="regenerative_regularizer",
        changes="the loss: a penalty towards the initial weights",
        preserves="yes",
        grows="a copy of the weights",
        needs_consumers=False,
        source="L2 Init: Kumar et al. 2023",
        defaults={"layers": None},
        deviations="norms and scales are left out, as in its code",
    ),
    Method(
        name="l2_regularizer",
        changes="the loss: a penalty towards zero",
        preserves="yes",
        grows="no",
        needs_consumers=False,
        source="control",
        defaults={"layers": None},
        deviations="norms and scales are left out",
    ),
    Method(
        name="spectral_regularizer",
        changes="the loss: a penalty towards largest singular values of one, and towards biases of zero",
        preserves="yes",
        grows="a vector for each weight",
        needs_consumers=False,
        source="Lewandowski et al. 2025",
        defaults={"layers": None, "exponent": 2, "num_iterations": 1},
        deviations="norms and scales are left out; the power iteration starts with 32 steps",
    ),
    Method(
        name="upgd",
        changes="the optimizer: useful weights are moved and perturbed less",
        preserves="yes",
        grows="no",
        needs_consumers=False,
        source="UPGD: Elsayed & Mahmood 2024, first-order global utility, defaults of its code",
        defaults={"lr": 1e-5, "weight_decay": 1e-3, "beta_utility": 0.999, "sigma": 1e-3},
        deviations="where the largest utility is zero, all weights are taken for equally useful",
    ),
)

METHODS: Mapping[str, Method] = {method.name: method for method in _ROWS}
"""The methods by name, in the order of the table."""

_COLUMNS = ("method", "changes", "preserves the output", "grows", "needs consumers", "defaults", "source", "deviations")


def table() -> str:
    """Returns all methods as a Markdown table.

    >>> print(table().splitlines()[0])
    | method | changes | preserves the output | grows | needs consumers | defaults | source | deviations |
    """
    head = [_line(_COLUMNS), _line("---" for _ in _COLUMNS)]
    return "\n".join([*head, *(_line(_cells(method)) for method in METHODS.values())])


def _cells(method: Method) -> Iterator[str]:
    yield f"`{method.name}`"
    yield from (method.changes, method.preserves, method.grows)
    yield "yes" if method.needs_consumers else "no"
    yield ", ".join(f"`{name}={value!r}`" for name, value in method.defaults.items())
    yield from (method.source, method.deviations)


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
