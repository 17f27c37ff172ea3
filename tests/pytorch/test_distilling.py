"""Distillation: fewer frozen rows that give nearly what all of them gave, with the error measured on unseen samples."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuronsurgery import surgery
from neuronsurgery.pytorch import distilling
from neuronsurgery.pytorch.composites import Composite
from tests.snapshots import assert_untouched, bits, snapshot

X = torch.randn(96, 4, generator=torch.Generator().manual_seed(3))
FRESH = torch.randn(2048, 4, generator=torch.Generator().manual_seed(4))


def mlp(*path: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), *path, nn.ReLU(), nn.Linear(8, 2))


def operated(model: nn.Sequential, units: list[int], times: int = 4) -> nn.Sequential:
    """The model after several operations, every slot moved by hand in between."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(times):
        surgery.knife(model, surgery.Units({"0": units}), max_growth=9.0)
        with torch.no_grad():
            for parameter in model[0].parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def bank_of(model: nn.Module) -> Composite:
    return next(module for module in model.modules() if isinstance(module, Composite))


def moved(before: nn.Sequential, after: nn.Sequential, x: Tensor) -> float:
    """By how much activations moved, as reports measure it."""
    old, new = before[:-1](x), after[:-1](x)
    return float(((new - old).norm() / old.norm()).detach())


@pytest.mark.parametrize("max_rows", [12, 8, 5])
def test_the_rows_that_are_left_stay_within_the_reported_error_on_fresh_data(max_rows: int) -> None:
    model = operated(mlp(), [1, 2, 5])
    before = copy.deepcopy(model)
    report = surgery.consolidate(model, batches=[X[:64], X[64:]], max_rows=max_rows)
    site = report.sites["0"]
    assert site.left == len(bank_of(model).rows) == max_rows // 2 * 2
    assert site.distilled == 24 - site.left and site.merged == 0
    assert moved(before, model, FRESH) <= 1.25 * site.error
    assert report.model_error is not None and report.model_error > 0 and report.notes == ()
    chosen = copy.deepcopy(before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distilling, "_least_squares", lambda left, train, signs: distilling._weights(left))
        surgery.consolidate(chosen, batches=[X[:64], X[64:]], max_rows=max_rows)
    assert moved(before, model, FRESH) < 0.9 * moved(before, chosen, FRESH)


def test_rows_that_are_one_function_become_one_pair_without_an_error() -> None:
    model = mlp().double()
    operated(model, [3])
    with torch.no_grad():
        weights_of(model)["frozen_bias"] += 50.0  # every row fires on every sample: their sum is one linear function
    before = copy.deepcopy(model)
    report = surgery.consolidate(model, batches=[X.double()], max_rows=2)
    assert report.sites["0"].left == 2
    assert moved(before, model, FRESH.double()) < 1e-3 and report.sites["0"].error < 1e-3


def test_the_pairs_that_matter_least_go_first() -> None:
    model = operated(mlp(), [1, 5], times=2)
    with torch.no_grad():  # unit 5 alone has much to say
        for values in weights_of(model).values():
            values[torch.from_numpy(bank_of(model).rows.unit == 1)] *= 1e-3
    before = {name: values[bank_of(model).rows.unit == 5].clone() for name, values in weights_of(model).items()}
    report = surgery.consolidate(model, batches=[X], tolerance=0.0, max_rows=4)
    assert set(bank_of(model).rows.unit) == {5} and report.sites["0"].error < 1e-2
    assert all(bits(values) == bits(before[name]) for name, values in weights_of(model).items())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    bank = bank_of(model)
    found = {name: bank.live(name) for name in ("frozen_weight", "frozen_bias")}
    return {name: values for name, values in found.items() if values is not None}


def test_rows_stay_as_they_were_where_a_fit_does_not_help_on_samples_that_it_did_not_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = operated(mlp(), [1, 2], times=2)
    known = {bits(row) for row in weights_of(model)["frozen_weight"]}
    monkeypatch.setattr(
        distilling,
        "_least_squares",
        lambda left, train, signs: {k: v + 100 for k, v in distilling._weights(left).items()},
    )
    surgery.consolidate(model, batches=[X], max_rows=4)
    assert {bits(row) for row in weights_of(model)["frozen_weight"]} < known


def test_no_row_at_all_is_a_plain_layer_and_the_error_is_what_was_left_out() -> None:
    model = operated(mlp(), [1, 5])
    before = copy.deepcopy(model)
    report = surgery.consolidate(model, batches=[X], max_rows=0)
    assert list(model.state_dict()) == list(mlp().state_dict())
    assert report.sites["0"].error == pytest.approx(moved(before, model, X), rel=1e-4)


def test_a_site_within_the_bound_is_left_alone() -> None:
    model = operated(mlp(), [1, 5])
    before = snapshot(model)
    assert surgery.consolidate(model, batches=[X], max_rows=16).num_rows == 0
    assert_untouched(before, model)


def test_channels_and_norms_in_evaluation_are_fitted_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.PReLU(4), nn.Conv1d(4, 2, 3)).eval()
    x = torch.randn(48, 1, 9)
    operated(model, [0, 2])
    before = copy.deepcopy(model)
    report = surgery.consolidate(model, batches=[x], max_rows=8)
    assert report.sites["0"].left == 8 and report.notes == ()
    assert moved(before, model, x) <= 1.25 * report.sites["0"].error < 0.6


NOT_FITTED: dict[str, tuple[nn.Sequential, str]] = {
    "a norm over units": (mlp(nn.LayerNorm(8)), "'layer_norm' on their path takes more than their own values"),
    "a batch norm in training": (mlp(nn.BatchNorm1d(8)), "takes the statistics of a batch: call model.eval() first"),
    "half precision": (mlp().bfloat16(), "they are in torch.bfloat16"),
}


@pytest.mark.parametrize("name", NOT_FITTED)
def test_rows_that_cannot_be_fitted_are_chosen_with_a_note(name: str) -> None:
    model, reason = copy.deepcopy(NOT_FITTED[name])
    x = X.to(model.get_parameter("0.weight").dtype)
    operated(model, [1, 5])
    known = {bits(row) for row in weights_of(model)["frozen_weight"]}
    report = surgery.consolidate(model, batches=[x], max_rows=8)
    assert report.sites["0"].left == 8
    assert reason in report.notes[0] and report.notes[0].startswith("0: rows were chosen and not fitted")
    assert {bits(row) for row in weights_of(model)["frozen_weight"]} <= known


def test_the_row_that_a_norm_refers_to_stays_with_a_note() -> None:
    model = operated(mlp(nn.LayerNorm(8)), [1, 5], times=2)
    first = bits(weights_of(model)["frozen_weight"][0])
    report = surgery.consolidate(model, batches=[X], max_rows=0)
    assert report.sites["0"].left == 4 and "4 rows are left" in report.notes[0]
    assert bits(weights_of(model)["frozen_weight"][0]) == first


def test_units_of_which_a_row_fades_stay_as_they_are() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    operated(model, [1, 5], times=2)
    surgery.knife(model, surgery.Units({"0": [5]}), optimizer=optimizer, retire=4)
    report = surgery.consolidate(model, batches=[X], tolerance=0.0, max_rows=0)
    assert set(bank_of(model).rows.unit) == {5} and report.sites["0"].left == 6


def test_mirrors_get_the_fitted_rows_and_the_same_structure() -> None:
    model = mlp()
    target = copy.deepcopy(model).requires_grad_(False)
    for parameter in target.parameters():
        parameter.mul_(1.01)
    operated(model, [1, 5])
    surgery.mirror(model, onto=target)
    report = surgery.consolidate(model, mirrors=target, batches=[X], max_rows=4)
    assert surgery.composites(target).members == surgery.composites(model).members
    for name, values in weights_of(model).items():
        assert bits(values) == bits(weights_of(target)[name])
    assert report.mirrors[0]["0"] > 0
    assert surgery.check(model, mirrors=target).ok


def test_a_bound_that_makes_no_sense_is_refused_before_anything_changes() -> None:
    model = operated(mlp(), [1])
    before = snapshot(model)
    with pytest.raises(surgery.PlanError, match="max_rows= needs batches="):
        surgery.consolidate(model, max_rows=2)
    wrongs: tuple[Any, ...] = (-1, True, 2.0)
    for wrong in wrongs:
        with pytest.raises(surgery.PlanError, match="how many frozen rows a site may keep"):
            surgery.consolidate(model, batches=[X], max_rows=wrong)
    assert_untouched(before, model)


def test_distilling_draws_no_random_number_and_leaves_the_bank_without_a_trace() -> None:
    model, again = (operated(mlp(), [1, 5]) for _ in range(2))
    state = torch.get_rng_state()
    surgery.consolidate(model, batches=[X], max_rows=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert not {"forward", "summed"} & set(vars(bank_of(model)))
    surgery.consolidate(again, batches=[X], max_rows=4)
    assert all(bits(one) == bits(two) for one, two in zip(model.buffers(), again.buffers(), strict=True))
    assert not any(buffer.requires_grad for buffer in model.buffers())
