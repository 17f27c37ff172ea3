"""One run: reproducible, and comparable between arms."""

from __future__ import annotations

import pytest
import torch

from neuronsurgery.demo.arms import ArmName
from neuronsurgery.demo.digits import Experiment
from neuronsurgery.demo.run import Job, run

TINY = Experiment(num_tasks=2, num_images=64, num_epochs=3, batch_size=16, num_units=16)


def numbers(result):
    return result.accuracies, result.num_operated, result.network


@pytest.mark.parametrize("arm", [ArmName.NONE, ArmName.RESET, ArmName.KNIFE])
def test_equal_jobs_give_equal_numbers(arm):
    job = Job(TINY, arm, seed=0, num_units=16)
    first = run(job)
    torch.manual_seed(12345)
    assert numbers(run(job)) == numbers(first)


def test_another_seed_gives_other_numbers():
    one, other = (run(Job(TINY, ArmName.NONE, seed, num_units=16)) for seed in (0, 1))
    assert one.accuracies != other.accuracies


def test_an_accuracy_and_a_tick_per_task():
    ticks: list[ArmName] = []
    result = run(Job(TINY, ArmName.RESET, seed=0, num_units=16), ticks.append)
    assert ticks == [ArmName.RESET] * 2
    assert len(result.accuracies) == 2
    assert all(0.0 <= accuracy <= 1.0 for accuracy in result.accuracies)
    assert result.seconds > 0.0


def test_a_task_that_is_trained_for_long_is_learned():
    experiment = Experiment(num_tasks=1, num_images=64, num_epochs=60, batch_size=16)
    assert run(Job(experiment, ArmName.NONE, seed=0, num_units=64)).accuracies[0] > 0.9


def test_arms_differ_only_from_the_first_intervention_on():
    """With one epoch a task, interventions follow all training, and KNIFE's keep the output."""
    experiment = Experiment(num_tasks=2, num_images=64, num_epochs=1, batch_size=8, num_units=16)
    plain, knife = (run(Job(experiment, arm, 0, num_units=16)) for arm in (ArmName.NONE, ArmName.KNIFE))
    assert knife.num_operated > 0
    assert plain.accuracies[0] == knife.accuracies[0]


def arithmetic():
    """The number of threads, and whether denormal numbers survive."""
    return torch.get_num_threads(), bool(torch.tensor([1e-38]) * 1e-3 != 0.0)


def test_a_run_computes_in_one_thread_without_denormals_and_restores_both():
    num_threads, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        run(Job(TINY, ArmName.NONE, 0, num_units=16), lambda arm: seen.append(arithmetic()))
        assert set(seen) == {(1, False)}
        assert arithmetic() == (2, True)
    finally:
        torch.set_num_threads(num_threads)
