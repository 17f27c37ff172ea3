"""The arms: what is done to the network in each task, one row of `ARMS` each.

An arm prepares an intervention for a network and its optimizer. The intervention is called once a task, after
the task's first epoch, with the evidence measured over that epoch; the criterion is the same in every arm
that has one.

A wide arm's network starts with as many stored weights as KNIFE's network of the same seed ends with. Left
alone, it shows what size does without an intervention; with a plain reset, what size and a reset do without
frozen rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn
from torch.optim import Adam

from neuronsurgery import surgery
from neuronsurgery.demo.networks import producer
from neuronsurgery.demo.resets import FreshRows, redraw
from neuronsurgery.evidence import Evidence

__all__ = ["ARMS", "Arm", "ArmName", "Intervention"]

MAX_GROWTH = 64.0
"""Far above what even 60 tasks need, ten frozen rows per unit, twenty in one layer: no bound interferes."""
COOLDOWN = 0
"""No unit is passed over as too young: operations are a whole task apart."""

Intervention = Callable[[Evidence], int]
"""Takes the evidence of a task's first epoch, changes the network, returns how many units it changed."""


class ArmName(str, Enum):
    """The arms, by the names the table prints."""

    NONE = "no intervention"
    RESET = "plain reset"
    WIDE = "wide, no intervention"
    WIDE_RESET = "wide, plain reset"
    KNIFE = "KNIFE"


@dataclass(frozen=True)
class Arm:
    """What an arm does with a network."""

    prepare: Callable[[nn.Module, Adam, torch.Generator], Intervention | None]
    """Gives the arm's intervention, if it has one, for a network and its optimizer."""
    legend: str
    """What the table says about the arm."""
    is_wide: bool = False
    """Whether the network is as large from the start as KNIFE's ends up."""


def _no_intervention(model: nn.Module, optimizer: Adam, generator: torch.Generator) -> None:
    return None


def _plain_reset(model: nn.Module, optimizer: Adam, generator: torch.Generator) -> Intervention:
    """Redraws the stagnant units' incoming weights; the outgoing ones stay, so the network's output jumps."""
    fresh = FreshRows(optimizer)

    def reset(evidence: Evidence) -> int:
        scores = surgery.score(surgery.discover(model), evidence, surgery.Stagnant())
        chosen = surgery.select(scores, cooldown=COOLDOWN).units
        for site, units in chosen.items():
            layer = producer(model, site)
            redraw(layer, units, generator)
            fresh.restart(layer.parameters(), units)
        return sum(map(len, chosen.values()))

    return reset


def _knife(model: nn.Module, optimizer: Adam, generator: torch.Generator) -> Intervention:
    """Replaces the stagnant units by composite units, which leaves the network's output as it is."""

    def operate(evidence: Evidence) -> int:
        report = surgery.knife(
            model,
            surgery.Stagnant(),
            evidence=evidence,
            optimizer=optimizer,
            max_growth=MAX_GROWTH,
            cooldown=COOLDOWN,
            generator=generator,
        )
        return report.num_units

    return operate


ARMS: Mapping[ArmName, Arm] = {
    ArmName.NONE: Arm(_no_intervention, "the network is left alone"),
    ArmName.RESET: Arm(
        _plain_reset,
        "the units KNIFE would choose get new random incoming weights and fresh Adam state; nothing of them\n"
        "  is kept, and their outgoing weights stay as they are",
    ),
    ArmName.WIDE: Arm(
        _no_intervention,
        "left alone; starts with as many stored weights as KNIFE's network of that seed ends with",
        is_wide=True,
    ),
    ArmName.WIDE_RESET: Arm(_plain_reset, "the same wide network, with the plain reset", is_wide=True),
    ArmName.KNIFE: Arm(_knife, "stagnant units become composite units, once a task, after its first epoch"),
}
"""Every arm; a new arm is a new row."""
