"""Rewritten forwards under compilers and exporters, new kinds of calls, and generated classes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from neuronsurgery import surgery
from tests.assertions import TOLERANCES
from tests.zoo import ZOO, ActorCritic, Animal, MultiHead, Residual, Straddle, animals, mlp


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def x() -> Tensor:
    return torch.linspace(-1.0, 1.0, 20).view(5, 4)


def total(output: Any) -> Tensor:
    parts = output.values() if isinstance(output, dict) else [output]
    return sum((part.square().sum() for part in parts), torch.zeros(()))


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "site"),
    [(mlp, "0"), (ActorCritic, "hidden"), (MultiHead, "trunk"), (Residual, "blocks.0.up"), (Straddle, "body.2")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_compiled_model_recompiles_once_at_surgery_and_never_within_capacity(build, site: str):
    model = build()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step() -> int:
        optimizer.zero_grad()
        total(compiled(x())).backward()
        optimizer.step()
        return counter.frame_count

    assert [step(), step()] == [1, 1]
    surgery.knife(compiled, surgery.Units({site: [0]}), optimizer=optimizer)
    assert [step(), step()] == [2, 2]
    (bank,) = [m for m in model.modules() if type(m).__name__ == "Composite"]
    room = len(bank.frozen_weight)
    frames = []
    for unit in (1, 0, 1):
        surgery.knife(compiled, surgery.Units({site: [unit]}), optimizer=optimizer)
        frames.append(step())
    assert len(bank.rows) == 8 == room, "the test should stay within the capacity"
    assert frames == [2, 2, 2]
    assert torch.allclose(total(compiled(x())), total(model(x())), rtol=1e-6)


def test_a_compiled_model_learns_the_same_as_an_eager_one():
    torch.manual_seed(0)
    eager = Residual()
    compiled = copy.deepcopy(eager)
    for model in (eager, compiled):
        surgery.knife(model, surgery.Units({"blocks.0.up": [0, 3]}))
    call = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for model, forward in ((eager, eager), (compiled, call)):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            total(forward(x())).backward()
            optimizer.step()
    for name, value in eager.state_dict().items():
        assert torch.allclose(value, compiled.state_dict()[name], atol=1e-6), name


def test_a_rewritten_graph_compiles_in_both_modes_and_for_optional_arguments():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out, self.scale = nn.Linear(4, 6), nn.Linear(6, 2), 2.0

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
            h = F.dropout(F.relu(self.fc(x)), 0.5, self.training) * self.scale
            if mask is not None:
                h = h * mask
            return self.out(h)

    model = Masked()
    surgery.knife(model, surgery.Units({"fc": [0, 1]}))
    model(x()), model.eval()(x()), model(x(), torch.ones(6)), model.train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert compiled(x()).shape == (5, 2)
    model.eval()
    assert torch.allclose(compiled(x()), model(x()))
    assert torch.allclose(compiled(x(), torch.arange(6.0)), model(x(), torch.arange(6.0)))


# -- export ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "animal", animals("mlp", "multi-head", "residual", "convolutions", "straddle", "GRU agent", "QMIX"), ids=str
)
def test_an_operated_model_is_exported_with_its_composites(animal: Animal):
    torch.manual_seed(0)
    model, batch = animal.build().eval(), animal.batch()
    surgery.knife(model, surgery.Units({name: [0, 1] for name in animal.sites}))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05)  # active and compensation differ, so that a lost bank shows
    exported = torch.export.export(model, batch).module()
    old, new = (torch.utils._pytree.tree_leaves(each(*batch)) for each in (model, exported))
    for a, b in zip(old, new, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


# -- new kinds of calls ------------------------------------------------------------------------------------------------


class Flexible(nn.Module):
    """Takes a mask, a state in a tuple or dictionary, numbers and words."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        state: Any = None,
        *,
        scale: float = 1.0,
        mode: str = "plain",
    ) -> Any:
        h = F.gelu(self.fc(x)) * scale
        if mask is not None:
            h = h.masked_fill(mask, 0.0)
        if isinstance(state, tuple):
            h = h + state[0] - state[1][0]
        if isinstance(state, dict):
            h = h + state["h"]
        y = self.out(h)
        return {"y": y, "h": h} if mode == "all" else (y, h) if mode == "both" else y


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "plain": ((), {}),
    "mask": ((torch.arange(6) % 2 == 0,), {}),
    "mask by keyword": ((), {"mask": torch.arange(6) % 3 == 0}),
    "tuple state": ((None, (torch.ones(6), [torch.arange(6.0)])), {}),
    "dictionary state": ((), {"state": {"h": torch.ones(6)}}),
    "number": ((), {"scale": 2}),
    "another number": ((), {"scale": -0.5}),
    "tensor for a number": ((), {"scale": torch.tensor(3.0)}),
    "word": ((), {"mode": "both"}),
    "everything": ((torch.arange(6) > 2, (torch.ones(6), [torch.ones(6)])), {"scale": 0.1, "mode": "all"}),
}


@pytest.mark.parametrize("shape", [(5, 4), (1, 4), (4,), (2, 3, 4), (0, 4)], ids=str)
def test_every_new_kind_of_call_gives_what_the_original_gives(shape: tuple[int, ...]):
    torch.manual_seed(0)
    model = Flexible()
    operated = copy.deepcopy(model)
    surgery.knife(operated, surgery.Units({"fc": [0, 2, 5]}))
    for name, (args, kwargs) in CALLS.items():
        for training in (True, False, True):
            inputs = torch.randn(shape)
            old = model.train(training)(inputs, *args, **kwargs)
            new = operated.train(training)(inputs, *args, **kwargs)
            assert type(old) is type(new), name
            for a, b in zip(*map(torch.utils._pytree.tree_leaves, (old, new)), strict=True):
                assert a.shape == b.shape and torch.allclose(a, b, atol=1e-6), name


def test_a_new_kind_of_call_is_traced_once():
    model = Flexible()
    surgery.knife(model, surgery.Units({"fc": [0]}))
    entry = type(model)._neuronsurgery_entries["forward"]  # type: ignore[attr-defined]
    for _ in range(3):
        for args, kwargs in CALLS.values():
            model(x(), *args, **kwargs)
    assert sum(map(len, entry.graphs.values())) <= len(CALLS)


def test_wrong_arguments_raise_what_the_original_raises():
    model = Flexible()
    messages = []
    for _ in range(2):
        with pytest.raises(TypeError) as raised:
            model(x(), nonsense=1)
        messages.append(str(raised.value).rpartition(".")[2])
        surgery.knife(model, surgery.Units({"fc": [0]}))
    assert messages[0] == messages[1]


# -- generated classes -------------------------------------------------------------------------------------------------


def test_the_same_program_gives_the_same_class_and_undo_the_original():
    first, second = ActorCritic(), ActorCritic()
    reports = [surgery.knife(model, surgery.Units({"hidden": [0]})) for model in (first, second)]
    assert type(first) is type(second) is not ActorCritic and issubclass(type(first), ActorCritic)
    cls = type(first)
    surgery.knife(first, surgery.Units({"hidden": [1]}))
    assert type(first) is cls
    surgery.undo(second, reports[1])
    assert type(second) is ActorCritic and list(second.state_dict()) == list(ActorCritic().state_dict())


@pytest.mark.parametrize("animal", [a for a in ZOO if a.sites], ids=str)
def test_undo_gives_back_classes_keys_and_output(animal: Animal):
    torch.manual_seed(0)
    model, batch = animal.build().eval(), animal.batch()
    before = [type(m) for m in model.modules()], list(model.state_dict())
    old = torch.utils._pytree.tree_leaves(model(*batch))
    report = surgery.knife(model, surgery.Units({name: [1] for name in animal.sites}))
    surgery.undo(model, report)
    assert before == ([type(m) for m in model.modules()], list(model.state_dict()))
    for a, b in zip(old, torch.utils._pytree.tree_leaves(model(*batch)), strict=True):
        assert torch.equal(a, b)


def test_defaults_and_annotations_survive_in_the_signature():
    model = Flexible()
    signature = inspect.signature(model.forward)
    surgery.knife(model, surgery.Units({"fc": [0]}))
    assert inspect.signature(model.forward) == signature
    assert type(model).forward.__doc__ == Flexible.forward.__doc__
    assert model.forward.__name__ == "forward" and type(model).__qualname__ == Flexible.__qualname__


class Slotted(nn.Module):
    """A class with its own __getattr__, __setattr__ and __reduce__ helpers, as framework base classes have."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 6), nn.Linear(6, 2)
        self.extra = {"a": 1}

    def __getattr__(self, name: str) -> Any:
        if name == "alias":
            return self.fc
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "stamp": "saved"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        assert state.pop("stamp") == "saved"
        self.__dict__.update(state)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.relu(self.alias(x)))


def test_a_class_with_its_own_attribute_and_pickle_protocol_keeps_it():
    import pickle

    model = Slotted()
    before = model(x())
    surgery.knife(model, surgery.Units({"fc": [0, 1]}), verify=x())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model) and "stamp" not in vars(copied)
        assert torch.allclose(copied(x()), before, atol=TOLERANCES[torch.float32])


def test_a_second_operation_on_another_layer_of_one_scope_keeps_the_first():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Any:
            return self.c(F.relu(self.b(F.relu(self.a(x)))))

    model = Two()
    before = model(x())
    first = surgery.knife(model, surgery.Units({"a": [0]}), verify=x())
    second = surgery.knife(model, surgery.Units({"b": [1]}), verify=x())
    assert torch.allclose(model(x()), before, atol=1e-6)
    surgery.undo(model, first)
    assert torch.allclose(model(x()), before, atol=1e-6)
    surgery.undo(model, second)
    assert type(model) is Two and torch.equal(model(x()), before)
