"""StarCraft II itself, as SMACv2 and SMAC play it: B games in B processes, in lockstep.

It needs what `docs/how-to/starcraft.md` installs: StarCraft II, its maps, and a package that is not on PyPI. Where it
differs from the papers' protocol, and what no seed decides, is said there as well.
"""

from __future__ import annotations

import logging
import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from marl.environments.protocol import Clock, Observation, Outcome, Spec, checked_actions, checked_batch_size, outcome
from marl.environments.starcraft_games import Game, GameBroke, info_of
from marl.environments.starcraft_settings import StarcraftSettings
from marl.errors import GameError
from marl.game_worker import Seen, Step

__all__ = ["Starcraft"]

NO_OP = 0
"""What the dead do, and all that is left after the end."""

log = logging.getLogger(__name__)


class Starcraft:
    """B battles of a team that learns against the game's own player.

    Games are started by the first `reset`, and closed with the environment. One that crashes or hangs is a truncated
    episode, of which the step that broke it did not happen (`Outcome.broken`); the next `reset` begins it anew, in
    another process. Seeds decide teams and places, but not all that the game does. `client` takes the place of the
    package's class.

    Raises:
        MissingExtraError: the package is not installed.
        GameError: it makes no such game.
    """

    def __init__(
        self, settings: StarcraftSettings, batch_size: int, *, seed: int = 0, client: str | None = None
    ) -> None:
        self.batch_size = checked_batch_size(batch_size)
        self._settings, self._client = settings, client or settings.client
        info = info_of(self._client, repr(settings.arguments(0)), settings.patience)
        self.spec = Spec(
            num_agents=info["n_agents"],
            num_actions=info["n_actions"],
            obs_size=info["obs_shape"],
            state_size=info["state_shape"],
            episode_limit=info["episode_limit"],
        )
        self.num_restarts = 0
        """Games that broke and were begun anew."""
        self._seed, self._num_begun = seed, 0
        self._clock = Clock(batch_size, self.spec.episode_limit)
        self._games: dict[int, Game] = {}
        self._closing = weakref.finalize(self, _close_all, self._games)

    def reset(self, seed: int | None = None) -> Observation:
        """Begins B new episodes; with a seed from there, without one going on with the random numbers in use.

        Raises:
            GameError: there is no StarCraft or no such map, or a game breaks again and again.
        """
        if seed is not None:
            self._seed, self._num_begun = seed, 0
        for lane in range(self.batch_size):
            self._ask_to_begin(lane)
        self._seen = [self._begun(lane) for lane in range(self.batch_size)]
        self._num_begun += 1
        self._won, self._broken = np.zeros((2, self.batch_size), dtype=np.bool_)
        self._num_dead = [(0, 0)] * self.batch_size
        self._clock.start()
        return self._observe(self._clock.ended)

    def step(self, actions: Tensor) -> Outcome:
        """Takes actions (B, N), int64, in all games at once; raises `ActionError` for others.

        Those of ended episodes are ignored.
        """
        ended = self._clock.ended
        taken = checked_actions(actions, self._avail_actions, ended)
        going = np.flatnonzero(~ended).tolist()
        for lane in going:
            self._games[lane].send("step", taken[lane])
        steps = {lane: self._stepped(lane) for lane in going}
        reward = np.zeros(self.batch_size, dtype=np.float32)
        over, cut_off = np.zeros((2, self.batch_size), dtype=np.bool_)
        for lane, step in steps.items():
            if step is None:
                self._broken[lane] = cut_off[lane] = True
                continue
            self._seen[lane], self._num_dead[lane], reward[lane] = step.seen, step.num_dead, step.reward
            over[lane], cut_off[lane], self._won[lane] = step.is_over, step.is_cut_off, step.is_won
        self._clock.tick(over, cut_off)
        found = outcome(self._observe(ended), reward, self._clock, won=self._won.copy())
        return Outcome(**{**vars(found), "broken": torch.from_numpy(self._broken.copy())})

    def text(self, episode: int = 0) -> str:
        """How many have fallen in one battle, for people; StarCraft itself shows more."""
        allies, enemies = self._num_dead[episode]
        return f"step {self._clock.time}: {allies} of {self.spec.num_agents} allies and {enemies} enemies have fallen"

    def close(self) -> None:
        """End all games; another `reset` starts them again."""
        _close_all(self._games)

    # -- games that may break

    def _ask_to_begin(self, lane: int) -> None:
        if lane not in self._games:
            number = self._seed_for(lane) % 2**31  # of the game's own numbers, for as long as it runs
            arguments = self._settings.arguments(number)
            self._games[lane] = Game(self._client, arguments, patience=self._settings.patience)
        self._games[lane].send("begin", self._seed_for(lane))

    def _begun(self, lane: int) -> Seen:
        for _ in range(self._settings.max_restarts):
            try:
                seen: Seen = self._games[lane].receive()
            except GameBroke as error:
                self._drop(lane, error)
                self._ask_to_begin(lane)
                latest = error
            else:
                return seen
        again = f"game {lane} broke {self._settings.max_restarts} times before its first step"
        raise GameError(f"{again}, at last because of this: {latest}; see whether StarCraft starts by itself")

    def _stepped(self, lane: int) -> Step | None:
        """What a step led to; none if the game broke."""
        try:
            step: Step = self._games[lane].receive()
        except GameBroke as error:
            self._drop(lane, error)
            return None
        return step

    def _drop(self, lane: int, error: GameBroke) -> None:
        log.warning("game %d broke (%s); it is begun anew, and its episode ends before that step", lane, error)
        self.num_restarts += 1
        self._games.pop(lane).kill()

    def _seed_for(self, lane: int) -> int:
        """That of a lane's next episode, whatever the other lanes are."""
        return int(np.random.SeedSequence([self._seed, self._num_begun, lane]).generate_state(1)[0])

    # -- what is shown

    def _observe(self, ended: NDArray[np.bool_]) -> Observation:
        """What can be seen now; episodes that had ended before (B,) have nothing left to do."""
        available = np.stack([seen.avail_actions for seen in self._seen])
        available[ended] = np.arange(self.spec.num_actions) == NO_OP
        self._avail_actions = torch.from_numpy(available)
        obs, state = (np.stack([getattr(seen, name) for seen in self._seen]) for name in ("obs", "state"))
        return Observation(torch.from_numpy(obs), torch.from_numpy(state), self._avail_actions)


def _close_all(games: dict[int, Game]) -> None:
    for lane in list(games):
        games.pop(lane).close()
