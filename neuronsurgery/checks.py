"""Checks: what stands in the way of an operated model, found by looking at it and its optimizers.

Most of what goes wrong around an operation is silent: an optimizer that never heard of a parameter, frozen rows that
something moves, a bank that has no effect any longer, hooks that a copy or a resume has lost. Each is a problem here,
with the place, what was found there and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from neuronsurgery.errors import CheckError
from neuronsurgery.tables import counted, render
from neuronsurgery.values import Value

__all__ = ["About", "Check", "Problem"]

About = Literal[
    "optimizer", "step hooks", "ages", "frozen rows", "bank", "active members", "not finite", "mirror", "replica"
]
"""What a problem concerns."""


@dataclass(frozen=True)
class Problem(Value):
    """One thing that is not as it should be.

    >>> print(Problem("bank", "fc1", "its bank has no effect", "put the layer back"))
    fc1: its bank has no effect. What to do: put the layer back
    """

    about: About
    """What it concerns."""
    where: str
    """The site, parameters or module, by name."""
    found: str
    """What was found there."""
    remedy: str
    """What to do about it."""

    def __str__(self) -> str:
        return f"{self.where}: {self.found}. What to do: {self.remedy}"


@dataclass(frozen=True)
class Check(Value):
    """What was found of a model; true if there is no problem.

    >>> check = Check((Problem("optimizer", "fc1.weight", "no optimizer owns it", "add it to a group"),), ())
    >>> print(check)
    Check: 1 problem
    | about     | where      |
    |-----------|------------|
    | optimizer | fc1.weight |
    fc1.weight: no optimizer owns it. What to do: add it to a group
    >>> bool(check), check.ok, bool(Check((), ("2 composite units",)))
    (False, False, True)
    >>> Check.from_json(check.to_json()) == check
    True
    """

    problems: tuple[Problem, ...]
    """What is not as it should be."""
    notes: tuple[str, ...]
    """What is worth knowing and no problem."""

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.ok

    def about(self, about: About) -> tuple[Problem, ...]:
        """The problems that concern one thing."""
        return tuple(problem for problem in self.problems if problem.about == about)

    def require(self) -> Check:
        """Returns the check itself; raises `CheckError` with all problems if there are any."""
        if not self.ok:
            raise CheckError("\n".join([counted(len(self.problems), "problem"), *map(str, self.problems)]))
        return self

    def __str__(self) -> str:
        rows = [(problem.about, problem.where) for problem in self.problems]
        title = f"Check: {counted(len(rows), 'problem')}" if rows else "Check: no problem"
        return render(title, ("about", "where"), rows, [*map(str, self.problems), *self.notes])


def merged(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """The same with one problem for all places where the same was found.

    >>> both = merged([Problem("ages", "fc1", "no age", "attach"), Problem("ages", "fc2", "no age", "attach")])
    >>> [each.where for each in both]
    ['fc1; fc2']
    """
    places: dict[tuple[About, str, str], list[str]] = {}
    for each in problems:
        places.setdefault((each.about, each.found, each.remedy), []).append(each.where)
    return tuple(
        Problem(about, "; ".join(dict.fromkeys(where)), found, remedy)
        for (about, found, remedy), where in places.items()
    )


def of_mirror(label: str, check: Check) -> tuple[Problem, ...]:
    """The problems of a mirror's own, under its label."""
    return tuple(Problem(each.about, f"{label}: {each.where}", each.found, each.remedy) for each in check.problems)


def moved_note(name: str, num_still: int, num_active: int, num_silent: int | None) -> str:
    """What to say of active members that have not moved.

    >>> moved_note("fc1", 2, 5, 1)
    'fc1: 2 of 5 active members have not moved since their operation; 1 of them received no gradient just now'
    """
    note = f"{name}: {num_still} of {num_active} active members have not moved since their operation"
    return note if num_silent is None else f"{note}; {num_silent} of them received no gradient just now"
