"""What all stage values share: they are immutable, compare by content and go to JSON and back.

A stage hands the next one a frozen dataclass deriving from `Value`. On construction its mappings become
`FrozenMapping`s and its sequences tuples; `to_json` and `from_json` follow the annotations of its fields, so
a new value needs no serialization code of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from neuronsurgery.errors import FormatError

FORMAT = 1

K = TypeVar("K")
V_co = TypeVar("V_co", covariant=True)
ValueT = TypeVar("ValueT", bound="Value")


@dataclass(frozen=True)
class Value:
    """The base of every value a stage returns."""

    kind: ClassVar[str | None] = None
    """The name written into the JSON; by default the name of the class."""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, freeze(getattr(self, field.name)))

    def to_json(self) -> str:
        """Returns the value as JSON text, with the number of the format it is written in."""
        header = {"format": FORMAT, "value": self.kind or type(self).__name__}
        return json.dumps({**header, **self.to_data()}, indent=1)

    @classmethod
    def from_json(cls: type[ValueT], text: str) -> ValueT:
        """Reads what `to_json` wrote; raises `FormatError` for other text and for newer formats."""
        value = cls.from_data(_read_header(text, cls.kind or cls.__name__))
        if not isinstance(value, cls):
            raise FormatError(f"a {cls.__name__} was asked for; the text holds a {type(value).__name__}")
        return value

    def to_data(self) -> dict[str, Any]:
        """Returns the fields as plain lists, dictionaries, numbers and strings."""
        return {field.name: _encode(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_data(cls: type[ValueT], data: Mapping[str, Any]) -> ValueT:
        """Builds the value from what `to_data` returned."""
        hints = get_type_hints(cls)
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            raise FormatError(
                f"a {cls.__name__} has the fields {sorted(names)}; the text has {sorted(data)}: "
                "was it written by to_json?"
            )
        return cls(**{name: _decode(hints[name], value) for name, value in data.items()})


class FrozenMapping(Mapping[K, V_co]):
    """An immutable mapping that keeps its order, prints as a dict and can be copied and pickled.

    >>> FrozenMapping({"fc1": (0, 3)})
    {'fc1': (0, 3)}
    """

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[K, V_co]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: K) -> V_co:
        return self._items[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return repr(self._items)

    def __reduce__(self) -> tuple[type[FrozenMapping[K, V_co]], tuple[dict[K, V_co]]]:
        return FrozenMapping, (self._items,)


def freeze(value: Any) -> Any:
    """Returns the value with mappings, lists and numpy scalars in it made immutable and plain.

    >>> freeze({"fc1": [0, 3]})
    {'fc1': (0, 3)}
    """
    if isinstance(value, Value):
        return value
    if isinstance(value, Mapping):
        return FrozenMapping({key: freeze(item) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    return value.item() if isinstance(value, np.generic) else value


def _encode(value: Any) -> Any:
    if isinstance(value, Value):
        return value.to_data()
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    return [_encode(item) for item in value] if isinstance(value, tuple) else value


def _decode(hint: Any, data: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        # The unions in use are `T | None` and `Value | str`: only a value is a JSON object.
        (hint,) = [one for one in get_args(hint) if one not in (NoneType, str)]
        return _decode(hint, data) if isinstance(data, (dict, list)) else data
    if get_origin(hint) is Mapping:
        return {key: _decode(get_args(hint)[1], item) for key, item in data.items()}
    if get_origin(hint) is tuple:
        return tuple(_decode(get_args(hint)[0], item) for item in data)
    return hint.from_data(data) if isinstance(hint, type) and issubclass(hint, Value) else data


def _read_header(text: str, kind: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise FormatError(f"a {kind} was asked for; the text is no JSON: {error}") from error
    found = data.get("value") if isinstance(data, dict) and "format" in data else None
    if found != kind:
        holds = f"a {found}" if found else "no value of this package"
        raise FormatError(f"a {kind} was asked for; the text holds {holds}: pass what {kind}.to_json() wrote")
    if data["format"] > FORMAT:
        raise FormatError(
            f"this {kind} was written in format {data['format']}; this version reads formats up to {FORMAT}: "
            "upgrade neuronsurgery"
        )
    return {name: item for name, item in data.items() if name not in ("format", "value")}
