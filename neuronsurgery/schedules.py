"""Schedules: operate in the middle of a training run, when a trigger says so, on what was measured until then.

A schedule is called after each optimizer step, as a learning-rate schedule is. It counts the steps, has a window of
them measured, asks its trigger, and, when that is due, selects units by a criterion, within bounds, and hands them to a
method such as `knife`. Everything it remembers is tensors, numbers and strings, so that a run that was killed goes on
as if nothing had happened.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from neuronsurgery.choosing import Custom, Selected
from neuronsurgery.combining import Criterion
from neuronsurgery.errors import ScheduleError
from neuronsurgery.evidence import Quantity
from neuronsurgery.layer_reports import LayerReport
from neuronsurgery.plans import MAX_GROWTH, Plan, plan
from neuronsurgery.reports import Report
from neuronsurgery.scores import score
from neuronsurgery.selection import Selection, capped, select
from neuronsurgery.stepping import Stepping
from neuronsurgery.tables import counted, render
from neuronsurgery.triggers import Every, Last, Memory, Moment, Over, Plateau, Share, TaskChange, Trigger, require_count

if TYPE_CHECKING:
    from neuronsurgery.backend import Backend, Watch

__all__ = ["Act", "Births", "Scheduling", "Settings", "needs_of"]

FORMAT = 1

ScheduleT = TypeVar("ScheduleT", bound="Scheduling")


@dataclass(frozen=True)
class Settings:
    """What decides when and on what a schedule operates; a state belongs to one such choice."""

    criterion: Criterion | None
    """None: the method concerns whole layers."""
    operate: Trigger
    look: Every | Last
    cooldown: int
    max_units: int | None
    max_share: float | None

    def __post_init__(self) -> None:
        if not isinstance(self.operate, Trigger):
            raise ScheduleError(
                f"operate={self.operate!r} is no trigger; pass Every(1000), TaskChange(), Plateau(10), Share(0.1), or "
                "a combination of them with | and &"
            )
        if not isinstance(self.look, (Every, Last)):
            raise ScheduleError(f"look={self.look!r} says not which steps to look at; pass Every(10) or Last(100)")
        require_count("cooldown", self.cooldown, least=0)
        self._require_units()
        if self.max_units is not None:
            require_count("max_units", self.max_units)
        if self.max_share is not None and not 0 < self.max_share <= 1:
            raise ScheduleError(f"max_share is {self.max_share!r}; it is a share of a site's units, above 0, at most 1")

    def _require_units(self) -> None:
        """Refuse what asks for units of a schedule that chooses none."""
        asked = {"max_units": self.max_units, "max_share": self.max_share}
        named = [f"{name}={value}" for name, value in asked.items() if value is not None]
        named += [str(leaf) for leaf in self.operate.leaves() if isinstance(leaf, Share)]
        if self.criterion is None and named:
            raise ScheduleError(f"{', '.join(named)} asks how many units are chosen, and criterion=None chooses none")

    @property
    def window(self) -> int | None:
        """How many steps are looked at before an operation; None: all of them."""
        return self.look.num_steps if isinstance(self.look, Last) else None

    @property
    def stride(self) -> int:
        """Each how-manieth step of the window is measured."""
        return self.look.every if isinstance(self.look, Last) else self.look.num_steps


@dataclass(frozen=True)
class Act:
    """What a schedule does with the units it selected."""

    method: Callable[..., Any]
    arguments: Mapping[str, Any]
    """What the method takes, beside model and criterion."""
    takes_criterion: bool = True
    verify: Any = None
    """A batch, or a function that returns one."""
    is_dry: bool = False
    on_report: Callable[[Any], object] | None = None
    follow: Callable[[], object] | None = None
    """Lets the networks follow that take over the model's structure."""
    runner: Stepping | None = None
    """The method itself, where it is one that sees each step and decides alone."""

    def __post_init__(self) -> None:
        name = getattr(self.method, "__name__", str(self.method))
        verify = {} if self.verify is None else {"verify": None}
        values = (None, None) if self.takes_criterion and not self.sees_each_step else (None,)
        try:
            inspect.signature(self.method).bind(*values, **self.arguments, **verify)
        except TypeError as error:
            shown = "model, criterion" if self.takes_criterion else "model"
            raise ScheduleError(
                f"method {name} cannot be called as {name}({shown}, "
                f"{', '.join(f'{each}=...' for each in [*self.arguments, *verify])}): {error}"
            ) from error
        if self.is_dry and not self.takes_criterion:
            raise ScheduleError("dry_run=True returns the plan of which units, and criterion=None chooses none")

    def __call__(self, model: Any, criterion: Criterion | None) -> Any:
        """Operate on what the criterion chooses, if there is one; networks that cannot follow are refused before."""
        if self.runner is not None:
            return self.runner.step()
        batch = self.verify() if callable(self.verify) else self.verify
        verify = {} if batch is None else {"verify": batch}
        if self.follow is not None:
            self.follow()
        chosen = () if criterion is None else (criterion,)
        report = self.method(model, *chosen, **self.arguments, **verify)
        if self.follow is not None:
            self.follow()
        return report

    @property
    def sees_each_step(self) -> bool:
        """Whether the method is the class of one that runs beside the training."""
        return isinstance(self.method, type) and issubclass(self.method, Stepping)

    def running(self, model: Any, settings: Settings) -> Act:
        """Return this with the method at work beside the training, where it is one that sees each step.

        Raises:
            ScheduleError: settings that such a method has no use for, as it chooses units and times by itself.
        """
        if not self.sees_each_step:
            return self
        name = self.method.__name__
        if settings.operate != Every(1) or self.takes_criterion or self.follow is not None:
            raise ScheduleError(
                f"{name} sees each step and chooses units by itself; found criterion={settings.criterion}, operate="
                f"{settings.operate}{', and mirrors' if self.follow else ''}: pass criterion=None, operate=Every(1) "
                "and no mirrors, as it leaves no structure for them to take over"
            )
        return replace(self, runner=self.method(model, **self.arguments))

    @property
    def max_growth(self) -> float:
        """The bound that a dry run plans with."""
        bound: float = self.arguments.get("max_growth", MAX_GROWTH)
        return bound


@dataclass
class Births:
    """When each unit was last operated on by a schedule, in its own count of steps.

    The record goes by the schedule's own count, as not every optimizer counts steps and not every method keeps banks.

    >>> births = Births()
    >>> births.add({"fc1": (0, 3)}, step=100, operations={"fc1": {0: 1, 3: 1}})
    >>> births.ages(step=130, operations={"fc1": {0: 1, 3: 2}})    # unit 3 was operated on by hand since
    {'fc1': {0: 30}}
    """

    born: dict[str, dict[int, tuple[int, int]]] = field(default_factory=dict)
    """Site name -> unit -> the step, and the latest operation in the unit's bank then, 0 for none."""

    def add(self, units: Mapping[str, tuple[int, ...]], step: int, operations: Mapping[str, Mapping[int, int]]) -> None:
        """Take note that these units were operated on."""
        for site, chosen in units.items():
            latest = operations.get(site, {})
            self.born.setdefault(site, {}).update({unit: (step, latest.get(unit, 0)) for unit in chosen})

    def ages(self, step: int, operations: Mapping[str, Mapping[int, int]]) -> dict[str, dict[int, int]]:
        """The ages of the units whose latest operation is the one on record."""
        return {
            site: {unit: step - at for unit, (at, own) in born.items() if operations.get(site, {}).get(unit, 0) == own}
            for site, born in self.born.items()
        }

    def state(self) -> dict[str, list[list[int]]]:
        """As lists of [unit, step, operation]."""
        return {site: [[unit, *at] for unit, at in born.items()] for site, born in self.born.items()}

    @staticmethod
    def of_state(state: Mapping[str, Any]) -> Births:
        """The inverse of `state`."""
        return Births({site: {unit: (at, own) for unit, at, own in rows} for site, rows in state.items()})


class Scheduling:
    """A schedule of operations; `surgery.Schedule` says how one is made."""

    def __init__(self, model: Any, backend: Backend, watch: Watch, settings: Settings, act: Act) -> None:
        self._model, self._backend, self._watch = model, backend, watch
        self._settings, self._act = settings, act
        self._memory: dict[Trigger, Memory] = {leaf: leaf.begin() for leaf in settings.operate.leaves()}
        self._births = Births()
        self._asked: Selection | None = None  # what was selected for a share: it need not be selected again
        self._counts = {"num_seen": 0, "acted_at": 0, "is_pending": 0, "num_operations": 0, "num_units": 0}
        self._is_closed = False
        self.last: Report | LayerReport | Plan | None = None
        """The latest report, in a dry run the latest plan; not part of the state."""
        self._aim()

    # -- what a training loop calls

    def step(self, value: Any = None) -> Report | LayerReport | Plan | None:
        """Count the optimizer steps since the last call, and operate if it is time.

        Args:
            value: what a `Plateau` watches, a number or a tensor of one element; it is read only where there is one.

        Returns:
            The report of the operation, in a dry run the plan; None when nothing was operated on.

        Raises:
            ScheduleError: the schedule was closed.
            SurgeryError: as of the method; then nothing has changed, and the next step tries again.
        """
        self._require_open()
        has_news = self._watch.end_round() > self._counts["num_seen"]
        self._counts["num_seen"] = self._watch.num_steps
        watches_values = any(isinstance(leaf, Plateau) for leaf in self._memory)
        if watches_values and (number := self._watch.agreed(value)) is not None:
            for leaf, memory in self._memory.items():
                leaf.saw(memory, number)
            has_news = True
        return self._decide() if has_news else None

    def task_changed(self) -> Report | LayerReport | Plan | None:
        """Announce that the task has changed, and operate if it is time; returns and raises as `step` does."""
        self._require_open()
        self._watch.end_round()
        for leaf, memory in self._memory.items():
            leaf.task_changed(memory, self._since)
        if any(isinstance(leaf, TaskChange) and leaf.after for leaf in self._memory):
            self._watch.shut()
            self._aim()
        return self._decide()

    def close(self) -> None:
        """Give model and optimizers back without hooks and taps; what was operated on stays."""
        self._is_closed = True
        self._watch.close()
        if self._act.runner is not None:
            self._act.runner.close()

    def __enter__(self: ScheduleT) -> ScheduleT:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_steps(self) -> int:
        """How many optimizer steps were counted."""
        return self._watch.num_steps

    @property
    def num_units(self) -> int:
        """How many units were operated on, each as often as it was."""
        return self._counts["num_units"]

    @property
    def num_operations(self) -> int:
        """How many times the schedule operated."""
        return self._counts["num_operations"]

    # -- deciding

    @property
    def _since(self) -> int:
        return self._watch.num_steps - self._counts["acted_at"]

    def _moment(self) -> Moment:
        return Moment(self._since, self._memory, self._share)

    def _decide(self) -> Report | LayerReport | Plan | None:
        if self._watch.forget_changed() and not self._watch.has_evidence:
            self._watch.restart()
        if not self._counts["is_pending"]:
            self._counts["is_pending"] = int(self._settings.operate.is_due(self._moment()))
        done = None
        if self._counts["is_pending"] and self._is_ready:
            done = self._conclude()
        elif self._asked is not None:
            self._asked = None
            self._begin_window()
        self._aim()
        if done is not None and self._act.on_report is not None:
            self._act.on_report(done)
        return done

    @property
    def _is_ready(self) -> bool:
        """Whether enough steps were looked at to decide on."""
        return not self._watch.needs or (self._watch.is_open and self._watch.num_seen >= (self._settings.window or 1))

    def _aim(self) -> None:
        """Open the window if the next step is to be in it."""
        if not self._watch.needs:
            return
        window = self._settings.window
        until = None if window is None else self._settings.operate.foreseen(self._moment())
        if window is None or self._counts["is_pending"] or (until is not None and until <= window):
            self._watch.open(self._settings.stride)

    def _begin_window(self) -> None:
        if self._settings.window is None:
            self._watch.restart()
        else:
            self._watch.shut()

    def _share(self, over: Over) -> float | None:
        if not self._is_ready:
            return None
        self._asked = self._asked or self._select()
        sites, units = self._asked.scores.sites, self._asked.units
        if over == "site":
            return max((len(units[name]) / sites[name].num_units for name in units), default=0.0)
        return self._asked.num_units / sum(site.num_units for site in sites.values())

    def _select(self) -> Selection:
        evidence = self._watch.pooled() if self._watch.needs else None
        seed = self._backend.seed(self._model, self._watch.generator)
        assert self._settings.criterion is not None
        scores = score(self._watch.sites, evidence, self._settings.criterion, seed=seed)
        ages = dict(self._watch.ages())
        for site, own in self._births.ages(self.num_steps, self._watch.operations()).items():
            ages[site] = {**ages.get(site, {}), **own}
        return select(scores, ages=ages, cooldown=self._settings.cooldown)

    # -- acting

    def _conclude(self) -> Report | LayerReport | Plan | None:
        """Operate on what is selected now, if anything is, or on whole layers, and begin anew."""
        # A method that runs beside the training meets the other processes by itself, when it acts.
        with nullcontext() if self._act.runner else self._backend.together(self._model):
            done = self._change_layers() if self._settings.criterion is None else self._change_units()
        self._count(done)
        self.last = self.last if done is None else done
        self._counts |= {"acted_at": self._watch.num_steps, "is_pending": 0}
        self._memory = {leaf: leaf.begin() for leaf in self._memory}
        self._begin_window()
        return done

    def _count(self, done: Report | LayerReport | Plan | None) -> None:
        """Take note of an operation, once it is done on all processes."""
        if done is None or isinstance(done, Plan):
            return
        self._counts["num_operations"] += 1
        if isinstance(done, Report):
            self._births.add(done.operated, self.num_steps, self._watch.operations())
            self._counts["num_units"] += done.num_units

    def _change_layers(self) -> LayerReport | None:
        report: LayerReport | None = self._act(self._model, None)
        return report

    def _change_units(self) -> Report | Plan | None:
        selection, self._asked = self._of_sites_now(self._asked or self._select()), None
        chosen = capped(selection, max_units=self._settings.max_units, max_share=self._settings.max_share)
        chosen = replace(chosen, units=self._backend.agreed_units("the selection", chosen.units))
        if not chosen.num_units:
            return None
        return plan(chosen, max_growth=self._act.max_growth) if self._act.is_dry else self._operate(chosen)

    def _of_sites_now(self, selection: Selection) -> Selection:
        """Without sites that are none any more, such as layers that were frozen since."""
        found = self._backend.discover(self._model, include=self._act.arguments.get("sites", ()))
        return replace(selection, units={site: units for site, units in selection.units.items() if site in found})

    def _operate(self, chosen: Selection) -> Report:
        criterion = Selected(str(self._settings.criterion), chosen.units, chosen.scores.values)
        report: Report = self._act(self._model, criterion)
        young = [f"{site}: {counted(count, 'young unit')} passed over" for site, count in chosen.passed_over.items()]
        return replace(
            report,
            notes=(*report.notes, *young),
            declined={**chosen.scores.unscored, **report.declined},
        )

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """Return all that the schedule remembers, as tensors, numbers and strings (`weights_only=True` loads it).

        Save it with the state of the model and the optimizers, and load it after theirs.
        """
        self._require_open()
        return {
            "format": FORMAT,
            "settings": self._described(),
            "counts": dict(self._counts),
            "triggers": [dict(memory) for memory in self._memory.values()],
            "births": self._births.state(),
            "watch": self._watch.state_dict(),
            **({} if self._act.runner is None else {"runner": self._act.runner.state_dict()}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, bit for bit; model and optimizers are to be loaded before.

        Raises:
            ScheduleError: the state was saved by a newer version, or by a schedule with other settings.
        """
        self._require_open()
        _check_format(state)
        own, saved = self._described(), state["settings"]
        differ = [f"{name}: {saved.get(name)!r}, here {own[name]!r}" for name in own if saved.get(name) != own[name]]
        if differ:
            raise ScheduleError(
                f"the state was saved by a schedule with other settings: {'; '.join(differ)}. Make the schedule as it "
                "was, or begin anew without loading a state"
            )
        if (self._act.runner is None) == ("runner" in state):
            raise ScheduleError(
                f"the state was saved by a schedule of another method: here it is {self._chosen}. Make the schedule as "
                "it was, or begin anew without loading a state"
            )
        if self._act.runner is not None:
            self._act.runner.load_state_dict(state["runner"])
        self._watch.load_state_dict(state["watch"])
        self._counts = dict(state["counts"])
        self._memory = {leaf: dict(memory) for leaf, memory in zip(self._memory, state["triggers"], strict=True)}
        self._births = Births.of_state(state["births"])
        self._asked = None

    def _described(self) -> dict[str, str]:
        """The settings as text; two schedules of equal text remember the same things."""
        settings, sites = self._settings, self._watch.sites
        described = {field.name: str(getattr(settings, field.name)) for field in fields(settings)}
        return {
            **described,
            "sites": ", ".join(f"{name} ({site.num_units})" for name, site in sites.items()),
            "generator": str(self._watch.generator is not None),
        }

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ScheduleError(
            "a schedule can be neither copied nor pickled: it belongs to one model and hangs on its optimizers. Save "
            "schedule.state_dict(); for a copy of the model make a new schedule and load that"
        )

    def _require_open(self) -> None:
        if self._is_closed:
            raise ScheduleError("the schedule was closed and counts no steps; make a new one and load its state")

    # -- printing

    def __repr__(self) -> str:
        return f"<Schedule: {self._chosen} at {self._settings.operate}, step {self.num_steps}>"

    @property
    def _chosen(self) -> str:
        criterion = self._settings.criterion
        return getattr(self._act.method, "__name__", "whole layers") if criterion is None else str(criterion)

    def __str__(self) -> str:
        title = f"Schedule: {self._chosen} at {self._settings.operate}"
        columns = ("steps", "operations", "units", "steps looked at", "next")
        done = (self.num_operations, self._counts["num_units"])
        row = (self.num_steps, *done, self._looked(), self._next())
        last = [] if self.last is None else ["", str(self.last)]
        return render(title, columns, [row], [*self._bounds(), *last])

    def _looked(self) -> str:
        seen = -(-self._watch.num_seen // self._settings.stride) if self._watch.is_open else 0
        return str(seen) if self._watch.needs else "none needed"

    def _next(self) -> str:
        if self._is_closed:
            return "closed"
        until = 0 if self._counts["is_pending"] else self._settings.operate.foreseen(self._moment())
        if until is None:
            return "when due"
        return f"in {counted(until, 'step')}" if until else "when enough was looked at"

    def _bounds(self) -> Iterator[str]:
        settings = self._settings
        look = f"look: {settings.look}, " if self._watch.needs else ""
        bounds = [("max_units", settings.max_units), ("max_share", settings.max_share)]
        named = "".join(f", {name} {bound}" for name, bound in bounds if bound is not None)
        yield f"{look}cooldown {counted(settings.cooldown, 'step')}{named}{', dry run' if self._act.is_dry else ''}"


def _check_format(state: Mapping[str, Any]) -> None:
    found = state.get("format")
    if not isinstance(found, int):
        raise ScheduleError("this is no state of a schedule; pass what schedule.state_dict() returned")
    if found > FORMAT:
        raise ScheduleError(
            f"the state was saved in format {found}; this version reads formats up to {FORMAT}: upgrade neuronsurgery"
        )


def needs_of(criterion: Criterion) -> frozenset[Quantity]:
    """What has to be measured for a criterion; all that can be for a function, which takes what there is."""
    if any(isinstance(leaf, Custom) for leaf in criterion.leaves()):
        return frozenset(Quantity)
    return criterion.needs
