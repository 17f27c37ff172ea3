"""When a schedule acts, without a framework: triggers by steps counted by hand, windows, bounds, ages and state."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from neuronsurgery.choosing import Custom, Random, Selected, Units
from neuronsurgery.combining import Criterion
from neuronsurgery.errors import ScheduleError, SurgeryError
from neuronsurgery.evidence import Evidence, Quantity
from neuronsurgery.measuring import Dormant, Lowest, Stagnant
from neuronsurgery.plans import Plan, plan
from neuronsurgery.reports import Report
from neuronsurgery.schedules import Act, Births, Scheduling, Settings, needs_of
from neuronsurgery.scores import score
from neuronsurgery.selection import Selection, capped, select
from neuronsurgery.sites import Sites
from neuronsurgery.triggers import Every, Last, Plateau, Share, TaskChange, Trigger
from tests.core_values import one_step, sites_of

SITES = sites_of(fc1=4, fc2=8)
GRADIENTS = {"fc1": [0.0, 1.0, 1.0, 2.0], "fc2": [0.1, 0.2, 1.0, 1.0, 1.0, 1.0, 1.0, 2.7]}


@dataclass
class Watched:
    """A training run without a network: its steps are `take`n by the test."""

    needs: frozenset[Quantity] = frozenset()
    sites: Sites = SITES
    num_steps: int = 0
    is_open: bool = False
    generator: Any = None
    num_seen: int = 0
    every: int = 1
    gradients: dict[str, list[float]] = field(default_factory=lambda: {k: list(v) for k, v in GRADIENTS.items()})
    changed: list[str] = field(default_factory=list)
    banks: dict[str, dict[int, int]] = field(default_factory=dict)
    counted: dict[str, dict[int, int]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.evidence = Evidence(self.sites)

    def take(self) -> None:
        if self.is_open and self.num_seen % self.every == 0:
            norms = {name: (np.ones(len(each)), np.array(each)) for name, each in self.gradients.items()}
            self.evidence.record_step(norms)
        self.num_seen += self.is_open
        self.num_steps += 1

    @property
    def has_evidence(self) -> bool:
        return any(self.evidence.measured(name) for name in self.sites)

    def end_round(self) -> int:
        return self.num_steps

    def open(self, every: int) -> None:
        if not self.is_open:
            self.restart()
            self.is_open, self.every = True, every
            self.log.append(f"open at {self.num_steps}")

    def shut(self) -> None:
        self.is_open = False
        self.restart()

    def restart(self) -> None:
        self.evidence.forget_all()
        self.num_seen = 0

    def forget_changed(self) -> list[str]:
        changed, self.changed = self.changed, []
        for name in changed:
            self.evidence.forget(name)
        return changed

    def pooled(self) -> Evidence:
        return self.evidence

    def agreed(self, value: Any) -> float | None:
        return None if value is None else float(value)

    def ages(self) -> Mapping[str, Mapping[int, int]]:
        return self.counted

    def operations(self) -> Mapping[str, Mapping[int, int]]:
        return self.banks

    def state_dict(self) -> dict[str, Any]:
        return {"num_steps": self.num_steps, "is_open": self.is_open, "num_seen": self.num_seen, "every": self.every}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def close(self) -> None:
        self.is_open = False


class Backend:
    """What a schedule asks of a backend itself."""

    def discover(self, model: Any, *, include: Any = ()) -> Sites:
        return SITES

    def seed(self, model: Any, generator: Any) -> int:
        return 0

    def together(self, model: Any) -> nullcontext[None]:
        return nullcontext()

    def agreed_units(self, point: str, units: Mapping[str, Any]) -> Mapping[str, Any]:
        return units


class Method:
    """Operates on nothing, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Criterion, dict[str, Any]]] = []

    def __call__(self, model: Any, criterion: Criterion, **options: Any) -> Report:
        self.calls.append((criterion, options))
        made = plan(select(score(SITES, None, criterion)))
        return Report(
            operation=len(self.calls),
            operated=made.units,
            declined={},
            errors={},
            plan=made,
            parameters_before=0,
            parameters_after=0,
            notes=(),
            verified=False,
            model_error=None,
        )


@dataclass
class Run:
    """A schedule with its surroundings."""

    schedule: Scheduling
    watch: Watched
    method: Method

    def go(self, num_steps: int, values: Callable[[int], Any] = lambda step: None) -> list[int]:
        """Takes steps and returns those at which the schedule acted."""
        acted = []
        for _ in range(num_steps):
            self.watch.take()
            if self.schedule.step(values(self.watch.num_steps)) is not None:
                acted.append(self.watch.num_steps)
        return acted


def run_of(
    operate: Trigger,
    criterion: Criterion | None = None,
    look: Every | Last | None = None,
    *,
    bounds: Mapping[str, Any] | None = None,
    **act: Any,
) -> Run:
    criterion = criterion or Random(0.5)
    options = {"cooldown": 0, "max_units": None, "max_share": None, **(bounds or {})}
    settings = Settings(criterion, operate, look or Every(1), **options)
    watch, method = Watched(needs_of(criterion)), Method()
    backend: Any = Backend()
    return Run(Scheduling(None, backend, watch, settings, Act(method, {}, **act)), watch, method)


# -- triggers --------------------------------------------------------------------------------------------------------


@pytest.mark.situation("When to operate", "every so many steps", "works")
def test_every_acts_on_each_nth_step() -> None:
    assert run_of(Every(3)).go(10) == [3, 6, 9]


@pytest.mark.situation("When to operate", "on a task change", "works")
def test_a_task_change_acts_when_it_is_announced() -> None:
    run = run_of(TaskChange())
    assert run.go(3) == []
    assert run.schedule.task_changed() is not None
    assert run.go(3) == []


def test_a_task_change_acts_so_many_steps_after_the_announcement() -> None:
    run = run_of(TaskChange(after=2))
    run.go(3)
    assert run.schedule.task_changed() is None
    assert run.go(5) == [5]


def test_a_task_change_announced_twice_counts_from_the_second() -> None:
    run = run_of(TaskChange(after=3))
    run.schedule.task_changed()
    assert run.go(2) == []
    run.schedule.task_changed()
    assert run.go(4) == [5]


@pytest.mark.situation("When to operate", "on a plateau of the loss", "works")
def test_a_plateau_acts_after_so_many_values_without_improvement() -> None:
    losses = [9.0, 8.0, 8.0, 7.9, 7.9, 7.9, 7.9, 7.9, 7.9, 7.9]
    # best 7.9 at step 4; three values without improvement at 7; then 7.9 is the best anew at 8, three more at 11
    assert run_of(Plateau(3)).go(10, lambda step: losses[step - 1]) == [7]
    # an improvement by 0.1 is none for min_delta=0.5: 8.0, 8.0 and 7.9 do not count against 8.0 ... but 9 - 8 does
    assert run_of(Plateau(3, min_delta=0.5)).go(6, lambda step: losses[step - 1]) == [5]


def test_a_plateau_of_what_rises_is_told_by_mode_max() -> None:
    rising = run_of(Plateau(2, mode="max"))
    assert rising.go(6, float) == []
    assert run_of(Plateau(2)).go(6, float) == [3, 6]


def test_a_plateau_counts_the_values_passed_not_the_steps() -> None:
    assert run_of(Plateau(2)).go(12, lambda step: 1.0 if step % 4 == 0 else None) == [12]


def test_a_plateau_hears_of_a_value_that_is_passed_without_a_step() -> None:
    run = run_of(Plateau(1))
    run.go(1, lambda step: 1.0)
    assert run.schedule.step(1.0) is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_plateau_passes_over_values_that_are_not_finite(value: float) -> None:
    assert run_of(Plateau(1)).go(5, lambda step: value) == []


def test_a_plateau_forgets_its_best_when_the_task_changes() -> None:
    run = run_of(Plateau(2))
    run.go(2, lambda step: 1.0)
    run.schedule.task_changed()
    assert run.go(2, lambda step: 5.0) == []


@pytest.mark.situation("When to operate", "when the share of stagnant units passes a bound", "works")
def test_a_share_acts_when_it_is_exceeded_and_asks_only_now_and_then() -> None:
    # 1 of 4 in fc1 is stagnant, 2 of 8 in fc2: 3 of 12 together
    assert run_of(Share(0.25, every=2), Stagnant()).go(6) == []
    assert run_of(Share(0.24, every=2), Stagnant()).go(5) == [2, 4]


def test_a_share_of_a_site_is_the_largest_of_them() -> None:
    run = run_of(Share(0.3, "site", every=1), Stagnant())
    assert run.go(2) == []
    run.watch.gradients["fc1"] = [0.0, 0.0, 1.0, 2.0]
    assert run.go(1) == [3]


def test_a_look_at_the_scores_for_a_share_starts_a_fresh_window() -> None:
    run = run_of(Share(0.9, every=4), Stagnant())
    run.go(3)
    assert run.watch.evidence.num_steps == 3
    run.go(1)
    assert run.watch.evidence.num_steps == 0


def test_either_acts_on_what_comes_first_and_counts_anew_from_there() -> None:
    run = run_of(Every(4) | TaskChange())
    assert run.go(3) == []
    assert run.schedule.task_changed() is not None
    assert run.go(8) == [7, 11]


def test_both_wait_for_each_other() -> None:
    run = run_of(Every(4) & TaskChange())
    run.go(1)
    assert run.schedule.task_changed() is None
    assert run.go(8) == [4]
    assert run.schedule.task_changed() is not None


def test_both_with_a_share_ask_for_scores_only_once_the_other_is_due() -> None:
    run = run_of(Share(0.24, every=1) & Every(3), Stagnant())
    run.go(2)
    assert run.watch.evidence.num_steps == 2  # an earlier look would have started anew
    assert run.go(1) == [3]


def test_a_trigger_prints_as_it_is_written() -> None:
    trigger = (Every(1000) | TaskChange(after=5)) & Plateau(10, mode="max") | Share(0.1, over="site")
    assert str(trigger) == "(Every(1000) | TaskChange(after=5)) & Plateau(10, mode='max') | Share(0.1, over='site')"
    assert eval(str(trigger)) == trigger
    assert pickle.loads(pickle.dumps(copy.deepcopy(trigger))) == trigger


@pytest.mark.situation("When to operate", "a schedule that can never act", "refused")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Every(0), "Every.num_steps is 0"),
        (lambda: Every(True), "Every.num_steps is True"),
        (lambda: Every(1.5), "must be an integer"),  # type: ignore[arg-type]
        (lambda: Last(0), "Last.num_steps is 0"),
        (lambda: Last(5, every=6), "more than the 5 steps"),
        (lambda: TaskChange(after=-1), "TaskChange.after is -1"),
        (lambda: Plateau(0), "Plateau.patience is 0"),
        (lambda: Plateau(1, min_delta=-0.1), "min_delta is -0.1"),
        (lambda: Plateau(1, mode="up"), "'min' or 'max'"),  # type: ignore[arg-type]
        (lambda: Share(1.0), "no share exceeds 1"),
        (lambda: Share(1.5), "no share exceeds 1"),
        (lambda: Share(-0.1), "Share.bound is -0.1"),
        (lambda: Share(0.1, over="layer"), "'model' or 'site'"),  # type: ignore[arg-type]
        (lambda: run_of("always"), "is no trigger"),  # type: ignore[arg-type]
        (lambda: run_of(Every(1), look=7), "look=7"),  # type: ignore[arg-type]
        (lambda: run_of(Every(1), bounds={"cooldown": -1}), "cooldown is -1"),
        (lambda: run_of(Every(1), bounds={"max_units": 0}), "max_units is 0"),
        (lambda: run_of(Every(1), bounds={"max_share": 0.0}), "max_share is 0.0"),
        (lambda: run_of(Every(1), bounds={"max_share": 1.1}), "max_share is 1.1"),
        (lambda: Act(lambda model, criterion: None, {"init": None}), "cannot be called"),
    ],
)
def test_what_can_never_act_is_refused_at_once(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ScheduleError, match=message.replace("(", r"\(")):
        make()


def test_triggers_combine_with_triggers_only() -> None:
    with pytest.raises(TypeError):
        Every(1) | 5  # type: ignore[operator]


# -- windows ---------------------------------------------------------------------------------------------------------


def test_each_kth_step_since_the_last_operation_is_looked_at() -> None:
    run = run_of(Every(10), Stagnant(), Every(3))
    run.go(8)
    assert run.watch.evidence.num_steps == 3  # the first, the fourth and the seventh
    assert run.go(2) == [10]
    assert run.watch.evidence.num_steps == 0


def test_the_last_steps_before_a_foreseen_operation_are_looked_at() -> None:
    run = run_of(Every(10), Stagnant(), Last(4, every=2))
    assert run.go(25) == [10, 20]
    assert run.watch.log == ["open at 6", "open at 16"]


def test_an_operation_that_could_not_be_foreseen_waits_for_its_window() -> None:
    run = run_of(TaskChange(), Stagnant(), Last(3))
    run.go(5)
    assert run.schedule.task_changed() is None
    assert run.go(5) == [8]
    assert run.watch.log == ["open at 5"]


def test_an_announced_operation_is_looked_forward_to() -> None:
    run = run_of(TaskChange(after=6), Stagnant(), Last(2))
    run.go(1)
    run.schedule.task_changed()
    assert run.go(6) == [7]
    assert run.watch.log == ["open at 5"]


def test_a_window_opens_for_the_later_of_two_triggers_that_both_have_to_be_due() -> None:
    run = run_of(Every(4) & TaskChange(after=6), Stagnant(), Last(2))
    run.go(1)
    run.schedule.task_changed()
    assert run.go(6) == [7]
    assert run.watch.log == ["open at 5"]


def test_a_share_that_was_not_exceeded_is_asked_again_only_after_a_while() -> None:
    run = run_of(Share(0.9, every=4) | Every(100), Stagnant())
    run.go(4)
    run.watch.gradients = {name: [0.0] * (len(each) - 1) + [1.0] for name, each in run.watch.gradients.items()}
    assert run.go(3) == []
    assert run.watch.evidence.num_steps == 3
    assert run_of(Share(0.74, every=4), Lowest(0.75)).go(9) == [4, 8]


def test_judging_by_the_new_task_drops_what_was_measured_of_the_old() -> None:
    run = run_of(TaskChange(after=2), Stagnant())
    run.go(5)
    run.schedule.task_changed()
    run.go(1)
    assert run.watch.evidence.num_steps == 1


def test_a_criterion_that_needs_nothing_opens_no_window() -> None:
    run = run_of(Every(2), Random(0.5), Last(1))
    assert run.go(4) == [2, 4]
    assert run.watch.log == []


def test_a_function_as_criterion_gets_all_that_can_be_measured() -> None:
    assert needs_of(Custom(lambda scores: {})) == frozenset(Quantity)
    assert needs_of(Stagnant() & Random(0.5)) == {Quantity.RELATIVE_UPDATE_ACTIVITY}
    assert needs_of(Dormant()) == {Quantity.ACTIVATION}


def test_a_site_that_was_operated_on_by_hand_is_measured_anew() -> None:
    run = run_of(Every(3), Stagnant())
    run.go(1)
    run.watch.changed = ["fc1"]
    assert run.go(2) == [3]
    (criterion, _) = run.method.calls[0]
    assert isinstance(criterion, Selected)
    assert set(criterion.units) == {"fc1", "fc2"}  # fc1 by the one step since


def test_an_operation_waits_when_all_that_was_measured_is_stale() -> None:
    run = run_of(Every(3), Stagnant())
    run.go(2)
    run.watch.take()
    run.watch.changed = ["fc1", "fc2"]
    assert run.schedule.step() is None
    assert run.go(1) == [4]


# -- acting ----------------------------------------------------------------------------------------------------------


def test_the_method_gets_the_units_the_criterion_chose_and_its_name() -> None:
    run = run_of(Every(1), Stagnant(), verify=7)
    run.go(1)
    ((criterion, options),) = run.method.calls
    assert isinstance(criterion, Selected)
    assert dict(criterion.units) == {"fc1": (0,), "fc2": (0, 1)}
    assert str(criterion) == str(Stagnant())
    assert options == {"verify": 7}


def test_a_function_for_verify_is_asked_for_a_batch_each_time() -> None:
    batches = iter([1, 2])
    run = run_of(Every(1), verify=lambda: next(batches))
    run.go(2)
    assert [options["verify"] for _, options in run.method.calls] == [1, 2]


def test_nothing_chosen_is_no_operation_and_counts_anew() -> None:
    run = run_of(Every(2), Lowest(0.01))
    assert run.go(3) == []
    assert run.method.calls == []
    assert run.watch.num_seen == 1


def test_every_report_is_passed_on() -> None:
    reports: list[Any] = []
    run = run_of(Every(2), on_report=reports.append)
    run.go(4)
    assert [report.operation for report in reports] == [1, 2]
    assert run.schedule.last is reports[-1]


@pytest.mark.situation("When to operate", "dry run", "works")
def test_a_dry_run_returns_the_plan_and_operates_on_nothing() -> None:
    run = run_of(Every(2), Stagnant(), is_dry=True)
    run.watch.take()
    run.watch.take()
    done = run.schedule.step()
    assert isinstance(done, Plan)
    assert dict(done.units) == {"fc1": (0,), "fc2": (0, 1)}
    assert run.method.calls == []
    assert run.schedule.num_operations == 0


@pytest.mark.situation("When to operate", "at most so many units at once", "works")
@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"max_units": 2}, {"fc1": (0,), "fc2": (0,)}),
        ({"max_units": 1}, {"fc1": (0,)}),
        ({"max_share": 0.25}, {"fc1": (0,), "fc2": (0, 1)}),
        ({"max_share": 0.125}, {"fc2": (0,)}),
        ({"max_share": 0.2, "max_units": 5}, {"fc2": (0,)}),
    ],
)
def test_bounds_keep_the_units_of_lowest_score(bounds: dict[str, Any], expected: dict[str, Any]) -> None:
    run = run_of(Every(1), Stagnant(), bounds=bounds)
    run.go(1)
    criterion: Any = run.method.calls[0][0]
    assert dict(criterion.units) == expected


def test_the_lowest_scores_of_all_sites_come_first_under_a_bound() -> None:
    run = run_of(Every(1), Stagnant(), bounds={"max_units": 2})
    run.watch.gradients = {"fc1": [0.2, 1.0, 1.0, 1.8], "fc2": [0.1, 0.15, *[1.0] * 5, 2.75]}
    run.go(1)
    criterion: Any = run.method.calls[0][0]
    assert dict(criterion.units) == {"fc2": (0, 1)}


def test_a_share_counts_what_is_chosen_before_the_bounds() -> None:
    assert run_of(Share(0.24, every=1), Stagnant(), bounds={"max_units": 1}).go(1) == [1]


@pytest.mark.situation("When to operate", "cooldown", "works")
def test_a_fresh_unit_is_passed_over_until_its_cooldown_is_over() -> None:
    run = run_of(Every(2), Stagnant(), bounds={"cooldown": 5, "max_units": 2})
    chosen = []
    for _ in range(5):
        run.go(2)
        criterion: Any = run.method.calls[-1][0]
        chosen.append((len(run.method.calls), dict(criterion.units)))
    # at 2 the two lowest; at 4 the one that is left; at 6 all are young; from 8 on the first two are old enough
    assert chosen == [
        (1, {"fc1": (0,), "fc2": (0,)}),
        (2, {"fc2": (1,)}),
        (2, {"fc2": (1,)}),
        (3, {"fc1": (0,), "fc2": (0,)}),
        (4, {"fc2": (1,)}),
    ]


def test_the_cooldown_leaves_room_under_a_bound_to_units_that_are_old_enough() -> None:
    run = run_of(Every(1), Stagnant(), bounds={"cooldown": 100, "max_units": 1})
    assert run.go(4) == [1, 2, 3]


def test_ages_are_those_of_the_latest_operation_also_by_hand() -> None:
    births = Births()
    births.add({"fc1": (0, 1)}, 10, {"fc1": {0: 3, 1: 3}})
    assert births.ages(15, {"fc1": {0: 3, 1: 3}}) == {"fc1": {0: 5, 1: 5}}
    assert births.ages(15, {"fc1": {0: 4, 1: 3}}) == {"fc1": {1: 5}}  # operated on again by hand
    assert births.ages(15, {}) == {"fc1": {}}  # undone
    assert Births.of_state(json.loads(json.dumps(births.state()))) == births


def test_a_fault_in_the_method_leaves_the_schedule_to_try_again() -> None:
    run = run_of(Every(2), Stagnant())
    faults = [SurgeryError("no")]
    plain = run.method.__call__

    def method(model: Any, criterion: Criterion, **options: Any) -> Report:
        if faults:
            raise faults.pop()
        return plain(model, criterion, **options)

    object.__setattr__(run.schedule._act, "method", method)
    run.go(1)
    with pytest.raises(SurgeryError, match="no"):
        run.go(1)
    assert run.schedule.num_operations == 0
    assert run.watch.evidence.num_steps == 2
    assert run.go(1) == [3]


# -- state -----------------------------------------------------------------------------------------------------------


TRIGGERS = [
    Every(4),
    TaskChange(after=3),
    Plateau(2) | Every(7),
    Share(0.2, every=3) & Every(4),
]


@pytest.mark.parametrize("operate", TRIGGERS, ids=str)
@pytest.mark.parametrize("killed_at", range(1, 10))
def test_a_schedule_goes_on_from_its_state_as_if_nothing_had_happened(operate: Trigger, killed_at: int) -> None:
    bounds = {"cooldown": 3, "max_units": 2}

    def go(run: Run, first: int, last: int) -> list[Any]:
        done = []
        for step in range(first, last):
            run.watch.take()
            done.append(run.schedule.step(float(step % 3)))
            if step == 5:
                done.append(run.schedule.task_changed())
        return done

    whole = run_of(operate, Random(0.5), bounds=bounds)
    expected = go(whole, 1, 15)
    assert any(expected)
    first = run_of(operate, Random(0.5), bounds=bounds)
    done = go(first, 1, killed_at)
    state = json.loads(json.dumps(first.schedule.state_dict()))
    second = run_of(operate, Random(0.5), bounds=bounds)
    second.schedule.load_state_dict(state)
    second.method.calls = list(first.method.calls)
    assert done + go(second, killed_at, 15) == expected
    assert second.schedule.state_dict() == whole.schedule.state_dict()


def test_a_state_is_a_snapshot() -> None:
    run = run_of(Plateau(5) | Every(3))
    state = run.schedule.state_dict()
    before = copy.deepcopy(state)
    run.go(4, float)
    assert state == before


@pytest.mark.situation("Checkpoints and copies", "schedule: state of other settings", "refused")
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (run_of(Every(5)), r"operate: 'Every\(4\)', here 'Every\(5\)'"),
        (run_of(Every(4), Random(0.25)), "criterion: "),
        (run_of(Every(4), look=Last(2)), "look: "),
        (run_of(Every(4), bounds={"cooldown": 7}), "cooldown: '0', here '7'"),
        (run_of(Every(4), bounds={"max_units": 3}), "max_units: 'None', here '3'"),
    ],
    ids=["operate", "criterion", "look", "cooldown", "max_units"],
)
def test_a_state_of_other_settings_is_refused_and_nothing_taken_over(other: Run, message: str) -> None:
    run = run_of(Every(4))
    run.go(3)
    before = other.schedule.state_dict()
    with pytest.raises(ScheduleError, match=message):
        other.schedule.load_state_dict(run.schedule.state_dict())
    assert other.schedule.state_dict() == before


def test_a_state_of_a_newer_version_or_of_nothing_is_refused() -> None:
    run = run_of(Every(4))
    with pytest.raises(ScheduleError, match="upgrade"):
        run.schedule.load_state_dict({**run.schedule.state_dict(), "format": 99})
    with pytest.raises(ScheduleError, match="no state of a schedule"):
        run.schedule.load_state_dict({"weights": 1})


@pytest.mark.situation("Checkpoints and copies", "schedule: deepcopy and pickle", "refused")
@pytest.mark.parametrize("do", [copy.copy, copy.deepcopy, pickle.dumps], ids=["copy", "deepcopy", "pickle"])
def test_a_schedule_is_not_copied(do: Callable[[Any], object]) -> None:
    with pytest.raises(ScheduleError, match="state_dict"):
        do(run_of(Every(4)).schedule)


def test_a_closed_schedule_counts_no_more_and_says_so() -> None:
    with run_of(Every(4)).schedule as schedule:
        pass
    for call in (schedule.step, schedule.task_changed, schedule.state_dict):
        with pytest.raises(ScheduleError, match="closed"):
            call()
    assert "closed" in str(schedule)


# -- what it prints --------------------------------------------------------------------------------------------------


def test_a_schedule_prints_where_it_stands_and_what_it_did_last() -> None:
    run = run_of(Every(4), Stagnant(), Every(2), bounds={"max_units": 2, "cooldown": 1})
    run.go(3)
    assert str(run.schedule) == (
        "Schedule: Stagnant(threshold=0.25, average='scores') at Every(4)\n"
        "| steps | operations | units | steps looked at | next      |\n"
        "|-------|------------|-------|-----------------|-----------|\n"
        "|     3 |          0 |     0 | 2               | in 1 step |\n"
        "look: Every(2), cooldown 1 step, max_units 2"
    )
    run.go(1)
    assert "|     4 |          1 |     2 |" in str(run.schedule)
    assert str(run.schedule.last) in str(run.schedule)


# -- what selections learn -------------------------------------------------------------------------------------------


def stagnant_selection() -> Selection:
    evidence = one_step(SITES, fc1=GRADIENTS["fc1"], fc2=GRADIENTS["fc2"])
    return select(score(SITES, evidence, Stagnant()))


def test_no_bound_changes_no_selection() -> None:
    assert capped(stagnant_selection()) == stagnant_selection()


def test_units_without_scores_are_bounded_by_index() -> None:
    selection = select(score(SITES, None, Units({"fc1": [3, 1], "fc2": [0]})))
    assert capped(selection, max_share=0.25).units == {"fc1": (1,), "fc2": (0,)}


def test_what_was_selected_keeps_its_scores_and_its_criterion() -> None:
    selection = stagnant_selection()
    again = select(score(SITES, None, Selected("by hand", selection.units, selection.scores.values)))
    assert again.units == selection.units
    assert again.scores.values == selection.scores.values
    assert plan(again).criterion == "by hand"
    assert Selection.from_json(again.to_json()) == again


def test_evidence_goes_on_from_its_state_and_can_be_forgotten_site_by_site() -> None:
    steps: Sequence[dict[str, list[float]]] = [GRADIENTS, {"fc1": [1.0] * 4, "fc2": [2.0] * 8}]
    evidence, other = Evidence(SITES), Evidence(SITES)
    for gradients in steps:
        evidence.record_step({name: (np.ones(len(each)), np.array(each)) for name, each in gradients.items()})
    other.load_state_dict(evidence.state_dict())
    for name in SITES:
        for quantity, values in evidence.measured(name).items():
            np.testing.assert_array_equal(other.measured(name)[quantity], values)
    assert other.num_steps == 2
    other.forget("fc1")
    assert not other.measured("fc1")
    assert other.measured("fc2")
    assert evidence.measured("fc1")
    other.forget_all()
    assert (other.num_steps, dict(other.measured("fc2"))) == (0, {})
