"""The arithmetic of composite units, without a framework: which frozen rows a bank holds and how they are summed.

A unit that was operated on n times computes, with its active member a in the old slot,

    k_1 + (k_2 - c_1) + ... + (k_n - c_{n-1}) + (a - c_n)

oldest first, pairs together: the active member of one operation becomes the next one's knowledge, and each difference
is zero at the moment of its surgery, so no large terms cancel (KNIFE, arXiv 2606.25335, section 3.3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from neuronsurgery.tables import counted, render
from neuronsurgery.values import Value

__all__ = ["NOT_COUNTED", "Composites", "Layout", "Member", "Rows", "as_births", "as_steps", "room_for"]

Integers = NDArray[np.int64]
KNOWLEDGE, COMPENSATION = 1, -1
NOT_COUNTED = -1


@dataclass(frozen=True)
class Member(Value):
    """One frozen member of a composite unit."""

    role: str
    """`"knowledge"` or `"compensation"`."""
    unit: int
    """The unit of the layer that it belongs to."""
    operation: int
    """The operation that made it."""
    births: tuple[int, ...]
    """The optimizer step of each row-wise parameter (weight, bias ...) at that operation; -1: not counted.

    Below that -1 - k: k steps before its owner began to count anew.
    """
    retire: int = 0
    """Over how many optimizer steps it fades to zero; 0: it stays."""


@dataclass(frozen=True)
class Composites(Value):
    """The composite units of a model: for each site, the frozen members its bank holds.

    Example:
        >>> rows = Rows.empty(num_parameters=1).extended([2, 5], operation=1, births=[[0], [0]])
        >>> print(Composites({"fc1": rows.members()}))
        2 composite units, 4 frozen rows
        | site | composite units | frozen rows | operations | most on one unit |
        |------|-----------------|-------------|------------|------------------|
        | fc1  |               2 |           4 |          1 |                1 |
    """

    members: Mapping[str, tuple[Member, ...]]
    """Site name -> its frozen members, in the order in which they were added."""

    @property
    def num_units(self) -> int:
        """How many units are composite units."""
        return sum(len({member.unit for member in members}) for members in self.members.values())

    @property
    def num_rows(self) -> int:
        """How many frozen rows the model holds."""
        return sum(map(len, self.members.values()))

    @property
    def operations(self) -> dict[int, dict[str, tuple[int, ...]]]:
        """The number of each operation of which there are rows -> site name -> its units, ascending: see `undo`."""
        found: dict[int, dict[str, tuple[int, ...]]] = {}
        for site, members in self.members.items():
            for operation, unit in sorted({(member.operation, member.unit) for member in members}):
                found.setdefault(operation, {})[site] = (*found.get(operation, {}).get(site, ()), unit)
        return dict(sorted(found.items()))

    def __str__(self) -> str:
        title = f"{counted(self.num_units, 'composite unit')}, {counted(self.num_rows, 'frozen row')}"
        columns = ("site", "composite units", "frozen rows", "operations", "most on one unit")
        return render(title, columns, [self._row(site, members) for site, members in self.members.items()])

    def _row(self, site: str, members: tuple[Member, ...]) -> tuple[str, int, int, int, int]:
        times = Counter(member.unit for member in members if member.role == "knowledge")
        operations = {member.operation for member in members}
        return (site, len(times), len(members), len(operations), max(times.values(), default=0))


@dataclass(frozen=True, eq=False)
class Rows:
    """The frozen rows of a bank, in the order in which they were added; all arrays int64 of shape (num_rows,).

    `births` is (num_rows, num_parameters): the optimizer step of each row-wise parameter (weight, bias ...) when the
    slot was renewed, -1 where no optimizer was given; `as_births` says what others below zero are. `retire`: over how
    many steps a row fades to zero, 0: it stays.

    Example:
        >>> rows = Rows.empty(num_parameters=2).extended([3], operation=1, births=[[7, 7]])
        >>> [member.role for member in rows.members()]
        ['knowledge', 'compensation']
        >>> len(rows.extended([3, 0], operation=2, births=[[9, 9], [9, 9]]))
        6
    """

    sign: Integers
    unit: Integers
    operation: Integers
    births: Integers
    retire: Integers

    @staticmethod
    def empty(num_parameters: int) -> Rows:
        """No rows, for a producer with so many row-wise parameters."""
        none = np.zeros(0, np.int64)
        return Rows(none, none, none, np.zeros((0, num_parameters), np.int64), none)

    def __len__(self) -> int:
        return len(self.sign)

    def extended(self, units: Sequence[int], operation: int, births: Sequence[Sequence[int]], retire: int = 0) -> Rows:
        """These rows, and a knowledge and a compensation row for each unit (all knowledge rows first)."""
        chosen = np.asarray(units, np.int64)
        born = np.asarray(births, np.int64).reshape(len(chosen), self.births.shape[1])
        ones = np.ones_like(chosen)
        return Rows(
            np.concatenate([self.sign, KNOWLEDGE * ones, COMPENSATION * ones]),
            np.concatenate([self.unit, chosen, chosen]),
            np.concatenate([self.operation, operation * ones, operation * ones]),
            np.concatenate([self.births, born, born]),
            np.concatenate([self.retire, retire * ones, retire * ones]),
        )

    def forgetting(self, units: Sequence[int], operation: int, retire: int) -> tuple[Rows, NDArray[np.bool_]]:
        """These rows, all of those of some units there for a time only, and a mask of what the units knew.

        That is all but the compensation of an operation: what came before it, and what it made of that.

        Example:
            >>> rows = Rows.empty(1).extended([1], operation=1, births=[[0]]).extended([1], operation=2, births=[[5]])
            >>> rows.forgetting([1], operation=2, retire=9)[1].tolist()     # knowledge and compensation by turns
            [True, True, True, False]
        """
        of_units = np.isin(self.unit, np.asarray(units, np.int64))
        retires = np.where(of_units & (self.retire == 0), retire, self.retire)
        known = of_units & ((self.operation != operation) | (self.sign == KNOWLEDGE))
        return Rows(self.sign, self.unit, self.operation, self.births, retires), known

    def paired(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """A mask without rows whose partner, of the same unit and operation, is not in it."""
        kinds = np.stack([self.unit, self.operation], axis=1)
        pair = np.unique(kinds, axis=0, return_inverse=True)[1].reshape(-1)
        return np.asarray(mask & (np.bincount(pair, weights=mask) == np.bincount(pair))[pair])

    def of_operation(self, operation: int) -> NDArray[np.bool_]:
        """Mask of the rows that one operation added, shape (num_rows,)."""
        return np.asarray(self.operation == operation)

    def kept(self, mask: NDArray[np.bool_]) -> Rows:
        """The rows where the mask is true."""
        return Rows(self.sign[mask], self.unit[mask], self.operation[mask], self.births[mask], self.retire[mask])

    def of_units(self, first: int, stop: int) -> Rows:
        """The rows of units in a range, which is counted from its first."""
        kept = self.kept((self.unit >= first) & (self.unit < stop))
        return Rows(kept.sign, kept.unit - first, kept.operation, kept.births, kept.retire)

    @property
    def can_fade(self) -> bool:
        """Whether any row fades, or has faded."""
        return bool(self.retire.any())

    @property
    def can_go(self) -> NDArray[np.bool_]:
        """Mask of the rows that are there for a time only."""
        return np.asarray(self.retire > 0)

    def pairs(self, *, skip_first: bool = False) -> list[tuple[int, int]]:
        """Knowledge and compensation rows of one unit that may cancel: an active member before and after an operation.

        Then those of one operation, and a unit's first knowledge with its last compensation row. Units of which a row
        fades have none; `skip_first`: nor has a unit's first knowledge row.

        Example:
            >>> rows = Rows.empty(1).extended([1], operation=1, births=[[0]]).extended([1], operation=2, births=[[5]])
            >>> rows.pairs()                     # knowledge rows are 0 and 2, compensation rows 1 and 3
            [(2, 1), (0, 1), (2, 3), (0, 3)]
        """
        unit, place, row = _ranked(self, KNOWLEDGE)
        owner, _, others = _ranked(self, COMPENSATION)
        if not len(row) or not np.array_equal(unit, owner):  # no structure that operations leave: it is not for here
            return []
        fading = np.isin(unit, self.unit[self.retire > 0])
        is_first, is_last = place == 0, np.append(unit[1:] != unit[:-1], True)
        last = others[np.searchsorted(unit, unit, side="right") - 1]
        across = ~is_first
        groups = [
            (row[across & ~fading], others[:-1][across[1:] & ~fading[1:]]),
            (row[~fading & ~(is_first & skip_first)], others[~fading & ~(is_first & skip_first)]),
            (row[is_first & ~is_last & ~fading], last[is_first & ~is_last & ~fading]),
        ]
        return [(int(k), int(c)) for ks, cs in groups[: 2 if skip_first else 3] for k, c in zip(ks, cs, strict=True)]

    def without(self, dropped: NDArray[np.bool_]) -> Rows:
        """These rows but those where the mask is true, as many of both signs for each unit.

        What is left of a unit's operations are paired anew, oldest first, as the later of the two operations: as if
        the active member between them had never been.

        Example:
            >>> rows = Rows.empty(1).extended([1], operation=1, births=[[0]]).extended([1], operation=2, births=[[5]])
            >>> [(m.role, m.operation) for m in rows.without(np.array([False, True, True, False])).members()]
            [('knowledge', 2), ('compensation', 2)]
        """
        kept = self.kept(~dropped)
        knowledge, compensation = _ranked(kept, KNOWLEDGE)[2], _ranked(kept, COMPENSATION)[2]
        for values in (kept.operation, kept.births, kept.retire):
            values[knowledge] = values[compensation]
        return kept

    def fading_by(self, column: int) -> NDArray[np.bool_]:
        """Mask of the rows whose fade is counted by one parameter's owner: the first that counted at their birth."""
        counts = self.births != NOT_COUNTED
        is_first = counts[:, column] & ~counts[:, :column].any(axis=1)
        return np.asarray((self.retire > 0) & is_first)

    def steps(self, column: int) -> list[int | None]:
        """When each row was born, in the count of one parameter's owner; None: not counted."""
        births = self.births[:, column]
        counted = zip(as_steps(births).tolist(), (births != NOT_COUNTED).tolist(), strict=True)
        return [step if is_counted else None for step, is_counted in counted]

    def members(self) -> tuple[Member, ...]:
        """The rows one by one."""
        return tuple(
            Member(
                "knowledge" if sign > 0 else "compensation",
                int(unit),
                int(operation),
                tuple(map(int, births)),
                int(retire),
            )
            for sign, unit, operation, births, retire in zip(
                self.sign, self.unit, self.operation, self.births, self.retire, strict=True
            )
        )

    def latest(self) -> dict[int, int]:
        """Each operated unit and its latest operation."""
        return {int(u): int(self.operation[self.unit == u].max()) for u in np.unique(self.unit)}

    def reference(self, num_units: int) -> Integers:
        """For each unit the index, into [slots, rows], of what a coupling normalization measures, (num_units,).

        The slot itself, of an operated unit its first knowledge row, for good: so a new active member does not disturb
        its neighbors, and operating again changes no statistic.

        Example:
            >>> rows = Rows.empty(1).extended([1], operation=1, births=[[0]]).extended([1], operation=2, births=[[5]])
            >>> rows.reference(num_units=3).tolist()
            [0, 3, 2]
        """
        found = np.arange(num_units)
        unit, place, row = _ranked(self, KNOWLEDGE)
        found[unit[place == 0]] = num_units + row[place == 0]
        return found

    def references(self, num_units: int) -> Integers | None:
        """Where rows fade: what makes up each unit's reference, into [slots, rows], (num_terms, num_units); else None.

        Each unit's knowledge rows, oldest first, then its slot: what one of them gives up as it fades goes to the next,
        so that neither an operation nor the end of a fade moves what a coupling normalization measures.

        Example:
            >>> rows = Rows.empty(1).extended([1], operation=1, births=[[0]], retire=10)
            >>> rows.references(num_units=2).tolist()
            [[0, 2], [0, 1], [0, 1]]
        """
        if not self.can_fade:
            return None
        unit, place, row = _ranked(self, KNOWLEDGE)
        depth = capacity(1 + int(place.max()), smallest=2)
        found = np.tile(np.arange(num_units), (depth + 1, 1))
        found[place, unit] = num_units + row
        return found

    def fingerprint(self, num_units: int) -> NDArray[np.float32]:
        """Four numbers from 1 to 2 that tell how rows are summed into units: banks that sum differently differ in them.

        Example:
            >>> one = Rows.empty(1).extended([1], operation=1, births=[[0]])
            >>> other = Rows.empty(1).extended([1], operation=7, births=[[9]])  # later, but summed alike
            >>> bool((one.fingerprint(4) == other.fingerprint(4)).all())
            True
        """
        order = Layout.of(self, num_units).order
        told = (np.array([num_units, *order.shape]), order, self.unit)
        digest = sha256(b"".join(np.ascontiguousarray(each, "<i8").tobytes() for each in told)).digest()
        return (1 + np.frombuffer(digest[:16], "<u4") / 2**32).astype(np.float32)

    def encoded(self) -> Integers:
        """All of it as one int64 table (num_rows, 4 + num_parameters), for a checkpoint."""
        first = np.stack([self.sign, self.unit, self.operation], axis=1)
        return np.concatenate([first, self.births, self.retire[:, None]], axis=1)

    @staticmethod
    def decoded(table: Integers) -> Rows:
        """The inverse of `encoded`."""
        sign, unit, operation = (table[:, column].copy() for column in range(3))
        return Rows(sign, unit, operation, table[:, 3:-1].copy(), table[:, -1].copy())


def as_births(steps: Integers) -> Integers:
    """Steps of a count as the births of rows; those before its beginning are negative, and make room for "not counted".

    Example:
        >>> as_births(np.array([7, 0, -1, -5])).tolist()
        [7, 0, -2, -6]
    """
    return steps - (steps < 0)


def as_steps(births: Integers) -> Integers:
    """The inverse of `as_births`, of births that are counted.

    Example:
        >>> as_steps(np.array([7, 0, -2, -6])).tolist()
        [7, 0, -1, -5]
    """
    return births + (births < NOT_COUNTED)


def room_for(num_rows: int, num_units: int) -> int:
    """The capacity of a bank: at least a quarter of the layer's width, from there in powers of two.

    Example:
        >>> room_for(3, num_units=64), room_for(20, num_units=64)
        (16, 32)
    """
    return capacity(num_rows, smallest=capacity(num_units // 4))


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each term of each composite is found: indices into [the slots' activations, the rows' activations].

    `order` (1 + 2 * depth, num_columns), int64: a column's oldest knowledge row, then the positive and then the
    negative terms of its pairs, oldest first. Padding names the unit's own slot in both terms of a pair: an exact
    zero, in the value and in the gradient. `source` (num_units,): for each unit its index in [slots, columns]; None
    for a narrow layer, which has a column for every unit, in order, from the first operation on. Which of the two it
    is depends on the layer alone: code that was compiled for one bank lasts as the bank grows.

    Example:
        >>> rows = Rows.empty(1).extended([1], operation=1, births=[[0]])
        >>> layout = Layout.of(rows, num_units=4)     # slots 0 to 3, knowledge row 4, compensation row 5
        >>> layout.order[:, 1].tolist()           # one pair, and one of padding
        [4, 1, 1, 5, 1]
        >>> layout.order[:, 2].tolist()           # not operated on: its slot
        [2, 2, 2, 2, 2]
        >>> Layout.of(rows, num_units=100).source[:4].tolist()    # a column for the one unit, behind all slots
        [0, 100, 2, 3]
    """

    order: Integers
    source: Integers | None

    @staticmethod
    def of(rows: Rows, num_units: int) -> Layout:
        """The layout for these rows, padded to its capacity so that later operations seldom change a shape."""
        operated, times = np.unique(rows.unit[rows.sign == KNOWLEDGE], return_counts=True)
        is_full = num_units <= NARROW
        width = num_units if is_full else _room_for_columns(len(operated), num_units)
        units = np.arange(num_units) if is_full else operated
        columns = np.concatenate([units, np.full(width - len(units), operated[0])])  # spare columns are never read
        depth = capacity(int(times.max()), smallest=2)
        order = np.tile(columns, (1 + 2 * depth, 1))
        own = operated if is_full else np.arange(len(operated))
        unit, place, row = _ranked(rows, KNOWLEDGE)
        order[place, own[np.searchsorted(operated, unit)]] = num_units + row
        unit, place, row = _ranked(rows, COMPENSATION)
        order[1 + depth + place, own[np.searchsorted(operated, unit)]] = num_units + row
        if is_full:
            return Layout(order, None)
        source = np.arange(num_units)
        source[operated] = num_units + np.arange(len(operated))
        return Layout(order, source)


NARROW = 64
"""Up to so many units a column for each costs no more than telling apart which have one."""


def _room_for_columns(num_operated: int, num_units: int) -> int:
    return min(num_units, capacity(num_operated, smallest=capacity(num_units // 4), growth=4))


def _ranked(rows: Rows, sign: int) -> tuple[Integers, Integers, Integers]:
    """The rows of one role by unit and age: their units, their place within the unit from 0, their row numbers."""
    row = np.flatnonzero(rows.sign == sign)
    row = row[np.lexsort((row, rows.operation[row], rows.unit[row]))]
    unit = rows.unit[row]
    first = np.searchsorted(unit, unit)
    return unit, np.arange(len(unit)) - first, row


def capacity(count: int, smallest: int = 8, growth: int = 2) -> int:
    """Room for `count` things: grows geometrically, so that shapes change seldom and compiled code lasts.

    Example:
        >>> capacity(3), capacity(9), capacity(16), capacity(9, growth=4)
        (8, 16, 16, 32)
    """
    room = smallest
    while room < count:
        room *= growth
    return room
