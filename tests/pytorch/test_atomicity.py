"""All or nothing: wherever a fault strikes, everything is as it was, bit for bit, and trains on as if nothing had been.

Faults are injected before and after every change of an operation, into the functions that prepare it, and, with
Python's tracing, at every line that runs.
"""

from __future__ import annotations

import linecache
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from neuronsurgery import surgery
from neuronsurgery.pytorch import operating, optimizers, rewriting, transaction
from neuronsurgery.pytorch.transaction import Change
from neuronsurgery.reports import Report
from tests.snapshots import assert_untouched, bits, snapshot
from tests.subjects import MODELS, OPTIMIZERS, Subject, subject


class Fault(RuntimeError):
    """What the tests inject."""


class Faulty:
    """A change that fails before or after it is applied."""

    def __init__(self, change: Change, error: BaseException, *, after: bool) -> None:
        self.change, self.error, self.after = change, error, after

    def apply(self) -> None:
        if self.after:
            self.change.apply()
        raise self.error

    def revert(self) -> None:
        self.change.revert()


@contextmanager
def failing_at(position: int, error: BaseException, *, after: bool) -> Iterator[list[str]]:
    """Let the change at a position fail; yields the names of all changes of the latest operation."""
    names: list[str] = []

    def run(changes: Sequence[Change], record: Any) -> Any:
        names[:] = [type(change).__name__ for change in changes]
        faulty = [Faulty(each, error, after=after) if n == position else each for n, each in enumerate(changes)]
        return transaction.run(faulty, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operating, "run", run)
        yield names


STAGES = ("first", "within capacity", "beyond capacity", "undo all", "undo part")


def staged(model: str, optimizer: str, stage: str) -> tuple[Subject, Callable[[torch.Generator], Report]]:
    """A subject before an operation, and the operation."""
    found = subject(model, optimizer)
    net, owners = found.model, found.optimizers

    def planned(*units: int) -> Callable[[torch.Generator | None], Report]:
        scores = surgery.score(surgery.discover(net), None, surgery.Units(found.units(*units)))
        plan = surgery.plan(surgery.select(scores))
        return lambda generator: surgery.operate(net, plan, owners, verify=found.x, generator=generator)

    if stage == "first":
        return found, planned(1, 5)
    report = planned(1, 5)(None)
    found.train()
    if stage == "within capacity":
        return found, planned(5, 6)
    if stage == "beyond capacity":
        return found, planned(0, 1, 2, 3, 4, 5)
    if stage == "undo part":
        report = planned(2, 5)(None)
        found.train()
    return found, lambda generator: surgery.undo(net, report, owners)


def cases() -> Iterator[Any]:
    for stage in STAGES:
        for model in MODELS:
            yield pytest.param(model, "adam", stage, id=f"{model}-adam-{stage}")
        for optimizer in OPTIMIZERS:
            if optimizer != "adam" and stage not in ("beyond capacity", "undo all"):
                marks = () if stage == "first" else pytest.mark.slow  # Adam has these stages with every model
                yield pytest.param("sequential", optimizer, stage, id=f"sequential-{optimizer}-{stage}", marks=marks)


@pytest.mark.parametrize(("model", "optimizer", "stage"), list(cases()))
def test_a_fault_before_or_after_any_change_leaves_everything_as_it_was(model, optimizer, stage):
    found, operation = staged(model, optimizer, stage)
    generator = torch.Generator().manual_seed(7)
    before = snapshot(found.model, found.optimizers, generator)
    struck = 0
    position, num_changes = 0, 1
    while position < num_changes:
        for after in (False, True):
            error = KeyboardInterrupt("injected") if (position + after) % 2 else Fault("injected")
            with failing_at(position, error, after=after) as names, pytest.raises(type(error), match="injected"):
                operation(generator)
            why = f"{names[position]} {position} of {names}, {'after' if after else 'before'}"
            assert_untouched(before, found.model, found.optimizers, generator, why)
            struck += 1
            num_changes = len(names)
        position += 1
    assert struck >= 8, names
    # and it trains on as one that never saw a fault, and can still be operated on
    twin, twins_operation = staged(model, optimizer, stage)
    for each, operate in ((found, operation), (twin, twins_operation)):
        torch.manual_seed(11)
        each.train(2)
        operate(torch.Generator().manual_seed(1))
        each.train(2)
    for one, other in zip(found.model.state_dict().values(), twin.model.state_dict().values(), strict=True):
        assert bits(one) == bits(other)


PREPARATIONS = (
    "discover check_plan num_weights next_operation seed_for drawn_alike _extended_bank check_composite slot_changes "
    "hang class_changes rewritten_class SameOutput _notes Report"
).split()


@pytest.mark.parametrize("name", PREPARATIONS)
@pytest.mark.parametrize("stage", ["first", "within capacity"])
def test_a_fault_in_any_part_of_operate_leaves_everything_as_it_was(monkeypatch, name, stage):
    found, operation = staged("conv", "adam", stage)
    generator = torch.Generator().manual_seed(7)
    before = snapshot(found.model, found.optimizers, generator)
    struck = 0
    for call in range(10):
        with pytest.MonkeyPatch.context() as patch:
            owner = rewriting if name == "rewritten_class" else operating
            patch.setattr(owner, name, failing_call(getattr(owner, name), call))
            try:
                operation(generator)
            except Fault:
                struck += 1
            else:
                break
        assert_untouched(before, found.model, found.optimizers, generator, f"call {call} of {name}")
    assert struck >= 1 and call == struck, "either never reached, or called more often than was tried"


def failing_call(function: Callable[..., Any], position: int) -> Callable[..., Any]:
    """The function, which at its call number `position` works and then fails."""
    calls = iter(range(10**6))

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if next(calls) == position:
            raise Fault("injected")
        return result

    return wrapped


@pytest.mark.parametrize("name", ["refresh", "births", "current_step", "check_owners"])
def test_a_fault_in_the_optimizers_part_leaves_everything_as_it_was(name):
    for stage in ("first", "within capacity", "undo all"):
        found, operation = staged("sequential", "adam", stage)
        generator = torch.Generator().manual_seed(7)
        before = snapshot(found.model, found.optimizers, generator)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimizers, name, failing_call(getattr(optimizers, name), 0))
            with pytest.raises(Fault):
                operation(generator)
        assert_untouched(before, found.model, found.optimizers, generator, f"{name} at {stage}")


# -- at every line ---------------------------------------------------------------------------------------------------

LEFT_OUT = {"left_alone", "random_states_kept", "_rng_untouched", "_seeded", "revert", "_is_between_hooks"}
"""Functions whose lines put things back: an interrupt there, in the clean-up itself, is beyond the promise. The last
changes nothing, and walks a stack whose depth differs from call to call.
"""


class Lines:
    """A trace function that counts the lines run in some files, and raises KeyboardInterrupt at one of them."""

    def __init__(self, files: Sequence[str], stop: int | None) -> None:
        self.files, self.stop, self.count, self.where = files, stop, 0, ""

    def __call__(self, frame: Any, event: str, argument: Any) -> Any:
        code = frame.f_code
        is_ours = any(code.co_filename.endswith(f"/neuronsurgery/{name}") for name in self.files)
        return self.line if is_ours and code.co_name not in LEFT_OUT else None

    def line(self, frame: Any, event: str, argument: Any) -> Any:
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        # Python traces a `with` line again on leaving its block, before __exit__: it never interrupts itself there.
        if event == "line" and not source.startswith("with "):
            if self.count == self.stop:
                self.where = f"{frame.f_code.co_name}, line {frame.f_lineno} of {frame.f_code.co_filename}"
                sys.settrace(None)
                self.count += 1
                raise KeyboardInterrupt("injected")
            self.count += 1
        return self.line


CHANGING = [
    "pytorch/transaction.py", "pytorch/operating.py", "pytorch/optimizers.py", "pytorch/step_hooks.py",
    "pytorch/fresh_state.py", "pytorch/corrections.py",
]  # fmt: skip
PREPARING = [
    "pytorch/drawing.py", "pytorch/checking.py", "pytorch/composites.py", "composites.py", "pytorch/programs.py",
    "pytorch/tracing.py", "pytorch/mirroring.py", "pytorch/sites.py", "pytorch/uses.py", "pytorch/calls.py",
    "pytorch/carrying.py", "pytorch/rewriting.py", "pytorch/places.py", "pytorch/survey.py", "pytorch/reading.py",
]  # fmt: skip


def lines_to_strike(stage: str, files: Sequence[str], model: str) -> int:
    """How many lines of the files an operation runs, once everything that is cached is cached."""
    staged(model, "adam", stage)[1](torch.Generator().manual_seed(7))
    operation = staged(model, "adam", stage)[1]
    lines = Lines(files, None)
    sys.settrace(lines)
    try:
        operation(torch.Generator().manual_seed(7))
    finally:
        sys.settrace(None)
    return lines.count


def assert_no_line_leaves_a_trace(stage: str, files: Sequence[str], model: str, at_most: int) -> None:
    """An interrupt at any of `at_most` lines, evenly spread, changes nothing."""
    total = lines_to_strike(stage, files, model)
    assert total > 100, "the trace saw nothing"
    found, operation = staged(model, "adam", stage)
    before = snapshot(found.model, found.optimizers)
    stops = sorted({round(index * (total - 1) / (at_most - 1)) for index in range(at_most)})
    for stop in stops:
        lines = Lines(files, stop)
        try:
            sys.settrace(lines)
            operation(torch.Generator().manual_seed(7))
        except KeyboardInterrupt:
            pass
        else:
            pytest.fail(f"line {stop} of {total} was not reached, or its interrupt was swallowed: {lines.where}")
        finally:
            sys.settrace(None)
        assert_untouched(before, found.model, found.optimizers, why=f"{lines.where} ({stop} of {total})")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("files", "at_most"), [(CHANGING, 24), (PREPARING, 8)], ids=["changing", "preparing"])
def test_an_interrupt_at_any_line_leaves_everything_as_it_was(stage, files, at_most):
    assert_no_line_leaves_a_trace(stage, files, "prelu", at_most)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("files", [CHANGING, PREPARING], ids=["changing", "preparing"])
def test_an_interrupt_at_any_of_very_many_lines_leaves_everything_as_it_was(stage, files):
    assert_no_line_leaves_a_trace(stage, files, "conv", 400)


# -- refusals and failures that users meet ---------------------------------------------------------------------------


def test_a_failing_verify_batch_leaves_everything_as_it_was():
    found = subject("conv", "adam")
    misfit = torch.randn(2, 3)
    before = snapshot(found.model, found.optimizers)
    with pytest.raises(RuntimeError):
        surgery.knife(found.model, surgery.Units({"0": [1]}), optimizer=found.optimizers, verify=misfit)
    assert_untouched(before, found.model, found.optimizers)


class Noisy(nn.Module):
    """A forward that draws from Python's and numpy's random states, and rebinds a buffer."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.body(x) * random.random() + float(np.random.rand()) + torch.rand(())
        self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
        return out


def test_verify_is_not_deceived_by_random_numbers_and_leaves_their_states_and_rebound_buffers_alone():
    model = Noisy()
    x = torch.randn(5, 4)
    before = snapshot(model)
    kept = model.mean
    report = surgery.knife(model, surgery.Units({"body.0": [1]}), verify=x)
    assert report.model_error is not None and report.model_error <= 2e-6
    after = snapshot(model)
    for label in ("torch's random state", "Python's random state", "numpy's random state"):
        assert before[label] == after[label], label
    assert model.mean is kept
    assert not kept.any()


def test_knife_leaves_the_generator_alone_when_it_fails():
    found = subject()
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    with pytest.raises(RuntimeError):
        surgery.knife(found.model, surgery.Random(0.5), generator=generator, verify=torch.randn(2, 3))
    assert torch.equal(generator.get_state(), state)


def test_an_operation_seeds_no_global_random_state_of_any_device(monkeypatch):
    found = subject()

    def refuse(*_: Any) -> None:
        raise AssertionError("torch.manual_seed also seeds every accelerator")

    for name in ("manual_seed", "seed"):
        monkeypatch.setattr(torch, name, refuse)
        monkeypatch.setattr(torch.random, name, refuse)
    seed, state = torch.initial_seed(), torch.get_rng_state()
    surgery.knife(found.model, surgery.Units({"0": [1]}), optimizer=found.optimizers, verify=found.x)
    assert torch.initial_seed() == seed and torch.equal(torch.get_rng_state(), state)


# -- the helper can fail ---------------------------------------------------------------------------------------------


def tampers() -> Iterator[Any]:
    def tamper(name: str, act: Callable[[Subject], Any]) -> Any:
        return pytest.param(act, id=name)

    def weight(found: Subject) -> Any:
        return next(found.model.parameters())

    def first_state(found: Subject) -> Any:
        return next(iter(found.optimizers[0].state.values()))

    yield tamper("weight", lambda s: weight(s).data.view(-1)[:1].add_(1e-7))
    yield tamper("grad", lambda s: setattr(weight(s), "grad", weight(s).grad.clone()))
    yield tamper("buffer", lambda s: s.model[2].running_mean.add_(1e-7))
    yield tamper("buffer-order", lambda s: reorder(s.model[2]._buffers))
    yield tamper("module-order", lambda s: reorder(s.model._modules))
    yield tamper("class", lambda s: setattr(s.model[1], "__class__", nn.ReLU6))
    yield tamper("mode", lambda s: s.model[1].eval())
    yield tamper("module-hook", lambda s: s.model[0].register_forward_hook(lambda *_: None))
    yield tamper("gradient-hook", lambda s: weight(s).register_post_accumulate_grad_hook(lambda p: None))
    yield tamper("optimizer-hook", lambda s: s.optimizers[0].register_step_pre_hook(lambda *_: None))
    yield tamper("moment", lambda s: first_state(s)["exp_avg"].view(-1)[:1].add_(1e-7))
    yield tamper("moment-object", lambda s: first_state(s).update(exp_avg=first_state(s)["exp_avg"].clone()))
    yield tamper("step", lambda s: first_state(s)["step"].add_(1))
    yield tamper("lr", lambda s: s.optimizers[0].param_groups[0].update(lr=1.0))
    yield tamper("random-state", lambda s: torch.rand(1))


def reorder(mapping: dict[str, Any]) -> None:
    key = next(iter(mapping))
    mapping[key] = mapping.pop(key)


@pytest.mark.parametrize("tamper", list(tampers()))
def test_assert_untouched_can_fail(tamper):
    found = subject("conv")
    before = snapshot(found.model, found.optimizers)
    assert_untouched(before, found.model, found.optimizers)
    tamper(found)
    with pytest.raises(AssertionError):
        assert_untouched(before, found.model, found.optimizers)
