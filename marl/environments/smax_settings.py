"""What is fought over in SMAX: the scenarios beside SMAX's own, and what else can be set.

SMAX (Rutherford et al. 2024, "JaxMARL") is StarCraft's micromanagement without StarCraft: SMAC's scenarios (Samvelyan
et al. 2019) and SMACv2's random teams and places (Ellis et al. 2023) by its own simpler rules. Nothing here needs JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from marl.environments.checking import require_at_least, require_types_of_defaults
from marl.errors import SettingsError, suggestion

AS_SCENARIO = "scenario"
STOP = 4
"""The action that does nothing: all that the dead can do. Before it are the four directions, after it the enemies."""

RACES: Mapping[str, Mapping[str, float]] = {
    "protoss": {"stalker": 0.45, "zealot": 0.45},
    "terran": {"marine": 0.45, "marauder": 0.45},
    "zerg": {"zergling": 0.45, "hydralisk": 0.45},
}
"""SMACv2's shares of unit types, without the tenth that SMAX has no units for: colossi, medivacs and banelings."""

POSITIONS = ("facing", "reflected", "surrounded", "surrounded_or_reflected")
"""Where teams begin: SMAC's two groups on either side, or SMACv2's ways, the last of them an even chance of either."""

SIZES: Mapping[str, tuple[int, int]] = {"5": (5, 5), "10": (10, 10), "20": (20, 20)}
LARGER: Mapping[str, tuple[int, int]] = {"10": (10, 11), "20": (20, 23)}


@dataclass(frozen=True)
class Teams:
    """Two teams of one race, drawn anew in every episode; the enemies are as the allies, and any more drawn alike."""

    race: str
    """A name in `RACES`."""
    num_allies: int
    """Units that learn."""
    num_enemies: int
    """Units that follow SMAX's rule."""


GENERATED: Mapping[str, Teams] = {
    **{f"{size}gen_{race}": Teams(race, *SIZES[size]) for race in RACES for size in SIZES},
    **{f"{size}gen_{race}_vs_{LARGER[size][1]}": Teams(race, *LARGER[size]) for race in RACES for size in LARGER},
}
"""SMACv2's scenarios by race, in places as SMAX draws them; SMACv2 calls them `protoss_5_vs_5` and so on."""


@dataclass(frozen=True)
class SmaxSettings:
    """All that can be set of SMAX.

    >>> SmaxSettings(positions="reflect")
    Traceback (most recent call last):
    marl.errors.SettingsError: there is no positions 'reflect'; did you mean 'reflected'?
    """

    scenario: str = "smacv2_5_units"
    """One of SMAX's own (`3m`, `3s_vs_5z`, `smacv2_5_units`, ...) or of `GENERATED` (`5gen_protoss`, ...)."""
    units: str = AS_SCENARIO
    """A race of which both teams are drawn, whatever the scenario says of their types."""
    positions: str = AS_SCENARIO
    """Where the teams begin, one of `POSITIONS`, whatever the scenario says."""
    episode_limit: int = 100
    """Steps after which an episode is cut off; SMAX by itself takes one more than it is told."""
    reward_scale: float = 10.0
    """Factor of SMAX's rewards, of which an episode has at most 2: half for damage, half for the win. With 10 it has at
    most 20, as in SMAC."""
    scaled_state: bool = True
    """Whether positions, cooldowns and numbers of types in the state are divided by their largest values, as positions
    are in SMAC; SMAX's own state has positions of up to 32."""
    see_enemy_actions: bool = True
    """Whether an agent sees what enemies in sight do; SMAX's default, unlike SMAC."""
    walls_cause_death: bool = True
    """Whether units die that touch the border; SMAX's default, unlike SMAC."""

    def __post_init__(self) -> None:
        require_types_of_defaults(self)
        require_at_least(self, 1, "episode_limit")
        for name, known in (("units", RACES), ("positions", POSITIONS)):
            value = getattr(self, name)
            if value not in (AS_SCENARIO, *known):
                raise SettingsError(f"there is no {name} {value!r}; {suggestion(value, (AS_SCENARIO, *known))}")
        if self.reward_scale <= 0:
            raise SettingsError(f"reward_scale is {self.reward_scale}; it must be above 0")
