"""SMAX: its rules are JaxMARL's, what is made of them is the protocol's."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from marl.agents import AgentInputs, FeedForwardAgent
from marl.cli import app
from marl.environments import Observation, Outcome, Smax, SmaxSettings, make_environment
from marl.environments.smax_settings import GENERATED, RACES, STOP
from marl.errors import ActionError, CheckpointError, MissingExtraError, SettingsError
from marl.evaluation import evaluate
from marl.logs import read_csv
from marl.records import Averages
from marl.rollout import collect
from tests.marl.environments.battles import NEEDS_SMAX, NUM_BATTLES, SETTINGS, WITHOUT, battles, one_at_a_time
from tests.marl.environments.playing import uniform_actions

ROOT = Path(__file__).parents[2]
EAST = 1


@pytest.fixture(scope="module")
def _compiled() -> None:
    """Compiles what the quick tests play, in one process, or loads what another has compiled."""
    if find_spec("jaxmarl") is None:
        pytest.skip(WITHOUT)
    with one_at_a_time(ROOT / ".pytest_cache" / "jax"):
        environment = battles()
        environment.reset()
        environment.step(torch.full((NUM_BATTLES, environment.spec.num_agents), STOP))


@pytest.fixture
def game(_compiled: None) -> Smax:
    """Four battles of three marines against three."""
    return battles()


def played(environment: Smax, num_steps: int, policy: Callable[[Observation], Tensor]) -> Iterator[Outcome]:
    """What follows from the observation that the environment stands at."""
    observation = environment.reset(seed=2)
    for _ in range(num_steps):
        outcome = environment.step(policy(observation))
        yield outcome
        observation = outcome.observation


def at_random(seed: int = 5) -> Callable[[Observation], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda observation: uniform_actions(observation.avail_actions, generator)


def stand(observation: Observation) -> Tensor:
    return torch.full(observation.avail_actions.shape[:2], STOP)


def charge(observation: Observation) -> Tensor:
    """Shoot at the first enemy in range, else go east, where they are: this wins every other battle."""
    shots = observation.avail_actions[..., STOP + 1 :]
    go = torch.where(observation.avail_actions[..., EAST], EAST, STOP)
    return torch.where(shots.any(dim=2), STOP + 1 + shots.long().argmax(dim=2), go)


# -- the rules


@NEEDS_SMAX
def test_an_episode_is_what_jaxmarl_computes_from_the_same_keys(game: Smax) -> None:
    import jax
    from jaxmarl.environments.smax import HeuristicEnemySMAX, map_name_to_scenario

    theirs, lane, policy = HeuristicEnemySMAX(scenario=map_name_to_scenario("3m")), 2, at_random()
    game.reset(seed=2**33 + 7)
    seen = game.reset()  # the second episodes of the seed
    key = jax.random.fold_in(jax.random.fold_in(np.array([2, 7], dtype=np.uint32), lane), 1)
    reset_key, key = jax.random.split(key)
    their_obs, their_state = theirs.reset(reset_key)
    for _ in range(25):
        assert_same(seen, lane, theirs, their_obs, their_state)
        actions = policy(seen)
        outcome = game.step(actions)
        key, step_key = jax.random.split(key)
        taken = {agent: actions[lane, number].item() for number, agent in enumerate(theirs.agents)}
        their_obs, their_state, rewards, dones, _ = theirs.step_env(step_key, their_state, taken)
        seen = outcome.observation
        assert float(outcome.reward[lane]) == pytest.approx(10 * float(rewards["ally_0"]), abs=1e-5)
        assert bool(outcome.terminated[lane]) == bool(dones["__all__"])
        if dones["__all__"]:
            break
    assert_same(seen, lane, theirs, their_obs, their_state)
    assert game.spec.num_actions == theirs.action_space("ally_0").n


def assert_same(seen: Observation, lane: int, theirs: Any, their_obs: Any, their_state: Any) -> None:
    available = theirs.get_avail_actions(their_state)
    obs = np.stack([their_obs[agent] for agent in theirs.agents])
    world = np.array(their_obs["world_state"])
    units = world[: 6 * 10].reshape(6, 10)  # health, x, y, cooldown, six types
    units[:, 1:3] /= 32
    units[:, 3] /= 2
    assert seen.obs[lane].numpy() == pytest.approx(obs, abs=1e-5)
    assert seen.state[lane].numpy() == pytest.approx(world, abs=1e-5)
    assert seen.avail_actions[lane].tolist() == [(available[agent] > 0).tolist() for agent in theirs.agents]


def test_a_team_that_charges_wins_most_battles_and_one_that_stands_loses_all(game: Smax) -> None:
    *_, last = played(game, 60, charge)
    *_, stood = played(game, 60, stand)
    assert last.won is not None and stood.won is not None
    assert last.won.tolist().count(True) == 3 and last.terminated.all()
    assert stood.terminated.all() and not stood.won.any()


def test_an_episode_earns_at_most_twice_the_scale_and_that_only_for_a_win(game: Smax) -> None:
    outcomes = list(played(game, 60, charge))
    returns = torch.stack([outcome.reward for outcome in outcomes]).sum(dim=0)
    won = outcomes[-1].won
    assert won is not None and won.any() and not won.all()
    assert returns[won] == pytest.approx(20, abs=1e-4)
    assert (returns[~won] < 10).all() and (returns >= 0).all()


def test_the_scale_of_rewards_and_state_are_settings(game: Smax) -> None:
    plain = battles(replace(SETTINGS, reward_scale=1.0, scaled_state=False))
    pairs = zip(played(game, 12, stand), played(plain, 12, stand), strict=True)
    for scaled, outcome in pairs:
        assert torch.allclose(scaled.reward, 10 * outcome.reward)
        assert torch.equal(scaled.observation.obs, outcome.observation.obs)
    assert outcome.observation.state.max() > 10 and scaled.observation.state.max() <= 1


def test_the_dead_can_only_stop(game: Smax) -> None:
    health = 10  # of the last six numbers of types and four of self: where an agent's own features begin
    num_dead = 0
    for outcome in played(game, 40, at_random()):
        dead = (outcome.observation.obs[..., -health] == 0) & ~(outcome.terminated | outcome.truncated)[:, None]
        num_dead += int(dead.sum())
        available = outcome.observation.avail_actions[dead]
        assert available[:, STOP].all() and (available.sum(dim=1) == 1).all()
        assert not outcome.observation.obs[dead].any()
    assert num_dead > 10


# -- the protocol


def test_a_battle_that_nobody_decides_is_truncated_and_not_terminated(_compiled: None) -> None:
    game = battles(replace(SETTINGS, episode_limit=3))
    *before, last, after = played(game, 4, stand)
    for outcome in before:
        assert not (outcome.truncated | outcome.terminated).any()
    for outcome in (last, after):
        assert outcome.truncated.all() and not outcome.terminated.any()
    assert last.observation.avail_actions.sum() > after.observation.avail_actions.sum()


def test_a_battle_decided_at_the_limit_is_terminated(game: Smax) -> None:
    ended = [outcome.terminated for outcome in played(game, 60, charge)]
    first = next(number for number, terminated in enumerate(ended) if terminated.any())
    *_, last = played(battles(replace(SETTINGS, episode_limit=first + 1)), first + 1, charge)
    assert torch.equal(last.terminated, ended[first]) and torch.equal(last.truncated, ~ended[first])


def test_a_battle_that_ended_stays_as_it_is_while_others_go_on(game: Smax) -> None:
    last: Outcome | None = None
    num_frozen = 0
    for outcome in played(game, 60, charge):  # which leaves survivors, who could act and would win again
        if last is not None:
            ended = last.terminated | last.truncated
            num_frozen += int(ended.sum()) if not ended.all() else 0
            assert not outcome.reward[ended].any()
            assert torch.equal(outcome.observation.obs[ended], last.observation.obs[ended])
            assert torch.equal(outcome.observation.state[ended], last.observation.state[ended])
            only_stop = outcome.observation.avail_actions[ended]
            assert only_stop[..., STOP].all() and (only_stop.sum(dim=2) == 1).all()
            assert outcome.won is not None and last.won is not None
            assert torch.equal(outcome.won[ended], last.won[ended])
        last = outcome
    assert num_frozen > 0


def test_a_seed_gives_its_episodes_again_and_without_one_others_follow(game: Smax) -> None:
    first, second = game.reset(seed=3), game.reset()
    again, other = game.reset(seed=3), battles(seed=4).reset()
    assert torch.equal(first.obs, again.obs) and torch.equal(battles(seed=3).reset().obs, first.obs)
    assert torch.equal(game.reset().obs, second.obs)
    assert not torch.equal(first.obs, second.obs) and not torch.equal(first.obs, other.obs)
    assert len(first.state.unique(dim=0)) == NUM_BATTLES
    assert not torch.equal(game.reset(seed=3 + 2**32).obs, first.obs)


def test_one_program_serves_all_steps(game: Smax) -> None:
    list(played(game, 5, at_random()))
    list(played(game, 5, at_random()))
    assert game.num_programs == 2  # to begin, and to step


def test_actions_that_cannot_be_taken_are_refused(game: Smax) -> None:
    game.reset(seed=0)
    with pytest.raises(ActionError, match="agent 0 of episode 0 took action 7; available to it: 0, 1, 2, 3, 4"):
        game.step(torch.full((NUM_BATTLES, game.spec.num_agents), 7))  # nobody is in range at the start
    with pytest.raises(ActionError, match="before the first reset"):
        battles().step(torch.zeros(NUM_BATTLES, game.spec.num_agents, dtype=torch.long))


def test_a_battle_saved_in_its_middle_goes_on_as_if_it_had_not_been(game: Smax, tmp_path: Path) -> None:
    policy = at_random()
    *_, last = played(game, 8, policy)
    torch.save(game.state_dict(), tmp_path / "battle.pt")
    rest = [game.step(stand(last.observation)) for _ in range(10)]
    game.reset()
    follows = game.reset().obs
    other = battles()
    other.load_state_dict(torch.load(tmp_path / "battle.pt", weights_only=True))
    for outcome in rest:
        found = other.step(stand(last.observation))
        assert found.reward.any() == outcome.reward.any() and torch.equal(found.reward, outcome.reward)
        assert torch.equal(found.observation.obs, outcome.observation.obs)
        assert torch.equal(found.observation.avail_actions, outcome.observation.avail_actions)
        assert torch.equal(found.terminated, outcome.terminated)
    other.reset()
    assert torch.equal(other.reset().obs, follows)


def test_a_battle_of_other_sizes_is_not_gone_on_with(game: Smax) -> None:
    game.reset()
    with pytest.raises(CheckpointError, match=r"go on with 5 episodes of .* found .*: use the scenario"):
        Smax(SETTINGS, 5).load_state_dict(game.state_dict())


def test_the_picture_shows_who_is_where(game: Smax) -> None:
    game.reset(seed=0)
    *rows, units = game.text(1).splitlines()
    assert [len(row) for row in rows] == [32] * 16
    assert 1 <= "".join(rows).count("A") <= 3 and 1 <= "".join(rows).count("E") <= 3  # two may be in one cell
    assert all(row[16:].count("A") == 0 == row[:16].count("E") for row in rows)
    assert units == ", ".join(["A marine 45"] * 3 + ["E marine 45"] * 3)


# -- scenarios


@NEEDS_SMAX
@pytest.mark.parametrize(
    ("scenario", "sizes"),
    [
        ("3s_vs_5z", (3, 10, 101, 96)),
        ("smacv2_5_units", (5, 10, 127, 120)),
        ("5gen_protoss", (5, 10, 127, 120)),
        ("10gen_zerg_vs_11", (10, 16, 270, 252)),
    ],
)
def test_a_scenario_by_name_has_its_sizes(scenario: str, sizes: tuple[int, ...]) -> None:
    spec = make_environment("smax", 2, scenario=scenario).spec
    assert (spec.num_agents, spec.num_actions, spec.obs_size, spec.state_size) == sizes
    assert spec.episode_limit == 100


@NEEDS_SMAX
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scenario": "3s_vs_5s"}, "there is no scenario '3s_vs_5s' in SMAX; did you mean '3s_vs_5z'"),
        ({"scenario": "5gen_protos"}, "did you mean '5gen_protoss'"),
        ({"scenery": "3m"}, "smax has no option 'scenery'; did you mean 'scenario'?"),
    ],
)
def test_what_is_no_scenario_is_refused_with_a_suggestion(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_environment("smax", 2, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": "protos"}, "there is no units 'protos'; did you mean 'protoss'?"),
        ({"positions": "reflect"}, "there is no positions 'reflect'; did you mean 'reflected'?"),
        ({"episode_limit": 0}, "episode_limit is 0; it must be at least 1"),
        ({"reward_scale": 0.0}, "reward_scale is 0.0; it must be above 0"),
        ({"scenario": 3}, "scenario is 3; it must be of type str"),
    ],
)
def test_settings_that_make_no_battle_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("?", r"\?")):
        SmaxSettings(**options)


def test_races_have_the_shares_of_smacv2_and_scenarios_its_sizes() -> None:
    assert RACES["protoss"] == {"stalker": 0.45, "zealot": 0.45}
    assert {(each.num_allies, each.num_enemies) for each in GENERATED.values()} == {
        *((5, 5), (10, 10), (20, 20), (10, 11), (20, 23))
    }
    assert len(GENERATED) == 15


@NEEDS_SMAX
def test_enemies_are_drawn_as_the_allies_and_any_more_by_the_same_shares(_compiled: None) -> None:
    import jax

    from marl.environments.smax_jax import DrawnTeams

    teams = DrawnTeams((0.0, 0.0, 0.45, 0.45, 0.0, 0.0), num_allies=3, num_enemies=5)
    drawn = np.stack([teams.generate(jax.random.PRNGKey(number)) for number in range(60)])
    assert drawn.shape == (60, 8) and set(drawn.flat) == {2, 3}
    assert (drawn[:, :3] == drawn[:, 3:6]).all()
    for unit in (0, 1, 2, 6, 7):
        assert 15 < (drawn[:, unit] == 2).sum() < 45


@NEEDS_SMAX
@pytest.mark.slow
def test_all_scenarios_begin_and_their_teams_are_where_and_what_they_should_be() -> None:
    for race in RACES:
        names = {name for name, weight in RACES[race].items() if weight}
        *rows, units = first_text(scenario=f"5gen_{race}")
        assert {word.split()[1] for word in units.split(", ")} <= names, rows
    sides = [first_text(scenario="3m", positions=positions) for positions in ("facing", "reflected")]
    assert all(row[16:].count("A") == 0 for rows in sides for row in rows[:-1])
    stalkers = first_text(scenario="3m", units="protoss")[-1]
    assert "marine" not in stalkers
    assert first_text(scenario="3m", positions="surrounded") != sides[0]


def first_text(**options: Any) -> list[str]:
    environment = make_environment("smax", 2, **options)
    environment.reset(seed=1)
    return environment.text(0).splitlines()


# -- the trainer


def test_evaluation_tells_how_many_were_won(game: Smax) -> None:
    agent = FeedForwardAgent(AgentInputs(num_agents=3, num_actions=8, obs_size=75))
    result = evaluate(game, agent, seed=0, num_episodes=4, epsilon=1.0)
    assert result.won is not None and result.won.shape == (4,)
    assert result.win_rate == float(result.won.float().mean())
    assert torch.equal(result.won, result.returns > 10)


def test_where_nothing_is_won_nothing_is_said_of_it() -> None:
    agent = FeedForwardAgent(AgentInputs(num_agents=2, num_actions=3, obs_size=5))
    game = make_environment("matrix_game", 4)
    result = evaluate(game, agent, seed=0, num_episodes=4)
    assert result.won is None and result.win_rate is None
    averages = Averages()
    averages.add_episodes(collect(game, agent, epsilon=0.0, seed=0))
    assert "train/win_rate" not in averages.take()


def test_training_from_the_command_line_logs_the_win_rate(_compiled: None, tmp_path: Path) -> None:
    small = ["agent.hidden_size=8", "mixer.embed_size=4", "replay.batch_size=4"]
    words = [f"learning.{each}" for each in small]
    words += ["tasks.0.options.scenario=3m", f"training.num_parallel={NUM_BATTLES}"]
    words += [f"training.num_evaluation_episodes={NUM_BATTLES}", "training.num_steps=150"]
    arguments = ["train", "--algorithm", "qmix", "--environment", "smax", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, [*arguments, *(word for each in words for word in ("--set", each))])
    assert result.exit_code == 0, result.output
    (record,) = read_csv(tmp_path / "log.csv")
    assert 0 <= float(record["test/win_rate"]) <= 1 and 0 <= float(record["train/win_rate"]) <= 1
    shown = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--episodes", str(NUM_BATTLES)])
    assert "won" in shown.output and "%" in shown.output


# -- who needs what


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "jax"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("smax_jax", "smax_games"):
        monkeypatch.delitem(sys.modules, f"marl.environments.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "jax", None)
    needed = r"jax is not installed; install what SMAX needs with `pip install 'neuronsurgery\[smax\]'`"
    with pytest.raises(MissingExtraError, match=needed):
        make_environment("smax", 2)
    result = CliRunner().invoke(app, ["train", "--algorithm", "qmix", "--environment", "smax"])
    assert result.exit_code == 2 and "neuronsurgery[smax]" in result.output


def test_only_one_file_imports_jax() -> None:
    assert {path.name for path in (ROOT / "marl").rglob("*.py") if imports_jax(path)} == {"smax_jax.py"}


def imports_jax(path: Path) -> bool:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [each.name for node in nodes if isinstance(node, ast.Import) for each in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return any(name.partition(".")[0] in ("jax", "jaxmarl", "jaxlib", "flax") for name in names)
