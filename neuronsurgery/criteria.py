"""The criteria: the rules that choose the units to operate on, under one roof.

`Stagnant`, `Dormant`, `GraMa` and `Lowest` measure; `Random` is the control, `Units` a choice by hand and
`Custom` a function. They combine with `&`, `|` and `~`.

>>> print(Stagnant() & ~Units({"fc1": [0]}))
Stagnant(threshold=0.25, average='scores') & ~Units(units={'fc1': (0,)})
"""

from __future__ import annotations

from functools import partial

from neuronsurgery.choosing import Custom, Random, Units, name_of
from neuronsurgery.combining import And, Criterion, Not, Or
from neuronsurgery.errors import CriterionError
from neuronsurgery.measuring import NAMED, Dormant, GraMa, Lowest, Stagnant, by_name

__all__ = [
    "as_criterion",
    "Criterion",
    "Stagnant",
    "Dormant",
    "GraMa",
    "Lowest",
    "Random",
    "Units",
    "Custom",
    "And",
    "Or",
    "Not",
]

LOSS_NAMES = ("loss", "entropy", "kl_div")


def as_criterion(criterion: object) -> Criterion:
    """Returns the criterion that a criterion, a lower-case name or a function of the scores stands for.

    Raises `CriterionError` for anything else; for an unknown name with the nearest ones, for a loss with the
    place where losses go.

    >>> as_criterion("stagnant")
    Stagnant(threshold=0.25, average='scores')
    >>> as_criterion("dorment")
    Traceback (most recent call last):
    neuronsurgery.errors.CriterionError: no criterion is named 'dorment': did you mean 'dormant'?
    """
    if isinstance(criterion, Criterion):
        return criterion
    if isinstance(criterion, str):
        return by_name(criterion)
    if _is_loss(criterion):
        raise CriterionError(
            f"a loss is no criterion (found {name_of(criterion)}): a criterion chooses units; losses go to "
            "probe(model, batches, loss_fn). evidence = surgery.probe(model, batches, loss_fn); "
            "surgery.knife(model, 'stagnant', evidence=evidence). If it does choose units, pass Custom(...)"
        )
    if isinstance(criterion, type) or not callable(criterion):
        call = f": call it, {criterion.__name__}(...)" if isinstance(criterion, type) else ""
        raise CriterionError(
            f"a criterion is an object such as Stagnant(), a name ({', '.join(map(repr, NAMED))}) or a "
            f"function of the scores; found {name_of(criterion)}{call}"
        )
    return Custom(criterion)


def _is_loss(thing: object) -> bool:
    # By name, because the core imports no framework. A module is as good as a loss: it chooses no units.
    if isinstance(thing, partial):
        return _is_loss(thing.func)
    classes = (thing if isinstance(thing, type) else type(thing)).__mro__
    if any("Loss" in one.__name__ or one.__name__ == "Module" for one in classes):
        return True
    return callable(thing) and any(word in name_of(thing).lower() for word in LOSS_NAMES)
