from __future__ import annotations

import numpy as np
import pytest

from neuronsurgery.criteria import Custom, Dormant, GraMa, Lowest, Random, Stagnant, Units
from neuronsurgery.errors import EvidenceError
from neuronsurgery.evidence import Evidence, Quantity
from neuronsurgery.scores import score
from neuronsurgery.selection import select
from tests.core_values import activations, one_step, sites_of

SITES = sites_of(fc1=2, fc2=3)
REMEDY = r"measure with surgery\.observe\(model\) or surgery\.probe\(model, batches, loss_fn\)"


def test_scores_are_read_by_site_and_name() -> None:
    scores = score(SITES, one_step(SITES, fc1=[1, 3], fc2=[1, 1, 1]), Stagnant())
    assert scores["fc1"]["stagnant"] == pytest.approx((0.5, 1.5))
    assert list(scores) == ["fc1", "fc2"]
    assert len(scores) == 2
    assert "fc3" not in scores


def test_every_leaf_has_its_scores() -> None:
    evidence = activations(one_step(sites_of(fc1=2), fc1=[1, 3]), fc1=[3, 1])
    scores = score(evidence.sites, evidence, Stagnant() & ~Lowest(0.5, of="dormant") | Random(0.5))
    assert list(scores["fc1"]) == ["stagnant", "dormant", "random"]
    assert scores["fc1"]["dormant"] == (1.5, 0.5)


def test_scores_are_of_the_sites_asked_for() -> None:
    evidence = one_step(SITES, fc1=[1, 3], fc2=[1, 1, 1])
    assert list(score(SITES.subset(["fc2"]), evidence, Stagnant())) == ["fc2"]


@pytest.mark.parametrize(
    ("criterion", "what", "remedy"),
    [
        (Stagnant(), "gradients", rf"call loss\.backward\(\) first, or {REMEDY}"),
        (Dormant(), "activations", REMEDY),
        (GraMa(), "activation gradients", REMEDY),
    ],
    ids=["stagnant", "dormant", "grama"],
)
@pytest.mark.parametrize("evidence", [None, Evidence(SITES)], ids=["none", "empty"])
def test_criterion_without_evidence_says_what_to_measure(evidence, criterion, what, remedy) -> None:
    asked = f"criterion '{criterion.name}' needs the {what} of site 'fc1' and 1 more; found none: "
    with pytest.raises(EvidenceError, match=asked + remedy):
        score(SITES, evidence, criterion)


def test_criterion_that_needs_activations_says_that_there_are_only_gradients() -> None:
    message = "criterion 'dormant' needs the activations of site 'fc1'; found only gradients: measure with"
    evidence = one_step(sites_of(fc1=2), fc1=[1, 3])
    with pytest.raises(EvidenceError, match=message):
        score(evidence.sites, evidence, Stagnant() | Dormant())


def test_steps_that_were_all_skipped_leave_no_site_scored() -> None:
    evidence = Evidence(SITES)
    evidence.record_step({"fc1": (np.ones(2), np.ones(2)), "fc2": (np.ones(3), np.ones(3))}, np.asarray(False))
    scores = score(SITES, evidence, Stagnant())
    assert scores.unscored == dict.fromkeys(SITES, "gradients are not finite")


@pytest.mark.parametrize("criterion", [Units({"fc1": [0]}), Random(0.5), ~Units({})], ids=str)
def test_criterion_that_measures_nothing_needs_no_evidence(criterion) -> None:
    assert list(score(SITES, None, criterion)) == ["fc1", "fc2"]


@pytest.mark.parametrize(
    ("measured_on", "found"),
    [(sites_of(fc1=2), "site 'fc2' has 3 units here; the evidence has no such site"),
     (sites_of(fc1=4, fc2=3), "site 'fc1' has 2 units here; the evidence has 4 units")],
)  # fmt: skip
def test_evidence_of_another_model_is_refused(measured_on, found: str) -> None:
    with pytest.raises(EvidenceError, match=f"evidence of another model: {found}"):
        score(SITES, Evidence(measured_on), Stagnant())


def test_evidence_from_before_an_operation_is_still_of_this_model() -> None:
    evidence = one_step(SITES, fc1=[1, 3], fc2=[1, 1, 1])
    assert list(score(sites_of(num_frozen=2, fc1=2, fc2=3), evidence, Stagnant())) == ["fc1", "fc2"]


@pytest.mark.parametrize(
    ("norms", "reason"),
    [
        ([0, 0], "gradients are all zero"),
        ([np.nan, 1], "gradients are not finite"),
        ([np.inf, 1], "gradients are not finite"),
    ],
)
@pytest.mark.parametrize("average", ["scores", "ua"])
@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: ~one, lambda one: one | Units({"fc1": [0]})])
def test_layer_of_zero_or_nan_gradients_is_named_and_never_selected(wrap, average, norms, reason) -> None:
    scores = score(SITES, one_step(SITES, fc1=norms, fc2=[0, 1, 1]), wrap(Stagnant(average=average)))
    assert scores.unscored == {"fc1": reason}
    assert set(select(scores).units) == {"fc2"}


@pytest.mark.parametrize(
    ("quantity", "criterion", "what"),
    [
        (Quantity.ACTIVATION, Dormant(), "activations"),
        (Quantity.ACTIVATION_GRADIENT, GraMa(), "activation gradients"),
    ],
)
@pytest.mark.parametrize(
    ("values", "problem"),
    [([0, 0], "are all zero"), ([np.nan, 1], "are not finite"), ([np.inf, 1], "are not finite")],
)
def test_layer_of_zero_or_nan_activations_is_named(values, problem: str, quantity, criterion, what: str) -> None:
    evidence = activations(Evidence(sites_of(fc1=2)), quantity, fc1=values)
    scores = score(evidence.sites, evidence, criterion)
    assert scores.unscored == {"fc1": f"{what} {problem}"}
    assert select(scores).units == {}


@pytest.mark.parametrize("criterion", [Stagnant(), ~Stagnant(), Custom(lambda scores: {"fc2": [True] * 3})], ids=str)
def test_site_without_gradient_where_others_have_one_is_named(criterion) -> None:
    scores = score(SITES, one_step(SITES, fc1=[1, 9]), criterion)
    assert scores.unscored == {"fc2": "received no gradient"}
    assert "fc2" not in select(scores).units


def test_site_without_activations_where_others_have_some_is_named() -> None:
    scores = score(SITES, activations(Evidence(SITES), fc1=[1, 1]), Dormant())
    assert scores.unscored == {"fc2": "its activations were not recorded"}


def test_scores_of_no_sites_are_empty() -> None:
    assert dict(score(sites_of(), None, Stagnant()).values) == {}


def test_scores_print_as_a_table() -> None:
    text = str(score(SITES, one_step(SITES, fc1=[1, 3], fc2=[0, 0, 0]), Stagnant()))
    lines = text.splitlines()
    assert lines[0] == "Scores for Stagnant(threshold=0.25, average='scores')"
    assert lines[3] == "| fc1  | stagnant |     2 | 0.5 |    1 | 1.5 |"
    assert lines[4:] == ["unscored: fc2: gradients are all zero"]
