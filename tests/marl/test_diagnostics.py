"""Diagnostics against loops over a batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from marl.diagnostics import diagnose
from marl.learner import Learner
from marl.mixers import QMIX
from marl.settings import Algorithm, MixerSettings, QMIXSettings, QPLEXSettings, VDNSettings, preset
from marl.stacking import stack_learners
from tests.marl.batches import made_up_episodes, new_learner

MIXERS: dict[str, MixerSettings] = {
    "vdn": VDNSettings(),
    "qmix": QMIXSettings(6, 2, 8),
    "qplex": QPLEXSettings(2, 2, 6, 8),
}


def learner_of(algorithm: Algorithm, seed: int = 0) -> Learner:
    return new_learner(replace(preset("pymarl", algorithm), mixer=MIXERS[algorithm]), seed=seed)


@pytest.mark.parametrize("algorithm", MIXERS)
def test_figures_are_those_of_a_loop_over_the_steps_that_happened(algorithm: Algorithm) -> None:
    learner, episodes = learner_of(algorithm), made_up_episodes()
    found = diagnose(learner, episodes)
    assert all(parameter.grad is None for parameter in learner.online.parameters())

    estimates = learner.estimate(episodes)
    mixing = torch.autograd.grad(estimates.q_tot.sum(), estimates.chosen_qs, retain_graph=True)[0]
    of_loss = torch.autograd.grad(estimates.loss, estimates.chosen_qs)[0]
    spreads, slopes, losses, inputs = [], [], [], []
    for episode, t in episodes["mask"].nonzero().tolist():
        for i in range(3):
            available = estimates.agent_qs[episode, t, i].detach()[episodes["avail_actions"][episode, t, i]]
            spreads.append(float(available.max() - available.min()))
            slopes.append(float(mixing[episode, t, i]))
            losses.append(abs(float(of_loss[episode, t, i])))
        if isinstance(mixer := learner.online.mixer, QMIX):
            chosen, state = estimates.chosen_qs[episode, t].detach(), episodes["state"][episode, t]
            inputs += mixer.mixing_inputs(chosen, state).tolist()
    assert abs(float(found.agent_q_spread) - sum(spreads) / len(spreads)) <= 1e-12
    assert abs(float(found.min_mixing_gradient) - min(slopes)) <= 1e-12
    assert abs(float(found.mean_loss_gradient) - sum(losses) / len(losses)) <= 1e-12
    if algorithm == "qmix":
        share = sum(value < -3 for value in inputs) / len(inputs)
        assert found.saturated_share is not None and abs(float(found.saturated_share) - share) <= 1e-12
    else:
        assert found.saturated_share is None


def test_saturated_units_are_counted() -> None:
    learner, episodes = learner_of("qmix"), made_up_episodes()
    with torch.no_grad():
        learner.online.get_parameter("mixer.b1.weight").zero_()
        learner.online.get_parameter("mixer.b1.bias")[:2] = -1000.0
        learner.online.get_parameter("mixer.b1.bias")[2:] = 1000.0
    share = diagnose(learner, episodes).saturated_share
    assert share is not None and abs(float(share) - 2 / 6) <= 1e-12


def test_seeds_side_by_side_have_their_own_figures() -> None:
    learners, episodes = [learner_of("qmix", seed) for seed in range(2)], made_up_episodes()
    found = diagnose(stack_learners(learners), torch.stack([episodes, episodes]))
    for seed, learner in enumerate(learners):
        alone = diagnose(learner, episodes)
        for name, value in vars(alone).items():
            assert torch.allclose(getattr(found, name)[seed], value), name
