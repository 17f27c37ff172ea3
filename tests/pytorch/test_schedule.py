"""Schedules in training runs: what they count, what they measure, and that everything around them goes on as before."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.optim import SGD, Adam

from neuronsurgery import surgery
from neuronsurgery.pytorch.taps import _SINKS
from neuronsurgery.surgery import Dormant, Every, GraMa, Last, Plateau, Random, Share, Stagnant, TaskChange, Units
from tests.snapshots import assert_untouched, bits, snapshot

WHEN, WRAPPERS = "When to operate", "Schedules and wrappers"


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 2))


def batches(num: int, seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num):
        yield torch.randn(8, 4, generator=generator)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = (model(x) - x[:, :2]).square().mean()
    return out


def take(model: nn.Module, optimizer: Any, x: Tensor) -> None:
    optimizer.zero_grad()
    loss_of(model, x).backward()
    optimizer.step()


def train(model: nn.Module, optimizer: Any, schedule: surgery.Schedule, num_steps: int, seed: int = 0) -> list[int]:
    """Takes steps, and returns the numbers of those at which the schedule acted."""
    acted = []
    for x in batches(num_steps, seed):
        take(model, optimizer, x)
        if schedule.step() is not None:
            acted.append(schedule.num_steps)
    return acted


def as_bits(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(value) for name, value in model.state_dict().items() if isinstance(value, Tensor)}


# -- what is measured, and what that leaves on the model -------------------------------------------------------------


@pytest.mark.parametrize("criterion", [Stagnant(), Dormant(), GraMa()], ids=lambda one: one.name)
def test_a_schedule_chooses_what_knife_would_on_the_same_evidence(criterion: Any):
    by_hand, by_schedule = network(), network()
    by_schedule.load_state_dict(by_hand.state_dict())
    lowest = surgery.Lowest(0.25, of=criterion)
    optimizers = [Adam(model.parameters(), lr=0.01) for model in (by_hand, by_schedule)]
    with surgery.observe(by_hand, optimizers[0], every=3) as evidence:
        for x in batches(8):
            take(by_hand, optimizers[0], x)
    expected = surgery.knife(by_hand, lowest, evidence=evidence, optimizer=optimizers[0])
    schedule = surgery.Schedule(by_schedule, optimizers[1], lowest, operate=Every(8), look=Every(3))
    assert train(by_schedule, optimizers[1], schedule, 8) == [8]
    assert isinstance(schedule.last, surgery.Report)
    assert dict(schedule.last.operated) == dict(expected.operated)
    assert schedule.last.plan.criterion == str(lowest)
    assert as_bits(by_schedule) == as_bits(by_hand)


def test_a_report_names_what_could_not_be_scored():
    model = network()
    optimizer = SGD(model[2:].parameters(), lr=0.1)
    schedule = surgery.Schedule(model, optimizer, surgery.Lowest(0.25), operate=Every(2))
    train(model, optimizer, schedule, 2)
    report = schedule.last
    assert isinstance(report, surgery.Report)
    assert report.declined["0"] == "received no gradient"
    assert set(report.operated) == {"2"}


def test_a_report_names_what_was_too_young():
    model = network()
    optimizer = Adam(model.parameters())
    random = Random(0.25, seed=0)
    schedule = surgery.Schedule(model, optimizer, random, operate=Every(2), sites=["0"], max_units=1)
    train(model, optimizer, schedule, 4)
    assert isinstance(schedule.last, surgery.Report)
    assert "0: 1 young unit passed over" in schedule.last.notes


@pytest.mark.situation(WHEN, "layers frozen in mid-run", "works")
def test_a_layer_that_was_frozen_since_is_left_alone():
    model = network()
    optimizer = Adam(model.parameters())
    schedule = surgery.Schedule(model, optimizer, Random(0.25), operate=Every(2))
    train(model, optimizer, schedule, 1)
    model[0].requires_grad_(False)
    assert train(model, optimizer, schedule, 1) == [2]
    report = schedule.last
    assert isinstance(report, surgery.Report)
    assert set(report.operated) == {"2"}
    assert report.declined["0"].startswith("frozen")


def test_measuring_gradients_changes_no_class_and_hangs_no_hook_on_the_model():
    model = network()
    optimizer = Adam(model.parameters())
    before = [(type(module), dict(vars(module))) for module in model.modules()]
    with surgery.Schedule(model, optimizer, "stagnant", operate=Every(100)) as schedule:
        train(model, optimizer, schedule, 3)
        assert schedule._watch.evidence.num_steps == 3
        after = [(type(module), dict(vars(module))) for module in model.modules()]
        assert [cls for cls, _ in after] == [cls for cls, _ in before]
        assert not _SINKS
        for (_, now), (_, then) in zip(after, before, strict=True):
            assert {key for key in now if "hook" in key and now[key]} == {k for k in then if "hook" in k and then[k]}


@pytest.mark.parametrize("criterion", ["dormant", "grama"])
def test_activations_are_observed_only_while_the_window_is_open(criterion: str):
    model = network()
    optimizer = Adam(model.parameters())
    keys = list(model.state_dict())
    schedule = surgery.Schedule(model, optimizer, criterion, operate=Every(10), look=Last(3))
    train(model, optimizer, schedule, 6)
    assert not _SINKS
    assert type(model) is nn.Sequential
    train(model, optimizer, schedule, 2)
    assert _SINKS
    assert list(model.state_dict()) == keys
    schedule.close()
    assert not _SINKS
    assert all(type(module).__module__.startswith("torch.nn") for module in model.modules())


def test_evaluations_and_copies_do_not_enter_what_is_measured():
    model = network()
    optimizer = Adam(model.parameters())
    with surgery.Schedule(model, optimizer, "dormant", operate=Every(10)) as schedule:
        train(model, optimizer, schedule, 2)
        copied = copy.deepcopy(model)
        model.eval()
        with torch.no_grad():
            model(torch.randn(50, 4))
        model.train()
        loss_of(copied, torch.randn(50, 4)).backward()
        assert schedule._watch.evidence.num_samples("0", surgery.Quantity.ACTIVATION) == 2 * 8


@pytest.mark.situation(WRAPPERS, "a probe or an example in the middle of an observation", "works")
def test_passes_of_a_probe_or_an_example_do_not_enter_what_is_measured() -> None:
    torch.manual_seed(0)
    model, asked = network(), []
    optimizer = Adam(model.parameters())

    def counted(site: str, h: Tensor) -> None:
        asked.append(len(h))

    with surgery.Schedule(model, optimizer, "dormant", operate=Every(10), weights=counted) as schedule:
        train(model, optimizer, schedule, 2)
        probed = surgery.probe(model, [torch.randn(50, 4)], loss_of)
        with surgery.observe(model) as inner:
            surgery.discover(model, example=torch.randn(60, 4))
            loss_of(model, torch.randn(70, 4)).backward()
        assert schedule._watch.evidence.num_samples("0", surgery.Quantity.ACTIVATION) == 2 * 8 + 70
        assert set(asked) == {8, 70}
        assert probed.num_samples("0", surgery.Quantity.ACTIVATION) == 50
        assert inner.num_samples("0", surgery.Quantity.ACTIVATION) == 70


def test_a_schedule_changes_no_training_until_it_operates():
    plain, scheduled = network(), network()
    scheduled.load_state_dict(plain.state_dict())
    optimizers = [Adam(model.parameters()) for model in (plain, scheduled)]
    with surgery.Schedule(scheduled, optimizers[1], Stagnant() | GraMa(), operate=Every(100)) as schedule:
        for x in batches(5):
            take(plain, optimizers[0], x)
        train(scheduled, optimizers[1], schedule, 5)
    assert as_bits(plain) == as_bits(scheduled)


@pytest.mark.parametrize("do", ["close", "drop"])
def test_model_and_optimizer_are_left_as_they_were(do: str):
    model = network()
    optimizer = Adam(model.parameters())
    before = snapshot(model, [optimizer])
    schedule = surgery.Schedule(model, optimizer, "dormant", operate=Every(100))
    assert _SINKS
    assert optimizer._optimizer_step_pre_hooks
    if do == "close":
        schedule.close()
        schedule.close()
    del schedule
    gc.collect()
    assert not _SINKS
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert_untouched(before, model, [optimizer])


def test_a_refused_schedule_leaves_no_hook():
    model = network()
    optimizer = Adam(model.parameters())
    with pytest.raises(surgery.SiteError):
        surgery.Schedule(model, optimizer, "dormant", operate=Every(100), sites=["nowhere"])
    gc.collect()
    assert not optimizer._optimizer_step_pre_hooks
    assert not _SINKS


def test_observe_with_a_criterion_of_gradients_leaves_the_classes_alone():
    model = network()
    optimizer = Adam(model.parameters())
    with surgery.observe(model, optimizer, criterion="stagnant") as evidence:
        assert type(model) is nn.Sequential
        take(model, optimizer, next(batches(1)))
    assert set(evidence.measured("0")) == {
        surgery.Quantity.UPDATE_ACTIVITY,
        surgery.Quantity.RELATIVE_UPDATE_ACTIVITY,
    }


# -- what counts as a step -------------------------------------------------------------------------------------------


@pytest.mark.situation("Precision", "GradScaler: skipped steps do not age a schedule", "works")
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_a_step_that_the_scaler_skips_counts_for_nothing(fused: bool):
    model = network()
    optimizer = Adam(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    schedule = surgery.Schedule(model, optimizer, "stagnant", operate=Every(100), scaler=scaler)
    for index, x in enumerate(batches(6)):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x * (torch.inf if index in (1, 4) else 1.0))).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    assert schedule.num_steps == 4
    assert schedule._watch.evidence.num_steps == 4


def test_gradients_that_a_fused_optimizer_unscales_are_measured_unscaled():
    measured = []
    for scale in (None, 64.0):
        torch.manual_seed(0)
        model = network()
        optimizer = Adam(model.parameters(), fused=True)
        schedule = surgery.Schedule(model, optimizer, Stagnant(average="ua"), operate=Every(100))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for x in batches(2):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, x)).backward()
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
        measured.append(schedule._watch.evidence.measured("0")[surgery.Quantity.UPDATE_ACTIVITY])
    torch.testing.assert_close(measured[1], measured[0], rtol=1e-4, atol=0)


@pytest.mark.situation(WRAPPERS, "gradient accumulation", "works")
def test_passes_that_accumulate_are_one_step_whenever_the_schedule_is_called():
    model = network()
    optimizer = Adam(model.parameters())
    schedule = surgery.Schedule(model, optimizer, "dormant", operate=Every(100))
    for index, x in enumerate(batches(12)):
        loss_of(model, x).backward()
        if index % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
    assert schedule.num_steps == 3
    assert schedule._watch.evidence.num_samples("0", surgery.Quantity.ACTIVATION) == 12 * 8


def test_steps_between_two_calls_are_all_counted():
    model = network()
    optimizer = Adam(model.parameters())
    schedule = surgery.Schedule(model, optimizer, Random(0.2), operate=Every(4))
    for x in batches(5):
        take(model, optimizer, x)
    assert schedule.step() is not None
    assert schedule.num_steps == 5


@pytest.mark.situation(WRAPPERS, "several optimizers", "works")
def test_several_optimizers_that_take_turns_count_once():
    model = network()
    first, second = Adam(model[:2].parameters()), SGD(model[2:].parameters(), lr=0.1)
    schedule = surgery.Schedule(model, [first, second], "stagnant", operate=Every(4), look=Every(2), cooldown=0)
    for x in batches(3):
        loss_of(model, x).backward()
        first.step()
        second.step()
        schedule.step()
        model.zero_grad()
    assert schedule.num_steps == 3
    # the first and the third, of both optimizers
    assert [schedule._watch.evidence.num_samples(site, surgery.Quantity.UPDATE_ACTIVITY) for site in "02"] == [2, 2]
    loss_of(model, next(batches(1))).backward()
    first.step()
    schedule.step()
    assert schedule.num_steps == 4  # one of them is enough


def test_optimizers_of_which_one_steps_more_often_count_its_steps():
    model = network()
    first, second = SGD(model[:2].parameters(), lr=0.1), SGD(model[2:].parameters(), lr=0.1)
    schedule = surgery.Schedule(model, [first, second], Random(0.2), operate=Every(100))
    for x in batches(2):
        loss_of(model, x).backward()
        for _ in range(3):
            first.step()
        second.step()
        schedule.step()
    assert schedule.num_steps == 6


@pytest.mark.situation(WRAPPERS, "zero_grad(set_to_none=True) before the schedule", "works")
def test_gradients_may_be_gone_when_the_schedule_is_called():
    model = network()
    optimizer = Adam(model.parameters())
    schedule = surgery.Schedule(model, optimizer, surgery.Lowest(0.25), operate=Every(3))
    for x in batches(3):
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    assert schedule.num_operations == 1


@pytest.mark.situation(WRAPPERS, "LR scheduler beside a schedule", "works")
def test_learning_rates_go_on_as_without_a_schedule():
    rates = []
    for is_scheduled in (False, True):
        model = network()
        optimizer = Adam(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
        schedule = surgery.Schedule(model, optimizer, Random(0.2), operate=Every(2 if is_scheduled else 100))
        for x in batches(8):
            take(model, optimizer, x)
            scheduler.step()
            schedule.step()
        assert schedule.num_operations == 4 * is_scheduled
        rates.append((optimizer.param_groups[0]["lr"], scheduler.state_dict()["last_epoch"]))
    assert rates[0] == rates[1]


# -- wrapped models --------------------------------------------------------------------------------------------------


@pytest.mark.situation("Compile and export", "schedule on a compiled model, criterion of gradients", "works")
def test_measuring_gradients_compiles_nothing_anew():
    torch.compiler.reset()
    counter = CompileCounter()
    model = network()
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = SGD(model.parameters(), lr=0.1)
    schedule = surgery.Schedule(compiled, optimizer, surgery.Lowest(0.25), operate=Every(6), look=Last(2), verify=None)
    assert train(compiled, optimizer, schedule, 5) == []
    assert counter.frame_count == 1
    x = torch.randn(8, 4)
    before = compiled(x)
    assert train(compiled, optimizer, schedule, 1) == [6]
    torch.testing.assert_close(compiled(x), model(x))
    assert before.shape == compiled(x).shape
    schedule.close()


@pytest.mark.situation("Compile and export", "schedule on a compiled model, criterion of activations", "works")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo, at a graph break
def test_activations_of_a_compiled_model_are_measured():
    torch.compiler.reset()
    model = network()
    compiled: Any = torch.compile(model, backend="eager")
    optimizer = SGD(model.parameters(), lr=0.1)
    lowest = surgery.Lowest(0.25, of="dormant")
    with surgery.Schedule(compiled, optimizer, lowest, operate=Every(4)) as schedule:
        train(compiled, optimizer, schedule, 3)
        assert schedule._watch.evidence.num_samples("0", surgery.Quantity.ACTIVATION) == 3 * 8
        assert train(compiled, optimizer, schedule, 1) == [4]


@pytest.mark.situation("Compile and export", "compiled optimizer step", "works")
def test_steps_of_a_compiled_optimizer_are_counted():
    torch.compiler.reset()
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    step = torch.compile(optimizer.step, backend="eager")
    schedule = surgery.Schedule(model, optimizer, "stagnant", operate=Every(100))
    for x in batches(3):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        step()
        schedule.step()
    assert schedule.num_steps == 3
    assert schedule._watch.evidence.num_steps == 3


# -- other operations, other loads -----------------------------------------------------------------------------------


@pytest.mark.situation(WHEN, "by hand, between scheduled operations", "works")
def test_what_was_measured_of_a_site_before_an_operation_by_hand_is_dropped():
    model = network()
    optimizer = Adam(model.parameters())
    schedule = surgery.Schedule(model, optimizer, surgery.Lowest(0.25), operate=Every(6), cooldown=100)
    train(model, optimizer, schedule, 4)
    by_hand = surgery.knife(model, Units({"0": [3, 5]}), optimizer=optimizer)
    train(model, optimizer, schedule, 1)
    evidence, activity = schedule._watch.evidence, surgery.Quantity.UPDATE_ACTIVITY
    assert [evidence.num_samples(site, activity) for site in "02"] == [0, 5]
    assert train(model, optimizer, schedule, 1) == [6]
    assert isinstance(schedule.last, surgery.Report)
    surgery.undo(model, schedule.last, optimizer=optimizer)
    train(model, optimizer, schedule, 2)
    assert not {3, 5} & set(schedule.last.operated.get("0", ()))  # they are young
    assert by_hand.num_units == 2


def test_a_unit_whose_operation_was_undone_is_no_longer_young():
    model = network()
    optimizer = Adam(model.parameters())
    schedule = surgery.Schedule(model, optimizer, Random(0.25, seed=0), operate=Every(2), cooldown=100)
    train(model, optimizer, schedule, 2)
    first = schedule.last
    assert isinstance(first, surgery.Report)
    assert train(model, optimizer, schedule, 2) == []  # the same units, all young
    surgery.undo(model, first, optimizer=optimizer)
    assert train(model, optimizer, schedule, 2) == [6]
    assert isinstance(schedule.last, surgery.Report)
    assert dict(schedule.last.operated) == dict(first.operated)


@pytest.mark.situation(WHEN, "checkpoint loaded in mid-run", "works")
def test_a_run_that_returns_to_an_earlier_checkpoint_repeats_what_it_did():
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = surgery.Schedule(model, optimizer, surgery.Lowest(0.25), operate=Every(4), cooldown=2)
    train(model, optimizer, schedule, 6)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), schedule.state_dict()])
    train(model, optimizer, schedule, 5, seed=1)
    expected = as_bits(model)
    surgery.restore(model, saved[0])
    optimizer.load_state_dict(saved[1])
    schedule.load_state_dict(saved[2])
    train(model, optimizer, schedule, 5, seed=1)
    assert as_bits(model) == expected


def test_an_output_that_moves_is_put_back_and_the_schedule_tries_again(monkeypatch: pytest.MonkeyPatch):
    model = network()
    optimizer = Adam(model.parameters())
    schedule = surgery.Schedule(model, optimizer, Random(0.25), operate=Every(2), verify=lambda: torch.randn(8, 4))
    take(model, optimizer, next(batches(1)))
    schedule.step()
    take(model, optimizer, next(batches(1)))
    before = as_bits(model)
    with monkeypatch.context() as patch:
        patch.setattr("neuronsurgery.pytorch.checking.TOLERANCES", {}, raising=False)
        patch.setattr("neuronsurgery.pytorch.operating.SameOutput.apply", fault)
        with pytest.raises(surgery.EquivalenceError):
            schedule.step()
    assert as_bits(model) == before
    assert train(model, optimizer, schedule, 1) == [3]
    assert isinstance(schedule.last, surgery.Report)
    assert schedule.last.verified


def fault(self: Any) -> None:
    raise surgery.EquivalenceError("moved")


# -- what is asked of it ---------------------------------------------------------------------------------------------


def test_triggers_work_in_a_training_run():
    model = network()
    optimizer = Adam(model.parameters())
    operate = TaskChange(after=2) | Plateau(3) | Share(0.99, every=1)
    schedule = surgery.Schedule(model, optimizer, Random(0.25), operate=operate, cooldown=0)
    for index, x in enumerate(batches(9)):
        if index == 6:
            assert schedule.task_changed() is None
        take(model, optimizer, x)
        report = schedule.step(torch.ones(1, requires_grad=True))
        assert (report is not None) == (index in (3, 7)), index  # three more values of 1.0; two steps of the task


def test_a_value_that_is_no_number_is_refused():
    model = network()
    schedule = surgery.Schedule(model, Adam(model.parameters()), "stagnant", operate=Plateau(3))
    for value in (torch.randn(2), "low"):
        with pytest.raises(surgery.ScheduleError, match="takes a number"):
            schedule.step(value)


def test_any_function_in_the_manner_of_knife_may_be_the_method():
    seen = []

    def redraw(model: Any, criterion: Any, *, optimizer: Any, strength: float) -> Any:
        seen.append(strength)
        return surgery.knife(model, criterion, optimizer=optimizer)

    model = network()
    optimizer = Adam(model.parameters())
    schedule = surgery.Schedule(model, optimizer, Random(0.25), operate=Every(1), method=redraw, strength=0.5)
    train(model, optimizer, schedule, 1)
    assert seen == [0.5]
    method = functools.partial(surgery.knife, max_growth=0.5)
    schedule = surgery.Schedule(model, optimizer, Random(0.5), operate=Every(1), method=method, cooldown=0)
    train(model, optimizer, schedule, 1)
    assert isinstance(schedule.last, surgery.Report)
    assert schedule.last.plan.max_growth == 0.5


def test_units_that_are_named_are_accepted_at_range_bearing_sites():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Tanh())
    optimizer = Adam(model.parameters())
    schedule = surgery.Schedule(model, optimizer, Units({"2": [1]}), operate=Every(2))
    assert train(model, optimizer, schedule, 2) == [2]
    named = surgery.Schedule(model, optimizer, surgery.Lowest(0.5), operate=Every(2), sites=["2"], cooldown=0)
    train(model, optimizer, named, 2)
    assert isinstance(named.last, surgery.Report)
    assert set(named.last.operated) == {"2"}


@pytest.mark.situation(WHEN, "a schedule that can never act", "refused")
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m, o: surgery.Schedule(m, o, "stagnant", operate=Every(1), sites=["fc1"]), "SiteError", "no producer"),
        (lambda m, o: surgery.Schedule(m, o, "stagnant", operate=Every(1), sites=["4"]), "SiteError", "declined"),
        (lambda m, o: surgery.Schedule(m, o, Units({"0": [99]}), operate=Every(1)), "SiteError", "unit 99"),
        (lambda m, o: surgery.Schedule(m, None, "stagnant", operate=Every(1)), "OptimizerError", "found None"),
        (lambda m, o: surgery.Schedule(m, "adam", "stagnant", operate=Every(1)), "OptimizerError", "takes a torch"),
        (
            lambda m, o: surgery.Schedule(m, Adam(network().parameters()), "stagnant", operate=Every(1)),
            "OptimizerError",
            "owns none",
        ),
        (
            lambda m, o: surgery.Schedule(m, Adam(m[4].parameters()), "stagnant", operate=Every(1)),
            "OptimizerError",
            "no optimizer owns the weight",
        ),
        (lambda m, o: surgery.Schedule(m[4], o, "stagnant", operate=Every(1)), "SiteError", "no site"),
        (lambda m, o: surgery.Schedule(m, o, "stagnnt", operate=Every(1)), "CriterionError", "did you mean"),
        (
            lambda m, o: surgery.Schedule(m, o, "stagnant", operate=1000),  # type: ignore[arg-type]
            "ScheduleError",
            "no trigger",
        ),
        (
            lambda m, o: surgery.Schedule(m, o, "stagnant", operate=Every(1), max_grwth=2),
            "ScheduleError",
            "max_grwth",
        ),
        (
            lambda m, o: surgery.Schedule(m, o, "stagnant", operate=Every(1), generator=0),
            "DrawError",
            "generator",
        ),
    ],
)
def test_a_schedule_that_could_never_act_is_refused(make: Callable[..., object], error: str, message: str):
    model = network()
    with pytest.raises(getattr(surgery, error), match=message):
        make(model, Adam(model.parameters()))


def test_a_schedule_prints_where_it_stands():
    model = network()
    optimizer = Adam(model.parameters())
    schedule = surgery.Schedule(model, optimizer, Random(0.25), operate=Every(2))
    train(model, optimizer, schedule, 3)
    text = str(schedule)
    assert text.startswith("Schedule: Random(fraction=0.25, seed=None) at Every(2)")
    assert "|     3 |          1 |     6 | none needed     | in 1 step |" in text
    assert "Operation 1: 6 units operated on" in text


# -- networks that follow --------------------------------------------------------------------------------------------


@pytest.mark.situation(WHEN, "targets that follow each operation", "works")
def test_mirrors_follow_each_operation_of_a_schedule():
    model = network()
    target = copy.deepcopy(model).requires_grad_(False)
    optimizer = Adam(model.parameters(), lr=0.01)
    schedule = surgery.Schedule(model, optimizer, Random(0.25), operate=Every(2), mirrors=target, cooldown=0)
    x = next(batches(1))
    before = target(x)
    assert train(model, optimizer, schedule, 6) == [2, 4, 6]
    torch.testing.assert_close(target(x), before)
    target.load_state_dict(model.state_dict())
    assert torch.equal(target(x), model(x))


@pytest.mark.situation(WHEN, "a target that cannot follow", "refused")
def test_a_mirror_that_cannot_follow_is_refused_before_the_schedule_begins_and_before_it_operates():
    model = network()
    optimizer = Adam(model.parameters(), lr=0.01)
    with pytest.raises(surgery.MirrorError):
        surgery.Schedule(model, optimizer, Random(0.25), operate=Every(2), mirrors=nn.Sequential(nn.Linear(4, 2)))
    target = copy.deepcopy(model)
    schedule = surgery.Schedule(model, optimizer, Random(0.5), operate=Every(2), mirrors=target, cooldown=0)
    train(model, optimizer, schedule, 3)
    with torch.no_grad():  # frozen rows stay behind: wrong for "own"
        for parameter, own in zip(model.parameters(), target.parameters(), strict=True):
            own.copy_(parameter)
    operated = surgery.composites(model)
    with pytest.raises(surgery.MirrorError):
        train(model, optimizer, schedule, 1)
    assert surgery.composites(model) == operated
