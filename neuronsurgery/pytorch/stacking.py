"""Stacked models: `torch.func.stack_module_state` runs several models as one, under vmap, by the code of one of them.

That one's bank says how all of their frozen rows are summed. So each bank holds a fingerprint of its structure among
its buffers, which is stacked with the rows, and a bank that finds others than its own among them refuses to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuronsurgery.errors import SurgeryError

__all__ = ["check_stacked"]

_CHECKED = "_neuronsurgery_checked"


def check_stacked(fingerprint: Tensor, site: str) -> None:
    """Refuse stacked banks of different structure; in compiled code nothing is checked.

    `fingerprint` (4,), under vmap the batch of them. It waits for the device once for each stack.

    Raises:
        SurgeryError: they differ.
    """
    if torch.compiler.is_compiling() or not torch._C._functorch.is_functorch_wrapped_tensor(fingerprint):
        return
    stacked = fingerprint
    while torch._C._functorch.is_functorch_wrapped_tensor(stacked):
        stacked = torch._C._functorch.get_unwrapped(stacked)
    if stacked.__dict__.get(_CHECKED) or stacked.shape[-1:] != (4,):
        return
    with torch._C._DisableFuncTorch():
        rows = stacked.detach().reshape(-1, 4)
        differs = bool(((rows - rows[0]).abs() > 1e-3).any())  # averages of equal numbers are off by their rounding
    if differs:
        raise SurgeryError(
            f"the models stacked here were operated on differently at {site!r}: other units, or in another order, so "
            "one of them cannot sum the frozen rows of the others. Operate on the same units of each model, with "
            "surgery.Units, or run the models one by one"
        )
    setattr(stacked, _CHECKED, True)
