"""Each way in which targets follow a model, with the mode that is right for it, and what the other one does.

Beside each pair of model and target stands a twin pair on which nobody operated: with the right mode a target converges
to its model as the twin does; with the wrong one it never does, and that is found.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

from neuronsurgery import surgery
from neuronsurgery.pytorch.offsets import offsets_of
from neuronsurgery.pytorch.sites import discover

Model = Any
RATE = 0.25


@torch.no_grad()
def hard_by_state_dict(target: Model, model: Model) -> None:
    target.load_state_dict(model.state_dict())


@torch.no_grad()
def hard_by_parameters(target: Model, model: Model) -> None:
    for mine, theirs in zip(target.parameters(), model.parameters(), strict=True):
        mine.data.copy_(theirs.data)


@torch.no_grad()
def polyak_in_place(target: Model, model: Model) -> None:
    for mine, theirs in zip(target.parameters(), model.parameters(), strict=True):
        mine.mul_(1 - RATE).add_(theirs, alpha=RATE)


def polyak_of_data(target: Model, model: Model) -> None:
    for mine, theirs in zip(target.parameters(), model.parameters(), strict=True):
        mine.data.copy_(RATE * theirs.data + (1 - RATE) * mine.data)


@torch.no_grad()
def polyak_foreach(target: Model, model: Model) -> None:
    torch._foreach_lerp_(list(target.parameters()), list(model.parameters()), RATE)


@torch.no_grad()
def polyak_of_floats(target: Model, model: Model) -> None:
    theirs = model.state_dict()
    mixed = {
        name: mine.lerp(theirs[name], RATE) if mine.is_floating_point() else theirs[name]
        for name, mine in target.state_dict().items()
    }
    target.load_state_dict(mixed)


@torch.no_grad()
def polyak_of_all(target: Model, model: Model) -> None:
    theirs = model.state_dict()
    mixed = {name: (1 - RATE) * mine + RATE * theirs[name] for name, mine in target.state_dict().items()}
    target.load_state_dict(mixed)


@torch.no_grad()
def polyak_and_buffers_copied(target: Model, model: Model) -> None:
    polyak_in_place(target, model)
    for mine, theirs in zip(target.buffers(), model.buffers(), strict=True):
        mine.copy_(theirs)


def averaged(target: AveragedModel, model: Model) -> None:
    target.update_parameters(model)


Follow = Callable[[Model, Model], None]
BY_PARAMETERS: dict[str, Follow] = {
    "parameters copied": hard_by_parameters,
    "Polyak over zip(parameters), in place": polyak_in_place,
    "Polyak over zip(parameters), .data": polyak_of_data,
    "Polyak over zip(parameters), foreach": polyak_foreach,
}
AS_A_WHOLE: dict[str, Follow] = {
    "load_state_dict": hard_by_state_dict,
    "Polyak over state dicts, floats": polyak_of_floats,
    "Polyak over state dicts, everything": polyak_of_all,
}
AVERAGED = {
    "AveragedModel, EMA": {"multi_avg_fn": get_ema_multi_avg_fn(1 - RATE)},
    "AveragedModel, EMA of each": {"avg_fn": get_ema_avg_fn(1 - RATE)},
    "AveragedModel, EMA, use_buffers": {"multi_avg_fn": get_ema_multi_avg_fn(1 - RATE), "use_buffers": True},
    "AveragedModel, EMA of each, use_buffers": {"avg_fn": get_ema_avg_fn(1 - RATE), "use_buffers": True},
}
RIGHT = [
    *((name, "shared") for name in BY_PARAMETERS),
    *((name, "own") for name in AS_A_WHOLE),
    *((name, "shared") for name in AS_A_WHOLE),
    ("Polyak over zip(parameters), buffers copied", "shared"),
    ("Polyak over zip(parameters), buffers copied", "own"),
    *((name, frozen) for name in AVERAGED for frozen in ("shared", "own")),
]
FOLLOW = BY_PARAMETERS | AS_A_WHOLE | {"Polyak over zip(parameters), buffers copied": polyak_and_buffers_copied}
FOLLOW |= dict.fromkeys(AVERAGED, averaged)


def situations(pairs: list[tuple[str, str]], outcome: str) -> list[Any]:
    labels = {(name, frozen): f'{name}: frozen="{frozen}"' for name, frozen in pairs}
    mark = pytest.mark.situation
    return [pytest.param(*pair, marks=mark("Replicas", label, outcome), id=label) for pair, label in labels.items()]


def network() -> Model:
    torch.manual_seed(3)
    layers = nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)
    return nn.Sequential(*layers).double().eval()


def moved(model: Model, seed: int, by: float = 0.1) -> None:
    """As training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=by)


def follower(model: Model, name: str) -> Model:
    """A target that follows in this way and lags behind: the model moves on."""
    target = AveragedModel(model, **AVERAGED[name]) if name in AVERAGED else copy.deepcopy(model)
    target.requires_grad_(False)
    if name in AVERAGED:
        target.update_parameters(model)  # the first update copies
    moved(model, 0)
    return target.eval()


X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gap(model: Model, target: Model) -> float:
    with torch.no_grad():
        return float((model(X) - target(X)).abs().max())


def operated(name: str, frozen: Any, units: tuple[int, ...] = (1, 5)) -> tuple[Model, Model, Model, Model]:
    """A model and its target after an operation and mirroring, and a twin pair without."""
    model = network()
    target = follower(model, name)
    twins = copy.deepcopy((model, target))
    surgery.knife(model, surgery.Units({"0": units, "3": units}))
    surgery.mirror(model, onto=target, frozen=frozen)
    return model, target, *twins


def lag_of(target: Model) -> dict[str, tuple[int, ...]]:
    target.requires_grad_(True)
    found = offsets_of(discover(target).places)
    target.requires_grad_(False)
    return found


@pytest.mark.parametrize(("name", "frozen"), situations(RIGHT, "works"))
def test_a_target_mirrored_in_the_right_mode_converges_as_its_unoperated_twin(name, frozen):
    model, target, twin, twins_target = operated(name, frozen)
    start = gap(twin, twins_target)
    for each in (model, twin):
        moved(each, 1)
    for step in range(160):
        FOLLOW[name](target, model), FOLLOW[name](twins_target, twin)
        if step in (0, 5, 159):
            assert lag_of(target) == {}
            surgery.check(model, mirrors=target).require()
    assert start > 0.1
    assert gap(twin, twins_target) < 1e-12
    assert gap(model, target) < 1e-12


@pytest.mark.parametrize("name", ["Polyak over state dicts, floats", "AveragedModel, EMA, use_buffers"])
def test_an_own_target_fades_towards_a_resting_model_exactly_as_its_twin(name):
    """While the active members rest, what the target computes is its knowledge, which is averaged as the slots were."""
    model, target, twin, twins_target = operated(name, "own")
    for _ in range(8):
        with torch.no_grad():
            assert torch.allclose(target(X), twins_target(X), rtol=0, atol=1e-12)
        FOLLOW[name](target, model), FOLLOW[name](twins_target, twin)
    assert gap(twin, twins_target) > 1e-3  # they are still under way


@pytest.mark.parametrize(("name", "frozen"), situations([(name, "own") for name in BY_PARAMETERS], "refused"))
def test_own_rows_under_updates_of_parameters_alone_leave_an_offset_for_good_which_is_found(name, frozen):
    model, target, *_ = operated(name, frozen)
    moved(model, 1)
    for _ in range(3):
        FOLLOW[name](target, model)
    assert lag_of(target) == {"0": (1, 5), "3": (1, 5)}
    (found,) = surgery.check(model, mirrors=target).about("mirror")
    assert found.where == "mirrors[0]: 0; 3" and "slots of units 1, 5 follow a model" in found.found
    for _ in range(400):
        FOLLOW[name](target, model)
    assert gap(model, target) > 1e-2
    assert lag_of(target) == {"0": (1, 5), "3": (1, 5)}


@pytest.mark.parametrize("name", BY_PARAMETERS)
def test_the_next_mirroring_names_an_offset_and_shared_mends_it(name):
    model, target, *_ = operated(name, "own")
    moved(model, 1)
    FOLLOW[name](target, model)
    surgery.knife(model, surgery.Units({"0": [7]}))
    before = [value.clone() for value in target.state_dict().values()]
    with pytest.raises(surgery.MirrorError, match=r"'0' was mirrored with frozen='own'.*units \[1, 5\].*'shared'"):
        surgery.mirror(model, onto=target)
    assert all(torch.equal(a, b) for a, b in zip(before, target.state_dict().values(), strict=True))
    surgery.mirror(model, onto=target, frozen="shared")
    for _ in range(160):
        FOLLOW[name](target, model)
    assert gap(model, target) < 1e-12 and lag_of(target) == {}


def test_operating_on_a_target_with_an_offset_is_refused_but_not_on_one_that_trains():
    model, target, *_ = operated("parameters copied", "own")
    moved(model, 1)
    hard_by_parameters(target, model)
    target.requires_grad_(True)
    chosen = surgery.Units({"0": [7]})
    with pytest.raises(surgery.MirrorError, match="keep an offset from the model for good"):
        surgery.knife(target, chosen)
    optimizer = torch.optim.SGD(target.parameters(), lr=0.1)
    assert surgery.knife(target, chosen, optimizer=optimizer).num_units == 1


def test_members_that_train_by_themselves_are_no_targets_with_an_offset():
    model, target, *_ = operated("load_state_dict", "own")
    target.requires_grad_(True)(X).square().sum().backward()
    moved(target, 5)
    assert offsets_of(discover(target).places) == {}
    surgery.mirror(model, onto=target)


@pytest.mark.parametrize("name", BY_PARAMETERS)
def test_a_target_that_never_lagged_has_no_offset(name):
    """Its knowledge rows are the model's, so that not moving is right."""
    model = network()
    target = copy.deepcopy(model)
    surgery.knife(model, surgery.Units({"0": [1, 5]}))
    surgery.mirror(model, onto=target)
    moved(model, 1)
    FOLLOW[name](target, model)
    assert lag_of(target) == {}


def test_a_model_that_rests_shows_no_offset():
    model, target, *_ = operated("Polyak over zip(parameters), in place", "own")
    for _ in range(50):
        polyak_in_place(target, model)
    assert lag_of(target) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_averages_with_small_rates_raise_no_false_alarm(dtype):
    """In half precision the averages stall, and nothing can be told."""
    model, target, *_ = operated("load_state_dict", "own")
    model.to(dtype), target.to(dtype)
    surgery.knife(model, surgery.Units({"0": [7]}))
    surgery.mirror(model, onto=target)
    for step in range(20):
        moved(model, step)
        mine, theirs = target.state_dict(), model.state_dict()
        with torch.no_grad():
            for name, value in mine.items():
                if value.is_floating_point():
                    value.mul_(1 - 0.001).add_(theirs[name], alpha=0.001)
    assert lag_of(target) == {}


def test_an_offset_is_found_in_rows_of_earlier_mirrorings_too():
    model, target, *_ = operated("parameters copied", "own")
    surgery.knife(model, surgery.Units({"0": [5, 7]}))
    surgery.mirror(model, onto=target)
    moved(model, 1)
    hard_by_parameters(target, model)
    assert lag_of(target) == {"0": (1, 5, 7), "3": (1, 5)}


def test_the_offset_is_found_on_a_target_that_was_copied():
    model, target, *_ = operated("parameters copied", "own")
    moved(model, 1)
    target = copy.deepcopy(target)
    hard_by_parameters(target, model)
    with pytest.raises(surgery.MirrorError, match="keep an offset"):
        surgery.mirror(model, onto=target)


# -- as they stand in training loops ---------------------------------------------------------------------------------


@pytest.mark.situation("Replicas", "DQN with hard copies every N steps", "works")
def test_dqn_with_hard_copies_goes_on_across_operations():
    torch.manual_seed(0)
    online = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    target = copy.deepcopy(online).requires_grad_(False)
    optimizer = torch.optim.Adam(online.parameters(), lr=1e-2)
    for step in range(60):
        obs, following, reward = torch.randn(8, 4).double(), torch.randn(8, 4).double(), torch.randn(8).double()
        td_target = reward + 0.9 * target(following).amax(1)
        loss = (online(obs)[:, 0] - td_target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 13 == 12:
            before = target(obs)
            surgery.knife(online, surgery.Units({"0": [step % 16, (step + 5) % 16]}), optimizer=optimizer)
            assert surgery.mirror(online, onto=target, verify=obs).max_moved <= 1e-12
            assert torch.allclose(target(obs), before, rtol=0, atol=1e-12)
        if step % 10 == 9:
            target.load_state_dict(online.state_dict())
            assert torch.equal(target(obs), online(obs))


@pytest.mark.situation("Replicas", "mean teacher or BYOL with BatchNorm", "works")
@pytest.mark.parametrize("statistics", ["copied", "its own"])
def test_a_teacher_with_batch_norm_converges_to_the_student(statistics):
    student = network().train()
    teacher = copy.deepcopy(student).requires_grad_(False)
    moved(student, 0)
    student(X), teacher(X + 1)
    surgery.knife(student, surgery.Units({"0": [1, 5], "3": [2]}))
    surgery.mirror(student, onto=teacher, frozen="shared")
    moved(student, 1)
    for _ in range(400):
        with torch.no_grad():
            student(X)
            polyak_in_place(teacher, student)
            if statistics == "copied":
                for mine, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
                    mine.copy_(theirs)
            else:
                teacher(X)
    assert gap(student.train(), teacher.train()) < 1e-12
    assert gap(student.eval(), teacher.eval()) < 1e-12


@pytest.mark.situation("Replicas", "swa_utils.AveragedModel and update_bn", "works")
@pytest.mark.parametrize("frozen", ["shared", "own"])
def test_stochastic_weight_averaging_is_the_mean_of_what_was_averaged(frozen):
    """With the model at rest after the operation, every later average keeps the share of what was averaged before."""
    model = network()
    average: Any = AveragedModel(model)
    average.update_parameters(model)
    surgery.knife(model, surgery.Units({"0": [1, 5]}))
    surgery.mirror(model, onto=average, frozen=frozen)
    weights = [model[0].weight.detach().clone()]
    for seed in range(3):
        moved(model, seed)
        average.update_parameters(model)
        weights.append(model[0].weight.detach().clone())
    assert torch.allclose(average.module[0].weight, torch.stack(weights).mean(0), atol=1e-12)
    assert torch.equal(average.module[0].composite.frozen_weight, model[0].composite.frozen_weight)
    update_bn([X, X + 1], average), update_bn([X, X + 1], reference := copy.deepcopy(average.module).train())
    assert gap(average.eval(), reference.eval()) == 0
    batches = [average.module[0](batch) for batch in (X, X + 1)]
    running: Tensor = average.module[1].running_mean
    assert torch.allclose(running[0], torch.stack([batch[:, 0].mean() for batch in batches]).mean(), atol=1e-12)
