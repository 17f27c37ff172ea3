"""Small sites and evidence that the tests of the core share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from neuronsurgery.evidence import Evidence, Quantity
from neuronsurgery.sites import Site, Sites

__all__ = ["activations", "one_step", "sites_of"]


def sites_of(num_frozen: int = 0, declined: Mapping[str, str] | None = None, **num_units: int) -> Sites:
    """Sites of these widths: `sites_of(fc1=4, fc2=8)`."""
    sites = {name: Site(name, "", "Linear", "relu", count, num_frozen) for name, count in num_units.items()}
    return Sites(sites, declined or {})


def one_step(sites: Sites, **gradient_norms: Sequence[float]) -> Evidence:
    """Evidence of one step in which all rows have norm 1, so that a unit's UA is its gradient norm."""
    evidence = Evidence(sites)
    evidence.record_step(
        {name: (np.ones(len(norms)), np.array(norms, dtype=float)) for name, norms in gradient_norms.items()}
    )
    return evidence


def activations(evidence: Evidence, quantity: Quantity = Quantity.ACTIVATION, **means: Any) -> Evidence:
    """Adds the means of |h| (or |dL/dh|) of one sample to the evidence."""
    for name, values in means.items():
        evidence.record_samples(name, np.asarray(values, dtype=float), 1, quantity)
    return evidence
