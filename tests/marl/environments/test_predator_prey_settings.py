from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from marl.environments import PredatorPreySettings
from marl.environments.predator_prey_settings import VARIANTS

# Worked out by hand: what is captured, by how many.
BEST: list[tuple[dict[str, Any], float]] = [
    ({}, 40.0),  # 8 predators freeze in pairs
    ({"capture_freezes": False}, 80.0),  # all 8 stags
    ({"num_agents": 7}, 30.0),
    ({"num_agents": 1}, 0.0),  # nobody to help
    ({"num_agents": 1, "capture_freezes": False}, 0.0),
    ({"num_agents": 1, "num_hares": 3, "capture_freezes": False}, 3.0),
    ({"stag_catchers": 3}, 20.0),
    ({"num_hares": 8}, 40.0),  # a stag is worth ten hares and takes two
    ({"num_hares": 8, "reward_hare": 6.0}, 48.0),
    ({"num_hares": 8, "num_stags": 2}, 24.0),  # 2 stags, 4 hares
    ({"num_hares": 8, "num_stags": 2, "num_hunters": 3}, 36.0),  # 2 stags, 3 hares of 5, 1 of 1
    ({"reward_stag": -1.0}, 0.0),
]


@pytest.mark.parametrize(("change", "best"), BEST)
def test_the_best_return_is_that_worked_out_by_hand(change: dict[str, Any], best: float) -> None:
    assert replace(PredatorPreySettings(), **change).max_return == best


def test_the_best_returns_of_the_variants() -> None:
    found = {name: settings.max_return for name, settings in VARIANTS.items()}
    assert found == {
        "predator_prey": 40.0,
        "predator_prey_unpunished": 40.0,
        "predator_prey_s": 120.0,
        "predator_prey_m": 200.0,
        "predator_prey_l": 300.0,
        "predator_prey_tiny": 20.0,
    }


@pytest.mark.parametrize("freezes", [True, False])
def test_the_best_return_is_that_of_a_search_over_all_captures(freezes: bool) -> None:
    for num_agents, num_stags, num_hares, num_hunters in itertools.product(range(1, 5), range(3), range(3), range(3)):
        if num_stags + num_hares and num_hunters <= num_agents:
            settings = PredatorPreySettings(
                num_agents=num_agents,
                num_stags=num_stags,
                num_hares=num_hares,
                num_hunters=num_hunters,
                reward_stag=4.0,
                reward_hare=1.5,
                capture_freezes=freezes,
            )
            agents = frozenset(range(num_agents))
            assert settings.max_return == searched(settings, agents, num_stags, num_hares), settings


def searched(settings: PredatorPreySettings, agents: frozenset[int], stags: int, hares: int) -> float:
    """The most that these agents can still earn: every capture by exactly as many as it takes is tried."""
    best = 0.0
    for needed, left, prey in ((settings.stag_catchers, stags, "stag"), (settings.hare_catchers, hares, "hare")):
        for catchers in itertools.combinations(agents, needed) if left else ():
            factor = settings.hunter_factor if prey == "hare" and set(catchers) & set(settings.hunters) else 1.0
            reward = settings.reward_stag if prey == "stag" else factor * settings.reward_hare
            remaining = agents - set(catchers) if settings.capture_freezes else agents
            after = searched(settings, remaining, stags - (prey == "stag"), hares - (prey == "hare"))
            best = max(best, reward + after)
    return best


def test_hunters_are_drawn_once_from_their_seed() -> None:
    settings = VARIANTS["predator_prey_l"]
    assert settings.hunters == settings.hunters
    drawn = [replace(settings, hunter_seed=seed).hunters for seed in range(200)]
    assert all(len(set(hunters)) == 5 and list(hunters) == sorted(hunters) for hunters in drawn)
    assert len(set(drawn)) > 100
    counts = [sum(agent in hunters for hunters in drawn) for agent in range(15)]
    assert min(counts) > 40 and max(counts) < 95  # 67 on average, standard deviation 7
