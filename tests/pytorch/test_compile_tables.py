"""The gather tables of a bank: what averages, casts, moves or copies a model leaves them as its rows demand."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from neuronsurgery import surgery

TABLES = ("order", "source", "units", "reference", "references", "own")


def operated(seed: int = 0, units: tuple[int, ...] = (0, 2)) -> nn.Sequential:
    """Two sites, one behind a norm that couples units and reads the reference."""
    torch.manual_seed(seed)
    first = [nn.Linear(4, 12), nn.LayerNorm(12), nn.ReLU()]
    model = nn.Sequential(*first, nn.Linear(12, 5), nn.GELU(), nn.Linear(5, 2))
    for _ in range(2):
        surgery.knife(model, surgery.Units({"0": units, "3": (1,)}))
    return model


def tables(model: nn.Module) -> list[Tensor | None]:
    banks = [module for module in model.modules() if type(module).__name__ == "Composite"]
    assert banks
    return [getattr(bank, name) for bank in banks for name in TABLES]


def assert_same_tables(model: nn.Module, expected: nn.Module) -> None:
    for found, wanted in zip(tables(model), tables(expected), strict=True):
        assert (found is None) == (wanted is None)
        assert found is None or wanted is None or torch.equal(found, wanted)


@pytest.fixture
def x() -> Tensor:
    return torch.linspace(-1.0, 1.0, 12).view(3, 4)


def test_no_table_is_a_buffer_or_in_a_state_dict():
    model = operated()
    held = [*model.buffers(), *(value for value in model.state_dict().values() if isinstance(value, Tensor))]
    assert not {id(table) for table in tables(model)} & set(map(id, held))
    assert all(buffer.is_floating_point() for buffer in model.buffers())


@pytest.mark.situation("Replicas", "Polyak averaging over buffers()", "works")
def test_averaging_every_buffer_with_a_twin_leaves_the_structure_as_it_was(x: Tensor):
    model, twin, untouched = operated(), operated(seed=1), operated()
    for mine, other in zip(model.buffers(), twin.buffers(), strict=True):
        mine.copy_(0.9 * mine + 0.1 * other)
    assert_same_tables(model, untouched)
    assert bool(model(x).isfinite().all())


@pytest.mark.situation("Replicas", "AveragedModel(use_buffers=True)", "works")
def test_an_averaged_model_with_buffers_keeps_the_structure_and_follows_the_online_rows(x: Tensor):
    model = operated()
    averaged = AveragedModel(model, use_buffers=True)
    for _ in range(3):
        with torch.no_grad():
            for value in (*model.parameters(), *model.buffers()):
                value.add_(0.01)
        averaged.update_parameters(model)
    assert_same_tables(averaged, model)
    assert torch.allclose(averaged(x), model(x), atol=0.1)


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def emptied(model: nn.Module) -> nn.Module:
    state = model.state_dict()
    found = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    found.load_state_dict(state)
    return found


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy.deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save of the model": saved,
    "to_empty": emptied,
    "to(dtype) and back": lambda model: copy.deepcopy(model).double().float(),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.situation("Checkpoints and copies", name, "works")) for name in COPIES],
)
def test_a_copy_has_the_tables_and_the_output_of_the_original(name: str, x: Tensor):
    model = operated()
    found = COPIES[name](model)
    assert_same_tables(found, model)
    assert torch.equal(found(x), model(x))
    surgery.knife(found, surgery.Units({"0": [5]}), verify=x)  # a table of its own, or the original would move with it
    assert_same_tables(model, operated())


def test_a_pickle_holds_the_rows_and_no_table():
    bank: Any = operated()[0].composite
    held = [bank.growing_tables, bank.fixed_tables]
    assert all(set(tables) == set(TABLES) for tables in held)
    state = pickle.dumps(bank)
    assert not any(name.encode() in state for name in ("order", "reference"))


def test_a_model_on_the_meta_device_tells_its_shapes(x: Tensor):
    model = operated().to("meta")
    assert model(x.to("meta")).shape == (3, 2)


@pytest.mark.situation("Replicas", "torch.func.functional_call", "works")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_functional_call_uses_the_tensors_it_is_given(device: str, x: Tensor):
    model = operated()
    base = copy.deepcopy(model).to(device)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert torch.equal(torch.func.functional_call(base, tensors, (x,)), model(x))
    halved = {name: value / 2 for name, value in tensors.items()}
    assert not torch.allclose(torch.func.functional_call(base, halved, (x,)), model(x))
