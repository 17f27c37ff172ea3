"""What is done at a switch from task to task, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from marl.errors import SettingsError
from marl.learner import Learner
from marl.reproduce.matrix.outgoing import renew_outgoing
from marl.reproduce.matrix.units import Lack
from marl.run_settings import SurgerySettings
from marl.surgery import Seen, frozen_rows, operate_on_layers, operate_on_units

__all__ = ["Intervention", "Layers", "NOTHING", "Occasion", "Units"]


@dataclass(frozen=True)
class Occasion:
    """When something is done in each task but the first."""

    after: int = 0
    """Updates of the task before it; 0: at the switch."""
    every: int | None = None
    """Updates until it is done again; none: once a task."""
    stride: int = 1
    """Each how-manieth of those updates is looked at."""

    def __post_init__(self) -> None:
        if self.after < 0 or self.stride < 1 or (self.every is not None and self.every < 1):
            raise SettingsError(f"there is no such occasion as {self}: give numbers of updates")

    def is_now(self, num_updates: int) -> bool:
        """Whether it is, after so many updates of a task.

        >>> [update for update in range(100) if Occasion(10, every=40).is_now(update)]
        [10, 50, 90]
        """
        past = num_updates - self.after
        return past == 0 or (past > 0 and self.every is not None and past % self.every == 0)

    def is_seen(self, num_updates: int) -> bool:
        """Whether the update that made them so many is looked at."""
        return (num_updates - self.after) % self.stride == 0 and (num_updates <= self.after or self.every is not None)


@dataclass(frozen=True)
class Layers:
    """Whole layers are changed."""

    method: Literal["reset", "reset_optimizer", "scale_head", "shrink_and_perturb"]
    """How."""
    layers: tuple[str, ...] | Literal["hidden", "all"] = "all"
    """Names of modules; the hidden layers; or all."""
    factor: float | None = None
    """Of `scale_head`."""

    def act(self, learner: Learner, sites: Sequence[str], seed: int) -> None:
        """Change them."""
        layers = self.layers if isinstance(self.layers, tuple) else {"hidden": tuple(sites), "all": None}[self.layers]
        options = {} if self.factor is None else {"factor": self.factor}
        operate_on_layers(learner, self.method, layers, seed=seed, **options)

    @property
    def name(self) -> str:
        """In a few words."""
        return " ".join([self.method, *([self.layers] if isinstance(self.layers, str) else self.layers)])


@dataclass(frozen=True)
class Units:
    """Single units are operated on."""

    settings: SurgerySettings
    """Method, criterion, parts and bounds; when is said by the occasion."""
    is_shuffled: bool = False
    """Whether as many other units are taken, at random."""
    state: Literal["fresh", "peers", "kept"] = "fresh"
    """What the optimizer knows of the new rows: nothing, the largest of what it knows of the others, or what it knew
    of the old ones."""
    lack: Lack | Literal["renewal"] = "nothing"
    """What composites are to be without; without renewal the active member begins as the old unit was. Without outgoing
    weights, these are drawn anew as well, and the frozen members carry the difference."""

    @property
    def lacking_member(self) -> Lack:
        """What is left out wherever composites are summed."""
        return "nothing" if self.lack == "renewal" else self.lack

    @property
    def needs_activations(self) -> bool:
        """Whether units are chosen by what they hand on, not by the norms of gradients."""
        return self.settings.criterion in ("dormant", "grama")

    def act(self, learner: Learner, seen: Seen, seed: int) -> int:
        """Operate; returns on how many units."""
        before = _moments(learner)
        seen = seen if self.needs_activations else replace(seen, probed=None)
        operated = operate_on_units(learner, self.settings, seen, seed=seed, is_shuffled=self.is_shuffled)
        if self.state != "fresh":
            _write_moments(learner, operated, before, keeps=self.state == "kept")
        if self.lack == "renewal":
            _begin_as_before(learner, operated)
        if self.lack == "outgoing":
            renew_outgoing(learner, operated, seed=seed)
        return sum(map(len, operated.values()))


@dataclass(frozen=True)
class Intervention:
    """What is done at each switch, and when."""

    act: Layers | Units | None = None
    """To what; none: nothing is done."""
    when: Occasion = field(default_factory=Occasion)
    """In each task but the first."""

    @property
    def lack(self) -> Lack:
        """What composites are without."""
        return self.act.lacking_member if isinstance(self.act, Units) else "nothing"

    def __str__(self) -> str:
        """With all that a reader would ask for.

        >>> print(Intervention(Layers("scale_head", ("agent.head",), 0.1), Occasion(100)))
        scale_head agent.head, factor 0.1, after 100 updates
        """
        act = self.act
        words = [self.name]
        if isinstance(act, Layers) and act.factor is not None:
            words.append(f"factor {act.factor:g}")
        if isinstance(act, Units):
            retire = act.settings.retire
            words += [" and ".join(act.settings.parts), "for good" if retire is None else f"retired over {retire}"]
            words += ["as many at random"] * act.is_shuffled + [f"state {act.state}"] * (act.state != "fresh")
        when = f"after {self.when.after} updates" if self.when.after else "at the switch"
        return ", ".join([*words, when + (f" and each {self.when.every}" if self.when.every else "")])

    @property
    def name(self) -> str:
        """In a few words, for the names of files.

        >>> Intervention(Layers("reset", ("agent.head",))).name
        'reset agent.head'
        """
        if self.act is None:
            return "none"
        if isinstance(self.act, Layers):
            return self.act.name
        return f"{self.act.settings.method} {self.act.settings.criterion}"


NOTHING = Intervention()


# -- what the library does not offer, as it serves comparisons alone


def _moments(learner: Learner) -> dict[str, Tensor]:
    """RMSprop's mean squares, by the names of the parameters."""
    state = learner.optimizer.state
    named = learner.online.named_parameters()
    return {name: state[each]["square_avg"].clone() for name, each in named if state.get(each)}


@torch.no_grad()
def _write_moments(
    learner: Learner, operated: Mapping[str, tuple[int, ...]], before: Mapping[str, Tensor], *, keeps: bool
) -> None:
    for site, units in operated.items():
        for name in (f"{site}.weight", f"{site}.bias"):
            state = learner.optimizer.state.get(learner.online.get_parameter(name))
            if state and name in before:
                chosen = list(units)
                state["square_avg"][chosen] = before[name][chosen] if keeps else before[name].amax(dim=0)


@torch.no_grad()
def _begin_as_before(learner: Learner, operated: Mapping[str, tuple[int, ...]]) -> None:
    """Let active members and their compensation be what the unit was: nothing is new but that it is three."""
    rows = frozen_rows(learner.online)
    for site in operated:
        own = rows[site]
        is_latest = own.operation == own.operation.max()
        knowledge, compensation = is_latest & (own.sign > 0), is_latest & (own.sign < 0)
        for name, values in (("weight", own.weight), ("bias", own.bias)):
            old = values[knowledge]
            learner.online.get_parameter(f"{site}.{name}")[own.unit[knowledge]] = old
            values[compensation] = old
