from __future__ import annotations

import pytest
import torch

from marl.environments import Task, TaskSequence, matrix_tasks
from marl.errors import SettingsError


def test_a_sequence_plays_its_tasks_in_order_and_the_first_again() -> None:
    sequence = matrix_tasks("knife", "qtran", "climbing").and_back()
    earned = []
    for task in sequence.tasks:
        environment = task.make(1)
        environment.reset()
        earned.append(environment.step(torch.tensor([[0, 0]])).reward.item())
    assert earned == [-10.0, 8.0, 11.0, -10.0]
    assert str(sequence) == "knife -> qtran -> climbing -> knife"


def test_options_reach_every_task() -> None:
    assert matrix_tasks("knife", "qtran", state="step").spec.state_size == 1


def test_rules_may_drift_where_sizes_stay() -> None:
    drift = [Task(f"punishment {value}", "predator_prey", {"punishment": value}) for value in (0.0, -1.0, -2.0)]
    assert TaskSequence(tuple(drift)).spec.num_agents == 8


def test_tasks_for_other_networks_are_refused() -> None:
    with pytest.raises(
        SettingsError, match=r"qtran has \{'agents': 2, 'actions': 3, .* two_step_a has \{'agents': 2, 'ac"
    ):
        matrix_tasks("qtran", "two_step_a")


def test_no_tasks_are_refused() -> None:
    with pytest.raises(SettingsError, match="at least one task"):
        TaskSequence(())


def test_an_unknown_option_of_a_later_task_is_refused_at_once() -> None:
    with pytest.raises(SettingsError, match="there is no payoff 'no such game'"):
        matrix_tasks("qtran", "no such game")
