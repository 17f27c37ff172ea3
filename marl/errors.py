"""Every error the package raises, so that one `except MarlError` catches them all.

    MarlError (a ValueError)
    |-- SettingsError      an unknown name, a value out of range, settings that do not fit together
    |-- BatchError         episodes whose shapes do not fit what they are given to
    `-- CheckpointError    a file that was written for other networks or by another run

Messages say what was asked, what was found and what to do.
"""


class MarlError(ValueError):
    """The root of the package's errors."""


class SettingsError(MarlError):
    """A setting that is unknown or out of range, or that does not fit the others."""


class BatchError(MarlError):
    """Episodes whose shapes do not fit what they are given to."""


class CheckpointError(MarlError):
    """A saved state that does not fit what it is loaded into."""
