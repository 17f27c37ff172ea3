from __future__ import annotations

import numpy as np
import pytest
import torch

from neuronsurgery.errors import EvidenceError, SiteError
from neuronsurgery.evidence import Array, Evidence, Quantity, relative, update_activity
from tests.core_values import sites_of

UA, RUA = Quantity.UPDATE_ACTIVITY, Quantity.RELATIVE_UPDATE_ACTIVITY
ONES = np.ones(2)


def evidence_of(*gradients: list[float]) -> Evidence:
    """Steps of a site of two units whose rows have norm 1, so that UA is the gradient norm."""
    evidence = Evidence(sites_of(fc1=2))
    for norms in gradients:
        evidence.record_step({"fc1": (ONES, np.array(norms))})
    return evidence


def measured(evidence: Evidence, quantity: Quantity) -> list[float]:
    values: list[float] = evidence.measured("fc1")[quantity].tolist()
    return values


def test_update_activity_by_hand() -> None:
    # |grad w| / |w|: 3/6, 4/2, 0/5
    activity = update_activity(np.array([6.0, 2.0, 5.0]), np.array([3.0, 4.0, 0.0]))
    np.testing.assert_allclose(activity, [0.5, 2.0, 0.0], rtol=1e-12)


def test_update_activity_of_a_zero_row_is_finite() -> None:
    # 1e-6 / (0 + 1e-12) = 1e6
    np.testing.assert_allclose(update_activity(np.zeros(1), np.array([1e-6])), [1e6])


def test_relative_by_hand() -> None:
    # mean(1, 2, 6) = 3
    np.testing.assert_allclose(relative(np.array([1.0, 2.0, 6.0])), [1 / 3, 2 / 3, 2], rtol=1e-15)


def test_relative_to_a_zero_mean_is_zero() -> None:
    assert relative(np.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_relative_to_a_mean_that_is_not_finite_is_nan(bad: float) -> None:
    assert np.isnan(relative(np.array([1.0, bad]))).all()


def test_update_activity_is_the_mean_over_steps() -> None:
    # UA: (1, 3), (4, 0): mean (2.5, 1.5)
    np.testing.assert_allclose(measured(evidence_of([1, 3], [4, 0]), UA), [2.5, 1.5])


def test_relative_update_activity_is_normalized_in_each_step() -> None:
    # shares: (1, 3) / 2 = (0.5, 1.5); (40, 0) / 20 = (2, 0): mean (1.25, 0.75)
    np.testing.assert_allclose(measured(evidence_of([1, 3], [40, 0]), RUA), [1.25, 0.75])


def test_evidence_is_complete_after_every_step() -> None:
    evidence = evidence_of([1, 3])
    assert measured(evidence, RUA) == pytest.approx([0.5, 1.5])
    evidence.record_step({"fc1": (ONES, np.array([3.0, 1.0]))})
    assert measured(evidence, RUA) == pytest.approx([1.0, 1.0])


def test_step_without_gradient_counts_for_the_activity_but_not_for_the_relative_one() -> None:
    evidence = evidence_of([1, 3], [0, 0])
    np.testing.assert_allclose(measured(evidence, UA), [0.5, 1.5])
    np.testing.assert_allclose(measured(evidence, RUA), [0.5, 1.5])


def test_gradients_that_were_always_zero_measure_zero() -> None:
    evidence = evidence_of([0, 0], [0, 0])
    assert measured(evidence, UA) == measured(evidence, RUA) == [0, 0]


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_step_that_is_not_finite_leaves_no_trace_in_its_site(bad: float) -> None:
    evidence = evidence_of([1, 3], [bad, 1])
    np.testing.assert_allclose(measured(evidence, UA), [1, 3])
    np.testing.assert_allclose(measured(evidence, RUA), [0.5, 1.5])
    assert evidence.num_samples("fc1", UA) == 1


def test_gradients_that_were_never_finite_measure_nan() -> None:
    evidence = evidence_of([np.nan, 1])
    assert np.isnan(measured(evidence, UA)).all()
    assert np.isnan(measured(evidence, RUA)).all()


@pytest.mark.parametrize("usable", [False, np.asarray(False), np.bool_(False), torch.tensor(False)])
def test_unusable_step_is_only_counted_as_skipped(usable: Array) -> None:
    xp = torch if isinstance(usable, torch.Tensor) else np
    evidence = Evidence(sites_of(fc1=2))
    evidence.record_step({"fc1": (xp.ones(2), xp.ones(2))})
    for norm in (5.0, float("nan")):
        evidence.record_step({"fc1": (xp.ones(2), xp.full((2,), norm))}, usable=usable)
    assert (evidence.num_steps, evidence.num_skipped) == (1, 2)
    assert measured(evidence, UA) == pytest.approx([1, 1])


@pytest.mark.parametrize("usable", [True, np.asarray(True), torch.tensor(True)])
def test_usable_step_counts(usable: Array) -> None:
    xp = torch if isinstance(usable, torch.Tensor) else np
    evidence = Evidence(sites_of(fc1=2))
    evidence.record_step({"fc1": (xp.ones(2), xp.ones(2))}, usable=usable)
    assert (evidence.num_steps, evidence.num_skipped) == (1, 0)


BIASED, RELATIVE_BIASED = Quantity.UPDATE_ACTIVITY_WITH_BIAS, Quantity.RELATIVE_UPDATE_ACTIVITY_WITH_BIAS


def test_norms_with_the_bias_are_a_measure_of_their_own_in_the_same_steps() -> None:
    evidence = Evidence(sites_of(fc1=2))
    one, two = (ONES, np.array([1.0, 3.0])), (ONES, np.array([4.0, 4.0]))
    evidence.record_step({"fc1": one})
    assert set(evidence.measured("fc1")) == {UA, RUA}
    evidence.record_step({"fc1": one}, with_bias={"fc1": two})
    evidence.record_step({"fc1": one}, usable=False, with_bias={"fc1": one})
    evidence.record_step({"fc1": one}, with_bias={"fc1": (ONES, np.array([1.0, np.nan]))})  # of this site alone
    assert (evidence.num_steps, evidence.num_skipped) == (3, 1)
    assert [evidence.num_samples("fc1", quantity) for quantity in (UA, BIASED)] == [3, 1]
    assert measured(evidence, RUA) == [0.5, 1.5]
    assert measured(evidence, BIASED) == pytest.approx([4.0, 4.0])
    assert measured(evidence, RELATIVE_BIASED) == [1.0, 1.0]


def test_norms_with_the_bias_that_stand_still_in_each_step_have_no_share() -> None:
    evidence = Evidence(sites_of(fc1=2))
    evidence.record_step({"fc1": (ONES, ONES)}, with_bias={"fc1": (ONES, 0 * ONES)})
    assert measured(evidence, RELATIVE_BIASED) == [0.0, 0.0]


def test_norms_with_the_bias_of_a_wrong_shape_are_refused_before_anything_counts() -> None:
    evidence = Evidence(sites_of(fc1=2))
    with pytest.raises(EvidenceError, match=r"site 'fc1' has 2 units; found an array of shape \(3,\)"):
        evidence.record_step({"fc1": (ONES, ONES)}, with_bias={"fc1": (np.ones(3), np.ones(3))})
    assert (evidence.num_steps, dict(evidence.measured("fc1"))) == (0, {})


def test_samples_with_weights_count_by_their_sum() -> None:
    evidence = Evidence(sites_of(fc1=2))
    evidence.record_samples("fc1", np.array([3.0, 6.0]), np.asarray(1.5), Quantity.ACTIVATION)
    assert evidence.num_samples("fc1", Quantity.ACTIVATION) == 1.5
    again = Evidence(evidence.sites)
    again.load_state_dict(evidence.state_dict())
    for one in (evidence, again):
        one.record_samples("fc1", np.array([1.0, 0.0]), 1, Quantity.ACTIVATION)  # without: each counts 1
        assert measured(one, Quantity.ACTIVATION) == [4 / 2.5, 6 / 2.5]
    assert isinstance(again.num_samples("fc1", UA), int)


def test_only_unusable_steps_measure_nan() -> None:
    evidence = Evidence(sites_of(fc1=2))
    evidence.record_step({"fc1": (ONES, ONES)}, usable=np.asarray(False))
    assert np.isnan(measured(evidence, UA)).all()


def test_site_absent_from_a_step_gets_no_count() -> None:
    evidence = Evidence(sites_of(fc1=2, fc2=2))
    evidence.record_step({"fc1": (ONES, ONES), "fc2": (ONES, ONES)})
    evidence.record_step({"fc1": (ONES, ONES)})
    assert [evidence.num_samples(name, UA) for name in ("fc1", "fc2")] == [2, 1]
    assert evidence.num_steps == 2


def test_samples_are_averaged_over_batches_of_any_size() -> None:
    # sums (3, 6) over 3 samples and (1, 0) over 1: (4, 6) / 4
    evidence = Evidence(sites_of(fc1=2))
    evidence.record_samples("fc1", np.array([3.0, 6.0]), 3, Quantity.ACTIVATION)
    evidence.record_samples("fc1", np.array([1.0, 0.0]), 1, Quantity.ACTIVATION)
    assert measured(evidence, Quantity.ACTIVATION) == [1.0, 1.5]
    assert evidence.num_samples("fc1", Quantity.ACTIVATION) == 4


def test_only_what_was_recorded_is_measured() -> None:
    evidence = Evidence(sites_of(fc1=2, fc2=2))
    evidence.record_samples("fc1", ONES, 1, Quantity.ACTIVATION_GRADIENT)
    assert set(evidence.measured("fc1")) == {Quantity.ACTIVATION_GRADIENT}
    assert evidence.measured("fc2") == {}
    assert evidence.num_samples("fc2", Quantity.ACTIVATION) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_measures_what_numpy_does(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sites = sites_of(fc1=50)
    by_torch, by_numpy = Evidence(sites), Evidence(sites)
    for _ in range(4):
        norms = torch.rand(2, 50, generator=generator, dtype=dtype)
        by_torch.record_step({"fc1": (norms[0], norms[1])})
        by_numpy.record_step({"fc1": (norms[0].numpy(), norms[1].numpy())})
        by_torch.record_samples("fc1", norms[0], 2, Quantity.ACTIVATION)
        by_numpy.record_samples("fc1", norms[0].numpy(), 2, Quantity.ACTIVATION)
    for quantity, values in by_torch.measured("fc1").items():
        assert values.dtype == dtype
        rtol = 1e-12 if dtype == torch.float64 else 1e-5
        np.testing.assert_allclose(values, by_numpy.measured("fc1")[quantity], rtol=rtol)


def test_recording_keeps_the_dtype_of_numpy_norms() -> None:
    evidence = Evidence(sites_of(fc1=2))
    evidence.record_step({"fc1": (ONES.astype("float32"), ONES.astype("float32"))})
    assert {values.dtype for values in evidence.measured("fc1").values()} == {np.dtype("float32")}


def test_recording_does_not_read_from_the_device() -> None:
    """Meta tensors have no values: whatever asks for one raises."""
    evidence = Evidence(sites_of(fc1=2))
    norms, usable = torch.ones(2, device="meta"), torch.tensor(True, device="meta")
    for _ in range(2):
        evidence.record_step({"fc1": (norms, norms)}, usable=usable)
        evidence.record_samples("fc1", norms, 3, Quantity.ACTIVATION)
    assert evidence.measured("fc1")[UA].device.type == "meta"


def test_recording_leaves_the_norms_as_they_are() -> None:
    weight_norm, gradient_norm = np.array([1.0, 2.0]), np.array([3.0, np.nan])
    Evidence(sites_of(fc1=2)).record_step({"fc1": (weight_norm, gradient_norm)})
    np.testing.assert_array_equal(gradient_norm, [3.0, np.nan])


def test_unknown_site_offers_near_names() -> None:
    with pytest.raises(SiteError, match="no site is named 'fc2': did you mean 'fc1'"):
        Evidence(sites_of(fc1=2)).record_step({"fc2": (ONES, ONES)})


def test_wrong_shape_is_refused_before_anything_is_recorded() -> None:
    evidence = Evidence(sites_of(fc1=2, fc2=3))
    with pytest.raises(EvidenceError, match=r"site 'fc2' has 3 units; found an array of shape \(2,\)"):
        evidence.record_step({"fc1": (ONES, ONES), "fc2": (ONES, ONES)})
    assert (evidence.num_steps, evidence.measured("fc1")) == (0, {})


def test_update_activities_are_no_samples() -> None:
    with pytest.raises(EvidenceError, match="'update_activity' is measured over steps: use record_step"):
        Evidence(sites_of(fc1=2)).record_samples("fc1", ONES, 1, UA)


def test_evidence_prints_as_a_table() -> None:
    evidence = evidence_of([1, 3])
    evidence.record_step({}, usable=False)
    evidence.record_samples("fc1", ONES, 32, Quantity.ACTIVATION)
    lines = str(evidence).splitlines()
    assert lines[0] == "Evidence: 1 step, 1 skipped"
    assert lines[3].startswith("| fc1  |     2 |     1 |      32 | update_activity, relative_update_activity")


def test_evidence_of_nothing_prints_as_a_table() -> None:
    assert "| fc1  |     2 |     0 |       0 | nothing    |" in str(Evidence(sites_of(fc1=2)))
