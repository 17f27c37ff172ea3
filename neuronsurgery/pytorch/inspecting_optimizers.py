"""Whether the optimizers train what they should, correct what is young, and count the steps that ages are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.checks import Problem
from neuronsurgery.pytorch import optimizers as optimizer_state
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.fading import is_faded_by
from neuronsurgery.pytorch.inspecting_banks import latest_rows
from neuronsurgery.pytorch.places import Place, Slots
from neuronsurgery.pytorch.sites import Discovery
from neuronsurgery.tables import counted, listed

__all__ = ["age_problems", "owner_problems"]

_ATTACH = "surgery.attach(model, optimizer)"


def owner_problems(model: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[Problem]:
    """Parameters that no optimizer trains, and those that are stepped twice; nothing where no optimizer is given."""
    if not optimizers:
        return
    parameters = {
        f"{prefix}.{name}" if prefix else name: p
        for prefix, module in model.named_modules()
        for name, p in module._parameters.items()
        if p is not None and p.requires_grad and not isinstance(module, Composite)  # rows made parameters: see banks
    }
    if names := optimizer_state.unowned(optimizers, parameters):
        yield Problem(
            "optimizer",
            listed(names),
            f"{counted(len(names), 'trainable parameter')} of {len(parameters)}, and no optimizer owns "
            f"{'it' if len(names) == 1 else 'them'}{_strangers(model, optimizers)}",
            "add them with optimizer.add_param_group, or build the optimizer from the model's parameters",
        )
    times = Counter(id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    if twice := [name for name, p in parameters.items() if times[id(p)] > 1]:
        found = "more than one optimizer or group owns it, so every step moves it more than once"
        yield Problem("optimizer", listed(twice), found, "leave it to one of them")
    frozen = {id(value) for module in model.modules() if isinstance(module, Composite) for value in module.buffers()}
    if any(key in frozen for key in times):
        found = "an optimizer owns rows of it"
        holders = [
            n for n, m in model.named_modules() if isinstance(m, Composite) and any(id(b) in times for b in m.buffers())
        ]
        yield Problem("frozen rows", listed(holders), found, "build the optimizer from model.parameters()")


def _strangers(model: nn.Module, optimizers: Sequence[Optimizer]) -> str:
    """Parameters that optimizers own and the model does not: a sign of a model that was copied or made anew."""
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    others = sum(id(p) not in own for p in params)
    return f", while of the {len(params)} that they own {others} are not the model's" if others else ""


def age_problems(discovery: Discovery, optimizers: Sequence[Optimizer]) -> Iterator[Problem]:
    """Young rows that nothing corrects, steps that nothing counts, births ahead of the count, and broken state."""
    for name, place in discovery.places.items():
        bank = place.bank
        if bank is None or not optimizers:
            continue
        for column, slots in enumerate(place.renewed):
            if slots is None or slots.parameter is None or column >= bank.rows.births.shape[1]:
                continue
            latest = _births(bank, column)
            yield from _hook_problems(name, slots, slots.parameter, latest, optimizers)
            yield from _fade_problems(name, bank, column, slots.parameter, optimizers)
            yield from _state_problems(name, place, slots, slots.parameter, list(latest), optimizers)


def _births(bank: Composite, column: int) -> dict[int, int]:
    """Each operated unit and the birth of its active member, in the count of one parameter's owner."""
    return {unit: int(bank.rows.births[row, column]) for unit, row in latest_rows(bank.rows, sign=-1).items()}


def _hook_problems(
    name: str, slots: Slots, parameter: nn.Parameter, births: dict[int, int], optimizers: Sequence[Optimizer]
) -> Iterator[Problem]:
    known = [birth for birth in births.values() if birth >= 0]
    if not known or not _owners(parameter, optimizers):
        return
    where = f"{name}, '{slots.attribute}'"
    now = optimizer_state.age_clock(optimizers, parameter)
    if now is None:
        found = "nothing counts the optimizer's steps, so that its composite units have no age and no cooldown"
        yield Problem("step hooks", where, f"{found}; the hook was lost in a copy or a resume", _ATTACH)
        return
    ahead = [unit for unit, birth in births.items() if birth > now]
    if ahead:
        found = f"units {listed(ahead)} were born at steps up to {max(known)}, and the optimizer counts {now}"
        remedy = f"load the optimizer's state of that time, then {_ATTACH}; until then they have no age"
        yield Problem("ages", where, found, remedy)
    elif optimizer_state.lacks_corrections(optimizers, parameter, known):
        found = "its young rows are not corrected, and move by several times what a fresh parameter's would"
        yield Problem("step hooks", where, f"{found}: the hooks were lost in a copy or a resume", _ATTACH)


def _fade_problems(
    name: str, bank: Composite, column: int, parameter: nn.Parameter, optimizers: Sequence[Optimizer]
) -> Iterator[Problem]:
    """Rows that are to retire, and that no step lets fade."""
    left = torch.from_numpy(bank.rows.fading_by(column)).to(bank.frozen_weight.device) & (bank.live_fade() > 0)
    if _owners(parameter, optimizers) and not is_faded_by(bank, optimizers) and bool(left.any()):
        found = f"{counted(int(left.sum()), 'frozen row')} should retire, and nothing lets them fade"
        yield Problem("step hooks", name, f"{found}: the hook was lost in a copy or a resume", _ATTACH)


def _owners(parameter: nn.Parameter, optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    return [o for o in optimizers if any(p is parameter for group in o.param_groups for p in group["params"])]


def _state_problems(
    name: str, place: Place, slots: Slots, parameter: nn.Parameter, units: list[int], optimizers: Sequence[Optimizer]
) -> Iterator[Problem]:
    """Optimizer state of active members that is not finite: their next update would be neither."""
    index = torch.tensor(units, dtype=torch.long, device=parameter.device)
    assert slots.axes is not None
    for optimizer in _owners(parameter, optimizers):
        for key, entry in optimizer.state.get(parameter, {}).items():
            if type(entry) is Tensor and entry.shape == parameter.shape and entry.is_floating_point():
                rows = slots.axes.take(entry, index.to(entry.device))
                bad = ~rows.reshape(len(rows), -1).isfinite().all(dim=1)
                if bool(bad.any()):
                    found = f"the optimizer's {key!r} of units {listed(index[bad.to(index.device)].tolist())} is"
                    remedy = "load the optimizer's state of an earlier step, or build the optimizer anew"
                    yield Problem("not finite", f"{name}, '{slots.attribute}'", found, remedy)
