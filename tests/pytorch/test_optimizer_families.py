"""Whole families of optimizers: resumed, scheduled, wrapped, in other precisions, and those that couple rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Adam, AdamW, NAdam, Optimizer, RAdam

from neuronsurgery.errors import OptimizerError
from neuronsurgery.pytorch import optimizers as owners
from neuronsurgery.pytorch.corrections import CORRECTIONS, Corrections
from neuronsurgery.pytorch.transaction import WriteRows, run
from tests.pytorch.test_optimizers import (
    ROWS,
    TABLE,
    Trial,
    assert_rows_equal_fresh,
    axes_of,
    new_rows,
    random_parameters,
    rows_of,
    update_sizes,
)

MATRICES: list[tuple[int, ...]] = [(5, 3), (6,)]


# -- resume ----------------------------------------------------------------------------------------------------------


def resumed(trial: Trial, make: Callable[..., Optimizer], births: list[int]) -> Trial:
    """The trial as a new process has it after loading parameters and state, its rows attached again."""
    other = Trial(make, [nn.Parameter(parameter.detach().clone()) for parameter in trial.parameters])
    other.optimizer.load_state_dict(copy.deepcopy(trial.optimizer.state_dict()))
    other.taken = trial.taken
    for parameter in other.parameters:
        run(owners.start_clocks([other.optimizer], parameter, at=trial.taken))
        run(owners.resume([other.optimizer], parameter, ROWS, births, axes_of(parameter)))
    return other


@pytest.mark.parametrize("num_steps", [0, 1, 75])
@pytest.mark.parametrize("name", [name for name in TABLE if "foreach" not in name or "adamw" in name])
def test_a_resumed_optimizer_goes_on_bit_for_bit(name: str, num_steps: int) -> None:
    trial = Trial(TABLE[name], random_parameters([(5, 3), (3, 5)]))
    trial.step(7)
    trial.surgery()
    trial.step(num_steps)
    other = resumed(trial, TABLE[name], [7, 7])
    trial.step(3)
    other.step(3)
    for parameter, twin in zip(trial.parameters, other.parameters, strict=True):
        assert torch.equal(parameter, twin)


@pytest.mark.parametrize("make", [partial(cls, lr=0.01, betas=(0.5, 0.6)) for cls in (AdamW, NAdam, RAdam)])
def test_rows_that_have_grown_up_do_not_become_young_by_a_resume(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Corrections, "SWEEP_EVERY", 16)
    trial = Trial(partial(make, **({"momentum_decay": 8.0} if make.func is NAdam else {})), random_parameters(MATRICES))
    trial.step(7)
    trial.surgery()
    for _ in range(8):
        trial.step(16)
        other = resumed(trial, type(trial.optimizer), [7, 7])
        assert (
            owners.young_rows(other.optimizer).keys() == owners.young_rows(trial.optimizer).keys()
            or {id(parameter) for parameter in owners.young_rows(trial.optimizer)} != set()
        ), trial.taken
        young, attached = (list(owners.young_rows(one.optimizer).values()) for one in (trial, other))
        assert young == attached, trial.taken
    assert owners.young_rows(trial.optimizer) == {}


def test_sweeps_go_by_the_count_of_the_parameter_and_not_of_the_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Corrections, "SWEEP_EVERY", 4)
    trial = Trial(partial(AdamW, lr=0.01, betas=(0.1, 0.1)), random_parameters([(5, 3)]))
    trial.step(2)
    trial.surgery()
    young = []
    for _ in range(12):
        trial.step(1)
        young.append(bool(CORRECTIONS[trial.optimizer].young))
    assert young == [True] * 9 + [False] * 3  # at steps 4 and 8 the rows are 2 and 6 steps old, at 12 they are 10


@pytest.mark.situation("Optimizers", "bfloat16 parameters, state reloaded", "works")
@pytest.mark.parametrize("name", ["adamw", "nadam", "radam", "schedule-free"])
def test_rows_of_bfloat16_parameters_follow_a_fresh_parameter_after_a_reload(name: str) -> None:
    trial = Trial(TABLE[name], random_parameters([(5, 3)], torch.bfloat16))
    trial.step(20)
    trial.surgery()
    fresh = trial.fresh(TABLE[name])
    trial.step(2, fresh)
    other = resumed(trial, TABLE[name], [20, 20])
    other.step(6, fresh)
    assert_rows_equal_fresh(other, fresh, rtol=2**-6)


# -- variants and wrappers -------------------------------------------------------------------------------------------


@pytest.mark.situation("Optimizers", "parameter groups added later", "works")
def test_a_group_that_is_added_later_is_treated_by_its_own_settings() -> None:
    parameters = random_parameters([(5, 3), (5, 3)])
    trial = Trial(lambda them: AdamW(them[:1], lr=0.01), parameters)
    trial.step(4)
    trial.optimizer.add_param_group({"params": parameters[1:], "lr": 0.5})
    trial.step(6)
    trial.surgery()
    fresh = trial.fresh(lambda them: AdamW([{"params": them[:1]}, {"params": them[1:], "lr": 0.5}], lr=0.01))
    trial.step(10, fresh)
    assert_rows_equal_fresh(trial, fresh)


@pytest.mark.situation("Optimizers", "one optimizer for each parameter, stepped in backward", "works")
def test_optimizers_that_step_in_the_backward_pass_are_corrected() -> None:
    parameters = random_parameters([(5, 3), (6,)])
    made = {parameter: Adam([parameter], lr=0.01) for parameter in parameters}

    def step(parameter: nn.Parameter) -> None:
        made[parameter].step()
        made[parameter].zero_grad()

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(step)

    def train(num_steps: int) -> None:
        for _ in range(num_steps):
            sum((parameter - 1).square().sum() for parameter in parameters).backward()  # type: ignore[union-attr]

    train(20)
    optimizers = list(made.values())
    for parameter in parameters:
        run([WriteRows(parameter.data, ROWS, new_rows(parameter))])
        run(owners.refresh(optimizers, parameter, ROWS))
        run(owners.births(optimizers, parameter, ROWS, [20, 20]))
    fresh = [nn.Parameter(rows_of(parameter)) for parameter in parameters]
    twin = Adam(fresh, lr=0.01)
    train(5)
    for _ in range(5):
        twin.zero_grad()
        sum((parameter - 1).square().sum() for parameter in fresh).backward()  # type: ignore[union-attr]
        twin.step()
    for parameter, expected in zip(parameters, fresh, strict=True):
        torch.testing.assert_close(rows_of(parameter), expected.detach(), rtol=2e-5, atol=2e-5)


@pytest.mark.situation("Optimizers", "schedule-free, switched between train and eval", "works")
def test_schedule_free_rows_follow_a_fresh_parameter_across_evaluations() -> None:
    trial = Trial(TABLE["schedule-free"], random_parameters(MATRICES))
    trial.step(20)
    trial.surgery()
    fresh = trial.fresh(TABLE["schedule-free"])
    for _ in range(3):
        trial.step(5, fresh)
        for one in (trial, fresh):
            one.optimizer.eval()  # type: ignore[attr-defined]
        assert_rows_equal_fresh(trial, fresh)
        for one in (trial, fresh):
            one.optimizer.train()  # type: ignore[attr-defined]
    assert_rows_equal_fresh(trial, fresh)


# -- those that couple rows ------------------------------------------------------------------------------------------

COUPLING: dict[str, Callable[..., Optimizer]] = {
    "Muon": partial(torch.optim.Muon, lr=0.01),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.01),
}


def mean_update(trial: Trial) -> torch.Tensor:
    before = trial.snapshot()[0]
    trial.step(1)
    return trial.parameters[0].detach() - before


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.situation("Optimizers", name, "works")) for name in COUPLING]
)
def test_an_optimizer_that_couples_rows_is_taken_with_a_note_and_moves_fresh_rows_no_faster(name: str) -> None:
    make, shape = COUPLING[name], (32, 16)
    generator = torch.Generator().manual_seed(1)
    trial, untouched = (
        Trial(make, [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)))]) for _ in range(2)
    )
    trial.step(50)
    untouched.step(50)
    (parameter,) = trial.parameters
    run([WriteRows(parameter.data, ROWS, torch.randn(2, 16, generator=generator))])
    run(owners.refresh([trial.optimizer], parameter, ROWS))
    (note,) = owners.notes([trial.optimizer], parameter)
    assert note.startswith(f"{name} ") and "moves the others' next updates" in note
    others = torch.tensor([unit for unit in range(32) if unit not in ROWS])
    sizes = torch.stack([torch.stack([mean_update(trial), mean_update(untouched)]).abs().mean(2) for _ in range(20)])
    fresh, old = sizes[:, 0, ROWS].mean(1), sizes[:, 1][:, others].mean(1)
    assert fresh[0] <= 1.5 * old[0] and fresh.max() <= 1.5 * old.max()  # two rows beside the mean of thirty


def test_an_optimizer_that_couples_rows_is_refused_where_units_are_columns() -> None:
    trial = Trial(COUPLING["Muon"], random_parameters([(3, 5)]))
    trial.step(3)
    with pytest.raises(OptimizerError, match=r"Muon couples the rows .* not along axis 0"):
        owners.refresh([trial.optimizer], trial.parameters[0], ROWS, axes_of(trial.parameters[0]))


def test_update_sizes_sees_what_a_row_would_do_without_a_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement of first and largest updates can fail: without births NAdam overshoots."""
    trial = Trial(TABLE["nadam"], random_parameters(MATRICES))
    trial.step(1000)
    trial.surgery(births=False)
    sizes, expected = update_sizes(trial, trial.fresh(TABLE["nadam"]), 30)
    assert (sizes.amax(0) / expected.amax(0)).min() > 2


@pytest.mark.parametrize(
    ("make", "text"),
    [
        pytest.param(torch.optim.LBFGS, "LBFGS", marks=pytest.mark.situation("Optimizers", "LBFGS", "refused")),
        pytest.param(
            torch.optim.SparseAdam, "SparseAdam", marks=pytest.mark.situation("Optimizers", "SparseAdam", "refused")
        ),
    ],
)
def test_an_optimizer_without_rows_is_refused(make: Callable[..., Optimizer], text: str) -> None:
    parameter = nn.Parameter(torch.ones(5, 3))
    optimizer = make([parameter])

    def closure() -> torch.Tensor:
        parameter.grad = torch.ones(5, 3).to_sparse() if make is torch.optim.SparseAdam else torch.ones(5, 3)
        return parameter.sum()

    optimizer.step(closure)  # type: ignore[arg-type]
    with pytest.raises(OptimizerError, match=text):
        owners.refresh([optimizer], parameter, ROWS)
