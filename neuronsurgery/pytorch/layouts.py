"""Where the units of a site are in a value that was reshaped, pooled or joined to others since they were computed.

A consumer reads its input along one axis. After a convolution is flattened a unit has several entries there; after a
concatenation others stand before it. What cannot be known without sizes (traces have none) stays open until a consumer
says how many entries it reads, and is declined where that does not settle it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

__all__ = ["Layout", "Passed"]


class Passed(IntEnum):
    """What a value has passed since the activation function, from the strictest to the loosest."""

    LINEAR = 0
    """Nothing but new shapes, means and dropout: a consumer reads the units themselves."""
    HOMOGENEOUS = 1
    """Also what commutes with positive factors: a maximum, a ReLU."""
    UNITWISE = 2
    """Any function of one unit, the same for all."""
    OWN = 3
    """What has numbers of its own for each unit: weight and statistics of a batch norm, the other half of a gate."""


@dataclass(frozen=True)
class Layout:
    """An axis of a value: `lead`, `outer` times (`before`, units, `after`) with `inner` entries of each, then `tail`.

    `axis` is counted from the end, `num_axes` is None where it is not known. Of the counts, None is one not known.
    `is_fixed`: sizes are written out in the code that the value passed.

    >>> Layout(3, axis=-3, num_axes=4).flattened(1, -1).columns(12).tolist()     # 3 channels of 4 pixels
    [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    >>> Layout(2, axis=-1).joined([5], []).columns(7).tolist()
    [[5], [6]]
    """

    num_units: int
    axis: int
    num_axes: int | None = None
    outer: int | None = 1
    inner: int | None = 1
    before: int | None = 0
    after: int | None = 0
    lead: int | None = 0
    tail: int | None = 0
    passed: Passed = Passed.LINEAR
    is_fixed: bool = False

    # -- at a consumer

    def columns(self, total: int) -> Tensor | str:
        """For each unit, which entries of an axis of `total` are its own, (num_units, entries), or why that is open."""
        found = self.settled(total)
        return found if isinstance(found, str) else found.places()

    def settled(self, total: int) -> Layout | str:
        """The same with no count open, or why `total` entries do not settle them."""
        names = ("outer", "inner", "before", "after", "lead", "tail")
        known = {name: getattr(self, name) for name in names}
        open_names = [name for name in names if known[name] is None]
        if len(open_names) > 1:
            return f"how {total} entries are shared out between its units and what they were joined with is not known"
        for name in open_names:
            known[name] = self._solved(name, known, total)
        if None in known.values() or (found := replace(self, **known)).total != total:
            return f"{total} entries do not fit its {self.num_units} units"
        return found

    @property
    def total(self) -> int:
        """How many entries the axis has, once no count is open."""
        outer, inner, before, after, lead, tail = self._counts
        return lead + outer * (before + self.num_units + after) * inner + tail

    def places(self) -> Tensor:
        """For each unit, which entries are its own, (num_units, entries), once no count is open."""
        outer, inner, before, after, lead, _ = self._counts
        first = (torch.arange(outer) * (before + self.num_units + after))[:, None, None] * inner
        unit = (before + torch.arange(self.num_units))[None, :, None] * inner
        found = lead + first + unit + torch.arange(inner)[None, None, :]
        return found.movedim(0, 1).reshape(self.num_units, -1)

    @property
    def _counts(self) -> tuple[int, int, int, int, int, int]:
        outer, inner, before, after, lead, tail = (
            *(self.outer, self.inner, self.before, self.after),
            *(self.lead, self.tail),
        )
        assert outer is not None and inner is not None and before is not None
        assert after is not None and lead is not None and tail is not None
        return outer, inner, before, after, lead, tail

    def _solved(self, name: str, known: dict[str, int | None], total: int) -> int | None:
        """The one count that makes the total right; None where there is none."""
        value = {key: 0 if count is None else count for key, count in known.items()}
        rest = total - value["lead"] - value["tail"]
        block = value["before"] + self.num_units + value["after"]
        if name in ("lead", "tail"):
            found, remainder = rest - value["outer"] * block * value["inner"], 0
        elif name in ("outer", "inner"):
            found, remainder = divmod(rest, block * (value["outer"] or value["inner"]))
            remainder |= found < 1
        else:
            found, remainder = divmod(rest, value["outer"] * value["inner"])
            found -= block
        return found if found >= 0 and not remainder else None

    # -- what a value passes

    def past(self, passed: Passed) -> Layout:
        """Past a function of each entry alone."""
        return replace(self, passed=max(self.passed, passed))

    def position(self, axis: int) -> int | None:
        """An axis counted from the front or the end, as counted from the end; None where that is not known."""
        if axis < 0:
            return axis
        return None if self.num_axes is None else axis - self.num_axes

    def joined(self, first: Collection[int | None], last: Collection[int | None]) -> Layout:
        """Concatenated along the units' axis, behind and ahead of values of these sizes."""
        ahead, behind = _sum(first), _sum(last)
        is_plain = self.outer == self.inner == 1 and self.lead == self.tail == 0
        if is_plain:
            return replace(self, before=_sum((self.before, ahead)), after=_sum((self.after, behind)))
        return replace(self, lead=_sum((self.lead, ahead)), tail=_sum((self.tail, behind)))

    def flattened(self, start: int, end: int) -> Layout | str:
        """Past `flatten(start, end)`."""
        if self.num_axes is None:
            return self._flattened_to_the_end(start, end)
        first, last, own = start % self.num_axes, end % self.num_axes, self.num_axes + self.axis
        if first >= last:
            return self
        num_axes = self.num_axes - (last - first)
        if not first <= own <= last:
            axis = self.axis + (last - first) if own < first else self.axis
            return replace(self, axis=axis, num_axes=num_axes)
        if first == 0 and own > 0:
            return "it is flattened together with the batch"
        return replace(self, axis=first - num_axes, num_axes=num_axes).merged(own > first, own < last)

    def _flattened_to_the_end(self, start: int, end: int) -> Layout | str:
        """Where the number of axes is not known: what is ahead of the units on the last axis is merged."""
        if self.axis != -1 or end != -1 or start == 0:
            return "how it is flattened is not known"
        return self if start == -1 else replace(self, num_axes=start + 1 if start > 0 else None).merged(True, False)

    def merged(self, ahead: bool, behind: bool) -> Layout:
        """With axes of sizes that are not known merged into the units' axis, ahead of it and behind it."""
        if (self.lead, self.tail) != (0, 0) and (ahead or behind):
            return replace(self, outer=None, inner=None)
        return replace(self, outer=None if ahead else self.outer, inner=None if behind else self.inner)

    def reduced(self, axes: Collection[int], keeps: bool) -> Layout | str:
        """Past a mean, sum or maximum over some axes."""
        places = [self.position(axis) for axis in axes]
        if self.num_axes is None and self.axis == -1 and all(axis > 0 for axis in axes):
            return self  # over time, say; over the units themselves the result would fit no consumer of them
        if None in places:
            return "which axes are reduced is not known"
        found = [place for place in places if place is not None]
        if self.axis in found:
            return "its units are reduced to one number"
        if keeps:
            return self
        num_axes = None if self.num_axes is None else self.num_axes - len(found)
        return replace(self, axis=self.axis + sum(place > self.axis for place in found), num_axes=num_axes)

    def permuted(self, order: Collection[int]) -> Layout | str:
        """Past `permute(order)`."""
        num_axes = len(order)
        if self.num_axes not in (None, num_axes):
            return "its axes are permuted in a way that does not fit"
        places = [axis % num_axes for axis in order]
        return replace(self, axis=places.index(num_axes + self.axis) - num_axes, num_axes=num_axes)

    def transposed(self, one: int, other: int) -> Layout | str:
        """Past `transpose(one, other)`."""
        places = self.position(one), self.position(other)
        if None in places:
            return "which of its axes are exchanged is not known"
        if self.axis not in places:
            return self
        axis = places[1] if self.axis == places[0] else places[0]
        return self if axis is None else replace(self, axis=axis)


def _sum(counts: Collection[int | None]) -> int | None:
    found = [count for count in counts if count is not None]
    return sum(found) if len(found) == len(counts) else None
