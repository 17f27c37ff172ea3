"""Shares of units whose weights are generated, against a loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from marl.generated import NAME, all_shares, generated_stagnant_share
from marl.learner import Learner
from marl.mixers import QMIX
from marl.settings import Algorithm, QMIXSettings, preset
from marl.stacking import stack_learners
from tests.marl.batches import made_up_episodes, new_learner


def learner_of(seed: int = 0) -> Learner:
    return new_learner(replace(preset("pymarl", "qmix"), mixer=QMIXSettings(6, 2, 8)), seed=seed)


def hardly_counting(learner: Learner, num_units: int) -> Learner:
    """What comes behind the first units reaches the joint value by a thousandth."""
    with torch.no_grad():
        for name in ("mixer.w2.2.weight", "mixer.w2.2.bias"):
            learner.online.get_parameter(name)[:num_units] *= 1e-3
    return learner


@pytest.mark.parametrize("num_units", [0, 2])
def test_the_share_is_that_of_a_loop_over_units_and_the_steps_that_happened(num_units: int) -> None:
    learner, episodes = hardly_counting(learner_of(), num_units), made_up_episodes()
    share = generated_stagnant_share(learner, episodes)
    assert all(parameter.grad is None for parameter in learner.online.parameters())

    mixer, seen = learner.online.mixer, []
    assert isinstance(mixer, QMIX)
    handle = mixer.w1.register_forward_hook(lambda _, inputs, output: seen.append(output))
    (gradient,) = torch.autograd.grad(learner.estimate(episodes).loss, seen)
    handle.remove()
    activities = []
    for unit in range(6):
        steps = episodes["mask"].nonzero().tolist()
        weights = [seen[0][b, t, n * 6 + unit].item() for b, t in steps for n in range(3)]
        gradients = [gradient[b, t, n * 6 + unit].item() for b, t in steps for n in range(3)]
        activities.append((sum(g * g for g in gradients) / sum(w * w for w in weights)) ** 0.5)
    expected = sum(each < 0.25 * sum(activities) / 6 for each in activities) / 6
    assert share is not None and float(share) == pytest.approx(expected)
    assert num_units == 0 or expected == pytest.approx(num_units / 6)


def test_steps_that_did_not_happen_count_for_nothing() -> None:
    learner, episodes = learner_of(), made_up_episodes()
    did_not = (episodes["mask"] == 0).nonzero(as_tuple=True)
    assert len(did_not[0])
    with torch.no_grad():  # units that are large where nothing happened
        learner.online.get_parameter("mixer.w1.2.weight")[:2] *= 0.01
        learner.online.get_parameter("mixer.w1.2.weight")[:2, 0] += 5
    before = generated_stagnant_share(learner, episodes)
    episodes["state"][did_not] = 100.0 * torch.rand(len(did_not[0]), episodes["state"].shape[-1])
    assert generated_stagnant_share(learner, episodes) == before


def test_seeds_side_by_side_have_their_own_shares() -> None:
    learners, episodes = [hardly_counting(learner_of(seed), 2 * seed) for seed in range(2)], made_up_episodes()
    together = generated_stagnant_share(stack_learners(learners), torch.stack([episodes, episodes]))
    alone = [generated_stagnant_share(learner, episodes) for learner in learners]
    assert together is not None and together.tolist() == [float(each) for each in alone if each is not None]


@pytest.mark.parametrize("algorithm", ["vdn", "qplex"])
def test_mixers_without_such_units_have_no_such_share(algorithm: Algorithm) -> None:
    learner = new_learner(preset("pymarl", algorithm))
    assert generated_stagnant_share(learner, made_up_episodes()) is None
    assert NAME not in all_shares(learner, made_up_episodes())
