"""What is measured of each seed while it learns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from marl.losses import masked_mean
from marl.mixers import QMIX
from marl.reproduce.matrix.learners import agent_values, joint_values
from marl.reproduce.matrix.seeds import Seeds
from marl.reproduce.matrix.tasks import NUM_ACTIONS, Tasks
from marl.reproduce.matrix.units import StackedUnits

__all__ = ["Outcome", "measure"]

PARTS = ("agent", "mixer")
SATURATED = -3.0
"""Below it the slope of an ELU is under 0.05."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """How well a task is played and known now; a value for each seed (R,)."""

    solved: Tensor
    """Share of contexts in which greedy agents take the best joint action."""
    regret: Tensor
    """What they earn less than the best, in standard deviations of the task's payoffs."""
    error: Tensor
    """Root mean square error of the joint values of all joint actions, in standard deviations of the payoffs."""
    spread: Tensor
    """Each agent's best minus worst value, mean over agents and contexts."""
    saturated: Tensor | None
    """Share of the inputs of QMIX's mixing units below -3, over contexts and joint actions."""
    dead: Mapping[str, Tensor]
    """Part -> share of its units that are zero in all contexts, for all agents and joint actions."""

    def of(self, seed: int) -> dict[str, Any]:
        """What a file holds of one seed."""
        plain = {name: getattr(self, name) for name in ("solved", "regret", "error", "spread", "saturated")}
        numbers = {name: float(value[seed]) for name, value in plain.items() if value is not None}
        return numbers | {f"{part}/dead": float(share[seed]) for part, share in self.dead.items()}


@torch.no_grad()
def measure(seeds: Seeds, tasks: Tasks, task: int) -> Outcome:
    """Measure all contexts and joint actions of a task."""
    learner, payoffs = seeds.together, tasks.payoffs[:, task]
    num_seeds, num_contexts = payoffs.shape[:2]
    joint = torch.cartesian_prod(torch.arange(NUM_ACTIONS), torch.arange(NUM_ACTIONS))
    with _activations(seeds) as seen:
        agent_qs = agent_values(learner, tasks.obs)
        all_qs, state = (each.repeat_interleave(len(joint), dim=1) for each in (agent_qs, tasks.obs))
        actions = joint.repeat(num_contexts, 1).expand(num_seeds, -1, -1)
        q_tot = joint_values(learner, all_qs, state, actions).reshape(num_seeds, num_contexts, -1)
    values, deviation = payoffs.flatten(2), tasks.deviation(task)
    first, second = agent_qs.argmax(dim=-1).unbind(-1)
    earned = values.gather(2, (first * NUM_ACTIONS + second).unsqueeze(-1)).squeeze(-1)
    best = values.amax(dim=-1)
    return Outcome(
        solved=(earned == best).float().mean(dim=-1),
        regret=(best - earned).mean(dim=-1) / deviation,
        error=(q_tot - values).square().mean(dim=(1, 2)).sqrt() / deviation,
        spread=(agent_qs.amax(dim=-1) - agent_qs.amin(dim=-1)).mean(dim=(1, 2)),
        saturated=_saturated(learner.online.mixer, all_qs, state, actions),
        dead=_dead(seen),
    )


def _saturated(mixer: nn.Module, agent_qs: Tensor, state: Tensor, actions: Tensor) -> Tensor | None:
    if not isinstance(mixer, QMIX):
        return None
    chosen_qs = agent_qs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    low = (mixer.mixing_inputs(chosen_qs, state) < SATURATED).float().mean(dim=-1)
    return masked_mean(low.unsqueeze(-2), torch.ones_like(low, dtype=torch.bool).unsqueeze(-2))


Seen = dict[str, Tensor]
"""Site -> whether each unit is zero throughout, (R, H)."""


@contextmanager
def _activations(seeds: Seeds) -> Iterator[Seen]:
    seen: Seen = {}

    def look(site: str, module: StackedUnits, inputs: Any, handed_on: Tensor) -> None:
        off = (handed_on[..., : module.weight.shape[1]] == 0).flatten(1, -2).all(dim=1)
        seen[site] = off & seen.get(site, torch.ones_like(off))

    handles = [layer.register_forward_hook(partial(look, site)) for site, layer in seeds.layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _dead(seen: Seen) -> dict[str, Tensor]:
    found = {}
    for part in PARTS:
        layers = [off for site, off in seen.items() if site.startswith(f"{part}.")]
        if layers:
            found[part] = torch.cat(layers, dim=-1).float().mean(dim=-1)
    return found
