"""Units operated on are passed over for a cooldown under every optimizer, and step hooks come and go cleanly."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from neuronsurgery import surgery
from neuronsurgery.choosing import Custom
from neuronsurgery.errors import OptimizerError
from neuronsurgery.pytorch import entry, step_hooks
from neuronsurgery.pytorch import optimizers as owners
from neuronsurgery.pytorch.transaction import revert, run
from tests.snapshots import assert_untouched, snapshot

Make = Callable[..., Optimizer]


class Plain(Optimizer):
    """Of no known family, with state but no count of steps."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                parameter.sub_(momentum.mul_(0.9).add_(parameter.grad), alpha=self.param_groups[0]["lr"])


TABLE: dict[str, Make] = {
    "sgd": partial(SGD, lr=0.01),
    "sgd-momentum": partial(SGD, lr=0.01, momentum=0.9),
    "sgd-dampening": partial(SGD, lr=0.01, momentum=0.9, dampening=0.1),
    "rmsprop": partial(RMSprop, lr=0.01),
    "adam": partial(Adam, lr=0.01),
    "adamw-fused": partial(AdamW, lr=0.01, fused=True),
    "adagrad": partial(Adagrad, lr=0.01),
    "plain": partial(Plain, lr=0.01),
}
UNCOUNTED = ["sgd", "sgd-momentum", "sgd-dampening", "plain"]

every_optimizer = pytest.mark.parametrize("name", TABLE)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def train(model: nn.Module, *optimizers: Optimizer, num_steps: int = 1) -> None:
    for _ in range(num_steps):
        model.zero_grad()
        model(torch.randn(16, 4)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def everything(scores: Any) -> dict[str, list[bool]]:
    """A criterion that chooses all units, so that only the cooldown decides."""
    return {name: [True] * site.num_units for name, site in scores.sites.items()}


def operate(model: nn.Module, optimizer: Any, site: str, *units: int) -> Any:
    return surgery.knife(model, surgery.Units({site: units}), optimizer=optimizer)


def old_units(model: nn.Module, optimizer: Any, cooldown: int) -> dict[str, tuple[int, ...]]:
    """The units that a knife would choose, on a copy that shares the optimizer's count."""
    sites = surgery.discover(model)
    scores = surgery.score(sites, entry.measure(model, sites), Custom(everything))
    return dict(surgery.select(scores, ages=entry.ages(model, optimizer), cooldown=cooldown).units)


def weight(model: nn.Module, site: str) -> nn.Parameter:
    return model.get_parameter(f"{site}.weight")


def num_hooks(optimizer: Optimizer) -> int:
    return len(optimizer._optimizer_step_post_hooks)


# -- cooldown --------------------------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("num_steps", [0, 3])
def test_an_operated_unit_is_passed_over_for_the_cooldown_and_no_longer(name: str, num_steps: int) -> None:
    model = network()
    optimizer = TABLE[name](model.parameters())
    train(model, optimizer, num_steps=num_steps)
    operate(model, optimizer, "0", 1, 3)
    for age in range(4):
        assert entry.ages(model, optimizer) == {"0": {1: age, 3: age}}
        train(model, optimizer)
    assert old_units(model, optimizer, cooldown=5)["0"] == (0, 2, 4, 5)
    train(model, optimizer)
    assert old_units(model, optimizer, cooldown=5) == {"0": tuple(range(6)), "2": tuple(range(5))}


@every_optimizer
def test_knife_passes_over_young_units_and_says_how_many(name: str) -> None:
    model = network()
    optimizer = TABLE[name](model.parameters())
    train(model, optimizer, num_steps=3)
    operate(model, optimizer, "0", 1, 3)
    train(model, optimizer, num_steps=2)
    report = surgery.knife(model, everything, optimizer=optimizer, cooldown=3)
    assert report.operated["0"] == (0, 2, 4, 5)
    assert any("0: 2 young units passed over" in note for note in report.notes)


@every_optimizer
def test_a_later_operation_is_counted_from_its_own_step(name: str) -> None:
    model = network()
    optimizer = TABLE[name](model.parameters())
    train(model, optimizer, num_steps=2)
    operate(model, optimizer, "0", 1, 3)
    train(model, optimizer, num_steps=4)
    operate(model, optimizer, "0", 3, 4)
    operate(model, optimizer, "2", 0)
    train(model, optimizer, num_steps=3)
    assert entry.ages(model, optimizer) == {"0": {1: 7, 3: 3, 4: 3}, "2": {0: 3}}


@pytest.mark.parametrize("counted_first", [True, False])
def test_two_optimizers_count_their_own_layers(counted_first: bool) -> None:
    model = network()
    sgd, adam = SGD(model[0].parameters(), lr=0.1, momentum=0.9), Adam(model[2].parameters())
    both = (adam, sgd) if counted_first else (sgd, adam)
    train(model, sgd, adam, num_steps=2)
    operate(model, both, "0", 1)
    operate(model, both, "2", 2)
    train(model, sgd, adam, num_steps=3)
    train(model, adam, num_steps=4)
    assert entry.ages(model, both) == {"0": {1: 3}, "2": {2: 7}}
    assert sgd in step_hooks.CLOCKS and adam not in step_hooks.CLOCKS


def test_of_two_owners_the_one_that_counts_gives_the_age() -> None:
    """Also when the other's clock is started later, for another layer."""
    model = network()
    sgd, adam = SGD(model.parameters(), lr=0.1), Adam(model[0].parameters())
    train(model, adam, num_steps=5)
    operate(model, (sgd, adam), "0", 1)
    assert sgd not in step_hooks.CLOCKS
    operate(model, (sgd, adam), "2", 1)
    train(model, sgd, adam, num_steps=2)
    assert entry.ages(model, (sgd, adam)) == {"0": {1: 2}, "2": {1: 2}}


def test_starting_the_clock_of_a_second_owner_takes_no_age_back() -> None:
    model = network()
    first, second = SGD(model.parameters(), lr=0.1), SGD(model[0].parameters(), lr=0.1)
    operate(model, second, "0", 1)
    train(model, first, second, num_steps=3)
    operate(model, (first, second), "2", 1)
    assert entry.ages(model, (first, second)) == {"0": {1: 3}, "2": {1: 0}}


def test_a_unit_that_no_optimizer_owns_has_no_age() -> None:
    model = network()
    optimizer = SGD(model[2].parameters(), lr=0.1)
    operate(model, optimizer, "0", 1)
    assert entry.ages(model, optimizer) == {}
    assert optimizer not in step_hooks.CLOCKS and num_hooks(optimizer) == 0


@pytest.mark.parametrize("name", UNCOUNTED)
@pytest.mark.parametrize("num_steps", [0, 4])
def test_a_new_optimizer_takes_units_for_old_and_not_for_young_forever(name: str, num_steps: int) -> None:
    """As after a resume: its clock is not running until its first operation."""
    model = network()
    operate(model, TABLE[name](model.parameters()), "0", 1)
    optimizer = TABLE[name](model.parameters())
    train(model, optimizer, num_steps=num_steps)
    assert owners.age_clock([optimizer], weight(model, "0")) is None
    assert entry.ages(model, optimizer) == {}


def test_births_ahead_of_a_clock_that_started_anew_count_as_old() -> None:
    model = network()
    first = SGD(model.parameters(), lr=0.1)
    operate(model, first, "0", 0)
    train(model, first, num_steps=6)
    operate(model, first, "0", 1)
    resumed = SGD(model.parameters(), lr=0.1)
    operate(model, resumed, "0", 2)
    train(model, resumed, num_steps=5)
    assert entry.ages(model, resumed)["0"] == {0: 5, 2: 5}


# -- the clock's hook ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNCOUNTED)
def test_an_optimizer_has_one_clock_however_often_it_is_operated_with(name: str) -> None:
    model = network()
    optimizer = TABLE[name](model.parameters())
    for unit in range(3):
        operate(model, optimizer, "0", unit)
        operate(model, optimizer, "2", unit)
        train(model, optimizer)
    clocks = [
        hook for hook in optimizer._optimizer_step_post_hooks.values() if isinstance(owner(hook), step_hooks.Clock)
    ]
    assert [owner(hook) for hook in clocks] == [step_hooks.CLOCKS[optimizer]]


def owner(hook: Any) -> Any:
    return getattr(getattr(hook, "__wrapped__", hook), "__self__", None)


@pytest.mark.parametrize("name", ["sgd-momentum", "adam", "adamw-fused"])
def test_a_compiled_step_counts_and_corrects_as_an_eager_one(name: str) -> None:
    models = [network() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, is_compiled in zip(models, (True, False), strict=True):
        torch.manual_seed(0)
        optimizer = TABLE[name](model.parameters())
        train(model, optimizer, num_steps=3)
        operate(model, optimizer, "0", 1)
        step = torch.compile(optimizer.step, backend="eager") if is_compiled else optimizer.step
        for _ in range(4):
            train(model)
            step()
        assert entry.ages(model, optimizer) == {"0": {1: 4}}
    torch._dynamo.reset()
    for parameter, twin in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(parameter, twin)


@pytest.mark.parametrize("name", ["rmsprop", "adam", "adamw-fused"])
def test_an_optimizer_that_counts_gets_no_clock(name: str) -> None:
    model = network()
    optimizer = TABLE[name](model.parameters())
    operate(model, optimizer, "0", 1)
    assert optimizer not in step_hooks.CLOCKS and num_hooks(optimizer) == 0


@pytest.mark.parametrize("name", UNCOUNTED)
def test_a_failed_first_operation_takes_the_clock_away_again(name: str) -> None:
    model = network()
    optimizer = TABLE[name](model.parameters())
    train(model, optimizer)
    before = snapshot(model, [optimizer])
    planned = owners.start_clocks([optimizer], weight(model, "0")) + owners.start_clocks(
        [optimizer], weight(model, "2")
    )
    assert_untouched(before, model, [optimizer], why="planning")
    with pytest.raises(KeyboardInterrupt):
        run([*planned, Interrupt()])
    assert_untouched(before, model, [optimizer], why="a fault")
    assert optimizer not in step_hooks.CLOCKS
    run(planned)
    assert num_hooks(optimizer) == 1 and step_hooks.CLOCKS[optimizer].num_steps == 0
    revert(planned)
    assert_untouched(before, model, [optimizer], why="reverting")
    assert optimizer not in step_hooks.CLOCKS


class Interrupt:
    def apply(self) -> None:
        raise KeyboardInterrupt

    def revert(self) -> None:
        pass


def test_a_failed_later_operation_leaves_the_clock_running() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    operate(model, optimizer, "0", 1)
    train(model, optimizer, num_steps=2)
    clock = step_hooks.CLOCKS[optimizer]
    with pytest.raises(KeyboardInterrupt):
        run([*owners.start_clocks([optimizer], weight(model, "2")), Interrupt()])
    assert step_hooks.CLOCKS[optimizer] is clock and clock.num_steps == 2 and num_hooks(optimizer) == 1


def test_copies_and_pickles_have_no_clock_and_leave_the_originals_running() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    operate(model, optimizer, "0", 1)
    train(model, optimizer, num_steps=2)
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert num_hooks(copied) == 0 and copied not in step_hooks.CLOCKS
    copied_model, copied_optimizer = copy.deepcopy((model, optimizer))
    assert entry.ages(copied_model, copied_optimizer) == {}
    train(copied_model, copied_optimizer)
    assert entry.ages(model, optimizer) == {"0": {1: 2}}


def test_a_loaded_state_leaves_the_clock_running() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer)
    operate(model, optimizer, "0", 1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, num_steps=2)
    assert entry.ages(model, optimizer) == {"0": {1: 2}}


def test_a_clock_keeps_neither_the_optimizer_nor_the_model_alive() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    run(owners.start_clocks([optimizer], weight(model, "0")))
    gone = weakref.ref(optimizer), weakref.ref(model[0].weight)
    del model, optimizer
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_the_births_kept_in_the_bank_are_the_clocks() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    operate(model, optimizer, "0", 1)
    train(model, optimizer, num_steps=4)
    operate(model, optimizer, "0", 2)
    births = {member.unit: member.births for member in surgery.composites(model).members["0"]}
    assert births == {1: (0, 0), 2: (4, 4)}


# -- operations inside a step ----------------------------------------------------------------------------------------


@contextmanager
def in_a_hook(optimizer: Optimizer, kind: str, position: int, act: Callable[[], Any]) -> Iterator[None]:
    """Three hooks of a kind, of which the one at the position acts, once."""
    waiting = [act]

    def hook(*_: Any) -> None:
        if waiting:
            waiting.pop()()

    register = getattr(optimizer, f"register_step_{kind}_hook")
    handles = [register(hook if place == position else lambda *_: None) for place in range(3)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", "pre"), ("adam", "post"), ("sgd-momentum", "post"), ("sgd-dampening", "pre")]
)
@pytest.mark.parametrize("position", [0, 1])
def test_a_first_operation_between_hooks_is_refused_before_anything_changes(name, kind, position) -> None:
    model = network()
    optimizer = TABLE[name](model.parameters())
    train(model, optimizer, num_steps=2)
    before: list[Any] = []

    def act() -> None:
        before.append(snapshot(model, [optimizer]))
        with pytest.raises(
            OptimizerError, match=rf"first operation with this {type(optimizer).__name__}.* as the last"
        ):
            operate(model, optimizer, "0", 1)
        assert_untouched(before[0], model, [optimizer])

    with in_a_hook(optimizer, kind, position, act):
        train(model, optimizer)
    assert before
    assert operate(model, optimizer, "0", 1).operated == {"0": (1,)}


@pytest.mark.parametrize("name", ["adam", "sgd-momentum", "sgd-dampening"])
@pytest.mark.parametrize(("kind", "position"), [("pre", 2), ("post", 2)])
def test_a_first_operation_in_the_last_hook_works(name, kind, position) -> None:
    model = network()
    optimizer = TABLE[name](model.parameters())
    train(model, optimizer, num_steps=2)
    with in_a_hook(optimizer, kind, position, lambda: operate(model, optimizer, "0", 1)):
        train(model, optimizer, num_steps=1)
    age = entry.ages(model, optimizer)["0"][1]
    train(model, optimizer, num_steps=3)
    assert entry.ages(model, optimizer)["0"][1] == age + 3


@pytest.mark.parametrize("name", ["adam", "sgd-momentum"])
def test_later_operations_between_hooks_work(name: str) -> None:
    model = network()
    optimizer = TABLE[name](model.parameters())
    train(model, optimizer, num_steps=2)
    operate(model, optimizer, "0", 1)
    for kind in ("pre", "post"):
        with in_a_hook(optimizer, kind, 0, lambda: operate(model, optimizer, "2", 1)):
            train(model, optimizer)
    assert len(surgery.composites(model).members["2"]) == 4


@pytest.mark.parametrize("name", ["adam", "sgd-momentum", "sgd-dampening"])
def test_a_first_operation_in_a_closure_or_in_another_optimizers_hook_works(name: str) -> None:
    model = network()
    optimizer, other = TABLE[name](model.parameters()), SGD(network().parameters())
    train(model, optimizer, num_steps=2)
    with in_a_hook(other, "post", 0, lambda: operate(model, optimizer, "0", 1)):
        other.step()
    model, optimizer = (lambda m: (m, TABLE[name](m.parameters())))(network())
    train(model, optimizer, num_steps=2)
    with in_a_hook(optimizer, "post", 0, lambda: None):
        optimizer.step(lambda: float(len(operate(model, optimizer, "0", 1).operated)))
    assert surgery.composites(model).num_units == 1


def test_a_hook_that_raised_does_not_forbid_operations_in_later_steps() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    with in_a_hook(optimizer, "post", 0, lambda: 1 / 0):
        try:
            train(model, optimizer)
        except ZeroDivisionError as error:
            kept = error
    assert kept.__traceback__ is not None
    assert operate(model, optimizer, "0", 1).operated == {"0": (1,)}
