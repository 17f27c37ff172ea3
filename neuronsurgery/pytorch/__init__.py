"""The PyTorch backend: reads models with torch.fx and rewrites their forwards; the only importer of torch."""

from neuronsurgery.pytorch.entry import (
    accept,
    ages,
    attach,
    check,
    check_source,
    composites,
    discover,
    measure,
    mirror,
    observe,
    operate,
    probe,
    restore,
    seed,
    undo,
    watch,
)

__all__ = [
    "accept",
    "ages",
    "attach",
    "check",
    "check_source",
    "composites",
    "discover",
    "measure",
    "mirror",
    "observe",
    "operate",
    "probe",
    "restore",
    "seed",
    "undo",
    "watch",
]
