"""A table of contracts: what holds for an operation in the middle of a run, optimizer by optimizer."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn, optim

from neuronsurgery.errors import OptimizerError
from neuronsurgery.pytorch import optimizers as owners
from neuronsurgery.pytorch.transaction import run
from tests.optimizer_rows import (
    COUPLED,
    EXACT,
    KINDS,
    OTHERS,
    REFUSED,
    ROWS,
    SHAPE,
    Kind,
    Make,
    gradient,
    library_warnings,
    measured,
    overwrite,
    reloaded,
    take_step,
)


def rows_of(names: Iterable[str], outcome: str) -> Any:
    marked = [
        pytest.param(name, marks=pytest.mark.situation("Optimizers", name, outcome), id=name.replace(" ", "-"))
        for name in names
    ]
    return pytest.mark.parametrize("name", marked)


@pytest.fixture(autouse=True)
def _warnings_of_libraries() -> Any:
    with library_warnings():
        yield


@rows_of(EXACT, "works")
@pytest.mark.parametrize("kind", KINDS)
def test_operated_rows_are_a_fresh_parameters_and_all_others_the_untouched_ones(name: str, kind: Kind) -> None:
    found = measured(EXACT[name], kind, before=80, after=40)
    assert found.first <= 1.1 and found.peak <= 1.1
    assert found.others_first == found.others_last == 0.0  # to the last bit
    assert found.first == pytest.approx(1.0, abs=1e-3) and found.peak == pytest.approx(1.0, abs=1e-3)
    assert found.drift < 2e-3


@rows_of(COUPLED, "works")
@pytest.mark.parametrize("kind", KINDS)
def test_coupled_rows_stay_near_a_fresh_parameters_and_their_neighbors_near_the_untouched(
    name: str, kind: Kind
) -> None:
    """Two of six rows: a third of the parameter. The documentation has the numbers."""
    found = measured(COUPLED[name], kind, whole=True)
    assert found.first <= 1.1 and found.peak <= 1.2
    assert 0.0 < found.others_first < 0.6


@pytest.mark.parametrize("name", COUPLED)
def test_the_report_says_that_rows_are_coupled(name: str) -> None:
    parameter = nn.Parameter(torch.ones(SHAPE))
    optimizer = COUPLED[name]([parameter])
    take_step(optimizer, parameter, gradient(0, "random", SHAPE))
    (note,) = owners.notes([optimizer], parameter)
    assert note.startswith(f"{type(optimizer).__name__} ") and note.endswith("moves the others' next updates")


@rows_of(REFUSED, "refused")
def test_optimizers_that_couple_rows_otherwise_are_refused(name: str) -> None:
    parameter = nn.Parameter(torch.randn(SHAPE))
    optimizer = REFUSED[name]([parameter])
    for step in range(3):
        take_step(optimizer, parameter, gradient(step, "random", SHAPE))
    before = parameter.detach().clone()
    with pytest.raises(OptimizerError, match=rf"{type(optimizer).__name__} couples .* Give the operated layers an"):
        overwrite(optimizer, parameter)
    assert torch.equal(parameter, before)


FIRST_STEPS = ["SGD, dampening", "SGD, fused", "SGDW", "Adan", "NAdam", "AdamWScheduleFree"]


def test_coupling_to_other_parameters_is_refused_for_a_parameter_of_one_row() -> None:
    parameter = nn.Parameter(torch.randn(1, 8))
    optimizer = REFUSED["Adan, clipping"]([parameter])
    take_step(optimizer, parameter, gradient(0, "random", (1, 8)))
    with pytest.raises(OptimizerError, match="Adan couples"):
        overwrite(optimizer, parameter, torch.tensor([0]))


# -- resuming --------------------------------------------------------------------------------------------------------


NOT_TWICE = [name for name in EXACT if not name.endswith(("foreach", "fused", "maximize"))]


@pytest.mark.parametrize(
    ("name", "lost_at"),
    [*((name, 9) for name in NOT_TWICE), *((name, place) for name in FIRST_STEPS for place in (0, 1))],
)
def test_hooks_installed_anew_give_the_bits_of_hooks_that_were_never_lost(name: str, lost_at: int) -> None:
    make = EXACT[name]
    parameter = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)))
    optimizer = make([parameter])
    for step in range(70):
        take_step(optimizer, parameter, gradient(step, "random", SHAPE))
    overwrite(optimizer, parameter)
    births = [owners.birth_step([optimizer], parameter) or 0] * 2
    for step in range(lost_at):
        take_step(optimizer, parameter, gradient(70 + step, "random", SHAPE))
    twin = nn.Parameter(parameter.detach().clone())
    resumed = reloaded(optimizer, make, twin)
    has_ages = bool(owners.young_rows(optimizer)) and owners.current_step([resumed], twin) is not None
    assert owners.lacks_corrections([resumed], twin, births) == has_ages
    run(owners.start_clocks([resumed], twin, at=owners.age_clock([optimizer], parameter) or 0))
    run(owners.resume([resumed], twin, ROWS, births))
    assert not owners.lacks_corrections([resumed], twin, births)
    for step in range(75):  # past two looks for rows that have grown up
        given = gradient(80 + step, "random", SHAPE)
        take_step(optimizer, parameter, given)
        take_step(resumed, twin, given)
        assert torch.equal(parameter, twin), step
    assert not owners.lacks_corrections([resumed], twin, births)


@pytest.mark.parametrize("name", ["Adam", "NAdam", "Adamax"])
def test_hooks_installed_anew_long_after_a_row_grew_up_change_nothing(name: str) -> None:
    makes: dict[str, Make] = {
        "Adam": partial(optim.Adam, betas=(0.5, 0.9)),
        "NAdam": partial(optim.NAdam, betas=(0.5, 0.9), momentum_decay=2.0),
        "Adamax": partial(optim.Adamax, betas=(0.5, 0.9)),
    }
    make = makes[name]
    parameter = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)))
    optimizer = make([parameter])
    for step in range(5):
        take_step(optimizer, parameter, gradient(step, "random", SHAPE))
    overwrite(optimizer, parameter)
    grown_at = 0
    for step in range(300):
        given = gradient(5 + step, "random", SHAPE)
        if step % 9:
            take_step(optimizer, parameter, given)
            continue
        twin = nn.Parameter(parameter.detach().clone())
        resumed = reloaded(optimizer, make, twin)
        run(owners.resume([resumed], twin, ROWS, [5, 5]))
        take_step(resumed, twin, given)
        take_step(optimizer, parameter, given)
        assert torch.equal(parameter, twin), step
        assert owners.young_rows(resumed) == {two: rows for two, rows in [(twin, _young(optimizer))] if rows}
        grown_at = grown_at or (step if not _young(optimizer) else 0)
    assert 20 < grown_at < 300


def _young(optimizer: optim.Optimizer) -> dict[int, int]:
    return next(iter(owners.young_rows(optimizer).values()), {})


LOW_PRECISION = [
    *((name, torch.bfloat16) for name in EXACT),
    ("SGD, dampening", torch.float16),
    ("Tiger", torch.float16),
]


@pytest.mark.parametrize(("name", "dtype"), LOW_PRECISION, ids=str)
def test_state_that_a_reload_casts_leaves_operated_rows_right(name: str, dtype: torch.dtype) -> None:
    """`load_state_dict` casts floating state to the parameter's dtype; births are not part of it."""
    make = EXACT[name]
    parameter = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype))
    optimizer = make([parameter])
    for step in range(70):
        take_step(optimizer, parameter, gradient(step, "random", SHAPE).to(dtype))
    fresh = nn.Parameter(overwrite(optimizer, parameter))
    twin = make([fresh])
    births = [owners.birth_step([optimizer], parameter) or 0] * 2
    for step in range(12):
        if step == 2:
            clock = owners.age_clock([optimizer], parameter) or 0
            optimizer, twin = reloaded(optimizer, make, parameter), reloaded(twin, make, fresh)
            run(owners.start_clocks([optimizer], parameter, at=clock))
            run(owners.resume([optimizer], parameter, ROWS, births))
        given = gradient(70 + step, "random", SHAPE).to(dtype)
        take_step(optimizer, parameter, given)
        take_step(twin, fresh, given[ROWS])
    torch.testing.assert_close(parameter.detach()[ROWS], fresh.detach(), rtol=2**-6, atol=2**-6)


# -- steps that are not ordinary ---------------------------------------------------------------------------------------

REPLAYED = ["NAdam", "RAdam, foreach", "Adagrad, fused", "ASGD", "AdamWScheduleFree", "Adan", "SGDW"]
every_replayed = pytest.mark.parametrize("name", REPLAYED)


@every_replayed
def test_replayed_gradients_may_come_from_a_closure(name: str) -> None:
    """Some classes write into the gradients they were given, so that these have to be kept when the closure returns."""
    parameter = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)))
    optimizer = EXACT[name]([parameter])
    for step in range(20):
        take_step(optimizer, parameter, gradient(step, "random", SHAPE))
    fresh = nn.Parameter(overwrite(optimizer, parameter))
    twin = EXACT[name]([fresh])
    for step in range(20):
        given = gradient(20 + step, "random", SHAPE)

        def closure(given: torch.Tensor = given) -> float:
            parameter.grad = given.clone()
            return 1.5

        parameter.grad = None
        assert (optimizer.step(closure) if step % 2 else optimizer.step(closure=closure)) == 1.5
        take_step(twin, fresh, given[ROWS])
    torch.testing.assert_close(parameter.detach()[ROWS], fresh.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["NAdam", "RAdam, foreach", "Adagrad, fused", "ASGD"])
def test_a_step_without_gradient_leaves_replayed_rows_alone(name: str) -> None:
    parameter = nn.Parameter(torch.randn(SHAPE))
    optimizer = EXACT[name]([parameter])
    for step in range(9):
        take_step(optimizer, parameter, gradient(step, "random", SHAPE))
    fresh = nn.Parameter(overwrite(optimizer, parameter))
    twin = EXACT[name]([fresh])
    for step in range(6):
        before = parameter.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])
        parameter.grad = None
        optimizer.step()
        assert torch.equal(parameter, before[0])
        torch.testing.assert_close(optimizer.state_dict()["state"], before[1], rtol=0, atol=0)
        given = gradient(9 + step, "random", SHAPE)
        take_step(optimizer, parameter, given)
        take_step(twin, fresh, given[ROWS])
    torch.testing.assert_close(parameter.detach()[ROWS], fresh.detach())


@pytest.mark.situation("Precision", "GradScaler with fused Adagrad", "works")
def test_a_gradient_scalers_factor_and_overflows_reach_replayed_rows() -> None:
    parameter = nn.Parameter(torch.randn(SHAPE))
    # With an accumulator to start from, as without one a common factor of all gradients would cancel.
    make: Make = partial(optim.Adagrad, lr=0.1, lr_decay=0.05, initial_accumulator_value=0.1, fused=True)
    optimizer, scaler = make([parameter]), torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(9):
        take_step(optimizer, parameter, gradient(step, "random", SHAPE))
    fresh = nn.Parameter(overwrite(optimizer, parameter))
    twin = make([fresh])
    for step in range(6):
        given = gradient(9 + step, "random", SHAPE)
        scaler.scale(torch.ones(1))
        parameter.grad = torch.full_like(given, torch.inf)
        scaler.step(optimizer)  # skipped by the kernel
        scaler.update(4.0)
        parameter.grad = given * 4.0
        scaler.step(optimizer)
        scaler.update(4.0)
        take_step(twin, fresh, given[ROWS])
    torch.testing.assert_close(parameter.detach()[ROWS], fresh.detach(), rtol=1e-6, atol=1e-6)


@every_replayed
def test_rows_born_at_different_steps_are_replayed_at_their_own_ages(name: str) -> None:
    parameter = nn.Parameter(torch.randn(SHAPE))
    optimizer = EXACT[name]([parameter])
    twins: list[tuple[int, nn.Parameter, optim.Optimizer]] = []
    for step in range(30):
        if step in (8, 15, 21):
            row = {8: 4, 15: 0, 21: 2}[step]
            fresh = nn.Parameter(overwrite(optimizer, parameter, torch.tensor([row])))
            twins.append((row, fresh, EXACT[name]([fresh])))
        given = gradient(step, "random", SHAPE)
        take_step(optimizer, parameter, given)
        for row, fresh, twin in twins:
            take_step(twin, fresh, given[[row]])
    for row, fresh, _ in twins:
        torch.testing.assert_close(parameter.detach()[[row]], fresh.detach())


@pytest.mark.situation("Schedules and wrappers", "schedule-free, operated on in eval mode", "works")
def test_schedule_free_weights_may_be_operated_on_in_either_mode() -> None:
    parameter = nn.Parameter(torch.randn(SHAPE))
    optimizer = EXACT["AdamWScheduleFree"]([parameter])
    for step in range(9):
        take_step(optimizer, parameter, gradient(step, "random", SHAPE))
    optimizer.eval()  # type: ignore[attr-defined]
    new = overwrite(optimizer, parameter)
    assert torch.equal(parameter.detach()[ROWS], new)
    optimizer.train()  # type: ignore[attr-defined]
    torch.testing.assert_close(parameter.detach()[ROWS], new)  # y, z and x of new rows are one
    fresh = nn.Parameter(new)
    twin = EXACT["AdamWScheduleFree"]([fresh])
    for step in range(9):
        given = gradient(9 + step, "random", SHAPE)
        take_step(optimizer, parameter, given)
        take_step(twin, fresh, given[ROWS])
    torch.testing.assert_close(parameter.detach()[ROWS], fresh.detach())
    optimizer.eval()  # type: ignore[attr-defined]
    twin.eval()  # type: ignore[attr-defined]
    torch.testing.assert_close(parameter.detach()[ROWS], fresh.detach())


def test_other_rows_means_are_what_coupled_second_moments_start_from() -> None:
    parameter = nn.Parameter(torch.randn(SHAPE))
    optimizer = COUPLED["Adafactor"]([parameter])
    for step in range(5):
        take_step(optimizer, parameter, gradient(step, "random", SHAPE))
    before = {key: entry.clone() for key, entry in optimizer.state[parameter].items()}
    overwrite(optimizer, parameter)
    after = optimizer.state[parameter]
    assert torch.equal(after["row_var"][ROWS], before["row_var"][OTHERS].mean(0).expand(2, 1))
    assert torch.equal(after["row_var"][OTHERS], before["row_var"][OTHERS])
    assert torch.equal(after["col_var"], before["col_var"])
