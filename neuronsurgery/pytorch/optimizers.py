"""The optimizer's side of an operation: overwritten rows are updated as a fresh parameter's rows would be.

An optimizer remembers every element of a parameter (its **state**: momentum, moments) and, once per
parameter, how many steps it took (`step`). Rows that surgery overwrites must forget the former; the latter
belongs to all rows and is never touched. Three things are done:

- `refresh` gives the rows the state of a fresh parameter (`fresh_state`);
- `births` notes the step at which rows were overwritten, so that step hooks can correct what would go by the step of
  the whole parameter (`corrections`);
- `start_clocks` counts the steps of optimizers that do not (`step_hooks`), so that operated units have an age.

Everything else (parameter groups, state keys, the tensors themselves, all other elements) stays as it is.
The hooks live on the optimizer, and neither a copy nor a pickle of it has them: `births` and `start_clocks` install
them again. Where they have yet to be installed, an operation inside a hook of the step is refused (`step_hooks`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.errors import OptimizerError
from neuronsurgery.pytorch.corrections import CORRECTIONS, Family, register
from neuronsurgery.pytorch.families import family_of, is_known, trial_of
from neuronsurgery.pytorch.fresh_state import (
    Group,
    Refresh,
    fresh_rows,
    is_shared,
    refresh_coupled,
    refuse_coupled,
)
from neuronsurgery.pytorch.step_hooks import CLOCKS, Clock, install
from neuronsurgery.pytorch.transaction import Change
from neuronsurgery.pytorch.unit_axes import ROWS, UnitAxes
from neuronsurgery.pytorch.wrappers import inner_of, refresh_wrapper, unwrapped

__all__ = [
    "age_clock",
    "as_optimizers",
    "birth_step",
    "births",
    "check_owners",
    "counting_owners",
    "current_step",
    "lacks_corrections",
    "notes",
    "refresh",
    "resume",
    "start_clocks",
    "unowned",
    "young_rows",
]


def as_optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """Return what was passed as `optimizer=` as a tuple, each optimizer once.

    Of one that holds another (Lookahead, SAM, a training framework's) the inner one, and the wrapper behind it where it
    has a state of its own. Raises `OptimizerError` for anything but an optimizer, a sequence of optimizers, or None.

    >>> as_optimizers(None)
    ()
    """
    if optimizer is None:
        return ()
    found = optimizer if isinstance(optimizer, Sequence) and not isinstance(optimizer, str) else (optimizer,)
    for one in found:
        if not isinstance(one, Optimizer):
            raise OptimizerError(
                "optimizer= takes a torch.optim.Optimizer, a sequence of them, or None; "
                f"found {type(one).__name__}. Pass the optimizer itself: of a scheduler, "
                "scheduler.optimizer; of a wrapper, what it wraps."
            )
    return tuple(dict.fromkeys(inner for one in found for inner in unwrapped(one)))


def check_owners(optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise `OptimizerError` for an optimizer that owns none of the model's parameters (given by name)."""
    for optimizer in optimizers:
        if any(_group(optimizer, parameter) is not None for parameter in parameters.values()):
            continue
        name = type(optimizer).__name__
        num_owned = sum(len(group["params"]) for group in optimizer.param_groups)
        raise OptimizerError(
            f"{name} owns none of the model's {len(parameters)} parameters: it has {num_owned}, all of "
            "another model. Was it built before the model was moved to a device, copied or re-created? Build "
            f"it from this model, optimizer = {name}(model.parameters(), ...), and pass that one."
        )


def unowned(optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]) -> tuple[str, ...]:
    """Return the names of the parameters that no optimizer owns, in order."""
    return tuple(name for name, parameter in parameters.items() if not any(_owners(optimizers, parameter)))


def current_step(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> int | None:
    """Return how many steps the owner has taken for the parameter, 0 before its first.

    None when no optimizer owns the parameter, and when its owner does not count steps, as SGD does not. Of
    several owners the first that counts. This is what bias corrections go by; for ages see `age_clock`.
    """
    steps = (_step(optimizer, parameter) for optimizer, _ in _owners(optimizers, parameter))
    return next((step for step in steps if step is not None), None)


def age_clock(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> int | None:
    """Return what the ages of a parameter's rows are counted by, in steps: its owner's count, else that of a clock.

    None when nothing counts: no optimizer owns the parameter, or its owner's clock has not been started. A clock
    starts at 0 with the first operation and is not saved: after a resume it starts anew with the next one, so the
    births of earlier operations may lie ahead of it. Units born ahead of the clock have no known age. (Once it has
    caught up with such a birth the unit is taken for young again, and passed over for one more cooldown.)

    >>> import torch
    >>> layer = nn.Linear(2, 3)
    >>> sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> age_clock([sgd], layer.weight) is None
    True
    >>> for change in start_clocks([sgd], layer.weight):
    ...     change.apply()
    >>> sgd.step()
    >>> age_clock([sgd], layer.weight)
    1
    """
    owners = [optimizer for optimizer, _ in _owners(optimizers, parameter)]
    counting = next((optimizer for optimizer in owners if _counts(optimizer, parameter)), None)
    if counting is not None:
        return _step(counting, parameter)
    # Of several clocks the one ahead, so that starting another one later takes nothing back.
    return max((CLOCKS[optimizer].num_steps for optimizer in owners if optimizer in CLOCKS), default=None)


def counting_owners(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> list[Optimizer]:
    """Return the owners by whose count `age_clock` goes: the first that counts, else all that a clock counts for."""
    owners = [optimizer for optimizer, _ in _owners(optimizers, parameter)]
    counting = next((optimizer for optimizer in owners if _counts(optimizer, parameter)), None)
    return owners if counting is None else [counting]


def birth_step(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> int | None:
    """Return the birth of rows that are overwritten now: what `age_clock` says, 0 where `start_clocks` starts one.

    None when no optimizer owns the parameter.
    """
    now = age_clock(optimizers, parameter)
    return 0 if now is None and any(_owners(optimizers, parameter)) else now


def start_clocks(optimizers: Sequence[Optimizer], parameter: nn.Parameter, at: int = 0) -> list[Change]:
    """Plan the changes that let the steps of a parameter's optimizers be counted from `at`, where nothing counts yet.

    Raises `OptimizerError` between the hooks of a step, where torch lets none be added, before anything changes.
    """
    if age_clock(optimizers, parameter) is not None:
        return []
    clock = functools.partial(Clock, at)
    return [change for optimizer, _ in _owners(optimizers, parameter) for change in install(optimizer, CLOCKS, clock)]


def resume(
    optimizers: Sequence[Optimizer], parameter: nn.Parameter, rows: Tensor, births: Sequence[int], axes: UnitAxes = ROWS
) -> list[Change]:
    """Plan the changes that register rows as they would be, had the process that operated on them not ended.

    `births`: r values of `birth_step` at surgery, of which the clocks have to be started before.
    """
    changes = register_births(optimizers, parameter, rows, births, axes)
    now = age_clock(optimizers, parameter)
    newest = torch.tensor([born == now for born in births], dtype=torch.bool, device=rows.device)
    for optimizer, group in _owners(optimizers, parameter):
        family = family_of(optimizer)
        if family is not None and family.first_step and group.get("dampening") and optimizer.state.get(parameter):
            due = rows[newest]
            changes += register(optimizer, family, parameter, due, [1] * due.numel(), axes) if due.numel() else []
    return changes


def refresh(
    optimizers: Sequence[Optimizer], parameter: nn.Parameter, rows: Tensor, axes: UnitAxes = ROWS
) -> list[Change]:
    """Plan the changes that give rows of a parameter the state of a fresh parameter, in all its optimizers.

    `rows`: (r,) int64, units of the parameter under `axes`. The changes are to be run after those that write the rows
    themselves: some optimizers' state is a copy of the weights. A parameter without state needs no change.
    Raises `OptimizerError` for state that cannot be learned, or that couples rows, before anything changes.

    >>> import torch
    >>> layer = nn.Linear(2, 3)
    >>> adam = torch.optim.Adam(layer.parameters())
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> adam.step()
    >>> for change in refresh([adam], layer.weight, torch.tensor([1])):
    ...     change.apply()
    >>> (adam.state[layer.weight]["exp_avg"] == 0).all(dim=1).tolist()
    [False, True, False]
    """
    changes: list[Change] = []
    for wrapper in optimizers:
        inner = inner_of(wrapper)
        if inner is not None and wrapper.state is not inner.state and rows.numel():
            changes += refresh_wrapper(wrapper, parameter, rows, axes)
    for optimizer, group in _owners(optimizers, parameter):
        if not optimizer.state.get(parameter) or not rows.numel():
            continue
        family = family_of(optimizer)
        if family is not None and family.coupling:
            changes += refresh_coupled(optimizer, parameter, rows, axes, family.means)
            continue
        fresh_rows(optimizer, group, parameter, rows, axes)
        if not is_known(optimizer):
            refuse_coupled(optimizer, group, parameter, axes)
            _refuse_excess(optimizer)
        changes.append(Refresh(optimizer, group, parameter, rows, axes))
        if family is not None and family.first_step and group.get("dampening"):
            changes += register(optimizer, family, parameter, rows, [1] * rows.numel(), axes)
    return changes


def births(
    optimizers: Sequence[Optimizer],
    parameter: nn.Parameter,
    rows: Tensor,
    steps: Sequence[int],
    axes: UnitAxes = ROWS,
) -> list[Change]:
    """Plan the changes that register rows of a parameter as born at `steps`, with the step hooks they need.

    `rows`: (r,) int64, units under `axes`; `steps`: r values of `current_step(optimizers, parameter)`, at surgery
    all of them the current one. A row registered before takes the new birth. A row born at step 0 is as old as
    its parameter and needs no correction, nor do optimizers without bias correction. Births later than the
    owner's step wait for a state to be loaded; the next step forgets them. Raises `OptimizerError` as
    `start_clocks` does.
    """
    now = current_step(optimizers, parameter)
    changes: list[Change] = []
    for optimizer, group in _owners(optimizers, parameter):
        family, step = family_of(optimizer), _step(optimizer, parameter)
        if family is None or not family.ages or step is None or now is None:
            continue
        own = torch.tensor([born - now + step for born in steps], dtype=torch.float64)
        own = torch.where(_is_young(family, group, own, step, parameter), own, 0.0)
        if bool((own > 0).any()) or parameter in young_rows(optimizer):
            changes += register(optimizer, family, parameter, rows, own.tolist(), axes)
    return changes


def lacks_corrections(optimizers: Sequence[Optimizer], parameter: nn.Parameter, births: Sequence[int]) -> bool:
    """Whether rows of a parameter born then are young under an owner that has none of its rows registered.

    `births`: of any number of rows, counted as `current_step`. Copies, pickles and new processes lack them.
    """
    for optimizer, group in _owners(optimizers, parameter):
        family, step = family_of(optimizer), _step(optimizer, parameter)
        if family is None or not family.ages or not step or parameter in young_rows(optimizer):
            continue
        born = torch.tensor([birth for birth in births if 0 < birth <= step], dtype=torch.float64)
        if bool(_is_young(family, group, born, step, parameter).any()):
            return True
    return False


def _is_young(family: Family, group: Group, births: Tensor, step: int, parameter: nn.Parameter) -> Tensor:
    """Which rows born then no sweep has taken from the young by now; those that wait for a state to be loaded stay."""
    is_double = parameter.dtype in (torch.float64, torch.complex128)
    births = births if is_double else births.float()
    return (births > step) | family.young_now(births, step, group)


register_births = births  # for `resume`, which has an argument of that name


def _refuse_excess(optimizer: Optimizer) -> None:
    """Refuse a class in which a trial saw fresh rows overshoot: it has numbers or state that cannot be made fresh."""
    trial = trial_of(optimizer)
    if trial is not None and trial.excess > 1.1:
        name = type(optimizer).__name__
        raise OptimizerError(
            f"fresh rows overshoot under {name}: on a scratch parameter their updates were {trial.excess:.3g} times a "
            "fresh parameter's, as it keeps state that cannot be learned, or numbers for all rows of a parameter that "
            "a count of steps does not tell. Give the operated layers another optimizer, or operate without "
            "optimizer=, which leaves its state to you"
        )


def notes(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> list[str]:
    """Return what a report should say of the parameter's optimizers: a line for each of an unknown family."""
    found = []
    for optimizer, _ in _owners(optimizers, parameter):
        state, family = optimizer.state.get(parameter), family_of(optimizer)
        if state and family is not None and family.coupling:
            found.append(
                f"{type(optimizer).__name__} {family.coupling}: operating on some rows moves the others' next updates"
            )
        if not state or family is not None:
            continue
        shared = ", ".join(key for key, entry in state.items() if is_shared(key, entry, parameter))
        note = f"{type(optimizer).__name__}: unknown family; rows took the state of a fresh parameter"
        if shared:
            note += f", what all rows share ({shared}) is left as it is and may scale their first updates"
        found.append(note)
    return found


def young_rows(optimizer: Optimizer) -> dict[nn.Parameter, dict[int, int]]:
    """Return the rows the step hooks still correct: parameter -> row -> birth. It waits for the device.

    Of a parameter of which rows and columns are young it is single weights, by their places in the flat tensor.
    """
    corrections = CORRECTIONS.get(optimizer)
    young = {} if corrections is None else corrections.young
    return {
        parameter: {
            row: int(birth) for row, birth in zip(one.rows.tolist(), one.births.tolist(), strict=True) if birth == birth
        }
        for parameter, one in young.items()
    }


# -- who owns what ---------------------------------------------------------------------------------------------------


def _owners(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> Iterator[tuple[Optimizer, Group]]:
    """Yield each optimizer that owns and steps the parameter, with the parameter's group."""
    for optimizer in optimizers:
        group = _group(optimizer, parameter)
        if group is not None and inner_of(optimizer) is None:
            yield optimizer, group


def _group(optimizer: Optimizer, parameter: nn.Parameter) -> Group | None:
    groups = (group for group in optimizer.param_groups if any(one is parameter for one in group["params"]))
    return next(groups, None)


def _step(optimizer: Optimizer, parameter: nn.Parameter) -> int | None:
    """Return the optimizer's count of steps for a parameter it owns; None when it keeps none."""
    family = family_of(optimizer)
    if family is not None and family.first_step:
        return None
    state = optimizer.state.get(parameter)
    if not state:
        return 0
    group, shared = _group(optimizer, parameter), None if family is None else family.shared
    step = state.get("step") if shared is None or group is None else shared.counted(state, group)
    is_count = isinstance(step, (int, float)) or (isinstance(step, Tensor) and step.numel() == 1)
    return int(step) if is_count else None


def _counts(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether the optimizer counts its steps; of an unknown family only its state tells."""
    if family_of(optimizer) is None and not optimizer.state.get(parameter):
        return False
    return _step(optimizer, parameter) is not None
