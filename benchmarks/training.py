"""How fast whole training runs are, against a loop of the usual kind that plays one episode after the other.

The plain loop plays one episode at a time in an environment of plain Python, calls the agents step by step, in playing
and in learning, keeps observations as float32, and learns once per episode, as PyMARL does. Everything else, the
mathematics of the update above all, is the same code, so that what is compared is the way of computing. Both learn on
replays that are filled before, take turns in one run on one thread, and are measured by the time of the process; what
is printed are medians of ratios of neighboring turns, with their quartiles.

The environment in plain Python is the reference that the tests compare ours with, which is several times as fast as the
public one. With a checkout of PyMARL2 (github.com/hijkzzz/pymarl2, Apache-2.0) its environment takes part as well.

    python -m benchmarks.training             # predator-prey: steps per second
    python -m benchmarks.training --public PATH/TO/pymarl2
    python -m benchmarks.training --returns   # the reduced game to the end, on two processes
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.learner import SteppingAgent
from marl.environments.predator_prey_settings import VARIANTS
from marl.environments.protocol import Observation, Outcome, Spec
from marl.evaluation import evaluate
from marl.rollout import collect
from marl.run import Run, make_run
from marl.run_settings import RunSettings, TrainingSettings, run_settings
from marl.training import update
from tests.marl.environments import reference

NUM_TURNS = 7
NUM_ROUND_EPISODES = 32
NUM_SEEDS = 5
NUM_STEPS = 30_000  # of the reduced game


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    console = Console()
    public = Path(sys.argv[sys.argv.index("--public") + 1]) if "--public" in sys.argv else None
    console.print(returns() if "--returns" in sys.argv else throughput("predator_prey", public))


def throughput(environment: str, public: Path | None) -> Table:
    """Steps per second of whole training."""
    columns = ("way", "steps/s", "against the plain loop")
    table = Table(*columns, title=f"QMIX on {environment}, random actions, one thread")
    settings = run_settings("qmix", environment)
    runs = {"plain loop, an update per episode": plain_run(settings)}
    if public is not None:
        runs["the same in the public environment"] = plain_run(settings)
        runs["the same in the public environment"].environment = PublicGames(public, settings.tasks.spec)
    runs["32 side by side, an update per episode"] = vectorized_run(settings, episodes_per_update=1)
    runs["32 side by side, an update per 32 episodes"] = vectorized_run(settings, episodes_per_update=32)
    for run in runs.values():
        fill(run)
    turns = [[turn(run) for run in runs.values()] for _ in track(range(NUM_TURNS + 1))][1:]
    rates = list(zip(*turns, strict=True))
    for way, rate in zip(runs, rates, strict=True):
        ratios = [mine / plain for mine, plain in zip(rate, rates[0], strict=True)]
        table.add_row(way, f"{statistics.median(rate):,.0f}", spread(ratios))
    return table


def returns() -> Table:
    """Returns of greedy episodes after training, by way."""
    title = f"QMIX on predator_prey_tiny after {NUM_STEPS:,} steps, {NUM_SEEDS} seeds: returns (maximum 20)"
    table = Table("way", "each seed", "mean", "95 % interval", title=title)
    ways = ("plain loop", "32 side by side")
    jobs = [(way, seed) for way in ways for seed in range(NUM_SEEDS)]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = dict(zip(jobs, pool.starmap(final_return, jobs, chunksize=1), strict=True))
    for way in ways:
        means = [found[way, seed] for seed in range(NUM_SEEDS)]
        low, high = bootstrap(means)
        each = ", ".join(f"{mean:.1f}" for mean in means)
        table.add_row(way, each, f"{statistics.mean(means):.1f}", f"{low:.1f} to {high:.1f}")
    return table


def reduced(seed: int) -> RunSettings:
    """The game of the learning test."""
    settings = run_settings("qmix", "predator_prey_tiny", seed=seed)
    exploration = replace(settings.learning.exploration, num_steps=NUM_STEPS // 2)
    return replace(settings, learning=replace(settings.learning, exploration=exploration))


def vectorized_run(settings: RunSettings, *, episodes_per_update: int = 1) -> Run:
    """The ordinary run."""
    training = TrainingSettings(NUM_STEPS, episodes_per_update=episodes_per_update, evaluate_every=10**9)
    return make_run(replace(settings, training=training))


def plain_run(settings: RunSettings) -> Run:
    """A run that plays and learns as is usual."""
    training = TrainingSettings(NUM_STEPS, num_parallel=1, evaluate_every=10**9, num_evaluation_episodes=1)
    run = make_run(replace(settings, training=training))
    for networks in (run.learner.online, run.learner.target):
        networks.agent.__class__ = SteppingAgent
    run.environment = PlainGames(settings.tasks.tasks[0].environment)
    return run


def fill(run: Run) -> None:
    """Play until a batch can be drawn."""
    while len(run.replay) < run.settings.learning.replay.batch_size:
        run.add(collect(run.environment, run.agent, epsilon=1.0, seed=run.games_seed))


def turn(run: Run) -> float:
    """Steps per second over one round, or over some episodes played one by one."""
    start, steps = time.process_time(), run.progress.num_steps
    for _ in range(1 if run.environment.batch_size > 1 else NUM_ROUND_EPISODES // 8):
        num_due = run.add(collect(run.environment, run.agent, epsilon=1.0, seed=run.games_seed))
        for _ in range(num_due):
            update(run)
    return (run.progress.num_steps - steps) / (time.process_time() - start)


def final_return(way: str, seed: int) -> float:
    """The mean return of greedy episodes of the trained agents, in the vectorized game."""
    torch.set_num_threads(1)
    run = (plain_run if way == "plain loop" else vectorized_run)(reduced(seed))
    while not run.is_over:
        for _ in range(run.add(collect(run.environment, run.agent, epsilon=run.epsilon, seed=run.games_seed))):
            update(run)
    games = run.task.make(100)
    return evaluate(games, run.agent, seed=12345, num_episodes=100).mean_return


def bootstrap(values: list[float], num_samples: int = 10_000) -> tuple[float, float]:
    """The percentile interval of a mean."""
    random = np.random.default_rng(0)
    means = random.choice(values, (num_samples, len(values))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def spread(ratios: list[float]) -> str:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(ratios, n=4)
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


class PlainGames:
    """One episode of predator-prey after the other, by the rules' text in plain Python, shown as float32."""

    def __init__(self, name: str) -> None:
        self.settings = VARIANTS[name]
        self.batch_size = 1
        self.spec: Spec = replace(
            run_settings("vdn", name).tasks.spec, obs_dtype=torch.float32, state_dtype=torch.float32
        )

    def reset(self, seed: int | None = None) -> Observation:
        """Begins an episode."""
        stream = reference.stream(seed=seed or 0, lane=0, episode=1)
        self.game = reference.Game(self.settings, self.settings.hunters, stream)
        return self.observe()

    def step(self, actions: Tensor) -> Outcome:
        """Takes actions (1, N)."""
        reward = self.game.step(actions[0].tolist())
        ends = (torch.tensor([each]) for each in (self.game.terminated, self.game.truncated))
        terminated, truncated = ends
        return Outcome(self.observe(), torch.tensor([reward]), terminated, truncated)

    def observe(self) -> Observation:
        """What can be seen."""
        obs = torch.tensor(self.game.obs(), dtype=torch.float32)
        state = torch.tensor(self.game.state(), dtype=torch.float32)
        return Observation(obs[None], state[None], torch.tensor(self.game.avail_actions())[None].bool())


class PublicGames:
    """One episode after the other of PyMARL2's `stag_hunt` with a punishment of -2, run from a checkout of it."""

    def __init__(self, checkout: Path, spec: Spec) -> None:
        self.batch_size = 1
        self.spec = replace(spec, obs_dtype=torch.float32, state_dtype=torch.float32)
        sys.path.insert(0, str(checkout / "src"))
        sys.modules.setdefault("pygame", ModuleType("pygame"))  # only draws
        sys.modules["envs"] = package = ModuleType("envs")  # whose own file asks for StarCraft II
        package.__path__ = [str(checkout / "src/envs")]
        settings = yaml.safe_load((checkout / "src/config/envs/stag_hunt.yaml").read_text(encoding="utf-8"))
        stag_hunt = import_module("envs.stag_hunt.stag_hunt")
        self.game = stag_hunt.StagHunt(**(settings["env_args"] | {"miscapture_punishment": -2}))

    def reset(self, seed: int | None = None) -> Observation:
        """Begins an episode."""
        np.random.seed(seed)
        self.game.reset()
        return self.observe()

    def step(self, actions: Tensor) -> Outcome:
        """Takes actions (1, N)."""
        reward, is_over, info = self.game.step(actions[0])
        is_cut_off = bool(info.get("episode_limit", False))
        ends = torch.tensor([is_over and not is_cut_off]), torch.tensor([is_over and is_cut_off])
        return Outcome(self.observe(), torch.tensor([float(reward)]), *ends)

    def observe(self) -> Observation:
        """What can be seen."""
        obs = torch.as_tensor(np.stack(self.game.get_obs()), dtype=torch.float32)
        state = torch.as_tensor(np.asarray(self.game.get_state()), dtype=torch.float32)
        available = torch.as_tensor(np.stack(self.game.get_avail_actions())).bool()
        return Observation(obs[None], state.reshape(1, -1), available[None])


if __name__ == "__main__":
    main()
