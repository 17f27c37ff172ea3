"""Episodes to look at: frames of text, and pictures of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from marl.agents import NO_ACTION, Agent
from marl.environments.protocol import TextEnvironment
from marl.errors import MissingExtraError
from marl.rollout import choose_actions

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Frame", "save_gif", "watch"]

WIDTH, HEIGHT, MARGIN = 10, 18, 10
"""Of a letter's cell, and around all; pixels."""
MILLISECONDS = 300
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
"""Of capital letters: those who live on a grid."""


@dataclass(frozen=True)
class Frame:
    """An episode at one moment."""

    step: int
    """Steps taken."""
    actions: tuple[int, ...]
    """Those of the agents that led here; none at the start."""
    reward: float
    """Of the last step."""
    total: float
    """Of all steps."""
    picture: str
    """What the environment looks like, as lines of text."""

    def __str__(self) -> str:
        actions = f", actions {' '.join(map(str, self.actions))}" if self.actions else ""
        return f"step {self.step}{actions}, reward {self.reward:g}, return {self.total:g}\n{self.picture}"


@torch.no_grad()
def watch(environment: TextEnvironment, agent: Agent, *, epsilon: float, seed: int) -> Iterator[Frame]:
    """The frames of the first of an environment's parallel episodes, from its start to its end.

    >>> from marl.agents import AgentInputs, FeedForwardAgent
    >>> from marl.environments import make_environment
    >>> agent = FeedForwardAgent(AgentInputs(num_agents=2, num_actions=1, obs_size=5))
    >>> game = make_environment("matrix_game", 1, payoff=[[3]])
    >>> [frame.total for frame in watch(game, agent, epsilon=0.0, seed=0)]
    [0.0, 3.0]
    """
    generator = torch.Generator().manual_seed(seed)
    observation = environment.reset(seed)
    hidden = agent.initial_hidden(observation.obs)
    actions = torch.full(observation.avail_actions.shape[:-1], NO_ACTION)
    step, total, is_going = 0, 0.0, True
    yield Frame(step, (), 0.0, total, environment.text())
    while is_going:
        agent_qs, hidden = agent(observation.obs, actions, hidden)
        actions = choose_actions(agent_qs, observation.avail_actions, epsilon=epsilon, generator=generator)
        outcome = environment.step(actions)
        observation, reward = outcome.observation, float(outcome.reward[0])
        step, total = step + 1, total + reward
        is_going = not bool(outcome.terminated[0] | outcome.truncated[0])
        yield Frame(step, tuple(actions[0].tolist()), reward, total, environment.text())


def save_gif(frames: Iterable[Frame], path: Path) -> None:
    """Write frames as an animated GIF.

    Raises:
        MissingExtraError: Pillow is not installed.
    """
    pictured = list(frames)
    canvas = _Canvas.for_frames(pictured)
    first, *others = [canvas.draw(frame) for frame in pictured]
    first.save(path, format="GIF", save_all=True, append_images=others, duration=MILLISECONDS, loop=0)


@dataclass(frozen=True)
class _Canvas:
    """What all pictures of an episode share; each letter has a cell of its own, so that grids are grids in any font."""

    columns: int
    rows: int
    colors: Mapping[str, str]

    @classmethod
    def for_frames(cls, frames: Sequence[Frame]) -> _Canvas:
        lines = [line for frame in frames for line in str(frame).splitlines()]
        kinds = sorted({letter for frame in frames for letter in frame.picture if letter.isupper()})
        colors = {letter: COLORS[number % len(COLORS)] for number, letter in enumerate(kinds)}
        return cls(max(map(len, lines)), 1 + max(len(frame.picture.splitlines()) for frame in frames), colors)

    def draw(self, frame: Frame) -> Image:
        try:
            from PIL import Image, ImageDraw
        except ImportError as error:
            raise MissingExtraError.of("pillow") from error
        image = Image.new("RGB", (2 * MARGIN + self.columns * WIDTH, 2 * MARGIN + self.rows * HEIGHT), "white")
        draw = ImageDraw.Draw(image)
        caption, *lines = str(frame).splitlines()
        draw.text((MARGIN, MARGIN), caption, fill="black")
        for row, line in enumerate(lines, start=1):
            for column, letter in enumerate(line):
                x, y = MARGIN + column * WIDTH, MARGIN + row * HEIGHT
                if letter in self.colors:
                    draw.rectangle((x, y, x + WIDTH - 1, y + HEIGHT - 2), fill=self.colors[letter])
                draw.text((x + 2, y + 2), letter, fill="white" if letter in self.colors else "black")
        return image
