from __future__ import annotations

import importlib
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mpe2 import simple_spread_v3
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Categorical, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase, PettingZooWrapper, SerialEnv, check_env_specs
from torchrl.testing.mocking_classes import CountingEnv, DiscreteActionVecMockEnv

from marl.environments import make_environment
from marl.environments.protocol import Outcome
from marl.environments.torchrl import ForTorchRL, TorchRLEnvironment
from marl.errors import ActionError, SettingsError
from tests.marl.environments.playing import uniform_actions
from tests.marl.environments.test_contract import CASES, played, same, tensors

every_environment = pytest.mark.parametrize(("name", "options"), CASES, ids=lambda value: str(value)[:40])


def spread(max_cycles: int = 5) -> EnvBase:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its version is newer than the one that TorchRL was tested with
        env = simple_spread_v3.parallel_env(N=3, continuous_actions=False, max_cycles=max_cycles)
        return PettingZooWrapper(env, return_state=True, use_mask=False)


def test_simple_spread_is_the_game_that_pettingzoo_plays() -> None:
    environment = TorchRLEnvironment(spread(), episode_limit=25)
    spec = environment.spec
    assert (spec.num_agents, spec.num_actions, spec.obs_size, spec.state_size) == (3, 5, 18, 54)
    original = simple_spread_v3.parallel_env(N=3, continuous_actions=False, max_cycles=5)
    original.reset(seed=3)
    shown, _ = original.reset()  # as TorchRL does, which seeds with one reset and begins with another
    observation = environment.reset(seed=3)
    for step in range(5):
        assert observation.obs[0].tolist() == [shown[agent].tolist() for agent in original.possible_agents]
        assert observation.state[0].tolist() == original.state().tolist()
        actions = torch.randint(5, (1, 3))
        taken = dict(zip(original.possible_agents, actions[0].tolist(), strict=True))
        shown, rewards, _, _, _ = original.step(taken)
        outcome = environment.step(actions)
        observation = outcome.observation
        assert outcome.reward.item() == pytest.approx(sum(rewards.values()) / 3)
        assert outcome.truncated.item() == (step == 4) and not outcome.terminated.item()


def test_a_batch_of_simple_spread() -> None:
    environment = TorchRLEnvironment(SerialEnv(3, spread), episode_limit=3, team_reward="sum")
    assert_keeps_the_contract(environment)
    single = TorchRLEnvironment(SerialEnv(3, spread), episode_limit=3)
    actions = torch.ones(3, 3, dtype=torch.long)
    environment.reset(seed=1)
    single.reset(seed=1)
    assert torch.allclose(environment.step(actions).reward, 3 * single.step(actions).reward)


def assert_keeps_the_contract(environment: TorchRLEnvironment) -> None:
    spec, batch_size = environment.spec, environment.batch_size
    seen = list(played(environment, seed=0))
    kept = [[tensor.clone() for tensor in tensors(each)] for each in seen]
    again = list(played(environment, seed=0))
    for first, copy, second in zip(seen, kept, again, strict=True):
        assert same(tensors(first), copy)
        assert same(tensors(second), copy)
        assert copy[0].shape == (batch_size, spec.num_agents, spec.obs_size)
        assert copy[1].shape == (batch_size, spec.state_size)
        assert copy[2].shape == (batch_size, spec.num_agents, spec.num_actions)
    assert (kept[-1][4] | kept[-1][5]).all()
    assert same([kept[-1][0], kept[-1][1]], [kept[-2][0], kept[-2][1]])
    assert not kept[-1][3].any()


@pytest.mark.parametrize("one_hot", [True, False])
def test_a_single_agent_of_torchrls_own_tests(one_hot: bool) -> None:
    environment = TorchRLEnvironment(DiscreteActionVecMockEnv(categorical_action_encoding=not one_hot), episode_limit=4)
    spec = environment.spec
    assert (spec.num_agents, spec.num_actions, spec.obs_size, spec.state_size) == (1, 7, 7, 7)
    before = environment.reset().obs
    outcome = environment.step(torch.tensor([[2]]))
    moved = outcome.observation.obs - before
    expected = torch.nn.functional.one_hot(torch.tensor(2), 7) if one_hot else torch.full((7,), 2)
    assert torch.allclose(moved * 100, expected.float(), atol=1e-3)


class TwoGroups(EnvBase):  # type: ignore[misc]
    """Episode b of a batch ends after b + 2 steps; crawlers have a mask and one-hot actions, and flyers neither."""

    def __init__(self, batch_size: int, flyer_obs: int = 2) -> None:
        super().__init__(batch_size=torch.Size([batch_size]))
        sizes = {"crawlers": 2, "flyers": 1}
        lanes = {group: (batch_size, size) for group, size in sizes.items()}
        mask = Categorical(2, shape=(*lanes["crawlers"], 3), dtype=torch.bool)
        self.observation_spec = grouped(
            crawlers={"seen": Unbounded((*lanes["crawlers"], 2)), "action_mask": mask},
            flyers={"seen": Unbounded((*lanes["flyers"], flyer_obs))},
        )
        crawling, flying = OneHot(3, shape=(*lanes["crawlers"], 3)), Categorical(3, shape=lanes["flyers"])
        self.action_spec = grouped(crawlers={"action": crawling}, flyers={"action": flying})
        self.reward_spec = grouped(**{group: {"reward": Unbounded((*lanes[group], 1))} for group in sizes})
        flags = {group: Categorical(2, shape=(*lanes[group], 1), dtype=torch.bool) for group in sizes}
        self.done_spec = grouped(
            **{group: {"done": flag.clone(), "terminated": flag.clone()} for group, flag in flags.items()}
        )
        self.flyer_obs = flyer_obs

    def _reset(self, tensordict: Any = None, **_: Any) -> Any:
        self.count = torch.zeros(self.batch_size)
        return self.shown()

    def _step(self, tensordict: Any) -> Any:
        self.count = self.count + 1
        crawlers = tensordict["crawlers", "action"].long().argmax(dim=-1)
        shown = self.shown()
        shown["crawlers", "reward"] = crawlers.float()[..., None]
        shown["flyers", "reward"] = 3 + 10.0 * tensordict["flyers", "action"].float()[..., None]
        over = self.count >= torch.arange(len(self.count)) + 2
        for group, size in (("crawlers", 2), ("flyers", 1)):
            flags = over[:, None, None].expand(-1, size, 1)
            shown[group, "done"], shown[group, "terminated"] = flags.clone(), flags.clone()
        return shown

    def shown(self) -> Any:
        lanes, number = self.batch_size, self.count[:, None, None]
        mask = torch.ones(*lanes, 2, 3, dtype=torch.bool)
        mask[:, 1, 2] = False
        mask[:, 0] = (self.count % 2 == 0)[:, None]  # a crawler without any available action in every second step
        crawlers = TensorDict({"seen": number.expand(-1, 2, 2).clone(), "action_mask": mask}, (*lanes, 2))
        flyers = TensorDict({"seen": number.expand(-1, 1, self.flyer_obs).clone() + 0.5}, (*lanes, 1))
        return TensorDict({"crawlers": crawlers, "flyers": flyers}, lanes)

    def _set_seed(self, seed: int | None) -> None:
        pass


class Together(TwoGroups):
    """The episodes end by flags at the root, where their agents are not done; the state is written in place."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        observation, done = self.observation_spec.clone(), self.done_spec.clone()
        observation["state"] = Unbounded((batch_size, 1))
        for name in ("done", "terminated", "truncated"):
            done[name] = Categorical(2, shape=(batch_size, 1), dtype=torch.bool)
        self.observation_spec, self.done_spec = observation, done
        self.buffer = torch.zeros(batch_size, 1)

    def _step(self, tensordict: Any) -> Any:
        shown = super()._step(tensordict)
        over = shown["flyers", "done"][:, 0]
        for group in ("crawlers", "flyers"):
            for name in ("done", "terminated"):
                shown[group, name] = torch.zeros_like(shown[group, name])
        is_first = torch.arange(len(over))[:, None] == 0
        shown.update({"done": over, "terminated": over & is_first, "truncated": over & ~is_first})
        return shown

    def shown(self) -> Any:
        self.buffer[:, 0] = self.count
        return super().shown().set("state", self.buffer)


def grouped(**groups: dict[str, Any]) -> Any:
    """The specification of entries that begin with (B, agents)."""
    nested = {
        name: Composite(entries, shape=next(iter(entries.values())).shape[:2]) for name, entries in groups.items()
    }
    return Composite(nested, shape=next(iter(nested.values())).shape[:1])


def test_groups_become_one_team() -> None:
    environment = TorchRLEnvironment(TwoGroups(3), episode_limit=4)
    observation = environment.reset()
    assert environment.spec.num_agents == 3
    assert observation.obs[0].tolist() == [[0.0, 0.0], [0.0, 0.0], [0.5, 0.5]]
    assert observation.state[0].tolist() == [0.0, 0.0, 0.0, 0.0, 0.5, 0.5]
    assert observation.avail_actions[0].tolist() == [[True] * 3, [True, True, False], [True] * 3]
    outcome = environment.step(torch.tensor([[2, 1, 2]] * 3))
    assert outcome.reward.tolist() == pytest.approx([26 / 3] * 3)
    # an agent that TorchRL leaves without any action can take action 0
    assert outcome.observation.avail_actions[0].tolist() == [[True, False, False], [True, True, False], [True] * 3]


def test_episodes_that_end_apart_stay_as_they_are() -> None:
    environment = TorchRLEnvironment(TwoGroups(3), episode_limit=4)
    environment.reset()
    outcomes = [environment.step(torch.zeros(3, 3, dtype=torch.long)) for _ in range(2)]
    assert outcomes[-1].terminated.tolist() == [True, False, False]
    assert outcomes[-1].observation.avail_actions[0, 2].all()  # its own, in the observation that it ends with
    third = environment.step(torch.tensor([[99, 99, 99], [0, 1, 2], [0, 1, 2]]))
    assert third.reward.tolist() == pytest.approx([0.0, 8.0, 8.0])
    assert third.terminated.tolist() == [True, True, False]
    assert third.observation.obs[:, 0, 0].tolist() == [2.0, 3.0, 3.0]
    assert third.observation.state[:, 0].tolist() == [2.0, 3.0, 3.0]
    assert third.observation.avail_actions[0].tolist() == [[True, False, False]] * 3
    fourth = environment.step(torch.zeros(3, 3, dtype=torch.long))
    assert fourth.terminated.tolist() == [True, True, True]  # the last one ends just at the limit
    assert not fourth.truncated.any()


def test_flags_at_the_root_say_how_episodes_end() -> None:
    environment = TorchRLEnvironment(Together(2), episode_limit=9)
    environment.reset()
    outcomes = [environment.step(torch.zeros(2, 3, dtype=torch.long)) for _ in range(4)]
    assert [each.terminated.tolist() for each in outcomes] == [[False, False], *[[True, False]] * 3]
    assert [each.truncated.tolist() for each in outcomes] == [[False, False], [False, False], *[[False, True]] * 2]


def test_what_torchrl_writes_in_place_is_copied() -> None:
    environment = TorchRLEnvironment(Together(2), episode_limit=9)
    states = [environment.reset().state]
    states += [environment.step(torch.zeros(2, 3, dtype=torch.long)).observation.state for _ in range(3)]
    assert [state[:, 0].tolist() for state in states] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [2.0, 3.0]]


def test_workers_whose_episode_has_ended_are_not_stepped() -> None:
    environment = TorchRLEnvironment(SerialEnv(2, [lambda: spread(2), lambda: spread(4)]), episode_limit=9)
    assert_keeps_the_contract(environment)
    environment.reset()
    outcomes = [environment.step(torch.zeros(2, 3, dtype=torch.long)) for _ in range(5)]
    assert [each.truncated.tolist() for each in outcomes] == [[False] * 2, *[[True, False]] * 2, *[[True, True]] * 2]
    assert [bool(each.reward[0]) for each in outcomes] == [True, True, False, False, False]


def test_the_limit_cuts_off() -> None:
    environment = TorchRLEnvironment(TwoGroups(3), episode_limit=3)
    environment.reset()
    outcomes = [environment.step(torch.zeros(3, 3, dtype=torch.long)) for _ in range(3)]
    assert outcomes[-1].terminated.tolist() == [True, True, False]
    assert outcomes[-1].truncated.tolist() == [False, False, True]


def test_an_action_that_is_not_available_is_refused() -> None:
    environment = TorchRLEnvironment(TwoGroups(2), episode_limit=3)
    environment.reset()
    with pytest.raises(ActionError, match="agent 1 of episode 0 took action 2; available to it: 0, 1"):
        environment.step(torch.tensor([[0, 2, 0], [0, 0, 0]]))


REFUSED: list[tuple[Callable[[], EnvBase], dict[str, Any], str]] = [
    (lambda: TwoGroups(2, flyer_obs=3), {}, "same sizes; found groups with 3 actions and observations of 2 and 3 act"),
    (lambda: CountingEnv(), {}, "discrete actions are needed, Categorical or OneHot; found Binary at action"),
    (DiscreteActionVecMockEnv, {"obs_key": "pixels"}, "no observation 'pixels' at the root; found observation, obs"),
    (spread, {"team_reward": "max"}, "there is no team reward 'max'; known are 'mean', 'sum'"),
    (spread, {"episode_limit": 0}, "an episode limit of 0"),
    (lambda: SerialEnv(2, lambda: TwoGroups(2)), {}, r"one batch dimension is needed; found batch size \(2, 2\)"),
]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED)
def test_an_environment_that_does_not_fit_is_refused(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        TorchRLEnvironment(make(), **{"episode_limit": 5} | options)


@every_environment
def test_ours_keep_torchrls_specifications(name: str, options: dict[str, Any]) -> None:
    for batch_size in (1, 3):
        check_env_specs(ForTorchRL(make_environment(name, batch_size, **options)), seed=0)


@every_environment
def test_there_and_back_is_the_same_environment(name: str, options: dict[str, Any]) -> None:
    original = make_environment(name, 3, **options)
    limit = original.spec.episode_limit
    back = TorchRLEnvironment(ForTorchRL(make_environment(name, 3, **options)), episode_limit=limit)
    assert back.spec == original.spec
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        observation = original.reset(seed=6)
        assert same(tensors(back.reset(seed=6)), tensors(observation))
        ended = torch.zeros(3, dtype=torch.bool)
        for _ in range(limit):
            actions = uniform_actions(observation.avail_actions, generator)
            expected, found = original.step(actions), back.step(actions)
            assert same(of_lanes(found, ~ended), of_lanes(expected, ~ended))
            observation, ended = expected.observation, expected.terminated | expected.truncated


def of_lanes(outcome: Outcome, lanes: Tensor) -> list[Tensor]:
    return [tensor[lanes] for tensor in tensors(outcome)]


def test_a_rollout_of_torchrl_takes_available_actions_until_all_are_done() -> None:
    options = {"height": 1, "width": 9, "num_agents": 3, "num_stags": 0, "num_hares": 2, "episode_limit": 60}
    env = ForTorchRL(make_environment("predator_prey", 8, **options))
    rollout = env.rollout(60, break_when_any_done=False, break_when_all_done=True)
    taken = rollout["agents", "action"]
    assert rollout["agents", "action_mask"].gather(-1, taken[..., None]).all()
    ends = rollout["next", "done"][..., 0].int().argmax(dim=1)
    assert len(set(ends.tolist())) > 1


def test_beginning_some_episodes_anew_is_refused() -> None:
    env = ForTorchRL(make_environment("predator_prey", 2))
    env.reset()
    with pytest.raises(SettingsError, match="all begin together; break when all are done"):
        env.reset(TensorDict({"_reset": torch.tensor([[True], [False]])}, (2,)))


@pytest.mark.parametrize(("package", "module"), [("torchrl", "torchrl"), ("pettingzoo", "pettingzoo")])
def test_a_missing_package_is_named_with_its_extra(package: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        name for name in sys.modules if name.split(".")[0] == package or name.startswith("marl.environments.torchrl")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"marl.environments.{module}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf"{package} is not installed; install .* `pip install 'neuronsurgery\[marl\]'`"
    ):
        importlib.import_module(f"marl.environments.{module}")


def test_the_environments_load_neither_torchrl_nor_pettingzoo_nor_jax() -> None:
    unwanted = {"torchrl", "tensordict", "pettingzoo", "gymnasium", "jax"}
    code = f"import sys, marl.environments; print({unwanted} & set(sys.modules))"
    root = Path(__file__).parents[3]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    assert run.stdout.strip() == "set()"
