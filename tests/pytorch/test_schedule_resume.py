"""A scheduled run that is killed between two steps and resumed goes on bit for bit, also in the middle of a window."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from neuronsurgery import surgery
from neuronsurgery.surgery import Dormant, Every, Last, Lowest, Plateau, Share, TaskChange
from tests.snapshots import bits

NUM_STEPS = 16


@dataclass(frozen=True)
class Case:
    """A kind of schedule, and the optimizer it runs with."""

    optimizer: Callable[[Any], Optimizer]
    criterion: Any
    settings: dict[str, Any]
    has_generator: bool = False


def adamw(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


CASES = {
    "gradients": Case(adamw, Lowest(0.25), {"operate": Every(4), "look": Every(2), "cooldown": 6}),
    "activations, last steps": Case(
        sgd, Lowest(0.25, of="dormant"), {"operate": Every(5) | TaskChange(after=3), "look": Last(3), "cooldown": 6}
    ),
    "share, generator": Case(
        adamw, Lowest(0.2) | Dormant(1.0), {"operate": Share(0.1, every=3), "max_units": 3, "cooldown": 7}, True
    ),
    "plateau, SGD's ages": Case(sgd, surgery.Random(0.3), {"operate": Plateau(2) & Every(3), "cooldown": 5}),
}


@dataclass(eq=False)
class Run:
    """A training run with everything around the model that has a state."""

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler
    schedule: surgery.Schedule
    data: torch.Generator
    num_steps: int = 0

    @staticmethod
    def start(case: Case, saved: dict[str, Any] | None = None) -> Run:
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Linear(4, 12),
            nn.BatchNorm1d(12),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(12, 8),
            nn.GELU(),
            nn.Linear(8, 2),
        )
        if saved is not None:
            surgery.restore(model, saved["model"])
        optimizer = case.optimizer(model.parameters())
        generator = torch.Generator().manual_seed(7) if case.has_generator else None
        schedule = surgery.Schedule(model, optimizer, case.criterion, generator=generator, **case.settings)
        torch.manual_seed(4)
        run = Run(model, optimizer, CosineAnnealingLR(optimizer, 10), schedule, torch.Generator().manual_seed(5))
        return run if saved is None else run.loaded(saved)

    def loaded(self, saved: dict[str, Any]) -> Run:
        self.optimizer.load_state_dict(saved["optimizer"])
        surgery.attach(self.model, self.optimizer)
        self.scheduler.load_state_dict(saved["scheduler"])
        self.schedule.load_state_dict(saved["schedule"])
        self.data.set_state(saved["data"])
        torch.set_rng_state(saved["torch"])
        self.num_steps = saved["num_steps"]
        return self

    def step(self) -> None:
        x = torch.randn(8, 4, generator=self.data)
        self.optimizer.zero_grad()
        loss = self.model(x).square().mean()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.num_steps += 1
        self.schedule.step(loss)
        if self.num_steps == 6:
            self.schedule.task_changed()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "schedule": self.schedule.state_dict(),
            "data": self.data.get_state(),
            "torch": torch.get_rng_state(),
            "num_steps": self.num_steps,
        }

    def save(self, path: Path) -> None:
        """Written beside its place and moved there: no kill leaves half a file."""
        written = path.with_suffix(f".{os.getpid()}")
        torch.save(self.state(), written)
        written.replace(path)


def comparable(state: Any) -> Any:
    """A nested state with its tensors as their bits."""
    if isinstance(state, Tensor):
        return bits(state)
    if isinstance(state, dict):
        return {key: comparable(value) for key, value in state.items()}
    return [comparable(one) for one in state] if isinstance(state, (list, tuple)) else state


def resumed(case: Case, path: Path) -> Run:
    return Run.start(case, torch.load(path, weights_only=True))


def finished(run: Run) -> Any:
    """The run at its end; one run at a time, as they share torch's random state."""
    while run.num_steps < NUM_STEPS:
        run.step()
    return comparable(run.state())


def killed_after(case: Case, path: Path, first: int, last: int) -> None:
    """Train in a process of its own from one step to another, with a checkpoint after each, and kill that process."""
    child = os.fork()
    if child == 0:
        try:
            run = resumed(case, path) if first else Run.start(case)
            assert run.num_steps == first
            while run.num_steps < last:
                run.step()
                run.save(path)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)  # reached by an exception alone
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "the child failed before it was killed"


def assert_goes_on(case: Case, path: Path, kills: list[int]) -> None:
    for first, last in zip([0, *kills], kills, strict=False):
        killed_after(case, path, first, last)
    found = finished(resumed(case, path))
    whole = Run.start(case)
    expected = finished(whole)
    assert [key for key in expected if found[key] != expected[key]] == []
    assert whole.schedule.num_operations >= 2


NEEDS_FORK = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
PARAMS = [
    pytest.param(
        case, id=name, marks=pytest.mark.situation("Checkpoints and copies", f"schedule killed, {name}", "works")
    )
    for name, case in CASES.items()
]


@NEEDS_FORK
@pytest.mark.parametrize("case", PARAMS)
def test_a_scheduled_run_killed_between_steps_goes_on_bit_for_bit(case: Case, tmp_path: Path):
    assert_goes_on(case, tmp_path / "checkpoint", [3, 7])


@NEEDS_FORK
@pytest.mark.slow
@pytest.mark.parametrize("case", PARAMS)
@pytest.mark.parametrize("seed", range(20))
def test_a_scheduled_run_killed_at_random_goes_on_bit_for_bit(case: Case, seed: int, tmp_path: Path):
    draw = random.Random(seed)
    assert_goes_on(case, tmp_path / "checkpoint", sorted(draw.sample(range(1, NUM_STEPS), draw.randint(1, 3))))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_comparison_of_runs_sees_a_schedule_that_was_not_loaded(case: Case, tmp_path: Path):
    """The helper can fail: with its schedule begun anew a run parts from what it was, if not after every step."""
    path, run = tmp_path / "checkpoint", Run.start(case)
    saved = []
    for _ in range(8):
        run.step()
        run.save(path)
        saved.append(torch.load(path, weights_only=True))
    whole = finished(run)["model"]
    begun_anew = ({**one, "schedule": Run.start(case).schedule.state_dict()} for one in saved[3:])
    assert any(finished(Run.start(case, one))["model"] != whole for one in begun_anew)


@pytest.mark.situation("Checkpoints and copies", "schedule, torch.load(weights_only=True)", "works")
def test_a_state_in_the_middle_of_a_window_holds_its_sums(tmp_path: Path):
    run = Run.start(CASES["gradients"])
    for _ in range(3):
        run.step()
    run.save(tmp_path / "checkpoint")
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    assert comparable(saved["schedule"]) == comparable(run.schedule.state_dict())
    sums = saved["schedule"]["watch"]["evidence"]["sums"]
    assert set(sums) == {"0", "4"}
    assert sums["0"]["relative_update_activity"]["total"].shape == (12,)
    assert int(sums["0"]["relative_update_activity"]["count"]) == 2


def test_a_state_of_a_model_of_other_widths_is_refused():
    def schedule_of(width: int) -> surgery.Schedule:
        model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
        return surgery.Schedule(model, adamw(model.parameters()), "stagnant", operate=Every(4))

    with pytest.raises(surgery.ScheduleError, match=r"sites: '0 \(8\)', here '0 \(6\)'"):
        schedule_of(6).load_state_dict(schedule_of(8).state_dict())
