"""Battles of SMAX as two compiled functions over B episodes, with keys of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from marl.environments.smax_jax import environment_of, jax, jnp
from marl.environments.smax_settings import SmaxSettings

__all__ = ["Games", "Lanes", "Step", "games_of"]

LONGEST_COOLDOWN = 2.0
"""Seconds between two shots of the slowest unit, a stalker, and what chance adds to them."""

OUTSIDE = ("episode_limit", "reward_scale", "scaled_state")
"""Settings of what is done with a step afterwards, in numpy."""

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
    """(B, S), float32: what the learner sees, as SMAX has it."""
    avail_actions: Array
    """(B, N, A), bool."""


class Step(NamedTuple):
    """What a step led to."""

    lanes: Lanes
    """Where the episodes stand now."""
    reward: Array
    """(B,), float32: as SMAX has it."""
    is_over: Array
    """(B,), bool: whether a team is dead."""
    is_won: Array
    """(B,), bool: whether that is the enemies', and not both."""


def games_of(settings: SmaxSettings) -> Games:
    """The games of some settings, compiled once for each number of parallel episodes in a process.

    Raises:
        SettingsError: there is no such scenario.
    """
    plain = SmaxSettings()  # what does not concern these games, so that they are compiled once for all values of it
    rest = replace(settings, **{name: getattr(plain, name) for name in OUTSIDE})
    return _compiled(rest)


@lru_cache(maxsize=16)
def _compiled(settings: SmaxSettings) -> Games:
    return Games(environment_of(settings))


class Games:
    """B games of SMAX, each a function of its own key: neither the other games nor their number matter to it.

    The key of an episode is `fold_in(fold_in(key, place in the batch), episodes begun there before)`. It is split in
    two, one for SMAX's `reset` and one to go on with. The latter is split again at every step: one to go on with, one
    for SMAX's `step_env`.
    """

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self.num_agents = int(environment.num_agents)
        self.num_actions = int(environment.num_ally_actions)
        self.obs_size, self.state_size = int(environment.obs_size), int(environment.state_size)
        self.map_size = np.array([environment.map_width, environment.map_height])
        self.state_scales = state_scales(environment)
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
        reward = rewards[self._environment.agents[0]]
        is_over = ~(allies.any() & enemies.any())
        return Step(self._shown(key, state, seen), reward, is_over, allies.any() & ~enemies.any())

    def _shown(self, key: Array, state: Any, seen: Mapping[str, Array]) -> Lanes:
        available = self._environment.get_avail_actions(state)
        agents = self._environment.agents
        return Lanes(
            keys=key,
            state=state,
            obs=jnp.stack([seen[agent] for agent in agents]),
            world=seen["world_state"],
            avail_actions=jnp.stack([available[agent] for agent in agents]) > 0,
        )

    @property
    def num_programs(self) -> int:
        """How many functions were compiled so far."""
        return int(self.begin._cache_size() + self.step._cache_size())

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
