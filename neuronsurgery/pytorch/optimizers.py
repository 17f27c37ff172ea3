"""The optimizer's side of an operation: overwritten rows are updated as a fresh parameter's rows would be.

An optimizer remembers every element of a parameter (its **state**: momentum, moments) and, once per
parameter, how many steps it took (`step`). Rows that surgery overwrites must forget the former; the latter
belongs to all rows and is never touched. Three things are done:

- `refresh` gives the rows the state of a fresh parameter (`fresh_state`);
- `births` notes the step at which rows were overwritten, so that step hooks can correct what would go by the step of
  the whole parameter (`corrections`);
- `start_clocks` counts the steps of optimizers that do not (`step_hooks`), so that operated units have an age.

Everything else (parameter groups, state keys, the tensors themselves, all other elements) stays as it is.
The hooks live on the optimizer, and neither a copy nor a pickle of it has them: `start_clocks` and `resume` install
them again. Where they have yet to be installed, an operation inside a hook of the step is refused (`step_hooks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.errors import OptimizerError
from neuronsurgery.pytorch.corrections import CORRECTIONS, family_of, has_young, register
from neuronsurgery.pytorch.coupled import coupled_of, refresh_coupled
from neuronsurgery.pytorch.fresh_state import Refresh, fresh_rows, refuse_coupled
from neuronsurgery.pytorch.replaying import learn
from neuronsurgery.pytorch.shared_entries import Group, count_of
from neuronsurgery.pytorch.step_hooks import CLOCKS, Clock, SetClock, install
from neuronsurgery.pytorch.transaction import Change
from neuronsurgery.pytorch.unit_axes import ROWS, UnitAxes
from neuronsurgery.pytorch.wrappers import inner_of, refresh_wrapper, unwrapped

__all__ = [
    "age_clock",
    "as_optimizers",
    "birth_step",
    "births",
    "check_owners",
    "current_step",
    "missing_hooks",
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
    starts at 0 with the first operation, or where `start_clocks` says; the optimizer does not save it. Where it starts
    anew after a resume, the births of earlier operations may lie ahead of it. Units born ahead of the clock have no
    known age. (Once it has caught up with such a birth the unit is taken for young again, and passed over for one
    more cooldown.)

    >>> import torch
    >>> layer = nn.Linear(2, 3)
    >>> sgd = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> age_clock([sgd], layer.weight) is None
    True
    >>> for change in start_clocks([sgd], layer.weight):
    ...     change.apply()
    >>> layer(torch.ones(1, 2)).sum().backward()
    >>> sgd.step()
    >>> age_clock([sgd], layer.weight)
    1
    """
    owners = [optimizer for optimizer, _ in _owners(optimizers, parameter)]
    counting = next((optimizer for optimizer in owners if _counts(optimizer, parameter)), None)
    if counting is not None:
        return _step(counting, parameter)
    # Of several clocks the one ahead, so that starting another one later takes nothing back.
    clocks = (CLOCKS[optimizer].num_steps.get(parameter) for optimizer in owners if optimizer in CLOCKS)
    return max((count for count in clocks if count is not None), default=None)


def birth_step(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> int | None:
    """Return the birth of rows that are overwritten now: what `age_clock` says, 0 where `start_clocks` starts one.

    None when no optimizer owns the parameter.
    """
    now = age_clock(optimizers, parameter)
    return 0 if now is None and any(_owners(optimizers, parameter)) else now


def start_clocks(optimizers: Sequence[Optimizer], parameter: nn.Parameter, at: int = 0) -> list[Change]:
    """Plan the changes that let the steps of a parameter's optimizers be counted, where they count none themselves.

    `at`: what the parameter's clock shows then: 0 starts one where none runs; above 0, after a resume, also one that
    runs is set. Raises `OptimizerError` between the hooks of a step, where torch lets none be added, before anything
    changes.
    """
    owners = [optimizer for optimizer, _ in _owners(optimizers, parameter)]
    is_running = age_clock(optimizers, parameter) is not None
    if any(_counts(optimizer, parameter) for optimizer in owners) or (is_running and not at):
        return []
    changes: list[Change] = []
    for optimizer in owners:
        changes += [*install(optimizer, CLOCKS, Clock), SetClock(optimizer, parameter, at)]
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
        if inner_of(wrapper) is not None and rows.numel():
            changes += refresh_wrapper(wrapper, parameter, rows, axes)
    for optimizer, group in _owners(optimizers, parameter):
        if not optimizer.state.get(parameter) or not rows.numel():
            continue
        coupled = coupled_of(optimizer)
        if coupled is not None:
            changes += refresh_coupled(optimizer, coupled, parameter, rows, axes)
            continue
        family = family_of(optimizer)
        fresh_rows(optimizer, group, parameter, rows, axes)
        if family is None:
            refuse_coupled(optimizer, group, parameter, axes)
        changes.append(Refresh(optimizer, group, parameter, rows, axes))
        changes += _first_steps(optimizer, group, parameter, rows, axes)
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
    `start_clocks` does, and where the parameter has young rows under other axes.
    """
    return _entered(optimizers, parameter, rows, steps, axes)


def _entered(
    optimizers: Sequence[Optimizer], parameter: nn.Parameter, rows: Tensor, steps: Sequence[int], axes: UnitAxes
) -> list[Change]:
    now = current_step(optimizers, parameter)
    changes: list[Change] = []
    for optimizer, group in _owners(optimizers, parameter):
        step = _step(optimizer, parameter)
        if step is None or now is None:
            continue
        own = [born - now + step for born in steps]
        is_young = any(born > 0 for born in own) and _has_ages(optimizer, group, parameter, axes)
        if is_young or parameter in young_rows(optimizer):
            changes += register(optimizer, parameter, rows, own, axes)
    return changes


def _has_ages(optimizer: Optimizer, group: Group, parameter: nn.Parameter, axes: UnitAxes) -> bool:
    """Whether the updates of rows younger than their parameter differ from the others'."""
    family = family_of(optimizer)
    if family is not None:
        return family.ages
    if coupled_of(optimizer) is not None:
        return False
    rule = learn(optimizer, group, parameter, axes)
    return rule.ages or rule.first


def resume(
    optimizers: Sequence[Optimizer],
    parameter: nn.Parameter,
    rows: Tensor,
    births: Sequence[int],
    axes: UnitAxes = ROWS,
) -> list[Change]:
    """Plan the changes that register rows again after their optimizers' state was loaded, as if nothing had been lost.

    `rows`: (r,) int64, units under `axes`; `births`: r values as `birth_step` gave them at surgery, -1 where it gave
    None. To come after `start_clocks`, whose count says which rows have made no step yet. Raises as `births` does.
    """
    known = [place for place, born in enumerate(births) if born >= 0]
    rows, born = rows[torch.tensor(known, dtype=torch.int64, device=rows.device)], [births[place] for place in known]
    changes = _entered(optimizers, parameter, rows, born, axes) if known else []
    now = age_clock(optimizers, parameter)
    unborn = [place for place, step in enumerate(born) if step == now]
    if unborn:
        first = rows[torch.tensor(unborn, device=rows.device)]
        for optimizer, group in _owners(optimizers, parameter):
            changes += _first_steps(optimizer, group, parameter, first, axes)
    return changes


def notes(optimizers: Sequence[Optimizer], parameter: nn.Parameter, axes: UnitAxes = ROWS) -> list[str]:
    """Return what a report should say of the parameter's optimizers: a line for each that leaves something to know."""
    found = []
    for optimizer, group in _owners(optimizers, parameter):
        if not optimizer.state.get(parameter) or family_of(optimizer) is not None:
            continue
        if (coupled := coupled_of(optimizer)) is not None:
            found.append(coupled.note)
            continue
        unexplained = learn(optimizer, group, parameter, axes).unexplained
        if unexplained:
            found.append(
                f"{type(optimizer).__name__}: unknown family; rows took the state of a fresh parameter, what all rows "
                f"share ({', '.join(unexplained)}) is left as it is and may scale their first updates"
            )
    return found


def missing_hooks(optimizers: Sequence[Optimizer], parameter: nn.Parameter, births: Sequence[int]) -> bool:
    """Whether hooks that an operation installed are gone, as after a resume, so that `resume` has to install them.

    `births`: those of the parameter's operated rows, as for `resume`. A clock that does not run is missing.
    """
    known = [born for born in births if born >= 0]
    owners = list(_owners(optimizers, parameter))
    if not known or not owners:
        return False
    now = age_clock(optimizers, parameter)
    if now is None:
        return True
    rows = torch.arange(len(known), device=parameter.device)
    for optimizer, group in owners:
        if parameter in young_rows(optimizer):
            continue
        count = _step(optimizer, parameter)
        own = [born - now + count for born in known] if count is not None else []
        if own and _has_ages(optimizer, group, parameter, ROWS) and has_young(optimizer, parameter, group, own):
            return True
        if now in known and _first_steps(optimizer, group, parameter, rows, ROWS):
            return True
    return False


def young_rows(optimizer: Optimizer) -> dict[nn.Parameter, dict[int, int]]:
    """Return the rows the step hooks still correct: parameter -> row -> birth. It waits for the device."""
    corrections = CORRECTIONS.get(optimizer)
    young = {} if corrections is None else corrections.young
    return {
        parameter: {
            row: int(birth) for row, birth in zip(one.rows.tolist(), one.births.tolist(), strict=True) if birth == birth
        }
        for parameter, one in young.items()
    }


def _first_steps(
    optimizer: Optimizer, group: Group, parameter: nn.Parameter, rows: Tensor, axes: UnitAxes
) -> list[Change]:
    """Plan the changes that register rows before their first step, where only the first update needs correcting."""
    family = family_of(optimizer)
    if coupled_of(optimizer) is not None or not _has_tensors(optimizer.state.get(parameter, {})):
        return []
    if family is not None:
        is_first = family.first_step and bool(group.get("dampening"))
    else:
        is_first = count_of(optimizer, parameter, group) is None and learn(optimizer, group, parameter, axes).first
    return register(optimizer, parameter, rows, [1] * rows.numel(), axes) if is_first else []


def _has_tensors(state: Mapping[str, Any]) -> bool:
    return any(isinstance(entry, Tensor) for entry in state.values())


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
    family, group = family_of(optimizer), _group(optimizer, parameter)
    if family is not None and family.first_step:
        return None
    count = None if group is None else count_of(optimizer, parameter, group)
    return 0 if count is None and not optimizer.state.get(parameter) else count if count is None else int(count)


def _counts(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether the optimizer counts its steps; of an unknown family only its state tells."""
    if family_of(optimizer) is None and not optimizer.state.get(parameter):
        return False
    return _step(optimizer, parameter) is not None
