"""The figures by name: a row here is all that a new one needs beside its file."""

from __future__ import annotations

from marl.errors import SettingsError, suggestion
from marl.reproduce.figures.figure import Figure
from marl.reproduce.figures.figure1 import FIGURE1
from marl.reproduce.figures.figure2 import FIGURE2
from marl.reproduce.figures.figure3 import FIGURE3
from marl.reproduce.figures.figure4 import FIGURE4
from marl.reproduce.figures.figure6 import FIGURE6
from marl.reproduce.figures.figure7 import FIGURE7
from marl.reproduce.figures.figure8 import FIGURE8

__all__ = ["FIGURES", "figures_of"]

FIGURES: dict[str, Figure] = {
    figure.name: figure for figure in (FIGURE1, FIGURE2, FIGURE3, FIGURE4, FIGURE6, FIGURE7, FIGURE8)
}
"""Those that can be reproduced."""


def figures_of(name: str) -> list[Figure]:
    """The figure of that name, or `all`.

    >>> [figure.name for figure in figures_of("all")]
    ['figure1', 'figure2', 'figure3', 'figure4', 'figure6', 'figure7', 'figure8']

    Raises:
        SettingsError: there is none.
    """
    if name == "all":
        return list(FIGURES.values())
    if name not in FIGURES:
        raise SettingsError(f"there is no figure {name!r} to reproduce; {suggestion(name, [*FIGURES, 'all'])}")
    return [FIGURES[name]]
