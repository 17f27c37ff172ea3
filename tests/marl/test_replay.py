"""The memory of episodes: which it keeps, which it draws, and that it comes back from a file as it was."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from marl.errors import BatchError, CheckpointError, SettingsError
from marl.replay import EpisodeReplay, trim
from tests.marl.batches import SIZES, made_up_episodes


def numbered(*numbers: int, num_steps: int = 2) -> TensorDict:
    """Episodes that can be told apart by their reward."""
    reward = torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, num_steps).clone()
    return TensorDict({"reward": reward, "mask": torch.ones_like(reward, dtype=torch.bool)}, [len(numbers)])


def numbers_of(episodes: TensorDict) -> list[int]:
    return [int(number) for number in episodes["reward"][:, 0]]


def test_the_oldest_episodes_leave_first() -> None:
    replay = EpisodeReplay(5)
    replay.add(numbered(0, 1, 2))
    assert sorted(numbers_of(replay.sample(3))) == [0, 1, 2]
    replay.add(numbered(3, 4, 5, 6))
    assert len(replay) == 5
    assert sorted(numbers_of(replay.sample(5))) == [2, 3, 4, 5, 6]


def test_more_episodes_than_fit_leave_the_latest() -> None:
    replay = EpisodeReplay(3)
    replay.add(numbered(0))
    replay.add(numbered(*range(1, 9)))
    assert numbers_of(replay.latest(3)) == [6, 7, 8]
    assert replay.num_added == 9


def test_latest_gives_the_episodes_in_the_order_they_came() -> None:
    replay = EpisodeReplay(4)
    for number in range(7):
        replay.add(numbered(number))
    assert numbers_of(replay.latest(3)) == [4, 5, 6]


def test_draws_are_uniform_and_without_repetition() -> None:
    replay = EpisodeReplay(10)
    replay.add(numbered(*range(10)))
    counts: Counter[int] = Counter()
    for _ in range(1000):
        drawn = numbers_of(replay.sample(4))
        assert len(set(drawn)) == 4
        counts.update(drawn)
    # each count has mean 400 and standard deviation sqrt(1000 * 0.4 * 0.6) = 15.5
    assert all(abs(count - 400) < 5 * 15.5 for count in counts.values())


def test_the_same_seed_draws_the_same() -> None:
    draws = []
    for seed in (1, 1, 2):
        replay = EpisodeReplay(20, seed=seed)
        replay.add(numbered(*range(20)))
        draws.append([numbers_of(replay.sample(5)) for _ in range(3)])
    assert draws[0] == draws[1] != draws[2]


def test_entries_keep_their_dtypes_and_the_memory_is_stated() -> None:
    episodes, replay = made_up_episodes(state="bytes"), EpisodeReplay(100)
    assert replay.num_bytes == 0
    replay.add(episodes)
    drawn = replay.sample(2)
    assert {key: entry.dtype for key, entry in drawn.items()} == {key: entry.dtype for key, entry in episodes.items()}
    n, a, o, s = SIZES.num_agents, SIZES.num_actions, SIZES.obs_size, SIZES.state_size
    of_five_steps, of_four = n * o + s + n * a, 8 * n + 4 + 1 + 1  # bytes of one
    assert replay.num_bytes == 100 * (5 * of_five_steps + 4 * of_four)


def test_draws_are_copies() -> None:
    replay = EpisodeReplay(2)
    replay.add(numbered(1, 2))
    replay.sample(2)["reward"].zero_()
    assert sorted(numbers_of(replay.sample(2))) == [1, 2]


def test_trimming_drops_the_steps_that_happened_in_no_episode_and_keeps_the_observation_behind_the_last() -> None:
    episodes = made_up_episodes(fates=((2, True), (3, False), (6, True)))
    cut = trim(episodes[:2])
    assert cut["mask"].shape == (2, 3) and cut["obs"].shape[1] == 4
    for key, entry in cut.items():
        assert torch.equal(entry, episodes[key][:2, : entry.shape[1]])
    assert trim(episodes)["mask"].shape == (3, 6)


def test_clearing_forgets_and_allows_other_shapes() -> None:
    replay = EpisodeReplay(4)
    replay.add(numbered(1, 2))
    replay.clear()
    assert len(replay) == 0
    replay.add(numbered(3, num_steps=5))
    assert replay.sample(1)["reward"].shape == (1, 5)


@pytest.mark.parametrize("num_added", [0, 3, 7])
def test_saved_and_loaded_it_goes_on_as_it_would_have(num_added: int, tmp_path: Path) -> None:
    replay, other = EpisodeReplay(5, seed=1), EpisodeReplay(5, seed=2)
    if num_added:
        replay.add(numbered(*range(num_added)))
    other.add(numbered(100, 101))
    torch.save(replay.state_dict(), tmp_path / "replay.pt")
    other.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    for each in (replay, other):
        each.add(numbered(50, 51, 52))
    assert numbers_of(replay.latest(3)) == numbers_of(other.latest(3)) == [50, 51, 52]
    assert [numbers_of(replay.sample(3)) for _ in range(3)] == [numbers_of(other.sample(3)) for _ in range(3)]


def test_the_state_of_another_capacity_is_refused() -> None:
    with pytest.raises(CheckpointError, match="6 episodes, found the state of one of 5"):
        EpisodeReplay(6).load_state_dict(EpisodeReplay(5).state_dict())


def test_a_file_holds_no_more_than_the_episodes_that_there_are() -> None:
    replay = EpisodeReplay(1000)
    replay.add(numbered(1, 2))
    saved = replay.state_dict()["episodes"]["reward"]
    assert saved.untyped_storage().nbytes() == saved.nbytes


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(SettingsError, match="capacity of at least 1"):
        EpisodeReplay(0)
    replay = EpisodeReplay(5)
    with pytest.raises(BatchError, match="asked for 1 episodes, found 0"):
        replay.sample(1)
    replay.add(numbered(1, 2))
    for num in (0, 3):
        with pytest.raises(BatchError, match=f"asked for {num} episodes, found 2"):
            replay.sample(num)
        with pytest.raises(BatchError, match=f"asked for {num} episodes, found 2"):
            replay.latest(num)
    with pytest.raises(BatchError, match="pad all"):
        replay.add(numbered(1, num_steps=3))
    assert len(replay) == 2
