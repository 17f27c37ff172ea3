"""What torch.fx would bake in silently is recorded or refused: every trap, over calls that differ in what it traps."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from neuronsurgery import surgery
from neuronsurgery.pytorch.calls import Call, default_call
from neuronsurgery.pytorch.tracing import trace
from tests.assertions import state_of
from tests.traps import (
    TRAPS,
    AutocastBlock,
    BranchesOnValue,
    ClassScale,
    Configured,
    FunctionalDropout,
    Hidden,
    NoGradBlock,
    OptionalMask,
    Output,
    Property,
    Scale,
    Trap,
    plain,
    x,
)

OPERATED = surgery.Units({"fc": [0, 1, 2]})


@pytest.mark.parametrize("trap", TRAPS, ids=str)
def test_no_trap_changes_what_an_operated_or_declined_model_gives(trap: Trap):
    model = trap.build()
    operated = copy.deepcopy(model)
    found = surgery.discover(operated)
    assert ("fc" in found) is (not trap.reason), found.declined
    if "fc" in found:
        surgery.knife(operated, OPERATED)
    seen = []
    for seed, call in enumerate(trap.calls):
        results = []
        for each in (model, operated):
            torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
            results.append(call(each))
        assert_alike(*results)
        assert_alike(*(list(state_of(each).values()) for each in (model.out, operated.out)))
        assert_alike(dict(model.named_buffers()), {k: v for k, v in operated.named_buffers() if "composite" not in k})
        seen.append(results[0])
    if len(seen) > 1 and not isinstance(model, Property):
        assert not all(alike(seen[0], other) for other in seen[1:]), "the calls do not differ: the trap is not set"


def assert_alike(old: Any, new: Any) -> None:
    """The same structure, shapes and dtypes, values equal to rounding, and gradients for the same tensors."""
    assert alike(old, new), (old, new)


def alike(old: Any, new: Any) -> bool:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        same = (old.shape, old.dtype, old.requires_grad) == (new.shape, new.dtype, new.requires_grad)
        return same and torch.allclose(old, new, rtol=1e-5, atol=1e-5)
    if type(old) is not type(new):
        return False
    if isinstance(old, dict):
        return list(old) == list(new) and all(alike(old[key], new[key]) for key in old)
    if isinstance(old, (tuple, list)):
        return len(old) == len(new) and all(map(alike, old, new))
    if isinstance(old, Output):
        return alike(vars(old), vars(new))
    return bool(old == new)


def test_assert_alike_fails_on_another_value_structure_or_gradient():
    assert_alike({"a": (x(), None)}, {"a": (x(), None)})
    for other in (
        {"a": [x(), None]},
        {"a": (x() + 1e-3, None)},
        {"b": (x(), None)},
        {"a": (x().requires_grad_(), None)},
    ):
        with pytest.raises(AssertionError):
            assert_alike({"a": (x(), None)}, other)


def test_a_class_attribute_changed_after_surgery_takes_effect(monkeypatch):
    model = ClassScale()
    operated = copy.deepcopy(model)
    surgery.knife(operated, OPERATED)
    plain(operated)
    monkeypatch.setattr(ClassScale, "scale", 11.0)
    assert_alike(plain(model), plain(operated))


@pytest.mark.parametrize("trap", [trap for trap in TRAPS if trap.reason], ids=str)
def test_an_impurity_declines_the_site_and_leaves_model_and_random_states_alone(trap: Trap):
    model, words = trap.build(), trap.reason
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    contents = copy.deepcopy(getattr(model, "cache", None))
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    reason = surgery.discover(model).declined["fc"]
    assert words in reason and type(model).__name__ in reason
    assert contents == getattr(model, "cache", None)
    for path, module in model.named_modules():
        assert {k: id(v) for k, v in before[path].items()} == {k: id(v) for k, v in module.__dict__.items()}
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))


def test_a_reason_names_the_file_and_the_line():
    reason = surgery.discover(BranchesOnValue()).declined["fc"]
    line = BranchesOnValue.forward.__code__.co_firstlineno + 1
    assert reason.endswith(f"traps.py:{line})")


def test_a_reason_names_the_users_line_also_below_a_helper_and_inside_a_library():
    def helper(x: torch.Tensor) -> Any:
        return nn.functional.relu(x) if (x > 0).all() else x

    class Helps(Hidden):
        def forward(self, x):
            return self.out(F.relu(self.fc(helper(x))))

    class Library(Hidden):
        def forward(self, x):
            h = F.relu(self.fc(x))
            return self.out(h + torch.nn.utils.rnn.pad_sequence(h, batch_first=bool(x)))

    for cls, line in (
        (Helps, helper.__code__.co_firstlineno + 1),
        (Library, Library.forward.__code__.co_firstlineno + 2),
    ):
        assert surgery.discover(cls()).declined["fc"].endswith(f"test_tracing.py:{line})"), cls
    with pytest.raises(surgery.UntraceableError) as raised:
        trace(Helps(), "forward", default_call(Helps()))
    assert (raised.value.file, raised.value.line) == (__file__, helper.__code__.co_firstlineno + 1)


class Logs(Hidden):
    """Writes into a list or dictionary that the caller passes."""

    def forward(self, x, log=None):
        h = F.relu(self.fc(x))
        if isinstance(log, list):
            log.append(h)
        if isinstance(log, dict):
            log["h"] = h
        return self.out(h)


@pytest.mark.parametrize("log", [[], [1], {}, {"h": 0.0}], ids=str)
def test_a_call_that_fills_a_container_of_the_caller_is_refused(log):
    model = Logs()
    surgery.knife(model, OPERATED)
    plain(model)
    with pytest.raises(surgery.UntraceableError, match="writes into 'log'"):
        model(x(), log)


def test_a_new_kind_of_call_that_cannot_be_traced_says_so_and_what_to_do():
    class Sizes(Hidden):
        def forward(self, x, limit=None):
            if limit is not None and x.sum() > limit:
                x = x * 2
            return self.out(F.relu(self.fc(x)))

    model = Sizes()
    before = plain(model)
    surgery.knife(model, OPERATED)
    with pytest.raises(
        surgery.UntraceableError, match=r"called in a new way that cannot be traced.*Call it as before, or"
    ):
        model(x(), limit=torch.zeros(()))
    assert_alike(before, plain(model))


def test_an_argument_of_an_unknown_class_is_refused_by_name():
    model = OptionalMask()
    surgery.knife(model, OPERATED)
    with pytest.raises(surgery.UntraceableError, match="an argument of type SimpleNamespace"):
        model(x(), SimpleNamespace())


def test_nothing_in_torch_stays_patched_also_after_a_failure():
    ambient = (torch.is_grad_enabled, torch.is_autocast_enabled, torch.get_autocast_dtype)
    inside = (torch.amp.autocast_mode.autocast.__enter__, nn.Module.__call__, nn.Module.__getattr__)
    for cls in (Scale, NoGradBlock, BranchesOnValue, AutocastBlock):
        surgery.discover(cls())
    assert ambient == (torch.is_grad_enabled, torch.is_autocast_enabled, torch.get_autocast_dtype)
    assert inside == (torch.amp.autocast_mode.autocast.__enter__, nn.Module.__call__, nn.Module.__getattr__)
    assert torch.relu(torch.tensor([-1.0])).item() == 0.0


def test_tracing_reads_a_class_in_both_modes_without_switching_the_module():
    model = FunctionalDropout().eval()
    surgery.knife(model, OPERATED)
    assert not any(module.training for module in model.modules())
    model.train()
    torch.manual_seed(0)
    first = plain(model)
    torch.manual_seed(1)
    assert not alike(first, plain(model))


def test_instances_of_one_class_keep_their_own_attributes():
    models = [Scale() for _ in range(3)]
    for factor, model in enumerate(models):
        vars(model)["scale"] = float(factor)
    before = [plain(model) for model in models]
    for model in models[::-1]:
        surgery.knife(model, OPERATED)
    assert_alike(before, [plain(model) for model in models])
    assert len({type(model) for model in models}) == 1


def test_a_trace_of_the_same_call_gives_the_same_graph():
    model = Configured()
    call = default_call(model)
    assert isinstance(call, Call)
    assert str(trace(model, "forward", call).graph) == str(trace(model, "forward", call).graph)
