"""A model that accepts takes structure over from any strict loader; everything else stays the loader's business."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronsurgery import surgery
from tests.snapshots import assert_untouched, snapshot
from tests.state_subjects import as_bits, assert_same_model, operated, overwritten
from tests.subjects import MODELS
from tests.zoo import ZOO, Animal, mlp

CHECKPOINTS = "Checkpoints and copies"
UNITS = surgery.Units({"0": [0, 3], "2": [1]})


def x() -> Tensor:
    return torch.linspace(-1.0, 1.0, 20).view(5, 4)


def accepting(build: Callable[[], nn.Module] = mlp) -> nn.Module:
    model = build()
    surgery.accept(model)
    return model


@pytest.mark.situation(CHECKPOINTS, "a framework's own strict load_state_dict", "works")
@pytest.mark.parametrize("animal", [a for a in ZOO if a.sites], ids=str)
def test_a_strict_load_brings_the_structure_along(animal: Animal):
    torch.manual_seed(0)
    model, batch = animal.build().eval(), animal.batch()
    fresh = accepting(animal.build).eval()
    operated(model)
    result = fresh.load_state_dict(model.state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same_model(fresh, model, batch)


def test_a_parent_loads_a_model_that_accepts_under_its_prefix():
    def parent() -> Any:
        return nn.ModuleDict({"policy": nn.ModuleDict({"net": accepting()}), "target": mlp()})

    trained = parent()
    operated(trained["policy"]["net"])
    fresh = parent()
    fresh.load_state_dict(trained.state_dict())
    assert_same_model(fresh["policy"]["net"], trained["policy"]["net"], (x(),))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), copy.copy],
    ids=["deepcopy", "pickle", "copy"],
)
def test_copies_and_pickles_accept_as_well(copied: Callable[[nn.Module], Any]):
    model = operated(mlp())
    holder = nn.ModuleDict({"net": accepting()})
    duplicate = copied(holder)
    duplicate.load_state_dict({f"net.{name}": value for name, value in model.state_dict().items()})
    assert_same_model(duplicate["net"], copy.deepcopy(model), (x(),))
    assert copied is copy.copy or not surgery.composites(holder["net"]).members


def test_every_later_load_is_accepted_and_structure_is_replaced():
    fresh = accepting()
    for times in (1, 3, 0, 2):
        model = operated(mlp(), times)
        fresh.load_state_dict(model.state_dict())
        assert as_bits(fresh.state_dict()) == as_bits(model.state_dict())
        assert torch.equal(fresh(x()), model(x()))


def test_accepting_twice_hangs_one_hook():
    model = accepting()
    surgery.accept(model)
    assert len(model._load_state_dict_pre_hooks) == 1


def test_a_state_without_banks_loads_as_usual():
    fresh, plain = accepting(), mlp()
    for name, value in list(plain.state_dict().items())[:2]:
        result = fresh.load_state_dict({name: value}, strict=False)
        assert set(result.missing_keys) == {key for key in plain.state_dict() if key != name}
    fresh.load_state_dict(plain.state_dict())
    assert as_bits(fresh.state_dict()) == as_bits(plain.state_dict())


def test_a_load_of_a_part_leaves_the_other_banks_where_they_are():
    model = operated(accepting())
    before = surgery.composites(model)
    model.load_state_dict({"4.bias": torch.ones(2)}, strict=False)
    assert surgery.composites(model) == before
    other = operated(mlp(), 1)
    first = {name: value for name, value in other.state_dict().items() if name.startswith("0.")}
    model.load_state_dict(first, strict=False)
    assert surgery.composites(model).members["0"] == surgery.composites(other).members["0"]
    assert surgery.composites(model).members["2"] == before.members["2"]
    model(x())


@pytest.mark.parametrize("strict", [True, False])
def test_other_unknown_keys_stay_the_loaders_errors(strict: bool):
    fresh, model = accepting(), operated(mlp())
    state = model.state_dict() | {"9.weight": torch.ones(3), "0.extra": torch.ones(2)}
    before = snapshot(fresh)
    if strict:
        with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "9.weight", "0.extra"'):
            fresh.load_state_dict(state)
        assert_untouched(before, fresh)
    else:
        result = fresh.load_state_dict(state, strict=False)
        assert sorted(result.unexpected_keys) == ["0.extra", "9.weight"]
        assert_same_model(fresh, model, (x(),))


def test_weights_that_do_not_fit_leave_the_model_untouched():
    fresh, model = accepting(), operated(mlp())
    before = snapshot(fresh)
    for name, value in (("4.weight", torch.ones(2, 3)), ("4.bias", "no tensor")):
        with pytest.raises(RuntimeError, match=name):
            fresh.load_state_dict(model.state_dict() | {name: value})
        assert_untouched(before, fresh)


def test_a_model_that_is_assigned_to_receives_the_tensors_themselves():
    fresh, model = accepting(), operated(mlp())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fresh.load_state_dict(state, assign=True)
    assert fresh.state_dict()["0.weight"].data_ptr() == state["0.weight"].data_ptr()
    assert_same_model(fresh, model, (x(),))


def test_wrapped_models_accept():
    model = operated(mlp())
    compiled: Any = torch.compile(mlp(), backend="eager")
    surgery.accept(compiled)
    compiled.load_state_dict({f"_orig_mod.{name}": value for name, value in model.state_dict().items()})
    assert torch.allclose(compiled(x()), model(x()), atol=1e-6)


def test_an_accepting_part_of_an_accepting_model_is_loaded_with_it():
    def build() -> nn.Module:
        inner = accepting()
        return accepting(lambda: nn.Sequential(inner, nn.Linear(2, 2)))

    model, fresh = operated(build(), 1), build()
    fresh.load_state_dict(model.state_dict())
    assert_same_model(fresh, model, (x(),))


def test_a_target_that_accepts_follows_hard_copies_through_operations():
    online, target = mlp(), accepting()
    for _ in range(3):
        operated(online, 1)
        target.load_state_dict(online.state_dict())
        assert torch.equal(target(x()), online(x()))


# -- loaded into the same structure, by torch alone --------------------------------------------------------------------


@pytest.mark.situation(CHECKPOINTS, "state_dict, load_state_dict(strict=True)", "works")
@pytest.mark.parametrize("name", list(MODELS))
def test_the_same_structure_needs_nothing(name: str):
    make, _ = MODELS[name]
    model, other = operated(make()), operated(make())
    other.load_state_dict(model.state_dict())
    batch = torch.randn(8, 1, 2, 2) if name == "conv" else x()
    assert_same_model(other.eval(), model.eval(), (batch,))


AVERAGE = {
    "by key": lambda one, other: {k: 0.25 * v + 0.75 * other[k] for k, v in one.items()},
    "in float64": lambda one, other: {k: 0.25 * v.double() + 0.75 * other[k].double() for k, v in one.items()},
    "floats alone": lambda one, other: {
        k: 0.25 * v + 0.75 * other[k] if v.is_floating_point() else v for k, v in one.items()
    },
}


@pytest.mark.situation("Replicas", "averaging state dicts of equal structure (Polyak)", "works")
@pytest.mark.parametrize("how", list(AVERAGE))
@pytest.mark.parametrize("accepts", [False, True], ids=["plain", "accepting"])
def test_the_average_of_two_states_of_one_structure_is_loaded(how: str, accepts: bool):
    online, target = mlp(), (accepting() if accepts else mlp())
    optimizer = torch.optim.SGD(online.parameters(), lr=0.1)
    surgery.knife(online, UNITS, optimizer=optimizer)
    surgery.knife(target, UNITS)
    for _ in range(3):
        optimizer.step()
        structure = surgery.composites(target)
        expected = (
            0.25 * online.state_dict()["0.composite.frozen_weight"]
            + 0.75 * (target.state_dict()["0.composite.frozen_weight"])
        )
        target.load_state_dict(AVERAGE[how](online.state_dict(), target.state_dict()))
        if how != "floats alone":
            assert surgery.composites(target) == structure
        assert torch.allclose(target.state_dict()["0.composite.frozen_weight"], expected)
    restored = overwritten(target)
    surgery.restore(restored, AVERAGE[how](target.state_dict(), target.state_dict()))
    assert torch.allclose(restored(x()), target(x()), atol=1e-6)


@pytest.mark.situation("Replicas", "averaging state dicts of different structure", "refused")
@pytest.mark.parametrize("load", ["plain", "accept", "restore"])
@pytest.mark.parametrize("how", ["by key", "in float64"])
def test_the_average_of_two_structures_is_refused(load: str, how: str):
    one, other, target = mlp(), mlp(), mlp()
    surgery.knife(one, surgery.Units({"0": [0, 3]}))
    surgery.knife(other, surgery.Units({"0": [0, 4]}))
    surgery.knife(target, surgery.Units({"0": [0, 4]}))
    averaged = AVERAGE[how](one.state_dict(), other.state_dict())
    if load == "accept":
        surgery.accept(target)
    before = snapshot(target)
    with pytest.raises(RuntimeError, match="averaged"):
        surgery.restore(target, averaged) if load == "restore" else target.load_state_dict(averaged)
    if load != "plain":
        assert_untouched(before, target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32])
def test_a_structure_that_was_cast_is_refused_by_a_fresh_model(dtype: torch.dtype):
    fresh, model = mlp(), operated(mlp())
    before = snapshot(fresh)
    with pytest.raises(surgery.StateError, match=rf"the bank at '0.composite' is {dtype}.*cast or averaged"):
        surgery.restore(fresh, {name: value.to(dtype) for name, value in model.state_dict().items()})
    assert_untouched(before, fresh)


def test_a_newer_version_is_named():
    model = operated(mlp())
    state = model.state_dict()
    state["0.composite._extra_state"][1] = 4
    fresh, accepts = mlp(), accepting()
    for load in (lambda: surgery.restore(fresh, state), lambda: accepts.load_state_dict(state)):
        with pytest.raises(surgery.StateError, match=r"has format 4.*reads format 3: a newer version wrote it; update"):
            load()
    with pytest.raises(RuntimeError, match=r"has format 4.*reads format 3: a newer version wrote it; update"):
        model.load_state_dict(state)


class OwnComposite(nn.Module):
    """A user's child that is called as banks are, with a state of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out, self.composite = nn.Linear(4, 6), nn.Linear(6, 2), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.composite(F.relu(self.fc(x))))
        return y


def test_a_users_own_module_of_that_name_is_no_bank():
    model = operated(OwnComposite())
    for fresh in (OwnComposite(), accepting(OwnComposite)):
        if fresh._load_state_dict_pre_hooks:
            fresh.load_state_dict(model.state_dict())
        else:
            surgery.restore(fresh, model.state_dict())
        assert as_bits(fresh.state_dict()) == as_bits(model.state_dict())
        assert torch.equal(fresh.eval()(x()), model.eval()(x()))
