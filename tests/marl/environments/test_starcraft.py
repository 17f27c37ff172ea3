"""The adapter of StarCraft II, driven by clients that are none; with the real ones where they are installed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from tensordict import TensorDict

from marl.agents import AgentInputs, FeedForwardAgent
from marl.configuring import Layer
from marl.environments import Smacv2Settings, Starcraft, make_environment
from marl.environments.starcraft_settings import POSITIONS
from marl.errors import GameError, MissingExtraError, SettingsError
from marl.rollout import collect, whole
from marl.run import make_run
from marl.training import train
from tests.marl.runs import Recorder, small

FAKES = "tests.marl.environments.fake_starcraft"
SIZES_3S_VS_5Z = (3, 11, 48, 68, 250)
AGENT = AgentInputs(num_agents=2, num_actions=7, obs_size=3)


@contextmanager
def playing(client: str, batch_size: int = 2) -> Iterator[Starcraft]:
    environment = Starcraft(Smacv2Settings(patience=60.0), batch_size, client=f"{FAKES}:{client}")
    yield environment
    environment.close()


def three_episodes(environment: Starcraft) -> list[TensorDict]:
    agent = FeedForwardAgent(AGENT)
    return [collect(environment, agent, epsilon=1.0, seed=seed) for seed in (1, 2, 3)]


@pytest.mark.parametrize("client", ["LosesConnection", "Dies"])
def test_a_crash_costs_the_step_in_which_it_happens_and_the_next_episode_is_played_anew(
    client: str, caplog: pytest.LogCaptureFixture
) -> None:
    with playing(client) as environment, caplog.at_level(logging.WARNING):
        first, crashed, after = three_episodes(environment)
        assert environment.num_restarts == 2
    assert "is begun anew" in caplog.text
    assert not first["broken"].any() and not after["broken"].any()
    assert crashed["broken"].all() and not crashed["terminated"].any() and not crashed["won"].any()
    assert crashed["mask"].tolist() == [[True, True, False, False, False]] * 2
    assert (
        crashed["obs"][:, :3, 0, 2].tolist() == [[0, 1, 2]] * 2
    )  # the last one is what the return is bootstrapped from
    assert crashed["reward"][:, 2].tolist() == [0, 0]
    assert first["obs"][:, 0, 0, 1].tolist() == [1, 1] and crashed["obs"][:, 0, 0, 1].tolist() == [2, 2]
    assert after["obs"][:, 0, 0, 1].tolist() == [1, 1]  # the first of another process
    assert after["mask"].sum(dim=1).min() >= 4
    assert len(whole(first)) == 2


def test_a_run_whose_games_crash_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Smacv2Settings, "client", f"{FAKES}:Dies")
    layer: Layer = {
        "tasks": [{"name": "battle", "environment": "smacv2"}],
        "training": {"num_steps": 30, "num_parallel": 2, "evaluate_every": 15, "num_evaluation_episodes": 4},
    }
    run, recorder = make_run(small(layer)), Recorder()
    train(run, recorder)
    assert run.is_over and run.progress.num_updates > 0
    assert isinstance(run.environment, Starcraft) and run.environment.num_restarts >= 2
    mask = run.replay.latest(len(run.replay))["mask"]
    assert (
        int(mask.sum()) == run.progress.num_steps and 2 in mask.sum(dim=1).tolist()
    )  # those cut short are learned from
    assert all(float(record["test/return"]) >= 0 for record in recorder.records)


def test_seeds_decide_the_teams_and_the_end_of_time_is_no_defeat() -> None:
    with playing("Client") as environment:
        first, _, _ = three_episodes(environment)
        again, other, _ = three_episodes(environment)
        drawn = [episodes["obs"][:, 0, 0, 0].tolist() for episodes in (first, again, other)]
        assert drawn[0] == drawn[1] != drawn[2] and drawn[0][0] != drawn[0][1]
        for episodes in (first, other):
            is_even = episodes["obs"][:, 0, 0, 0] % 2 == 0
            assert torch.equal(episodes["won"], is_even) and torch.equal(episodes["terminated"].any(dim=1), is_even)
            assert torch.equal(episodes["mask"].sum(dim=1), torch.where(is_even, 4, 5))
        assert environment.text(0).startswith("step ")


@pytest.mark.parametrize(
    ("client", "message"),
    [
        ("NeverSpawns", r"broke 3 times .* in 10 attempts no units appeared"),
        ("HasNoBinary", r"FileNotFoundError: ~/Star"),
    ],
)
def test_a_game_that_cannot_begin_ends_with_an_error_instead_of_trying_for_ever(client: str, message: str) -> None:
    with playing(client, batch_size=1) as environment, pytest.raises(GameError, match=message):
        environment.reset()


@pytest.mark.skipif(find_spec("smacv2") is not None, reason="smacv2 is installed")
def test_without_the_package_the_error_says_where_it_is() -> None:
    with pytest.raises(MissingExtraError, match=r"no smacv2; it is not on PyPI: `pip install git\+https"):
        make_environment("smacv2", 1)


def test_settings_that_make_no_game_are_refused_before_anything_is_started() -> None:
    with pytest.raises(SettingsError, match="there is no race 'elf'"):
        make_environment("smacv2", 1, race="elf")


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_have_the_names_of_the_package(positions: str) -> None:
    places = Smacv2Settings(positions=positions).arguments(0)["capability_config"]["start_positions"]
    assert places["dist_type"] in {"surrounded_and_reflect", "surrounded", "reflect_position"}  # all that it registers


@pytest.mark.skipif(find_spec("smacv2") is None, reason="smacv2 is not installed")
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_package_makes_games_with_all_positions(positions: str) -> None:
    assert make_environment("smacv2", 1, positions=positions).spec.num_agents == 5


@pytest.mark.skipif(find_spec("smac") is None, reason="smac is not installed")
def test_smac_has_the_published_sizes() -> None:
    spec = make_environment("smac", 1).spec
    assert (spec.num_agents, spec.num_actions, spec.obs_size, spec.state_size, spec.episode_limit) == SIZES_3S_VS_5Z


@pytest.mark.skipif(find_spec("smacv2") is None, reason="smacv2 is not installed")
@pytest.mark.parametrize(("race", "obs", "state"), [("protoss", 92, 130), ("terran", 82, 120), ("zerg", 82, 120)])
def test_the_package_has_the_published_sizes(race: str, obs: int, state: int) -> None:
    spec = make_environment("smacv2", 1, race=race).spec
    assert (spec.num_agents, spec.num_actions, spec.obs_size, spec.state_size, spec.episode_limit) == (
        5,
        11,
        obs,
        state,
        200,
    )


@pytest.mark.slow
@pytest.mark.skipif(find_spec("smacv2") is None or "SC2PATH" not in os.environ, reason="needs smacv2 and SC2PATH")
def test_two_real_games_are_played_to_their_ends() -> None:
    environment = Starcraft(Smacv2Settings(), 2)
    inputs = AgentInputs(num_agents=5, num_actions=11, obs_size=92)
    episodes = collect(environment, FeedForwardAgent(inputs), epsilon=1.0, seed=0)
    environment.close()
    assert episodes["mask"].any(dim=1).all() and not episodes["broken"].any()
