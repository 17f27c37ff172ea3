"""Surgery on agents and mixers: the one file that knows `neuronsurgery`.

Operated on are hidden units: those of the agents' input layers and those of the hypernetworks' ReLU layers. Whatever
comes from a generated weight onward, and the agents' GRU cell and head, is left alone: a composite unit behind an
absolute value or a sigmoid could take QMIX its monotonicity and QPLEX its individual-global-max. Target networks get
the structure, and the same fresh draws, at once. Other methods write what a unit hands on as well, columns of the GRU
cell's weights say; what they write, targets get with their next update, as in the methods' sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from marl.errors import CheckpointError, SettingsError
from marl.learner import Learner
from marl.recurrence import GRUCell
from marl.run_settings import BANK_METHODS, LAYER_METHODS, SurgerySettings
from neuronsurgery import surgery

__all__ = ["Operations", "load_learner", "operable_sites", "reset_optimizer", "unit_shares"]

surgery.declare_consumer(GRUCell, {"weight_ih": "bias_ih"})  # no graph shows it behind a gradient by hand

OPERABLE = {
    "agent": ("agent.encoder.",),
    "mixer": ("mixer.w1.", "mixer.w2.", "mixer.v.", "mixer.transformation.", "mixer.attention."),
}
"""Part -> the modules whose hidden units are operated on."""

Done = surgery.Report | surgery.LayerReport | surgery.Plan
"""What an operation leaves behind."""

METHODS: dict[str, Callable[..., Any]] = {
    "knife": surgery.knife,
    "fade_to_fresh": surgery.fade_to_fresh,
    "redo": surgery.redo,
    "regrama": surgery.regrama,
    "reborn": surgery.reborn,
    "reset": surgery.reset,
    "reset_optimizer": surgery.reset_optimizer,
    "shrink_and_perturb": surgery.shrink_and_perturb,
}

CONDITIONS = {
    "stagnant": surgery.Stagnant(),
    "stagnant_with_bias": surgery.Stagnant(bias=True),
    "dormant": surgery.Dormant(),
    "grama": surgery.GraMa(),
}
"""What shares of units are reported of, beside the dead ones, which never fire."""

FRACTION = 0.25
"""Of units that `lowest` and `random` choose unless it is said."""


def operable_sites(learner: Learner, *parts: str) -> surgery.Sites:
    """The layers of these parts whose hidden units are operated on.

    >>> from marl.run import make_run
    >>> from marl.run_settings import run_settings
    >>> tuple(operable_sites(make_run(run_settings("qmix", "predator_prey_tiny")).learner, "agent", "mixer"))
    ('agent.encoder.0', 'mixer.w1.0', 'mixer.w2.0', 'mixer.v.0')
    """
    return _of_parts(surgery.discover(learner.online), *parts)


@dataclass
class Seen:
    """The batch that the next update learns from."""

    episodes: TensorDict = field(default_factory=TensorDict)


class Operations:
    """What is operated on in a run, and when.

    `see` is called with each batch before the learner's update, `step` after it.

    Raises:
        SettingsError: there is nothing to operate on, or no schedule that is as the settings say.
    """

    def __init__(self, learner: Learner, settings: SurgerySettings, *, seed: int) -> None:
        self._learner, self._seen = learner, Seen()
        self._schedule: surgery.Schedule | None = None
        if settings.method != "none":
            try:
                self._sites = _sites_for(learner, settings)
                self._schedule = self._scheduled(settings, torch.Generator().manual_seed(seed))
            except surgery.SurgeryError as error:
                raise SettingsError(f"surgery: {error}") from error

    def _scheduled(self, settings: SurgerySettings, generator: torch.Generator) -> surgery.Schedule:
        options: dict[str, Any] = {"operate": _trigger(settings), "method": METHODS[settings.method]}
        if settings.method != "reset_optimizer":
            options["generator"] = generator
        if settings.method in LAYER_METHODS:
            options["layers"] = settings.layers or settings.parts
        else:
            options |= self._of_units(settings)
        criterion = None if settings.method in LAYER_METHODS else _criterion(settings, self._sites)
        return surgery.Schedule(self._learner.online, self._learner.optimizer, criterion, **options)

    def _of_units(self, settings: SurgerySettings) -> dict[str, Any]:
        seen = self._seen  # and not these operations, which what listens to the networks would keep for ever
        options = {
            "look": surgery.Every(1) if settings.look is None else surgery.Last(settings.look),
            "sites": self._sites,
            "cooldown": settings.cooldown,
            "max_share": settings.max_share,
            "weights": lambda site, _: sample_weights(seen.episodes, site),
        }
        if settings.method in BANK_METHODS:
            options |= {"max_growth": settings.max_growth, "mirrors": self._learner.target}
            options |= {} if settings.retire is None else {"retire": settings.retire}
        return options

    def __str__(self) -> str:
        return "no operations" if self._schedule is None else str(self._schedule)

    def see(self, episodes: TensorDict) -> None:
        """Take note of the batch that the next update learns from.

        Raises:
            SettingsError: hypernetworks are to be operated on, and all states are zero.
        """
        if self._schedule is not None:
            self._seen.episodes = episodes
            if any(site.startswith("mixer.") for site in self._sites):
                _require_states(episodes)

    def step(self) -> Done | None:
        """Operate if it is time; called after each update."""
        return None if self._schedule is None else self._schedule.step()

    def task_changed(self) -> Done | None:
        """Say that another task begins, and operate if that is an occasion."""
        return None if self._schedule is None else self._schedule.task_changed()

    def counts(self) -> dict[str, float | int | str]:
        """How often was operated, and what the networks carry of it."""
        if self._schedule is None:
            return {}
        composites = surgery.composites(self._learner.online)
        return {
            "surgery/operations": self._schedule.num_operations,
            "surgery/units": composites.num_units,
            "surgery/frozen_rows": composites.num_rows,
        }

    def state_dict(self) -> dict[str, Any]:
        """What the schedule remembers; empty without one."""
        return {} if self._schedule is None else self._schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the learner is to be loaded before.

        Raises:
            CheckpointError: it was saved with other settings.
        """
        if bool(state) != (self._schedule is not None):
            saved, here = ("with", "without") if state else ("without", "with")
            raise CheckpointError(f"the run was saved {saved} surgery and is now {here}: use the settings of the run")
        if self._schedule is not None:
            try:
                self._schedule.load_state_dict(state)
            except surgery.SurgeryError as error:
                raise CheckpointError(str(error)) from error


def load_learner(learner: Learner, state: Mapping[str, Any]) -> None:
    """Let a learner go on from a saved state, frozen members and all.

    Raises:
        CheckpointError: the state is that of other networks.
    """
    surgery.accept(learner.online)
    surgery.accept(learner.target)
    try:
        learner.load_state_dict(state)
        surgery.attach(learner.online, learner.optimizer)
    except surgery.SurgeryError as error:
        raise CheckpointError(str(error)) from error


def reset_optimizer(learner: Learner) -> None:
    """Give a learner's optimizer the state of a fresh one; its weights stay, frozen members and all."""
    surgery.reset_optimizer(learner.online, optimizer=learner.optimizer)


def unit_shares(learner: Learner, episodes: TensorDict) -> dict[str, float]:
    """Shares of hidden units in each condition, measured on a batch of episodes; the learner is left as it was.

    Named `agent/stagnant`, `mixer/dead` and so on. With a constant state half of a hypernetwork's ReLUs are off from
    the start, so these say little without those at initialization beside them; where a unit's weights are near zero
    beside its bias, `stagnant_with_bias` is the one to look at.

    >>> from marl.rollout import collect
    >>> from marl.run import make_run
    >>> from marl.run_settings import run_settings
    >>> run = make_run(run_settings("vdn", "predator_prey_tiny"))
    >>> sorted(unit_shares(run.learner, collect(run.environment, run.agent, epsilon=1.0, seed=0)))
    ['agent/dead', 'agent/dormant', 'agent/grama', 'agent/stagnant', 'agent/stagnant_with_bias']
    """
    evidence = surgery.probe(
        learner.online,
        [episodes],
        lambda _, batch: learner.estimate(batch).loss.sum(),
        weights=lambda site, _: sample_weights(episodes, site),
    )
    selections = {
        name: surgery.select(surgery.score(evidence.sites, evidence, criterion))
        for name, criterion in CONDITIONS.items()
    }
    shares = {}
    for part in OPERABLE:
        sites = _of_parts(evidence.sites, part)
        num_units = sum(site.num_units for site in sites.values())
        if num_units:
            shares[f"{part}/dead"] = sum(_num_dead(evidence, site) for site in sites) / num_units
        for name, selection in selections.items() if num_units else ():
            shares[f"{part}/{name}"] = sum(len(selection.units.get(site, ())) for site in sites) / num_units
    return shares


def sample_weights(episodes: TensorDict, site: str) -> Tensor:
    """Which samples of a site happened: steps that were taken, by agents that were still in the game.

    An agent that is out of the game sees nothing. The layout is that of the activations: (T + 1, B, N) for agents,
    (B, T) for mixers.
    """
    mask: Tensor = episodes["mask"]
    if not site.startswith("agent."):
        return mask
    taken = torch.cat([mask, torch.zeros_like(mask[..., :1])], dim=-1)
    sees = episodes["obs"].any(dim=-1)
    happened: Tensor = taken.unsqueeze(-1) & sees
    return happened.transpose(-2, -3)


def _of_parts(sites: surgery.Sites, *parts: str) -> surgery.Sites:
    prefixes = tuple(prefix for part in parts for prefix in OPERABLE[part])
    return sites.subset(name for name in sites if name.startswith(prefixes))


def _sites_for(learner: Learner, settings: SurgerySettings) -> surgery.Sites:
    """The sites that a method chooses units from; none for methods of whole layers.

    Raises:
        SettingsError: there are none.
    """
    if settings.method in LAYER_METHODS:
        return surgery.Sites({})
    sites, parts = operable_sites(learner, *settings.parts), " and ".join(settings.parts)
    if not sites:
        raise SettingsError(
            f"{settings.method} is to operate on {parts}, which have no hidden units of their own: choose other parts "
            "or another mixer"
        )
    if settings.method in BANK_METHODS:
        return sites
    consumers = surgery.consumers(learner.online)
    known = sites.subset(site for site in sites if site in consumers.readers)
    if not known:
        reasons = "; ".join(f"{site}: {consumers.declined[site]}" for site in sites)
        raise SettingsError(
            f"{settings.method} writes the outgoing weights of units, which are known of none in {parts} ({reasons}): "
            "choose other parts, or knife, which leaves them alone"
        )
    return known


def _criterion(settings: SurgerySettings, sites: surgery.Sites) -> surgery.Criterion:
    threshold = settings.threshold
    of_threshold: dict[str, Any] = {} if threshold is None else {"threshold": threshold}
    fraction = FRACTION if threshold is None else threshold
    match settings.criterion:
        case "stagnant":
            return surgery.Stagnant(bias=settings.bias, **of_threshold)
        case "dormant":
            return surgery.Dormant(**of_threshold)
        case "grama":
            return surgery.GraMa(**of_threshold)
        case "lowest":
            return surgery.Lowest(fraction, of=surgery.Stagnant(bias=settings.bias))
        case "random":
            return surgery.Random(fraction)
        case _:
            return surgery.Units({name: range(site.num_units) for name, site in sites.items()})


def _trigger(settings: SurgerySettings) -> surgery.Trigger:
    triggers: list[surgery.Trigger] = []
    if settings.every is not None:
        triggers.append(surgery.Every(settings.every))
    if settings.after_task_change is not None:
        triggers.append(surgery.TaskChange(after=settings.after_task_change))
    return reduce(or_, triggers)


def _require_states(episodes: TensorDict) -> None:
    """Behind a state of zeros the weights of a hypernetwork's first layer never get a gradient."""
    if not episodes["state"].any():
        raise SettingsError(
            "hidden units of hypernetworks are to be operated on, but all states are zero, so that their weights get "
            'no gradient and no score means anything: give the environment state="ones", or operate on agents only'
        )


def _num_dead(evidence: surgery.Evidence, site: str) -> int:
    return int((evidence.measured(site)[surgery.Quantity.ACTIVATION] == 0).sum())
