"""The PyTorch backend: reads models with torch.fx and rewrites their forwards; the only importer of torch."""

from neuronsurgery.pytorch.entry import (
    ages,
    check_source,
    composites,
    discover,
    measure,
    mirror,
    observe,
    operate,
    probe,
    seed,
    undo,
)

__all__ = [
    "ages",
    "check_source",
    "composites",
    "discover",
    "measure",
    "mirror",
    "observe",
    "operate",
    "probe",
    "seed",
    "undo",
]
