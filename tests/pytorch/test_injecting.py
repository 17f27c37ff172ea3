"""Plasticity injection: by hand, on every kind of head, and beside all that operated models live with."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from neuronsurgery import surgery
from neuronsurgery.errors import EquivalenceError, ModelError, SiteError


class Own(nn.Module):
    """A head with a forward of its own and a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, h: Tensor, *, scale: float = 1.0) -> Any:
        return self.out(torch.relu(self.hidden(h))) * scale


class Structured(Own):
    """A head with a structure of outputs."""

    def forward(self, h: Tensor, *, scale: float = 1.0) -> Any:
        return super().forward(h, scale=scale), {"nothing": None}


class Net(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), head
        self.is_structured = isinstance(head, (Structured, nn.GRU))

    def forward(self, x: Tensor) -> Tensor:
        found = self.head(torch.relu(self.body(x)))
        out: Tensor = found[0] if self.is_structured else found
        return out


HEADS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 2),
    "sequential": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)),
    "nested": lambda: nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(4, 6)), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)
    ),
    "own": Own,
    "structured": Structured,
    "gru": lambda: nn.GRU(4, 2, batch_first=True),
}
X = torch.randn(8, 3, generator=torch.Generator().manual_seed(5))


def trained(model: nn.Module, optimizer: optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()


def injected(kind: str) -> tuple[Any, optim.Optimizer]:
    torch.manual_seed(0)
    model: Any = Net(HEADS[kind]())
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    trained(model, optimizer)
    surgery.plasticity_injection(model, "head", optimizer=optimizer, verify=X)
    return model, optimizer


def test_injection_worked_out_by_hand() -> None:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, -1.0]])), model.bias.fill_(0.5)
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    x = torch.tensor([[3.0, 4.0]])
    surgery.plasticity_injection(model, "", optimizer=optimizer, init=nn.init.ones_)
    assert model.weight.tolist() == [[1.0, 1.0]]  # h1
    assert model(x).item() == 2.5  # 2 * 3 - 4 + 0.5, as before
    model(x).sum().backward()  # gradient of h1 alone: x and 1
    optimizer.step()
    assert model.weight.tolist() == [[-2.0, -3.0]]
    assert model.bias.tolist() == [-1.0]
    # h = 2.5; h1 = -2 * 3 - 3 * 4 - 1 = -19; h2 = 3 + 4 = 7
    assert model(x).item() == 2.5 - 19 - 7


def test_gradient_reaches_the_input_through_all_three() -> None:
    model = nn.Linear(2, 1, bias=False)
    old = model.weight.detach().clone()
    surgery.plasticity_injection(model, "", init=nn.init.ones_)
    with torch.no_grad():
        model.weight.fill_(5.0)
    x = torch.zeros(1, 2, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, old + 5 - 1)


@pytest.mark.parametrize("kind", HEADS)
def test_output_is_bit_for_bit_what_it_was_and_again_after_a_second_injection(kind: str) -> None:
    torch.manual_seed(0)
    model: Any = Net(HEADS[kind]())
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    for _ in range(2):
        trained(model, optimizer)
        before = copy.deepcopy(model)(X)
        report = surgery.plasticity_injection(model, "head", optimizer=optimizer, verify=X)
        assert torch.equal(copy.deepcopy(model)(X), before)
        assert report.verified and report.model_error == 0.0


@pytest.mark.parametrize("kind", HEADS)
def test_parameters_stay_the_same_objects_and_only_they_train(kind: str) -> None:
    torch.manual_seed(0)
    model: Any = Net(HEADS[kind]())
    before = list(model.named_parameters())
    optimizer = optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    surgery.plasticity_injection(model, "head", optimizer=optimizer)
    after = list(model.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(one is other for (_, one), (_, other) in zip(before, after, strict=True))
    model.requires_grad_(True)
    frozen = {name: value.clone() for name, value in model.named_buffers() if "running" not in name}
    trainable = {name: value.detach().clone() for name, value in model.named_parameters()}
    trained(model, optimizer)
    now = dict(model.named_buffers())
    assert frozen and all(torch.equal(now[name], value) for name, value in frozen.items() if "num_b" not in name)
    assert all(not torch.equal(value, trainable[name]) for name, value in model.named_parameters())


def test_weights_of_the_head_are_updated_as_a_fresh_models() -> None:
    model, optimizer = injected("linear")
    before = model.head.weight.detach().clone()
    trained(model, optimizer, steps=1)
    assert torch.allclose((model.head.weight - before).abs(), torch.tensor(0.01), atol=1e-4)  # Adam's first is lr


@pytest.mark.situation("Checkpoints and copies", "plasticity injection: deepcopy, pickle, torch.save", "works")
@pytest.mark.parametrize("kind", HEADS)
def test_copies_and_pickles_compute_the_same(kind: str) -> None:
    model, optimizer = injected(kind)
    trained(model, optimizer)
    expected = model.eval()(X)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    assert all(torch.equal(other(X), expected) for other in others)
    assert all(isinstance(other.head, type(HEADS[kind]())) for other in others)


@pytest.mark.situation("Checkpoints and copies", "plasticity injection: a state dict, injected first", "works")
@pytest.mark.parametrize("kind", HEADS)
def test_a_state_dict_loads_strictly_into_a_model_that_was_injected(kind: str) -> None:
    model, optimizer = injected(kind)
    trained(model, optimizer)
    resumed: Any = Net(HEADS[kind]())
    with pytest.raises(RuntimeError, match="injection"):
        resumed.load_state_dict(model.state_dict())
    surgery.plasticity_injection(resumed, "head")
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(resumed.eval()(X), model.eval()(X))


@pytest.mark.situation("Compile and export", "plasticity injection, torch.compile", "works")
@pytest.mark.parametrize("kind", ["linear", "sequential", "own", "structured"])
def test_compiled_models_compute_the_same_before_and_after(kind: str) -> None:
    torch.manual_seed(0)
    model: Any = Net(HEADS[kind]())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before = compiled(X)
    surgery.plasticity_injection(model, "head")
    assert torch.equal(compiled(X), before)
    with torch.no_grad():
        next(model.head.parameters()).fill_(3.0)
    assert torch.equal(compiled(X), model(X))
    assert not torch.equal(compiled(X), before)


@pytest.mark.parametrize("kind", ["linear", "sequential", "own"])
def test_hidden_units_before_and_inside_can_be_operated_on_afterwards(kind: str) -> None:
    model, optimizer = injected(kind)
    before = model(X)
    sites = surgery.discover(model)
    assert "body" in sites and ("head.hidden" in sites) == (kind == "own")
    report = surgery.knife(model, surgery.Units({name: [0] for name in sites}), optimizer=optimizer, verify=X)
    assert torch.allclose(model(X), before, atol=1e-6)
    copied = pickle.loads(pickle.dumps(model))
    trained(model, optimizer)
    assert torch.allclose(copied(X), before, atol=1e-6)
    assert not torch.allclose(model(X), before, atol=1e-6)
    surgery.undo(model, report, optimizer=optimizer)
    assert type(model.head).forward is not type(HEADS[kind]()).forward  # still injected


@pytest.mark.parametrize("kind", HEADS)
def test_reset_of_a_head_takes_what_was_injected_away(kind: str) -> None:
    model, optimizer = injected(kind)
    surgery.plasticity_injection(model, "head", optimizer=optimizer)
    surgery.reset(model, "head", optimizer=optimizer)
    assert not any("injection" in name for name, _ in model.named_modules())
    assert type(model.head) is type(HEADS[kind]())


def test_what_is_no_site_for_an_injection_says_so() -> None:
    model, _ = injected("sequential")
    declined = surgery.discover(model).declined
    assert declined["head.0"] == "part of a module that plasticity_injection added copies to"
    assert declined["head.0.injection.knowledge.0"] == "a frozen copy of plasticity_injection"


def test_forward_keeps_its_signature() -> None:
    model, _ = injected("own")
    assert inspect.signature(model.head.forward) == inspect.signature(Own().forward)
    h = torch.relu(model.body(X))
    assert torch.allclose(model.head(h, scale=2.0), 2 * model.head(h))


def test_a_sequential_keeps_its_children() -> None:
    model, _ = injected("sequential")
    assert len(model.head) == 3
    assert [type(each).__name__ for each in model.head] == ["Linear", "ReLU", "Linear"]


def test_hooks_of_the_user_run_once_and_see_the_sum() -> None:
    torch.manual_seed(0)
    model: Any = Net(HEADS["own"]())
    seen: list[Tensor] = []
    model.head.register_forward_hook(lambda module, args, output: seen.append(output))
    model.head.hidden.register_forward_hook(lambda module, args, output: seen.append(output))
    surgery.plasticity_injection(model, "head")
    out = model(X)
    assert len(seen) == 2 and torch.equal(seen[1], out)


def test_equal_generators_inject_equal_weights() -> None:
    heads = []
    for _ in range(2):
        torch.manual_seed(0)
        model: Any = Net(HEADS["sequential"]())
        surgery.plasticity_injection(model, "head", generator=torch.Generator().manual_seed(1))
        heads.append(model.head[0].weight)
    assert torch.equal(*heads)


class Tied(Net):
    def __init__(self) -> None:
        head = nn.Linear(4, 4)
        super().__init__(head)
        self.again = nn.Linear(4, 4)
        self.again.weight = head.weight


class Sidestepped(Net):
    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.head.weight
        return torch.nn.functional.linear(torch.relu(self.body(x)), weight)


def operated() -> Any:
    model: Any = Net(HEADS["sequential"]())
    surgery.knife(model, surgery.Units({"head.0": [1]}))
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Net(nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.1))), ModelError, "'head' holds dropout"),
        (lambda: Net(nn.LSTM(4, 2, num_layers=2, dropout=0.5)), ModelError, "'head' holds dropout"),
        (operated, ModelError, "'head' holds composite units"),
        (Tied, ModelError, "'head' shares weights with 'again'"),
        (lambda: Net(nn.ModuleList([nn.Linear(4, 2)])), ModelError, "a ModuleList without a forward"),
        (lambda: Net(nn.ReLU()), SiteError, "'head' has no parameter"),
        (lambda: Sidestepped(nn.Linear(4, 2)), EquivalenceError, "rolled back"),
    ],
)
def test_what_would_change_the_output_is_refused_and_leaves_the_model(
    make: Callable[[], Net], error: type[Exception], message: str
) -> None:
    model = make()
    before, cls = copy.deepcopy(model.state_dict()), type(model.head)
    verify: Any = X if isinstance(model, Sidestepped) else None
    with pytest.raises(error, match=message):
        surgery.plasticity_injection(model, "head", verify=verify)
    after = model.state_dict()
    assert list(after) == list(before) and type(model.head) is cls
    assert all(torch.equal(after[name], value) for name, value in before.items() if isinstance(value, Tensor))


def test_dropout_of_rate_zero_is_no_reason_to_refuse() -> None:
    model: Any = Net(nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.0)))
    assert surgery.plasticity_injection(model, "head", verify=X).model_error == 0.0
