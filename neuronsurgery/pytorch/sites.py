"""Discovery: every hidden unit of a model that can soundly become a composite, and every producer that cannot, named.

Each forward is traced on its own with its children opaque; a child is inlined only where a site straddles it. What
the traces show of one weight, over all the places that read it, becomes one site or one reason.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from neuronsurgery.errors import ModelError, SiteError, near_names
from neuronsurgery.pytorch.composites import Composite
from neuronsurgery.pytorch.fsdp import as_shards
from neuronsurgery.pytorch.injected import Injection, is_frozen_copy
from neuronsurgery.pytorch.models import check_model, unwrap
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.survey import FROZEN, Survey
from neuronsurgery.pytorch.swapped import with_parameters_in_place
from neuronsurgery.sites import Sites

__all__ = ["Discovery", "check_banks_in_place", "check_paths", "discover", "explored"]


@with_parameters_in_place
def discover(model: nn.Module, *, include: Collection[str] = (), outputs: Sequence[Tensor] = ()) -> Discovery:
    """Find the sites of a model.

    Args:
        model: any module; wrappers (DDP, compiled modules) are taken off.
        include: names of range-bearing producers to accept although their range may carry meaning.
        outputs: the outputs of an example call with their autograd graph, to show what traces cannot.

    Raises:
        ModelError: no module, or one that is lazy, scripted, quantized, or made of inference tensors.
        SiteError: a name in `include` is not a producer of the model.
    """
    return explored(model, include=include, outputs=outputs)[0]


def explored(
    model: nn.Module, *, include: Collection[str] = (), outputs: Sequence[Tensor] = ()
) -> tuple[Discovery, Survey]:
    """The sites of a model, as `discover` finds them, and the survey that they were found in."""
    model = unwrap(model)
    check_model(model)
    as_shards(model)
    survey = Survey(model, tuple(outputs), frozenset(include))
    places: dict[str, Place] = {}
    declined: dict[str, str] = {}
    for name, weight in survey.producers():
        found = survey.judge(name, weight)
        if isinstance(found, str):
            declined[name] = found
        else:
            places[name] = found
    declined.update(survey.others(set(places) | set(declined)))
    if any(isinstance(module, Injection) for module in model.modules()):
        declined |= {name: "a frozen copy of plasticity_injection" for name in declined if is_frozen_copy(model, name)}
    for name in include:
        if name not in places and name not in declined:
            raise SiteError(f"no producer is named {name!r}: {near_names(name, [*places, *declined])}")
    return Discovery(model, survey.without_needless_inlining(places), declined), survey


@dataclass(frozen=True, eq=False)
class Discovery:
    """What was found: the places by site name, and the reasons for every other producer.

    A place whose weight was frozen after it was operated on stays one, so that its bank goes on taking effect, but is
    no site: nothing can be learned there.
    """

    model: nn.Module
    places: dict[str, Place]
    declined: dict[str, str]

    @property
    def sites(self) -> Sites:
        """The same as a value of the core."""
        frozen = {name: FROZEN for name in self.places if name not in self.learning}
        return Sites({name: place.site for name, place in self.learning.items()}, {**self.declined, **frozen})

    @property
    def learning(self) -> dict[str, Place]:
        """The places that are sites."""
        return {name: place for name, place in self.places.items() if place.weight.requires_grad}

    @property
    def strays(self) -> dict[str, str]:
        """The banks that no place has, by their names, and why: whoever rewrites forwards now would leave them out."""
        placed = {id(place.bank) for place in self.places.values()}
        return {
            name: self._why_astray(name)
            for name, module in self.model.named_modules()
            if isinstance(module, Composite) and id(module) not in placed
        }

    def _why_astray(self, name: str) -> str:
        """What discovery says of the producer under which a bank hangs, or of what is around that."""
        owner, _, last = name.rpartition(".")
        attribute = last.removesuffix("_composite")
        names = [owner] if last == attribute else [f"{owner}.{attribute}".lstrip("."), owner]
        parts = owner.split(".")
        names += [".".join(parts[:depth]) for depth in range(len(parts) - 1, -1, -1)]
        return next((self.declined[each] for each in names if each in self.declined), "no producer is there")


def check_banks_in_place(discovery: Discovery) -> None:
    """Refuse to rewrite the forwards of a model that has a bank which can no longer be applied: it would be left out.

    Raises:
        ModelError: names the banks, and says why.
    """
    for name, reason in discovery.strays.items():
        raise ModelError(
            f"the bank {name!r} of an earlier operation no longer belongs to a site of this model: {reason}. Operating "
            "or observing now would leave its frozen rows out, and change the output. Undo what was changed around "
            "that layer since; surgery.check(model) lists all such banks"
        )


def check_paths(discovery: Discovery) -> None:
    """Refuse to rewrite forwards where a bank's rows could no longer pass what stands behind its layer.

    Raises:
        ModelError: names the site, and says what was exchanged.
    """
    for name, place in discovery.places.items():
        if change := place.path_change:
            raise ModelError(f"{name}: {change}; put it back, or undo the operation before you exchange it")
