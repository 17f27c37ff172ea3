"""Hanging a bank at its place, bringing one that hangs there up to another, and taking it down.

What an operation, an undo, a mirror and a restored state have in common: the bank is a child of every module that owns
the weight, and the modules that its rows pass are marked, so that an exchange of one of them is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from neuronsurgery.pytorch.composites import PASSED_BY, Composite, shard_rows
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.sharding import is_alike, is_sharded, is_spread, whole
from neuronsurgery.pytorch.transaction import Change, Overwrite, RemoveItem, SetItem

__all__ = ["hang", "hang_as_sharded", "take_down"]


def hang(place: Place, bank: Composite) -> Iterator[Change]:
    """Hang a bank at its place, or bring the one that is there up to it: in place wherever the capacity suffices."""
    old = place.bank
    shard_rows(place.weight, bank, place.is_split)
    if old is None:
        for owner, name in place.owners:
            yield SetItem(owner._modules, name, bank)
        yield from (_Mark(module, bank.site, True) for module in place.passed_modules)
        return
    pairs: tuple[tuple[dict[str, Tensor | None], dict[str, Tensor | None]], ...] = (
        (bank._buffers, old._buffers),
        (bank.fixed_tables, old.fixed_tables),
        (bank.growing_tables, old.growing_tables),
    )
    for values, held in pairs:
        for name, value in values.items():
            current = held[name]
            if current is not None and value is not None and is_alike(current, value):
                yield Overwrite(current, value)
            else:
                yield SetItem(held, name, value)
    yield SetItem(vars(old), "rows", bank.rows)
    if old.split != bank.split:
        yield SetItem(vars(old), "split", bank.split)


def hang_as_sharded(place: Place) -> Iterator[Change]:
    """Hang a bank anew that was made before its layer was sharded: its rows are to be held as the layer's are."""
    bank = place.bank
    if bank is None or not is_sharded(place.weight) or is_spread(bank.frozen_weight):
        return
    values = [bank.live(name) for name in bank.buffer_names()]
    fade = whole(bank.live_fade())
    again = Composite(place.product, place.path, place.site.num_units, bank.rows, values, place.recipe, fade)
    again.site = bank.site
    yield from hang(place, again)


def take_down(place: Place) -> Iterator[Change]:
    """Take the bank of a place away, and the marks of the modules that its rows pass."""
    bank = place.bank
    assert bank is not None
    for owner, name in place.owners:
        yield RemoveItem(owner._modules, name)
    yield from (_Mark(module, bank.site, False) for module in place.passed_modules)


class _Mark:
    """Note at a module on the path that a site's bank passes it, or no longer does; several sites may share it.

    What is there already is read as the change is made: an earlier one of the same operation may have left a mark.
    """

    def __init__(self, module: nn.Module, site: str, is_passed: bool) -> None:
        self.attributes, self.site, self.is_passed = vars(module), site, is_passed
        self.change: SetItem | RemoveItem | None = None

    def apply(self) -> None:
        before = self.attributes.get(PASSED_BY, frozenset())
        after = before | {self.site} if self.is_passed else before - {self.site}
        if after != before:
            change = SetItem(self.attributes, PASSED_BY, after) if after else RemoveItem(self.attributes, PASSED_BY)
            self.change = change
            change.apply()

    def revert(self) -> None:
        if self.change is not None:
            self.change.revert()
