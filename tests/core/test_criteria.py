"""The criteria against values worked out by hand, the laws they obey, and what they refuse."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from neuronsurgery.criteria import (
    Criterion,
    Custom,
    Dormant,
    GraMa,
    Lowest,
    Random,
    Stagnant,
    Units,
    as_criterion,
)
from neuronsurgery.errors import CriterionError, EvidenceError, SiteError
from neuronsurgery.evidence import Evidence, Quantity
from neuronsurgery.scores import Scores, score
from neuronsurgery.selection import select
from tests.core_values import activations, one_step, sites_of

GRADIENT = Quantity.ACTIVATION_GRADIENT

# Two steps of a site of four units; weight norms (1, 2, 4, 5) throughout.
#   step 1: gradient norms (1, 4, 4, 10)    UA (1, 2, 1, 2)       mean 1.5   shares (2/3, 4/3, 2/3, 4/3)
#   step 2: gradient norms (1, 2, 4, 65)    UA (1, 1, 1, 13)      mean 4     shares (1/4, 1/4, 1/4, 13/4)
#   "scores": mean of the shares            (11/24, 19/24, 11/24, 55/24)     mean 1 already
#   "ua": mean of UA (1, 1.5, 1, 7.5)       mean 2.75, so     (4/11, 6/11, 4/11, 30/11)
WEIGHT_NORMS = [1.0, 2.0, 4.0, 5.0]
GRADIENT_NORMS = [[1.0, 4.0, 4.0, 10.0], [1.0, 2.0, 4.0, 65.0]]
# With the bias as one more entry, UA = (1, 2, 1, 2), mean 3/2, then (1, 1, 2, 5), mean 9/4.
WEIGHT_NORMS_WITH_BIAS = [2.0, 2.0, 4.0, 5.0]
GRADIENT_NORMS_WITH_BIAS = [[2.0, 4.0, 4.0, 10.0], [2.0, 2.0, 8.0, 25.0]]
# Two batches of 2 and 6 samples.
#   sums of |h|:      (0, 2, 8, 4) + (0, 6, 24, 20) over 8 samples: (0, 1, 4, 3), mean 2
#   sums of |dL/dh|:  (3, 0, 2, 1) + (5, 0, 6, 7)   over 8 samples: (1, 0, 1, 1), mean 3/4
ACTIVATION_SUMS = [([0.0, 2.0, 8.0, 4.0], 2), ([0.0, 6.0, 24.0, 20.0], 6)]
GRADIENT_SUMS = [([3.0, 0.0, 2.0, 1.0], 2), ([5.0, 0.0, 6.0, 7.0], 6)]
GOLDEN = [
    (Stagnant(), "stagnant", [11 / 24, 19 / 24, 11 / 24, 55 / 24]),
    (Stagnant(average="ua"), "stagnant_ua", [4 / 11, 6 / 11, 4 / 11, 30 / 11]),
    (Stagnant(bias=True), "stagnant_bias", [5 / 9, 8 / 9, 7 / 9, 16 / 9]),
    (Stagnant(average="ua", bias=True), "stagnant_ua_bias", [8 / 15, 12 / 15, 12 / 15, 28 / 15]),
    (Dormant(), "dormant", [0, 1 / 2, 2, 3 / 2]),
    (GraMa(), "grama", [4 / 3, 0, 4 / 3, 4 / 3]),
]


def golden_evidence(array: Callable[[list[float]], Any]) -> Evidence:
    evidence = Evidence(sites_of(fc1=4))
    for gradient_norms, with_bias in zip(GRADIENT_NORMS, GRADIENT_NORMS_WITH_BIAS, strict=True):
        evidence.record_step(
            {"fc1": (array(WEIGHT_NORMS), array(gradient_norms))},
            with_bias={"fc1": (array(WEIGHT_NORMS_WITH_BIAS), array(with_bias))},
        )
    for quantity, batches in ((Quantity.ACTIVATION, ACTIVATION_SUMS), (GRADIENT, GRADIENT_SUMS)):
        for magnitude_sum, num_samples in batches:
            evidence.record_samples("fc1", array(magnitude_sum), num_samples, quantity)
    return evidence


def scored(evidence: Evidence, criterion: Criterion) -> Scores:
    return score(evidence.sites, evidence, criterion)


def chosen(evidence: Evidence | None, criterion: Criterion, **num_units: Any) -> dict[str, tuple[int, ...]]:
    sites = sites_of(**num_units) if evidence is None else evidence.sites
    return dict(select(score(sites, evidence, criterion)).units)


@pytest.mark.parametrize(("criterion", "name", "expected"), GOLDEN, ids=lambda one: str(one))
@pytest.mark.parametrize(
    ("array", "rtol"),
    [
        (functools.partial(np.array, dtype="float64"), 1e-11),
        (functools.partial(np.array, dtype="float32"), 1e-6),
        (functools.partial(torch.tensor, dtype=torch.float64), 1e-11),
        (functools.partial(torch.tensor, dtype=torch.float32), 1e-6),
    ],
    ids=["numpy float64", "numpy float32", "torch float64", "torch float32"],
)
def test_scores_are_those_worked_out_by_hand(
    array: Any, rtol: float, criterion: Criterion, name: str, expected: list[float]
) -> None:
    scores = scored(golden_evidence(array), criterion)
    np.testing.assert_allclose(scores["fc1"][name], expected, rtol=rtol)


ONE_EACH = [Stagnant(), Stagnant(average="ua"), Stagnant(bias=True), Dormant(), GraMa()]


@pytest.mark.parametrize("criterion", ONE_EACH, ids=str)
def test_numpy_and_torch_give_the_same_scores(criterion: Any) -> None:
    norms = np.random.default_rng(0).random(257)
    measured = dict.fromkeys(Quantity, norms)
    as_torch = dict.fromkeys(Quantity, torch.from_numpy(norms))
    np.testing.assert_allclose(criterion.score(as_torch), criterion.score(measured), rtol=1e-13)


@pytest.mark.parametrize(
    ("criterion", "scores", "expected"),
    [
        # strictly below 0.25
        (Stagnant(), [0.2499, 0.25, 0.2501], [0]),
        # at most 0.025, at most 0.01
        (Dormant(), [0.0249, 0.025, 0.0251], [0, 1]),
        (GraMa(), [0.0099, 0.01, 0.0101], [0, 1]),
        (Dormant(0), [0.0, 1e-9], [0]),
        # floor(0.5 * 5) = 2; of the tied units 1, 2 and 4 the first
        (Lowest(0.5), [0.1, 0.2, 0.2, 3.0, 0.2], [0, 1]),
        (Lowest(1.0), [0.1, 0.2], [0, 1]),
        (Lowest(0.3), [0.1, 0.2], []),
        # 0.29 * 100 is 28.999999999999996 in floating point
        (Lowest(0.29), [float(unit) for unit in range(100)], list(range(29))),
    ],
    ids=lambda one: str(one)[:40],
)
def test_units_chosen_from_scores(criterion: Any, scores: list[float], expected: list[int]) -> None:
    assert [unit for unit, is_chosen in enumerate(criterion.choose(scores)) if is_chosen] == expected


def test_lowest_takes_its_fraction_of_each_site() -> None:
    sites = sites_of(fc1=4, fc2=2)
    evidence = one_step(sites, fc1=[4, 1, 2, 3], fc2=[1, 1])
    assert chosen(evidence, Lowest(0.5)) == {"fc1": (1, 2), "fc2": (0,)}


def test_lowest_of_another_score() -> None:
    evidence = activations(one_step(sites_of(fc1=2), fc1=[1, 2]), fc1=[2, 1])
    assert chosen(evidence, Lowest(0.5, of="dormant")) == {"fc1": (1,)}
    assert chosen(evidence, Lowest(0.5, of=Stagnant(average="ua"))) == {"fc1": (0,)}
    with_bias = Lowest(0.5, of=Stagnant(bias=True))
    assert chosen(golden_evidence(np.array), with_bias) == {"fc1": (0, 2)}
    assert with_bias.needs == {Quantity.RELATIVE_UPDATE_ACTIVITY_WITH_BIAS}
    assert with_bias.score_name == "stagnant_bias"


def test_scores_with_and_without_the_bias_stand_side_by_side() -> None:
    scores = scored(golden_evidence(np.array), Stagnant(0.5) & ~Stagnant(0.5, bias=True))
    assert list(scores["fc1"]) == ["stagnant", "stagnant_bias"]
    assert select(scores).units == {"fc1": (0, 2)}


def test_scores_with_the_bias_need_evidence_of_it() -> None:
    evidence = one_step(sites_of(fc1=2), fc1=[1, 2])
    message = "'stagnant' needs the gradients with biases of site 'fc1'; found only gradients: call loss.backward()"
    with pytest.raises(EvidenceError, match=message):
        scored(evidence, Stagnant(bias=True))


def test_a_site_that_lacks_norms_with_the_bias_is_unscored() -> None:
    evidence = Evidence(sites_of(fc1=2, fc2=2))
    norms = (np.ones(2), np.array([1.0, 3.0]))
    evidence.record_step({"fc1": norms, "fc2": norms}, with_bias={"fc1": norms})
    assert scored(evidence, Stagnant(bias=True)).unscored == {"fc2": "received no gradient"}


def test_what_a_stagnant_criterion_prints_names_the_bias_where_it_counts() -> None:
    assert str(Stagnant()) == "Stagnant(threshold=0.25, average='scores')"
    assert str(Stagnant(bias=True)) == "Stagnant(threshold=0.25, average='scores', bias=True)"


def test_units_chosen_by_hand_need_no_evidence() -> None:
    assert chosen(None, Units({"fc2": np.array([2, 0])}), fc1=2, fc2=3) == {"fc2": (0, 2)}


def test_random_takes_its_fraction_of_each_site() -> None:
    units = chosen(None, Random(0.25), fc1=8, fc2=100, fc3=3)
    assert {name: len(one) for name, one in units.items()} == {"fc1": 2, "fc2": 25}


def test_random_is_repeatable_and_depends_on_the_seed_and_the_site() -> None:
    sites = sites_of(fc1=50, fc2=50)
    draws = [score(sites, None, Random(0.5), seed=seed).values for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0]["fc1"] != draws[0]["fc2"]


def test_random_with_a_seed_of_its_own_ignores_that_of_score() -> None:
    draws = [score(sites_of(fc1=50), None, Random(0.5, seed=4), seed=seed).values for seed in (0, 1)]
    assert draws[0] == draws[1]


def test_random_draws_do_not_depend_on_the_other_sites() -> None:
    alone = score(sites_of(fc2=9), None, Random(0.5))
    assert alone["fc2"] == score(sites_of(fc1=3, fc2=9), None, Random(0.5))["fc2"]


# Scores of four units:  stagnant chooses 0 and 1, dormant 1 and 2
#   gradients (0, 0, 2, 2), mean 1: scores (0, 0, 2, 2); activations (2, 0, 0, 2), mean 1: scores (2, 0, 0, 2)
@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (Stagnant() & Dormant(), (1,)),
        (Stagnant() | Dormant(), (0, 1, 2)),
        (~Stagnant(), (2, 3)),
        (~(Stagnant() | Dormant()), (3,)),
        (Stagnant() & ~Dormant(), (0,)),
        (Stagnant() & Units({"fc1": [0, 3]}), (0,)),
        (Stagnant() | Units({"fc1": [3]}), (0, 1, 3)),
        (~Units({"fc1": [3]}), (0, 1, 2)),
        (Stagnant(0.25) & Stagnant(0.1), (0, 1)),
        (Custom(lambda scores: {"fc1": [False, False, False, True]}) | Dormant(), (1, 2, 3)),
    ],
    ids=str,
)
def test_combination_chooses(criterion: Criterion, expected: tuple[int, ...]) -> None:
    evidence = activations(one_step(sites_of(fc1=4), fc1=[0, 0, 2, 2]), fc1=[2, 0, 0, 2])
    assert chosen(evidence, criterion) == {"fc1": expected}


def test_combination_prints_as_it_is_written() -> None:
    criterion = (Dormant() | ~GraMa()) & Units({"fc1": [0]})
    assert str(criterion) == "(Dormant(threshold=0.025) | ~GraMa(threshold=0.01)) & Units(units={'fc1': (0,)})"


def test_combination_needs_what_its_parts_need() -> None:
    assert (Dormant() & ~GraMa() | Units({})).needs == {Quantity.ACTIVATION, GRADIENT}


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        (Units({}), False),
        (~Units({}), False),
        (Stagnant(), True),
        (Units({}) | Stagnant(), True),
        (Lowest(0.1), True),
    ],
    ids=str,
)
def test_cooldown_is_for_all_but_units_chosen_by_hand(criterion: Criterion, expected: bool) -> None:
    assert criterion.uses_cooldown is expected


def test_combination_with_something_else_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        Stagnant() & "dormant"  # type: ignore[operator]


# Sixteenths keep the comparisons with thresholds exact, whatever the order of summation.
norms = st.lists(st.integers(1, 64).map(lambda one: one / 16), min_size=2, max_size=8)


@given(data=st.data(), gradients=norms)
def test_permuting_units_permutes_scores(data: st.DataObject, gradients: list[float]) -> None:
    order = data.draw(st.permutations(range(len(gradients))))
    permuted = [gradients[unit] for unit in order]
    evidence, other = (activations(one_step(sites_of(fc1=len(one)), fc1=one), fc1=one) for one in (gradients, permuted))
    for criterion, name in ((Stagnant(), "stagnant"), (Dormant(), "dormant")):
        before, after = scored(evidence, criterion)["fc1"][name], scored(other, criterion)["fc1"][name]
        np.testing.assert_allclose(after, [before[unit] for unit in order], rtol=1e-12)


@given(gradients=norms, scale=st.floats(1e-6, 1e6))
def test_scaling_the_loss_leaves_stagnant_and_grama(gradients: list[float], scale: float) -> None:
    sites = sites_of(fc1=len(gradients))
    scaled = [scale * one for one in gradients]
    before, after = (activations(one_step(sites, fc1=one), GRADIENT, fc1=one) for one in (gradients, scaled))
    for criterion, name in ((Stagnant(), "stagnant"), (GraMa(), "grama")):
        expected = scored(before, criterion)["fc1"][name]
        np.testing.assert_allclose(scored(after, criterion)["fc1"][name], expected, rtol=1e-9)


@given(gradients=norms)
def test_scores_have_mean_one(gradients: list[float]) -> None:
    evidence = one_step(sites_of(fc1=len(gradients)), fc1=gradients)
    for criterion in (Stagnant(), Stagnant(average="ua")):
        scores = scored(evidence, criterion)["fc1"][criterion.score_name]
        assert np.mean(scores) == pytest.approx(1)


@given(gradients=norms, low=st.floats(0.01, 1), high=st.floats(0.01, 1))
def test_higher_threshold_never_chooses_less(gradients: list[float], low: float, high: float) -> None:
    low, high = sorted((low, high))
    evidence = one_step(sites_of(fc1=len(gradients)), fc1=gradients)
    by_low, by_high = (chosen(evidence, Stagnant(one)).get("fc1", ()) for one in (low, high))
    assert set(by_low) <= set(by_high)


@given(gradients=norms)
def test_not_chooses_the_complement(gradients: list[float]) -> None:
    evidence = one_step(sites_of(fc1=len(gradients)), fc1=gradients)
    one, other = (set(chosen(evidence, it).get("fc1", ())) for it in (Stagnant(), ~Stagnant()))
    assert one ^ other == set(range(len(gradients))) == one | other


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stagnant(0), r"Stagnant\.threshold is 0; it must satisfy 0 < threshold <= 1: .*have mean 1"),
        (lambda: Stagnant(1.5), r"Stagnant\.threshold is 1\.5; it must satisfy 0 < threshold <= 1: "),
        (lambda: Stagnant(float("nan")), r"Stagnant\.threshold is nan; it must satisfy 0 < threshold <= 1"),
        (lambda: Stagnant("low"), r"Stagnant\.threshold is 'low'; it must satisfy"),  # type: ignore[arg-type]
        (
            lambda: Dormant(-0.1),
            r"Dormant\.threshold is -0\.1; it must satisfy 0 <= threshold <= 1: .*mean 1",
        ),
        (lambda: GraMa(2), r"GraMa\.threshold is 2; it must satisfy 0 <= threshold <= 1: .*mean 1"),
        (lambda: Lowest(0), r"Lowest\.fraction is 0; it must satisfy 0 < fraction <= 1: .*a site's units"),
        (lambda: Random(1.01), r"Random\.fraction is 1\.01; it must satisfy 0 < fraction <= 1: "),
    ],
)
def test_threshold_out_of_range_tells_value_range_and_why(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(CriterionError, match=message):
        make()


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_bounds_of_the_closed_range_are_accepted(threshold: float) -> None:
    assert Dormant(threshold).threshold == GraMa(threshold).threshold == threshold


def test_unknown_average_names_the_two() -> None:
    with pytest.raises(CriterionError, match=r"Stagnant\.average is 'mean'; it must be 'scores'.* or 'ua'"):
        Stagnant(average="mean")  # type: ignore[arg-type]
    with pytest.raises(CriterionError, match=r"Stagnant\.bias is 1; it must be True .* or False"):
        Stagnant(bias=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("of", [Random(0.5), Units({}), Lowest(0.5), Stagnant() & Dormant()], ids=str)
def test_lowest_of_what_has_no_measured_score_is_refused(of: Criterion) -> None:
    with pytest.raises(CriterionError, match="must be one of 'stagnant', 'dormant', 'grama'"):
        Lowest(0.5, of=of)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({"fc1": [1.5]}, "the units of site 'fc1' must be integers"),
        ({"fc1": 1}, "the units of site 'fc1' must be integers"),
        (["fc1"], r"Units takes site name -> unit indices, such as \{'fc1': \[0, 3\]\}"),
    ],
)
def test_units_that_are_no_indices_are_refused(units: Any, message: str) -> None:
    with pytest.raises(CriterionError, match=message):
        Units(units)


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ({"fc3": [0]}, "no site is named 'fc3': did you mean 'fc1'"),
        ({"head": [0]}, "'head' is no site, it was declined: no activation function"),
        ({"fc1": [4]}, "Units asks for unit 4 of site 'fc1', which has 4 units: choose from 0 to 3"),
        ({"fc1": [-1]}, "Units asks for unit -1 of site 'fc1', which has 4 units: choose from 0 to 3"),
        ({"fc1": [2, 0, 2]}, "Units asks for unit 2 of site 'fc1' more than once"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: ~(one & Random(0.5))], ids=["alone", "within"])
def test_units_that_do_not_exist_are_refused(wrap: Any, units: dict[str, list[int]], message: str) -> None:
    scores = score(sites_of(fc1=4, declined={"head": "no activation function"}), None, wrap(Units(units)))
    with pytest.raises(SiteError, match=message):
        select(scores)


@pytest.mark.parametrize(("name", "cls"), [("stagnant", Stagnant), ("dormant", Dormant), ("grama", GraMa)])
def test_name_stands_for_the_criterion_with_its_defaults(name: str, cls: type[Criterion]) -> None:
    assert as_criterion(name) == cls()


def test_criterion_stands_for_itself() -> None:
    criterion = Stagnant() & Dormant()
    assert as_criterion(criterion) is criterion


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stagnent", r"no criterion is named 'stagnent': did you mean 'stagnant'\?"),
        ("Dormant", r"no criterion is named 'Dormant': did you mean 'dormant'\?"),
        ("knife", "no criterion is named 'knife': known: 'stagnant', 'dormant', 'grama'"),
        ("lowest", r"'lowest' needs arguments: pass an object such as Lowest\(\.\.\.\)"),
    ],
)
def test_unknown_name_offers_the_nearest(name: str, message: str) -> None:
    with pytest.raises(CriterionError, match=message):
        as_criterion(name)


class MyLoss(torch.nn.Module):
    pass


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (torch.nn.CrossEntropyLoss(), "CrossEntropyLoss"),
        (torch.nn.MSELoss, "MSELoss"),
        (MyLoss(), "MyLoss"),
        (torch.nn.Linear(2, 2), "Linear"),
        (F.mse_loss, "mse_loss"),
        (F.cross_entropy, "cross_entropy"),
        (functools.partial(F.nll_loss, reduction="sum"), "partial"),
    ],
)
def test_loss_is_told_where_losses_go(loss: object, name: str) -> None:
    message = (
        rf"a loss is no criterion \(found {name}\).*losses go to probe\(model, batches, loss_fn\).*"
        r"evidence = surgery\.probe\(.*surgery\.knife\(model, 'stagnant', evidence=evidence\)"
    )
    with pytest.raises(CriterionError, match=message):
        as_criterion(loss)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (0.5, r"a criterion is an object such as Stagnant\(\), a name .* or a function.*; found float"),
        (None, "found NoneType"),
        (Stagnant, r"found Stagnant: call it, Stagnant\(\.\.\.\)"),
    ],
)
def test_what_is_no_criterion_is_refused(thing: object, message: str) -> None:
    with pytest.raises(CriterionError, match=message):
        as_criterion(thing)


def test_function_chooses_by_the_scores_that_the_evidence_supports() -> None:
    seen: dict[str, Any] = {}

    def slow(scores: Scores) -> dict[str, list[bool]]:
        seen.update(scores["fc1"])
        return {"fc1": [one < 1 for one in scores["fc1"]["stagnant"]]}

    evidence = activations(one_step(sites_of(fc1=2, fc2=2), fc1=[1, 3], fc2=[1, 1]), fc1=[1, 1], fc2=[1, 1])
    assert chosen(evidence, as_criterion(slow)) == {"fc1": (0,)}
    assert list(seen) == ["stagnant", "dormant"]


def test_function_may_return_arrays() -> None:
    criterion = as_criterion(lambda scores: {"fc1": torch.tensor(scores["fc1"]["stagnant"]) > 1})
    assert chosen(one_step(sites_of(fc1=2), fc1=[1, 3]), criterion) == {"fc1": (1,)}


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        ([True, False], CriterionError, r"Custom\(rule\) must return site name -> mask; it returned list"),
        (
            {"fc1": [True]},
            CriterionError,
            r"a mask of 2 bools for site 'fc1'; it returned bool of shape \(1,\)",
        ),
        ({"fc1": [0, 1]}, CriterionError, r"a mask of 2 bools for site 'fc1'; it returned int64 of shape"),
        ({"fc9": [True]}, SiteError, "no site is named 'fc9': did you mean 'fc1'"),
    ],
)
def test_function_that_returns_no_mask_is_refused(result: Any, error: type[Exception], message: str) -> None:
    def rule(scores: Scores) -> Any:
        return result

    with pytest.raises(error, match=message):
        chosen(None, as_criterion(rule), fc1=2)
