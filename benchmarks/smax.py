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

import torch
from rich.console import Console
from rich.table import Table

from marl.agents import NO_ACTION, Agent, AgentInputs, FeedForwardAgent, RecurrentAgent
from marl.configuring import configure
from marl.environments import Smax, SmaxSettings
from marl.rollout import choose_actions, collect
from marl.run import Run, make_run
from marl.training import update

NUM_TURNS = 7
SCENARIOS = ["smacv2_5_units", "3s_vs_5z", "5gen_protoss", "smacv2_10_units"]
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
    """Steps per second of the environment alone, and with epsilon-greedy agents of 64 units."""
    columns = [f"B = {batch_size}, {policy}" for batch_size in BATCH_SIZES for policy in ("alone", *AGENTS)]
    table = Table("scenario", *columns, title="SMAX, steps/s of one core")
    for scenario in SCENARIOS[:2]:
        cells = []
        for batch_size in BATCH_SIZES:
            games = Smax(SmaxSettings(scenario=scenario), batch_size)
            for make in (None, *AGENTS.values()):
                cells.append(per_second(lambda make=make, games=games: played(games, make)))
        table.add_row(scenario, *cells)
    return table


def played(games: Smax, make: Callable[[AgentInputs], Agent] | None) -> float:
    """Steps per second of one round of episodes, to the end of the longest of them."""
    spec = games.spec
    agent = None if make is None else make(AgentInputs(spec.num_agents, spec.num_actions, spec.obs_size))
    generator = torch.Generator().manual_seed(0)
    start, num_steps = time.process_time(), 0
    observation = games.reset(0)
    actions = torch.full(observation.avail_actions.shape[:2], NO_ACTION)
    hidden = None if agent is None else agent.initial_hidden(observation.obs)
    spent = 0.0
    for _ in range(30):
        qs = torch.zeros(observation.avail_actions.shape)
        if agent is not None:
            with torch.no_grad():
                qs, hidden = agent(observation.obs, actions, hidden)
        before = time.process_time()
        actions = choose_actions(qs, observation.avail_actions, epsilon=1.0, generator=generator)
        spent += 0.0 if agent is not None else time.process_time() - before
        observation = games.step(actions).observation
        num_steps += games.batch_size
    return num_steps / (time.process_time() - start - spent)


def training() -> Table:
    """Steps per second of whole training of QMIX, with all that belongs to it but evaluation."""
    table = Table("scenario", "episodes per update", "steps/s", "updates/s", title="QMIX, 32 side by side, one core")
    for scenario in SCENARIOS[:2]:
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
