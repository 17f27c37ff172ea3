"""B grids of one size as flat arrays, each with a margin of walls.

A cell is a number that counts through all grids, so that one gather reaches a cell in every episode. The margin makes
walls ordinary occupied cells, and windows around agents never leave the grid. Its first cell is `nowhere`, where
whatever has been removed stands: out of sight, beside no cell of the grid, and unable to leave.

Two pictures are kept. `occupied` is written with every move, since who moves next has to see it; `presence`, the three
channels that agents observe, only once a step, from all positions at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Bytes = NDArray[np.uint8]
Cells = NDArray[np.intp]

RIGHT, DOWN, LEFT, UP, STAY, CATCH = range(6)
NUM_CHANNELS = 3
NUM_NEIGHBORS = 4


class Grids:
    """Which cells of B grids are occupied, and by what.

    >>> grids = Grids(3, 4, batch_size=1, radius=1)
    >>> grids.draw(grids.cells(np.array([[5]])).T, channels=np.array([0]))
    >>> print(grids.text(0, "AX"))
    . . . .
    . A . .
    . . . .
    """

    def __init__(self, height: int, width: int, batch_size: int, radius: int) -> None:
        self.height, self.width, self.batch_size, self.radius = height, width, batch_size, radius
        self.margin = max(1, radius)
        self.stride = width + 2 * self.margin
        self.size = self.stride * (height + 2 * self.margin)
        self.lanes = np.arange(batch_size, dtype=np.intp)
        self.nowhere = self.lanes * self.size
        self.deltas = np.array([1, self.stride, -1, -self.stride, 0, 0], dtype=np.intp)
        self.neighbors = self.deltas[:NUM_NEIGHBORS, None]
        self._window_rows = (np.arange(2 * radius + 1) * self.stride - radius * (self.stride + 1)) * NUM_CHANNELS
        self.clear()

    def clear(self, shown_walls: int | None = None) -> None:
        """Removes everything but the walls, which can be seen if there is a channel for them."""
        self.presence = np.zeros((self.batch_size, self.size * NUM_CHANNELS), dtype=np.uint8)
        self._shown: Cells = np.zeros(0, dtype=np.intp)
        walls = np.ones((self.batch_size, self.height + 2 * self.margin, self.stride), dtype=np.uint8)
        walls[:, self.margin : -self.margin, self.margin : -self.margin] = 0
        self.occupied = walls.reshape(-1)
        if shown_walls is not None:
            self.presence.reshape(-1)[shown_walls::NUM_CHANNELS] = self.occupied

    def cells(self, inside: Cells) -> Cells:
        """The cells of places (B, ...) that count through each grid without its margin, row by row."""
        rows, columns = np.divmod(inside, self.width)
        lanes = self.nowhere.reshape(-1, *[1] * (inside.ndim - 1))
        cells: Cells = lanes + (rows + self.margin) * self.stride + columns + self.margin
        return cells

    def is_somewhere(self, positions: Cells) -> Bools:
        """Whether what stands at the positions (..., B) has not been removed."""
        here: Bools = positions != self.nowhere
        return here

    def place(self, positions: Cells) -> None:
        """Occupies cells."""
        self.occupied[positions] = 1

    def remove(self, positions: Cells, which: NDArray[np.intp], lanes: NDArray[np.intp]) -> None:
        """Moves what stands at entries (which, lanes) of the positions (I, B) to nowhere."""
        self.occupied[positions[which, lanes]] = 0
        positions[which, lanes] = self.nowhere[lanes]

    def adjacent(self, some: Cells, others: Cells) -> Bools:
        """Which of some positions (I, B) are 4-adjacent to which of others (J, B), as (I, J, B).

        The margin keeps the ends of neighboring rows apart, so a distance of 1 or of a row is adjacency.
        """
        distance = np.abs(some.astype(np.int32)[:, None] - others.astype(np.int32))
        beside: Bools = (distance == 1) | (distance == self.stride)
        return beside

    def draw(self, positions: Cells, channels: NDArray[np.intp]) -> None:
        """Shows what stands at the positions (I, B) in these channels (I,), and nothing else."""
        presence = self.presence.reshape(-1)
        presence[self._shown] = 0
        self._shown = positions * NUM_CHANNELS + channels[:, None]
        presence[self._shown] = self.is_somewhere(positions)

    def windows(self, centers: Cells) -> Bytes:
        """The squares around centers (I, B), as (B, I, (2 radius + 1)^2 * 3), row by row; nothing seen from nowhere.

        A row of a window is adjacent in memory. As one item of as many bytes it is copied at once, which takes a third
        of the time of gathering its bytes.
        """
        length = len(self._window_rows) * NUM_CHANNELS
        every_row = np.ndarray((self.presence.size - length + 1,), f"V{length}", self.presence, strides=(1,))
        starts = np.ascontiguousarray(centers.T * NUM_CHANNELS)[..., None] + self._window_rows
        seen: Bytes = every_row[starts].view(np.uint8).reshape(self.batch_size, len(centers), -1)
        here = self.is_somewhere(centers)
        if not here.all():
            seen[~here.T] = 0
        return seen

    def whole(self, num_channels: int = NUM_CHANNELS) -> Bytes:
        """The first channels of the grids without their margins, (B, height * width * channels)."""
        shape = (self.batch_size, -1, self.stride, NUM_CHANNELS)
        inside = slice(self.margin, -self.margin)
        cells = self.presence.reshape(shape)[:, inside, inside, :num_channels]
        return cells.copy().reshape(self.batch_size, -1)  # reshaping alone does not copy a single row of cells

    def walls_around(self) -> Bools:
        """Whether each cell of a grid has a wall to its right, below, to its left and above, (size, 4)."""
        walls = np.ones((self.height + 2 * self.margin, self.stride), dtype=np.bool_)
        walls[self.margin : -self.margin, self.margin : -self.margin] = False
        around: Bools = walls.reshape(-1)[(np.arange(self.size)[:, None] + self.deltas[:NUM_NEIGHBORS]) % self.size]
        return around

    def text(self, episode: int, letters: str) -> str:
        """One grid as lines of text: a letter for each channel, `.` where nothing stands."""
        grid = self.whole()[episode].reshape(self.height, self.width, NUM_CHANNELS)
        signs = np.where(grid.any(axis=2), np.array(list(letters.ljust(NUM_CHANNELS)))[grid.argmax(axis=2)], ".")
        return "\n".join(" ".join(row) for row in signs)
