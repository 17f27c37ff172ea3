"""Widening: the output stays, parameters stay the same objects, and optimizers go on with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuronsurgery import surgery
from neuronsurgery.errors import EquivalenceError, OptimizerError
from neuronsurgery.pytorch import widening
from neuronsurgery.pytorch.optimizers import young_rows
from tests.optimizer_rows import EXACT, library_warnings
from tests.snapshots import assert_untouched, snapshot


class Joined(nn.Module):
    """Two streams of channels, joined with each other and, flattened, with another layer's values in front."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv1d(1, 3, 3), nn.Conv1d(1, 2, 3)
        self.skip, self.head, self.out = nn.Linear(6, 3), nn.Linear(3 + 5 * 4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        h = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1).flatten(1)
        return self.out(torch.tanh(self.head(torch.cat([self.skip(x.flatten(1)), h], 1))))


class Parameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Any:
        return torch.nn.functional.silu(x @ self.up) @ self.down


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, list[int]]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)),
        *((7, 6), {"0": [1, 4], "2": [0]}),
    ),
    "images": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(12, 2)),
        ),
        *((5, 1, 8, 8), {"0": [2], "4": [0, 1]}),
    ),
    "joined": (Joined, (5, 1, 6), {"left": [1], "head": [0, 3]}),
    "joined, the other": (Joined, (5, 1, 6), {"right": [1, 0]}),
    "parameters": (Parameters, (5, 6), {"up": [3]}),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(1, 3, 2), nn.ReLU(), nn.ConvTranspose1d(3, 2, 2)),
        *((5, 1, 4), {"0": [1]}),
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_output_stays_and_the_layers_are_wider(name: str, training: bool) -> None:
    make, shape, units = MODELS[name]
    torch.manual_seed(0)
    model, x = make().double().train(training), torch.randn(shape).double()
    parameters = dict(model.named_parameters())
    widths = {site: found.num_units for site, found in surgery.discover(model).items()}
    before = model(x)
    report = surgery.widen(model, surgery.Units(units), verify=x)
    assert report.method == "widen" and report.operated == {site: tuple(sorted(own)) for site, own in units.items()}
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert all(now is parameters[key] for key, now in model.named_parameters())
    wider = {site: found.num_units for site, found in surgery.discover(model).items()}
    assert wider == {site: width + len(units.get(site, ())) for site, width in widths.items()}
    assert report.parameters_after > report.parameters_before
    surgery.widen(model, surgery.Units(units), verify=x)  # and once more


def test_a_unit_is_split_as_on_paper() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        model[0].bias.copy_(torch.tensor([5.0, 6.0]))
        model[2].weight.copy_(torch.tensor([[7.0, 8.0]]))
    surgery.widen(model, surgery.Units({"0": [1]}))
    assert model[0].weight.tolist() == [[1.0, 2.0], [3.0, 4.0], [3.0, 4.0]]
    assert model[0].bias.tolist() == [5.0, 6.0, 6.0]
    kept, own, copied = model[2].weight[0].tolist()
    assert (kept, own + copied) == (7.0, 8.0) and own > 0 and copied > 0
    assert (model[0].out_features, model[2].in_features) == (3, 3)


def test_halves_of_a_unit_learn_different_things() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    surgery.widen(model, surgery.Units({"0": [1]}))
    model(torch.randn(9, 2)).square().mean().backward()
    gradient = model[0].weight.grad
    assert not torch.allclose(gradient[1] / gradient[1].norm(), gradient[2] / gradient[2].norm(), atol=1e-3)


ELEMENTWISE = [name for name in EXACT if "," not in name and "(" not in name]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.situation("Optimizers", f"{n}, widened", "works")) for n in ELEMENTWISE]
)
def test_old_weights_are_stepped_as_before_and_new_ones_as_fresh(name: str) -> None:
    with library_warnings():
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        untouched = copy.deepcopy(model)
        optimizer, beside = EXACT[name](list(model.parameters())), EXACT[name](list(untouched.parameters()))
        for seed in range(20):
            _step(optimizer, model, seed)
            _step(beside, untouched, seed)
        surgery.widen(model, surgery.Units({"0": [1]}), optimizer=optimizer)
        with torch.no_grad():  # the shared column alone is another weight now
            untouched[2].weight[:, 1] = model[2].weight[:, 1]
        fresh = copy.deepcopy(model)
        twin = EXACT[name](list(fresh.parameters()))
        is_averaged = "ScheduleFree" in name
        for seed in range(20, 32):
            for each, net in ((optimizer, model), (twin, fresh), (beside, untouched)):
                _step(each, net, seed)
        torch.testing.assert_close(model[0].weight[4], fresh[0].weight[4], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(model[2].weight[:, 4], fresh[2].weight[:, 4], rtol=1e-4, atol=2e-5)
        assert torch.equal(model[0].weight[:4], untouched[0].weight)
        kept = [0, 2, 3] if is_averaged else [0, 1, 2, 3]
        torch.testing.assert_close(model[2].weight[:, kept], untouched[2].weight[:, kept], rtol=1e-6, atol=1e-6)


def _step(optimizer: Any, model: nn.Module, seed: int) -> None:
    """Gradients that are the same for weights that both of two networks have."""
    for place, parameter in enumerate(model.parameters()):
        noise = 0.1 * torch.randn(6, 6, generator=torch.Generator().manual_seed(100 * seed + place))
        parameter.grad = noise[: parameter.shape[0], : parameter.shape[1]].clone() if parameter.dim() == 2 else None
        if parameter.dim() == 1:
            parameter.grad = noise[0, : parameter.shape[0]].clone()
    optimizer.step()


def test_weights_that_were_young_before_are_the_same_ones_afterwards() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters())
    _step(optimizer, model, 0)
    surgery.redo(model, surgery.Units({"0": [3]}), optimizer=optimizer)
    _step(optimizer, model, 1)
    surgery.widen(model, surgery.Units({"0": [3]}), optimizer=optimizer)
    # Column 3 of the head was young since step 1; column 4, new at step 2, follows it in each row of 5.
    assert young_rows(optimizer)[model[2].weight] == {3: 1, 4: 2, 8: 1, 9: 2}
    assert young_rows(optimizer)[model[0].bias] == {3: 1, 4: 2}


class Viewed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = nn.Conv2d(1, 2, 3), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.relu(self.one(x)).view(-1, 8))


DECLINED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "a norm over units": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2)),
        *("0", "more of them would move those"),
    ),
    "a norm behind": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        *("0", "has numbers of its own for each unit"),
    ),
    "a size in the code": (Viewed, "one", "the code on the way to 'head' says how many entries there are"),
    "groups": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 1, groups=2), nn.ReLU(), nn.Conv1d(4, 2, 1)),
        *("0", "in groups of equal size"),
    ),
    "a shared consumer": (Joined, "right", "its consumer 'head' also reads 'left', which was widened"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_cannot_grow_is_declined_with_the_reason(name: str) -> None:
    make, site, reason = DECLINED[name]
    model = make()
    report = surgery.widen(model, surgery.Random(0.5))
    assert site not in report.operated and reason in report.declined[site]


def test_a_fault_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = torch.optim.Adam(model.parameters())
    for seed in range(2):
        _step(optimizer, model, seed)
    surgery.redo(model, surgery.Units({"0": [3], "2": [0]}), optimizer=optimizer)
    x = torch.randn(50, 3)
    before = snapshot(model, [optimizer])
    monkeypatch.setattr(widening.Split, "shared", lambda self, consumer, split, new: iter(()))  # both keep all of it
    with pytest.raises(EquivalenceError):
        surgery.widen(model, surgery.Units({"0": [1], "2": [1]}), optimizer=optimizer, verify=x)
    assert_untouched(before, model, [optimizer], None, "verify")


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.Muon])
def test_optimizers_whose_state_cannot_grow_are_refused(make: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    optimizer = make(model.parameters())
    _step(optimizer, model, 0)
    before = snapshot(model, [optimizer])
    with pytest.raises(OptimizerError, match=make.__name__):
        surgery.widen(model, surgery.Units({"0": [1]}), optimizer=optimizer)
    assert_untouched(before, model, [optimizer], None, "refused")


def test_training_goes_on_while_a_loss_of_before_is_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = torch.optim.Adam(model.parameters())
    kept = []
    for step in range(4):
        optimizer.zero_grad()
        loss = model(torch.randn(5, 4)).square().mean()
        loss.backward()
        optimizer.step()
        kept.append(loss)
        if step % 2:
            report = surgery.widen(model, surgery.Units({"0": [step % 3]}), optimizer=optimizer)
            assert report.num_units == 1
    assert model[0].weight.shape == (5, 4)
    assert model[2].weight.grad is not None and model[2].weight.grad.shape == (2, 5)


def test_a_widening_that_is_taken_back_leaves_training_going_while_a_loss_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    loss = model(torch.randn(5, 4)).square().mean()
    loss.backward()
    with monkeypatch.context() as patch:
        patch.setattr("neuronsurgery.pytorch.checking.tolerance", lambda dtype: -1.0)
        with pytest.raises(EquivalenceError):
            surgery.widen(model, surgery.Units({"0": [1]}), verify=torch.randn(5, 4))
    assert model[0].weight.shape == (3, 4)
    model(torch.randn(5, 4)).square().mean().backward()
    assert loss.isfinite()
