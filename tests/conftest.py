"""Every test starts from the same seeds, on one thread; on CI the drawn examples are the same too."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import register_random, settings

# Two pytest workers on two cores; with torch's default of two threads each, tests take several times as long.
torch.set_num_threads(1)

# No deadline: the first example that traces a model is a hundred times slower than the next.
settings.register_profile("default", deadline=None)
# A change must not turn red by luck of the draw; new examples are looked for on the developers' machines.
settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


class TorchRandom:
    """torch's global generator as hypothesis wants it: no example depends on the one before."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps a weak reference only
register_random(TORCH_RANDOM)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
