"""Intervals that hold what they promise, and verdicts that need both controls."""

from __future__ import annotations

import numpy as np
import pytest

from marl.errors import SettingsError
from marl.reproduce.statistics import (
    estimate,
    holm,
    interquartile_mean,
    mean,
    paired_difference,
    performance_profile,
    probability_of_improvement,
    wilson,
)
from marl.reproduce.verdict import Verdict, judge


def test_bootstrap_intervals_of_the_mean_are_nearly_students() -> None:
    scores = np.random.default_rng(1).normal(2.0, 1.0, size=60)
    found, half = estimate(scores), 2.0010 * scores.std(ddof=1) / 60**0.5
    assert found.value == pytest.approx(scores.mean())
    assert found.low == pytest.approx(scores.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(scores.mean() + half, abs=0.15 * half)


def test_intervals_of_a_mean_hold_it_in_about_95_of_100() -> None:
    generator = np.random.default_rng(2)
    held = [
        found.low <= 0 <= found.high
        for found in (estimate(generator.normal(size=30), num_draws=400) for _ in range(200))
    ]
    assert 0.89 <= np.mean(held) <= 0.985


def test_seeds_are_drawn_within_each_column() -> None:
    scores = np.array([[0.0, 10.0]] * 5)
    assert (estimate(scores).low, estimate(scores).high) == (5.0, 5.0)
    assert estimate(scores.reshape(-1)).low < 5.0


def test_an_interquartile_mean_leaves_out_a_quarter_on_either_side() -> None:
    scores = np.array([-99.0, 1.0, 2.0, 3.0, 4.0, 99.0, 99.0, -99.0])[:, None]
    assert interquartile_mean(scores) == 2.5
    assert interquartile_mean(scores[:3]) == mean(scores[:3])  # too few to leave any out


def test_pairs_make_small_differences_visible() -> None:
    generator = np.random.default_rng(3)
    luck = generator.normal(size=30)
    better = luck + 0.2 + 0.1 * generator.normal(size=30)
    assert paired_difference(better, luck).is_above_zero
    assert paired_difference(luck, better).is_below_zero
    shuffled = paired_difference(better, generator.permutation(luck))
    assert not shuffled.is_above_zero
    assert shuffled.p_value > 0.05 > paired_difference(better, luck).p_value


def test_five_seeds_are_never_significant() -> None:
    assert paired_difference(np.ones(5), np.zeros(5)).p_value == 0.0625
    assert paired_difference(np.ones(6), np.zeros(6)).p_value < 0.05


def test_equal_scores_differ_by_nothing() -> None:
    found = paired_difference(np.arange(9.0), np.arange(9.0))
    assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_the_probability_of_improvement_counts_all_pairs() -> None:
    assert probability_of_improvement(np.array([1.0, 3.0]), np.array([0.0, 2.0])).value == 0.75
    assert probability_of_improvement(np.array([1.0]), np.array([1.0])).value == 0.5


def test_a_profile_falls_with_the_threshold() -> None:
    profile = performance_profile(np.array([[0.2, 0.4], [0.6, 0.8]]), np.array([0.0, 0.4, 0.7, 1.0]))
    assert profile.tolist() == [1.0, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (9, 10, 0.5958, 0.9821)]
)
def test_intervals_of_shares_are_wilsons(successes: int, trials: int, low: float, high: float) -> None:
    found = wilson(successes, trials)
    assert [found.low, found.high] == pytest.approx([low, high], abs=1e-4)


def test_a_share_of_nothing_is_refused() -> None:
    with pytest.raises(SettingsError, match="at least one trial"):
        wilson(0, 0)


def test_holm_multiplies_the_smallest_most_and_keeps_the_order() -> None:
    assert holm({"a": 0.02, "b": 0.001, "c": 0.5, "d": 0.021}) == {"b": 0.004, "a": 0.06, "d": 0.06, "c": 0.5}


def scores_of(**shifts: float) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(4)
    luck = generator.normal(size=30)
    return {name: luck + shift + 0.1 * generator.normal(size=30) for name, shift in shifts.items()}


@pytest.mark.parametrize(
    ("method", "optimizer", "verdict"),
    [
        (0.5, 0.0, Verdict.CONFIRMED),
        (0.5, 0.5, Verdict.OPEN),  # better than nothing, and so is a fresh optimizer
        (0.5, 1.0, Verdict.CONTRADICTED),
        (0.0, 0.0, Verdict.OPEN),
        (-0.5, -0.5, Verdict.CONTRADICTED),
    ],
)
def test_only_what_beats_both_controls_is_confirmed(method: float, optimizer: float, verdict: Verdict) -> None:
    found = judge(scores_of(none=0, opt=optimizer, m=method), ["m"], controls=("none", "opt"))
    assert found["m"].verdict is verdict


def test_less_may_be_better() -> None:
    found = judge(scores_of(none=0, opt=0, m=-0.5), ["m"], controls=("none", "opt"), is_less_better=True)
    assert found["m"].verdict is Verdict.CONFIRMED


@pytest.mark.parametrize(
    ("method", "verdict"),
    [(0.04, Verdict.OPEN), (0.06, Verdict.CONFIRMED), (-0.04, Verdict.OPEN), (-0.06, Verdict.CONTRADICTED)],
)
def test_a_certain_difference_that_is_too_small_to_count_is_open(method: float, verdict: Verdict) -> None:
    luck = np.random.default_rng(3).normal(size=30)
    scores = {"none": luck, "opt": luck, "m": luck + method}
    found = judge(scores, ["m"], controls=("none", "opt"), smallest_effect=0.05)["m"]
    assert found.verdict is verdict
    assert found.to_nothing.value == pytest.approx(method)  # what is shown is the difference itself
    small = judge(scores, ["m"], controls=("none", "opt"))["m"].verdict
    assert small is (Verdict.CONFIRMED if method > 0 else Verdict.CONTRADICTED)


def test_what_is_worse_has_no_small_p_of_being_better() -> None:
    luck = np.random.default_rng(3).normal(size=30)
    found = judge({"none": luck, "opt": luck, "m": luck - 1}, ["m"], controls=("none", "opt"))["m"]
    assert found.p_value == 1


def test_many_methods_make_a_verdict_harder_to_get() -> None:
    generator = np.random.default_rng(11)
    none, opt = (np.zeros(30) for _ in range(2))
    luck = generator.normal(size=30)
    scores = {"none": none, "opt": opt, "m": 0.45 + (luck - luck.mean()) / luck.std()}
    many = {f"other {n}": generator.normal(size=30) for n in range(12)}
    alone = judge(scores, ["m"], controls=("none", "opt"))["m"]
    among = judge({**scores, **many}, ["m", *many], controls=("none", "opt"))["m"]
    assert alone.p_value < among.p_value
    assert (alone.verdict, among.verdict) == (Verdict.CONFIRMED, Verdict.OPEN)


def test_intervals_are_those_of_rliable() -> None:
    # arch, on which it builds, fails in several ways with pandas and numpy that it does not know
    try:
        from rliable import library, metrics
    except Exception as error:
        pytest.skip(f"rliable cannot be imported: {error}")
    scores = np.random.default_rng(5).normal(size=(30, 3))
    points, intervals = library.get_interval_estimates(
        {"m": scores}, lambda each: np.array([metrics.aggregate_iqm(each)]), reps=4000
    )
    found = estimate(scores, interquartile_mean, num_draws=4000)
    assert found.value == pytest.approx(float(points["m"][0]), abs=1e-9)
    assert [found.low, found.high] == pytest.approx(intervals["m"][:, 0].tolist(), abs=0.02)
    other = np.random.default_rng(6).normal(size=(30, 1))
    expected = metrics.probability_of_improvement(scores[:, :1], other)
    assert probability_of_improvement(scores[:, 0], other[:, 0]).value == pytest.approx(float(expected), abs=1e-9)
