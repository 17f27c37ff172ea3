"""The optimizer's side of whole parameters: their state is dropped where the optimizer makes it anew by itself.

What belongs to a single row cannot be dropped, as `optimizers` explains; a whole parameter can forget all, its count of
steps included, and is then updated as in a new optimizer, to the last bit and in classes that couple rows as well.
Whether a class makes a missing state anew is not assumed but tried on scratch parameters. Where it does not, as it
keeps counts for all its parameters together, all rows are made fresh one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.composites import NOT_COUNTED, Rows, as_births, as_steps
from neuronsurgery.errors import OptimizerError
from neuronsurgery.pytorch import optimizers as optimizer_state
from neuronsurgery.pytorch.corrections import CORRECTIONS
from neuronsurgery.pytorch.families import family_of
from neuronsurgery.pytorch.fresh_state import Group, own_step, scratch_optimizer
from neuronsurgery.pytorch.models import random_states_kept
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.transaction import Change, Later, RemoveItem, SetItem
from neuronsurgery.pytorch.unit_axes import ROWS
from neuronsurgery.pytorch.wrappers import COPIES, inner_of, refresh_wrapper

__all__ = ["born_with_parameters", "copies_of", "forget"]


def forget(optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]) -> list[Change]:
    """Plan the changes after which parameters have the state of fresh ones, in all their optimizers.

    To be run after those that write the parameters: copies of the weights follow them. Raises `OptimizerError` for
    state that cannot be made fresh, before anything changes.
    """
    changes: list[Change] = []
    asked = set(parameters)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            owned = [one for one in group["params"] if one in asked]
            if inner_of(optimizer) is not None:
                for one in owned:
                    changes += refresh_wrapper(optimizer, one, _all_rows(one), ROWS)
            elif owned:
                changes += _forgotten(optimizer, group, owned)
    return changes


def _forgotten(optimizer: Optimizer, group: Group, parameters: Sequence[nn.Parameter]) -> Iterator[Change]:
    known = [one for one in parameters if optimizer.state.get(one)]
    if not known:
        return
    counts = _counts_of(optimizer)
    is_whole = len(parameters) == len(group["params"])
    has_copies = any(COPIES & set(optimizer.state[one]) for one in known)
    if has_copies or (counts and not is_whole) or not _starts_anew(optimizer, group, counts, is_whole):
        for one in known:
            yield from _all_rows_fresh(optimizer, one)
        return
    for one in known:
        if optimizer in CORRECTIONS and one in CORRECTIONS[optimizer].young:
            yield RemoveItem(CORRECTIONS[optimizer].young, one)
        state = _new(optimizer, group, counts, one.detach()).state
        first = next(iter(state.values()), None)
        yield SetItem(optimizer.state, one, first) if first else RemoveItem(optimizer.state, one)
    for key, value in _counts_at_first(optimizer, group, counts).items():
        yield RemoveItem(group, key) if value is None else SetItem(group, key, value)


def _counts_of(optimizer: Optimizer) -> frozenset[str]:
    """The names of what is counted in a group, for all of its parameters together."""
    family = family_of(optimizer)
    shared = None if family is None else family.shared
    return frozenset() if shared is None else frozenset(shared.group)


def _counts_at_first(optimizer: Optimizer, group: Group, counts: Collection[str]) -> dict[str, Any]:
    """The counts that a group has, as they were before the first step; None: not there."""
    first = _new(optimizer, group, counts, torch.zeros(1, 1)).param_groups[0]
    return {key: first.get(key) for key in counts if key in group}


def _new(optimizer: Optimizer, group: Group, counts: Collection[str], *weights: Tensor) -> Optimizer:
    """An optimizer of the same class and settings that has not stepped, on copies of the weights."""
    settings = {key: value for key, value in group.items() if key not in counts}
    return scratch_optimizer(optimizer, settings, *(nn.Parameter(each.clone()) for each in weights))


def _all_rows_fresh(optimizer: Optimizer, parameter: nn.Parameter) -> Iterator[Change]:
    """Make all rows fresh, and young where the optimizer counts for other parameters as well."""
    rows = _all_rows(parameter)
    yield from optimizer_state.refresh([optimizer], parameter, rows)
    step = optimizer_state.current_step([optimizer], parameter)
    if step is not None:
        yield from optimizer_state.births([optimizer], parameter, rows, [step] * len(rows))


def _all_rows(parameter: Tensor) -> Tensor:
    if parameter.dim() == 0:
        raise OptimizerError(
            "a parameter without axes was to be made fresh under an optimizer that keeps state for all of its "
            "parameters together, or beside another's, which is read and written row by row; leave that layer out"
        )
    return torch.arange(len(parameter), device=parameter.device)


# -- a trial ---------------------------------------------------------------------------------------------------------


def _starts_anew(optimizer: Optimizer, group: Group, counts: frozenset[str], is_whole: bool) -> bool:
    """Whether what has lost its state is updated as in a new optimizer, and all else as before, numbers included.

    `is_whole`: all parameters of a group lose it, and the group its counts; else one of two does.
    """
    try:
        with random_states_kept([]), torch.enable_grad():
            generator = torch.Generator().manual_seed(0)
            weights = torch.randn(2, 3, 2, generator=generator)
            gradients = torch.randn(6, 2, 3, 2, generator=generator) + 0.5
            trial = functools.partial(_Trial, optimizer, group, counts, weights)
            kept, fresh, dropped = trial(), trial(), trial()
            kept.step(gradients)
            fresh.step(gradients[3:])
            dropped.step(gradients[:3])
            dropped.drop([0, 1] if is_whole else [1])
            dropped.step(gradients[3:])
    except Exception:
        return False
    others, numbers = (fresh, fresh) if is_whole else (kept, kept)
    is_apart = torch.equal(dropped.weights(0), others.weights(0)) and dropped.numbers() == numbers.numbers()
    return is_apart and torch.equal(dropped.weights(1), fresh.weights(1))


class _Trial:
    """Two scratch parameters under an optimizer of a class and its settings, with its own kernels."""

    def __init__(self, optimizer: Optimizer, group: Group, counts: frozenset[str], weights: Tensor) -> None:
        self.begin = functools.partial(_new, optimizer, group, counts)
        self.cls, self.counts, self.first = type(optimizer), counts, weights
        self.optimizer = self.begin(*weights)
        settings = self.optimizer.param_groups[0]
        settings["lr"] = torch.as_tensor(0.1) if isinstance(group.get("lr"), Tensor) else 0.1
        settings |= {key: group[key] for key in ("foreach", "fused") if key in group}

    def step(self, gradients: Tensor) -> None:
        for given in gradients:
            for parameter, own in zip(self.optimizer.param_groups[0]["params"], given, strict=True):
                parameter.grad = own.clone()
            own_step(self.cls)(self.optimizer)

    def drop(self, places: Sequence[int]) -> None:
        """Overwrite parameters, and leave the optimizer without what it knew of them."""
        group = self.optimizer.param_groups[0]
        first = self.begin(*self.first)
        for place in places:
            parameter, beginner = group["params"][place], first.param_groups[0]["params"][place]
            parameter.data.copy_(self.first[place])
            self.optimizer.state.pop(parameter, None)
            if first.state.get(beginner):
                self.optimizer.state[parameter] = first.state[beginner]
        if len(places) == len(group["params"]):
            for key in self.counts & set(group):
                if key in first.param_groups[0]:
                    group[key] = first.param_groups[0][key]
                else:
                    del group[key]

    def weights(self, place: int) -> Tensor:
        found: Tensor = self.optimizer.param_groups[0]["params"][place].detach()
        return found

    def numbers(self) -> dict[str, float]:
        """What the group holds beside settings that are no numbers."""
        group = self.optimizer.param_groups[0].items()
        return {key: float(one) for key, one in group if isinstance(one, (int, float, Tensor)) and key != "params"}


# -- banks, and copies of the weights --------------------------------------------------------------------------------


def born_with_parameters(place: Place, optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]) -> Later:
    """Note in the bank of a place that its rows are born now, as all others of these parameters.

    Rows that are fading go on where they are, in an optimizer that counts anew too: they keep their age.
    """
    renewed = enumerate(None if slots is None else slots.parameter for slots in place.renewed)
    reset = {
        column: (parameter, optimizer_state.current_step(optimizers, parameter))
        for column, parameter in renewed
        if parameter is not None and any(parameter is one for one in parameters)
    }

    def changes() -> Iterator[Change]:
        bank = place.bank
        assert bank is not None
        births = np.array(bank.rows.births)
        for column, (parameter, before) in reset.items():
            now = optimizer_state.current_step(optimizers, parameter)
            if now is not None and before is not None:
                births[:, column] = _born_anew(bank.rows, column, now, before)
        yield SetItem(vars(bank), "rows", replace(bank.rows, births=births))

    return Later(changes)


def _born_anew(rows: Rows, column: int, now: int, before: int) -> NDArray[np.int64]:
    """The births of one parameter's rows, (num_rows,), after its count was set from `before` to `now`."""
    births = rows.births[:, column]
    keeps_age = rows.fading_by(column) & (births <= before)
    known = np.where(keeps_age, as_births(as_steps(births) + now - before), now)
    return np.where(births == NOT_COUNTED, births, known)


def copies_of(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> list[Tensor]:
    """The copies of a parameter's weights that its optimizers keep: slow weights, and the sequences of averages."""
    entries = (optimizer.state.get(parameter, {}).items() for optimizer in optimizers)
    return [
        entry
        for items in entries
        for key, entry in items
        if key in _COPIES and isinstance(entry, Tensor) and entry.shape == parameter.shape
    ]


_COPIES = COPIES | {"z"}
"""`z`: the iterates of schedule-free optimizers, of which the weights are averages."""
