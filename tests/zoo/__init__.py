"""The zoo: networks of every shape people train, and what is measured of them.

`ZOO` holds animals: small networks, each with what discovery must find in it, producer by producer. `SPECIMENS` holds
whole models as they are published and trained, on which the share of units that can be operated on is measured.
"""

from tests.zoo.control import SPECIMENS as CONTROL
from tests.zoo.huggingface import SPECIMENS as HUGGINGFACE
from tests.zoo.networks import (
    ZOO,
    ActorCritic,
    Animal,
    CleanRlAgent,
    Dueling,
    MultiHead,
    QmixMixer,
    QplexMixer,
    RecurrentAgent,
    Residual,
    Straddle,
    animals,
    mlp,
)
from tests.zoo.sequences import SPECIMENS as SEQUENCES
from tests.zoo.specimen import Specimen
from tests.zoo.stable_baselines import SPECIMENS as STABLE_BASELINES
from tests.zoo.torchrl_models import SPECIMENS as TORCHRL
from tests.zoo.vision import SPECIMENS as VISION

__all__ = [
    "SPECIMENS",
    "ZOO",
    "ActorCritic",
    "Animal",
    "CleanRlAgent",
    "Dueling",
    "MultiHead",
    "QmixMixer",
    "QplexMixer",
    "RecurrentAgent",
    "Residual",
    "Specimen",
    "Straddle",
    "animals",
    "mlp",
]

SPECIMENS = (*CONTROL, *VISION, *SEQUENCES, *HUGGINGFACE, *STABLE_BASELINES, *TORCHRL)
