"""The table, the sentence and the picture, from runs made by hand."""

from __future__ import annotations

import math

import pytest

from neuronsurgery.demo.arms import ArmName
from neuronsurgery.demo.run import Network, Run
from neuronsurgery.demo.show import Estimate, conclusion, save_figure, table

NETWORK = Network(num_units=64, num_frozen=1920, num_weights=13130)


def runs_of(arm, finals, num_tasks=20):
    """Runs whose accuracy is 0.5, and around `finals` in the last ten tasks."""
    return [
        Run(arm, seed, (0.5,) * (num_tasks - 10) + (final - 0.05, final + 0.05) * 5, 7, NETWORK, seconds=3.0)
        for seed, final in enumerate(finals)
    ]


def test_an_interval_is_student_s():
    estimate = Estimate.of([0.8, 0.9, 1.0])
    assert estimate.mean == pytest.approx(0.9)
    assert estimate.half == pytest.approx(4.303 * 0.1 / math.sqrt(3))


def test_more_seeds_than_quantiles_take_the_last():
    assert Estimate.of([0.0, 1.0] * 10).half == pytest.approx(2.262 * math.sqrt(5 / 19) / math.sqrt(20))


def test_one_seed_has_no_interval():
    assert str(Estimate.of([0.5])) == "0.50"


def test_the_table_has_final_and_area_of_each_arm():
    lines = table(runs_of(ArmName.NONE, [0.1, 0.3]) + runs_of(ArmName.KNIFE, [0.9, 0.9])).splitlines()
    row = [cell.strip() for cell in lines[3].split("|")[1:-1]]
    assert row == ["no intervention", "0.20 ± 1.27", "0.35 ± 0.64", "64", "13130", "7", "1920", "3"]
    assert lines[4].split("|")[2].strip() == "0.90 ± 0.00"


def test_the_legend_explains_each_arm_and_says_which_did_not_run():
    text = table(runs_of(ArmName.NONE, [0.1]) + runs_of(ArmName.KNIFE, [0.9]))
    assert "no intervention: " in text
    assert "wide, plain reset (not run): " in text
    assert "1 seed, no interval" in text


def test_the_conclusion_compares_with_every_other_arm_seed_by_seed():
    runs = runs_of(ArmName.NONE, [0.1, 0.1]) + runs_of(ArmName.RESET, [0.6, 0.7])
    text = conclusion(runs + runs_of(ArmName.KNIFE, [0.8, 0.9]))
    assert text.startswith("KNIFE ends at 0.85, chance at 0.10; its lead (95 %, 2 seeds, paired) is ")
    assert text.endswith("is +0.75 ± 0.64 over no intervention, +0.20 ± 0.00 over plain reset.")


def test_the_conclusion_says_when_seeds_cannot_tell():
    text = conclusion(runs_of(ArmName.RESET, [0.6, 0.9]) + runs_of(ArmName.KNIFE, [0.8, 0.8]))
    assert "+0.05 ± 1.91 (not told from zero) over plain reset." in text


def test_the_conclusion_says_when_knife_is_behind():
    text = conclusion(runs_of(ArmName.WIDE_RESET, [0.9, 0.9]) + runs_of(ArmName.KNIFE, [0.8, 0.8]))
    assert "-0.10 ± 0.00 over wide, plain reset." in text


def test_the_conclusion_of_one_seed_has_no_interval():
    text = conclusion(runs_of(ArmName.RESET, [0.6]) + runs_of(ArmName.KNIFE, [0.8]))
    assert text.endswith("its lead (one seed, no interval) is +0.20 over plain reset.")


def test_the_picture_is_a_png(tmp_path):
    path = tmp_path / "demo.png"
    save_figure(runs_of(ArmName.NONE, [0.1, 0.3]) + runs_of(ArmName.KNIFE, [0.9, 0.8]), path)
    assert path.read_bytes().startswith(b"\x89PNG")
