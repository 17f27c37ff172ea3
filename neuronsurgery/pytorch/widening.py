"""Widening: chosen units are split in two, and the layer is wider for good (Net2WiderNet, Chen et al. 2016).

The new unit is a copy of the incoming weights, and both share the outgoing ones, so that the output stays. The shares
are drawn for each outgoing weight: with equal shares both would receive the same gradient for ever, which is why the
paper adds noise, so that the output moves. It is the control for capacity: nothing is frozen, no bank is hung.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.errors import ModelError
from neuronsurgery.plans import Plan
from neuronsurgery.pytorch import optimizers as optimizer_state
from neuronsurgery.pytorch.checking import SameOutput
from neuronsurgery.pytorch.consuming import Consumer
from neuronsurgery.pytorch.drawing import check_drawing, generator_kept
from neuronsurgery.pytorch.fsdp import require_whole
from neuronsurgery.pytorch.layouts import Passed
from neuronsurgery.pytorch.links import Dropout, Norm, Reshape
from neuronsurgery.pytorch.models import unwrap, wrappers_of
from neuronsurgery.pytorch.places import Place, Slots, owners_of
from neuronsurgery.pytorch.products import Convolution
from neuronsurgery.pytorch.renewing import Subject, prepared, reported, seed_of
from neuronsurgery.pytorch.resizing import check_resizable, resized, said
from neuronsurgery.pytorch.swapped import with_parameters_in_place
from neuronsurgery.pytorch.transaction import Change, Later, SetItem, WriteRows
from neuronsurgery.pytorch.unit_axes import UnitAxes
from neuronsurgery.reports import Report

__all__ = ["Owners", "why_not_wider", "widen"]


@with_parameters_in_place
def widen(
    model: nn.Module,
    plan: Plan,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    verify: Any = None,
    generator: torch.Generator | None = None,
) -> Report:
    """Split the units of a plan in two; see `neuronsurgery.surgery.widen`."""
    require_whole(model, "widen")
    check_drawing(None, generator)
    if any(isinstance(each, nn.parallel.DistributedDataParallel) for each in wrappers_of(model)):
        raise ModelError("DistributedDataParallel keeps the sizes of parameters: widen the module before it is wrapped")
    owners = owners_of(unwrap(model))
    taken: dict[int, str] = {}

    def why_not(place: Place, readers: tuple[Consumer, ...]) -> str:
        return why_not_wider(place, readers, owners) or _why_later(place, readers, taken)

    subject = prepared(model, plan, optimizer, "widen", why_not)
    with generator_kept(generator):
        draws = torch.Generator().manual_seed(seed_of(subject, generator))
        changes: list[Change] = []
        for place, units, readers in subject.sites():
            for parameter in _parameters(place, readers):
                check_resizable(subject.optimizers, parameter)
            # From what the sites before it left: their columns are its rows.
            changes.append(Later(Split(subject, place, units.cpu(), readers, owners, draws).changes))
        notes = [*subject.notes, *_dropout_notes(subject)]
        same = [] if verify is None else [SameOutput(subject.model, verify)]
        return reported(replace(subject, notes=tuple(notes)), changes, None, same)


Owners = Mapping[int, Sequence[tuple[nn.Module, str]]]


def why_not_wider(place: Place, readers: tuple[Consumer, ...], owners: Owners) -> str:
    """Why the tensors of a site, or those behind it, cannot be of another size."""
    if place.computed:
        return "its weights are computed, from parameters of sizes of their own"
    if isinstance(place.product, Convolution) and place.product.groups > 1:
        return "its units are in groups of equal size"
    for link in place.path.links:
        if isinstance(link, Norm):
            return f"'{link.name}' takes its statistics over all units: more of them would move those"
        if isinstance(link, Reshape):
            return f"'{link.name}' says in the code how many units there are"
    tensors = [slots.tensor for slots in place.slots if slots is not None and slots.axes is not None]
    if any(len(owners[id(tensor)]) > 1 for tensor in (*tensors, *(each.weight for each in readers))):
        return "one of its tensors belongs to several modules"
    return next((reason for each in readers if (reason := _why_fixed(each, owners))), "")


def _why_later(place: Place, readers: tuple[Consumer, ...], taken: dict[int, str]) -> str:
    """Why a site waits for another, beside which a consumer reads it: that one's growth moves its columns."""
    for each in readers:
        other = taken.setdefault(id(each.weight), place.site.name)
        if other != place.site.name:
            return f"its consumer '{each.name}' also reads '{other}', which was widened: widen this one next"
    return ""


def _why_fixed(consumer: Consumer, owners: Owners) -> str:
    owner = owners[id(consumer.weight)][0][0]
    if consumer.passed is Passed.OWN:
        return f"what it passes on the way to '{consumer.name}' has numbers of its own for each unit"
    if consumer.layout.is_fixed:
        return f"the code on the way to '{consumer.name}' says how many entries there are"
    if len(consumer.axes.axes) > 1 or isinstance(owner, nn.RNNBase | nn.MultiheadAttention):
        return f"its consumer '{consumer.name}' ({type(owner).__name__}) has other tensors that depend on its inputs"
    return ""


def _parameters(place: Place, readers: Sequence[Consumer]) -> list[nn.Parameter]:
    own = [slots.tensor for slots in place.slots if slots is not None and slots.axes is not None]
    return [each for each in (*own, *(reader.weight for reader in readers)) if isinstance(each, nn.Parameter)]


def _dropout_notes(subject: Subject) -> Iterator[str]:
    for place, _, _ in subject.sites():
        if any(isinstance(link, Dropout) for link in place.path.links):
            yield f"{place.site.name}: dropout draws a mask for each unit: the output stays in evaluation"


# -- one site --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Split:
    """The changes of one site, from the tensors as they are when they are asked for."""

    subject: Subject
    place: Place
    units: Tensor
    readers: Sequence[Consumer]
    owners: Owners
    draws: torch.Generator

    def changes(self) -> Iterator[Change]:
        num_units = self.place.site.num_units
        source = torch.cat([torch.arange(num_units), self.units])
        new = torch.arange(num_units, num_units + len(self.units))
        for slots in self.place.slots:
            if slots is not None and slots.axes is not None:
                yield from self.grown_slots(slots, slots.axes, source, new)
        for consumer in self.readers:
            yield from self.grown_columns(consumer)

    def grown_slots(self, slots: Slots, axes: UnitAxes, source: Tensor, new: Tensor) -> Iterator[Change]:
        (axis,) = axes.axes
        if isinstance(slots.tensor, nn.Parameter):
            yield from resized(self.subject.optimizers, slots.tensor, axis, source)
            yield Later(lambda: self.fresh_state(slots.tensor, new, axes))
        else:
            grown = slots.tensor.index_select(axis, source.to(slots.tensor.device))
            yield SetItem(slots.owner._buffers, slots.attribute, grown)
        yield from said(self.owners, slots.tensor, "producer", len(source))

    def grown_columns(self, consumer: Consumer) -> Iterator[Change]:
        """Columns for the new units beside the old ones, and the old weights shared out between both."""
        (axis,) = consumer.axes.axes
        source, now = consumer.beside(self.units)
        split, new = now[self.units].flatten(), now[consumer.layout.num_units :].flatten()
        yield from resized(self.subject.optimizers, consumer.weight, axis, source)
        yield Later(lambda: self.shared(consumer, split, new))
        yield from said(self.owners, consumer.weight, "consumer", len(source))

    def shared(self, consumer: Consumer, split: Tensor, new: Tensor) -> Iterator[Change]:
        """The new columns take a random part of each outgoing weight, which the old ones lose."""
        weight, axes = consumer.weight, consumer.axes
        outgoing = axes.take(weight.detach(), split.to(weight.device))
        part = outgoing * torch.rand(outgoing.shape, generator=self.draws).to(outgoing)
        yield WriteRows(weight, split.to(weight.device), outgoing - part, axes)
        yield WriteRows(weight, new.to(weight.device), part, axes)
        yield from self.fresh_state(weight, new, axes)

    def fresh_state(self, tensor: Tensor, new: Tensor, axes: UnitAxes) -> Iterator[Change]:
        """New rows or columns have no gradient yet, and the optimizer state of fresh ones."""
        assert isinstance(tensor, nn.Parameter)
        optimizers, new = self.subject.optimizers, new.to(tensor.device)
        if tensor.grad is not None:
            yield WriteRows(tensor.grad, new, torch.zeros_like(axes.take(tensor.grad, new)), axes)
        yield from optimizer_state.refresh(optimizers, tensor, new, axes)
        step = optimizer_state.current_step(optimizers, tensor)
        if step is not None:
            yield from optimizer_state.births(optimizers, tensor, new, [step] * len(new), axes)
