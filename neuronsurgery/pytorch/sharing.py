"""ReBorn: an over-active unit shares its work with dormant ones (Qin et al. 2024).

A dormant unit n takes the incoming weights of a donor m, times a factor `b_n`, so that `h_n = b_n h_m` where the
activation function is positively homogeneous. Of each outgoing weight of the donor it takes a share `p_n`, divided by
`b_n`; the donor keeps `p_0`, and all shares sum to 1. What the donor and its units hand on together is then what the
donor handed on before. What the dormant units themselves handed on is lost: the output stays where that was nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronsurgery.plans import Plan
from neuronsurgery.pytorch.consuming import Consumer
from neuronsurgery.pytorch.distributed import agreed_units
from neuronsurgery.pytorch.drawing import Init, check_drawing, draw, generator_kept
from neuronsurgery.pytorch.fsdp import require_whole
from neuronsurgery.pytorch.layouts import Passed
from neuronsurgery.pytorch.links import Dropout, Move, Reshape, UnitFunction
from neuronsurgery.pytorch.operating import slot_changes
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.renewing import Subject, column_changes, prepared, reported, seed_of
from neuronsurgery.pytorch.swapped import with_parameters_in_place
from neuronsurgery.pytorch.transaction import Change, Later
from neuronsurgery.reports import Report
from neuronsurgery.tables import counted

__all__ = ["reborn"]


@with_parameters_in_place
def reborn(
    model: nn.Module,
    plan: Plan,
    donors: Mapping[str, Sequence[int]],
    *,
    scale: tuple[float, float],
    per_donor: int,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    init: Init | None = None,
    verify: Any = None,
    generator: torch.Generator | None = None,
) -> Report:
    """Give the plan's units parts of the work of donors, site by site; see `neuronsurgery.surgery.reborn`."""
    require_whole(model, "reborn")
    check_drawing(init, generator)
    subject = prepared(model, plan, optimizer, "reborn", _why_not)
    donors = agreed_units("the donors", donors)
    with generator_kept(generator):
        seed = seed_of(subject, generator)
        draws = torch.Generator().manual_seed(seed)
        changes: list[Change] = []
        notes: list[str] = []
        for place, units, readers in subject.sites():
            sharing = _shared_out(units, donors.get(place.site.name, ()), per_donor, scale, draws)
            births = _Births(subject, place, units, readers, sharing)
            births.fresh, drawn = draw(place, units, init, seed)
            births.shares = [_shares(sharing, consumer, draws) for consumer in readers]
            list(births.changes())  # what can be refused is refused before anything changes
            changes.append(Later(births.changes))  # from what the sites before it left: their columns are its rows
            notes += [*drawn, *_site_notes(place, sharing, readers)]
        return reported(replace(subject, notes=(*subject.notes, *dict.fromkeys(notes))), changes, verify)


def _why_not(place: Place, readers: tuple[Consumer, ...]) -> str:
    """Why a factor on a unit's incoming weights is no factor on what its consumers read."""
    if place.computed:
        return "its weights are computed, and do not scale with the parameters that they are computed from"
    for link in place.path.links:
        if not isinstance(link, (UnitFunction, Dropout, Move, Reshape)):
            return f"'{link.name}' between its weights and its activation function takes factors out again"
    for consumer in readers:
        if consumer.passed is Passed.OWN:
            return f"what it passes on the way to '{consumer.name}' treats each unit in a way of its own"
    return ""


# -- who gets what ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sharing:
    """Which donor each unit takes part of, and by which factor.

    `units`: (r,) int64; `donors`: (r,) int64, -1 for a unit without one; `factors`: (r,).
    """

    units: Tensor
    donors: Tensor
    factors: Tensor

    def groups(self) -> Iterator[tuple[int, Tensor]]:
        """Each donor with the places, among the units, of those that take part of it."""
        for donor in sorted(set(self.donors.tolist()) - {-1}):
            yield donor, (self.donors == donor).nonzero().flatten()


def _shared_out(
    units: Tensor, donors: Sequence[int], per_donor: int, scale: tuple[float, float], draws: torch.Generator
) -> Sharing:
    """Assign units to donors at random, at most so many to each; who is chosen is no donor."""
    open_places = [donor for donor in donors if donor not in set(units.tolist()) for _ in range(per_donor)]
    given = torch.full((len(units),), -1, dtype=torch.long)
    order = torch.randperm(len(open_places), generator=draws)[: len(units)]
    chosen = torch.randperm(len(units), generator=draws)[: len(order)]
    given[chosen] = torch.tensor(open_places, dtype=torch.long)[order]
    low, high = scale
    return Sharing(units, given, low + (high - low) * torch.rand(len(units), generator=draws, dtype=torch.float64))


def _shares(sharing: Sharing, consumer: Consumer, draws: torch.Generator) -> list[Tensor]:
    """For each donor the shares of its outgoing weights: (k + 1, entries, *row_shape), the donor's own first."""
    like = consumer.axes.take(consumer.weight.detach(), consumer.of(sharing.units[:1]))
    return [
        torch.randn((len(takers) + 1, *like.shape), generator=draws, dtype=torch.float64).softmax(0)
        for _, takers in sharing.groups()
    ]


def _site_notes(place: Place, sharing: Sharing, readers: Sequence[Consumer]) -> Iterator[str]:
    without = int((sharing.donors < 0).sum())
    if without:
        yield f"{place.site.name}: {counted(without, 'unit')} without a donor, drawn anew and silenced"
    if not _is_homogeneous(place):
        yield f"{place.site.name}: {place.site.activation_fn} is not positively homogeneous, so that its output moves"
    elif any(consumer.passed > Passed.HOMOGENEOUS for consumer in readers):
        yield f"{place.site.name}: what follows is not positively homogeneous, so that the output moves"


def _is_homogeneous(place: Place) -> bool:
    """Whether half of a pre-activation gives half of the activation, on a few numbers for each unit."""
    axis = -1 if place.product.is_stacked else place.product.unit_axes[0]
    shape = [7] * place.path.num_axes(axis)
    shape[axis] = place.site.num_units
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = [None if slots is None else slots.rows().cpu().float() for slots in place.slots[2:]]

    def activation(h: Tensor, axis: int = axis) -> Tensor:
        for index, link in enumerate(place.path.links):
            own = [value for value in values[place.path.span(index)] if value is not None]
            h = link.slots(h, own, (), axis)
            axis = link.axis_after(axis, h.dim())
        return h

    return torch.allclose(activation(z / 2), activation(z) / 2, rtol=1e-5, atol=1e-6)


# -- writing ---------------------------------------------------------------------------------------------------------


class _Births:
    """The changes of one site, from the weights as they are when these are asked for."""

    def __init__(
        self, subject: Subject, place: Place, units: Tensor, readers: Sequence[Consumer], sharing: Sharing
    ) -> None:
        self.subject, self.place, self.units = subject, place, units
        self.readers, self.sharing = readers, sharing
        self.fresh: list[Tensor | None] = []
        self.shares: list[list[Tensor]] = []

    def changes(self) -> Iterator[Change]:
        values = [
            None if fresh is None or slots is None else self.rows(index, fresh)
            for index, (slots, fresh) in enumerate(zip(self.place.slots, self.fresh, strict=True))
        ]
        yield from slot_changes(self.place, self.units, values, self.subject.optimizers)
        for consumer, shares in zip(self.readers, self.shares, strict=True):
            yield from self.columns(consumer, shares)

    def rows(self, index: int, fresh: Tensor) -> Tensor:
        """A slot's new rows: the donors', times the factors where it is weight or bias; fresh ones without a donor."""
        slots = self.place.slots[index]
        assert slots is not None
        has_donor = (self.sharing.donors >= 0).to(fresh.device)
        taken = slots.take(self.sharing.donors.clamp(min=0).to(fresh.device))
        if index < 2:
            factors = self.sharing.factors.to(taken)
            taken = taken * factors.reshape(-1, *[1] * (taken.dim() - 1))
        return torch.where(has_donor.reshape(-1, *[1] * (fresh.dim() - 1)), taken, fresh)

    def columns(self, consumer: Consumer, shares: Sequence[Tensor]) -> Iterator[Change]:
        """Silence all units, then hand them their shares; the donor's own column keeps its optimizer state."""
        weight, axes = consumer.weight, consumer.axes
        entries = consumer.columns.shape[1]
        taken = consumer.of(self.units)
        silent = torch.zeros_like(axes.take(weight.detach(), taken))
        values = silent.reshape(len(self.units), entries, *silent.shape[1:])
        for (donor, takers), share in zip(self.sharing.groups(), shares, strict=True):
            own = consumer.of(torch.tensor([donor], device=weight.device))
            outgoing = axes.take(weight.detach(), own)
            parts = share.to(weight.device) * outgoing.double()
            factors = self.sharing.factors[takers].to(parts).reshape(-1, *[1] * (parts.dim() - 1))
            values[takers.to(weight.device)] = (parts[1:] / factors).to(values)
            yield from column_changes(consumer, own, parts[0].to(weight), ())
        yield from column_changes(consumer, taken, values.flatten(0, 1), self.subject.optimizers)
