"""State dicts that are damaged in any way are refused by name, and leave the model as it was."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from neuronsurgery import surgery
from neuronsurgery.pytorch.composites import Composite
from tests.snapshots import assert_untouched, bits, snapshot
from tests.state_subjects import operated
from tests.subjects import MODELS
from tests.zoo import mlp

CHECKPOINTS = "Checkpoints and copies"
State = dict[str, Any]
BUILD: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, **{name: make for name, (make, _) in MODELS.items()}}
ENTRIES = ("frozen_weight", "frozen_bias", "_extra_state", "frozen_path_0", "running_path_2")


def banks(state: State) -> list[str]:
    return [key.removesuffix("._extra_state") for key in state if key.endswith("composite._extra_state")]


def bank_keys(state: State) -> list[str]:
    return [key for key in state if key.rpartition(".")[0] in banks(state)]


# -- damage: changes a state dict in place and returns words that the error has to hold --------------------------------

Damage = Callable[[st.DataObject, State], str]


def missing(data: st.DataObject, state: State) -> str:
    key = data.draw(st.sampled_from([key for key in state if "num_batches" not in key]))
    del state[key]
    return key.rpartition(".")[2]


def extra(data: st.DataObject, state: State) -> str:
    bank = data.draw(st.sampled_from(banks(state)))
    key = data.draw(st.sampled_from(["unknown", "9.weight", f"{bank}.frozen_scale", f"{bank}.frozen_path_7"]))
    state[key] = torch.ones(2)
    return key.rpartition(".")[2]


def truncated(data: st.DataObject, state: State) -> str:
    key = data.draw(st.sampled_from([key for key, value in state.items() if value.dim() and len(value) > 1]))
    state[key] = state[key][: data.draw(st.integers(0, 1))]
    return key.removesuffix("._extra_state").rpartition(".")[2] if "_extra_state" not in key else "structure"


def padded(data: st.DataObject, state: State) -> str:
    key = data.draw(st.sampled_from([key for key in bank_keys(state) if "_extra_state" in key]))
    state[key] = torch.cat([state[key], state[key][-3:]])
    return "was cut or padded"


def wrong_dtype(data: st.DataObject, state: State) -> str:
    key = data.draw(st.sampled_from([key for key in state if key.endswith("_extra_state")]))
    dtype = data.draw(st.sampled_from([torch.int32, torch.float16, torch.bfloat16, torch.complex64, torch.bool]))
    state[key] = state[key].to(dtype)
    return "structure"


def wrong_shape(data: st.DataObject, state: State) -> str:
    key = data.draw(st.sampled_from([key for key, value in state.items() if value.dim() and "_extra" not in key]))
    state[key] = torch.cat([state[key].unsqueeze(-1)] * 2, -1)
    return key.rpartition(".")[2]


def not_finite_structure(data: st.DataObject, state: State) -> str:
    key = data.draw(st.sampled_from([key for key in state if key.endswith("_extra_state")]))
    state[key] = state[key].double() * data.draw(st.sampled_from([torch.nan, torch.inf, 0.0, -1.0, 1.01]))
    return "structure"


def swapped(data: st.DataObject, state: State) -> str:
    first, second = data.draw(st.permutations(banks(state)))[:2]
    for name in ENTRIES:
        one, other = f"{first}.{name}", f"{second}.{name}"
        held = {one: state.pop(other, None), other: state.pop(one, None)}
        state.update({key: value for key, value in held.items() if value is not None})
    return "bank"


def of_another_layer(data: st.DataObject, state: State) -> str:
    bank = data.draw(st.sampled_from(banks(state)))
    head = data.draw(st.sampled_from([key for key in state if key.endswith("weight") and key.count(".") < 2]))
    owner = f"{head.rpartition('.')[0]}.weight_composite"  # a layer's bank is no parameter's
    state.update({f"{owner}.{name}": state[f"{bank}.{name}"] for name in ENTRIES[:3] if f"{bank}.{name}" in state})
    return "weight_composite"


def newer(data: st.DataObject, state: State) -> str:
    key = data.draw(st.sampled_from([key for key in state if key.endswith("_extra_state")]))
    state[key] = state[key].clone()
    state[key][1] += data.draw(st.integers(1, 99))
    return "newer version"


def corrupt(data: st.DataObject, state: State) -> str:
    """One number of the head, or a sign or a unit, is another one."""
    key = data.draw(st.sampled_from([key for key in state if key.endswith("_extra_state")]))
    table = state[key].clone()
    num_rows, num_columns = int(table[3]), int(table[4])
    rows = [5 + num_columns + row * (4 + num_columns) + column for row in range(num_rows) for column in (0, 1)]
    place = data.draw(st.sampled_from([0, 2, 3, 4, *rows]))
    table[place] += data.draw(st.sampled_from([-(2**40), -17, -2, -1, 1, 2, 17, 2**40]))
    state[key] = table
    return "bank"


def no_tensor(data: st.DataObject, state: State) -> str:
    key = data.draw(st.sampled_from(list(state)))
    state[key] = data.draw(st.sampled_from([None, 3, "text", [1.0], {"a": 1}]))
    return key.rpartition(".")[2] if "_extra" not in key else "structure"


DAMAGE: dict[str, Damage] = {
    damage.__name__.replace("_", " "): damage
    for damage in (
        missing, extra, truncated, padded, wrong_dtype, wrong_shape, not_finite_structure, swapped, of_another_layer,
        newer, corrupt, no_tensor,
    )
}  # fmt: skip


@functools.cache
def intact(name: str) -> State:
    torch.manual_seed(3)
    return operated(BUILD[name]()).state_dict()


def damaged(data: st.DataObject, how: str, name: str) -> tuple[State, str]:
    state = dict(intact(name))
    return state, DAMAGE[how](data, state)


UNTIED = tuple(name for name in BUILD if name != "shared")  # of two names for one tensor, either may be missing
NAMES = {
    "missing": UNTIED,
    "swapped": ("mlp", "sequential", "conv"),
    "of another layer": ("mlp", "sequential", "prelu"),
}
CASES = [
    pytest.param(how, marks=pytest.mark.situation(CHECKPOINTS, f"a damaged state dict: {how}", "refused"), id=how)
    for how in DAMAGE
]


# -- how it is met ---------------------------------------------------------------------------------------------------


def assert_refused_whole(how: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES.get(how, tuple(BUILD))))
    state, words = damaged(data, how, name)
    fresh, accepts = BUILD[name](), BUILD[name]()
    if data.draw(st.booleans()):
        operated(fresh, 1)
    surgery.accept(accepts)
    for model, load in ((fresh, functools.partial(surgery.restore, fresh)), (accepts, accepts.load_state_dict)):
        before = snapshot(model)
        with pytest.raises((surgery.SurgeryError, RuntimeError)) as refused:
            load(state)
        assert words in str(refused.value), (words, str(refused.value))
        assert_untouched(before, model, why=how)


@settings(max_examples=4, phases=[Phase.generate])
@pytest.mark.parametrize("how", CASES)
@given(st.data())
def test_a_damaged_state_is_refused_and_leaves_the_model_untouched(how: str, data: st.DataObject):
    assert_refused_whole(how, data)


@pytest.mark.slow
@settings(max_examples=60, phases=[Phase.generate])
@pytest.mark.parametrize("how", CASES)
@given(st.data())
def test_a_damaged_state_is_refused_with_many_examples(how: str, data: st.DataObject):
    assert_refused_whole(how, data)


@settings(max_examples=4, phases=[Phase.generate])
@pytest.mark.parametrize("how", list(DAMAGE))
@given(st.data())
def test_torchs_own_load_refuses_a_damaged_state_and_leaves_each_bank_whole(how: str, data: st.DataObject):
    """torch copies weights that fit before it raises; a bank is either the old one or the saved one."""
    name = data.draw(st.sampled_from([name for name in NAMES.get(how, tuple(BUILD)) if name != "shared"]))
    state, words = damaged(data, how, name)
    model = operated(BUILD[name]())
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    old = whole_banks(model)
    saved = {bank: {e: v for e in ENTRIES if (v := state.get(f"{bank}.{e}")) is not None} for bank in old}
    with pytest.raises((surgery.SurgeryError, RuntimeError)) as refused:
        model.load_state_dict(state)
    assert words in str(refused.value), (words, str(refused.value))
    assert classes == [type(m) for m in model.modules()] and keys == list(model.state_dict())
    for bank, entries in whole_banks(model).items():
        as_saved = {e: bits(v) for e, v in saved[bank].items() if isinstance(v, Tensor)}
        assert entries == old[bank] or all(entries[e] == as_saved.get(e, old[bank][e]) for e in entries), bank


def whole_banks(model: nn.Module) -> dict[str, dict[str, bytes]]:
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Composite):
            found[path] = {key: bits(value) for key, value in module.state_dict().items()}
    return found


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (None, "found a NoneType"),
        ([1, 2], "found a list"),
        ({1: torch.ones(2)}, "mapping from names"),
        (nn.Linear(2, 2), "found a Linear"),
        ({}, "Missing key"),
    ],
)
def test_what_is_no_state_dict_is_refused(state: Any, words: str):
    model = mlp()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=words):
        surgery.restore(model, state)
    assert_untouched(before, model)


def test_what_is_no_model_is_refused():
    with pytest.raises(surgery.ModelError, match=r"expected a torch\.nn\.Module"):
        surgery.restore({}, {})  # a state dict in the model's place
    with pytest.raises(surgery.ModelError, match=r"expected a torch\.nn\.Module"):
        surgery.accept(mlp)
