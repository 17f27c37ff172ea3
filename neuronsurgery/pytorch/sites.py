"""Discovery: every hidden unit of a model that can soundly become a composite, and every producer that cannot, named.

Each forward is traced on its own with its children opaque; a child is inlined only where a site straddles it. What
the traces show of one weight, over all the places that read it, becomes one site or one reason.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from neuronsurgery.errors import SiteError, near_names
from neuronsurgery.pytorch.models import check_model, unwrap
from neuronsurgery.pytorch.places import Place
from neuronsurgery.pytorch.survey import Survey
from neuronsurgery.pytorch.swapped import with_parameters_in_place
from neuronsurgery.sites import Sites

__all__ = ["Discovery", "discover"]


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
    model = unwrap(model)
    check_model(model)
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
    for name in include:
        if name not in places and name not in declined:
            raise SiteError(f"no producer is named {name!r}: {near_names(name, [*places, *declined])}")
    return Discovery(model, survey.without_needless_inlining(places), declined)


@dataclass(frozen=True, eq=False)
class Discovery:
    """What was found: the places by site name, and the reasons for every other producer."""

    model: nn.Module
    places: dict[str, Place]
    declined: dict[str, str]

    @property
    def sites(self) -> Sites:
        """The same as a value of the core."""
        return Sites({name: place.site for name, place in self.places.items()}, self.declined)
