"""Restoring gives a model the weights and the structure that were saved, and nothing at all where they do not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neuronsurgery import surgery
from neuronsurgery.pytorch import transaction
from tests.assertions import assert_same_output, outcome
from tests.snapshots import assert_untouched, snapshot
from tests.state_subjects import as_bits, assert_same_model, operated, overwritten
from tests.strategies import Network, networks, unit_sets
from tests.subjects import MODELS
from tests.zoo import ZOO, Animal, mlp

CHECKPOINTS = "Checkpoints and copies"


def restored(fresh: nn.Module, trained: nn.Module) -> nn.Module:
    surgery.restore(fresh, trained.state_dict())
    return fresh


def x() -> Tensor:
    return torch.linspace(-1.0, 1.0, 20).view(5, 4)


# -- whatever was operated on ----------------------------------------------------------------------------------------


@pytest.mark.situation(CHECKPOINTS, "a state dict onto a fresh model", "works")
@pytest.mark.parametrize("animal", [a for a in ZOO if a.sites], ids=str)
def test_a_fresh_model_gets_the_saved_weights_and_structure(animal: Animal):
    torch.manual_seed(0)
    model, fresh, batch = animal.build().eval(), animal.build().eval(), animal.batch()
    operated(model)
    assert_same_model(restored(fresh, model), model, batch)


@settings(max_examples=25)
@given(st.data(), networks())
def test_any_network_is_restored_bit_for_bit(data: st.DataObject, network: Network):
    fresh = overwritten(network.model)
    for _ in range(data.draw(st.integers(1, 2))):
        surgery.knife(network.model, surgery.Units(data.draw(unit_sets(network))))
    surgery.restore(fresh, network.model.state_dict())
    assert as_bits(fresh.state_dict()) == as_bits(network.model.state_dict())
    assert_same_output(outcome(fresh, network.inputs), outcome(network.model, network.inputs), 0.0)


@pytest.mark.slow
@settings(max_examples=300)
@given(st.data(), networks())
def test_any_network_is_restored_bit_for_bit_with_many_examples(data: st.DataObject, network: Network):
    fresh = overwritten(network.model)
    for _ in range(data.draw(st.integers(1, 3))):
        surgery.knife(network.model, surgery.Units(data.draw(unit_sets(network))))
    surgery.restore(fresh, network.model.state_dict())
    assert as_bits(fresh.state_dict()) == as_bits(network.model.state_dict())
    assert_same_output(outcome(fresh, network.inputs), outcome(network.model, network.inputs), 0.0)


@pytest.mark.situation(CHECKPOINTS, "a frozen target network from its own state dict", "works")
# A frozen layer whose weight is computed is no place: its own parameters cannot be told from others'.
@pytest.mark.parametrize("animal", [a for a in ZOO if a.sites and str(a) != "computed weights"], ids=str)
def test_a_frozen_target_gets_the_saved_structure_and_stays_frozen(animal: Animal):
    torch.manual_seed(0)
    model, target, batch = animal.build().eval(), animal.build().eval().requires_grad_(False), animal.batch()
    operated(model)
    restored(target, model)
    assert as_bits(target.state_dict()) == as_bits(model.state_dict())
    assert surgery.composites(target) == surgery.composites(model)
    # not bit for bit: without gradients torch runs attention by a fast path of its own
    assert_same_output(outcome(target, batch), outcome(model, batch), 1e-6)
    assert not any(parameter.requires_grad for parameter in target.parameters())


def test_a_frozen_target_that_cannot_take_the_structure_stays_frozen():
    model, target = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), nn.Sequential(nn.Linear(4, 6))
    surgery.knife(model, surgery.Units({"0": [1]}))
    with pytest.raises(surgery.StateError, match="is no site of this model"):
        surgery.restore(target.requires_grad_(False), model.state_dict())
    assert not any(parameter.requires_grad for parameter in target.parameters())


def test_a_site_that_was_forced_by_name_is_restored_without_naming_it():
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Tanh())

    model = build()
    assert "2" in surgery.discover(model).declined
    surgery.knife(model, surgery.Units({"2": [1]}))
    assert_same_model(restored(build(), model), model, (x(),))


def test_running_statistics_of_frozen_rows_are_restored_and_go_on_moving():
    model, x = MODELS["conv"][0](), torch.randn(8, 1, 2, 2)
    surgery.knife(model, surgery.Units({"0": [1, 2]}))
    model(x)
    fresh = restored(MODELS["conv"][0](), model)
    for each in (model, fresh):
        each(x * 3)
    assert as_bits(fresh.state_dict()) == as_bits(model.state_dict())


class TwoTied(nn.Module):
    """Two layers with one weight: the bank hangs at both, and is saved under both names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.two.weight, self.two.bias = self.one.weight, self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(F.relu(self.two(F.relu(self.one(x)))))
        return y


def test_one_bank_for_tied_weights_is_restored_as_one():
    model = operated(TwoTied())
    fresh: Any = restored(TwoTied(), model)
    assert fresh.one.composite is fresh.two.composite
    assert_same_model(fresh, model, (x(),))


def test_banks_of_weights_that_are_tied_only_here_are_refused_if_they_differ():
    untied: Any = TwoTied()
    untied.two = nn.Linear(4, 4)
    surgery.knife(untied, surgery.Units({"one": [0], "two": [1]}))
    fresh = TwoTied()
    before = snapshot(fresh)
    with pytest.raises(surgery.StateError, match=r"'one.composite' and 'two.composite' differ.*tied"):
        surgery.restore(fresh, untied.state_dict())
    assert_untouched(before, fresh)


# -- onto models of another kind -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "earlier",
    [
        pytest.param(lambda m: None, id="none"),
        pytest.param(lambda m: surgery.knife(m, surgery.Units({"0": [4]})), id="another unit"),
        pytest.param(lambda m: surgery.knife(m, surgery.Units({"2": [0, 1, 2, 3, 4]})), id="another site"),
        pytest.param(lambda m: [operated(m, 4), operated(m, 4)], id="more rows"),
        pytest.param(lambda m: surgery.knife(m, surgery.Units({"0": [0, 3]})), id="the same"),
    ],
)
def test_the_structure_that_was_there_is_replaced(earlier: Callable[[nn.Module], Any]):
    model, other = mlp(), mlp()
    surgery.knife(model, surgery.Units({"0": [0, 3]}))
    model(x()).sum().backward()
    earlier(other)
    parameters = list(other.parameters())
    assert_same_model(restored(other, model), model, (x(),))
    assert all(a is b for a, b in zip(parameters, other.parameters(), strict=True))


def test_a_state_without_banks_gives_a_model_without():
    model, plain = operated(mlp()), mlp()
    assert surgery.restore(model, plain.state_dict()).num_units == 0
    assert [type(m) for m in model.modules()] == [type(m) for m in mlp().modules()]
    assert_same_model(model, plain, (x(),))


@pytest.mark.situation(CHECKPOINTS, "a state dict with the prefix of a wrapper (DDP, torch.compile)", "works")
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_wrappers_are_taken_off(prefix: str):
    model = operated(mlp())
    fresh = mlp()
    surgery.restore(fresh, {f"{prefix}{name}": value for name, value in model.state_dict().items()})
    assert_same_model(fresh, model, (x(),))


def test_compiled_models_and_parts_are_restored_from_uncompiled_ones_and_back():
    def partly() -> Any:
        model: Any = nn.Sequential(mlp(), nn.Linear(2, 2))
        model[0] = torch.compile(model[0], backend="eager")
        return model

    plain = nn.Sequential(mlp(), nn.Linear(2, 2))
    operated(plain)
    inside = partly()
    surgery.restore(inside, plain.state_dict())
    assert torch.equal(inside(x()), plain(x()))
    assert any("_orig_mod.0.composite" in name for name in inside.state_dict())
    back = nn.Sequential(mlp(), nn.Linear(2, 2))
    surgery.restore(back, inside.state_dict())
    assert_same_model(back, plain, (x(),))
    whole = torch.compile(nn.Sequential(mlp(), nn.Linear(2, 2)), backend="eager")
    surgery.restore(whole, inside.state_dict())
    assert torch.allclose(whole(x()), inside(x()), atol=1e-6)


def test_a_part_is_restored_by_its_prefix():
    model = operated(mlp())
    state = {f"net.{name}": value for name, value in model.state_dict().items()} | {"step": torch.tensor(3)}
    fresh = mlp()
    surgery.restore(fresh, state, prefix="net.")
    assert_same_model(fresh, model, (x(),))
    with pytest.raises(surgery.StateError, match=r"begins with prefix='model.': known: 'net.', 'step.'"):
        surgery.restore(fresh, state, prefix="model.")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_banks_take_the_dtype_of_the_model(dtype: torch.dtype):
    model = operated(mlp())
    fresh = mlp().to(dtype)
    surgery.restore(fresh, model.state_dict())
    tensors = [v for name, v in fresh.state_dict().items() if "_extra_state" not in name]
    assert {value.dtype for value in tensors} == {dtype}
    assert as_bits(fresh.state_dict()) == as_bits(copy.deepcopy(model).to(dtype).state_dict())
    assert torch.equal(fresh(x().to(dtype)), copy.deepcopy(model).to(dtype)(x().to(dtype)))


@pytest.mark.situation(CHECKPOINTS, "a model on the meta device", "works")
@pytest.mark.parametrize("build", [mlp, TwoTied, MODELS["conv"][0], MODELS["functional"][0]])
def test_a_model_on_the_meta_device_gets_the_saved_tensors(build: Callable[[], nn.Module]):
    model = operated(build()).eval()
    with torch.device("meta"):
        empty = build().eval()
    surgery.restore(empty, model.state_dict())
    batch = torch.randn(3, 1, 2, 2) if build is MODELS["conv"][0] else x()
    assert len(list(empty.parameters())) == len(list(model.parameters())), "ties last"
    assert_same_model(empty, copy.deepcopy(model), (batch,))


def test_an_optimizer_of_a_model_on_the_meta_device_is_refused():
    with torch.device("meta"):
        empty = mlp()
    with pytest.raises(surgery.OptimizerError, match=r"build the optimizer, then surgery.attach"):
        surgery.restore(empty, operated(mlp()).state_dict(), torch.optim.SGD(empty.parameters(), lr=0.1))
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_a_meta_model_that_misses_weights_stays_on_the_meta_device():
    with torch.device("meta"):
        empty = mlp()
    state = operated(mlp()).state_dict()
    del state["4.bias"]
    before = snapshot_of_meta(empty)
    with pytest.raises((surgery.StateError, RuntimeError), match="4"):
        surgery.restore(empty, state)
    assert before == snapshot_of_meta(empty)


def snapshot_of_meta(model: nn.Module) -> list[Any]:
    return [(name, id(p), p.is_meta) for name, p in model.named_parameters()] + [type(m) for m in model.modules()]


# -- all or nothing --------------------------------------------------------------------------------------------------


class Fault(RuntimeError):
    """What the tests inject."""


@contextmanager
def failing_after(count: int) -> Iterator[None]:
    """Let restoring fail after so many changes."""
    made = 0

    def apply(self: transaction.Later) -> None:
        nonlocal made
        for change in self.plan():
            self.begun.append(change)
            change.apply()
            made += not isinstance(change, transaction.Later)
            if made == count:
                raise Fault

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transaction.Later, "apply", apply)
        yield


@pytest.mark.parametrize("name", ["sequential", "functional", "shared", "conv", "prelu"])
@pytest.mark.parametrize("is_operated", [False, True], ids=["onto a fresh model", "onto an operated one"])
def test_a_fault_after_any_change_leaves_the_model_as_it_was(name: str, is_operated: bool):
    make, sites = MODELS[name]
    model, fresh = operated(make()), make()
    if is_operated:
        surgery.knife(fresh, surgery.Units({sites[0]: [3]}))
    for net in (model, fresh):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        if net is model or is_operated:
            surgery.knife(net, surgery.Units({sites[0]: [5]}), optimizer=optimizer)
    before = snapshot(fresh, [optimizer])
    struck = 0
    with pytest.raises(IndexError):  # there were not so many changes: it went through
        while True:
            with failing_after(struck + 1):
                try:
                    surgery.restore(fresh, model.state_dict(), optimizer)
                except Fault:
                    struck += 1
                    assert_untouched(before, fresh, [optimizer], why=f"after change {struck}")
                else:
                    raise IndexError
    assert struck >= 4
    assert as_bits(fresh.state_dict()) == as_bits(model.state_dict())


def test_what_a_module_saves_beside_its_tensors_is_put_back():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.last, self.calls = mlp(), nn.Linear(2, 2), 1

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.net(x))
            return y

        def get_extra_state(self) -> dict[str, int]:
            return {"calls": self.calls}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.calls = state["calls"]

    model, fresh = Counting(), Counting()
    operated(model.net)
    model.calls = 7
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"last.bias"):
        surgery.restore(fresh, {name: value for name, value in state.items() if name != "last.bias"})
    assert fresh.calls == 1
    surgery.restore(fresh, state)
    assert fresh.calls == 7


def test_versions_of_modules_reach_them():
    seen: list[Any] = []

    class Versioned(nn.Linear):
        _version = 3

        def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
            seen.append(local_metadata.get("version"))
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Versioned(6, 2))

    model = build()
    surgery.knife(model, surgery.Units({"0": [1]}))
    surgery.restore(build(), model.state_dict())
    surgery.restore(build(), nn.ModuleDict({"net": model}).state_dict(), prefix="net.")
    accepting = nn.ModuleDict({"net": build()})
    surgery.accept(accepting["net"])
    accepting.load_state_dict(nn.ModuleDict({"net": model}).state_dict())
    assert set(seen) == {3} and len(seen) >= 4
