"""SMAX's rules as two compiled functions over B episodes: the one file that knows JAX.

Whoever imports JAX first decides how it runs. Where that is this file, JAX computes on one thread of the CPU, like
torch in this package, because the games are too small for more. Compiled functions are kept between processes in
`$XDG_CACHE_HOME/neuronsurgery/jax` (by default under `~/.cache`): `JAX_COMPILATION_CACHE_DIR` says another folder, and
`JAX_ENABLE_COMPILATION_CACHE=false` keeps nothing.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from marl.environments.smax_settings import AS_SCENARIO, GENERATED, RACES, SmaxSettings, Teams
from marl.errors import MissingExtraError, SettingsError, suggestion

__all__ = ["Games", "Lanes", "games_of", "scenario_names"]

LONGEST_COOLDOWN = 2.0
"""Seconds between two shots of the slowest unit, a stalker, and what chance adds to them."""


def _first_to_import_jax() -> None:
    """One thread of the CPU, and nothing of an accelerator's memory."""
    import jax

    if jax.config.jax_platforms is None:
        jax.config.update("jax_platforms", "cpu")
    before = os.environ.get("NPROC")
    os.environ["NPROC"] = before or "1"  # XLA sizes its pool of threads by this, once
    try:
        jax.devices()
    finally:
        if before is None:
            del os.environ["NPROC"]


def _keep_compiled() -> None:
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "neuronsurgery" / "jax"))


@contextmanager
def _quiet() -> Iterator[None]:
    """JaxMARL prints on import, and puts the process's own streams in place of those that were redirected."""
    names = ("stdout", "stderr", "__stdout__", "__stderr__")
    before = {name: getattr(sys, name) for name in names}
    for name in names:
        setattr(sys, name, io.StringIO())
    try:
        yield
    finally:
        for name, stream in before.items():
            setattr(sys, name, stream)


try:
    if "jax" not in sys.modules:
        _first_to_import_jax()
    _keep_compiled()
    import jax
    import jax.numpy as jnp

    with _quiet():
        from jaxmarl.environments.smax import HeuristicEnemySMAX, Scenario, distributions, smax_env
except ImportError as error:
    raise MissingExtraError.of(str(error.name), extra="smax", needed_by="SMAX") from error

Array = Any
"""Of JAX or numpy."""


class Lanes(NamedTuple):
    """Where B episodes stand."""

    keys: Array
    """(B, 2), uint32: each episode's random numbers from here on."""
    state: Any
    """SMAX's, with B in front of every array."""
    obs: Array
    """(B, N, O), float32."""
    world: Array
    """(B, S), float32: the state that the learner sees."""
    avail_actions: Array
    """(B, N, A), bool."""


class Step(NamedTuple):
    """What a step led to."""

    lanes: Lanes
    """Where the episodes stand now."""
    reward: Array
    """(B,), float32."""
    is_over: Array
    """(B,), bool: whether a team is dead."""
    is_won: Array
    """(B,), bool: whether that is the enemies', and not both."""


@lru_cache(maxsize=16)
def games_of(settings: SmaxSettings) -> Games:
    """The games of some settings, compiled once for each number of parallel episodes in a process.

    Raises:
        SettingsError: there is no such scenario.
    """
    return Games(_environment(settings), settings)


class Games:
    """B games of SMAX, each a function of its own key: neither the other games nor their number matter to it.

    The key of an episode is `fold_in(fold_in(key, place in the batch), episodes begun there before)`. It is split in
    two, one for SMAX's `reset` and one to go on with. The latter is split again at every step: one to go on with, one
    for SMAX's `step_env`.
    """

    def __init__(self, environment: Any, settings: SmaxSettings) -> None:
        self._environment = environment
        self._reward_scale = settings.reward_scale
        self._state_scales = state_scales(environment) if settings.scaled_state else np.float32(1)
        self.num_agents = int(environment.num_agents)
        self.num_actions = int(environment.num_ally_actions)
        self.obs_size, self.state_size = int(environment.obs_size), int(environment.state_size)
        self.map_size = np.array([environment.map_width, environment.map_height])
        self.unit_names: list[str] = list(environment.unit_type_names)
        self.begin = jax.jit(self._begin, static_argnums=1)
        self.step = jax.jit(self._step)

    def _begin(self, seed: Array, batch_size: int, num_begun: Array) -> Lanes:
        """B new episodes, from a seed (2,), uint32, and how many were begun in each place before."""
        places = jax.vmap(jax.random.fold_in, (None, 0))(seed, jnp.arange(batch_size, dtype="uint32"))
        keys = jax.vmap(jax.random.fold_in, (0, None))(places, num_begun)
        begun: Lanes = strongly_typed(jax.vmap(self._begin_one)(keys))
        return begun

    def _step(self, lanes: Lanes, actions: Array, going: Array) -> Step:
        """A step with actions (B, N), int32, of the episodes that go on (B,); the others stay as they are."""
        after = jax.vmap(self._step_one)(lanes, actions)

        def chosen(new: Array, old: Array) -> Array:
            return jnp.where(going.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        kept = jax.tree.map(chosen, after.lanes, lanes)
        return Step(strongly_typed(kept), jnp.where(going, after.reward, 0.0), after.is_over, after.is_won)

    def _begin_one(self, key: Array) -> Lanes:
        reset_key, key = jax.random.split(key)
        seen, state = self._environment.reset(reset_key)
        return self._shown(key, state, seen)

    def _step_one(self, lane: Lanes, actions: Array) -> Step:
        key, step_key = jax.random.split(lane.keys)
        taken = {agent: actions[number] for number, agent in enumerate(self._environment.agents)}
        seen, state, rewards, _, _ = self._environment.step_env(step_key, lane.state, taken)
        allies, enemies = jnp.split(state.state.unit_alive, [self.num_agents])
        reward = self._reward_scale * rewards[self._environment.agents[0]]
        is_over = ~(allies.any() & enemies.any())
        return Step(self._shown(key, state, seen), reward, is_over, allies.any() & ~enemies.any())

    def _shown(self, key: Array, state: Any, seen: Mapping[str, Array]) -> Lanes:
        available = self._environment.get_avail_actions(state)
        agents = self._environment.agents
        return Lanes(
            keys=key,
            state=state,
            obs=jnp.stack([seen[agent] for agent in agents]),
            world=seen["world_state"] * self._state_scales,
            avail_actions=jnp.stack([available[agent] for agent in agents]) > 0,
        )

    # -- as arrays of numpy

    def leaves(self, lanes: Lanes) -> list[np.ndarray[Any, Any]]:
        """All arrays in one order, as copies."""
        return [np.array(leaf) for leaf in jax.tree.leaves(lanes)]

    def with_leaves(self, leaves: list[np.ndarray[Any, Any]]) -> Lanes:
        """What these arrays are the leaves of."""
        lanes: Lanes = jax.tree.map(jnp.asarray, jax.tree.unflatten(self._tree(len(leaves[0])), leaves))
        return lanes

    def layout(self, batch_size: int) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
        """Shape and dtype of each array."""
        return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(self._like(batch_size))]

    def _like(self, batch_size: int) -> Lanes:
        lanes: Lanes = jax.eval_shape(lambda: self._begin(np.zeros(2, np.uint32), batch_size, np.uint32(0)))
        return lanes

    def _tree(self, batch_size: int) -> Any:
        return jax.tree.structure(self._like(batch_size))


def strongly_typed(tree: Any) -> Any:
    """The same without weak types, which a first step would have and a second not, so that both were compiled."""
    return jax.tree.map(lambda array: jax.lax.convert_element_type(array, array.dtype), tree)


def state_scales(environment: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What each entry (S,) of SMAX's state is multiplied with, to be from 0 to 1."""
    num_units, num_types = environment.num_allies + environment.num_enemies, len(environment.unit_type_names)
    size = (1 / environment.map_width, 1 / environment.map_height)
    of_unit = [1.0, *size, 1 / LONGEST_COOLDOWN, *[1.0] * num_types]
    rest = [1.0] * num_units + [1 / (num_types - 1)] * num_units
    return np.array(of_unit * num_units + rest, dtype=np.float32)


# -- scenarios


def scenario_names() -> list[str]:
    """All scenarios, those that were registered with JaxMARL among them."""
    return [*smax_env.MAP_NAME_TO_SCENARIO, *GENERATED]


@dataclass(frozen=True)
class DrawnTeams:
    """Draws types as SMACv2 does: those of the allies by weights, the enemies' alike, as many more as there are."""

    weights: tuple[float, ...]
    """Of each type."""
    num_allies: int
    """N."""
    num_enemies: int
    """M."""

    def generate(self, key: Array) -> Array:
        """Types (N + M,), uint8."""
        logits = jnp.log(jnp.array(self.weights))
        larger = max(self.num_allies, self.num_enemies)
        drawn = jax.random.categorical(key, logits, shape=(larger,)).astype(jnp.uint8)
        return jnp.concatenate([drawn[: self.num_allies], drawn[: self.num_enemies]])


class _Smax(HeuristicEnemySMAX):  # type: ignore[misc]
    """SMAX with other ways to draw types and places."""

    def __init__(self, units: DrawnTeams | None, positions: Any, **options: Any) -> None:
        super().__init__(**options)
        if units is not None:
            self._env.unit_type_generator = units
        if positions is not None:
            self._env.position_generator = positions(
                self._env.num_allies, self._env.num_enemies, self._env.map_width, self._env.map_height
            )


def _environment(settings: SmaxSettings) -> _Smax:
    scenario, race, positions = _looked_up(settings)
    units = None
    if race is not None:
        weights = tuple(RACES[race].get(name, 0.0) for name in _unit_type_names())
        units = DrawnTeams(weights, scenario.num_allies, scenario.num_enemies)
    return _Smax(
        units,
        positions,
        scenario=scenario,
        max_steps=settings.episode_limit,
        see_enemy_actions=settings.see_enemy_actions,
        walls_cause_death=settings.walls_cause_death,
    )


def _looked_up(settings: SmaxSettings) -> tuple[Any, str | None, Any]:
    """The scenario of JaxMARL, the race to draw and where, if not as the scenario has it."""
    teams, race = GENERATED.get(settings.scenario), None if settings.units == AS_SCENARIO else settings.units
    if teams is not None:
        scenario, race = _random(teams), race or teams.race
    elif settings.scenario in smax_env.MAP_NAME_TO_SCENARIO:
        scenario = smax_env.map_name_to_scenario(settings.scenario)
    else:
        known = suggestion(settings.scenario, scenario_names())
        raise SettingsError(f"there is no scenario {settings.scenario!r} in SMAX; {known}")
    changes: dict[str, bool] = {"smacv2_unit_type_generation": True} if race else {}
    if settings.positions != AS_SCENARIO:
        changes["smacv2_position_generation"] = settings.positions != "facing"
    return scenario.replace(**changes), race, _POSITIONS.get(settings.positions)


def _random(teams: Teams) -> Any:
    types = jnp.zeros(teams.num_allies + teams.num_enemies, dtype=jnp.uint8)
    return Scenario(types, teams.num_allies, teams.num_enemies, True, True)


def _unit_type_names() -> list[str]:
    return list(HeuristicEnemySMAX(num_allies=1, num_enemies=1).unit_type_names)


_POSITIONS: Mapping[str, Any] = {
    "reflected": distributions.ReflectPositionDistribution,
    "surrounded": distributions.SurroundPositionDistribution,
    "surrounded_or_reflected": distributions.SurroundAndReflectPositionDistribution,
}
