"""The rules of predator-prey that are easily read otherwise, one by one, in grids of one row."""

from __future__ import annotations

from typing import Any

from marl.environments import PredatorPrey, PredatorPreySettings
from marl.environments.grids import CATCH, LEFT, RIGHT, STAY

NUM_GAMES = 400


def all_do(row: str, action: int, **rules: Any) -> list[tuple[float, str, bool]]:
    """What follows where all predators do the same in a row of this look: reward, look, terminated; each once."""
    cells = row.split()
    settings = PredatorPreySettings(
        height=1,
        width=len(cells),
        num_agents=cells.count("A"),
        num_stags=cells.count("S"),
        num_hares=cells.count("H"),
        **rules,
    )
    game = PredatorPrey(settings, NUM_GAMES)
    actions = game.reset(seed=0).avail_actions.long().argmax(dim=2)
    lanes = [lane for lane in range(NUM_GAMES) if game.text(lane) == row]
    assert lanes
    actions[lanes] = action
    outcome = game.step(actions)
    return sorted({(outcome.reward[lane].item(), game.text(lane), bool(outcome.terminated[lane])) for lane in lanes})


def test_two_catchers_capture_a_stag_and_freeze() -> None:
    assert all_do("A S A .", CATCH) == [(10.0, ". . . .", True)]


def test_where_captures_do_not_freeze_the_catchers_stay() -> None:
    assert all_do("A S A S .", CATCH, capture_freezes=False) == [(8.0, "A . A S .", False)]


def test_one_catcher_is_punished_and_the_stag_stays() -> None:
    assert all_do("A S .", CATCH) == [(-2.0, "A S .", False)]


def test_one_catcher_beside_two_stags_is_punished_twice() -> None:
    assert all_do("S A S", CATCH) == [(-4.0, "S A S", False)]


def test_two_catchers_of_a_stag_that_takes_three_are_punished_once() -> None:
    assert all_do("A S A .", CATCH, stag_catchers=3) == [(-2.0, "A S A .", False)]


def test_removed_catchers_are_gone_at_the_next_prey() -> None:
    """If the first stag has its turn first, its catchers are not there to be punished for the second, which moves to
    a cell that they have left; otherwise the second one's turn comes while its catcher is still there."""
    assert all_do("A S A S", CATCH) == [(8.0, ". . . S", True), (10.0, ". . S .", True)]


def test_one_catcher_captures_a_hare_and_a_second_hare_only_where_captures_do_not_freeze() -> None:
    assert all_do("H A H", CATCH) == [(1.0, ". H .", True)]
    assert all_do("H A H", CATCH, capture_freezes=False) == [(2.0, ". A .", True)]


def test_a_hunter_makes_a_hare_worth_more_but_not_a_stag() -> None:
    rules = {"num_hunters": 1, "hunter_factor": 5.0, "reward_hare": 2.0}
    assert all_do("A H", CATCH, **rules) == [(10.0, ". .", True)]
    assert all_do("A S A", CATCH, **rules | {"num_hunters": 2}) == [(10.0, ". . .", True)]


def test_a_removed_hunter_has_no_part_in_the_next_capture() -> None:
    """Of two hares in turn: 5 with the hunter and 1 without; or, where both catch the first hare, only that one."""
    assert {reward for reward, _, _ in all_do("H A H A", CATCH, num_hunters=1)} == {5.0, 6.0}


def test_prey_moves_to_a_free_neighboring_cell_and_stays_where_there_is_none() -> None:
    assert all_do("A . S . .", STAY) == [(0.0, "A . . S .", False), (0.0, "A S . . .", False)]
    assert all_do("A S", STAY) == [(0.0, "A S", False)]


def test_prey_is_blocked_by_prey_that_has_not_moved_yet() -> None:
    assert all_do("A S S . .", STAY) == [(0.0, "A . S S .", False), (0.0, "A S . S .", False)]


def test_predators_move_before_prey_and_are_blocked_by_it() -> None:
    assert all_do("A S", RIGHT) == [(0.0, "A S", False)]
    assert all_do(". A . S", RIGHT)[0][1].startswith(". . A")


def test_the_second_of_two_predators_follows_only_if_the_first_moved_before_it() -> None:
    assert {look[:5] for _, look, _ in all_do(". A A . S", LEFT)} == {"A A .", "A . A"}
