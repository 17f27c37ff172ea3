"""A memory of episodes, from which updates draw at random.

Episodes are TensorDicts of batch size (B,), every entry padded to the same number of steps T:

    obs (B, T+1, N, O), state (B, T+1, S), avail_actions (B, T+1, N, A) bool, actions (B, T, N) int64,
    reward (B, T) float, terminated (B, T) bool, mask (B, T) bool: which steps happened

They are kept in the dtypes in which they come, so that a grid of uint8 takes a quarter of a float's memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from marl.errors import BatchError, CheckpointError, SettingsError

__all__ = ["EpisodeReplay", "check_layout", "trim"]


class EpisodeReplay:
    """The latest `capacity` episodes; the oldest leave first.

    Memory is reserved at the first `add` and used as episodes come.

    >>> episodes = TensorDict({"reward": torch.arange(3.0)[:, None], "mask": torch.ones(3, 1, dtype=torch.bool)}, [3])
    >>> replay = EpisodeReplay(capacity=2, seed=0)
    >>> replay.add(episodes)
    >>> len(replay), replay.sample(2)["reward"].sum()
    (2, tensor(3.))
    """

    def __init__(self, capacity: int, *, seed: int = 0) -> None:
        if capacity < 1:
            raise SettingsError(f"a replay of {capacity} episodes remembers nothing: give it a capacity of at least 1")
        self.capacity = capacity
        self.num_added = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._storage: TensorDict | None = None

    def __len__(self) -> int:
        return min(self.num_added, self.capacity)

    @property
    def num_bytes(self) -> int:
        """Memory that the replay takes once it is full; 0 before the first episode."""
        return 0 if self._storage is None else sum(entry.nbytes for entry in self._storage.values())

    def add(self, episodes: TensorDict) -> None:
        """Remember some episodes (B,).

        Raises:
            BatchError: their entries, shapes or dtypes differ from those remembered.
        """
        latest = episodes[-self.capacity :]
        storage = self._storage_for(latest)
        self.num_added += len(episodes)
        storage[self._places(len(latest))] = latest

    def sample(self, batch_size: int) -> TensorDict:
        """Different episodes (batch_size,), each as likely as any other, cut to the longest of them.

        Raises:
            BatchError: fewer episodes are remembered.
        """
        order = torch.randperm(len(self), generator=self._generator)
        return self._recall(order[:batch_size], batch_size)

    def latest(self, num_episodes: int) -> TensorDict:
        """The episodes added last (num_episodes,), oldest first, cut to the longest of them.

        Raises:
            BatchError: fewer episodes are remembered.
        """
        return self._recall(self._places(min(num_episodes, len(self))), num_episodes)

    def keep_latest(self, num_episodes: int) -> None:
        """Forget all but the episodes added last, or keep all where there are fewer. The random draws go on."""
        if num_episodes >= len(self):
            return
        storage, places = self._storage, self._places(num_episodes)
        self.clear()
        if storage is not None and num_episodes:
            self.add(storage[places])

    def clear(self) -> None:
        """Forget all episodes; the next ones may have other shapes. The random draws go on."""
        self._storage, self.num_added = None, 0

    def state_dict(self) -> dict[str, Any]:
        """The episodes, and where the random draws stand: tensors and numbers, for `torch.save`."""
        kept = None
        if self._storage is not None:
            full = len(self) == self.capacity
            # A part is copied, because saving a view saves all that it is a view of.
            kept = {key: entry if full else entry[: len(self)].clone() for key, entry in self._storage.items()}
        state = {"episodes": kept, "num_added": self.num_added, "capacity": self.capacity}
        return {**state, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what was saved, so that the next draws are those that would have followed.

        Raises:
            CheckpointError: the state is that of a replay with another capacity.
        """
        if state["capacity"] != self.capacity:
            raise CheckpointError(
                f"asked to go on with a replay of {self.capacity} episodes, found the state of one of "
                f"{state['capacity']}: use the capacity that it was saved with"
            )
        self.clear()
        if state["episodes"] is not None:
            episodes = TensorDict(state["episodes"], batch_size=[len(state["episodes"]["mask"])])
            self._storage_for(episodes)[: len(episodes)] = episodes
        self.num_added = state["num_added"]
        self._generator.set_state(state["generator"])

    def _places(self, num_latest: int) -> Tensor:
        """Where the latest of the episodes added so far are, oldest first."""
        return torch.arange(self.num_added - num_latest, self.num_added) % self.capacity

    def _storage_for(self, episodes: TensorDict) -> TensorDict:
        if self._storage is None:
            empty = {key: entry.new_zeros(self.capacity, *entry.shape[1:]) for key, entry in episodes.items()}
            self._storage = TensorDict(empty, batch_size=[self.capacity])
        if _layout(episodes) != _layout(self._storage):
            raise BatchError(
                f"asked to remember episodes of {_layout(episodes)}, found episodes of {_layout(self._storage)}: "
                "pad all to the same number of steps, and clear the replay when the task changes its shapes"
            )
        return self._storage

    def _recall(self, places: Tensor, num_episodes: int) -> TensorDict:
        if self._storage is None or not 0 < num_episodes <= len(self):
            raise BatchError(
                f"asked for {num_episodes} episodes, found {len(self)} remembered: collect more, or ask for fewer"
            )
        return trim(self._storage[places])


def trim(episodes: TensorDict) -> TensorDict:
    """Episodes without the steps that happened in none of them.

    >>> mask = torch.tensor([[True, True, False], [True, False, False]])
    >>> trim(TensorDict({"mask": mask, "state": torch.zeros(2, 4, 5)}, [2]))["state"].shape
    torch.Size([2, 3, 5])
    """
    mask = episodes["mask"]
    time, num_steps = mask.ndim - 1, mask.shape[-1]
    longest = int(mask.flatten(0, -2).any(dim=0).sum())
    if longest == num_steps:
        return episodes
    cut = {key: entry.narrow(time, 0, entry.shape[time] - num_steps + longest) for key, entry in episodes.items()}
    return TensorDict(cut, batch_size=episodes.batch_size)


def check_layout(episodes: TensorDict) -> None:
    """Refuse episodes (..., B) that are not laid out as above.

    Raises:
        BatchError: entries of different lengths, or other numbers where booleans belong.
    """
    steps = tuple(episodes["mask"].shape)
    longer = (*steps[:-1], steps[-1] + 1)
    expected = {"reward": steps, "terminated": steps, "actions": steps}
    expected |= {"obs": longer, "state": longer, "avail_actions": longer}
    for key, shape in expected.items():
        found = tuple(episodes[key].shape)
        if found[: len(shape)] != shape:
            raise BatchError(f"asked to learn from {shape} steps of {key!r}, found {found}: pad all entries alike")
    for key in ("mask", "terminated", "avail_actions"):
        if episodes[key].dtype != torch.bool:
            raise BatchError(f"asked for booleans as {key!r}, found {episodes[key].dtype}: convert them first")


def _layout(episodes: TensorDict) -> dict[str, str]:
    return {key: f"{str(entry.dtype)[6:]}{list(entry.shape[1:])}" for key, entry in sorted(episodes.items())}
