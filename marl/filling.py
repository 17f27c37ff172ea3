"""Filling dataclasses from layers of names and values: the part of `marl.configuring` that knows types.

What does not fit is refused with the path of the setting, what was found there and what is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

from marl.environments.tasks import Task, TaskSequence
from marl.errors import SettingsError, suggestion
from marl.sequences import SEQUENCES
from marl.settings import MixerSettings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["Filler", "join", "leaf", "shown", "task_names"]


@dataclass(frozen=True)
class Filler:
    """Fills dataclasses by name; of all unions, that of the mixers is decided by the algorithm, not by the names."""

    mixer: type[DataclassInstance]
    """The settings of the algorithm's mixer."""

    def value(self, hint: Any, layers: Sequence[Any], *, path: str) -> Any:
        """What layers, of which there is at least one, say of a field of this type."""
        if hint == MixerSettings:
            hint = self.mixer
        if hint is TaskSequence:
            return self._tasks(layers, path)
        if get_args(hint) and all(map(is_dataclass, get_args(hint))):
            hint, layers = _kind(get_args(hint), layers, path)
        if is_dataclass(hint):
            return self._dataclass(hint, layers, path)
        if get_origin(hint) is Mapping:
            return {name: value for layer in layers for name, value in _mapping(layer, path).items()}
        return leaf(hint, layers[-1], path)

    def _dataclass(self, kind: Any, layers: Sequence[Any], path: str) -> Any:
        hints, known = get_type_hints(kind), {each.name: each for each in fields(kind)}
        _require_known([name for layer in layers for name in _mapping(layer, path)], known, path)
        arguments = {}
        for name, each in known.items():
            given = [layer[name] for layer in layers if name in layer]
            if given:
                arguments[name] = self.value(hints[name], given, path=join(path, name))
            elif each.default is MISSING and each.default_factory is MISSING:
                raise SettingsError(f"{join(path, name)} is missing; set it")
        return _made(kind, arguments, path)

    def _tasks(self, layers: Sequence[Any], path: str) -> TaskSequence:
        tasks: list[list[object]] = []
        for layer in layers:
            if isinstance(layer, str):
                tasks = [[task] for task in task_names(layer)]
            elif isinstance(layer, Sequence):
                tasks = [[task] for task in layer]
            else:
                for number, changes in _mapping(layer, path).items():
                    tasks[_place(number, len(tasks), path)].append(changes)
        made = [self.value(Task, task, path=join(path, str(number))) for number, task in enumerate(tasks)]
        sequence: TaskSequence = _made(TaskSequence, {"tasks": tuple(made)}, path)
        return sequence


def task_names(text: str) -> list[dict[str, object]]:
    """Tasks as a command line names them: a sequence of `marl.sequences`, an environment, or `matrix_game:` and the
    payoffs that follow each other.

    >>> [task["name"] for task in task_names("matrix_five")]
    ['knife', 'qtran', 'penalty_25', 'qrelation_9', 'climbing', 'knife']
    >>> task_names("predator_prey")
    [{'name': 'predator_prey', 'environment': 'predator_prey'}]
    >>> [task["options"] for task in task_names("matrix_game:knife,qtran")]
    [{'payoff': 'knife'}, {'payoff': 'qtran'}]
    """
    if text in SEQUENCES:
        return [asdict(task) for task in SEQUENCES[text].tasks]
    environment, _, payoffs = text.partition(":")
    if not payoffs:
        return [{"name": text, "environment": text}]
    names = [name.strip() for name in payoffs.split(",")]
    return [{"name": name, "environment": environment, "options": {"payoff": name}} for name in names]


def _made(kind: Any, arguments: Mapping[str, object], path: str) -> Any:
    try:
        made = kind(**arguments)
        if isinstance(made, Task):
            made.make(1)  # here, where the message can say which task it is
    except (SettingsError, TypeError) as error:  # types of an environment's options are its own to judge
        raise SettingsError(f"{path}: {error}" if path else str(error)) from error
    return made


def _kind(kinds: Sequence[Any], layers: Sequence[Any], path: str) -> tuple[Any, list[Any]]:
    """Which of several dataclasses the latest layers mean, and those layers; what is of another kind is overridden."""
    used: list[Any] = []
    for layer in reversed(layers):
        still = [kind for kind in kinds if _mapping(layer, path).keys() <= _names(kind)]
        if not still:
            break
        kinds, used = still, [layer, *used]
    if not used:
        _require_known(layers[-1], set().union(*map(_names, kinds)), path)
        found = " or ".join(f"{kind.__name__} ({', '.join(sorted(_names(kind)))})" for kind in kinds)
        raise SettingsError(f"{path} has {', '.join(layers[-1])}, which do not go together; give those of {found}")
    return kinds[0], used


def leaf(hint: Any, value: object, path: str) -> Any:
    """A value as the type of its setting.

    >>> leaf(float, "5e-4", "rate")
    0.0005
    """
    try:
        if isinstance(value, bool) and bool not in (hint, *get_args(hint)):
            raise SettingsError(f"{path} is {shown(value)}; it must be {_described(hint)}")
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        if get_origin(hint) is Literal and isinstance(value, str):
            raise SettingsError(f"{path} is {value!r}; {suggestion(value, get_args(hint))}") from error
        raise SettingsError(f"{path} is {shown(value)}; it must be {_described(hint)}") from error


def _described(hint: Any) -> str:
    """What a value of a type looks like in a file."""
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list of {_described(get_args(hint)[0])}"
    if get_args(hint):
        return " or ".join(map(_described, get_args(hint)))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    return words.get(hint, str(hint))


def _mapping(layer: object, path: str) -> Mapping[str, Any]:
    if not isinstance(layer, Mapping):
        raise SettingsError(f"{path} is {shown(layer)}; it must hold names and values")
    return layer


def _require_known(names: Iterable[str], known: Iterable[str], path: str) -> None:
    for name in names:
        if name not in known:
            raise SettingsError(f"there is no setting {join(path, str(name))}; {_known(str(name), known)}")


def _known(name: str, known: Iterable[str]) -> str:
    return suggestion(name, known) if known else "nothing can be set here"


def _place(number: object, num_tasks: int, path: str) -> int:
    if str(number) not in map(str, range(num_tasks)):
        found = f"there are {num_tasks}, counted from 0" if num_tasks else "there are none; name an environment first"
        raise SettingsError(f"there is no {join(path, str(number))}; {found}")
    return int(str(number))


def _names(kind: Any) -> set[str]:
    return {each.name for each in fields(kind)}


def join(path: str, name: str) -> str:
    """The path of a setting inside another.

    >>> join("surgery", "every"), join("", "seed")
    ('surgery.every', 'seed')
    """
    return f"{path}.{name}" if path else name


def shown(value: object) -> str:
    """A value as in a file, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6) if _is_plain(value) else repr(value)
    return " ".join(text.removesuffix("...\n").split())


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | list | dict)
