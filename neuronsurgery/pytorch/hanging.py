"""Hanging a bank at its place, bringing one that hangs there up to another, and taking it down.

What an operation, an undo, a mirror and a restored state have in common: the bank is a child of every module that owns
the weight, and the modules that its rows pass are marked, so that an exchange of one of them is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator

from neuronsurgery.pytorch.composites import PASSED_BY, Composite
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.transaction import Change, Overwrite, RemoveItem, SetItem

__all__ = ["hang", "take_down"]


def hang(place: Place, bank: Composite) -> Iterator[Change]:
    """Hang a bank at its place, or bring the one that is there up to it: in place wherever the capacity suffices."""
    old = place.bank
    if old is None:
        for owner, name in place.owners:
            yield SetItem(owner._modules, name, bank)
        for module in place.passed_modules:
            sites = module.__dict__.get(PASSED_BY, frozenset())
            yield SetItem(vars(module), PASSED_BY, sites | {bank.site})
        return
    tables = bank.tables(bank.rows)
    for values, held in ((bank._buffers, old._buffers), (tables, vars(old))):
        for name, value in values.items():
            current = held[name]
            if current is not None and value is not None and current.shape == value.shape:
                yield Overwrite(current, value)
            else:
                yield SetItem(held, name, value)
    yield SetItem(vars(old), "rows", bank.rows)


def take_down(place: Place) -> Iterator[Change]:
    """Take the bank of a place away, and the marks of the modules that its rows pass."""
    bank = place.bank
    assert bank is not None
    for owner, name in place.owners:
        yield RemoveItem(owner._modules, name)
    for module in place.passed_modules:
        left = module.__dict__.get(PASSED_BY, frozenset()) - {bank.site}
        yield SetItem(vars(module), PASSED_BY, left) if left else RemoveItem(vars(module), PASSED_BY)
