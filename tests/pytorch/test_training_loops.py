"""Operations in the middle of a run: schedulers, wrappers and the ways people step go on as if nothing had happened."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer, lr_scheduler, swa_utils

from neuronsurgery import surgery
from neuronsurgery.errors import OptimizerError
from neuronsurgery.pytorch import optimizers as owners
from neuronsurgery.pytorch.transaction import revert, run
from tests.optimizer_rows import (
    ROWS,
    SHAPE,
    gradient,
    library_warnings,
    overwrite,
    reloaded,
    take_step,
)

with library_warnings():
    import pytorch_optimizer


def situation(group: str, what: str, outcome: str = "works") -> Any:
    return pytest.mark.situation(group, what, outcome)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))


def batch(step: int) -> Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(step))


def backward(model: nn.Module, step: int) -> Tensor:
    loss: Tensor = model(batch(step)).square().mean()
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()


def operate(model: nn.Module, optimizer: Any, units: Sequence[int] = (1, 3)) -> Any:
    return surgery.knife(
        model, surgery.Units({"0": units}), optimizer=optimizer, generator=torch.Generator().manual_seed(5)
    )


def same(model: nn.Module, twin: nn.Module) -> bool:
    pairs = zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
    return all(torch.equal(one, two) for one, two in pairs if isinstance(one, Tensor))


# -- schedules -------------------------------------------------------------------------------------------------------

Schedule = Callable[[Optimizer], Any]

SCHEDULES: dict[str, Schedule] = {
    "LambdaLR": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.95**step),
    "MultiplicativeLR": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda step: 0.95),
    "StepLR": partial(lr_scheduler.StepLR, step_size=7),
    "MultiStepLR": partial(lr_scheduler.MultiStepLR, milestones=[5, 14]),
    "ConstantLR": partial(lr_scheduler.ConstantLR, total_iters=14),
    "LinearLR": partial(lr_scheduler.LinearLR, total_iters=18),
    "ExponentialLR": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "PolynomialLR": partial(lr_scheduler.PolynomialLR, total_iters=30),
    "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=9),
    "CosineAnnealingWarmRestarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=5),
    "ReduceLROnPlateau": partial(lr_scheduler.ReduceLROnPlateau, patience=2),
    "CyclicLR, momentum": partial(
        lr_scheduler.CyclicLR, base_lr=1e-3, max_lr=1e-2, step_size_up=6, base_momentum=0.8, max_momentum=0.95
    ),
    "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=1e-2, total_steps=40),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=5), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[8],
    ),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(optimizer, total_iters=5), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "SWALR": partial(swa_utils.SWALR, swa_lr=1e-3, anneal_epochs=6),
}

every_schedule = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=situation("Schedules and wrappers", name), id=name) for name in SCHEDULES]
)


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{key: entry for key, entry in group.items() if key != "params"} for group in optimizer.param_groups]


@every_schedule
@pytest.mark.parametrize("make", [partial(optim.AdamW, lr=0.01), partial(optim.SGD, lr=0.01, momentum=0.9)])
def test_an_operation_leaves_a_schedule_as_it_was(name: str, make: Callable[..., Optimizer]) -> None:
    models = [network(), network()]
    optimizers = [make(model.parameters()) for model in models]
    schedules = [SCHEDULES[name](optimizer) for optimizer in optimizers]
    for step in range(26):
        if step == 11:
            operate(models[0], optimizers[0])
        metric = (1.0 + step % 3,) if name == "ReduceLROnPlateau" else ()
        for model, optimizer, schedule in zip(models, optimizers, schedules, strict=True):
            train(model, optimizer, range(step, step + 1))
            schedule.step(*metric)
        assert settings_of(optimizers[0]) == settings_of(optimizers[1])
        assert schedules[0].get_last_lr() == schedules[1].get_last_lr()


@every_schedule
def test_operated_rows_follow_a_fresh_parameters_on_the_schedule(name: str) -> None:
    """Also where betas are scheduled with the rate."""
    parameter = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)))
    optimizer = optim.AdamW([parameter], lr=0.01)
    schedule = SCHEDULES[name](optimizer)
    fresh, twin = nn.Parameter(torch.ones(1)), optimizer
    for step in range(30):
        if step == 8:
            fresh = nn.Parameter(overwrite(optimizer, parameter))
            twin = optim.AdamW([fresh], lr=0.01)
        given = gradient(step, "random", SHAPE)
        if step >= 8:
            twin.param_groups[0].update(settings_of(optimizer)[0])
            take_step(twin, fresh, given[ROWS])
        take_step(optimizer, parameter, given)
        schedule.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    torch.testing.assert_close(parameter.detach()[ROWS], fresh.detach(), rtol=1e-5, atol=1e-5)


# -- wrappers --------------------------------------------------------------------------------------------------------


def sharpness_aware(model: nn.Module) -> Any:
    with library_warnings():
        return pytorch_optimizer.SAM(model.parameters(), optim.AdamW, lr=0.01, rho=0.05)


def train_twice(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:

        def closure(step: int = step) -> Tensor:
            return backward(model, step)

        optimizer.zero_grad()
        closure()
        optimizer.step(closure)


@situation("Schedules and wrappers", "SAM, two-step closure")
@pytest.mark.parametrize("passed", ["the wrapper", "what it wraps"])
def test_sharpness_aware_training_goes_on(passed: str) -> None:
    model, twin = network(), network()
    optimizer, other = sharpness_aware(model), sharpness_aware(twin)
    train_twice(model, optimizer, range(6))
    train_twice(twin, other, range(6))
    base, weight = optimizer.base_optimizer, model.get_parameter("0.weight")
    assert owners.as_optimizers(optimizer) == (base,)
    base.state[weight]["old_p"] = weight.detach().clone()  # some implementations leave it there
    operate(model, optimizer if passed == "the wrapper" else base)
    operate(twin, other)
    assert owners.young_rows(base)[weight] == {1: 6, 3: 6}
    assert torch.equal(base.state[weight]["old_p"][ROWS], weight.detach()[ROWS])
    train_twice(model, optimizer, range(6, 12))
    train_twice(twin, other, range(6, 12))
    assert same(model, twin)
    assert (base.state[weight]["step"]) == 12


def lookahead(parameters: Any, **options: Any) -> Any:
    with library_warnings():
        return pytorch_optimizer.Lookahead(optim.AdamW(parameters, lr=0.01), k=5, **options)


@situation("Schedules and wrappers", "Lookahead")
def test_slow_weights_of_operated_rows_are_the_new_rows() -> None:
    parameter = nn.Parameter(torch.randn(SHAPE))
    optimizer = lookahead([parameter])
    for step in range(10):
        take_step(optimizer, parameter, gradient(step, "random", SHAPE))
    inner, wrapper = owners.as_optimizers(optimizer)
    assert (inner, wrapper) == (optimizer.optimizer, optimizer)
    slow = optimizer.state[parameter]["slow_params"]
    before = slow.clone()
    new = torch.randn(2, SHAPE[1])
    changes = owners.refresh([inner, wrapper], parameter, ROWS) + owners.births(
        [inner, wrapper], parameter, ROWS, [10] * 2
    )
    with torch.no_grad():
        parameter[ROWS] = new
    run(changes)
    assert torch.equal(slow[ROWS], new) and torch.equal(slow[[0, 2, 4, 5]], before[[0, 2, 4, 5]])
    fresh = nn.Parameter(new.clone())
    twin = lookahead([fresh])
    for step in range(12):
        given = gradient(10 + step, "random", SHAPE)
        take_step(optimizer, parameter, given)
        take_step(twin, fresh, given[ROWS])
    torch.testing.assert_close(parameter.detach()[ROWS], fresh.detach())
    revert(changes)
    assert torch.equal(slow[ROWS], before[ROWS])


def test_state_of_a_wrapper_that_is_no_copy_of_the_weights_is_refused() -> None:
    parameter = nn.Parameter(torch.randn(SHAPE))
    optimizer = lookahead([parameter], pullback_momentum="pullback")
    with pytest.raises(OptimizerError, match=r"Lookahead keeps 'slow_momentum' .* the AdamW that it holds"):
        owners.refresh(owners.as_optimizers(optimizer), parameter, ROWS)


class Accelerated(Optimizer):
    """What training frameworks put around an optimizer: its groups, its state, its step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups


class Two(Optimizer):
    """Steps two optimizers in turn."""

    def __init__(self, first: Optimizer, second: Optimizer) -> None:
        self.first, self.second, self.state = first, second, {}  # type: ignore[assignment]
        self.param_groups = [*first.param_groups, *second.param_groups]


@situation("Schedules and wrappers", "accelerate's optimizer")
def test_a_wrapper_without_state_of_its_own_is_what_it_holds() -> None:
    adam = optim.Adam(network().parameters())
    assert owners.as_optimizers(Accelerated(adam)) == (adam,)
    assert owners.as_optimizers([Accelerated(Accelerated(adam)), adam]) == (adam,)


@situation("Schedules and wrappers", "a wrapper of two optimizers", "refused")
def test_a_wrapper_of_several_optimizers_is_refused_by_name() -> None:
    model = network()
    both = Two(optim.Adam(model[0].parameters()), optim.SGD(model[2].parameters()))
    with pytest.raises(OptimizerError, match=r"Two holds 2 optimizers, Adam, SGD.* pass those"):
        operate(model, both)


# -- ways to step ----------------------------------------------------------------------------------------------------


@situation("When to operate", "optimizer in backward (a hook for each parameter)")
def test_an_optimizer_for_each_parameter_steps_as_one_for_all() -> None:
    model, twin = network(), network()
    each = {parameter: optim.AdamW([parameter], lr=0.01) for parameter in model.parameters()}

    def step_and_forget(parameter: Tensor) -> None:
        each[parameter].step()  # type: ignore[index]
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step_and_forget)
    optimizer = optim.AdamW(twin.parameters(), lr=0.01)
    for step in range(12):
        if step == 6:
            operate(model, list(each.values()))
            operate(twin, optimizer)
        backward(model, step)
        train(twin, optimizer, range(step, step + 1))
        assert same(model, twin)


@situation("When to operate", "between accumulated micro-batches")
def test_gradients_accumulated_so_far_stay_except_the_operated_rows() -> None:
    model, twin = network(), network()
    optimizers = [optim.NAdam(one.parameters(), lr=0.01) for one in (model, twin)]
    for one, optimizer in zip((model, twin), optimizers, strict=True):
        train(one, optimizer, range(4))
        optimizer.zero_grad()
        backward(one, 4)
    operate(model, optimizers[0])
    weight = model.get_parameter("0.weight")
    assert weight.grad is not None and (weight.grad[ROWS] == 0).all()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None
        kept = torch.ones_like(mine.grad).bool()
        if mine.shape[0] == 6:
            kept[ROWS] = False
        assert torch.equal(mine.grad[kept], other.grad[kept])
    backward(model, 5)
    optimizers[0].step()
    assert owners.young_rows(optimizers[0])[weight] == {1: 4, 3: 4}


@situation("Optimizers", "parameter groups added later (add_param_group)")
def test_a_group_added_after_an_operation_changes_no_young_row() -> None:
    parameter, late = nn.Parameter(torch.randn(SHAPE)), nn.Parameter(torch.randn(SHAPE))
    optimizer = optim.RAdam([parameter], lr=0.01)
    for step in range(9):
        take_step(optimizer, parameter, gradient(step, "random", SHAPE))
    fresh = nn.Parameter(overwrite(optimizer, parameter))
    twin = optim.RAdam([fresh], lr=0.01)
    for step in range(14):
        given = gradient(9 + step, "random", SHAPE)
        if step == 3:
            optimizer.add_param_group({"params": [late], "lr": 0.5, "betas": (0.1, 0.2)})
        if step == 8:
            overwrite(optimizer, late)
        late.grad = given.clone()
        take_step(optimizer, parameter, given)
        take_step(twin, fresh, given[ROWS])
    torch.testing.assert_close(parameter.detach()[ROWS], fresh.detach())


@situation("Optimizers", "SparseAdam for embeddings, another for the layers")
def test_a_sparse_optimizer_of_embeddings_is_let_be() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    sparse, dense = optim.SparseAdam(model[0].parameters()), optim.Adam(model[1:].parameters())
    for step in range(6):
        if step == 3:
            surgery.knife(model, surgery.Units({"1": (1, 3)}), optimizer=[sparse, dense])
        model.zero_grad()
        model(torch.tensor([1, 2, 5])).square().mean().backward()
        sparse.step()
        dense.step()
    assert owners.young_rows(sparse) == {}
    assert owners.young_rows(dense)[model.get_parameter("1.weight")] == {1: 3, 3: 3}


@situation("Optimizers", "LBFGS", "refused")
def test_an_optimizer_with_one_memory_of_all_parameters_is_refused_at_once() -> None:
    model = network()
    optimizer = optim.LBFGS(model.parameters())
    optimizer.step(lambda: backward(model, 0))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptimizerError, match="LBFGS"):
        operate(model, optimizer)
    assert all(torch.equal(before[key], entry) for key, entry in model.state_dict().items())


@situation("Optimizers", "differentiable=True", "refused")
def test_torch_lets_no_differentiable_optimizer_step_a_modules_parameters() -> None:
    """So that there is none to operate with; one that has not stepped is no obstacle."""
    model = network()
    optimizer = optim.Adam(model.parameters(), differentiable=True)
    backward(model, 0)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        optimizer.step()


@situation("Optimizers", "8-bit and 4-bit state (torchao)", "refused")
def test_packed_state_is_refused() -> None:
    """Blocks of 256 numbers share a scale. The class is not stepped here: it compiles itself for most of a minute."""
    subclass = pytest.importorskip("torchao.optim.subclass_8bit")
    parameter = nn.Parameter(torch.randn(64, 64))
    optimizer = optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.state[parameter]["exp_avg"] = subclass.OptimState8bit.zeros((64, 64), True, 256)
    with pytest.raises(OptimizerError, match=r"AdamW keeps its state 'exp_avg' .* as OptimState8bit, which cannot"):
        owners.refresh([optimizer], parameter, ROWS)


@situation("Checkpoints and copies", "optimizer state loaded in the middle of a run")
@pytest.mark.parametrize("make", [optim.NAdam, optim.RAdam, partial(optim.SGD, lr=0.1, momentum=0.9, dampening=0.5)])
def test_loading_a_state_into_the_optimizer_in_use_keeps_its_hooks(make: Callable[..., Optimizer]) -> None:
    model, twin = network(), network()
    optimizers = [make(one.parameters()) for one in (model, twin)]
    for one, optimizer in zip((model, twin), optimizers, strict=True):
        train(one, optimizer, range(5))
        operate(one, optimizer)
    optimizers[0].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for one, optimizer in zip((model, twin), optimizers, strict=True):
        train(one, optimizer, range(5, 12))
    assert same(model, twin)


@situation("Checkpoints and copies", "optimizer copied or pickled")
def test_a_copied_optimizer_has_no_hooks_and_can_be_given_them() -> None:
    parameter = nn.Parameter(torch.randn(SHAPE))
    optimizer = optim.Adamax([parameter])
    for step in range(5):
        take_step(optimizer, parameter, gradient(step, "random", SHAPE))
    overwrite(optimizer, parameter)
    twin, copied = copy.deepcopy((parameter, optimizer))
    assert owners.lacks_corrections([copied], twin, [5, 5]) and not owners.lacks_corrections(
        [optimizer], parameter, [5, 5]
    )
    assert not owners.lacks_corrections([copied], twin, [0, -1])
    run(owners.resume([copied], twin, ROWS, [5, 5]))
    for step in range(20):
        take_step(optimizer, parameter, gradient(5 + step, "random", SHAPE))
        take_step(copied, twin, gradient(5 + step, "random", SHAPE))
        assert torch.equal(parameter, twin)
    assert reloaded(optimizer, optim.Adamax, parameter).state[parameter]["step"] == 25
