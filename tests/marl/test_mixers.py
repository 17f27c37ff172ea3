"""Mixers: what they compute, and that the best joint action is made of each agent's best."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from marl.errors import SettingsError
from marl.losses import best_values
from marl.mixers import QMIX, QPLEX, VDN, Attention, Mixer, Transformation
from tests.marl import reference
from tests.marl.properties import A, N, S, falling, igm_gap, joint_value, made_up, min_slope, train


def qplex(hidden_sizes: tuple[int, ...] = (7,), *, transformed: bool = True, minus_one: bool = True) -> QPLEX:
    attention = Attention(N, A, S, num_heads=2, hidden_sizes=hidden_sizes)
    return QPLEX(attention, Transformation(N, S, hypernet_size=6) if transformed else None, minus_one=minus_one)


MIXERS: dict[str, tuple[Callable[[], Mixer], Callable[..., Tensor]]] = {
    "VDN": (VDN, reference.vdn),
    "QMIX of one layer": (lambda: QMIX(N, S, embed_size=6, hypernet_layers=1), reference.qmix),
    "QMIX of two layers": (lambda: QMIX(N, S, embed_size=6, hypernet_size=7), reference.qmix),
    "QPLEX of one layer": (lambda: qplex(()), reference.qplex),
    "QPLEX of two layers": (lambda: qplex((7,)), reference.qplex),
    "QPLEX of three layers": (lambda: qplex((7, 8)), reference.qplex),
    "QPLEX without weighted head": (lambda: qplex(transformed=False), reference.qplex),
    "QPLEX without minus one": (
        lambda: qplex(minus_one=False),
        lambda *args: reference.qplex(*args, minus_one=False),
    ),
}
every_mixer = pytest.mark.parametrize("name", MIXERS)


@every_mixer
def test_mixer_computes_what_a_plain_loop_over_its_formula_does(name: str) -> None:
    make, formula = MIXERS[name]
    mixer, batch = make().double(), made_up(20)
    actions = torch.randint(A, (20, N))
    max_qs = best_values(batch["agent_qs"], batch["avail_actions"])
    found = joint_value(mixer, batch, actions).detach()
    for row in range(20):
        taken = actions[row].tolist()
        chosen = [batch["agent_qs"][row, i, taken[i]] for i in range(N)]
        expected = formula(mixer.state_dict(), chosen, list(max_qs[row]), batch["state"][row], taken)
        assert abs(float(found[row] - expected)) <= 1e-10


@every_mixer
def test_leading_dimensions_are_independent(name: str) -> None:
    mixer, batch = MIXERS[name][0]().double(), made_up(12)
    actions = torch.randint(A, (12, N))
    folded = {key: value.unflatten(0, (3, 4)) for key, value in batch.items()}
    assert torch.allclose(
        joint_value(mixer, folded, actions.unflatten(0, (3, 4))).flatten(), joint_value(mixer, batch, actions)
    )


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "VDN"])
def test_state_of_bytes_is_read_as_numbers(name: str) -> None:
    mixer, batch = MIXERS[name][0]().double(), made_up(6)
    actions, grid = torch.randint(A, (6, N)), torch.randint(256, (6, S), dtype=torch.uint8)
    as_bytes = joint_value(mixer, batch | {"state": grid}, actions)
    assert torch.equal(as_bytes, joint_value(mixer, batch | {"state": grid.double()}, actions))


@pytest.mark.parametrize("hypernet_layers", [1, 2])
def test_qmix_rises_with_each_agents_value_before_and_after_training_against_it(hypernet_layers: int) -> None:
    mixer, batch = QMIX(N, S, embed_size=8, hypernet_layers=hypernet_layers).double(), made_up(500)
    assert min_slope(mixer, batch) >= -1e-12
    train(mixer, batch, falling)
    assert min_slope(mixer, batch) >= -1e-12
    assert igm_gap(mixer, batch) <= 1e-9


@every_mixer
def test_best_joint_action_is_made_of_each_agents_best_before_and_after_training_against_it(name: str) -> None:
    mixer, batch = MIXERS[name][0]().double(), made_up(200)
    assert igm_gap(mixer, batch) <= 1e-9
    if name != "VDN":
        train(mixer, batch, falling)
        assert igm_gap(mixer, batch) <= 1e-9


def test_a_mixer_that_forgets_the_absolute_value_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = made_up(200)
    mixers = {name: MIXERS[name][0]().double() for name in ("QMIX of two layers", "QPLEX of two layers")}
    monkeypatch.setattr(Tensor, "abs", lambda self: self)
    assert min_slope(mixers["QMIX of two layers"], batch) < -1e-3
    assert all(igm_gap(mixer, batch) > 1e-3 for mixer in mixers.values())


def test_qplex_passes_gradient_to_the_values_of_the_actions_taken_only() -> None:
    mixer, batch = qplex().double(), made_up(6)
    chosen_qs, max_qs = (torch.randn(6, N).double().requires_grad_() for _ in range(2))
    value = mixer(chosen_qs, batch["state"], max_qs=max_qs, actions=torch.zeros(6, N, dtype=torch.int64))
    to_chosen, to_best = torch.autograd.grad(value.sum(), (chosen_qs, max_qs), allow_unused=True)
    assert mixer.transformation is not None
    weights, _ = mixer.transformation(batch["state"])
    assert torch.allclose(to_chosen, weights)
    assert to_best is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QMIX(N, S, hypernet_layers=3), "hypernetworks of 3 layers"),
        (lambda: QMIX(N, S, embed_size=0), "units"),
        (lambda: QMIX(N, S, hypernet_size=-1), "units"),
        (lambda: Attention(N, A, S, num_heads=0), "units"),
        (lambda: Attention(N, A, S, hidden_sizes=(4, 0)), "units"),
    ],
)
def test_impossible_sizes_are_refused(make: Callable[[], Mixer], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make()
