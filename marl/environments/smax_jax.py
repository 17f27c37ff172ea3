"""JAX set up, and SMAX's environments from it: the one file that imports JAX.

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
from pathlib import Path
from typing import Any

from marl.environments.smax_settings import AS_SCENARIO, GENERATED, RACES, SmaxSettings, Teams
from marl.errors import MissingExtraError, SettingsError, suggestion

__all__ = ["DrawnTeams", "environment_of", "jax", "jnp"]


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
"""Of JAX."""

POSITIONS_OF: Mapping[str, Any] = {
    "reflected": distributions.ReflectPositionDistribution,
    "surrounded": distributions.SurroundPositionDistribution,
    "surrounded_or_reflected": distributions.SurroundAndReflectPositionDistribution,
}
"""JaxMARL's ways to draw places; facing teams need none."""


def environment_of(settings: SmaxSettings) -> Any:
    """SMAX's environment of one episode.

    Raises:
        SettingsError: there is no such scenario.
    """
    scenario, race, positions = _looked_up(settings)
    units = None
    if race is not None:
        weights = tuple(RACES[race].get(name, 0.0) for name in _unit_type_names())
        units = DrawnTeams(weights, scenario.num_allies, scenario.num_enemies)
    return _Smax(
        units,
        positions,
        scenario=scenario,
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
        known = suggestion(settings.scenario, _scenario_names())
        raise SettingsError(f"there is no scenario {settings.scenario!r} in SMAX; {known}")
    changes: dict[str, bool] = {"smacv2_unit_type_generation": True} if race else {}
    if settings.positions != AS_SCENARIO:
        changes["smacv2_position_generation"] = settings.positions != "facing"
    return scenario.replace(**changes), race, POSITIONS_OF.get(settings.positions)


def _scenario_names() -> list[str]:
    """All scenarios, those that were registered with JaxMARL among them."""
    return [*smax_env.MAP_NAME_TO_SCENARIO, *GENERATED]


def _random(teams: Teams) -> Any:
    types = jnp.zeros(teams.num_allies + teams.num_enemies, dtype=jnp.uint8)
    return Scenario(types, teams.num_allies, teams.num_enemies, True, True)


def _unit_type_names() -> list[str]:
    return list(HeuristicEnemySMAX(num_allies=1, num_enemies=1).unit_type_names)


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
