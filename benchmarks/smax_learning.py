"""Whether QMIX learns on SMAX within a stated budget: against a random policy, and against itself with wrong rewards.

The control learns from the same episodes, with the rewards of each batch permuted across its episodes: it sees as many
rewards of the same size at the same times, but of other battles. Each run is a file of its own in the output; a run
whose file is there is not repeated, so the command can be stopped and called again, also by several processes that take
different seeds.

    python -m benchmarks.smax_learning run --seeds 0 1 2 3 4      # three minutes of one core for each of 20 runs
    python -m benchmarks.smax_learning show                       # the table, and the figure of the documentation
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tensordict import TensorDict

from marl.checkpoints import replacing
from marl.configuring import configure
from marl.evaluation import evaluate, interval_of
from marl.records import Record
from marl.replay import EpisodeReplay
from marl.run import Run, make_run
from marl.run_settings import RunSettings
from marl.seeding import seed_for
from marl.training import Silent, train

SCENARIOS = ("3s_vs_5z", "smacv2_5_units")
ARMS = ("qmix", "permuted")
NUM_STEPS = 300_000
NUM_LAST = 3  # evaluations of which a run's result is the mean
FIGURE = Path("docs/images/smax-learning.png")


def main() -> None:
    """Run what is missing, or show what is there."""
    torch.set_num_threads(1)
    arguments = parsed()
    if arguments.command == "show":
        show(arguments.output)
        return
    for seed in arguments.seeds:
        for scenario in arguments.scenarios:
            for arm in arguments.arms:
                run_once(arguments.output, scenario, arm, seed)


def parsed() -> argparse.Namespace:
    """What is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "show"))
    parser.add_argument("--scenarios", nargs="+", default=SCENARIOS)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--output", type=Path, default=Path("results/smax"))
    return parser.parse_args()


def settings_of(scenario: str, seed: int) -> RunSettings:
    """PyMARL2's QMIX on a budget: a quarter of its batch, and an update for four episodes instead of one for each."""
    return configure(
        {
            "algorithm": "qmix",
            "preset": "pymarl2",
            "tasks": [{"name": scenario, "environment": "smax", "options": {"scenario": scenario}}],
            "learning": {"replay": {"batch_size": 32}},
            "training": {"num_steps": NUM_STEPS, "episodes_per_update": 4, "evaluate_every": NUM_STEPS // 20},
            "seed": seed,
        }
    )


# -- running


def run_once(folder: Path, scenario: str, arm: str, seed: int) -> None:
    """One run and its file, if it is not there."""
    path = folder / f"{scenario}-{arm}-{seed}.json"
    if path.exists():
        return
    run, log, start = make_run(settings_of(scenario, seed)), Curve(), time.process_time()
    random = evaluate(
        run.evaluation_environment, run.agent, seed=seed_for(seed, "evaluation", 0), num_episodes=128, epsilon=1.0
    )
    if arm == "permuted":
        run.replay = PermutedRewards(run.settings.learning.replay.capacity, seed=seed_for(seed, "replay"))
    train(run, log)
    result = {
        "scenario": scenario,
        "arm": arm,
        "seed": seed,
        "random": random.mean_return,
        "random_win_rate": random.win_rate,
        "cpu_seconds": time.process_time() - start,
        "updates": run.progress.num_updates,
        "curve": log.points,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
    Console().print(f"{path}: {final(result, 'test/return'):.2f}, {result['cpu_seconds']:.0f} s")


class Curve(Silent):
    """Remembers the evaluations."""

    def __init__(self) -> None:
        self.points: list[dict[str, Any]] = []

    def on_record(self, run: Run, record: Record) -> None:
        names = ("steps", "updates", "test/return", "test/win_rate", "train/return", "learner/loss")
        self.points.append({name: record[name] for name in names if name in record})


class PermutedRewards(EpisodeReplay):
    """A replay that hands out each episode with the rewards of another."""

    def sample(self, batch_size: int) -> TensorDict:
        batch = super().sample(batch_size)
        order = torch.randperm(batch_size, generator=self._generator)
        return batch.clone(recurse=False).update({"reward": batch["reward"][order]})


# -- showing


def show(folder: Path) -> None:
    """The table of all that is there, and its figure."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    table = Table("scenario", "policy", "seeds", "return", "95 % interval", "won", "minutes of CPU")
    for scenario in dict.fromkeys(result["scenario"] for result in results):
        here = [result for result in results if result["scenario"] == scenario]
        add_row(table, scenario, "random", here, [result["random"] for result in once_a_seed(here)])
        for arm in ARMS:
            runs = [result for result in here if result["arm"] == arm]
            if runs:
                add_row(table, scenario, arm, runs, [final(run, "test/return") for run in runs])
    Console(width=120).print(table)
    draw(results)


def once_a_seed(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One result of each seed: the random policy does not learn."""
    return list({result["seed"]: result for result in results}.values())


def add_row(table: Table, scenario: str, policy: str, runs: list[dict[str, Any]], returns: list[float]) -> None:
    """Mean and interval over the seeds."""
    interval = interval_of(torch.tensor(returns))
    random = policy == "random"
    wins = [run["random_win_rate"] if random else final(run, "test/win_rate") for run in runs]
    minutes = "" if random else f"{statistics.median(run['cpu_seconds'] for run in runs) / 60:.1f}"
    between = f"{interval.low:.2f} to {interval.high:.2f}"
    mean = f"{statistics.mean(returns):.2f}"
    table.add_row(scenario, policy, str(len(returns)), mean, between, f"{statistics.mean(wins):.0%}", minutes)


def final(result: dict[str, Any], name: str) -> float:
    """The mean of a run's last evaluations."""
    return statistics.mean(point[name] for point in result["curve"][-NUM_LAST:])


def draw(results: list[dict[str, Any]]) -> None:
    """Returns of greedy episodes over the steps, a line for each seed."""
    import matplotlib.pyplot as plt

    scenarios = list(dict.fromkeys(result["scenario"] for result in results))
    figure, axes = plt.subplots(1, len(scenarios), figsize=(5 * len(scenarios), 3.2), squeeze=False)
    for axis, scenario in zip(axes[0], scenarios, strict=True):
        here = [result for result in results if result["scenario"] == scenario]
        for result in here:
            color = {"qmix": "tab:blue", "permuted": "tab:orange"}[result["arm"]]
            points = result["curve"]
            axis.plot([point["steps"] for point in points], [point["test/return"] for point in points], color=color)
        axis.axhline(statistics.mean(result["random"] for result in here), color="gray", linestyle="--")
        axis.set(title=scenario, xlabel="steps of the environment", ylabel="return of greedy episodes")
    figure.legend(
        [plt.Line2D([], [], color=color, linestyle=style) for color, style in LINES.values()], list(LINES), ncols=3
    )
    figure.tight_layout(rect=(0, 0, 1, 0.92))
    figure.savefig(FIGURE, dpi=120)


LINES = {
    "QMIX": ("tab:blue", "-"),
    "rewards permuted": ("tab:orange", "-"),
    "random policy": ("gray", "--"),
}

if __name__ == "__main__":
    main()
