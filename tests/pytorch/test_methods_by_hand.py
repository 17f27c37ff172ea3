"""Each method on networks of two layers, worked out by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuronsurgery import surgery
from neuronsurgery.errors import CriterionError, EvidenceError, SiteError
from neuronsurgery.pytorch.optimizers import young_rows
from neuronsurgery.reports import Report

RESETS = [surgery.redo, surgery.regrama]


def network(activation: nn.Module | None = None) -> Any:
    """Two inputs, three units, two outputs; written out so that a reader can follow."""
    model: Any = nn.Sequential(nn.Linear(2, 3), activation or nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
        model[0].bias.copy_(torch.tensor([0.0, 1.0, -50.0]))
        model[2].weight.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
        model[2].bias.copy_(torch.tensor([0.5, -0.5]))
    return model


def sevens(weight: Tensor) -> None:
    weight.fill_(7.0)


X = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).double()


def evidence_of(model: nn.Module, x: Tensor = X) -> Any:
    return surgery.probe(model, [x], lambda model, x: model(x).square().mean())


# -- redo and regrama ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", RESETS, ids=lambda method: method.__name__)
def test_a_reset_draws_rows_anew_and_zeroes_columns_and_nothing_else(method: Callable[..., Report]) -> None:
    model = network()
    report = method(model, surgery.Units({"0": [1]}), init=sevens, verify=X)
    assert model[0].weight.tolist() == [[1.0, 0.0], [7.0, 7.0], [1.0, 1.0]]
    assert model[0].bias.tolist() == [0.0, 0.0, -50.0]
    assert model[2].weight.tolist() == [[1.0, 0.0, 3.0], [4.0, 0.0, 6.0]]
    assert model[2].bias.tolist() == [0.5, -0.5]
    assert (report.method, report.operated) == (method.__name__, {"0": (1,)})
    # unit 1 had the activations 5 and 9; the largest output is 4 * 3 + 5 * 9, and its bias counts as 0.5 more
    assert report.model_error == pytest.approx(9 * 5 / 57.5)


def test_redo_takes_dormant_units_by_default_and_regrama_those_whose_activations_get_no_gradient() -> None:
    model = network()
    assert surgery.redo(model, evidence=evidence_of(model)).operated == {"0": (2,)}  # it never fires
    model = network()
    with torch.no_grad():
        model[2].weight[:, 0] = 0.0
    assert surgery.regrama(model, evidence=evidence_of(model)).operated == {"0": (0,)}  # nothing reads it


def test_a_reset_unit_hands_nothing_on_to_units_that_are_reset_with_it() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    surgery.redo(model, surgery.Units({"0": [1], "2": [2]}), init=sevens)
    assert model[2].weight[:, 1].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert model[2].weight[2].tolist() == [7.0, 0.0, 7.0]


def test_a_reset_reaches_every_entry_of_a_flattened_channel() -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))
    before = model[3].weight.detach().clone()
    surgery.redo(model, surgery.Units({"0": [1]}))
    assert torch.equal(model[3].weight[0], torch.cat([before[0, :4], torch.zeros(4)]))


def test_a_norm_between_weights_and_activation_function_is_reset_with_its_unit() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[1].weight.fill_(5.0)
        model[1].bias.fill_(4.0)
    surgery.regrama(model, surgery.Units({"0": [1]}))
    assert (model[1].weight.tolist(), model[1].bias.tolist()) == ([5.0, 1.0, 5.0], [4.0, 0.0, 4.0])


def test_draws_differ_from_one_reset_to_the_next_and_are_the_same_on_a_replica() -> None:
    models = [network(), network()]
    rows = []
    for _ in range(2):
        for model in models:
            surgery.redo(model, surgery.Units({"0": [1]}))
            rows.append(model[0].weight[1].tolist())
    assert rows[0] == rows[1] != rows[2] == rows[3]


@pytest.mark.parametrize("method", [*RESETS, surgery.reborn], ids=lambda method: method.__name__)
def test_a_site_without_known_consumers_is_declined_and_refused_by_name(method: Callable[..., Report]) -> None:
    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(3, 1)

        def forward(self, x):
            h = torch.relu(self.one(x))
            return h, self.head(torch.relu(self.two(x)))

    torch.manual_seed(0)
    model: Any = Returned()
    with torch.no_grad():
        model.two.weight.abs_()  # so that it fires
    evidence = surgery.probe(model, [X.float()], lambda model, x: sum(each.square().sum() for each in model(x)))
    choice = surgery.Lowest(0.5, of="dormant")
    report = method(model, choice, evidence=evidence)
    assert list(report.operated) == ["two"]
    assert report.declined["one"] == "it is returned by Returned"
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(SiteError, match="'one' cannot be written: it is returned by Returned"):
        method(model, choice, evidence=evidence, sites=["one"])
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_redo_without_evidence_says_what_to_measure() -> None:
    with pytest.raises(EvidenceError, match=r"needs the activations .* surgery\.observe"):
        surgery.redo(network())


# -- reborn ----------------------------------------------------------------------------------------------------------


def test_reborn_copies_a_scaled_donor_and_shares_its_outgoing_weights() -> None:
    """One factor, so that it need not be drawn: rows are the donor's times 0.5, outgoing ones p / 0.5 and p' with
    p + p' = 1."""
    model = network()
    before = model(X)
    report = surgery.reborn(model, over_active=1.5, scale=(0.5, 0.5), evidence=evidence_of(model), verify=X)
    assert report.operated == {"0": (2,)}  # unit 2 is dormant; unit 1 has activations 5 and 9 against 1 and 3 of unit 0
    assert model[0].weight.tolist() == [[1.0, 0.0], [0.0, 2.0], [0.0, 1.0]]
    assert model[0].bias.tolist() == [0.0, 1.0, 0.5]
    outgoing = model[2].weight.detach()
    assert outgoing[:, 0].tolist() == [1.0, 4.0]
    torch.testing.assert_close(outgoing[:, 1] + 0.5 * outgoing[:, 2], torch.tensor([2.0, 5.0]).double())
    assert bool((outgoing[:, 1] > 0).all()) and bool((outgoing[:, 2] > 0).all())
    assert report.model_error is not None and report.model_error < 1e-12
    torch.testing.assert_close(model(X), before)


LEAKY: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "leaky relu": functools.partial(nn.LeakyReLU, 0.3)}


@pytest.mark.parametrize("name", LEAKY)
@pytest.mark.parametrize("seed", range(5))
def test_reborn_preserves_the_output_of_homogeneous_units_where_dormant_ones_handed_nothing_on(
    name: str, seed: int
) -> None:
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 9, 3), LEAKY[name](), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    model: Any = nn.Sequential(*layers).double()
    with torch.no_grad():
        model[0].bias[0] = 30.0  # over-active
        model[4].weight[:, 4:] = torch.where(torch.arange(4, 36) < 20, 0.0, model[4].weight[:, 4:])
        model[0].weight[1:5] *= 1e-3  # dormant, and without outgoing weights
        model[0].bias[1:5] *= 1e-3
    x = torch.randn(7, 1, 6, 6).double()
    before = model(x)
    report = surgery.reborn(model, surgery.Dormant(1e-2), evidence=evidence_of(model, x), verify=x)
    assert report.operated == {"0": (1, 2, 3, 4)}
    torch.testing.assert_close(model(x), before, rtol=1e-10, atol=1e-10)
    assert not any("homogeneous" in note for note in report.notes)


def test_reborn_loses_what_dormant_units_handed_on() -> None:
    """Unit 2 fires a little, 0.01 times its outgoing weights 3 and 6: just that is missing afterwards."""
    model = network()
    with torch.no_grad():
        model[0].weight[2] = 0.0
        model[0].bias[2] = 0.01
    before = model(X)
    surgery.reborn(model, over_active=1.5, evidence=evidence_of(model))
    torch.testing.assert_close(before - model(X), torch.tensor([[0.03, 0.06]]).double().expand(2, 2))


@pytest.mark.parametrize("activation", [nn.GELU, nn.ELU, nn.Tanh], ids=lambda each: each.__name__)
def test_reborn_moves_the_output_of_other_units_and_says_so(activation: Callable[[], nn.Module]) -> None:
    model, x = network(activation()), X - 3
    with torch.no_grad():
        model[0].weight[2] = model[0].bias[2] = 0.0
    report = surgery.reborn(model, surgery.Dormant(1e-6), over_active=1.01, evidence=evidence_of(model, x), verify=x)
    assert report.num_units == 1
    assert report.model_error is not None and report.model_error > 1e-3
    assert any("is not positively homogeneous" in note for note in report.notes)


def test_reborn_resets_units_beyond_what_donors_take() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([50.0, *[-50.0] * 5]))
    before = model(X)
    report = surgery.reborn(model, per_donor=2, evidence=evidence_of(model))
    assert report.operated == {"0": (1, 2, 3, 4, 5)}
    silent = (model[2].weight == 0).all(0)
    assert int(silent.sum()) == 3
    assert "0: 3 units without a donor, drawn anew and silenced" in report.notes
    torch.testing.assert_close(model(X), before)


def test_reborn_declines_a_norm_that_would_undo_its_factors() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).double()
    report = surgery.reborn(model, surgery.Lowest(0.5, of="dormant"), evidence=evidence_of(model))
    assert report.num_units == 0 and "takes factors out again" in report.declined["0"]


def test_reborn_refuses_a_criterion_that_knows_no_over_active_units() -> None:
    with pytest.raises(CriterionError, match=r"Units.* has none of '0': choose by Dormant"):
        surgery.reborn(network(), surgery.Units({"0": [1]}))
    with pytest.raises(CriterionError, match="donors are above that"):
        surgery.reborn(network(), over_active=0.5)
    with pytest.raises(CriterionError, match=r"scale=.*positive factors"):
        surgery.reborn(network(), scale=(0.0, 0.5))


# -- the optimizer's side --------------------------------------------------------------------------------------------


def test_rows_and_columns_are_young_and_their_neighbors_are_not() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    surgery.redo(model, surgery.Units({"0": [1]}), optimizer=optimizer)
    assert young_rows(optimizer) == {model[0].weight: {1: 3}, model[0].bias: {1: 3}, model[2].weight: {1: 3}}
    assert optimizer.state[model[2].weight]["exp_avg"][:, 1].tolist() == [0.0, 0.0]
    assert bool((optimizer.state[model[2].weight]["exp_avg"][:, [0]] != 0).all())
    assert model[2].weight.grad is not None and model[2].weight.grad[:, 1].tolist() == [0.0, 0.0]


def test_a_donors_outgoing_weights_keep_their_optimizer_state() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()
    moment = optimizer.state[model[2].weight]["exp_avg"].clone()
    surgery.reborn(model, over_active=1.5, evidence=evidence_of(model), optimizer=optimizer)
    assert torch.equal(optimizer.state[model[2].weight]["exp_avg"][:, :2], moment[:, :2])
    assert young_rows(optimizer)[model[2].weight] == {2: 1}
