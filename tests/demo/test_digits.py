"""The sequence of tasks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from neuronsurgery.demo.digits import NUM_AVAILABLE, NUM_CLASSES, Experiment, stream, tasks

SMALL = Experiment(num_tasks=3, num_images=100, num_epochs=2, batch_size=32)


def test_tasks_share_the_images():
    first, *others = tasks(SMALL, seed=0)
    assert all(torch.equal(task.images, first.images) for task in others)


def test_images_are_real_and_scaled_to_one():
    task = next(tasks(Experiment(num_images=NUM_AVAILABLE), seed=0))
    assert task.images.shape == (NUM_AVAILABLE, 64)
    assert (float(task.images.min()), float(task.images.max())) == (0.0, 1.0)
    assert len(task.images.unique(dim=0)) == NUM_AVAILABLE


def test_labels_are_drawn_anew_for_each_task():
    labels = [task.labels for task in tasks(SMALL, seed=0)]
    agreements = [float((one == other).double().mean()) for one, other in pairwise(labels)]
    assert all(0.0 < agreement < 0.3 for agreement in agreements)


def test_labels_are_uniform_over_the_classes():
    experiment = Experiment(num_tasks=20, num_images=1000, num_epochs=1)
    counts = torch.cat([task.labels for task in tasks(experiment, seed=0)]).bincount(minlength=NUM_CLASSES)
    assert len(counts) == NUM_CLASSES
    assert (counts / 20_000 - 0.1).abs().max() < 0.01


def test_every_epoch_visits_every_image_once_in_another_order():
    task = next(tasks(SMALL, seed=0))
    orders = [torch.cat(batches) for batches in task.epochs]
    assert all(torch.equal(order.sort().values, torch.arange(100)) for order in orders)
    assert not torch.equal(*orders)
    assert [len(batch) for batch in task.epochs[0]] == [32, 32, 32, 4]


def test_equal_seeds_give_equal_tasks_whatever_torch_draws_between():
    undisturbed = [task.labels for task in tasks(SMALL, seed=0)]
    disturbed = []
    for task in tasks(SMALL, seed=0):
        disturbed.append(task.labels)
        torch.rand(7)
    assert all(torch.equal(one, other) for one, other in zip(undisturbed, disturbed, strict=True))


def test_other_seeds_give_other_images_and_labels():
    one, other = next(tasks(SMALL, seed=0)), next(tasks(SMALL, seed=1))
    assert not torch.equal(one.images, other.images)
    assert not torch.equal(one.labels, other.labels)


def test_streams_of_one_seed_differ():
    drawn = {float(torch.rand(1, generator=stream(0, name))) for name in ("images", "labels", "order")}
    assert len(drawn) == 3


@pytest.mark.parametrize("size", ["num_tasks", "num_images", "num_epochs", "batch_size", "num_units"])
def test_an_experiment_of_no_size_is_refused(size):
    with pytest.raises(ValueError, match=f"{size}=0 was asked for; give at least 1"):
        Experiment(**{size: 0})


def test_more_images_than_there_are_are_refused():
    with pytest.raises(ValueError, match="num_images=1798 was asked for; the data set has 1797"):
        Experiment(num_images=1798)
