"""All runs: every arm and seed once, the wide arms as large as KNIFE's network has become."""

from __future__ import annotations

import pytest

from neuronsurgery.demo.arms import ArmName
from neuronsurgery.demo.digits import Experiment
from neuronsurgery.demo.networks import build_network, num_stored_weights
from neuronsurgery.demo.run import Run
from neuronsurgery.demo.schedule import run_all

TINY = Experiment(num_tasks=2, num_images=64, num_epochs=3, batch_size=16, num_units=16)


def runs_of(num_workers, **callbacks):
    return run_all(TINY, list(ArmName), num_seeds=2, num_workers=num_workers, **callbacks)


@pytest.fixture(scope="module")
def runs():
    return runs_of(1)


def test_every_arm_runs_once_with_every_seed_in_order(runs):
    assert [(run.arm, run.seed) for run in runs] == [(arm, seed) for arm in ArmName for seed in (0, 1)]


@pytest.mark.parametrize("arm", [ArmName.WIDE, ArmName.WIDE_RESET])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_wide_network_is_the_smallest_that_stores_what_knife_s_does(runs, arm, seed):
    by_name = {(run.arm, run.seed): run.network for run in runs}
    knife, wide = by_name[ArmName.KNIFE, seed], by_name[arm, seed]
    assert knife.num_frozen > 0
    smaller = num_stored_weights(build_network(wide.num_units - 1, seed=0))
    assert smaller < knife.num_weights <= wide.num_weights


def test_callbacks_hear_of_every_task_and_every_run():
    ticks: list[ArmName] = []
    ended: list[Run] = []
    runs = runs_of(1, on_task=ticks.append, on_run=ended.append)
    assert sorted(ticks) == sorted(run.arm for run in runs for _ in run.accuracies)
    assert sorted(ended, key=runs.index) == runs


def test_two_processes_give_the_numbers_of_one(runs):
    ticks: list[ArmName] = []
    parallel = runs_of(2, on_task=ticks.append)
    assert len(ticks) == 2 * len(parallel)
    for one, other in zip(runs, parallel, strict=True):
        assert (one.arm, one.seed, one.accuracies, one.network) == (
            other.arm,
            other.seed,
            other.accuracies,
            other.network,
        )


def test_a_wide_arm_without_knife_s_is_refused():
    with pytest.raises(ValueError, match=r"without KNIFE's, which sets its width: add ArmName\.KNIFE"):
        run_all(TINY, [ArmName.WIDE], num_seeds=1, num_workers=1)


def test_an_error_in_a_run_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        runs_of(1, on_task=lambda arm: 1 / 0)
