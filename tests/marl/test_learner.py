"""The learner against independent loops over its formulas, and the rules that such loops could share a fault in."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from marl.errors import BatchError, CheckpointError, SettingsError
from marl.learner import Learner, make_learner
from marl.replay import EpisodeReplay
from marl.settings import (
    Algorithm,
    HardTargets,
    LossSettings,
    MixerSettings,
    OptimizerSettings,
    PolyakTargets,
    PresetName,
    QMIXSettings,
    QPLEXSettings,
    Settings,
    VDNSettings,
    preset,
)
from marl.stacking import load_learner, stack_learners
from tests.marl import reference
from tests.marl.batches import made_up_episodes, new_learner

ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)

# What the presets say of the loss, from the published settings and not from the package.
LOSSES = {
    ("pymarl", "vdn"): (0.0, 1.0),
    ("pymarl", "qmix"): (0.0, 1.0),
    ("pymarl", "qplex"): (0.0, 1.0),
    ("reborn", "vdn"): (0.0, 1.0),
    ("reborn", "qmix"): (0.0, 1.0),
    ("reborn", "qplex"): (0.6, 0.5),
    ("pymarl2", "vdn"): (0.6, 0.5),
    ("pymarl2", "qmix"): (0.6, 0.5),
    ("pymarl2", "qplex"): (0.6, 0.5),
}


def small(algorithm: Algorithm, **changes: Any) -> Settings:
    """Settings of few units, to be quick."""
    mixers: dict[str, MixerSettings] = {
        "vdn": VDNSettings(),
        "qmix": QMIXSettings(embed_size=6, hypernet_size=8),
        "qplex": QPLEXSettings(num_heads=2, adversary_layers=2, adversary_size=6, hypernet_size=8),
    }
    settings = preset("pymarl", algorithm)
    return replace(settings, mixer=mixers[algorithm], agent=replace(settings.agent, hidden_size=8), **changes)


def gradients(learner: Learner) -> dict[str, Tensor]:
    return {name: _gradient(parameter).clone() for name, parameter in learner.online.named_parameters()}


@pytest.mark.parametrize(("name", "algorithm"), LOSSES)
def test_preset_has_the_loss_and_gradient_of_an_independent_loop(name: PresetName, algorithm: Algorithm) -> None:
    learner, episodes = new_learner(preset(name, algorithm)), made_up_episodes(state="bytes")
    loss = learner.estimate(episodes).loss
    loss.backward()

    weights = {name: value.detach().clone().requires_grad_() for name, value in learner.online.named_parameters()}
    td_lambda, scale = LOSSES[name, algorithm]
    slow = dict(learner.target.named_parameters())
    expected = reference.learner_loss(weights, slow, episodes, algorithm, gamma=0.99, td_lambda=td_lambda, scale=scale)
    expected.backward()
    assert abs(float(loss.detach() - expected.detach())) <= 1e-10 * float(expected.detach())
    for key, found in gradients(learner).items():
        assert (found - _gradient(weights[key])).abs().max() <= 1e-10, key
        assert found.abs().max() > 0, f"{key} learns nothing"


def _gradient(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad


@every_algorithm
def test_what_lies_behind_the_end_of_an_episode_changes_nothing(algorithm: Algorithm) -> None:
    learner, episodes = new_learner(small(algorithm, loss=LossSettings(td_lambda=0.6))), made_up_episodes()
    changed = episodes.clone()
    for episode, (length, ends) in enumerate(((4, False), (2, True), (4, True), (3, True))):
        for key in ("obs", "state", "avail_actions"):
            changed[key][episode, length + (0 if ends else 1) :] = 1
        for key in ("actions", "reward"):
            changed[key][episode, length:] = 3
    losses, found = [], []
    for batch in (episodes, changed):
        learner.online.zero_grad()
        loss = learner.estimate(batch).loss
        loss.backward()
        losses.append(float(loss.detach()))
        found.append(torch.cat([gradient.flatten() for gradient in gradients(learner).values()]))
    assert abs(losses[0] - losses[1]) <= 1e-12
    assert (found[0] - found[1]).abs().max() <= 1e-12


@every_algorithm
def test_an_unavailable_action_is_never_part_of_a_target(algorithm: Algorithm) -> None:
    """The most valuable action by far, to both networks, is unavailable wherever it was not taken."""
    learner, episodes = new_learner(small(algorithm)), made_up_episodes()
    episodes["actions"].clamp_(max=2)
    episodes["avail_actions"][..., 3] = False
    episodes["avail_actions"][..., 0] = True
    target = learner.estimate(episodes).td_target
    with torch.no_grad():
        for networks in (learner.online, learner.target):
            networks.agent.get_parameter("head.bias")[3] += 1000
    assert torch.allclose(learner.estimate(episodes).td_target, target)
    episodes["avail_actions"][..., 3] = True
    assert not torch.allclose(learner.estimate(episodes).td_target, target, atol=1.0)


def test_the_online_networks_choose_the_next_action_and_the_target_networks_value_it() -> None:
    learner = new_learner(small("vdn"))
    episodes = made_up_episodes(fates=((1, False),))
    episodes["avail_actions"][:] = True
    with torch.no_grad():
        for networks, bias in ((learner.online, [0.0, 500.0, 0.0, 0.0]), (learner.target, [900.0, 70.0, 0.0, 0.0])):
            networks.agent.get_parameter("head.weight").zero_()
            networks.agent.get_parameter("head.bias").copy_(torch.tensor(bias))
    expected = episodes["reward"].double() + 0.99 * 3 * 70  # three agents
    assert torch.allclose(learner.estimate(episodes).td_target, expected)


@pytest.mark.parametrize("fates", [((1, True),) * 3, ((1, True), (1, False), (1, True)), ((1, True), (2, True))])
def test_games_of_one_step_are_valued_by_their_reward_and_others_by_what_follows_too(fates: Any) -> None:
    learner, episodes = new_learner(small("qmix")), made_up_episodes(fates=fates)
    weights, slow = (dict(networks.named_parameters()) for networks in (learner.online, learner.target))
    expected = reference.learner_loss(weights, slow, episodes, "qmix", gamma=0.99, td_lambda=0.0, scale=1.0)
    assert torch.allclose(learner.estimate(episodes).loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["rmsprop", "adam"])
@pytest.mark.parametrize("max_grad_norm", [0.01, 1e6])
def test_update_is_the_formula_of_the_optimizer_on_the_bounded_gradient(kind: Any, max_grad_norm: float) -> None:
    settings = OptimizerSettings(kind, learning_rate=1e-3, alpha=0.9, epsilon=1e-5, max_grad_norm=max_grad_norm)
    learner, episodes = new_learner(small("qmix", optimizer=settings)), made_up_episodes()
    learner.estimate(episodes).loss.backward()
    gradient = gradients(learner)
    before = {name: parameter.detach().clone() for name, parameter in learner.online.named_parameters()}
    norm = sum(float(each.square().sum()) for each in gradient.values()) ** 0.5
    factor = min(1.0, max_grad_norm / norm)
    report = learner.update(episodes)
    assert abs(float(report.grad_norm) - norm) <= 1e-9 * norm
    for name, parameter in learner.online.named_parameters():
        g = gradient[name] * factor
        root = (0.1 * g**2).sqrt() if kind == "rmsprop" else g.abs()  # Adam's first step is g / |g|
        expected = before[name] - 1e-3 * g / (root + 1e-5)
        assert (parameter - expected).abs().max() <= 1e-7, name


def test_an_update_reports_the_loss_before_it_and_lowers_it() -> None:
    learner, episodes = new_learner(small("qmix")), made_up_episodes()
    estimates = learner.estimate(episodes)
    mask = episodes["mask"]
    report = learner.update(episodes)
    assert torch.equal(report.loss, estimates.loss.detach())
    error = (estimates.q_tot - estimates.td_target).detach().abs()[mask].mean()
    assert torch.allclose(report.td_error, error)
    assert torch.allclose(report.q_tot, estimates.q_tot.detach()[mask].mean())
    for _ in range(50):
        learner.update(episodes)
    assert learner.estimate(episodes).loss < report.loss


def weights_of(module: torch.nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def test_hard_targets_become_copies_every_so_many_episodes() -> None:
    learner = new_learner(small("qmix", targets=HardTargets(every=10)))
    before = weights_of(learner.target)
    moved = {}
    for num_episodes in range(1, 31):
        learner.update(made_up_episodes(seed=num_episodes))
        moved[num_episodes] = learner.update_targets(num_episodes)
        if moved[num_episodes]:
            assert torch.equal(weights_of(learner.target), weights_of(learner.online))
        else:
            assert torch.equal(weights_of(learner.target), before)
        before = weights_of(learner.target)
    assert [number for number, copied in moved.items() if copied] == [10, 20, 30]


def test_polyak_targets_go_their_share_of_the_way() -> None:
    learner = new_learner(small("qmix", targets=PolyakTargets(rate=0.25)))
    expected = 0.75 * weights_of(learner.target) + 0.25 * weights_of(learner.online)
    assert learner.update_targets(1)
    assert torch.allclose(weights_of(learner.target), expected)


def test_new_targets_equal_the_networks_and_are_not_trained() -> None:
    settings = small("qmix")
    learner = make_learner(new_learner(settings).online, settings)
    before = weights_of(learner.target)
    assert torch.equal(before, weights_of(learner.online))
    assert not any(parameter.requires_grad for parameter in learner.target.parameters())
    learner.update(made_up_episodes())
    assert torch.equal(weights_of(learner.target), before)
    assert not torch.equal(weights_of(learner.online), before)


def test_saved_and_loaded_it_goes_on_as_it_would_have(tmp_path: Any) -> None:
    settings = small("qplex", targets=HardTargets(every=3))
    learner, other = new_learner(settings), new_learner(settings, seed=5)
    for number in range(4):
        learner.update(made_up_episodes(seed=number))
        learner.update_targets(number)
    torch.save(learner.state_dict(), tmp_path / "learner.pt")
    other.load_state_dict(torch.load(tmp_path / "learner.pt", weights_only=True))
    for number in range(4, 8):
        for each in (learner, other):
            each.update(made_up_episodes(seed=number))
            each.update_targets(number)
        assert torch.equal(weights_of(learner.online), weights_of(other.online))
        assert torch.equal(weights_of(learner.target), weights_of(other.target))


def test_a_state_of_other_networks_is_refused_in_one_line() -> None:
    state = new_learner(small("qmix")).state_dict()
    for found in (state | {"online": {}}, {"online": state["online"]}, new_learner(small("qplex")).state_dict()):
        with pytest.raises(CheckpointError, match="use the settings and the environment") as caught:
            new_learner(small("qmix")).load_state_dict(found)
        assert "\n" not in str(caught.value)


def test_entries_that_do_not_fit_each_other_are_refused() -> None:
    learner, episodes = new_learner(small("qmix")), made_up_episodes()
    episodes["state"] = episodes["state"][:, :-1]
    with pytest.raises(BatchError, match=r"'state'.*pad all entries alike"):
        learner.update(episodes)
    episodes = made_up_episodes()
    episodes["mask"] = episodes["mask"].float()
    with pytest.raises(BatchError, match="booleans as 'mask'"):
        learner.update(episodes)


def assert_seeds_agree_with_learners_alone(settings: Settings, num_updates: int, tolerance: float, **kind: Any) -> None:
    seeds = range(3)
    alone = [new_learner(settings, seed=seed) for seed in seeds]
    for each in alone:
        each.online.to(**kind), each.target.to(**kind)
    stacked = stack_learners([make_learner_like(each, settings) for each in alone])
    for number in range(num_updates):
        batches = [made_up_episodes(seed=100 * number + seed) for seed in seeds]
        reports = [each.update(batch) for each, batch in zip(alone, batches, strict=True)]
        report = stacked.update(torch.stack(batches))
        moved = [each.update_targets(number) for each in alone]
        assert moved == [stacked.update_targets(number)] * 3
        for seed in seeds:
            assert abs(float(report.loss[seed] - reports[seed].loss)) <= tolerance * max(1, float(reports[seed].loss))
    extracted = make_learner_like(alone[0], settings)
    for seed in seeds:
        load_learner(extracted, stacked, seed)
        for found, expected in ((extracted.online, alone[seed].online), (extracted.target, alone[seed].target)):
            assert (weights_of(found) - weights_of(expected)).abs().max() <= tolerance
        for each in (extracted, alone[seed]):  # the optimizer goes on where it stood, too
            each.update(made_up_episodes(seed=7))
        assert (weights_of(extracted.online) - weights_of(alone[seed].online)).abs().max() <= tolerance


def make_learner_like(learner: Learner, settings: Settings) -> Learner:
    """Equal networks, of its own."""
    made = make_learner(new_learner(settings).online.to(next(iter(learner.online.parameters())).dtype), settings)
    made.online.load_state_dict(learner.online.state_dict())
    made.target.load_state_dict(learner.target.state_dict())
    return made


@pytest.mark.parametrize(
    ("algorithm", "agent", "optimizer"),
    [
        ("vdn", "feed_forward", OptimizerSettings()),
        ("qmix", "recurrent", OptimizerSettings(max_grad_norm=0.5)),
        ("qplex", "feed_forward", OptimizerSettings("adam", learning_rate=1e-3)),
    ],
)
def test_each_of_many_seeds_learns_what_it_would_alone(algorithm: Any, agent: Any, optimizer: Any) -> None:
    settings = small(algorithm, optimizer=optimizer, targets=HardTargets(every=20))
    settings = replace(settings, agent=replace(settings.agent, kind=agent))
    assert_seeds_agree_with_learners_alone(settings, 40, 1e-9, dtype=torch.float64)


@pytest.mark.slow
@every_algorithm
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_each_of_many_seeds_learns_what_it_would_alone_over_200_updates(
    algorithm: Any, dtype: torch.dtype, tolerance: float
) -> None:
    for settings in (small(algorithm), small(algorithm, optimizer=OptimizerSettings("adam", learning_rate=1e-3))):
        assert_seeds_agree_with_learners_alone(settings, 200, tolerance, dtype=dtype)


def test_stacking_goes_on_where_the_learners_stand() -> None:
    settings = small("qmix")
    learners, episodes = [new_learner(settings, seed=seed) for seed in range(2)], made_up_episodes()
    for each in learners:
        each.update(episodes)
    stacked = stack_learners(learners)
    report = stacked.update(torch.stack([episodes, episodes]))
    assert torch.allclose(report.loss, torch.stack([each.update(episodes).loss for each in learners]))
    again = stacked.update(torch.stack([episodes, episodes]))
    assert torch.allclose(again.loss, torch.stack([each.update(episodes).loss for each in learners]))


def test_learners_that_differ_are_not_stacked() -> None:
    with pytest.raises(SettingsError, match="at least one seed"):
        stack_learners([])
    with pytest.raises(SettingsError, match="number 1 differs"):
        stack_learners([new_learner(small("qmix")), new_learner(small("vdn"))])
    ahead = new_learner(small("qmix"))
    ahead.update(made_up_episodes())
    with pytest.raises(SettingsError, match=r"after \[0\.0, 1\.0\] steps"):
        stack_learners([ahead, new_learner(small("qmix"))])


def test_stacked_agents_act_as_each_would() -> None:
    learners = [new_learner(small("vdn"), seed=seed) for seed in range(3)]
    stacked, episodes = stack_learners(learners), made_up_episodes()
    obs, actions = (torch.stack([episodes[key][:, 0]] * 3) for key in ("obs", "actions"))
    hidden = stacked.online.agent.initial_hidden(obs)
    values, after = stacked.online.agent(obs, actions, hidden)
    for seed, each in enumerate(learners):
        expected = each.online.agent(obs[seed], actions[seed], hidden[seed])
        assert torch.allclose(values[seed], expected[0]) and torch.allclose(after[seed], expected[1])


def test_episodes_of_seeds_come_from_one_replay() -> None:
    """Episodes (B, R, ...) are remembered together and learned from as (R, B, ...)."""
    replay, batches = EpisodeReplay(10), [made_up_episodes(seed=seed) for seed in range(2)]
    together = TensorDict({key: torch.stack([b[key] for b in batches], dim=1) for key in list(batches[0].keys())}, [4])
    replay.add(together)
    drawn = replay.latest(4)
    seeds = TensorDict({key: entry.transpose(0, 1) for key, entry in drawn.items()}, [2, 4])
    learners = [new_learner(small("qmix"), seed=seed) for seed in range(2)]
    found = stack_learners(learners).estimate(seeds).loss
    assert torch.allclose(
        found, torch.stack([each.estimate(b).loss for each, b in zip(learners, batches, strict=True)])
    )


def test_second_moments_stay_above_zero_and_updates_are_those_of_torchs_optimizer() -> None:
    # of units that never fire they would be zero, of which roots are slow
    learner, episodes = new_learner(small("qmix")), made_up_episodes()
    with torch.no_grad():
        learner.online.get_parameter("mixer.w1.0.bias")[:4] = -1e6
    plain = copy.deepcopy(learner)
    plain.optimizer = torch.optim.RMSprop(plain.online.parameters(), **_options(learner.optimizer))
    for _ in range(30):
        learner.update(episodes)
        plain.update(episodes)
    moments, expected = (
        torch.cat([state["square_avg"].flatten() for state in each.optimizer.state.values()])
        for each in (learner, plain)
    )
    assert (expected == 0).any() and moments.min() >= torch.finfo(moments.dtype).tiny
    for found, other in zip(learner.online.parameters(), plain.online.parameters(), strict=True):
        assert torch.equal(found, other)


def test_stacked_learners_keep_second_moments_above_zero() -> None:
    seeds = [new_learner(small("qmix"), seed=seed) for seed in range(2)]
    for learner in seeds:
        with torch.no_grad():
            learner.online.get_parameter("mixer.w1.0.bias")[:4] = -1e6
    stacked = stack_learners(seeds)
    for _ in range(2):
        stacked.update(torch.stack([made_up_episodes(), made_up_episodes()]))
    assert all(state["square_avg"].min() > 0 for state in stacked.optimizer.state.values())


def _options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {name: optimizer.defaults[name] for name in ("lr", "alpha", "eps")}
