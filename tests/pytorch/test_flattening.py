"""Flattening: banks become units of plain wider layers, the output stays; what cannot be flattened keeps its bank."""

from __future__ import annotations

import copy
import io
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import onnxruntime
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from neuronsurgery import surgery
from neuronsurgery.flattenings import Flattening
from neuronsurgery.pytorch import transaction
from neuronsurgery.pytorch.composites import Composite
from tests.pytorch.test_widening import MODELS, Joined
from tests.snapshots import assert_untouched, snapshot


class Blocks(nn.Module):
    """A layer between two that can be flattened, whose norm keeps it from that."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second, self.out = (
            *(nn.Linear(4, 6), nn.LayerNorm(5)),
            *(nn.Linear(6, 5), nn.Linear(5, 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(F.gelu(self.norm(self.second(torch.relu(self.first(x))))))
        return out


class Recurrent(nn.Module):
    """A layer that reads its own units of a time step before."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again, self.out = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.enter(x))
        for _ in range(3):
            h = torch.relu(self.again(h))
        out: Tensor = self.out(h)
        return out


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def pooled() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.AvgPool2d(2), nn.Conv2d(4, 3, 2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(12, 2)),
    )


def operated(model: nn.Module, x: Tensor, units: dict[str, list[int]], times: int = 3) -> nn.Module:
    """The model after several operations, everything that trains moved by hand in between."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(times):
        surgery.knife(model, surgery.Units(units), verify=x)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def banks(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Composite)]


Case = tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, list[int]]]
PLAIN: dict[str, Case] = {name: case for name, case in MODELS.items() if name != "images"}
PLAIN |= {
    "channels": (pooled, (5, 1, 8, 8), {"0": [1, 3], "4": [0]}),
    "both of a concatenation": (Joined, (5, 1, 6), {"left": [0, 1], "right": [1], "head": [2]}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.situation("Compile and export", "flattened: the output", "works")
def test_the_output_stays_and_no_bank_is_left(name: str, training: bool) -> None:
    make, shape, units = PLAIN[name]
    torch.manual_seed(0)
    x = torch.randn(shape).double()
    model = operated(make().double().train(training), x, units)
    plain, parameters = make(), dict(model.named_parameters())
    widths = {site: found.num_units for site, found in surgery.discover(model).items()}
    frozen = {site: len(members) for site, members in surgery.composites(model).members.items()}
    before = model(x)
    report = surgery.flatten(model, verify=x)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    assert list(model.state_dict()) == list(plain.state_dict()) and not banks(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert all(now is parameters[key] for key, now in model.named_parameters())
    wider = {site: found.num_units for site, found in surgery.discover(model).items()}
    assert wider == {site: width + frozen.get(site, 0) for site, width in widths.items()}
    assert {site: each.units_after for site, each in report.sites.items()} == {site: wider[site] for site in frozen}
    assert report.declined == {} and report.model_error is not None and report.model_error < 1e-12
    assert Flattening.from_json(report.to_json()) == report


def test_a_composite_unit_becomes_three_units_as_on_paper() -> None:
    model: Any = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), (2.0, 3.0, 5.0, 7.0), strict=True):
            parameter.fill_(value)
    surgery.knife(model, surgery.Units({"0": [0]}), init=lambda weight: nn.init.constant_(weight, 4.0))
    with torch.no_grad():
        model[0].weight.fill_(11.0)
    bias = model[0].bias.item()
    surgery.flatten(model)
    assert model[0].weight.flatten().tolist() == [11.0, 2.0, 4.0]
    assert model[0].bias.tolist() == [bias, 3.0, model[0].bias[2].item()]
    assert model[2].weight.tolist() == [[5.0, 5.0, -5.0]] and model[2].bias.tolist() == [7.0]
    assert (model[0].out_features, model[2].in_features) == (3, 3)


DECLINED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, str]] = {
    "a maximum": (MODELS["images"][0], (5, 1, 8, 8), "0", "on the way to '4' is not linear"),
    "a norm over units": (Blocks, (5, 4), "second", "'layer_norm' takes its statistics over all units"),
    "a norm behind": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 2)),
        *((5, 4), "0", "has numbers of its own for each unit"),
    ),
    "an output": (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU()), (5, 4), "0", "it is returned by Sequential"),
    "a loop": (Recurrent, (5, 4), "again", "its consumer 'again' is called in Recurrent with another input too"),
    "groups": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 2, groups=2), nn.ReLU(), nn.Conv1d(4, 2, 2)),
        *((5, 2, 4), "0", "in groups"),
    ),
    "a computed weight": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.ReLU(), nn.Linear(3, 2)),
        *((5, 4), "0", "its weights are computed"),
    ),
    "a slope for all": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU(), nn.Linear(3, 2)),
        *((5, 4), "0", "its frozen rows have other values of 'weight', of which the layer has one for all"),
    ),
}


@pytest.mark.parametrize("name", DECLINED)
@pytest.mark.situation("Compile and export", "flattened: what is not linear keeps its bank", "refused")
def test_what_cannot_be_flattened_keeps_its_bank_with_a_reason(name: str) -> None:
    make, shape, site, reason = DECLINED[name]
    torch.manual_seed(0)
    x = torch.randn(shape).double()
    model = operated(make().double().eval(), x, {site: [1]})
    before, state = model(x), list(model.state_dict())
    report = surgery.flatten(model, verify=x)
    assert reason in report.declined[site] and report.sites == {}
    assert report.notes == ("nothing was flattened",) and f"keeps its bank: {site}" in str(report)
    assert torch.equal(model(x), before) and list(model.state_dict()) == state


def test_a_slope_that_all_rows_still_share_is_no_obstacle() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.PReLU(), nn.Linear(3, 2)).double(), torch.randn(5, 4).double()
    surgery.knife(model, surgery.Units({"0": [1]}))
    before = model(x)
    assert surgery.flatten(model, verify=x).declined == {} and not banks(model)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_a_consumer_that_keeps_its_bank_reads_the_new_units_in_its_frozen_rows_too() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 4).double()
    model = operated(Blocks().double(), x, {"first": [0, 4], "second": [1, 2]})
    before = model(x)
    report = surgery.flatten(model, verify=x)
    assert list(report.sites) == ["first"] and list(report.declined) == ["second"]
    assert banks(model) == ["second.composite"] and model.get_submodule("second.composite") is not None
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    surgery.knife(model, surgery.Units({"second": [1, 3], "first": [8]}), verify=x)  # and operating goes on


# -- fades, and rows that contribute nothing -------------------------------------------------------------------------


def retiring(num_steps: int) -> tuple[nn.Module, Tensor]:
    """A model so many of four steps into the fade of two units, without its optimizer."""
    torch.manual_seed(0)
    model, x = mlp().double(), torch.randn(16, 4).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    surgery.knife(model, surgery.Units({"0": [1, 5]}), optimizer=optimizer, retire=4)
    for _ in range(num_steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    return copy.deepcopy(model), x


def test_a_fade_is_what_it_was_in_the_outgoing_weights() -> None:
    model, x = retiring(1)
    before, outgoing = model(x), model.get_parameter("2.weight").detach().clone()
    surgery.flatten(model, verify=x)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    shares = torch.tensor([0.75, 0.75, -0.75, -0.75]).double()
    torch.testing.assert_close(model.get_parameter("2.weight")[:, 8:], outgoing[:, [1, 5, 1, 5]] * shares)


def test_rows_that_have_retired_become_no_units() -> None:
    model, x = retiring(4)
    before = model(x)
    report = surgery.flatten(model, verify=x)
    assert report.sites["0"].dropped == 4 and report.sites["0"].units_after == 8
    assert list(model.state_dict()) == list(mlp().state_dict())
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_rows_that_cancel_become_no_units() -> None:
    model = mlp()
    for _ in range(2):  # no step between: the active member never moved
        surgery.knife(model, surgery.Units({"0": [1]}))
    report = surgery.flatten(model)
    assert (report.sites["0"].dropped, report.sites["0"].units_after) == (2, 10)


# -- what it refuses, and that nothing is left of a fault ------------------------------------------------------------


def test_a_model_in_training_is_refused_and_its_copy_is_not() -> None:
    model, x = mlp(), torch.randn(16, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).square().mean().backward()
    optimizer.step()
    surgery.knife(model, surgery.Units({"0": [1]}), optimizer=optimizer)
    before = snapshot(model, [optimizer])
    with pytest.raises(surgery.OptimizerError, match=r"a Adam still trains this model.*copy.deepcopy\(model\)"):
        surgery.flatten(model)
    assert_untouched(before, model, [optimizer])
    plain = copy.deepcopy(model)
    assert surgery.flatten(plain).num_rows == 2
    assert_untouched(before, model, [optimizer])


def test_a_replica_of_many_processes_is_refused_before_it_changes(tmp_path: pathlib.Path) -> None:
    dist.init_process_group("gloo", init_method=(tmp_path / "met").as_uri(), rank=0, world_size=1)
    try:
        model = mlp()
        surgery.knife(model, surgery.Units({"0": [1]}))
        replica = nn.parallel.DistributedDataParallel(model)
        before = snapshot(model)
        with pytest.raises(surgery.ModelError, match="flatten the module inside it"):
            surgery.flatten(replica)
        assert_untouched(before, model)
    finally:
        dist.destroy_process_group()


def test_what_was_frozen_trains_and_no_old_gradient_is_left() -> None:
    model, x = mlp(), torch.randn(16, 4)
    surgery.knife(model, surgery.Units({"0": [1]}))
    model(x).square().mean().backward()
    surgery.flatten(model)
    assert all(
        parameter.grad is None for parameter in (model.get_parameter("0.weight"), model.get_parameter("2.weight"))
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    before = model.get_parameter("0.weight").detach().clone()
    model(x).square().mean().backward()
    optimizer.step()
    assert (model.get_parameter("0.weight") != before).any(dim=1)[8:].any()


def test_an_output_that_moves_is_rolled_back_and_dropout_is_named() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 2))
    operated(model.eval(), x, {"0": [1]})
    model.train()
    before = snapshot(model)
    with pytest.raises(surgery.EquivalenceError, match=r"call model.eval\(\) first"):
        surgery.flatten(model, verify=x)
    assert_untouched(before, model)
    report = surgery.flatten(model.eval(), verify=x)
    assert report.notes == ("0: dropout draws a mask for each unit, and so for each former row, in training",)


def test_rows_that_do_not_add_up_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = operated(mlp(), torch.randn(5, 4), {"0": [1]})
    before = snapshot(model)
    monkeypatch.setattr(Composite, "live_fade", lambda bank: torch.full((len(bank.rows),), 0.5))
    with pytest.raises(surgery.EquivalenceError, match="as plain units its rows give activations that differ"):
        surgery.flatten(model)
    monkeypatch.undo()
    assert_untouched(before, model)


class Fault(RuntimeError):
    """What the tests inject."""


def test_a_fault_after_any_change_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    model = operated(Blocks(), x, {"first": [1], "second": [0]})
    model(x).sum().backward()
    before = snapshot(model)
    struck = 0

    def fail_after(position: int) -> None:
        counts = itertools.count()

        def apply(later: transaction.Later) -> None:
            for change in later.plan():
                later.begun.append(change)
                change.apply()
                if next(counts) == position:
                    raise Fault

        monkeypatch.setattr(transaction.Later, "apply", apply)

    for position in range(100):
        fail_after(position)
        try:
            surgery.flatten(model)
        except Fault:
            struck += 1
        else:
            break
        assert_untouched(before, model)
    assert struck == position > 12


# -- what a plain network can do -------------------------------------------------------------------------------------


def flat() -> tuple[nn.Module, Tensor, Tensor]:
    """A flat model, an input, and what it gave before."""
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    model = operated(mlp().eval(), x, {"0": [1, 5]})
    expected = model(x).detach()
    surgery.flatten(model, verify=x)
    return model, x, expected


@pytest.mark.situation("Compile and export", "flattened: compiled and exported", "works")
def test_a_flat_model_compiles_and_exports() -> None:
    model, x, expected = flat()
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x).detach(), expected)
    program = torch.export.export(model, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x).detach(), expected)


@pytest.mark.slow
@pytest.mark.situation("Compile and export", "flattened: in ONNX", "works")
@pytest.mark.filterwarnings("ignore::FutureWarning:copyreg", "ignore::DeprecationWarning")
def test_a_flat_model_runs_in_onnxruntime(tmp_path: pathlib.Path) -> None:
    model, x, expected = flat()
    path = str(tmp_path / "model.onnx")
    exported: Any = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    exported.save(path)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected)


def test_a_flat_state_loads_into_a_plain_wider_network() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    model = operated(mlp(), x, {"0": [1, 5]})
    expected = model(x)
    width = surgery.flatten(model).sites["0"].units_after
    plain = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(x), expected)


def test_a_plain_model_is_left_alone() -> None:
    model = mlp()
    before = snapshot(model)
    report = surgery.flatten(model)
    assert (report.sites, report.declined, report.max_error) == ({}, {}, 0.0)
    assert_untouched(before, model)
