"""Evidence: what was measured of a model's units, and over how many steps and samples.

A backend feeds an `Evidence` while the model trains (`observe`), while it is probed (`probe`), or once from
the gradients that are there now. It can be read at any moment. All sums stay on the device where they were
measured: recording never waits for an accelerator, only reading does.

Sources: update activity is the quantity of arXiv 2606.25335 (KNIFE), as implemented publicly: 2-norms of the
incoming row, bias excluded; with the bias as one more entry where that is asked for. E|h| is Sokar et al. 2023
(ReDo), E|dL/dh| is Liu et al. 2025 (GraMa), eq. 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from array_api_compat import array_namespace, device, to_device

from neuronsurgery.errors import EvidenceError
from neuronsurgery.sites import Sites
from neuronsurgery.tables import counted, render
from neuronsurgery.values import FrozenMapping

Array = Any
"""An array of any library that the array API standard covers: numpy, torch on any device, jax."""


class Quantity(str, Enum):
    """What can be measured of a unit; each is a mean, one number per unit."""

    UPDATE_ACTIVITY = "update_activity"
    """Mean over steps of `UA_i = |grad w_i| / (|w_i| + eps)`."""
    RELATIVE_UPDATE_ACTIVITY = "relative_update_activity"
    """Mean over steps of UA_i divided by the layer's mean of UA in that step."""
    UPDATE_ACTIVITY_WITH_BIAS = "update_activity_with_bias"
    """As the update activity, of w_i with the unit's bias as one more entry; without a bias the same."""
    RELATIVE_UPDATE_ACTIVITY_WITH_BIAS = "relative_update_activity_with_bias"
    """As the relative update activity, with the bias."""
    ACTIVATION = "activation"
    """`E|h_i|` over samples, after the activation function."""
    ACTIVATION_GRADIENT = "activation_gradient"
    """`E|dL/dh_i|` over samples."""


WITH_BIAS = frozenset({Quantity.UPDATE_ACTIVITY_WITH_BIAS, Quantity.RELATIVE_UPDATE_ACTIVITY_WITH_BIAS})
"""What is measured of rows with their biases."""

ACTIVITIES = {
    Quantity.UPDATE_ACTIVITY: Quantity.RELATIVE_UPDATE_ACTIVITY,
    Quantity.UPDATE_ACTIVITY_WITH_BIAS: Quantity.RELATIVE_UPDATE_ACTIVITY_WITH_BIAS,
}
"""What is measured over steps: an update activity -> the relative one."""

OF_GRADIENTS = frozenset({*ACTIVITIES, *ACTIVITIES.values()})
"""What gradients alone say; the other quantities need activations."""

Norms = Mapping[str, tuple[Array, Array]]
"""Site -> the norms of its rows and of their gradients, each of shape (num_units,)."""

NOTHING: Norms = FrozenMapping({})


def update_activity(weight_norm: Array, gradient_norm: Array, eps: float = 1e-12) -> Array:
    """Returns `UA_i = |grad w_i| / (|w_i| + eps)` for 2-norms of shape (num_units,).

    >>> import numpy as np
    >>> update_activity(np.array([2.0, 4.0]), np.array([1.0, 1.0])).round(6).tolist()
    [0.5, 0.25]
    """
    return gradient_norm / (weight_norm + eps)


def relative(x: Array) -> Array:
    """Returns `x / mean(x)` for non-negative x of shape (num_units,): a score, whose mean is 1.

    A mean of zero gives zeros, a mean that is not finite gives NaN everywhere.

    >>> import numpy as np
    >>> relative(np.array([1.0, 2.0, 3.0])).tolist()
    [0.5, 1.0, 1.5]
    """
    xp = array_namespace(x)
    mean = xp.mean(x)
    one, nan = xp.ones_like(mean), xp.full_like(mean, float("nan"))
    # A divisor of NaN rather than inf: inf / inf would make numpy warn.
    return x / xp.where(xp.isfinite(mean), xp.where(mean == 0, one, mean), nan)


@dataclass
class _Sum:
    total: Array  # (num_units,)
    count: (
        Array | float
    )  # a 0-d array on the device of `total`, or a plain number; no integer where samples have weights


class Evidence:
    """What was measured of the units of `sites`: a live accumulator, complete at any moment.

    `source` is an opaque handle of the model it was measured on; a backend compares it.

    >>> import numpy as np
    >>> from neuronsurgery.sites import Site, Sites
    >>> sites = Sites({"fc1": Site("fc1", "", "Linear", "relu", num_units=2)})
    >>> evidence = Evidence(sites)
    >>> evidence.record_step({"fc1": (np.array([1.0, 1.0]), np.array([1.0, 3.0]))})
    >>> evidence.measured("fc1")[Quantity.RELATIVE_UPDATE_ACTIVITY].tolist()
    [0.5, 1.5]
    """

    def __init__(self, sites: Sites, source: object = None) -> None:
        self.sites = sites
        self.source = source
        self._num_steps: Array | int = 0
        self._num_skipped: Array | int = 0
        self._sums: dict[str, dict[Quantity, _Sum]] = {name: {} for name in sites}

    def record_step(self, norms: Norms, usable: Array | bool = True, *, with_bias: Norms = NOTHING) -> None:
        """Adds a training step: site -> (weight_norm, gradient_norm), each (num_units,), float32 or float64.

        `with_bias` are the same norms with the unit's bias, and its gradient, as one more entry, where they are wanted.

        `usable` (a bool, or a 0-d bool array on any device) is false for a step that must not count, such as
        one whose gradients are not finite; such a step is only counted as skipped. A site absent from `norms`
        gets no count; a site whose own norms are not finite loses this step.

        Raises `SiteError` for an unknown site, `EvidenceError` for a wrong shape.
        """
        for name, pair in (*norms.items(), *with_bias.items()):
            for norm in pair:
                self._check_shape(name, norm)
        if isinstance(usable, bool):
            self._num_steps = self._num_steps + int(usable)
            self._num_skipped = self._num_skipped + int(not usable)
        else:
            xp = array_namespace(usable)
            self._num_steps = self._num_steps + xp.astype(usable, xp.int64)
            self._num_skipped = self._num_skipped + xp.astype(xp.logical_not(usable), xp.int64)
        if usable is not False:
            for quantity, each in zip(ACTIVITIES, (norms, with_bias), strict=True):
                for name, (weight_norm, gradient_norm) in each.items():
                    self._record_site(name, quantity, update_activity(weight_norm, gradient_norm), usable)

    def record_samples(self, site: str, magnitude_sum: Array, num_samples: Array | float, quantity: Quantity) -> None:
        """Adds samples: `magnitude_sum`, (num_units,), is the sum of |h| or |dL/dh| over `num_samples`
        (a number, or a 0-d array on the same device); of weighted samples the sum of w|h|, over the sum of the weights.

        Raises `SiteError` for an unknown site, `EvidenceError` for a wrong shape or a quantity of steps.
        """
        self._check_shape(site, magnitude_sum)
        if quantity not in (Quantity.ACTIVATION, Quantity.ACTIVATION_GRADIENT):
            raise EvidenceError(f"{quantity.value!r} is measured over steps: use record_step")
        _accumulate(self._sums[site], quantity, magnitude_sum, num_samples)

    def measured(self, site: str) -> Mapping[Quantity, Array]:
        """Returns the mean of each quantity that was recorded for the site, each of shape (num_units,).

        Update activities are NaN when no step of the site was usable and finite; the relative one is zero
        when the gradients were zero in every step.
        """
        self.sites.require(site)
        sums = self._sums[site]
        means = {quantity: _mean(one, one.count) for quantity, one in sums.items()}
        for activity, share in ACTIVITIES.items():
            if activity in sums:
                means[share] = _mean(sums[share], sums[activity].count)
        return FrozenMapping(means)

    @property
    def num_steps(self) -> int:
        """How many usable steps were recorded."""
        return int(self._num_steps)

    @property
    def num_skipped(self) -> int:
        """How many steps were not usable."""
        return int(self._num_skipped)

    def num_samples(self, site: str, quantity: Quantity) -> float:
        """Returns how many samples (steps, for update activities) the site's mean of `quantity` rests on.

        That is an integer, except where samples have weights that are none: then it is the sum of these.
        """
        self.sites.require(site)
        recorded = self._sums[site].get(quantity)
        count = 0.0 if recorded is None else float(recorded.count)
        return int(count) if count.is_integer() else count

    def forget(self, site: str) -> None:
        """Drops what was recorded of a site, as after an operation on it; the others' stays."""
        self.sites.require(site)
        self._sums[site] = {}

    def forget_all(self) -> None:
        """Starts anew."""
        self._num_steps = self._num_skipped = 0
        self._sums = {name: {} for name in self.sites}

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums as nested dictionaries of arrays, integers and strings; none is changed by what follows."""
        sums = {
            site: {quantity.value: {"total": one.total, "count": one.count} for quantity, one in of_site.items()}
            for site, of_site in self._sums.items()
        }
        return {"num_steps": self._num_steps, "num_skipped": self._num_skipped, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned, its arrays on the devices where more will be added.

        Raises `SiteError` for an unknown site, `EvidenceError` for a wrong shape, before anything is taken over.
        """
        for site, of_site in state["sums"].items():
            for one in of_site.values():
                self._check_shape(site, one["total"])
        self._num_steps, self._num_skipped = state["num_steps"], state["num_skipped"]
        self._sums = {site: {} for site in self.sites} | {
            site: {Quantity(name): _Sum(one["total"], one["count"]) for name, one in of_site.items()}
            for site, of_site in state["sums"].items()
        }

    def __str__(self) -> str:
        title = f"Evidence: {counted(self.num_steps, 'step')}, {self.num_skipped} skipped"
        rows = [self._row(name) for name in self.sites]
        return render(title, ("site", "units", "steps", "samples", "quantities"), rows)

    def _row(self, name: str) -> tuple[str, int, float, float, str]:
        samples = [self.num_samples(name, one) for one in (Quantity.ACTIVATION, Quantity.ACTIVATION_GRADIENT)]
        quantities = [quantity.value for quantity in Quantity if quantity in self._sums[name]]
        steps = self.num_samples(name, Quantity.UPDATE_ACTIVITY)
        return (name, self.sites[name].num_units, steps, max(samples), ", ".join(quantities) or "nothing")

    def _record_site(self, name: str, quantity: Quantity, activity: Array, usable: Array | bool) -> None:
        xp = array_namespace(activity)
        mean = xp.mean(activity)
        counts = xp.isfinite(mean)  # of what is never negative: whether all of it is
        if not isinstance(usable, bool):
            counts = xp.logical_and(counts, to_device(usable, device(activity)))
        activity = xp.where(counts, activity, xp.zeros_like(activity))
        is_moving = xp.logical_and(counts, mean > 0)
        share = activity / xp.where(is_moving, mean, xp.ones_like(mean))
        sums = self._sums[name]
        _accumulate(sums, quantity, activity, xp.astype(counts, xp.int64))
        _accumulate(sums, ACTIVITIES[quantity], share, xp.astype(is_moving, xp.int64))

    def _check_shape(self, name: str, values: Array) -> None:
        num_units = self.sites.require(name).num_units
        if tuple(values.shape) != (num_units,):
            raise EvidenceError(
                f"site {name!r} has {num_units} units; found an array of shape {tuple(values.shape)}: "
                f"pass one number per unit, shape ({num_units},)"
            )


def _accumulate(sums: dict[Quantity, _Sum], quantity: Quantity, total: Array, count: Array | float) -> None:
    before = sums.get(quantity)
    if before is not None:
        total, count = before.total + total, before.count + count
    sums[quantity] = _Sum(total, count)


def _mean(one: _Sum, seen: Array | float) -> Array:
    """The mean of a sum, NaN if nothing was seen; `seen` may exceed the count by what contributed nothing."""
    xp = array_namespace(one.total)
    like = {"dtype": one.total.dtype, "device": device(one.total)}
    count, seen = xp.asarray(one.count, **like), xp.asarray(seen, **like)
    mean = one.total / xp.where(count > 0, count, xp.ones_like(count))
    return xp.where(seen > 0, mean, xp.full_like(mean, float("nan")))
