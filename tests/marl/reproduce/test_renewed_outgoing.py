"""Outgoing weights that are drawn anew at an operation, while frozen members carry what they were."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from marl.errors import SettingsError
from marl.learner import Learner
from marl.reproduce.figures.figure import Asked
from marl.reproduce.figures.registry import FIGURES
from marl.reproduce.matrix.interventions import Intervention, Occasion, Units
from marl.reproduce.matrix.learners import LearnerSettings, agent_values, joint_values, make_one, update
from marl.reproduce.matrix.outcomes import measure
from marl.reproduce.matrix.outgoing import carried_on, consumer_of
from marl.reproduce.matrix.runs import MatrixRun
from marl.reproduce.matrix.seeds import Seeds
from marl.reproduce.matrix.tasks import TaskSettings, make_tasks
from marl.reproduce.results import Results
from marl.surgery import FrozenRows, Seen
from tests.marl.reproduce.test_matrix import KNIFE, OBS_SIZE, SMALL, Played, games

RENEWED = Units(KNIFE, lack="outgoing")
AGENTS = replace(SMALL, algorithm="vdn")
EVERYTHING = replace(RENEWED, settings=replace(KNIFE, criterion="all", max_growth=8.0))
CROWDED = replace(EVERYTHING, settings=replace(KNIFE, criterion="all", max_growth=4.0))
CONSUMERS = {"agent.encoder.0": "agent.encoder.2", "agent.encoder.2": "agent.head", "mixer.w1.0": "mixer.w1.2"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def trained(settings: LearnerSettings = SMALL, *, num_seeds: int = 2) -> Seeds:
    """In double precision."""
    learners = [make_one(settings, OBS_SIZE, seed) for seed in range(num_seeds)]
    for learner in learners:
        learner.online.double()
        learner.target.double()
    seeds = Seeds(learners)
    train(seeds, first=0)
    return seeds


def train(seeds: Seeds, *, first: int, num_updates: int = 3) -> None:
    for number in range(first, first + num_updates):
        obs, actions, reward = games(len(seeds), number=number)
        update(seeds.together, obs, Played(actions, reward))
        seeds.count_step()


def operate(seeds: Seeds, units: Units = RENEWED, *, number: int = 0, sites: tuple[str, ...] | None = None) -> None:
    seen = Seen(sites=seeds.sites if sites is None else seeds.sites.subset(sites))

    def act(seed: int, learner: Learner) -> int:
        return units.act(learner, seen, 100 * number + seed)

    assert all(seeds.operate(act, lack=units.lacking_member))


@torch.no_grad()
def outputs(seeds: Seeds) -> dict[str, Tensor]:
    """Of the agents, of the mixer, and of each layer behind hidden units."""
    obs, actions, _ = games(len(seeds), number=999)
    found: dict[str, Tensor] = {}

    def look(name: str, module: object, inputs: object, out: Tensor) -> None:
        found[name] = out[..., : seeds.together.online.get_parameter(f"{name}.weight").shape[1]].clone()

    networks = seeds.together.online
    names = {consumer_of(seeds.alone[0].online, site) for site in seeds.sites}
    handles = [networks.get_submodule(name).register_forward_hook(partial(look, name)) for name in names]
    found["agents"] = agent_values(seeds.together, obs)
    found["mixer"] = joint_values(seeds.together, found["agents"], obs, actions)
    for handle in handles:
        handle.remove()
    return found


def assert_same_outputs(seeds: Seeds, before: dict[str, Tensor]) -> None:
    torch.testing.assert_close(outputs(seeds), before, atol=1e-5, rtol=0)


def weights(seeds: Seeds) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in seeds.together.online.named_parameters()}


def operated_units(seeds: Seeds, site: str, seed: int) -> set[int]:
    return set(seeds.rows[seed][site].unit.tolist()) if site in seeds.rows[seed] else set()


# -- the output


@pytest.mark.parametrize(
    ("units", "retire", "settings"),
    [
        (RENEWED, None, SMALL),
        (EVERYTHING, None, replace(AGENTS, activation_fn="leaky_relu")),
        (CROWDED, 4, SMALL),
    ],
    ids=["half of the units", "all units", "members that fade and are taken out"],
)
def test_operations_in_a_row_leave_the_output(units: Units, settings: LearnerSettings, retire: int | None) -> None:
    units, seeds = replace(units, settings=replace(units.settings, retire=retire)), trained(settings)
    for operation in range(3):
        before = outputs(seeds)
        operate(seeds, units, number=operation)
        assert_same_outputs(seeds, before)
        train(seeds, first=10 * operation)
        assert float((outputs(seeds)["agents"] - before["agents"]).abs().max()) > 1e-3
    twice = [len(rows.unit) > 2 * len(rows.unit.unique()) for rows in seeds.rows[0].values()]
    assert all(twice)


def test_the_output_is_another_without_what_frozen_members_carry() -> None:
    seeds = trained()
    before = outputs(seeds)
    operate(seeds)
    for layer in seeds.layers.values():
        assert layer.differences is not None
        layer.differences.zero_()
    after = outputs(seeds)
    assert all(float((after[name] - before[name]).abs().max()) > 1e-3 for name in before)


def test_frozen_members_of_the_next_layer_compute_what_they_did() -> None:
    """Those that were made before, and those that come of rows to which differences were added."""
    seeds = trained(AGENTS, num_seeds=1)
    operate(seeds, EVERYTHING)
    train(seeds, first=10)
    operate(seeds, EVERYTHING, number=1)
    train(seeds, first=20)
    before = members(seeds)
    operate(seeds, EVERYTHING, number=2, sites=("agent.encoder.0",))
    torch.testing.assert_close(members(seeds), before, atol=1e-5, rtol=0)
    operate(seeds, EVERYTHING, number=3, sites=("agent.encoder.2",))
    live, frozen = members(seeds)
    knowledge, compensation = frozen[..., -2 * SMALL.agent_size :].chunk(2, dim=-1)
    torch.testing.assert_close(knowledge, before[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(compensation, live, atol=1e-5, rtol=0)


@torch.no_grad()
def members(seeds: Seeds) -> tuple[Tensor, Tensor]:
    """The active and the frozen members of the agents' second layer."""
    found: list[Tensor] = []
    function = seeds.layers["agent.encoder.2"].activation_fn
    handle = function.register_forward_hook(lambda module, inputs, out: found.append(out.clone()))
    agent_values(seeds.together, games(len(seeds), number=999)[0])
    handle.remove()
    active, frozen = found
    return active, frozen


def test_members_that_the_library_takes_out_as_they_count_nothing_are_not_missed() -> None:
    """At the bound on growth, compensation and the knowledge of an active member that never moved."""
    seeds, num_rows = trained(num_seeds=1), []
    for operation in range(4):
        before = outputs(seeds)
        operate(seeds, RENEWED if operation == 2 else CROWDED, number=operation)
        assert_same_outputs(seeds, before)
        num_rows.append(len(seeds.rows[0]["agent.encoder.0"].unit))
    assert num_rows == [12, 24, 18, 24]


def test_units_are_dead_whatever_comes_with_them() -> None:
    tasks = make_tasks(TaskSettings("contextual", 2, 2, num_contexts=4, num_features=OBS_SIZE), [0, 1])
    seeds = Seeds([make_one(SMALL, OBS_SIZE, seed) for seed in range(2)])
    operate(seeds)
    for layer in seeds.layers.values():
        layer.shares.zero_()
        layer.bias.data.fill_(-100)
        layer.frozen_bias.fill_(1.0)
    assert all(bool((share == 1).all()) for share in measure(seeds, tasks, 0).dead.values())


# -- the weights


@pytest.mark.parametrize("site", CONSUMERS)
def test_columns_of_operated_units_are_new_and_learn_while_the_difference_is_frozen(site: str) -> None:
    seeds, name = trained(), f"{CONSUMERS[site]}.weight"
    old = weights(seeds)[name]
    operate(seeds)
    new = weights(seeds)[name]
    for seed in range(2):
        own = operated_units(seeds, site, seed)
        others = [row for row in range(new.shape[1]) if row not in operated_units(seeds, CONSUMERS[site], seed)]
        has_changed = (new[seed, others] != old[seed, others]).all(dim=0)
        assert set(has_changed.nonzero().flatten().tolist()) == own
        assert 0 < len(own) < new.shape[2]
        assert float(new[seed][:, list(own)].abs().max()) <= new.shape[2] ** -0.5
    layer = seeds.layers[site]
    assert layer.differences is not None
    differences = layer.differences.clone()
    train(seeds, first=10, num_updates=5)
    assert torch.equal(layer.differences, differences)
    assert bool((weights(seeds)[name] != new).flatten(0, 1).any(dim=0).all())


@pytest.mark.parametrize("site", CONSUMERS)
def test_the_optimizer_knows_nothing_of_new_columns_and_what_it_knew_of_others(site: str) -> None:
    seeds, name = trained(), f"{CONSUMERS[site]}.weight"
    state = seeds.together.optimizer.state[seeds.together.online.get_parameter(name)]
    state["square_avg"].fill_(1.0)
    operate(seeds)
    for seed in range(2):
        expected = torch.ones_like(state["square_avg"][seed])
        expected[:, list(operated_units(seeds, site, seed))] = 0
        expected[list(operated_units(seeds, CONSUMERS[site], seed))] = 0  # rows drawn anew by the library
        assert torch.equal(state["square_avg"][seed], expected)
    assert float(state["step"]) == 3


def test_seeds_and_operations_draw_other_weights_and_the_same_again() -> None:
    def drawn(number: int) -> Tensor:
        seeds = trained(AGENTS)
        operate(seeds, EVERYTHING, number=number)
        return weights(seeds)["agent.head.weight"]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert torch.equal(first, again)
    assert not (first == other).any()
    assert not (first[0] == first[1]).any()


# -- the sums, on paper


def members_of(units: list[int], signs: list[int]) -> FrozenRows:
    none = torch.zeros(len(units))
    weight = torch.arange(len(units)).unsqueeze(1)
    return FrozenRows(weight, none, torch.tensor(units), torch.tensor(signs), none, none, none, none)


def test_differences_are_of_all_members_but_the_latest_compensation_and_add_up() -> None:
    first = carried_on(None, torch.tensor([[1.5, 0.0]]), members_of([0, 0], [1, -1]), None)
    assert first.table.tolist() == [[1.5], [0.0]]
    rows = members_of([0, 0, 0, 0, 1, 1], [1, -1, 1, -1, 1, -1])
    second = carried_on(first, torch.tensor([[1.0, 4.0]]), rows, None)
    assert second.table.tolist() == [[2.5], [-1.0], [1.0], [0.0], [4.0], [0.0]]


def test_differences_of_a_row_stay_with_what_it_knew() -> None:
    """Of two rows the first is operated on as well: it is fresh, and nothing of its change is carried."""
    rows, behind = members_of([0, 0, 0, 0], [1, -1, 1, -1]), members_of([0, 0], [1, -1])
    first = carried_on(None, torch.tensor([[1.5], [2.5]]), members_of([0, 0], [1, -1]), None)
    assert first.table.tolist() == [[1.5, 2.5], [0, 0]]
    second = carried_on(first, torch.tensor([[7.0], [1.0]]), rows, behind)
    assert second.table.tolist() == [[0, 3.5, 1.5, 0], [0, -1.0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 0]]


# -- runs


@pytest.mark.parametrize("settings", [replace(SMALL, algorithm="qplex"), replace(SMALL, agent="recurrent")])
def test_units_that_no_linear_layer_reads_are_refused(settings: LearnerSettings) -> None:
    seeds = Seeds([make_one(settings, OBS_SIZE, 0)])
    with pytest.raises(SettingsError, match=r"outgoing weights of .* anew, found a .* behind it"):
        operate(seeds, EVERYTHING)


def test_a_run_gives_the_same_again_and_another_than_with_outgoing_weights_kept() -> None:
    tasks = TaskSettings("contextual", 2, 6, num_contexts=4, num_features=OBS_SIZE)
    runs = [
        MatrixRun(tasks, SMALL, Intervention(units, Occasion(2))).run([0, 1])
        for units in (RENEWED, RENEWED, Units(KNIFE))
    ]
    looks = [[each["looks"] for each in run] for run in runs]
    assert looks[0] == looks[1] and looks[0] != looks[2]
    assert [[look[0] for look in run] for run in looks[:1]] == [[look[0] for look in run] for run in looks[2:]]
    assert all(each["units"] > 0 for each in runs[0])


def test_figure_7_has_it_among_its_ablations() -> None:
    asked = Asked.of("smoke")
    panels = {panel.name: panel for panel in FIGURES["figure7"].panels(asked, Results(Path("/nowhere")))}
    for name, panel in panels.items():
        assert ("outgoing weights renewed" in panel.arms) == name.startswith("ablations")
        if name.startswith("ablations"):
            assert not panel.missing
            (run,) = panel.arms["outgoing weights renewed"].run([1000])
            assert run["units"] > 0 and 2 * run["units"] == sum(run["rows"].values())
