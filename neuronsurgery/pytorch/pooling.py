"""Evidence of several processes: means over all that they measured, with what each of them counted.

Each process sees batches of its own, and not always as many. Sums and counts are added up once, when a decision is to
be made. Gradients need nothing: those that an optimizer uses are the same on all processes already.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from neuronsurgery.evidence import Evidence, Quantity
from neuronsurgery.pytorch.distributed import group_of, session, summed, together

__all__ = ["pooled"]

ACTIVATIONS = (Quantity.ACTIVATION, Quantity.ACTIVATION_GRADIENT)


def pooled(model: nn.Module, evidence: Evidence, needs: Collection[Quantity] = ACTIVATIONS) -> Evidence:
    """What all processes measured of a model's activations, in one all-reduce; see `neuronsurgery.surgery.pooled`."""
    quantities = [quantity for quantity in ACTIVATIONS if quantity in needs]
    if not quantities or (session() is None and group_of(model) is None):
        return evidence
    state = evidence.state_dict()
    keys = [(name, quantity.value) for name in evidence.sites for quantity in quantities]
    device = next(model.parameters()).device
    own = [
        _packed(state["sums"][name].get(quantity), evidence.sites[name].num_units, device) for name, quantity in keys
    ]
    with together(model):
        shared = summed("the evidence", own)
    for (name, quantity), sums in zip(keys, shared, strict=True):
        state["sums"][name].pop(quantity, None)
        if bool(sums[-1] > 0):
            state["sums"][name][quantity] = {"total": sums[:-1], "count": sums[-1]}
    together_seen = Evidence(evidence.sites, source=evidence.source)
    together_seen.load_state_dict(state)
    return together_seen


def _packed(one: dict[str, Any] | None, num_units: int, device: torch.device) -> Tensor:
    """The sums of a site and their count at the end, (num_units + 1,) float64."""
    if one is None:
        return torch.zeros(num_units + 1, dtype=torch.float64, device=device)
    total = torch.as_tensor(one["total"]).to(device, torch.float64)
    return torch.cat([total, torch.as_tensor(one["count"]).to(total).reshape(1)])
