"""Reports of methods that concern whole layers: which tensors changed, to print and to keep."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from neuronsurgery.tables import listed, render
from neuronsurgery.values import Value


@dataclass(frozen=True)
class LayerReport(Value):
    """What a method did to whole layers.

    >>> print(LayerReport("reset", {"head": ("weight", "bias")}, 22, ("head: its optimizer state is a fresh one",)))
    reset: 22 numbers in 1 layer
    | layer | tensors      |
    |-------|--------------|
    | head  | weight, bias |
    head: its optimizer state is a fresh one
    """

    method: str
    """The name of the method."""
    changed: Mapping[str, tuple[str, ...]]
    """Name of the module that owns them -> the names of its tensors that changed; of `reset_optimizer`, whose state."""
    num_numbers: int
    """How many numbers these tensors hold."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""
    verified: bool = False
    """Whether the whole model was compared on a batch, by a method that keeps the output."""
    model_error: float | None = None
    """Relative error of the whole model's output on that batch."""

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the modules concerned, in the order of the model.

        >>> LayerReport("reset", {"0": ("weight",), "2": ("weight",)}, 8).layers
        ('0', '2')
        """
        return tuple(self.changed)

    def __str__(self) -> str:
        num_layers = len(self.changed)
        title = f"{self.method}: {self.num_numbers} numbers in {num_layers} layer{'' if num_layers == 1 else 's'}"
        return render(title, ("layer", "tensors"), self._rows(), self._lines())

    def _rows(self) -> Iterator[tuple[str, str]]:
        for layer, tensors in self.changed.items():
            yield layer or "(the model itself)", listed(tensors)

    def _lines(self) -> Iterator[str]:
        if self.verified:
            error = "" if self.model_error is None else f", relative error {self.model_error:.3g}"
            yield f"output: compared on a batch{error}"
        yield from self.notes
