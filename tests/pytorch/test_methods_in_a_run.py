"""Methods beside knife in a training run: on a schedule, resumed, with a fault at any change, in a compiled model."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from neuronsurgery import surgery
from neuronsurgery.pytorch import renewing, transaction
from neuronsurgery.pytorch.transaction import Change
from tests.snapshots import assert_untouched, snapshot

METHODS: dict[str, tuple[Callable[..., Any], Any]] = {
    "redo": (surgery.redo, surgery.Lowest(0.3, of="dormant")),
    "regrama": (surgery.regrama, surgery.Lowest(0.3, of="grama")),
    "reborn": (partial(surgery.reborn, over_active=1.1), surgery.Lowest(0.3, of="dormant")),
    "widen": (surgery.widen, surgery.Random(0.3)),
}
every_method = pytest.mark.parametrize("name", METHODS)


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 7), nn.LeakyReLU(), nn.Linear(7, 2))


def train(model: Any, optimizer: Any, steps: range, schedule: Any = None) -> list[Any]:
    reports = []
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        if schedule is not None and (report := schedule.step()) is not None:
            reports.append(report)
    return reports


def scheduled(name: str, model: Any, optimizer: Any, cooldown: int = 7) -> Any:
    method, criterion = METHODS[name]
    look = surgery.Last(3)
    return surgery.Schedule(
        model, optimizer, criterion, operate=surgery.Every(5), look=look, cooldown=cooldown, method=method
    )


@every_method
@pytest.mark.situation("When to operate", "other methods on a schedule", "works")
def test_a_schedule_hands_units_to_the_method_and_passes_over_young_ones(name: str) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with scheduled(name, model, optimizer, cooldown=100) as schedule:
        reports = train(model, optimizer, range(20), schedule)
        num_units = schedule.state_dict()["counts"]["num_units"]
    assert reports and all(report.method == name for report in reports)
    taken = [(site, unit) for report in reports for site, units in report.operated.items() for unit in units]
    assert len(taken) == len(set(taken)) == num_units


@pytest.mark.parametrize("name", [name for name in METHODS if name != "widen"])
@pytest.mark.situation("Checkpoints and copies", "other methods on a schedule, resumed", "works")
def test_a_run_that_was_killed_goes_on_bit_for_bit(name: str) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    schedule = scheduled(name, model, optimizer)
    assert train(model, optimizer, range(12), schedule)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    resumed = network()
    resumed.load_state_dict(states[0])
    again = torch.optim.Adam(resumed.parameters(), lr=0.01)
    again.load_state_dict(states[1])
    other = scheduled(name, resumed, again)
    other.load_state_dict(states[2])
    assert train(model, optimizer, range(12, 30), schedule)
    train(resumed, again, range(12, 30), other)
    for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


class Fault(RuntimeError):
    """What the tests inject."""


class Faulty:
    """A change that fails before or after it is applied."""

    def __init__(self, change: Change, *, after: bool) -> None:
        self.change, self.after = change, after

    def apply(self) -> None:
        if self.after:
            self.change.apply()
        raise Fault("injected")

    def revert(self) -> None:
        self.change.revert()


@every_method
def test_a_fault_before_or_after_any_change_leaves_everything_as_it_was(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, range(3))
    surgery.redo(model, surgery.Units({"0": [7], "2": [6]}), optimizer=optimizer)
    train(model, optimizer, range(3, 5))
    x = torch.randn(8, 4)
    evidence = surgery.probe(model, [x], lambda model, x: model(x).square().mean())
    method, criterion = METHODS[name]
    generator = torch.Generator().manual_seed(3)
    before, counts = snapshot(model, [optimizer], generator), [1]

    def run(position: int, after: bool, changes: Sequence[Change], record: Any) -> Any:
        counts[0] = len(changes)
        faulty = [Faulty(each, after=after) if n == position else each for n, each in enumerate(changes)]
        return transaction.run(faulty, record)

    position = 0
    while position < counts[0]:
        for after in (False, True):
            monkeypatch.setattr(renewing, "run", partial(run, position, after))
            with pytest.raises(Fault):
                method(model, criterion, evidence=evidence, optimizer=optimizer, verify=x, generator=generator)
            assert_untouched(before, model, [optimizer], generator, f"{position} {after}")
        position += 1
    assert position >= 2


@every_method
@pytest.mark.situation("Compile and export", "torch.compile, other methods", "works")
def test_a_compiled_model_takes_what_was_written(name: str) -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(8, 4)
    compiled(x)
    evidence = surgery.probe(model, [x], lambda model, x: model(x).square().mean())
    method, criterion = METHODS[name]
    assert method(compiled, criterion, evidence=evidence).num_units
    torch.testing.assert_close(compiled(x), model(x))
