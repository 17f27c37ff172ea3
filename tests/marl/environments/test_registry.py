from __future__ import annotations

from typing import Any

import pytest

from marl.environments import make_environment
from marl.errors import SettingsError

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("predator_pray", {}, "there is no environment 'predator_pray'; did you mean 'predator_prey'"),
    ("predator_prey", {"agents": 3}, "predator_prey has no option 'agents'; did you mean 'num_agents'?"),
    ("predator_prey", {"batch": 3}, "predator_prey has no option 'batch'; known are 'capture_freezes'"),
    ("predator_prey", {"height": -10}, "height is -10; it must be at least 1"),
    ("predator_prey", {"num_agents": 0}, "num_agents is 0; it must be at least 1"),
    ("predator_prey", {"num_hares": -1}, "num_hares is -1; it must be at least 0"),
    ("predator_prey", {"height": "ten"}, "height is 'ten'; it must be of type int"),
    ("predator_prey", {"height": 10.0}, "height is 10.0; it must be of type int"),
    ("predator_prey", {"capture_freezes": 1}, "capture_freezes is 1; it must be of type bool"),
    ("predator_prey", {"reward_stag": float("nan")}, "reward_stag is nan; it must be finite"),
    ("predator_prey", {"num_agents": 93}, "101 animals do not fit into 100 cells; enlarge the grid or take fewer"),
    ("predator_prey", {"num_stags": 0}, "there is no prey; set num_stags or num_hares"),
    ("predator_prey", {"stag_catchers": 5}, "5 catchers are asked for, but a cell has 4 neighbors"),
    ("predator_prey", {"num_hunters": 9}, "9 hunters are asked for among 8 predators"),
    ("predator_prey", {"punishment": 2}, "punishment is 2; it is added to the reward and must not be positive"),
    ("predator_prey", {"hunter_factor": 0.5}, "hunter_factor is 0.5; it must be at least 1"),
    ("qtran_predator_prey", {"penalty": -1.0}, "penalty is -1.0; it must be at least 0"),
    ("qtran_predator_prey", {"num_agents": 47}, "49 animals leave no cell free of 49; enlarge the grid or take fewer"),
    ("matrix_game", {"payoff": "qtan"}, "there is no payoff 'qtan'; did you mean 'qtran'?"),
    ("matrix_game", {"payoff": [[1, 2], [3]]}, "is no payoff; give numbers in rows of equal length"),
    ("matrix_game", {"payoff": 3.0}, r"a payoff of shape \(\) has no actions; give a non-empty axis per agent"),
    ("matrix_game", {"payoff": [[]]}, r"a payoff of shape \(1, 0\) has no actions; give a non-empty axis per agent"),
    ("matrix_game", {"payoff": [[1, float("inf")]]}, "a payoff has to be finite; found infinite or undefined numbers"),
    ("matrix_game", {"state": "steps"}, "there are no features 'steps' to show; did you mean 'step'?"),
    ("contextual_matrix_game", {"payoffs": []}, "a game needs at least one payoff; none was given"),
    ("contextual_matrix_game", {"payoffs": ["qtran", [[1]]]}, r"need one shape; found \(3, 3\) and \(1, 1\)"),
    ("two_step_game", {"payoffs": ["qtran"]}, "found 3 actions for 1 payoffs, give as many of each"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_settings_that_make_no_game_are_refused_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as refused:
        make_environment(name, 2, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("batch_size", "seed"), [("3", 0), (3, 0.5), (True, 0)])
def test_a_batch_size_or_seed_that_is_no_whole_number_is_refused(batch_size: Any, seed: Any) -> None:
    with pytest.raises(SettingsError, match="have to be whole numbers"):
        make_environment("matrix_game", batch_size, seed=seed)


def test_options_change_the_named_variant() -> None:
    spec = make_environment("predator_prey_s", 1, obs_radius=1).spec
    assert (spec.num_agents, spec.obs_size, spec.state_size) == (6, 27, 20 * 20 * 3)


# Agents, actions, obs, state and time limit as they were published.
PUBLISHED = {
    "predator_prey": (8, 6, 75, 300, 200),
    "predator_prey_s": (6, 6, 147, 1200, 150),
    "predator_prey_m": (10, 6, 147, 1875, 150),
    "predator_prey_l": (15, 6, 147, 2700, 150),
    "qtran_predator_prey": (4, 5, 27, 98, 100),
    "qtran_predator_prey_small": (2, 5, 27, 50, 100),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_published(name: str) -> None:
    spec = make_environment(name, 1).spec
    found = (spec.num_agents, spec.num_actions, spec.obs_size, spec.state_size, spec.episode_limit)
    assert found == PUBLISHED[name]
