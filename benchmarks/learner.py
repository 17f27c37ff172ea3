"""What an update of the learner costs: against its floor in arithmetic, against a plain loop, and for many seeds.

The floor is the update's floating-point operations, as torch counts them, at the rate of a square matrix product
measured in the same run. The plain loop calls the agents step by step, as is usual. What is compared takes turns, on
one thread; what is printed are medians of ratios of neighboring updates, with their quartiles.

    python benchmarks/learner.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from tensordict import TensorDict
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from marl.agents import NO_ACTION, RecurrentAgent
from marl.learner import Learner, make_learner
from marl.networks import make_networks
from marl.settings import Algorithm, QPLEXSettings, Settings, preset
from marl.stacking import stack_learners

ALGORITHMS: tuple[Algorithm, ...] = ("vdn", "qmix", "qplex")
NUM_TURNS = 9
NUM_SEEDS = 16
NUM_UPDATES = 20  # of matrix games, in one turn
MATRIX = torch.tensor([[8.0, -12.0, -12.0], [-12.0, 0.0, 0.0], [-12.0, 0.0, 0.0]])  # of QTRAN, Son et al. 2019


@dataclass(frozen=True)
class Sizes:
    """Of predator-prey on a grid of 10 x 10 with 8 agents, or of a matrix game."""

    num_agents: int
    num_actions: int
    obs_size: int
    state_size: int


PREDATOR_PREY = Sizes(num_agents=8, num_actions=6, obs_size=75, state_size=300)
MATRIX_GAME = Sizes(num_agents=2, num_actions=3, obs_size=5, state_size=5)


def main() -> None:
    """Measure everything and print the tables."""
    torch.set_num_threads(1)
    console = Console()
    console.print(long_episodes())
    console.print(matrix_games())


def long_episodes() -> Table:
    """One update on 32 episodes of 200 steps, 8 agents."""
    table = Table(
        *("algorithm", "update, ms", "GFLOP", "floor, ms", "update / floor", "plain loop / update"),
        title="32 episodes x 200 steps, 8 agents",
    )
    batch = made_up_episodes(PREDATOR_PREY, num_episodes=32, num_steps=200)
    for algorithm in ALGORITHMS:
        settings = preset("pymarl", algorithm)
        learner, plain = (new_learner(settings, PREDATOR_PREY) for _ in range(2))
        for networks in (plain.online, plain.target):
            networks.agent.__class__ = SteppingAgent
        num_flops = count_flops(partial(plain.update, batch))  # by autograd: not all that is written by hand is counted
        floor = [num_flops / matmul_rate() for _ in range(NUM_TURNS)]
        updates, loops = in_turn(partial(learner.update, batch), partial(plain.update, batch))
        table.add_row(
            algorithm,
            milliseconds(updates),
            f"{num_flops / 1e9:.1f}",
            milliseconds(floor),
            ratios(updates, floor),
            ratios(loops, updates),
        )
    return table


def matrix_games() -> Table:
    """Updates on 32 fresh games each, acting included: seeds side by side against one."""
    table = Table(
        *(
            "algorithm",
            "agents",
            "one seed, ms",
            f"{NUM_SEEDS} seeds, ms",
            "one by one / side by side",
            "9,000 updates, s",
        ),
        title=f"matrix games of one step, {NUM_SEEDS} seeds",
    )
    for algorithm in ALGORITHMS:
        for kind in ("feed_forward", "recurrent"):
            settings = on_matrix_games(preset("pymarl", algorithm))
            settings = replace(settings, agent=replace(settings.agent, kind=kind))
            alone = new_learner(settings, MATRIX_GAME)
            stacked = stack_learners([new_learner(settings, MATRIX_GAME) for _ in range(NUM_SEEDS)])
            one, all_seeds = in_turn(
                partial(train_at_random, alone, 32), partial(train_at_random, stacked, NUM_SEEDS, 32)
            )
            one, all_seeds = ([seconds / NUM_UPDATES for seconds in each] for each in (one, all_seeds))
            table.add_row(
                *(algorithm, kind, milliseconds(one), milliseconds(all_seeds)),
                ratios([NUM_SEEDS * seconds for seconds in one], all_seeds),
                f"{9000 * statistics.median(all_seeds):.0f}",
            )
    return table


class SteppingAgent(RecurrentAgent):
    """The same agent, which learns as it acts: step by step."""

    def unroll(self, obs: Tensor, actions: Tensor) -> Tensor:
        """All values, from one call for each step."""
        hidden, last_actions = self.initial_hidden(obs[:, 0]), torch.full_like(actions[:, 0], NO_ACTION)
        values = []
        for t in range(obs.shape[1]):
            agent_qs, hidden = self(obs[:, t], last_actions, hidden)
            values.append(agent_qs)
            last_actions = actions[:, min(t, actions.shape[1] - 1)]
        return torch.stack(values, dim=1)


def new_learner(settings: Settings, sizes: Sizes) -> Learner:
    """A learner with weights of its own."""
    return make_learner(make_networks(settings.agent, settings.mixer, sizes), settings)


def on_matrix_games(settings: Settings) -> Settings:
    """As is usual there: no last action, and QPLEX with the networks of its authors."""
    agent = replace(settings.agent, inputs=("obs", "agent_id"))
    is_qplex = isinstance(settings.mixer, QPLEXSettings)
    mixer = QPLEXSettings(num_heads=10, adversary_layers=3) if is_qplex else settings.mixer
    return replace(settings, agent=agent, mixer=mixer)


def made_up_episodes(sizes: Sizes, *, num_episodes: int, num_steps: int) -> TensorDict:
    """Episodes of random grids, all as long as they can be."""
    shape, agents = (num_episodes, num_steps), (sizes.num_agents,)
    longer = (num_episodes, num_steps + 1)
    entries = {
        "obs": (torch.rand(*longer, *agents, sizes.obs_size) < 0.1).to(torch.uint8),
        "state": (torch.rand(*longer, sizes.state_size) < 0.1).to(torch.uint8),
        "avail_actions": torch.ones(*longer, *agents, sizes.num_actions, dtype=torch.bool),
        "actions": torch.randint(sizes.num_actions, (*shape, *agents)),
        "reward": torch.randn(shape),
        "terminated": torch.zeros(shape, dtype=torch.bool),
        "mask": torch.ones(shape, dtype=torch.bool),
    }
    return TensorDict(entries, batch_size=[num_episodes])


def train_at_random(learner: Learner, *batch: int) -> None:
    """Updates, each on fresh games."""
    for _ in range(NUM_UPDATES):
        learner.update(play_at_random(*batch))


def play_at_random(*batch: int) -> TensorDict:
    """Games of one step with uniformly random actions."""
    actions = torch.randint(3, (*batch, 1, 2))
    entries = {
        "obs": torch.ones(*batch, 2, 2, 5),
        "state": torch.ones(*batch, 2, 5),
        "avail_actions": torch.ones(*batch, 2, 2, 3, dtype=torch.bool),
        "actions": actions,
        "reward": MATRIX[actions[..., 0], actions[..., 1]],
        "terminated": torch.ones(*batch, 1, dtype=torch.bool),
        "mask": torch.ones(*batch, 1, dtype=torch.bool),
    }
    return TensorDict(entries, batch_size=list(batch))


def count_flops(act: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, two for each multiplication with addition."""
    with FlopCounterMode(display=False) as counter:
        act()
    return int(counter.get_total_flops())


def matmul_rate(size: int = 512, repetitions: int = 20) -> float:
    """Floating-point operations per second of a square product in float32."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.mm(a, b)
    seconds = measure(lambda: [torch.mm(a, b, out=out) for _ in range(repetitions)])
    return 2 * size**3 * repetitions / seconds


def in_turn(*acts: Callable[[], object]) -> list[list[float]]:
    """Seconds of each act, which take turns after one round to warm up."""
    rounds = [[measure(act) for act in acts] for _ in range(NUM_TURNS + 1)][1:]
    return [list(seconds) for seconds in zip(*rounds, strict=True)]


def measure(act: Callable[[], object]) -> float:
    """Seconds of the processor that an act takes; those of the clock are the same where nothing else runs."""
    start = time.process_time()
    act()
    return time.process_time() - start


def milliseconds(seconds: list[float]) -> str:
    """The median."""
    return f"{1000 * statistics.median(seconds):.1f}"


def ratios(one: list[float], other: list[float]) -> str:
    """Median and quartiles of the ratios of neighbors."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(one, other, strict=True)], n=4)
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
