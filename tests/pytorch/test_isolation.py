"""A forward that is traced leaves nothing behind: what it prints, changes or registers is refused and put back."""

from __future__ import annotations

import collections
import copy
import functools
import io
import itertools
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronsurgery import surgery

COUNTER = 0
SEEN: list[Any] = []
BY_NAME: dict[str, Any] = {"nested": []}
KINDS: set[str] = set()
RECENT: collections.deque[int] = collections.deque(maxlen=3)
STATE = SimpleNamespace(calls=0, log=[])
STATISTICS = np.zeros(3)
NUMPY_RANDOM = np.random.default_rng(0)
PYTHON_RANDOM = random.Random(0)
TORCH_RANDOM = torch.Generator().manual_seed(0)
NUMBERS = itertools.count()
LOG = io.StringIO()
LOGGER = logging.getLogger(__name__)


class Net(nn.Module):
    """One hidden layer; what it does beside computing is given to it as a function of a module and an input."""

    calls = 0
    count: Tensor
    kept: list[Any] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("count", torch.zeros(()))

    def act(self, x: Tensor) -> None:
        """What the forward does beside computing."""

    def forward(self, x: Tensor) -> Any:
        self.act(x)
        return self.out(F.relu(self.fc(x)))


def net(act: Callable[[Any, Tensor], Any]) -> type[Net]:
    return type("Acting", (Net,), {"act": act, "__module__": __name__})


def counts_globally(self, x):
    global COUNTER
    COUNTER += 1


def makes_a_global(self, x):
    global FRESH
    FRESH = x  # type: ignore[name-defined]


def helper(x):
    SEEN.append(x)


@functools.lru_cache
def mask(size):
    return torch.ones(size)


def sets_in_module(self, x):
    sys.modules[__name__].COUNTER = 5  # type: ignore[attr-defined]
    return COUNTER


def swallows(self, x):
    try:
        if x.sum() > 0:
            SEEN.append(x)
    except:  # noqa: E722
        pass


def closing(value: Any) -> Callable[[Any, Tensor], Any]:
    def act(self, x):
        nonlocal value
        value = x

    return act


CLOSED: list[Any] = [0]


def closing_over_list(found: list[Any]) -> Callable[[Any, Tensor], Any]:
    def act(self, x):
        found.append(x)

    return act


def inference(self, x):
    with torch.inference_mode():
        pass


ACTS: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "print": (lambda self, x: print(x), "prints"),  # noqa: T201
    "stdout": (lambda self, x: sys.stdout.write("seen"), "writes to a standard stream"),
    "stderr": (lambda self, x: sys.stderr.writelines(["seen"]), "writes to a standard stream"),
    "logging": (lambda self, x: LOGGER.error("seen"), "logs"),
    "root logger": (lambda self, x: logging.error("seen"), "logs"),
    "file": (lambda self, x: LOG.write("seen"), "uses 'LOG'"),
    "open": (lambda self, x: open("trace_of_a_forward", "w"), "opens a file"),  # noqa: SIM115
    "environment": (lambda self, x: os.environ.update(TRACED="1"), "writes into os.environ"),
    "global": (counts_globally, "changes 'COUNTER'"),
    "fresh global": (makes_a_global, "changes 'FRESH'"),
    "list": (lambda self, x: SEEN.append(x), "changes 'SEEN'"),
    "helper": (lambda self, x: helper(x), "changes 'SEEN'"),
    "dictionary": (lambda self, x: BY_NAME.update(x=x), "changes 'BY_NAME'"),
    "nested": (lambda self, x: BY_NAME["nested"].append(x), "changes 'BY_NAME'"),
    "set": (lambda self, x: KINDS.add("seen"), "changes 'KINDS'"),
    "deque": (lambda self, x: RECENT.append(1), "changes 'RECENT'"),
    "object": (lambda self, x: setattr(STATE, "calls", 1), "changes 'STATE'"),
    "list of an object": (lambda self, x: STATE.log.append(1), "changes 'STATE'"),
    "array": (lambda self, x: STATISTICS.__setitem__(0, 1.0), "changes 'STATISTICS'"),
    "module": (sets_in_module, "changes 'COUNTER'"),
    "closure": (closing(0), "changes 'value'"),
    "list in a closure": (closing_over_list(CLOSED), "changes 'found'"),
    "attribute of a function": (lambda self, x: setattr(helper, "calls", 1), "changes 'helper'"),
    "cache of a function": (lambda self, x: mask(4), "changes 'mask'"),
    "own class": (lambda self, x: setattr(type(self), "calls", 1), "changes 'Acting'"),
    "base class": (lambda self, x: setattr(Net, "calls", Net.calls + 1), "changes 'Net'"),
    "list of a class": (lambda self, x: Net.kept.append(x), "changes 'Net.kept'"),
    "numpy generator": (lambda self, x: NUMPY_RANDOM.normal(), "changes 'NUMPY_RANDOM'"),
    "python generator": (lambda self, x: PYTHON_RANDOM.random(), "changes 'PYTHON_RANDOM'"),
    "torch generator": (lambda self, x: TORCH_RANDOM.manual_seed(3), "changes 'TORCH_RANDOM'"),
    "iterator": (lambda self, x: next(NUMBERS), "uses 'NUMBERS'"),
    "python random": (lambda self, x: random.random(), "draws random numbers"),
    "numpy random": (lambda self, x: np.random.rand(), "draws random numbers"),
    "seed": (lambda self, x: torch.manual_seed(5), "seeds a random number generator"),
    "seed unseen": (lambda self, x: torch.default_generator.manual_seed(5), "torch's random numbers"),
    "fork": (lambda self, x: torch.random.fork_rng().__enter__(), "seeds a random number generator"),
    "default dtype": (lambda self, x: torch.set_default_dtype(torch.float64), "set_default_dtype"),
    "default dtype unseen": (lambda self, x: torch._C._set_default_dtype(torch.float64), "changes the default dtype"),
    "gradients": (lambda self, x: torch.set_grad_enabled(False), "switches gradients on or off"),
    "inference": (inference, "opens an inference_mode block"),
    "hook": (lambda self, x: self.fc.register_forward_hook(lambda *_: None), "hooks"),
    "hook of itself": (lambda self, x: self.register_forward_pre_hook(lambda *_: None), "hooks"),
    "hooks removed": (lambda self, x: self.fc._forward_hooks.clear(), "hooks"),
    "hook of all": (
        lambda self, x: nn.modules.module.register_module_forward_hook(lambda *_: None),
        "the hooks of all modules",
    ),
    "clock": (lambda self, x: __import__("time").time(), "asks for the time"),
    "swallowed": (swallows, "control flow on tensor values"),
}


def surroundings() -> list[Any]:
    """Everything that the acts above would change."""
    return [
        *(COUNTER, "FRESH" in globals(), list(SEEN), copy.deepcopy(BY_NAME), set(KINDS), list(RECENT)),
        *(dict(vars(STATE)), list(STATE.log), STATISTICS.tolist(), list(CLOSED), vars(helper).get("calls")),
        *(mask.cache_info().currsize, vars(Net)["calls"], list(Net.kept), str(NUMBERS), os.environ.get("TRACED")),
        *(str(NUMPY_RANDOM.bit_generator.state), PYTHON_RANDOM.getstate(), TORCH_RANDOM.get_state().tolist()),
        *(random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
        *(torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        *(len(nn.modules.module._global_forward_hooks), sys.stdout, sys.stderr, print, open, warnings.filters[:]),
    ]


@pytest.mark.parametrize("name", ACTS)
def test_an_act_beside_computing_is_refused_with_its_reason_and_leaves_nothing(
    name, capfd, caplog, tmp_path, monkeypatch
):
    act, words = ACTS[name]
    monkeypatch.chdir(tmp_path)
    surgery.discover(Net())  # imports are done now
    model = net(act)()
    hooks = [dict(getattr(m, kind)) for m in model.modules() for kind in ("_forward_hooks", "_forward_pre_hooks")]
    before, classes = surroundings(), dict(vars(type(model)))
    found = surgery.discover(model)
    assert "fc" not in found and words in found.declined["fc"], found
    assert surroundings() == before
    assert dict(vars(type(model))) == classes
    assert hooks == [
        dict(getattr(m, kind)) for m in model.modules() for kind in ("_forward_hooks", "_forward_pre_hooks")
    ]
    assert capfd.readouterr() == ("", "") and not caplog.records and not list(tmp_path.iterdir())
    assert surgery.discover(model).declined == found.declined  # the first trace did not spoil the second


def test_a_handle_of_a_hook_is_not_removed_by_a_trace():
    model = Net()
    handle = model.fc.register_forward_hook(lambda module, args, output: None)
    model.__class__ = net(lambda self, x: handle.remove())
    assert "uses 'handle'" in surgery.discover(model).declined["fc"]
    assert len(model.fc._forward_hooks) == 1


def test_the_reason_names_the_line_that_acted():
    reason = surgery.discover(net(counts_globally)()).declined["fc"]
    assert "Acting.forward" in reason
    printed = surgery.discover(net(ACTS["print"][0])()).declined["fc"]
    assert f"test_isolation.py:{ACTS['print'][0].__code__.co_firstlineno})" in printed


class Raises(Net):
    """Fails after it has changed something."""

    def forward(self, x: Tensor) -> Any:
        self.count.add_(1)
        SEEN.append(x)
        raise ValueError("no such thing")


def test_a_forward_that_raises_leaves_nothing():
    model, before = Raises(), surroundings()
    reason = surgery.discover(model).declined["fc"]
    assert "changes 'SEEN'" in reason or "no such thing" in reason
    assert surroundings() == before and model.count == 0


def test_a_buffer_written_in_place_is_not_written_while_traced_and_is_afterwards():
    class CountsInPlace(Net):
        def forward(self, x: Tensor) -> Any:
            torch.ops.aten.add_(self.count, 1)
            torch._foreach_add_([self.count], 1)
            self.count.data.add_(1)
            return self.out(F.relu(self.fc(x)))

    model = CountsInPlace()
    report = surgery.knife(model, surgery.Units({"fc": [0]}))
    assert report.num_units == 1 and model.count == 0
    model(torch.zeros(3, 4))
    assert model.count == 3


def test_a_warning_is_dropped_while_traced_and_declines_nothing():
    class Warns(Net):
        def forward(self, x: Tensor) -> Any:
            warnings.warn("an old argument", FutureWarning, stacklevel=2)
            return self.out(F.relu(self.fc(x)))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert "fc" in surgery.discover(Warns())
    assert not caught


class Ordinary(Net):
    """Names much of what the others change, and changes none of it."""

    def forward(self, x: Tensor) -> Any:
        LOGGER.debug("not emitted")
        scale = Net.calls + COUNTER + len(SEEN) + len(BY_NAME["nested"]) + STATE.calls + float(STATISTICS.sum())
        return self.out(F.relu(self.fc(x)) + scale + self.sample(x) * 0)

    def sample(self, x: Tensor) -> Any:
        return x.sum()

    def explore(self) -> Any:
        """Not called by the forward, so that what it uses does not matter."""
        return next(NUMBERS), LOG.write("explored")


def test_reading_globals_is_no_reason_to_decline():
    found = surgery.discover(Ordinary())
    assert "fc" in found, found.declined


def test_other_threads_print_and_log_while_a_forward_is_traced(capsys):
    import threading

    started, traced = threading.Event(), threading.Event()

    def act(self: Any, x: Tensor) -> None:
        started.set()
        traced.wait(5)

    def talk() -> None:
        started.wait(5)
        print("from another thread")  # noqa: T201
        sys.stdout.write("and another line\n")
        traced.set()

    thread = threading.Thread(target=talk)
    thread.start()
    surgery.discover(net(act)())
    thread.join()
    assert capsys.readouterr().out == "from another thread\nand another line\n"
