"""The settings of predator-prey, the variants that were published, and the best that can be reached in each.

Sources: the default is the game of Boehmer, Kurin and Whiteson 2020, "Deep coordination graphs", as used by Rashid et
al. 2020, "Weighted QMIX"; `predator_prey_s`, `_m` and `_l` are those of the GradPS experiments (ICML 2025), in which a
few predators are hunters, for whom a hare is worth more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from marl.environments.checking import require_at_least, require_types_of_defaults
from marl.environments.draws import Streams, shuffled
from marl.environments.grids import NUM_NEIGHBORS
from marl.errors import SettingsError


@dataclass(frozen=True)
class PredatorPreySettings:
    """The size of the grid, who lives on it, and what catching is worth.

    Raises `SettingsError` for settings that make no game.

    >>> PredatorPreySettings(height=2, width=2).num_agents
    Traceback (most recent call last):
    marl.errors.SettingsError: 16 animals do not fit into 4 cells; enlarge the grid or take fewer
    """

    height: int = 10
    """Rows of the bounded grid."""
    width: int = 10
    """Columns of the grid."""
    num_agents: int = 8
    """Predators."""
    num_stags: int = 8
    """Prey that takes `stag_catchers` predators."""
    num_hares: int = 0
    """Prey that takes `hare_catchers` predators."""
    obs_radius: int = 2
    """An agent sees the square of 2 radius + 1 cells around it."""
    episode_limit: int = 200
    """Steps until the time limit."""
    reward_stag: float = 10.0
    """For every captured stag."""
    reward_hare: float = 1.0
    """For every captured hare."""
    punishment: float = -2.0
    """Added once per step for every prey that some predators tried to catch, but too few; not positive."""
    stag_catchers: int = 2
    """Predators that have to catch a stag at once."""
    hare_catchers: int = 1
    """Predators that have to catch a hare at once."""
    capture_freezes: bool = True
    """Whether the predators that captured a prey leave the game at once."""
    num_hunters: int = 0
    """Predators whose part in capturing a hare makes it worth `hunter_factor` times as much."""
    hunter_factor: float = 5.0
    """At least 1."""
    hunter_seed: int = 0
    """Which predators are hunters: drawn from this seed, once and for all episodes."""

    def __post_init__(self) -> None:
        require_types_of_defaults(self)
        require_at_least(self, 1, "height", "width", "num_agents", "episode_limit", "hunter_factor")
        require_at_least(self, 0, "num_stags", "num_hares", "obs_radius", "num_hunters")
        require_at_least(self, 1, "stag_catchers", "hare_catchers")
        if self.punishment > 0:
            raise SettingsError(f"punishment is {self.punishment}; it is added to the reward and must not be positive")
        animals, cells = self.num_agents + self.num_prey, self.height * self.width
        if animals > cells:
            raise SettingsError(f"{animals} animals do not fit into {cells} cells; enlarge the grid or take fewer")
        if not self.num_prey:
            raise SettingsError("there is no prey; set num_stags or num_hares")
        if max(self.stag_catchers, self.hare_catchers) > NUM_NEIGHBORS:
            found = max(self.stag_catchers, self.hare_catchers)
            raise SettingsError(f"{found} catchers are asked for, but a cell has {NUM_NEIGHBORS} neighbors")
        if self.num_hunters > self.num_agents:
            raise SettingsError(f"{self.num_hunters} hunters are asked for among {self.num_agents} predators")

    @property
    def num_prey(self) -> int:
        """Stags and hares."""
        return self.num_stags + self.num_hares

    @property
    def hunters(self) -> tuple[int, ...]:
        """The agents that are hunters.

        >>> len(PredatorPreySettings(num_hunters=3).hunters)
        3
        """
        streams = Streams(1, self.hunter_seed)
        streams.begin()
        order = shuffled(streams.draw(self.num_agents))[0]
        return tuple(sorted(order[: self.num_hunters].tolist()))

    @property
    def max_return(self) -> float:
        """The most that a team can earn in an episode, if there is time enough.

        Where captures freeze, every prey takes at least its number of catchers out of the game, so that 8 predators
        capture 4 stags; otherwise all prey can be captured. The best hares are those captured with a hunter each.

        >>> PredatorPreySettings().max_return
        40.0
        >>> PredatorPreySettings(capture_freezes=False).max_return
        80.0
        """
        return max(
            stags * self.reward_stag + self._worth_of_hares(hares)
            for stags in range(self.num_stags + 1)
            for hares in range(self.num_hares + 1)
            if self._is_possible(stags, hares)
        )

    def _is_possible(self, stags: int, hares: int) -> bool:
        if self.capture_freezes:
            return stags * self.stag_catchers + hares * self.hare_catchers <= self.num_agents
        enough_for_stags = not stags or self.stag_catchers <= self.num_agents
        return enough_for_stags and (not hares or self.hare_catchers <= self.num_agents)

    def _worth_of_hares(self, hares: int) -> float:
        reusable = self.num_hunters > 0 and not self.capture_freezes
        with_hunter = hares if reusable else min(hares, self.num_hunters)
        return self.reward_hare * (with_hunter * self.hunter_factor + hares - with_hunter)


def _gradps(size: int, team: int, hunters: int) -> PredatorPreySettings:
    """A square game with as many stags and as many hares as predators, in which captures do not freeze."""
    return PredatorPreySettings(
        height=size,
        width=size,
        num_agents=team,
        num_stags=team,
        num_hares=team,
        obs_radius=3,
        episode_limit=150,
        reward_hare=2.0,
        punishment=0.0,
        capture_freezes=False,
        num_hunters=hunters,
    )


VARIANTS = {
    "predator_prey": PredatorPreySettings(),
    "predator_prey_unpunished": replace(PredatorPreySettings(), punishment=0.0),
    "predator_prey_s": _gradps(20, 6, 2),
    "predator_prey_m": _gradps(25, 10, 3),
    "predator_prey_l": _gradps(30, 15, 5),
    # Small enough for a learning test: a team of four, on a grid on which they meet.
    "predator_prey_tiny": PredatorPreySettings(
        height=7, width=7, num_agents=4, num_stags=4, episode_limit=60, punishment=0.0
    ),
}
