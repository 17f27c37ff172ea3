"""What can be learned: the one-step game of QTRAN, whose best joint action only QPLEX can represent, and hunting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tensordict import TensorDict

from marl.learner import Learner, make_learner
from marl.losses import greedy_actions
from marl.networks import make_networks
from marl.records import Record
from marl.run import Run, make_run
from marl.run_settings import RunSettings, TrainingSettings, run_settings
from marl.settings import Algorithm, QPLEXSettings, preset
from marl.stacking import stack_learners
from marl.training import Silent, train
from tests.marl.batches import Sizes

PAYOFFS = torch.tensor([[8.0, -12.0, -12.0], [-12.0, 0.0, 0.0], [-12.0, 0.0, 0.0]])
SIZES = Sizes(num_agents=2, num_actions=3, obs_size=5, state_size=5)
NUM_SEEDS, NUM_GAMES, NUM_UPDATES = 10, 32, 6000


def learners_of_ten_seeds(algorithm: Algorithm) -> Learner:
    settings = preset("pymarl", algorithm)
    agent = replace(settings.agent, kind="feed_forward", inputs=("obs", "agent_id"))
    mixer = QPLEXSettings(num_heads=10, adversary_layers=3) if algorithm == "qplex" else settings.mixer
    settings = replace(settings, agent=agent, mixer=mixer)
    learners = []
    for seed in range(NUM_SEEDS):
        torch.manual_seed(seed)
        learners.append(make_learner(make_networks(settings.agent, settings.mixer, SIZES), settings))
    return stack_learners(learners)


def fresh_games() -> TensorDict:
    """Games of uniformly random actions, for each seed its own."""
    batch = (NUM_SEEDS, NUM_GAMES)
    actions = torch.randint(3, (*batch, 1, 2))
    entries = {
        "obs": torch.ones(*batch, 2, 2, 5),
        "state": torch.ones(*batch, 2, 5),
        "avail_actions": torch.ones(*batch, 2, 2, 3, dtype=torch.bool),
        "actions": actions,
        "reward": PAYOFFS[actions[..., 0], actions[..., 1]],
        "terminated": torch.ones(*batch, 1, dtype=torch.bool),
        "mask": torch.ones(*batch, 1, dtype=torch.bool),
    }
    return TensorDict(entries, batch_size=list(batch))


def greedy_payoffs(learner: Learner) -> torch.Tensor:
    games = fresh_games()[:, :1]
    agent_qs = learner.online.agent.unroll(games["obs"], games["actions"])
    actions = greedy_actions(agent_qs, games["avail_actions"])[:, 0, 0]
    return PAYOFFS[actions[:, 0], actions[:, 1]]


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "finds_it"), [("vdn", False), ("qmix", False), ("qplex", True)])
def test_only_qplex_finds_the_best_joint_action_of_a_game_that_is_not_monotonic(
    algorithm: Algorithm, finds_it: bool
) -> None:
    learner, payoffs = learners_of_ten_seeds(algorithm), []
    torch.manual_seed(123)
    for update in range(1, NUM_UPDATES + 1):
        learner.update(fresh_games())
        learner.update_targets(update * NUM_GAMES)
        if update > NUM_UPDATES - 1000 and update % 100 == 0:
            payoffs.append(greedy_payoffs(learner))
    found = (torch.stack(payoffs) == 8).sum(dim=0)  # in how many of the last ten evaluations, by seed
    report = f"best joint action in the last 10 evaluations, by seed: {found.tolist()}"
    if finds_it:
        assert (found >= 8).sum() >= 8, report
    else:
        assert found.max() == 0, report


@pytest.mark.slow
def test_qmix_learns_to_hunt_on_a_small_grid() -> None:
    """Seven by seven, four predators, four stags, 60 steps, no punishment: at most 20."""
    returns = [final_return(hunting(seed)) for seed in range(5)]
    report = f"mean return of the last 5 evaluations, by seed: {[round(each, 1) for each in returns]}"
    assert interquartile_mean(returns) >= 14, report


def hunting(seed: int) -> RunSettings:
    settings = run_settings("qmix", "predator_prey_tiny", seed=seed)
    exploration = replace(settings.learning.exploration, num_steps=20_000)
    training = TrainingSettings(num_steps=50_000, evaluate_every=2_000)
    return replace(settings, learning=replace(settings.learning, exploration=exploration), training=training)


def final_return(settings: RunSettings) -> float:
    notes = Notes()
    train(make_run(settings), notes)
    return sum(notes.returns[-5:]) / 5


def interquartile_mean(values: list[float]) -> float:
    """Of five values: the middle one counts in full, its neighbors by three quarters."""
    low, middle, high = sorted(values)[1:4]
    return (0.75 * low + middle + 0.75 * high) / 2.5


class Notes(Silent):
    def __init__(self) -> None:
        self.returns: list[float] = []

    def on_record(self, run: Run, record: Record) -> None:
        self.returns.append(float(record["test/return"]))
