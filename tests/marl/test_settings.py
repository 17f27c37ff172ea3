"""Presets against a table of what was published, and settings that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from marl.errors import SettingsError
from marl.settings import (
    AgentSettings,
    ExplorationSettings,
    HardTargets,
    LossSettings,
    OptimizerSettings,
    PolyakTargets,
    QPLEXSettings,
    ReplaySettings,
    Settings,
    preset,
)

# Column by column: PyMARL's default.yaml, qmix.yaml and QPLEX's qplex_sc2.yaml; ReBorn's; PyMARL2's.
PUBLISHED: list[tuple[str, Callable[[Settings], object], tuple[object, object, object]]] = [
    ("gamma", lambda s: s.loss.gamma, (0.99, 0.99, 0.99)),
    ("optimizer", lambda s: s.optimizer.kind, ("rmsprop", "rmsprop", "adam")),
    ("lr", lambda s: s.optimizer.learning_rate, (5e-4, 5e-4, 1e-3)),
    ("optim_eps", lambda s: s.optimizer.epsilon, (1e-5, 1e-5, 1e-8)),
    ("optim_alpha", lambda s: s.optimizer.alpha, (0.99, 0.99, 0.99)),
    ("grad_norm_clip", lambda s: s.optimizer.max_grad_norm, (10, 10, 10)),
    ("batch_size", lambda s: s.replay.batch_size, (32, 32, 128)),
    ("buffer_size", lambda s: s.replay.capacity, (5000, 5000, 5000)),
    ("target_update_interval", lambda s: s.targets, (HardTargets(200),) * 3),
    ("epsilon_anneal_time", lambda s: s.exploration.num_steps, (50_000, 50_000, 100_000)),
    ("epsilon_start", lambda s: s.exploration.start, (1.0, 1.0, 1.0)),
    ("epsilon_finish", lambda s: s.exploration.finish, (0.05, 0.05, 0.05)),
    ("agent", lambda s: s.agent.kind, ("recurrent",) * 3),
    ("rnn_hidden_dim", lambda s: s.agent.hidden_size, (64, 64, 64)),
    ("layers in front of the GRU", lambda s: s.agent.num_hidden_layers, (1, 2, 1)),
    ("inputs", lambda s: s.agent.inputs, (("obs", "last_action", "agent_id"),) * 3),
]
MIXERS: dict[str, list[tuple[str, tuple[object, object, object]]]] = {
    "vdn": [],
    "qmix": [("embed_size", (32, 64, 32)), ("hypernet_layers", (2, 2, 2)), ("hypernet_size", (64, 64, 64))],
    "qplex": [
        ("num_heads", (4, 4, 4)),
        ("adversary_layers", (1, 2, 2)),
        ("adversary_size", (64, 64, 64)),
        ("hypernet_size", (64, 64, 64)),
        ("weighted_head", (True, True, True)),
        ("minus_one", (True, True, True)),
    ],
}


@pytest.mark.parametrize(("column", "name"), list(enumerate(["pymarl", "reborn", "pymarl2"])))
@pytest.mark.parametrize("algorithm", MIXERS)
def test_preset_is_what_was_published(column: int, name: Any, algorithm: Any) -> None:
    settings = preset(name, algorithm)
    for what, read, values in PUBLISHED:
        assert read(settings) == values[column], what
    for field, values in MIXERS[algorithm]:
        assert getattr(settings.mixer, field) == values[column], field


def test_smacv2s_preset_is_pymarl2s_with_less_weight_on_later_values() -> None:
    base = preset("pymarl2", "qmix")
    assert preset("smacv2", "qmix") == replace(base, loss=replace(base.loss, td_lambda=0.4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: preset("pymarl3", "qmix"),  # type: ignore[arg-type]
            "unknown preset 'pymarl3': choose one of 'pymarl', 'reborn', 'pymarl2', 'smacv2'",
        ),
        (
            lambda: preset("smacv2", "vdn"),
            "unknown algorithm 'vdn': choose one of 'qmix'",
        ),
        (
            lambda: preset("pymarl", "iql"),  # type: ignore[arg-type]
            "unknown algorithm 'iql': choose one of 'vdn', 'qmix', 'qplex'",
        ),
        (
            lambda: AgentSettings(kind="transformer"),  # type: ignore[arg-type]
            "unknown kind of agent 'transformer'",
        ),
        (lambda: QPLEXSettings(adversary_layers=4), "unknown number of adversary layers 4: choose one of 1, 2, 3"),
        (lambda: LossSettings(gamma=1.5), "gamma is 1.5: it must be from 0.0 to 1.0"),
        (lambda: LossSettings(td_lambda=-0.1), "td_lambda is -0.1"),
        (lambda: LossSettings(scale=0), "scale is 0: it must be above 0"),
        (
            lambda: OptimizerSettings("sgd"),  # type: ignore[arg-type]
            "unknown optimizer 'sgd'",
        ),
        (lambda: OptimizerSettings(learning_rate=float("nan")), "learning_rate is nan"),
        (lambda: OptimizerSettings(max_grad_norm=-1), "max_grad_norm is -1"),
        (lambda: HardTargets(0), "every is 0"),
        (lambda: PolyakTargets(1.1), "rate is 1.1"),
        (lambda: ReplaySettings(capacity=0), "capacity is 0"),
        (lambda: ReplaySettings(capacity=8, batch_size=9), "batch_size is 9: it must be from 1 to 8"),
        (lambda: ExplorationSettings(start=2.0), "start is 2.0"),
        (lambda: ExplorationSettings(num_steps=0), "num_steps is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_exploration_falls_linearly_and_stays() -> None:
    exploration = ExplorationSettings(start=1.0, finish=0.2, num_steps=100)
    assert [round(exploration.epsilon(steps), 12) for steps in (0, 50, 100, 1000)] == [1.0, 0.6, 0.2, 0.2]
