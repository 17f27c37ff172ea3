"""The optimizer's side of whole parameters: their state is dropped where the optimizer makes it anew by itself.

What belongs to a single row cannot be dropped, as `optimizers` explains; a whole parameter can forget all, its count of
steps included, and is then updated as in a new optimizer, to the last bit and in classes that couple rows as well.
Whether a class makes a missing state anew is not assumed but tried on scratch parameters. Where it does not, as it
keeps counts for all its parameters together, all rows are made fresh one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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
    numbers = _numbers_at_the_start(optimizer, group)
    if numbers and len(parameters) == len(group["params"]):
        yield from (SetItem(group, key, value) for key, value in numbers.items())
    elif numbers or not _starts_anew(optimizer, group) or any(COPIES & set(optimizer.state[one]) for one in known):
        for one in known:
            yield from _all_rows_fresh(optimizer, one)
        return
    for one in known:
        if optimizer in CORRECTIONS and one in CORRECTIONS[optimizer].young:
            yield RemoveItem(CORRECTIONS[optimizer].young, one)
        state = scratch_optimizer(optimizer, group, nn.Parameter(one.detach().clone())).state
        first = next(iter(state.values()), None)
        yield SetItem(optimizer.state, one, first) if first else RemoveItem(optimizer.state, one)


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


def _numbers_at_the_start(optimizer: Optimizer, group: Group) -> dict[str, float]:
    """What the group counts for all its parameters together, as it was before the first step."""
    family = family_of(optimizer)
    shared = None if family is None else family.shared
    return {} if shared is None else {key: type(group[key])(at(0, group)) for key, at in shared.group.items()}


# -- a trial ---------------------------------------------------------------------------------------------------------


def _starts_anew(optimizer: Optimizer, group: Group) -> bool:
    """Whether a parameter whose state is dropped is updated as in a new optimizer, its neighbors as before."""
    try:
        with random_states_kept([]), torch.enable_grad():
            torch.manual_seed(0)
            weights, gradients = torch.randn(2, 3, 2), torch.randn(6, 2, 3, 2) + 0.5
            kept, _ = _steps(optimizer, group, weights, gradients, is_dropped=False)
            others, dropped = _steps(optimizer, group, weights, gradients, is_dropped=True)
            _, fresh = _steps(optimizer, group, weights, gradients[3:], is_dropped=False)
    except Exception:
        return False
    return torch.equal(kept, others) and torch.equal(dropped, fresh)


def _steps(
    optimizer: Optimizer, group: Group, weights: Tensor, gradients: Tensor, *, is_dropped: bool
) -> tuple[Tensor, Tensor]:
    """Step on two scratch parameters; before the last three steps the second is overwritten, and its state dropped."""
    one, other = nn.Parameter(weights[0].clone()), nn.Parameter(weights[1].clone())
    scratch = scratch_optimizer(optimizer, group, one, other)
    scratch.param_groups[0]["lr"] = torch.as_tensor(0.1) if isinstance(group.get("lr"), Tensor) else 0.1
    for place, (given, given_other) in enumerate(gradients):
        if is_dropped and place == len(gradients) - 3:
            other.data.copy_(weights[1])
            _drop(scratch, other, group)
        one.grad, other.grad = given.clone(), given_other.clone()
        own_step(type(optimizer))(scratch)
    return one.detach(), other.detach()


def _drop(optimizer: Optimizer, parameter: nn.Parameter, group: Group) -> None:
    state = scratch_optimizer(optimizer, group, nn.Parameter(parameter.detach().clone())).state
    first = next(iter(state.values()), None)
    if first:
        optimizer.state[parameter] = first
    else:
        optimizer.state.pop(parameter, None)


# -- banks, and copies of the weights --------------------------------------------------------------------------------


def born_with_parameters(place: Place, optimizers: Sequence[Optimizer], parameters: Sequence[nn.Parameter]) -> Later:
    """Note in the bank of a place that its rows are born now, as all others of these parameters."""

    def changes() -> Iterator[Change]:
        bank = place.bank
        assert bank is not None
        births = np.array(bank.rows.births)
        for column, slots in enumerate(place.renewed):
            parameter = None if slots is None else slots.parameter
            if parameter is None or not any(parameter is one for one in parameters):
                continue
            now = optimizer_state.current_step(optimizers, parameter)
            if now is not None:
                births[:, column] = np.where(births[:, column] < 0, births[:, column], now)
        yield SetItem(vars(bank), "rows", replace(bank.rows, births=births))

    return Later(changes)


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
