"""Whether the frozen rows of banks are frozen, whole and finite, and what became of the active members."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.checks import Problem, moved_note
from neuronsurgery.composites import Rows, room_for
from neuronsurgery.pytorch import optimizers as optimizer_state
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.distributed import taken
from neuronsurgery.pytorch.places import Place, Slots
from neuronsurgery.pytorch.sharding import room_in
from neuronsurgery.pytorch.sites import Discovery
from neuronsurgery.pytorch.unit_axes import ROWS
from neuronsurgery.tables import counted, listed

__all__ = ["bank_problems", "latest_rows", "notes"]

_RESTORE = "restore the model from a checkpoint with surgery.restore, or undo the operation"


def bank_problems(discovery: Discovery, optimizers: Sequence[Optimizer]) -> Iterator[Problem]:
    """What is wrong with the rows of each bank, and with the active members beside them."""
    learning = _storages(discovery.model, optimizers)
    for name, bank in discovery.model.named_modules():
        if isinstance(bank, Composite):
            yield from _movable(name, bank, learning)
    for name, place in discovery.places.items():
        if place.bank is not None:
            wrong = list(_structure_problems(name, place, place.bank))
            yield from wrong
            if not wrong:
                yield from _number_problems(name, place, place.bank)
                yield from _overwritten(name, place, place.bank)


# -- frozen ----------------------------------------------------------------------------------------------------------


def _storages(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[int, str]:
    """What owns each storage that training moves, by its address."""
    owned = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    found = {_address(p): "a parameter that an optimizer owns" for p in owned}
    found |= {
        _address(p): f"the parameter '{name}'" for name, p in model.named_parameters() if not _is_in_bank(model, name)
    }
    found.pop(0, None)  # no storage: the meta device, or no elements
    return found


def _is_in_bank(model: nn.Module, name: str) -> bool:
    """Whether a parameter hangs on a bank, which `_movable` says by itself."""
    return isinstance(model.get_submodule(name.rpartition(".")[0]), Composite)


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # fake tensors and subclasses without a storage of their own
        return 0


def _movable(name: str, bank: Composite, learning: dict[int, str]) -> Iterator[Problem]:
    """Rows that something could move: nothing but buffers of their own that require no gradient is safe."""
    detach = (
        "register it as a buffer again: delattr(bank, NAME), then bank.register_buffer(NAME, values.detach().clone())"
    )
    for own in bank._parameters:
        yield Problem("frozen rows", f"{name}.{own}", "it is a parameter, which optimizers and sweeps move", detach)
    for own, value in bank._buffers.items():
        if value is None:
            continue
        if value.requires_grad:
            remedy = "bank.requires_grad_(False) does not reach buffers: value.requires_grad_(False)"
            yield Problem("frozen rows", f"{name}.{own}", "it requires a gradient", remedy)
        if _address(value) in learning:
            found = f"it shares its storage with {learning[_address(value)]}, and moves with it"
            yield Problem("frozen rows", f"{name}.{own}", found, detach)


# -- whole -----------------------------------------------------------------------------------------------------------


def _structure_problems(name: str, place: Place, bank: Composite) -> Iterator[Problem]:
    """Structure, rows, capacity and tables of a bank agree with each other and with the layer."""
    found = "; ".join(_disagreements(place, bank))
    if found:
        yield Problem("bank", name, found, _RESTORE)


def _disagreements(place: Place, bank: Composite) -> Iterator[str]:
    rows, num_units = bank.rows, place.site.num_units
    if bank.num_units != num_units:
        yield f"its bank was made for {bank.num_units} units, the layer has {num_units}"
        return
    if len(rows) == 0 or rows.unit.min() < 0 or rows.unit.max() >= num_units:
        yield f"its bank holds rows of units that the layer of {num_units} does not have"
        return
    if odd := _unpaired(rows):
        yield f"units {listed(odd)} do not have a compensation row for each knowledge row"
    room = room_for(len(rows), num_units)
    misfits = [
        misfit
        for buffer, slots in zip(place.buffer_names, place.slots, strict=True)
        for misfit in _misfit(buffer, getattr(bank, buffer, None), slots, room)
    ]
    if misfits:
        yield from misfits
        return
    stale = [key for key, table in bank.tables(rows).items() if not _is_same(getattr(bank, key, None), table)]
    if stale:
        yield f"its tables ({listed(stale)}) are not those of its structure, so it sums other rows than it holds"


def _unpaired(rows: Rows) -> list[int]:
    """The units whose signs do not cancel, operation by operation."""
    pairs: dict[tuple[int, int], int] = {}
    for unit, operation, sign in zip(rows.unit.tolist(), rows.operation.tolist(), rows.sign.tolist(), strict=True):
        pairs[unit, operation] = pairs.get((unit, operation), 0) + sign
    return sorted({unit for (unit, _), total in pairs.items() if total != 0})


def _misfit(buffer: str, value: Tensor | None, slots: Slots | None, room: int) -> Iterator[str]:
    """How one buffer of a bank does not fit the slots whose rows it froze."""
    if (value is None) != (slots is None):
        held, there = ("no", "one") if value is None else ("a", "none")
        yield f"its bank has {held} '{buffer}', the layer has {there}"
        return
    if value is None or slots is None:
        return
    room = room_in(value, room)
    if len(value) != room:
        yield f"'{buffer}' has room for {len(value)} rows, its structure asks for {room}"
    shape = slots.row_shape
    if value.shape[1:] != shape:
        yield f"'{buffer}' has rows of shape {tuple(value.shape[1:])}, the layer's are {tuple(shape)}"
    if (value.dtype, value.device) != (slots.tensor.dtype, slots.tensor.device):
        yield (
            f"'{buffer}' is {value.dtype} on {value.device}, the layer {slots.tensor.dtype} on {slots.tensor.device}: "
            "cast and move the whole model, not its parameters"
        )


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and bool(torch.equal(one.cpu(), other.cpu()))


# -- finite ----------------------------------------------------------------------------------------------------------


def _number_problems(name: str, place: Place, bank: Composite) -> Iterator[Problem]:
    """Rows and active members that are not finite."""
    for buffer in bank.buffer_names():
        value = bank.live(buffer)
        if value is not None and (bad := _not_finite(value, torch.from_numpy(bank.rows.unit))):
            yield Problem("not finite", f"{name}, '{buffer}'", f"frozen rows of units {listed(bad)} are", _RESTORE)
    units = _operated(place, bank)
    for slots in place.renewed:
        if slots is not None and (bad := _not_finite(slots.take(units), units)):
            found = f"the active members of units {listed(bad)} are"
            yield Problem("not finite", f"{name}, '{slots.attribute}'", found, _RESTORE)


def _not_finite(rows: Tensor, units: Tensor) -> list[int]:
    """The units of rows with NaN or infinity among them."""
    bad = ~rows.reshape(len(rows), -1).isfinite().all(dim=1)
    return sorted(set(units[bad.to(units.device)].tolist()))


def _operated(place: Place, bank: Composite) -> Tensor:
    return torch.tensor(sorted(bank.rows.latest()), dtype=torch.long, device=place.weight.device)


# -- active members --------------------------------------------------------------------------------------------------


def _overwritten(name: str, place: Place, bank: Composite) -> Iterator[Problem]:
    """Active members that are bit for bit the old unit again: nothing that trains does that."""
    units = _operated(place, bank)
    is_old = _equals(place, bank, units, sign=1) & ~_equals(place, bank, units, sign=-1)
    if bool(is_old.any()):
        yield Problem(
            "active members",
            name,
            f"units {listed(units[is_old].tolist())} have their old weights in the slots again, beside the frozen "
            "ones, so that the output is not what it was",
            "find what writes weights back (a master copy, an older checkpoint loaded with strict=False, an average "
            "swapped in); load with surgery.restore, and operate on the model whose weights the optimizer owns",
        )


def _equals(place: Place, bank: Composite, units: Tensor, sign: int) -> Tensor:
    """Whether each unit's slots are its latest frozen rows of a sign, bool (num_units,)."""
    latest = latest_rows(bank.rows, sign)
    index = torch.tensor([latest[unit] for unit in units.tolist()], dtype=torch.long, device=units.device)
    same = torch.ones(len(units), dtype=torch.bool, device=units.device)
    for buffer, slots in zip(place.buffer_names, place.renewed, strict=True):
        frozen = getattr(bank, buffer)
        if slots is not None and frozen is not None:
            now, then = slots.take(units), taken(f"frozen rows of {bank.site!r}", frozen, index, ROWS)
            same &= (now == then.to(now)).reshape(len(units), -1).all(dim=1)
    return same


def latest_rows(rows: Rows, sign: int) -> dict[int, int]:
    """Each operated unit and the index of its latest row of a sign."""
    order = np.argsort(rows.operation, kind="stable")
    order = order[rows.sign[order] == sign]
    return dict(zip(rows.unit[order].tolist(), order.tolist(), strict=True))


def notes(discovery: Discovery, optimizers: Sequence[Optimizer]) -> Iterator[str]:
    """How many active members have not moved, and of those how many got no gradient in a later pass."""
    for name, place in discovery.places.items():
        if place.bank is None or any(True for _ in _disagreements(place, place.bank)):
            continue
        units = _operated(place, place.bank)
        still = _equals(place, place.bank, units, sign=-1)
        if bool(still.any()):
            yield moved_note(name, int(still.sum()), len(units), _num_silent(place, units[still], optimizers))
        if not place.weight.requires_grad:
            yield f"{name}: its weight is frozen, so that its {counted(len(units), 'active member')} cannot learn"


def _num_silent(place: Place, units: Tensor, optimizers: Sequence[Optimizer]) -> int | None:
    """How many of these active members have a gradient of zero; None where theirs is not from a pass of their own."""
    now = optimizer_state.age_clock(optimizers, place.weight)
    if place.weight.grad is None or place.bank is None or now is None:
        return None
    steps, latest = place.bank.rows.steps(0), latest_rows(place.bank.rows, sign=-1)
    born = [steps[latest[unit]] for unit in units.tolist()]
    if any(step is None or step >= now for step in born):
        return None
    gradient = taken("gradients of rows", place.weight.grad, units, place.product.axes)
    return int((gradient == 0).reshape(len(gradient), -1).all(dim=1).sum())
