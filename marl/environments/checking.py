"""What settings are refused for, in one wording."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from marl.errors import SettingsError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def require_types_of_defaults(settings: DataclassInstance) -> None:
    """Refuses values of another type than the field's default has, and numbers that are infinite or undefined.

    A whole number will do for a float.
    """
    for field in fields(settings):
        value: Any = getattr(settings, field.name)
        expected = type(field.default)
        if type(value) is not expected and not (expected is float and type(value) is int):
            raise SettingsError(f"{field.name} is {value!r}; it must be of type {expected.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingsError(f"{field.name} is {value}; it must be finite")


def require_at_least(settings: DataclassInstance, least: int, *names: str) -> None:
    """Refuses values of these fields below a least one."""
    for name in names:
        value = getattr(settings, name)
        if value < least:
            raise SettingsError(f"{name} is {value}; it must be at least {least}")
