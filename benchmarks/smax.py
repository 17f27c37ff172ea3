"""How fast SMAX is with a policy of torch in the loop, and whole training on it.

Time is that of the process with all its threads, so that others on the same machine do not count as work, but they do
slow a shared core down; the load is printed beside the figures. What is compiled is compiled before.

    python -m benchmarks.smax
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from marl.agents import NO_ACTION, Agent, AgentInputs, FeedForwardAgent, RecurrentAgent
from marl.configuring import configure
from marl.environments import Smax, SmaxSettings
from marl.rollout import choose_actions, collect
from marl.run import Run, make_run
from marl.training import update
from tests.marl.environments.playing import uniform_actions

NUM_TURNS = 7
NUM_STEPS = 30  # of a turn: about the length of a battle
SCENARIOS = ["smacv2_5_units", "3s_vs_5z"]
BATCH_SIZES = [64, 1024]
AGENTS = {"feed-forward": FeedForwardAgent, "recurrent": RecurrentAgent}


def main() -> None:
    """Measure and print both tables."""
    torch.set_num_threads(1)
    console = Console(width=120)
    console.print(playing())
    console.print(training())
    console.print(f"load of the machine: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


def playing() -> Table:
    """Steps per second of the environment alone, and with epsilon-greedy agents of 64 units, choosing included."""
    table = Table(
        "scenario", "B", "alone", *AGENTS, title="SMAX with a policy of torch in the loop, steps/s of one core"
    )
    for scenario in SCENARIOS:
        for batch_size in BATCH_SIZES:
            games = Smax(SmaxSettings(scenario=scenario), batch_size)
            inputs = AgentInputs(games.spec.num_agents, games.spec.num_actions, games.spec.obs_size)
            rates = [per_second(partial(alone, games))]
            rates += [per_second(partial(played, games, make(inputs))) for make in AGENTS.values()]
            table.add_row(scenario, str(batch_size), *rates)
    return table


def alone(games: Smax) -> float:
    """Steps per second of the environment, of whose time that of choosing is no part."""
    generator, seconds = torch.Generator().manual_seed(0), -time.process_time()
    observation = games.reset(0)
    seconds += time.process_time()
    for _ in range(NUM_STEPS):
        actions = uniform_actions(observation.avail_actions, generator)
        start = time.process_time()
        observation = games.step(actions).observation
        seconds += time.process_time() - start
    return NUM_STEPS * games.batch_size / seconds


@torch.no_grad()
def played(games: Smax, agent: Agent) -> float:
    """Steps per second with an agent that explores."""
    generator, start = torch.Generator().manual_seed(0), time.process_time()
    observation = games.reset(0)
    actions = torch.full(observation.avail_actions.shape[:2], NO_ACTION)
    hidden = agent.initial_hidden(observation.obs)
    for _ in range(NUM_STEPS):
        agent_qs, hidden = agent(observation.obs, actions, hidden)
        actions = choose_actions(agent_qs, observation.avail_actions, epsilon=0.5, generator=generator)
        observation = games.step(actions).observation
    return NUM_STEPS * games.batch_size / (time.process_time() - start)


def training() -> Table:
    """Steps per second of whole training of QMIX, with all that belongs to it but evaluation."""
    table = Table("scenario", "episodes per update", "steps/s", "updates/s", title="QMIX, 32 side by side, one core")
    for scenario in SCENARIOS:
        for episodes_per_update in (1, 4, 32):
            run = filled(scenario, episodes_per_update)
            rates = [turn(run) for _ in range(3)]
            steps, updates = (statistics.median(rate) for rate in zip(*rates, strict=True))
            table.add_row(scenario, str(episodes_per_update), f"{steps:,.0f}", f"{updates:.1f}")
    return table


def filled(scenario: str, episodes_per_update: int) -> Run:
    """A run whose replay holds a batch, and that has learned once."""
    task = {"name": scenario, "environment": "smax", "options": {"scenario": scenario}}
    sizes = {"episodes_per_update": episodes_per_update, "num_parallel": 32}
    run = make_run(configure({"algorithm": "qmix", "tasks": [task], "training": sizes}))
    turn(run)
    return run


def turn(run: Run) -> tuple[float, float]:
    """Steps and updates per second over one round."""
    start, steps = time.process_time(), run.progress.num_steps
    num_due = run.add(collect(run.environment, run.agent, epsilon=0.5, seed=run.games_seed))
    for _ in range(num_due):
        update(run)
    seconds = time.process_time() - start
    return (run.progress.num_steps - steps) / seconds, num_due / seconds


def per_second(turn: Callable[[], float]) -> str:
    """The median of some turns after one that compiles."""
    turn()
    return f"{statistics.median(turn() for _ in range(NUM_TURNS)):,.0f}"


if __name__ == "__main__":
    main()
