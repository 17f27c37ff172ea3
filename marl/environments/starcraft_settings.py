"""The scenarios of SMACv2 and SMAC on StarCraft II itself, as values.

Sources: SMACv2's configurations `sc2_gen_protoss`, `_terran` and `_zerg` and its EPO variants (Ellis et al. 2023), and
SMAC's maps (Samvelyan et al. 2019). What papers call `5gen_protoss` is the map `10gen_protoss` with five units a side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from marl.environments.checking import require_at_least, require_types_of_defaults
from marl.errors import SettingsError, suggestion

__all__ = ["RACES", "SmacSettings", "Smacv2Settings", "StarcraftSettings"]


@dataclass(frozen=True)
class Race:
    """What a team is drawn from."""

    weights: Mapping[str, float]
    """Of each type, by its name."""
    exceptions: tuple[str, ...] = ()
    """Types that cannot make up a whole team."""


RACES: Mapping[str, Race] = {
    "protoss": Race({"stalker": 0.45, "zealot": 0.45, "colossus": 0.1}),
    "terran": Race({"marine": 0.45, "marauder": 0.45, "medivac": 0.1}, ("medivac",)),
    "zerg": Race({"zergling": 0.45, "baneling": 0.1, "hydralisk": 0.45}, ("baneling",)),
}
POSITIONS: Mapping[str, str] = {
    "surrounded_and_reflect": "surrounded_and_reflect",
    "surrounded": "surrounded",
    "reflect": "reflect_position",
}
"""What the package calls them."""


@dataclass(frozen=True)
class StarcraftSettings:
    """What both have in common; the other arguments of the packages keep the values of the official configurations."""

    client: ClassVar[str]
    """The class of the package, as `module:name`."""

    difficulty: int = 7
    """Of the game's own player, from 1 (very easy) over 7 (very hard) to A (as 10: it cheats)."""
    step_mul: int = 8
    """Steps of the game for each step of the agents, of which there are about 2.8 a second at normal speed."""
    patience: float = 300.0
    """Seconds after which a game that does not answer counts as broken; its first start takes some 20."""
    max_restarts: int = 3
    """Times in a row that a broken game is begun anew before the run ends with an error."""

    def __post_init__(self) -> None:
        require_types_of_defaults(self)
        require_at_least(self, 1, "difficulty", "step_mul", "max_restarts")
        if self.difficulty > 10:
            raise SettingsError(f"difficulty is {self.difficulty}; it must be from 1 to 10")
        if self.patience <= 0:
            raise SettingsError(f"patience is {self.patience}; it must be above 0")

    def arguments(self, seed: int) -> dict[str, Any]:
        """What the class is made with, in a game whose own random numbers have a seed."""
        return {
            "difficulty": "A" if self.difficulty == 10 else str(self.difficulty),
            "step_mul": self.step_mul,
            "seed": seed,
            "continuing_episode": True,  # or else the end of time would look like a defeat
            "move_amount": 2,
            "obs_all_health": True,
            "obs_own_health": True,
            "obs_last_action": False,
            "state_last_action": True,
            "reward_only_positive": True,
            "reward_scale": True,
            "reward_scale_rate": 20,
        }


@dataclass(frozen=True)
class Smacv2Settings(StarcraftSettings):
    """Random teams in random places.

    >>> Smacv2Settings(race="zerg").arguments(0)["map_name"]
    '10gen_zerg'
    >>> Smacv2Settings(race="elves")
    Traceback (most recent call last):
    marl.errors.SettingsError: there is no race 'elves'; known are 'protoss', 'terran', 'zerg'
    """

    client: ClassVar[str] = "smacv2.env.starcraft2.wrapper:StarCraftCapabilityEnvWrapper"

    race: str = "protoss"
    """Of both teams."""
    num_units: int = 5
    """Allies."""
    num_enemies: int = 5
    """Enemies, which are as the allies, and any more drawn alike."""
    positions: str = "surrounded_and_reflect"
    """Where the teams begin: surrounded by up to four groups, reflected at the middle, or one of the two by chance."""
    reflected: float = 0.5
    """How often it is the second of the two."""
    conic_fov: bool = False
    """Whether agents see only a cone, which they have to turn."""
    prob_obs_enemy: float = 1.0
    """How often an enemy in sight is seen by all; 0 in the EPO variants, where the first to see it is the only one."""
    action_mask: bool = True
    """Whether actions without effect are unavailable; false in the EPO variants."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "num_units", "num_enemies")
        for name, known in (("race", RACES), ("positions", POSITIONS)):
            if getattr(self, name) not in known:
                raise SettingsError(
                    f"there is no {name} {getattr(self, name)!r}; {suggestion(getattr(self, name), known)}"
                )
        for name in ("reflected", "prob_obs_enemy"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")

    def arguments(self, seed: int) -> dict[str, Any]:
        """What the class is made with: the official configuration of the race, and what is set here."""
        return {
            **super().arguments(seed),
            "map_name": f"10gen_{self.race}",
            "capability_config": self._capabilities(),
            "conic_fov": self.conic_fov,
            "num_fov_actions": 12,
            "use_unit_ranges": True,
            "min_attack_range": 2,
            "obs_own_pos": True,
            "prob_obs_enemy": self.prob_obs_enemy,
            "action_mask": self.action_mask,
        }

    def _capabilities(self) -> dict[str, Any]:
        race = RACES[self.race]
        team: dict[str, Any] = {
            "dist_type": "weighted_teams",
            "unit_types": list(race.weights),
            "weights": list(race.weights.values()),
            "observe": True,
        }
        if race.exceptions:
            team["exception_unit_types"] = list(race.exceptions)
        places = {"dist_type": POSITIONS[self.positions], "p": self.reflected, "map_x": 32, "map_y": 32}
        return {"n_units": self.num_units, "n_enemies": self.num_enemies, "team_gen": team, "start_positions": places}


@dataclass(frozen=True)
class SmacSettings(StarcraftSettings):
    """A map of SMAC.

    >>> SmacSettings().arguments(0)["map_name"]
    '3s_vs_5z'
    """

    client: ClassVar[str] = "smac.env:StarCraft2Env"

    map_name: str = "3s_vs_5z"
    """By its name in SMAC."""

    def arguments(self, seed: int) -> dict[str, Any]:
        """What the class is made with."""
        return {**super().arguments(seed), "map_name": self.map_name}
