"""Surgery on agents and mixers: the one file that knows `neuronsurgery`.

Operated on are hidden units: those of the agents' input layers and those of the hypernetworks' ReLU layers. Whatever
comes from a generated weight onward, and the agents' GRU cell and head, is left alone: a composite unit behind an
absolute value or a sigmoid could take QMIX its monotonicity and QPLEX its individual-global-max. Target networks get
the structure, and the same fresh draws, at once. Other methods write what a unit hands on as well, columns of the GRU
cell's weights say; what they write, targets get with their next update, as in the methods' sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from marl.errors import CheckpointError, SettingsError
from marl.learner import Learner
from marl.recurrence import GRUCell
from marl.run_settings import BANK_METHODS, LAYER_METHODS, SurgerySettings
from neuronsurgery import surgery

__all__ = [
    "FrozenRows",
    "Operations",
    "Seen",
    "frozen_rows",
    "load_learner",
    "operable_sites",
    "operate_on_layers",
    "operate_on_units",
    "reset_optimizer",
    "stagnant_share",
    "unit_shares",
    "unit_shares_of_norms",
    "write_fades",
]

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
class _NextBatch:
    """The batch that the next update learns from."""

    episodes: TensorDict = field(default_factory=TensorDict)


class Operations:
    """What is operated on in a run, and when.

    `see` is called with each batch before the learner's update, `step` after it.

    Raises:
        SettingsError: there is nothing to operate on, or no schedule that is as the settings say.
    """

    def __init__(self, learner: Learner, settings: SurgerySettings, *, seed: int) -> None:
        self._learner, self._next = learner, _NextBatch()
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
        batch = self._next  # and not these operations, which what listens to the networks would keep for ever
        options = {
            "look": surgery.Every(1) if settings.look is None else surgery.Last(settings.look),
            "sites": self._sites,
            "cooldown": settings.cooldown,
            "max_share": settings.max_share,
            "weights": lambda site, _: sample_weights(batch.episodes, site),
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
            self._next.episodes = episodes
            if any(site.startswith("mixer.") for site in self._sites):
                _require_states(episodes)

    def unobserved(self) -> AbstractContextManager[None]:
        """A block whose passes operations do not go by, as they are no training."""
        return surgery.unobserved()

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


# -- by hand, for learners that are run in other ways than by `marl.training`

Norms = Mapping[str, tuple[Tensor, Tensor]]
"""Site -> the 2-norms of its rows and of their gradients, each (H,)."""


@dataclass(frozen=True)
class Seen:
    """What was seen of a learner's units, to choose by."""

    norms: Sequence[Norms] = ()
    """Those of some updates."""
    probed: TensorDict | None = None
    """Episodes to measure activations on, for criteria that look at them."""
    sites: surgery.Sites | None = None
    """The operable sites where they are known, as finding them takes as long as operating; None: they are found."""


def operate_on_units(
    learner: Learner, settings: SurgerySettings, seen: Seen, *, seed: int, is_shuffled: bool = False
) -> Mapping[str, tuple[int, ...]]:
    """Operate now on the units that the settings' criterion chooses; returns which those were, by site.

    `is_shuffled` takes as many other units of each site, drawn at random: a criterion without its judgment.

    Raises:
        SettingsError: there is nothing to operate on, or the library refuses.
    """
    generator = torch.Generator().manual_seed(seed)
    try:
        sites = _sites_for(learner, settings, seen.sites)
        evidence, criterion = _evidence(learner, sites, seen), _criterion(settings, sites)
        if is_shuffled:
            criterion = _shuffled(criterion, sites, evidence, generator)
        options: dict[str, Any] = {"sites": sites, "optimizer": learner.optimizer, "generator": generator}
        if settings.method in BANK_METHODS:
            how = ("max_growth", "retire", "cooldown")
            options |= {name: getattr(settings, name) for name in how}
        report = METHODS[settings.method](learner.online, criterion, evidence=evidence, **options)
    except surgery.SurgeryError as error:
        raise SettingsError(f"surgery: {error}") from error
    operated: Mapping[str, tuple[int, ...]] = report.operated
    return operated


def operate_on_layers(
    learner: Learner, method: str, layers: Sequence[str] | None, *, seed: int, **options: float
) -> None:
    """Reset, scale or perturb whole layers now; None: all.

    Raises:
        SettingsError: there are no such layers or methods.
    """
    act: Callable[..., Any] = {**METHODS, "scale_head": surgery.scale_head}[method]
    arguments: dict[str, Any] = {"layers": layers, "optimizer": learner.optimizer, **options}
    if method not in ("scale_head", "reset_optimizer"):  # the others draw
        arguments["generator"] = torch.Generator().manual_seed(seed)
    try:
        act(learner.online, **arguments)
    except surgery.SurgeryError as error:
        raise SettingsError(f"surgery: {error}") from error


def unit_shares_of_norms(sites: surgery.Sites, norms: Sequence[Norms]) -> dict[str, float]:
    """The shares of stagnant units in each part, `agent/stagnant` and so on, by what was seen in some updates."""
    evidence = _evidence_of_norms(sites, norms)
    chosen = surgery.select(surgery.score(sites, evidence, surgery.Stagnant())).units
    shares = {}
    for part in OPERABLE:
        own = _of_parts(sites, part)
        num_units = sum(site.num_units for site in own.values())
        if num_units:
            shares[f"{part}/stagnant"] = sum(len(chosen.get(site, ())) for site in own) / num_units
    return shares


def stagnant_share(weight: Tensor, gradient: Tensor) -> Tensor:
    """The share of units that are stagnant (...) by the 2-norms of their weights and of their gradients, (..., H).

    For weights that are no parameters, of which the library knows nothing.

    >>> stagnant_share(torch.ones(4), torch.tensor([0.1, 1.0, 1.0, 1.0]))
    tensor(0.2500)
    """
    activity = gradient / (weight + torch.finfo(weight.dtype).tiny)
    is_stagnant = activity < surgery.Stagnant().threshold * activity.mean(dim=-1, keepdim=True)
    share: Tensor = is_stagnant.to(weight.dtype).mean(dim=-1)
    return share


@dataclass(frozen=True, eq=False)
class FrozenRows:
    """The frozen members of a layer's composite units, in the order in which they were added; K of them."""

    weight: Tensor
    """(K, I), a view of what the layer has."""
    bias: Tensor
    """(K,), likewise."""
    unit: Tensor
    """The unit that each belongs to, (K,) int64."""
    sign: Tensor
    """1 for knowledge, -1 for compensation, (K,)."""
    operation: Tensor
    """The operation that made it, (K,) int64."""
    birth: Tensor
    """The optimizer's step at that operation, (K,)."""
    retire: Tensor
    """Over how many steps it fades to zero, (K,); infinite for those that stay."""
    fade: Tensor
    """What it counts at most, (K,): 1, or less where it was said by what came before."""


def frozen_rows(networks: nn.Module) -> dict[str, FrozenRows]:
    """The frozen members of all composite units, by site; only sites that have some."""
    state, found = networks.state_dict(), {}
    if not any(".composite." in name for name in state):
        return {}
    for site, members in surgery.composites(networks).members.items():
        num_rows = len(members)
        found[site] = FrozenRows(
            weight=state[f"{site}.composite.frozen_weight"][:num_rows],
            bias=state[f"{site}.composite.frozen_bias"][:num_rows],
            unit=torch.tensor([member.unit for member in members]),
            sign=torch.tensor([1 if member.role == "knowledge" else -1 for member in members]),
            operation=torch.tensor([member.operation for member in members]),
            birth=torch.tensor([float(member.births[0]) for member in members]),
            retire=torch.tensor([float(member.retire or torch.inf) for member in members]),
            fade=torch.ones(num_rows) if (fade := _fade(networks, site)) is None else fade[:num_rows].clone(),
        )
    return found


def write_fades(networks: nn.Module, rows: Mapping[str, FrozenRows], step: int) -> None:
    """Bring members that retire to where they are after this step of the optimizer, which others have taken."""
    for site, own in rows.items():
        fade = _fade(networks, site)
        if fade is not None:
            left = (1 - (step - own.birth) / own.retire).clamp(0, 1)
            fade[: len(left)] = torch.minimum(fade[: len(left)], left)


def _fade(networks: nn.Module, site: str) -> Tensor | None:
    """What a bank's rows are multiplied by, in storage that may be written; none where no row retires."""
    return dict(networks.get_submodule(f"{site}.composite").named_buffers()).get("fade")


def _evidence(learner: Learner, sites: surgery.Sites, seen: Seen) -> surgery.Evidence:
    if seen.probed is None:
        return _evidence_of_norms(sites, seen.norms)
    return surgery.probe(
        learner.online, [seen.probed], lambda _, batch: learner.estimate(batch).loss.sum(), sites=sites
    )


def _evidence_of_norms(sites: surgery.Sites, norms: Sequence[Norms]) -> surgery.Evidence:
    evidence = surgery.Evidence(sites)
    for each in norms:
        evidence.record_step({site: each[site] for site in sites})
    return evidence


def _shuffled(
    criterion: surgery.Criterion, sites: surgery.Sites, evidence: surgery.Evidence, generator: torch.Generator
) -> surgery.Criterion:
    chosen = surgery.select(surgery.score(sites, evidence, criterion)).units
    orders = {name: torch.randperm(site.num_units, generator=generator) for name, site in sites.items()}
    return surgery.Units({name: orders[name][: len(units)].tolist() for name, units in chosen.items() if units})


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


def unit_shares(
    learner: Learner, episodes: TensorDict, loss_of: Callable[[TensorDict], Tensor] | None = None
) -> dict[str, float]:
    """Shares of hidden units in each condition, measured on a batch of episodes; the learner is left as it was.

    Named `agent/stagnant`, `mixer/dead` and so on. With a constant state half of a hypernetwork's ReLUs are off from
    the start, so these say little without those at initialization beside them; where a unit's weights are near zero
    beside its bias, `stagnant_with_bias` is the one to look at. `loss_of` is called once with the episodes, for the
    loss to differentiate; by default the learner's.

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
        lambda _, batch: learner.estimate(batch).loss.sum() if loss_of is None else loss_of(batch),
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


def _sites_for(learner: Learner, settings: SurgerySettings, known: surgery.Sites | None = None) -> surgery.Sites:
    """The sites that a method chooses units from, of those that are known; none for methods of whole layers.

    Raises:
        SettingsError: there are none.
    """
    if settings.method in LAYER_METHODS:
        return surgery.Sites({})
    parts = " and ".join(settings.parts)
    sites = operable_sites(learner, *settings.parts) if known is None else _of_parts(known, *settings.parts)
    if not sites:
        raise SettingsError(
            f"{settings.method} is to operate on {parts}, which have no hidden units of their own: choose other parts "
            "or another mixer"
        )
    if settings.method in BANK_METHODS:
        return sites
    consumers = surgery.consumers(learner.online)
    written = sites.subset(site for site in sites if site in consumers.readers)
    if not written:
        reasons = "; ".join(f"{site}: {consumers.declined[site]}" for site in sites)
        raise SettingsError(
            f"{settings.method} writes the outgoing weights of units, which are known of none in {parts} ({reasons}): "
            "choose other parts, or knife, which leaves them alone"
        )
    return written


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
