"""A run that is killed between two steps and resumed from its checkpoint goes on bit for bit as one that never was."""

from __future__ import annotations

import copy
import io
import os
import pickle
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from neuronsurgery import surgery
from neuronsurgery.pytorch.entry import ages
from neuronsurgery.pytorch.optimizers import young_rows
from neuronsurgery.pytorch.step_hooks import CLOCKS
from tests.snapshots import assert_untouched, snapshot
from tests.state_subjects import as_bits

CHECKPOINTS = "Checkpoints and copies"
OPERATE_EVERY, NUM_STEPS = 3, 14

MAKE: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "SGD, momentum and dampening": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, dampening=0.5),
}


def build() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 2)
    )


# -- killed and resumed ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Run:
    """A training run with everything around the model that has a state: one function of its seeds."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    data: torch.Generator
    num_steps: int = 0

    @staticmethod
    def start(name: str) -> Run:
        model = build()
        optimizer = MAKE[name](model.parameters())
        random.seed(2)
        np.random.seed(3)
        torch.manual_seed(4)
        return Run(model, optimizer, CosineAnnealingLR(optimizer, 10), torch.Generator().manual_seed(5))

    def step(self) -> None:
        """One step; every few of them the units that did least are operated on, old enough ones only."""
        x = torch.randn(8, 4, generator=self.data) + random.random() + np.random.rand()
        self.optimizer.zero_grad()
        self.model(x).square().mean().backward()
        self.optimizer.step()
        self.scheduler.step()
        self.num_steps += 1
        if self.num_steps % OPERATE_EVERY == 0:
            criterion = surgery.Lowest(0.2) if self.num_steps % 2 else surgery.Random(0.2)
            surgery.knife(self.model, criterion, optimizer=self.optimizer, cooldown=5)

    def save(self, path: Path) -> None:
        """All of it, written beside its place and moved there: no kill leaves half a file."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "data": self.data.get_state(),
            "torch": torch.get_rng_state(),
            "others": pickle.dumps((random.getstate(), np.random.get_state())),
            "num_steps": self.num_steps,
        }
        written = path.with_suffix(f".{os.getpid()}")
        torch.save(state, written)
        written.replace(path)

    @staticmethod
    def resume(name: str, path: Path) -> Run:
        state = torch.load(path, weights_only=True)
        model = build()
        optimizer = MAKE[name](model.parameters())
        scheduler = CosineAnnealingLR(optimizer, 10)
        surgery.restore(model, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        surgery.attach(model, optimizer)
        data = torch.Generator()
        data.set_state(state["data"])
        python, numpy = pickle.loads(state["others"])
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(state["torch"])
        return Run(model, optimizer, scheduler, data, state["num_steps"])

    def summary(self) -> dict[str, Any]:
        """What two runs that are one have in common, bit for bit."""
        names: dict[torch.Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        state = self.optimizer.state
        entries = {f"{names[p]} {key}": v for p, each in state.items() for key, v in each.items() if torch.is_tensor(v)}
        young = {names[parameter]: rows for parameter, rows in young_rows(self.optimizer).items()}
        return {
            "model": as_bits(self.model.state_dict()),
            "optimizer": as_bits(entries),
            "settings": [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups],
            "scheduler": self.scheduler.state_dict(),
            "random": (as_bits({"torch": torch.get_rng_state(), "data": self.data.get_state()}), random.getstate()),
            "composites": surgery.composites(self.model),
            "ages": ages(self.model, self.optimizer),
            "young": young,
            "num_steps": self.num_steps,
        }


def killed_after(name: str, path: Path, first: int, last: int) -> None:
    """Train in a process of its own from one step to another, with a checkpoint after each, and kill that process."""
    child = os.fork()
    if child == 0:
        try:
            run = Run.resume(name, path) if first else Run.start(name)
            assert run.num_steps == first
            while True:
                run.step()
                run.save(path)
                if run.num_steps == last:
                    os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)  # reached by an exception alone
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "the child failed before it was killed"


def assert_goes_on(name: str, path: Path, kills: list[int]) -> None:
    """Killed at these steps, each time resumed from the last checkpoint, and run to the end: as if never killed."""
    first = 0
    for last in kills:
        killed_after(name, path, first, last)
        first = last
    resumed = Run.resume(name, path)
    while resumed.num_steps < NUM_STEPS:
        resumed.step()
    found = resumed.summary()
    whole = Run.start(name)
    while whole.num_steps < NUM_STEPS:
        whole.step()
    expected = whole.summary()
    assert [key for key in expected if found[key] != expected[key]] == []


CASES = [
    pytest.param(name, marks=pytest.mark.situation(CHECKPOINTS, f"killed and resumed, {name}", "works"), id=name)
    for name in MAKE
]
NEEDS_FORK = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")


@NEEDS_FORK
@pytest.mark.parametrize("name", CASES)
def test_a_run_killed_between_steps_goes_on_bit_for_bit(name: str, tmp_path: Path):
    assert_goes_on(name, tmp_path / "checkpoint", [OPERATE_EVERY, OPERATE_EVERY + 1, 8])


@NEEDS_FORK
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(20))
def test_a_run_killed_at_random_goes_on_bit_for_bit(name: str, seed: int, tmp_path: Path):
    kills = random.Random(seed).sample(range(1, NUM_STEPS), random.Random(seed).randint(1, 3))
    assert_goes_on(name, tmp_path / "checkpoint", sorted(kills))


def test_the_comparison_of_runs_sees_a_missing_attach(tmp_path: Path, monkeypatch):
    """The helper can fail: without hooks and clocks the runs part."""
    monkeypatch.setattr(surgery, "attach", lambda model, optimizer: None)
    for name in MAKE:
        run = Run.start(name)
        for _ in range(OPERATE_EVERY):
            run.step()
        run.save(tmp_path / "checkpoint")
        found, expected = Run.resume(name, tmp_path / "checkpoint").summary(), run.summary()
        assert found["ages"] != expected["ages"] or found["young"] != expected["young"]


# -- attach ----------------------------------------------------------------------------------------------------------


def trained(name: str, num_steps: int = OPERATE_EVERY + 2) -> Run:
    run = Run.start(name)
    for _ in range(num_steps):
        run.step()
    return run


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


def saved_whole(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


COPIES = [
    pytest.param(copy.deepcopy, id="deepcopy", marks=pytest.mark.situation(CHECKPOINTS, "copy.deepcopy", "works")),
    pytest.param(pickled, id="pickle", marks=pytest.mark.situation(CHECKPOINTS, "pickle", "works")),
    pytest.param(
        saved_whole, id="torch.save", marks=pytest.mark.situation(CHECKPOINTS, "torch.save of a whole module", "works")
    ),
]


@pytest.mark.parametrize("name", list(MAKE))
@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("num_steps", [OPERATE_EVERY, OPERATE_EVERY + 2])
def test_a_copy_trains_on_as_the_original_once_attached(name: str, copied: Any, num_steps: int):
    run = trained(name, num_steps)
    model = copied(run.model)
    optimizer = MAKE[name](model.parameters())
    optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    surgery.attach(model, optimizer)
    assert ages(model, optimizer) == ages(run.model, run.optimizer) != {}
    x = torch.randn(8, 4)
    for net, owner in ((model, optimizer), (run.model, run.optimizer)):
        torch.manual_seed(9)
        for _ in range(3):
            owner.zero_grad()
            net(x).square().mean().backward()
            owner.step()
        surgery.knife(net, surgery.Lowest(0.3), optimizer=owner, cooldown=3)
    assert as_bits(model.state_dict()) == as_bits(run.model.state_dict())


@pytest.mark.parametrize("name", list(MAKE))
def test_attaching_again_changes_nothing(name: str):
    run = trained(name)
    model = copy.deepcopy(run.model)
    optimizer = MAKE[name](model.parameters())
    optimizer.load_state_dict(run.optimizer.state_dict())
    for net, owner in ((run.model, run.optimizer), (model, optimizer)):
        surgery.attach(net, owner)
        before = snapshot(net, [owner])
        surgery.attach(net, owner)
        assert_untouched(before, net, [owner])
        assert ages(net, owner) == ages(run.model, run.optimizer)


def test_an_earlier_state_takes_the_count_of_steps_back_with_it():
    name = "SGD, momentum and dampening"
    run = trained(name)
    saved, then = copy.deepcopy(run.model.state_dict()), ages(run.model, run.optimizer)
    run.optimizer.zero_grad()
    for _ in range(3):
        run.optimizer.step()
    later = ages(run.model, run.optimizer)
    assert later != then
    run.model.load_state_dict(saved)
    assert ages(run.model, run.optimizer) == then
    run.optimizer.step()
    surgery.restore(run.model, saved)
    assert ages(run.model, run.optimizer) == then
    run.optimizer.step()
    assert ages(run.model, run.optimizer) != then


def test_a_load_that_fails_leaves_the_count_of_steps():
    run = trained("SGD, momentum and dampening")
    saved = copy.deepcopy(run.model.state_dict())
    run.optimizer.step()
    now = ages(run.model, run.optimizer)
    del saved["6.bias"]
    with pytest.raises(RuntimeError, match=r"6\.bias"):
        surgery.restore(run.model, saved)
    assert ages(run.model, run.optimizer) == now


def test_a_clock_goes_on_where_it_was_saved_for_all_models_of_an_optimizer():
    run = trained("SGD, momentum and dampening")
    models = nn.ModuleList([build(), build()])
    optimizer = MAKE["SGD, momentum and dampening"](models.parameters())
    surgery.restore(models[0], run.model.state_dict(), optimizer)
    clock = CLOCKS[optimizer]
    assert clock.num_steps == CLOCKS[run.optimizer].num_steps > 0
    surgery.knife(models[1], surgery.Units({"0": [1]}), optimizer=optimizer)
    assert CLOCKS[optimizer] is clock and ages(models[1], optimizer) == {"0": {1: 0}}


@pytest.mark.situation(CHECKPOINTS, "optimizer state of bfloat16 parameters", "works")
@pytest.mark.parametrize("name", list(MAKE))
def test_a_resumed_run_in_bfloat16_goes_on_bit_for_bit(name: str):
    def start() -> tuple[nn.Module, Optimizer]:
        model = build().bfloat16()
        return model, MAKE[name](model.parameters())

    def train(model: nn.Module, optimizer: Optimizer, num_steps: int) -> None:
        torch.manual_seed(num_steps)
        for _ in range(num_steps):
            optimizer.zero_grad()
            model(torch.randn(8, 4).bfloat16()).square().mean().backward()
            optimizer.step()

    model, optimizer = start()
    train(model, optimizer, 3)
    surgery.knife(model, surgery.Units({"0": [0, 3], "4": [1]}), optimizer=optimizer)
    train(model, optimizer, 2)
    resumed, owner = start()
    owner.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    surgery.restore(resumed, model.state_dict(), owner)
    for net, each in ((model, optimizer), (resumed, owner)):
        train(net, each, 4)
    assert as_bits(resumed.state_dict()) == as_bits(model.state_dict())


def test_an_optimizer_of_another_model_is_refused_by_name():
    run, other = trained("AdamW"), build()
    before = snapshot(run.model)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(surgery.OptimizerError, match="SGD owns none of the model's"):
        surgery.attach(run.model, optimizer)
    with pytest.raises(surgery.OptimizerError, match="SGD owns none of the model's"):
        surgery.restore(run.model, run.model.state_dict(), optimizer)
    with pytest.raises(surgery.OptimizerError, match="found CosineAnnealingLR"):
        surgery.attach(run.model, run.scheduler)
    assert_untouched(before, run.model)


def test_an_untouched_model_needs_nothing():
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = snapshot(model, [optimizer])
    surgery.attach(model, optimizer)
    assert_untouched(before, model, [optimizer])
