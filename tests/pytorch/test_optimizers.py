"""Rows that surgery overwrites are updated as a fresh parameter's rows, and nothing else changes.

`Trial` steps an optimizer on parameters of every layout (`SHAPES`) with synthetic gradients, overwrites rows as
surgery would, and goes on; its twin `fresh` holds only the new rows, in parameters of their own.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import pytorch_optimizer
import torch
from lion_pytorch import Lion
from schedulefree import AdamWScheduleFree, SGDScheduleFree
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from neuronsurgery.errors import OptimizerError
from neuronsurgery.pytorch import corrections
from neuronsurgery.pytorch import optimizers as owners
from neuronsurgery.pytorch.families import family_of
from neuronsurgery.pytorch.transaction import Change, WriteRows, revert, run
from neuronsurgery.pytorch.unit_axes import UnitAxes

AXES: dict[tuple[int, ...], UnitAxes] = {  # where the units of a shape are
    (5, 3): UnitAxes(),
    (4, 2, 3, 3): UnitAxes(),
    (6,): UnitAxes(),
    (3, 5): UnitAxes((1,)),  # x @ W
    (1, 4, 1, 1): UnitAxes((1,)),  # a norm's scale
    (6, 2, 3): UnitAxes((0, 2), 2),  # a transposed convolution of two groups
    (3, 4, 2): UnitAxes((0, 2)),  # experts
}
SHAPES = list(AXES)
ROWS = torch.tensor([1, 3])

Make = Callable[..., Optimizer]


def free(cls: Any, parameters: Any, **settings: Any) -> Optimizer:
    """A schedule-free optimizer that has been told that the run trains."""
    optimizer: Optimizer = cls(parameters, **settings)
    optimizer.train()  # type: ignore[attr-defined]
    return optimizer


# lr as in use; settings that reach every branch of the families. A new family is a new row.
TABLE: dict[str, Make] = {
    "sgd": partial(SGD, lr=0.1),
    "sgd-decay": partial(SGD, lr=0.1, weight_decay=0.1, maximize=True),
    "sgd-momentum": partial(SGD, lr=0.1, momentum=0.9),
    "sgd-dampening": partial(SGD, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.01),
    "sgd-nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=False),
    "sgd-foreach": partial(SGD, lr=0.1, momentum=0.9, dampening=0.3, foreach=True),
    "sgd-fused": partial(SGD, lr=0.1, momentum=0.9, dampening=0.3, fused=True),
    "rmsprop": partial(RMSprop, lr=0.01),
    "rmsprop-momentum": partial(RMSprop, lr=0.01, momentum=0.9, weight_decay=0.1),
    "rmsprop-centered": partial(RMSprop, lr=0.01, centered=True, momentum=0.5, foreach=True),
    "adam": partial(Adam, lr=0.01, foreach=False),
    "adam-foreach": partial(Adam, lr=0.01, foreach=True),
    "adam-fused": partial(Adam, lr=0.01, fused=True),
    "adam-decay": partial(Adam, lr=0.01, weight_decay=0.1),
    "adam-decoupled": partial(Adam, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "adam-amsgrad": partial(Adam, lr=0.01, amsgrad=True),
    "adam-amsgrad-fused": partial(Adam, lr=0.01, amsgrad=True, fused=True),
    "adam-maximize": partial(Adam, lr=0.01, maximize=True),
    "adam-eps": partial(Adam, lr=0.01, eps=0.1),
    "adam-betas": partial(Adam, lr=0.01, betas=(0.0, 0.99)),
    "adam-tensors": partial(
        Adam, lr=torch.tensor([0.01]), betas=(torch.tensor(0.9), torch.tensor(0.999)), foreach=False
    ),
    "adamw": partial(AdamW, lr=0.01, weight_decay=0.1, foreach=False),
    "adamw-foreach": partial(AdamW, lr=0.01, weight_decay=0.1, foreach=True),
    "adamw-fused": partial(AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "adamw-amsgrad": partial(AdamW, lr=0.01, weight_decay=0.1, amsgrad=True, maximize=True),
    "nadam": partial(NAdam, lr=0.01),
    "nadam-foreach": partial(NAdam, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, foreach=True),
    "radam": partial(RAdam, lr=0.01, weight_decay=0.1),
    "radam-foreach": partial(RAdam, lr=0.01, decoupled_weight_decay=True, weight_decay=0.1, foreach=True),
    "maxadam": partial(Adamax, lr=0.01),
    "maxadam-foreach": partial(Adamax, lr=0.01, weight_decay=0.1, maximize=True, foreach=True),
    "adagrad": partial(Adagrad, lr=0.1, initial_accumulator_value=0.5),
    "adagrad-decay": partial(Adagrad, lr=0.1, lr_decay=0.1, weight_decay=0.1),
    "asgd": partial(ASGD, lr=0.01),
    "asgd-averaging": partial(ASGD, lr=0.01, lambd=0.1, t0=3, weight_decay=0.1, foreach=True),
    "adadelta": partial(Adadelta, lr=0.5, weight_decay=0.1),
    "rprop": partial(Rprop, lr=0.03),
    "lion": partial(Lion, lr=0.001, weight_decay=0.1),
    "schedule-free": partial(free, AdamWScheduleFree, lr=0.01, weight_decay=0.1),
    "schedule-free-warmup": partial(free, AdamWScheduleFree, lr=0.01, warmup_steps=10, r=1.0, foreach=False),
    "schedule-free-sgd": partial(free, SGDScheduleFree, lr=0.1),
}
ADAMS = [name for name in TABLE if name.startswith("adam")]


@pytest.fixture(params=["host", "device"])
def step_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the count of steps lives; a device that this machine has not is stood in for by a 0-d tensor."""
    if request.param == "device":
        on_device = lambda step, like: torch.as_tensor(step).to(like, copy=True)  # noqa: E731
        monkeypatch.setattr(corrections, "_count", on_device)


every_optimizer = pytest.mark.parametrize("name", TABLE)
every_adam = pytest.mark.parametrize("name", ADAMS)


def random_parameters(shapes: Iterable[tuple[int, ...]] = SHAPES, dtype: Any = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def axes_of(tensor: Tensor) -> UnitAxes:
    return AXES[tuple(tensor.shape)]


def rows_of(tensor: Tensor, rows: Tensor = ROWS) -> Tensor:
    return axes_of(tensor).take(tensor.detach(), rows)


def row_of(tensor: Tensor, row: int) -> Tensor:
    return rows_of(tensor, torch.tensor([row]))[0]


class Trial:
    """An optimizer on parameters of its own, fed gradients that depend on the step only."""

    def __init__(self, make: Make, parameters: list[nn.Parameter] | None = None) -> None:
        self.parameters = random_parameters() if parameters is None else parameters
        self.optimizer = make(self.parameters)
        self.taken = 0

    def step(self, num_steps: int = 1, fresh: Trial | None = None) -> None:
        """Step, and the twin `fresh` with the gradients of ROWS."""
        for _ in range(num_steps):
            generator = torch.Generator().manual_seed(self.taken)
            for place, parameter in enumerate(self.parameters):
                # A size per parameter and a mean that is not zero, so that momentum builds up.
                gradient = torch.randn(parameter.shape, generator=generator) + 1.0
                parameter.grad = (10.0 ** -(place % 3) * gradient).to(parameter.dtype)
                if fresh is not None:
                    fresh.parameters[place].grad = rows_of(parameter.grad)
            self.optimizer.step()
            self.taken += 1
            if fresh is not None:
                fresh.optimizer.step()

    def surgery(self, *, births: bool = True) -> list[Change]:
        """Overwrite ROWS of every parameter and make them fresh; return the changes, which have been run."""
        changes: list[Change] = []
        for parameter in self.parameters:
            values = new_rows(parameter)
            axes = axes_of(parameter)
            changes.append(WriteRows(parameter.data, ROWS, values, axes))
            changes += owners.refresh([self.optimizer], parameter, ROWS, axes)
            step = owners.current_step([self.optimizer], parameter)
            if births and step is not None:
                changes += owners.births([self.optimizer], parameter, ROWS, [step] * len(ROWS), axes)
        run(changes)
        return changes

    def fresh(self, make: Make) -> Trial:
        return Trial(make, [nn.Parameter(rows_of(parameter)) for parameter in self.parameters])

    def snapshot(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]


def new_rows(parameter: nn.Parameter) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(rows_of(parameter).shape, generator=generator).to(parameter.dtype)


def operated(name: str, num_steps: int, dtype: Any = torch.float32) -> tuple[Trial, Trial]:
    """A trial operated on after `num_steps`, and its fresh twin."""
    trial = Trial(TABLE[name], random_parameters(dtype=dtype))
    trial.step(num_steps)
    trial.surgery()
    return trial, trial.fresh(TABLE[name])


def update_sizes(trial: Trial, fresh: Trial, num_steps: int) -> tuple[Tensor, Tensor]:
    """Sizes of the updates of ROWS and of the fresh rows: (num_steps, parameters), the mean over elements."""
    sizes = torch.zeros(2, num_steps, len(trial.parameters))
    for step in range(num_steps):
        before, before_fresh = trial.snapshot(), fresh.snapshot()
        trial.step(1, fresh)
        for place in range(len(before)):
            moved = rows_of(trial.parameters[place]) - rows_of(before[place])
            sizes[0, step, place] = moved.abs().mean()
            sizes[1, step, place] = (fresh.parameters[place].detach() - before_fresh[place]).abs().mean()
    return sizes[0], sizes[1]


def assert_rows_equal_fresh(trial: Trial, fresh: Trial, rtol: float = 2e-5) -> None:
    for parameter, twin in zip(trial.parameters, fresh.parameters, strict=True):
        torch.testing.assert_close(rows_of(parameter), twin.detach(), rtol=rtol, atol=rtol, check_dtype=True)


def assert_other_elements_equal(trial: Trial, untouched: Trial) -> None:
    for parameter, twin in zip(trial.parameters, untouched.parameters, strict=True):
        num_units = axes_of(parameter).num_units(parameter.shape)
        others = torch.tensor([unit for unit in range(num_units) if unit not in ROWS])
        assert torch.equal(rows_of(parameter, others), rows_of(twin, others))
        for key, entry in untouched.optimizer.state[twin].items():
            found = trial.optimizer.state[parameter][key]
            is_whole = entry.dim() > 0
            same = (
                torch.equal(rows_of(found, others), rows_of(entry, others)) if is_whole else torch.equal(found, entry)
            )
            assert same, key


def as_bits(entry: Any) -> Any:
    if isinstance(entry, Tensor):
        return (entry.float() if entry.dtype is torch.bfloat16 else entry).detach().clone().numpy().tobytes()
    if isinstance(entry, dict):
        return {str(key): as_bits(one) for key, one in entry.items()}
    return [as_bits(one) for one in entry] if isinstance(entry, (list, tuple)) else repr(entry)


def everything(trial: Trial) -> Any:
    """All that an operation could disturb, bit for bit, and the identities of the state tensors."""
    optimizer = trial.optimizer
    identities = [[id(entry) for entry in optimizer.state[parameter].values()] for parameter in trial.parameters]
    hooks = list(optimizer._optimizer_step_pre_hooks), list(optimizer._optimizer_step_post_hooks)
    young = {id(parameter): rows for parameter, rows in owners.young_rows(optimizer).items()}
    return as_bits(trial.parameters), as_bits(optimizer.state_dict()), identities, hooks, young


# -- the operated rows ---------------------------------------------------------------------------------------


def what(name: str) -> str:
    """What a user would search for: the class, and the settings that choose another code path."""
    make: Any = TABLE[name]
    cls = make.args[0] if make.func is free else make.func
    settings = [key for key, value in make.keywords.items() if value is True]
    return ", ".join([cls.__name__, *settings])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.situation("Optimizers", what(name), "works")) for name in TABLE]
)
@pytest.mark.parametrize("num_steps", [1, 10, pytest.param(1000, marks=pytest.mark.slow)])
def test_first_and_largest_update_are_a_fresh_parameters(name: str, num_steps: int) -> None:
    trial, fresh = operated(name, num_steps)
    sizes, fresh_sizes = update_sizes(trial, fresh, 40)
    first, largest = sizes[0] / fresh_sizes[0], sizes.amax(0) / fresh_sizes.amax(0)
    assert (first <= 1.1).all() and (largest <= 1.1).all()
    torch.testing.assert_close(first, torch.ones(len(SHAPES)), rtol=1e-3, atol=0)
    torch.testing.assert_close(largest, torch.ones(len(SHAPES)), rtol=1e-3, atol=0)


@every_optimizer
def test_operated_rows_follow_a_fresh_parameter_for_hundreds_of_steps(name: str) -> None:
    trial, fresh = operated(name, 30)
    trial.step(100 if family_of(trial.optimizer).shared else 300, fresh)  # type: ignore[union-attr]
    assert_rows_equal_fresh(trial, fresh, rtol=2e-4)


@pytest.mark.usefixtures("step_on")
@every_adam
def test_operated_rows_follow_a_fresh_parameter_exactly_in_float64(name: str) -> None:
    trial, fresh = operated(name, 7, torch.float64)
    trial.step(50, fresh)
    assert_rows_equal_fresh(trial, fresh, rtol=3e-5 if name == "adam-tensors" else 1e-12)


@pytest.mark.parametrize("name", ["adam", "adamw-fused"])
def test_bfloat16_rows_follow_a_fresh_parameter(name: str) -> None:
    trial, fresh = operated(name, 20, torch.bfloat16)
    trial.step(10, fresh)
    assert_rows_equal_fresh(trial, fresh, rtol=2**-6)


def test_complex_rows_follow_a_fresh_parameter() -> None:
    make = partial(AdamW, lr=0.01)
    trial = Trial(make, random_parameters(dtype=torch.complex64))
    trial.step(20)
    trial.surgery()
    fresh = trial.fresh(make)
    trial.step(20, fresh)
    assert_rows_equal_fresh(trial, fresh)


def test_without_births_an_adam_row_overshoots_three_and_six_times() -> None:
    """What the correction is for, and proof that the ratio tests can fail: 3.16 and 6.57 times."""
    parameter = nn.Parameter(torch.zeros(4, 1))
    adam = Adam([parameter], lr=1.0)
    parameter.grad = torch.ones(4, 1)
    for _ in range(10_000):
        adam.step()
    run(owners.refresh([adam], parameter, ROWS))
    sizes = []
    for _ in range(100):
        before = parameter.detach().clone()
        adam.step()
        sizes.append(float((before - parameter.detach())[1]))
    assert sizes[0] == pytest.approx(3.162, abs=0.01)
    assert max(sizes) == pytest.approx(6.57, abs=0.02)


def test_rows_born_at_different_steps_have_their_own_ages() -> None:
    trial = Trial(TABLE["adamw"], random_parameters([(5, 3)]))
    (parameter,) = trial.parameters
    twins: dict[int, tuple[nn.Parameter, Optimizer]] = {}
    step_beside(trial, twins, 9)
    for row in (0, 2, 4):
        give_birth(trial, row)
        twin = nn.Parameter(parameter.detach()[row].clone())
        twins[row] = twin, TABLE["adamw"]([twin])
        step_beside(trial, twins, 9)
    assert owners.young_rows(trial.optimizer) == {parameter: {0: 9, 2: 18, 4: 27}}
    for row, (twin, _) in twins.items():
        torch.testing.assert_close(parameter.detach()[row], twin.detach())


@pytest.mark.usefixtures("step_on")
@pytest.mark.parametrize("name", [*ADAMS, "sgd-dampening"])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (6, 2, 3), (3, 4, 2)], ids=str)
@pytest.mark.parametrize("sizes", ["all", "all-in-two", "some"])
def test_rows_in_any_order_and_all_of_them_follow_a_fresh_parameter(
    name: str, sizes: str, shape: tuple[int, ...]
) -> None:
    """Each batch is overwritten three steps after the one before."""
    order = [3, 0, *range(4, AXES[shape].num_units(shape)), 2, 1]
    batches = {"all": [order], "all-in-two": [order[:2], order[2:]], "some": [order[:2]]}[sizes]
    trial = Trial(TABLE[name], random_parameters([shape], torch.float64))
    (parameter,) = trial.parameters
    twins: dict[int, tuple[nn.Parameter, Optimizer]] = {}
    step_beside(trial, twins, 7)
    for batch in batches:
        rows, step = torch.tensor(batch), owners.current_step([trial.optimizer], parameter)
        run(owners.refresh([trial.optimizer], parameter, rows, AXES[shape]))
        run(owners.births([trial.optimizer], parameter, rows, [step or 0] * len(batch), AXES[shape]))
        for row in batch:
            twin = nn.Parameter(row_of(parameter, row))
            twins[row] = twin, TABLE[name]([twin])
        step_beside(trial, twins, 3)
    step_beside(trial, twins, 20)
    rtol = 3e-5 if name == "adam-tensors" else 1e-12
    for row, (twin, _) in twins.items():
        torch.testing.assert_close(row_of(parameter, row), twin.detach(), rtol=rtol, atol=rtol)


def give_birth(trial: Trial, row: int) -> None:
    """To a row of the first parameter, which is a matrix."""
    rows, parameter = torch.tensor([row]), trial.parameters[0]
    run(owners.refresh([trial.optimizer], parameter, rows))
    run(owners.births([trial.optimizer], parameter, rows, [trial.taken]))


def step_beside(trial: Trial, twins: dict[int, tuple[nn.Parameter, Optimizer]], num_steps: int) -> None:
    """Step the trial, and the twins of its single rows with their gradients."""
    for _ in range(num_steps):
        trial.step()
        gradient = trial.parameters[0].grad
        assert gradient is not None
        for row, (twin, optimizer) in twins.items():
            twin.grad = row_of(gradient, row)
            optimizer.step()


@pytest.mark.usefixtures("step_on")
def test_a_row_operated_on_again_takes_the_new_birth() -> None:
    trial, _ = operated("adam", 10)
    trial.step(5)
    trial.surgery()
    assert owners.young_rows(trial.optimizer) == {parameter: {1: 15, 3: 15} for parameter in trial.parameters}
    fresh = trial.fresh(TABLE["adam"])
    trial.step(20, fresh)
    assert_rows_equal_fresh(trial, fresh)


def test_a_birth_at_step_zero_takes_a_row_from_the_young() -> None:
    trial, _ = operated("adam", 10)
    parameter = trial.parameters[0]
    run(owners.births([trial.optimizer], parameter, torch.tensor([3]), [0]))
    assert owners.young_rows(trial.optimizer)[parameter] == {1: 10}


@pytest.mark.usefixtures("step_on")
@pytest.mark.parametrize(("dtype", "grown"), [(torch.float32, 153), (torch.float64, 328)])
def test_rows_stop_being_young_when_the_corrections_agree(dtype: torch.dtype, grown: int) -> None:
    make = partial(Adam, lr=0.01, betas=(0.5, 0.9))  # 0.9 ** 153 < 1e-7 < 0.9 ** 152; 0.9 ** 328 < 1e-15
    trial = Trial(make, random_parameters(dtype=dtype))
    trial.step(40)
    trial.surgery()
    trial.step(grown - 1)
    assert owners.young_rows(trial.optimizer) == {one: {1: 40, 3: 40} for one in trial.parameters}
    trial.step(corrections.Corrections.SWEEP_EVERY)
    assert owners.young_rows(trial.optimizer) == {}
    fresh = trial.fresh(make)
    fresh.optimizer.load_state_dict(row_state(trial))
    trial.step(10, fresh)
    assert_rows_equal_fresh(trial, fresh, 1e-6)


@pytest.mark.usefixtures("step_on")
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (6, 2, 3), (3, 4, 2)], ids=str)
def test_a_row_that_has_grown_up_leaves_the_younger_ones_young(shape: tuple[int, ...], monkeypatch) -> None:
    make = partial(Adam, lr=0.01, betas=(0.5, 0.9))
    monkeypatch.setattr(corrections.Corrections, "SWEEP_EVERY", 1)
    trial = Trial(make, random_parameters([shape]))
    (parameter,) = trial.parameters
    for born, row in ((5, 0), (90, 3)):
        trial.step(born - trial.taken)
        run(owners.refresh([trial.optimizer], parameter, torch.tensor([row]), AXES[shape]))
        run(owners.births([trial.optimizer], parameter, torch.tensor([row]), [born], AXES[shape]))
    twin = nn.Parameter(row_of(parameter, 3))
    twins: dict[int, tuple[nn.Parameter, Optimizer]] = {3: (twin, make([twin]))}
    step_beside(trial, twins, 75)  # the first is 160 steps old, the corrections agree from 153 on
    assert owners.young_rows(trial.optimizer) == {parameter: {3: 90}}
    step_beside(trial, twins, 10)
    torch.testing.assert_close(row_of(parameter, 3), twin.detach(), rtol=2e-5, atol=2e-5)


def test_correcting_rows_of_axis_0_takes_no_more_kernels_than_it_must() -> None:
    """As many as the formula has: views of other layouts must cost these rows nothing."""
    for rows, most in (([1, 3], 9), ([0, 1, 2, 3, 4], 7)):
        trial = Trial(TABLE["adam"], random_parameters([(5, 3)]))
        trial.step(3)
        run(owners.births([trial.optimizer], trial.parameters[0], torch.tensor(rows), [3] * len(rows)))
        hooks = corrections.CORRECTIONS[trial.optimizer]
        with Kernels() as kernels:
            hooks.before_step(trial.optimizer, (), {})
        trial.optimizer.state[trial.parameters[0]]["step"] += 1
        with kernels:
            hooks.after_step(trial.optimizer, (), {})
        assert len(kernels.names) <= most, kernels.names


class Kernels(TorchDispatchMode):
    """The names of the functions that torch dispatches to, inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def row_state(trial: Trial) -> dict[str, Any]:
    """The state dict of the trial's optimizer, of ROWS only."""
    packed = trial.optimizer.state_dict()
    packed["state"] = {
        place: {key: rows_of(entry) if entry.dim() else entry.clone() for key, entry in state.items()}
        for place, state in packed["state"].items()
    }
    return packed


# -- everything else -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("step_on")
@every_optimizer
def test_other_elements_get_bit_identical_updates(name: str) -> None:
    trial, untouched = Trial(TABLE[name]), Trial(TABLE[name])
    trial.step(10)
    untouched.step(10)
    trial.surgery()
    for _ in range(20):
        trial.step()
        untouched.step()
        assert_other_elements_equal(trial, untouched)


def test_assert_other_elements_equal_can_fail() -> None:
    trial, untouched = Trial(TABLE["adam"]), Trial(TABLE["adam"])
    trial.step()
    untouched.step()
    trial.parameters[0].data[0, 0] += 1e-6
    with pytest.raises(AssertionError):
        assert_other_elements_equal(trial, untouched)


@every_optimizer
def test_surgery_keeps_groups_state_keys_identities_and_step(name: str) -> None:
    trial = Trial(TABLE[name])
    trial.step(3)
    state, groups = trial.optimizer.state, [dict(group) for group in trial.optimizer.param_groups]
    before = {parameter: dict(entries) for parameter, entries in state.items()}
    steps = {parameter: as_bits(entries.get("step")) for parameter, entries in state.items()}
    trial.surgery()
    assert trial.optimizer.state is state and list(state) == list(before)
    for parameter, entries in before.items():
        assert list(state[parameter]) == list(entries)
        assert all(state[parameter][key] is entry for key, entry in entries.items())
        assert as_bits(state[parameter].get("step")) == steps[parameter]
    for group, kept in zip(trial.optimizer.param_groups, groups, strict=True):
        assert list(group) == list(kept)
        assert all(group[key] is option for key, option in kept.items())


@every_optimizer
def test_planning_changes_nothing(name: str) -> None:
    trial = Trial(TABLE[name])
    trial.step(3)
    before, seed = everything(trial), torch.get_rng_state()
    for parameter in trial.parameters:
        owners.refresh([trial.optimizer], parameter, ROWS, axes_of(parameter))
        owners.births([trial.optimizer], parameter, ROWS, [3, 3], axes_of(parameter))
    assert everything(trial) == before
    assert torch.equal(torch.get_rng_state(), seed)


@every_optimizer
@pytest.mark.parametrize("num_operations", [1, 2])
def test_reverting_restores_every_bit_and_the_hooks(name: str, num_operations: int) -> None:
    trial = Trial(TABLE[name])
    trial.step(3)
    for _ in range(num_operations - 1):
        trial.surgery()
        trial.step(2)
    before = everything(trial)
    changes = trial.surgery()
    assert everything(trial) != before
    revert(changes)
    assert everything(trial) == before


@every_optimizer
def test_a_fault_after_any_change_restores_every_bit(name: str) -> None:
    trial = Trial(TABLE[name])
    trial.step(3)
    before = everything(trial)
    changes = trial.surgery()
    revert(changes)
    for place in range(len(changes)):
        with pytest.raises(KeyboardInterrupt):
            run([*changes[: place + 1], Interrupt()])
        assert everything(trial) == before


class Interrupt:
    def apply(self) -> None:
        raise KeyboardInterrupt

    def revert(self) -> None:
        pass


@every_optimizer
def test_an_operation_after_a_reverted_one_works_as_the_first(name: str) -> None:
    trial = Trial(TABLE[name])
    trial.step(3)
    revert(trial.surgery())
    trial.surgery()
    fresh = trial.fresh(TABLE[name])
    trial.step(5, fresh)
    assert_rows_equal_fresh(trial, fresh)


def test_two_operations_planned_together_keep_both_births() -> None:
    trial = Trial(TABLE["adam"])
    trial.step(4)
    before, parameter = everything(trial), trial.parameters[0]
    planned = [
        change for row in (0, 2) for change in owners.births([trial.optimizer], parameter, torch.tensor([row]), [4])
    ]
    run(planned)
    assert owners.young_rows(trial.optimizer) == {parameter: {0: 4, 2: 4}}
    revert(planned)
    assert everything(trial) == before


# -- steps that are not ordinary -----------------------------------------------------------------------------


@pytest.mark.usefixtures("step_on")
@every_adam
def test_a_step_without_gradient_changes_nothing(name: str) -> None:
    trial, _ = operated(name, 5)
    trial.step(2)
    trial.optimizer.zero_grad()
    before = everything(trial)
    trial.optimizer.step()
    assert everything(trial) == before


@pytest.mark.usefixtures("step_on")
@pytest.mark.parametrize("name", ["adam-fused", "adamw-fused", "sgd-fused"])
def test_a_step_that_a_gradient_scaler_skips_changes_nothing(name: str) -> None:
    trial, _ = operated(name, 5)
    trial.step(2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for parameter in trial.parameters:
        parameter.grad = torch.full_like(parameter, torch.inf)
    scaler.scale(torch.ones(1))
    before = everything(trial)
    scaler.step(trial.optimizer)
    assert everything(trial) == before


@pytest.mark.usefixtures("step_on")
@pytest.mark.parametrize("name", ["adam-fused", "adamw-fused"])
def test_rows_follow_a_fresh_parameter_across_skipped_steps(name: str) -> None:
    trial, fresh = operated(name, 5)
    trial.step(2, fresh)
    for _ in range(3):
        trial.optimizer.zero_grad()
        trial.optimizer.step()
    trial.step(5, fresh)
    assert_rows_equal_fresh(trial, fresh)


def test_gradients_computed_in_a_closure_are_corrected() -> None:
    trial, fresh = operated("adam", 5)
    gradients = [torch.randn_like(parameter) for parameter in trial.parameters]

    def closure() -> float:
        for parameter, twin, gradient in zip(trial.parameters, fresh.parameters, gradients, strict=True):
            parameter.grad, twin.grad = gradient, rows_of(gradient)
        return 0.0

    trial.optimizer.zero_grad()
    trial.optimizer.step(closure)
    fresh.optimizer.step()
    assert_rows_equal_fresh(trial, fresh)


@pytest.mark.parametrize("name", ["adam", "adamw-foreach", "sgd-dampening"])
def test_a_scheduled_learning_rate_is_the_rows_too(name: str) -> None:
    trial, fresh = operated(name, 5)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(one.optimizer, 0.7) for one in (trial, fresh)]
    for _ in range(10):
        trial.step(1, fresh)
        for schedule in schedules:
            schedule.step()
    assert_rows_equal_fresh(trial, fresh)


@pytest.mark.parametrize("name", ["adam", "sgd-dampening"])
def test_surgery_in_a_hook_of_the_step_counts_from_the_next_step(name: str) -> None:
    trial = Trial(TABLE[name])
    trial.step(5)
    waiting = [1]

    def operate_once(*_: Any) -> None:
        if waiting and waiting.pop():
            trial.surgery()

    trial.optimizer.register_step_post_hook(operate_once)  # before the hooks of the corrections
    give_birth(trial, 0)
    trial.step()
    fresh = trial.fresh(TABLE[name])
    trial.step(5, fresh)
    assert_rows_equal_fresh(trial, fresh)


def test_each_parameter_follows_the_settings_of_its_group() -> None:
    def make(parameters: list[nn.Parameter]) -> Optimizer:
        slow, fast, *others = parameters
        groups = [
            {"params": [slow], "lr": 1e-3},
            {"params": [fast], "lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3},
            {"params": others, "weight_decay": 0.3},
        ]
        return AdamW(groups, lr=0.01)

    trial = Trial(make)
    trial.step(20)
    trial.surgery()
    fresh = trial.fresh(make)
    trial.step(20, fresh)
    assert_rows_equal_fresh(trial, fresh)


@every_adam
def test_rows_stay_young_when_the_state_is_saved_and_loaded(name: str) -> None:
    trial, fresh = operated(name, 20)
    trial.step(3, fresh)
    trial.optimizer.load_state_dict(copy.deepcopy(trial.optimizer.state_dict()))
    trial.step(10, fresh)
    assert_rows_equal_fresh(trial, fresh)


@pytest.mark.usefixtures("step_on")
def test_loading_a_state_from_before_the_birth_forgets_it() -> None:
    trial, untouched = Trial(TABLE["adam"]), Trial(TABLE["adam"])
    trial.step(5)
    saved = copy.deepcopy(trial.optimizer.state_dict())
    trial.step(5)
    trial.surgery()
    for parameter in trial.parameters:
        older = torch.tensor([0])  # entered later
        run(owners.births([trial.optimizer], parameter, older, [0], axes_of(parameter)))
    trial.step(5)
    trial.optimizer.load_state_dict(copy.deepcopy(saved))
    for parameter, twin in zip(trial.parameters, untouched.parameters, strict=True):
        twin.data.copy_(parameter)
    untouched.optimizer.load_state_dict(saved)
    untouched.taken = trial.taken
    trial.step(20)
    untouched.step(20)
    for parameter, twin in zip(trial.parameters, untouched.parameters, strict=True):
        assert torch.equal(parameter, twin)
    assert not any(owners.young_rows(trial.optimizer).values())


@pytest.mark.usefixtures("step_on")
@pytest.mark.parametrize("loads_first", [True, False])
def test_births_are_taken_up_by_a_new_optimizer_that_loads_the_state(loads_first: bool) -> None:
    trial, fresh = operated("adam", 20)
    trial.step(3, fresh)
    saved = trial.optimizer.state_dict()
    trial.optimizer = TABLE["adam"](trial.parameters)
    if loads_first:
        trial.optimizer.load_state_dict(saved)
    for parameter in trial.parameters:
        run(owners.births([trial.optimizer], parameter, ROWS, [20, 20], axes_of(parameter)))
    if not loads_first:
        trial.optimizer.load_state_dict(saved)
    trial.step(10, fresh)
    assert_rows_equal_fresh(trial, fresh)


# -- hooks ---------------------------------------------------------------------------------------------------


def num_hooks(optimizer: Optimizer) -> tuple[int, int]:
    return len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)


def test_an_optimizer_has_one_pair_of_hooks_however_often_it_is_asked() -> None:
    trial, _ = operated("adam", 5)
    trial.surgery()
    assert num_hooks(trial.optimizer) == (1, 1)


@pytest.mark.parametrize("name", ["sgd-momentum", "rmsprop"])
def test_optimizers_that_need_no_correction_get_no_hooks(name: str) -> None:
    trial, _ = operated(name, 5)
    assert num_hooks(trial.optimizer) == (0, 0)


def test_hooks_of_the_user_do_not_fire_during_surgery() -> None:
    trial = Trial(partial(Adagrad, lr=0.1))
    trial.step(3)
    fired: list[Optimizer] = []
    handle = register_optimizer_step_post_hook(lambda one, *_: fired.append(one))
    trial.surgery()
    handle.remove()
    assert fired == []


def test_copies_and_pickles_of_an_optimizer_carry_no_hooks() -> None:
    trial, _ = operated("adam", 5)
    copied, pickled = copy.deepcopy(trial.optimizer), pickle.loads(pickle.dumps(trial.optimizer))
    stream = io.BytesIO()
    torch.save(trial.optimizer.state_dict(), stream)
    for optimizer in (copied, pickled):
        assert num_hooks(optimizer) == (0, 0) and owners.young_rows(optimizer) == {}
    assert num_hooks(trial.optimizer) == (1, 1)


def test_a_copied_model_has_no_young_rows() -> None:
    layer = nn.Linear(3, 4)
    adam = Adam(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    adam.step()
    weight = next(layer.parameters())
    run(owners.births([adam], weight, ROWS, [1, 1]))
    assert vars(copy.deepcopy(layer)).keys() == vars(layer).keys()
    assert owners.young_rows(adam) == {weight: {1: 1, 3: 1}}


def test_hooks_keep_neither_the_optimizer_nor_its_parameters_alive() -> None:
    trial, _ = operated("adam", 5)
    trial.step(2)
    gone = weakref.ref(trial.optimizer), weakref.ref(trial.parameters[0])
    del trial
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_a_parameter_the_optimizer_no_longer_owns_is_let_go() -> None:
    trial, _ = operated("adam", 5)
    dropped = trial.optimizer.param_groups[0]["params"].pop(0)
    trial.step()
    assert dropped not in owners.young_rows(trial.optimizer)


# -- several optimizers --------------------------------------------------------------------------------------


def test_two_optimizers_of_one_parameter_are_both_treated() -> None:
    parameter = random_parameters([(5, 3)])[0]
    first, second = Adam([parameter], lr=0.01), RMSprop([parameter], lr=0.01)
    parameter.grad = torch.ones_like(parameter)
    first.step()
    second.step()
    run(owners.refresh([first, second], parameter, ROWS))
    for entry in (first.state[parameter]["exp_avg"], second.state[parameter]["square_avg"]):
        assert (entry[ROWS] == 0).all() and (entry[0] != 0).all()


def test_births_are_kept_on_each_optimizers_own_count() -> None:
    parameter = random_parameters([(5, 3)])[0]
    parameter.grad = torch.ones_like(parameter)
    first, second, third = Adam([parameter]), AdamW([parameter]), SGD([parameter], lr=0.1)
    for _ in range(4):
        first.step()
    second.step()
    both = [third, first, second]
    assert owners.current_step(both, parameter) == 4
    run(owners.births(both, parameter, ROWS, [4, 3]))
    assert owners.young_rows(first) == {parameter: {1: 4, 3: 3}}
    assert owners.young_rows(second) == {parameter: {1: 1}}  # the other row is as old as the parameter there
    assert owners.young_rows(third) == {}


def test_a_parameter_without_state_needs_no_change() -> None:
    for name, make in TABLE.items():
        if name.startswith(("adagrad", "schedule-free")):
            continue  # their constructors, or `train()`, make an entry
        trial = Trial(make)
        assert trial.parameters[0] not in trial.optimizer.state
        assert owners.refresh([trial.optimizer], trial.parameters[0], ROWS) == []
        assert owners.births([trial.optimizer], trial.parameters[0], ROWS, [0, 0]) == []
        assert trial.parameters[0] not in trial.optimizer.state


def test_no_rows_and_no_optimizers_need_no_change() -> None:
    trial, _ = operated("adam", 5)
    none = torch.tensor([], dtype=torch.int64)
    assert owners.refresh([trial.optimizer], trial.parameters[0], none) == []
    assert owners.refresh([], trial.parameters[0], ROWS) == []
    assert owners.births([], trial.parameters[0], ROWS, [1, 1]) == []


# -- families and unknown optimizers -------------------------------------------------------------------------


class Named(AdamW):
    """As its parent, with its own way of taking options."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)


class Clipped(Adam):
    """Not its parent: it overrides `step`."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Averaging(Optimizer):
    """Steps toward a running copy of the weights, so a fresh row's state is the row itself."""

    def __init__(self, params: Any, *, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                slow = state.setdefault("slow", parameter.clone())
                slow.sub_(parameter.grad, alpha=group["lr"])
                parameter.lerp_(slow, 0.5)


class Accumulating(Adagrad):
    """Passes its options on, and makes its state in the constructor."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)


class Renamed(Rprop):
    """Its constructor calls the group's `lr` by another name."""

    def __init__(self, params: Any, rate: float = 0.01) -> None:
        super().__init__(params, lr=rate)


class Counting(Optimizer):
    """Counts its steps in the group, and warms up: a rate of its own at each of them."""

    def __init__(self, params: Any, *, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(0.9).add_(parameter.grad)
                parameter.sub_(momentum, alpha=group["lr"] * (1 - 0.5 ** group["step"]))


class Restless(Optimizer):
    """Keeps a number for all rows that no count tells, and that slows their steps."""

    def __init__(self, params: Any, *, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                state["norm"] = state.get("norm", 1.0) + float(parameter.flatten()[0].abs())
                momentum.mul_(0.9).add_(parameter.grad)
                parameter.sub_(momentum, alpha=group["lr"] / (1 + state["norm"]))


class Hasty(Restless):
    """As its parent, but the number makes the steps longer."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                state["norm"] = state.get("norm", 1.0) + float(parameter.flatten()[0].abs()) + 0.1
                momentum.mul_(0.9).add_(parameter.grad)
                parameter.sub_(momentum, alpha=group["lr"] * state["norm"])


class LayerWise(Optimizer):
    """LAMB's and LARS's way: a step relative to the norm of the whole parameter, state of the same shape."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(0.9).add_(parameter.grad)
                parameter.sub_(momentum * parameter.norm() / momentum.norm(), alpha=group["lr"])


class Noisy(SGD):
    """Draws random numbers in its step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["noise"] = torch.zeros_like(parameter)
            parameter.sub_(parameter.grad + torch.randn(parameter.shape))


class Late(SGD):
    """State that is not there after the first step cannot be learned."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            if state["step"] > 1:
                state["average"] = parameter.clone()


class Wrapping(SGD):
    """Takes another optimizer, so it cannot be built from its parameter group."""

    def __init__(self, base: Optimizer, options: dict[str, Any]) -> None:
        super().__init__(base.param_groups, **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_subclass_that_keeps_step_is_of_its_parents_family() -> None:
    make = partial(Named, lr=0.02, weight_decay=0.1)
    trial = Trial(make)
    trial.step(20)
    trial.surgery()
    fresh = trial.fresh(make)
    trial.step(20, fresh)
    assert owners.notes([trial.optimizer], trial.parameters[0]) == []
    assert_rows_equal_fresh(trial, fresh)


def test_a_subclass_that_overrides_step_is_tried_out_and_treated_by_its_count() -> None:
    make = partial(Clipped, lr=0.01)
    trial = Trial(make)
    trial.step(20)
    trial.surgery()
    fresh = trial.fresh(make)
    trial.step(30, fresh)
    assert_rows_equal_fresh(trial, fresh)
    assert owners.notes([trial.optimizer], trial.parameters[0]) == []


OUTSIDE = ["adabelief", "adopt", "diffgrad", "lion", "ademamix", "tiger", "yogi"]

UNKNOWN: dict[str, Make] = {
    "accumulating": partial(Accumulating, lr=0.1, initial_accumulator_value=0.5),
    "renamed": partial(Renamed, rate=0.03),
    "averaging": partial(Averaging, lr=0.2),
    "counting": partial(Counting, lr=0.2),
    **{name: partial(pytorch_optimizer.load_optimizer(name), lr=0.01) for name in OUTSIDE},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.situation("Optimizers", f"{name} (pytorch-optimizer)", "works"),
        )
        if name in OUTSIDE
        else name
        for name in UNKNOWN
    ],
)
def test_unknown_element_wise_optimizers_treat_rows_as_fresh(name: str) -> None:
    parameters = random_parameters([(5, 3), (6,), (3, 5)])
    trial, untouched = (Trial(UNKNOWN[name], copy.deepcopy(parameters)) for _ in range(2))
    trial.step(10)
    untouched.step(10)
    trial.surgery()
    fresh = trial.fresh(UNKNOWN[name])
    trial.step(20, fresh)
    untouched.step(20)
    assert_rows_equal_fresh(trial, fresh)
    assert_other_elements_equal(trial, untouched)
    assert owners.notes([trial.optimizer], trial.parameters[0]) == []


def test_a_class_whose_numbers_a_count_does_not_tell_gets_a_note() -> None:
    trial = Trial(partial(Restless, lr=0.1), random_parameters(MATRIX))
    trial.step(10)
    trial.surgery()
    assert owners.notes([trial.optimizer], trial.parameters[0]) == [
        "Restless: unknown family; rows took the state of a fresh parameter, what all rows share (norm) is "
        "left as it is and may scale their first updates"
    ]


def test_planning_leaves_the_random_state_to_an_optimizer_that_draws() -> None:
    trial = Trial(Noisy)
    trial.step(3)
    seed = torch.get_rng_state()
    assert len(owners.refresh([trial.optimizer], trial.parameters[0], ROWS)) == 1
    assert torch.equal(torch.get_rng_state(), seed)


def test_the_state_of_a_parameter_with_one_element_becomes_fresh() -> None:
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    optimizer = SGD([parameter], momentum=0.9)
    optimizer.step()
    run(owners.refresh([optimizer], parameter, torch.tensor([0])))
    assert optimizer.state[parameter]["momentum_buffer"].tolist() == [0.0]


def test_known_families_and_untouched_parameters_give_no_note() -> None:
    for make in TABLE.values():
        trial = Trial(make)
        trial.step()
        assert owners.notes([trial.optimizer], trial.parameters[0]) == []
    trial = Trial(partial(Adagrad, lr=0.1))
    assert owners.notes([trial.optimizer], nn.Parameter(torch.ones(1))) == []


MATRIX: list[tuple[int, ...]] = [(5, 3)]

WHAT_IS_REFUSED = {
    "state-of-another-shape": "Shampoo (pytorch-optimizer)",
    "state-of-lists": "SOAP (pytorch-optimizer)",
    "factored": "AdaFactor (pytorch-optimizer)",
    "trust-ratio": "LAMB (pytorch-optimizer)",
}

REFUSED: dict[str, tuple[Make, list[tuple[int, ...]], str]] = {
    "state-of-another-shape": (
        pytorch_optimizer.Shampoo,
        MATRIX,
        r"Shampoo couples the rows .* of shape \(5, 3\): its state 'pre_cond_0' has shape",
    ),
    "state-of-lists": (pytorch_optimizer.SOAP, MATRIX, r"SOAP couples the rows .* its state 'GG' has type list"),
    "factored": (pytorch_optimizer.AdaFactor, MATRIX, r"AdaFactor couples the rows .* 'exp_avg_sq_row' has shape"),
    "trust-ratio": (pytorch_optimizer.Lamb, MATRIX, r"Lamb couples the rows .* depends on the others"),
    "overshooting": (
        partial(Hasty, lr=0.01),
        MATRIX,
        r"fresh rows overshoot under Hasty: .* times a fresh parameter's",
    ),
    "norm-of-a-matrix": (LayerWise, MATRIX, r"LayerWise couples the rows .* depends on the others"),
    "state-that-comes-later": (
        partial(Late, lr=0.1),
        MATRIX,
        r"operated rows .* need a fresh 'average', but Late has none",
    ),
    "not-constructible": (
        lambda parameters: Wrapping(SGD(parameters, lr=0.1, momentum=0.9), {"lr": 0.1}),
        MATRIX,
        r"Wrapping gives a fresh parameter cannot be learned: .*TypeError",
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.situation("Optimizers", WHAT_IS_REFUSED[name], "refused"))
        if name in WHAT_IS_REFUSED
        else name
        for name in REFUSED
    ],
)
def test_optimizers_that_cannot_be_treated_are_refused_before_anything_changes(name: str) -> None:
    make, shapes, text = REFUSED[name]
    trial = Trial(make, random_parameters(shapes))
    trial.step(3)
    before, seed = everything(trial), torch.get_rng_state()
    with pytest.raises(OptimizerError, match=text):
        owners.refresh([trial.optimizer], trial.parameters[0], ROWS)
    assert everything(trial) == before
    assert torch.equal(torch.get_rng_state(), seed)


class Normalizing(Optimizer):
    """Divides each slice of the gradient along an axis by its norm; state of the parameter's shape."""

    def __init__(self, params: Any, lr: float = 0.1, axis: int = 0) -> None:
        super().__init__(params, {"lr": lr, "axis": axis})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.mul_(0.9).add_(parameter.grad)
                others = [axis for axis in range(parameter.dim()) if axis != group["axis"]]
                norms = torch.linalg.vector_norm(momentum, dim=others, keepdim=True)
                parameter.sub_(momentum / (norms + 1e-8), alpha=group["lr"])


def test_an_optimizer_that_couples_the_weights_of_a_row_only_is_taken() -> None:
    trial = Trial(partial(Normalizing, axis=0), random_parameters([(5, 3)]))
    trial.step(3)
    assert len(owners.refresh([trial.optimizer], trial.parameters[0], ROWS)) == 1


@pytest.mark.parametrize(
    ("shape", "axis"),
    [(shape, axis) for shape in [(3, 5), (6, 2, 3), (3, 4, 2)] for axis in range(len(shape))],
    ids=str,
)
def test_coupling_along_any_axis_is_refused_where_units_are_not_rows(shape: tuple[int, ...], axis: int) -> None:
    trial = Trial(partial(Normalizing, axis=axis), random_parameters([shape]))
    trial.step(3)
    before = everything(trial)
    with pytest.raises(OptimizerError, match=r"Normalizing couples the weights .* of one weight depends on the others"):
        owners.refresh([trial.optimizer], trial.parameters[0], ROWS, AXES[shape])
    assert everything(trial) == before


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 4), (3, 1)], ids=str)
def test_coupling_is_refused_in_parameters_of_one_row_or_of_one_unit(shape: tuple[int, ...]) -> None:
    trial = Trial(LayerWise, random_parameters([shape]))
    trial.step(3)
    with pytest.raises(OptimizerError, match="LayerWise couples the weights"):
        owners.refresh([trial.optimizer], trial.parameters[0], torch.tensor([0]), UnitAxes((1,)))


@pytest.mark.parametrize("name", ["adam", "sgd-dampening"])
def test_rows_and_columns_that_are_young_together_are_numbered_one_by_one(name: str) -> None:
    trial = Trial(TABLE[name], random_parameters([(5, 3)]))
    trial.step(3)
    trial.surgery()  # rows 1 and 3
    parameter, family = trial.parameters[0], family_of(trial.optimizer)
    assert family is not None
    born = owners.young_rows(trial.optimizer)[parameter][1]
    run(corrections.register(trial.optimizer, family, parameter, torch.tensor([2]), [7], UnitAxes((1,))))
    rows = {3: born, 4: born, 9: born, 10: born}
    assert owners.young_rows(trial.optimizer)[parameter] == rows | dict.fromkeys((2, 5, 8, 11, 14), 7)


def test_state_that_is_no_tensor_is_refused() -> None:
    trial = Trial(torch.optim.LBFGS, random_parameters(MATRIX))
    trial.parameters[0].grad = torch.ones(5, 3)
    trial.optimizer.step(lambda: trial.parameters[0].sum())  # type: ignore[arg-type, return-value]
    with pytest.raises(OptimizerError, match="LBFGS"):
        owners.refresh([trial.optimizer], trial.parameters[0], ROWS)


# -- who owns what -------------------------------------------------------------------------------------------


def test_as_optimizers_takes_none_one_or_several() -> None:
    parameters = random_parameters()
    first, second = Adam(parameters), SGD(parameters)
    assert owners.as_optimizers(None) == ()
    assert owners.as_optimizers(first) == (first,)
    assert owners.as_optimizers([first, second, first]) == (first, second)


def test_as_optimizers_refuses_anything_else_and_says_what_to_pass() -> None:
    scheduler = torch.optim.lr_scheduler.StepLR(SGD(random_parameters()), 1)
    with pytest.raises(OptimizerError, match=r"found StepLR\. Pass .* scheduler\.optimizer"):
        owners.as_optimizers(scheduler)  # type: ignore[arg-type]
    with pytest.raises(OptimizerError, match="found str"):
        owners.as_optimizers("adam")  # type: ignore[arg-type]
    with pytest.raises(OptimizerError, match="found Linear"):
        owners.as_optimizers([nn.Linear(1, 1)])  # type: ignore[list-item]


def test_an_optimizer_that_owns_none_of_the_parameters_is_an_error() -> None:
    model, another = nn.Linear(2, 3), nn.Linear(2, 3)
    owners.check_owners([Adam(model.parameters()), SGD([model.bias])], dict(model.named_parameters()))
    text = r"AdamW owns none of the model's 2 parameters: it has 2.*optimizer = AdamW\(model.parameters\(\)"
    with pytest.raises(OptimizerError, match=text):
        owners.check_owners([AdamW(another.parameters())], dict(model.named_parameters()))


def test_unowned_names_the_parameters_that_no_optimizer_has() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    parameters = dict(model.named_parameters())
    optimizers = [Adam([parameters["0.weight"]]), SGD([parameters["1.bias"]])]
    assert owners.unowned(optimizers, parameters) == ("0.bias", "1.weight")
    assert owners.unowned([], parameters) == tuple(parameters)


def test_current_step_is_the_owners_count() -> None:
    trial = Trial(TABLE["adam"])
    parameter = trial.parameters[0]
    assert owners.current_step([trial.optimizer], parameter) == 0
    trial.step(3)
    assert owners.current_step([trial.optimizer], parameter) == 3
    assert owners.current_step([], parameter) is None
    assert owners.current_step([trial.optimizer], nn.Parameter(torch.ones(1))) is None


def test_current_step_is_none_where_the_owner_does_not_count() -> None:
    trial = Trial(TABLE["sgd-momentum"])
    assert owners.current_step([trial.optimizer], trial.parameters[0]) is None
    trial.step(3)
    assert owners.current_step([trial.optimizer], trial.parameters[0]) is None
