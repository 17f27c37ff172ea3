"""Seeds side by side do what each would alone, with the library's own banks, fades and optimizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import Tensor

from marl.errors import SettingsError
from marl.learner import Learner
from marl.reproduce.matrix.interventions import Intervention, Layers, Occasion, Units
from marl.reproduce.matrix.learners import LearnerSettings, agent_values, episodes_of, joint_values, make_one, update
from marl.reproduce.matrix.outcomes import measure
from marl.reproduce.matrix.runs import MatrixRun
from marl.reproduce.matrix.seeds import Seeds
from marl.reproduce.matrix.tasks import Kind, TaskSettings, draw, make_tasks
from marl.reproduce.matrix.units import Lack
from marl.run_settings import SurgerySettings
from marl.settings import Algorithm
from marl.stacking import stack_modules
from marl.surgery import Seen, operate_on_units

OBS_SIZE = 4
SMALL = LearnerSettings(agent_size=6, hypernet_size=6, embed_size=4, learning_rate=1e-2)
KNIFE = SurgerySettings(method="knife", criterion="random", threshold=0.5, cooldown=0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def pair_of(settings: LearnerSettings = SMALL, num_seeds: int = 2) -> tuple[list[Learner], Seeds]:
    """The same learners alone and side by side, in double precision."""
    alone, others = ([make_one(settings, OBS_SIZE, seed) for seed in range(num_seeds)] for _ in range(2))
    for learner in (*alone, *others):
        learner.online.double()
        learner.target.double()
    return alone, Seeds(others)


def games(num_seeds: int = 2, *, number: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    obs = torch.randn(num_seeds, 8, OBS_SIZE, generator=generator, dtype=torch.float64)
    actions = torch.randint(3, (num_seeds, 8, 2), generator=generator)
    return obs, actions, torch.randn(num_seeds, 8, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Played:
    """Games that were played already, whatever the values."""

    actions: Tensor
    reward: Tensor

    def __call__(self, agent_qs: Tensor) -> tuple[Tensor, Tensor]:
        return self.actions, self.reward


def train_both(alone: list[Learner], seeds: Seeds, *, num_updates: int, first: int = 0) -> None:
    for number in range(first, first + num_updates):
        obs, actions, reward = games(len(seeds), number=number)
        update(seeds.together, obs, Played(actions, reward))
        seeds.count_step()
        for seed, learner in enumerate(alone):
            learner.update(episodes_of(obs[seed], actions[seed], reward[seed]))


def assert_alike(alone: list[Learner], seeds: Seeds) -> None:
    obs, actions, _ = games(len(seeds), number=999)
    together = joint_values(seeds.together, agent_values(seeds.together, obs), obs, actions)
    for seed, learner in enumerate(alone):
        own = joint_values(learner, agent_values(learner, obs[seed]), obs[seed], actions[seed])
        torch.testing.assert_close(together[seed], own, atol=1e-6, rtol=1e-6)  # epsilon of fades is float32's


@pytest.mark.parametrize("algorithm", ["vdn", "qmix", "qplex"])
@pytest.mark.parametrize("agent", ["feed_forward", "recurrent"])
def test_an_update_is_the_learners(algorithm: Algorithm, agent: str) -> None:
    alone, seeds = pair_of(LearnerSettings(algorithm, agent, agent_size=6, hypernet_size=6, embed_size=4))  # type: ignore[arg-type]
    train_both(alone, seeds, num_updates=3)
    assert_alike(alone, seeds)


@pytest.mark.parametrize("algorithm", ["vdn", "qmix", "qplex"])
def test_games_that_look_alike_may_share_an_observation(algorithm: Algorithm) -> None:
    settings = replace(SMALL, algorithm=algorithm)
    one, all_games = (Seeds([make_one(settings, OBS_SIZE, 0)]) for _ in range(2))
    _, actions, reward = games(1)
    obs = torch.ones(1, 1, OBS_SIZE)
    for seeds, shown in ((one, obs), (all_games, obs.expand(-1, 8, -1))):
        for _ in range(3):
            update(seeds.together, shown, Played(actions, reward))
    for mine, other in zip(one.together.online.parameters(), all_games.together.online.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("method", "retire"), [("knife", None), ("knife", 3), ("fade_to_fresh", 3)])
@pytest.mark.parametrize("algorithm", ["qmix", pytest.param("qplex", marks=pytest.mark.slow)])
def test_operated_seeds_go_on_as_the_library_has_them(algorithm: Algorithm, method: str, retire: int | None) -> None:
    """Two operations, the second in the midst of the first's fade, units that differ from seed to seed."""
    alone, seeds = pair_of(replace(SMALL, algorithm=algorithm))
    settings = replace(KNIFE, method=method, retire=retire)
    train_both(alone, seeds, num_updates=2)
    for operation in range(2):
        first = 10 * (operation + 1)

        def act(seed: int, learner: Learner, operation: int = operation) -> object:
            return operate_on_units(learner, settings, Seen(), seed=10 * operation + seed)

        operated = seeds.operate(act)
        assert [act(seed, learner) for seed, learner in enumerate(alone)] == operated
        assert operated[0] != operated[1]
        assert_alike(alone, seeds)
        train_both(alone, seeds, num_updates=2, first=first)
        assert_alike(alone, seeds)
    train_both(alone, seeds, num_updates=4, first=90)
    assert_alike(alone, seeds)
    gone = [layer.num_rows == 0 for layer in seeds.layers.values()]
    assert all(gone) if retire else not any(gone)


def test_an_operation_leaves_the_output() -> None:
    alone, seeds = pair_of()
    train_both(alone, seeds, num_updates=3)
    seeds.operate(lambda seed, learner: operate_on_units(learner, KNIFE, Seen(), seed=seed))
    assert any(layer.num_rows for layer in seeds.layers.values())
    assert_alike(alone, seeds)


def operated(_: int, learner: Learner, *, settings: SurgerySettings, number: int) -> object:
    return operate_on_units(learner, settings, Seen(), seed=number)


def test_composites_without_a_member_compute_another_output() -> None:
    outputs = {}
    lacks: tuple[Lack, ...] = ("nothing", "knowledge", "compensation")
    for lack in lacks:
        _, seeds = pair_of()
        for operation in range(2):  # the second time on units that have rows already
            everything = replace(KNIFE, criterion="all")
            seeds.operate(partial(operated, settings=everything, number=operation), lack=lack)
        obs, _, _ = games(number=5)
        layer = seeds.layers["agent.encoder.0"]
        inputs = torch.cat([obs, obs[..., :2]], dim=-1)
        outputs[lack] = layer(inputs).detach()
    _, seeds = pair_of()
    first = seeds.layers["agent.encoder.0"](inputs).detach()
    torch.testing.assert_close(outputs["nothing"], first)
    assert outputs["knowledge"].abs().max() < 1e-6  # a fresh member less its copy
    # the old unit, the first fresh one and the second
    assert bool((outputs["compensation"] >= first - 1e-5).all())
    assert float((outputs["compensation"] - first).abs().max()) > 0.1


def test_norms_are_those_of_each_seeds_gradients() -> None:
    _, seeds = pair_of()
    obs, actions, reward = games()
    update(seeds.together, obs, Played(actions, reward))
    weight, gradient = seeds.norms()["mixer.w1.0"]
    parameter = seeds.together.online.get_parameter("mixer.w1.0.weight")
    assert parameter.grad is not None
    assert float(weight[1, 2]) == pytest.approx(float(parameter.detach()[1, 2].norm()))
    assert float(gradient[1, 2]) == pytest.approx(float(parameter.grad[1, 2].norm()))


def test_forgotten_moments_are_a_fresh_optimizers_and_the_count_goes_on() -> None:
    alone, seeds = pair_of()
    train_both(alone, seeds, num_updates=3)
    seeds.forget_moments()
    for learner in alone:
        learner.optimizer.state.clear()
    train_both(alone, seeds, num_updates=1, first=7)
    assert_alike(alone, seeds)
    states = seeds.together.optimizer.state.values()
    assert {float(state["step"]) for state in states} == {4.0}


def test_a_layer_that_was_operated_on_is_not_stacked_without_its_bank() -> None:
    learner = make_one(SMALL, OBS_SIZE, 0)
    operate_on_units(learner, KNIFE, Seen(), seed=0)
    with pytest.raises(SettingsError, match=r"found 'composite' .* on it"):
        stack_modules([learner.online])


# -- tasks


@pytest.mark.parametrize("kind", ["literal", "contextual"])
def test_a_seed_meets_the_same_whoever_is_beside_it(kind: Kind) -> None:
    settings = TaskSettings(kind, num_tasks=4, num_updates=3)
    one, many = make_tasks(settings, [7]), make_tasks(settings, [3, 7])
    assert torch.equal(one.payoffs[0], many.payoffs[1])
    assert not torch.equal(many.payoffs[0], many.payoffs[1])
    for entry in ("contexts", "actions", "luck"):
        assert torch.equal(getattr(draw(settings, [7], 2), entry)[0], getattr(draw(settings, [3, 7], 2), entry)[1])
    assert not torch.equal(draw(settings, [7], 2).actions, draw(settings, [7], 1).actions)


def test_literal_tasks_are_permutations_that_move_the_optimum_and_end_with_the_first() -> None:
    payoffs = make_tasks(TaskSettings("literal", num_tasks=6, num_updates=2), range(5)).payoffs[:, :, 0]
    first = torch.tensor([[-10.0, -10, 12], [-9, -12, -8], [-4, -8, -11]])
    assert bool((payoffs[:, 0] == first).all()) and bool((payoffs[:, -1] == first).all())
    assert torch.equal(payoffs.flatten(2).sort(-1).values, first.flatten().sort().values.expand(5, 6, -1))
    best = payoffs.flatten(2).argmax(-1)
    assert bool((best[:, 1:-1] != best[:, :-2]).all())


def test_contextual_payoffs_are_sums_of_the_agents_parts() -> None:
    payoffs = make_tasks(TaskSettings("contextual", num_tasks=2, num_updates=2), [0]).payoffs
    inner = payoffs - payoffs.mean(-1, keepdim=True) - payoffs.mean(-2, keepdim=True)
    torch.testing.assert_close(inner, -payoffs.mean((-1, -2), keepdim=True).expand_as(inner), atol=1e-5, rtol=1e-5)


def test_epsilon_greedy_agents_play_their_best_actions() -> None:
    run = MatrixRun(TaskSettings("literal", 2, 20), replace(SMALL, exploration="epsilon"))
    assert run.run([0])[0]["looks"] != MatrixRun(run.tasks, SMALL).run([0])[0]["looks"]


# -- what is measured


def test_what_is_measured_of_a_perfect_and_of_a_blind_learner() -> None:
    settings = TaskSettings("contextual", 2, 2, num_contexts=4, num_features=OBS_SIZE)
    tasks = make_tasks(settings, [0])
    seeds = Seeds([make_one(replace(SMALL, algorithm="vdn"), OBS_SIZE, 0)])
    with torch.no_grad():
        for parameter in seeds.together.online.parameters():
            parameter.zero_()
    tasks.payoffs.copy_(tasks.payoffs - tasks.payoffs.mean((2, 3, 4), keepdim=True))
    blind = measure(seeds, tasks, 0)
    assert float(blind.error) == pytest.approx(1.0, abs=1e-5)
    assert float(blind.spread) == 0
    assert float(blind.dead["agent"]) == 1
    earned = tasks.payoffs[0, 0, :, 0, 0]
    best = tasks.payoffs[0, 0].flatten(1).amax(1)
    assert float(blind.solved) == pytest.approx(float((earned == best).float().mean()))
    assert float(blind.regret) == pytest.approx(float((best - earned).mean() / tasks.deviation(0)), rel=1e-4)
    with torch.no_grad():
        tasks.payoffs.copy_(torch.full_like(tasks.payoffs, -1.0))
        tasks.payoffs[..., 0, 0] = 0.0
    assert float(measure(seeds, tasks, 0).solved) == 1


# -- runs


def test_runs_give_the_same_again_and_only_differ_in_what_is_done() -> None:
    tasks = TaskSettings("contextual", 3, 6, num_contexts=4, num_features=OBS_SIZE)
    acts = {
        "none": Intervention(),
        "knife": Intervention(Units(KNIFE), Occasion(2)),
        "head": Intervention(Layers("scale_head", ("agent.head",), 0.1)),
        "optimizer": Intervention(Layers("reset_optimizer")),
    }
    runs = {name: MatrixRun(tasks, SMALL, act).run([0, 1]) for name, act in acts.items()}
    again = MatrixRun(tasks, SMALL, acts["knife"]).run([0, 1])
    assert [each["looks"] for each in again] == [each["looks"] for each in runs["knife"]]
    firsts = [[each["looks"][0] for each in run] for run in runs.values()]
    assert all(first == firsts[0] for first in firsts)  # nothing is done in the first task
    lasts = [str(run[0]["looks"][-1]) for run in runs.values()]
    assert len(set(lasts)) == len(lasts)
    assert runs["none"][0]["units"] == 0 and runs["knife"][0]["units"] > 0


def test_the_sequence_may_reset_the_optimizer_itself() -> None:
    tasks = TaskSettings("contextual", 3, 6, num_contexts=4, num_features=OBS_SIZE)
    own = MatrixRun(replace(tasks, does_reset_optimizer=True), SMALL).run([0])
    done = MatrixRun(tasks, SMALL, Intervention(Layers("reset_optimizer"))).run([0])
    assert own[0]["looks"] == done[0]["looks"]


def test_a_reset_of_everything_leaves_no_trace_of_what_was_learned() -> None:
    weights = []
    for number in (0, 1):
        alone, seeds = pair_of(num_seeds=1)
        train_both(alone, seeds, num_updates=2, first=10 * number)
        seeds.operate(lambda _, learner: Layers("reset").act(learner, (), seed=3))
        weights.append([parameter.detach().clone() for parameter in seeds.together.online.parameters()])
        assert all(not state["square_avg"].any() for state in seeds.together.optimizer.state.values())
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


@pytest.mark.parametrize("state", ["peers", "kept"])
def test_what_the_optimizer_knows_of_new_rows_can_be_chosen(state: str) -> None:
    learner = make_one(SMALL, OBS_SIZE, 0)
    obs, actions, reward = games(1)
    learner.update(episodes_of(obs[0], actions[0], reward[0]))
    moments = learner.optimizer.state[learner.online.get_parameter("agent.encoder.0.weight")]["square_avg"]
    before = moments.clone()
    units = Units(replace(KNIFE, criterion="all", parts=("agent",)), state=state)  # type: ignore[arg-type]
    units.act(learner, Seen(probed=episodes_of(obs[0], actions[0], reward[0])), seed=0)
    after = learner.optimizer.state[learner.online.get_parameter("agent.encoder.0.weight")]["square_avg"]
    expected = before if state == "kept" else before.amax(0).expand_as(before)
    torch.testing.assert_close(after, expected)


def test_without_renewal_the_active_member_begins_as_the_unit_was() -> None:
    learner = make_one(SMALL, OBS_SIZE, 0)
    before = {name: value.detach().clone() for name, value in learner.online.named_parameters()}
    obs, actions, reward = games(1)
    Units(KNIFE, lack="renewal").act(learner, Seen(probed=episodes_of(obs[0], actions[0], reward[0])), seed=0)
    assert "agent.encoder.0.composite.frozen_weight" in learner.online.state_dict()
    for name, value in learner.online.named_parameters():
        torch.testing.assert_close(value, before[name])
    fresh = make_one(SMALL, OBS_SIZE, 0)
    batch = games(1, number=3)[0][0]
    torch.testing.assert_close(agent_values(learner, batch), agent_values(fresh, batch), atol=1e-6, rtol=1e-5)


def test_a_shuffled_choice_has_as_many_units_of_each_layer() -> None:
    chosen = []
    for is_shuffled in (False, True):
        learner = make_one(replace(SMALL, agent_size=32), OBS_SIZE, 0)
        obs, actions, reward = games(1)
        learner.update(episodes_of(obs[0], actions[0], reward[0]))
        settings = replace(KNIFE, criterion="dormant", threshold=0.5)
        seen = Seen(probed=episodes_of(obs[0], actions[0], reward[0]))
        chosen.append(operate_on_units(learner, settings, seen, seed=1, is_shuffled=is_shuffled))
    told, drawn = chosen
    assert {site: len(units) for site, units in told.items()} == {site: len(units) for site, units in drawn.items()}
    assert told != drawn
