"""Settings of a run from files and from single assignments, checked before anything is built.

Both are *layers*: names and values, nested as the settings are. Later layers go over earlier ones, and all of them over
the preset that they name, so that the order is preset < file < command line. Values are converted to the types of the
settings' fields (`"5e-4"` is a number), and whatever does not fit is refused in one line that says where.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import yaml
from pydantic import TypeAdapter, ValidationError

from marl.environments.tasks import Task, TaskSequence
from marl.errors import SettingsError, suggestion
from marl.run_settings import RunSettings
from marl.settings import Algorithm, MixerSettings, PresetName, QMIXSettings, QPLEXSettings, VDNSettings, preset

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "Layer",
    "assignments",
    "configure",
    "flat",
    "from_dict",
    "nested",
    "read_file",
    "task_names",
    "to_dict",
    "to_yaml",
]

Layer = Mapping[str, object]
"""Names of settings -> their values, or layers themselves; `preset` is one of the names at the top."""

MIXERS: Mapping[str, type[DataclassInstance]] = {"vdn": VDNSettings, "qmix": QMIXSettings, "qplex": QPLEXSettings}


def configure(*layers: Layer) -> RunSettings:
    """The settings of a run, from layers in rising precedence.

    `algorithm` and `tasks` have to be in one of them. What a layer says of the mixer of another algorithm is passed over.
    `tasks` is a list, or text as `task_names` reads it; a layer that
    says `{"tasks": {"0": {...}}}` changes one task of the layers before.

    Raises:
        SettingsError: unknown names, wrong types, values out of range, or settings that make no game.

    >>> settings = configure({"algorithm": "qmix", "tasks": "predator_prey"}, {"learning": {"loss": {"gamma": "9e-1"}}})
    >>> settings.learning.loss.gamma, settings.learning.mixer.embed_size
    (0.9, 32)
    >>> configure({"algorithm": "qmix", "tasks": "predator_prey"}, {"learning": {"loss": {"gama": 0.9}}})
    Traceback (most recent call last):
    marl.errors.SettingsError: there is no setting learning.loss.gama; did you mean 'gamma'?
    """
    algorithm = _leaf(Algorithm, _latest("algorithm", layers), "algorithm")
    learning = preset(_leaf(PresetName, _latest("preset", ({"preset": "pymarl"}, *layers)), "preset"), algorithm)
    base = {"learning": _plain(learning)}
    chosen = [{name: value for name, value in layer.items() if name != "preset"} for layer in layers]
    builder = _Builder(MIXERS[algorithm])
    settings: RunSettings = builder.value(RunSettings, [base, *_without_mixers(chosen, algorithm)], path="")
    return settings


def from_dict(data: Layer) -> RunSettings:
    """The settings that `to_dict` wrote down; what is missing is the preset's, or the default."""
    return configure(data)


def to_dict(settings: RunSettings) -> dict[str, object]:
    """Settings as numbers, strings, lists and dictionaries.

    >>> from marl.run_settings import run_settings
    >>> settings = run_settings("vdn", "matrix_game", payoff="climbing")
    >>> to_dict(settings)["tasks"]
    [{'name': 'matrix_game', 'environment': 'matrix_game', 'options': {'payoff': 'climbing'}}]
    >>> from_dict(to_dict(settings)) == settings
    True
    """
    plain: dict[str, object] = _plain(settings)
    return plain


def to_yaml(settings: RunSettings) -> str:
    """Settings as the text of a file that `read_file` understands."""
    text: str = yaml.safe_dump(to_dict(settings), sort_keys=False)
    return text


def flat(settings: RunSettings) -> dict[str, object]:
    """Every setting by its path.

    >>> from marl.run_settings import run_settings
    >>> flat(run_settings("qmix", "matrix_game"))["learning.mixer.embed_size"]
    32
    """
    return dict(_leaves(to_dict(settings), path=""))


# -- layers


def read_file(path: Path) -> Layer:
    """The layer in a YAML file, for which a saved `settings.yaml` will do.

    Raises:
        SettingsError: there is no such file, or no names and values in it.
    """
    try:
        found = _parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"no settings can be read from {path}: {error}") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping):
        raise SettingsError(f"{path} holds {_shown(found)}; it must hold names of settings and their values")
    return found


def assignments(texts: Iterable[str]) -> list[Layer]:
    """A layer for each text like `learning.loss.gamma=0.9`; values are written as in YAML.

    Raises:
        SettingsError: a text that is no assignment.

    >>> assignments(["surgery.every=500", "surgery.parts=[agent]"])
    [{'surgery': {'every': 500}}, {'surgery': {'parts': ['agent']}}]
    """
    return [_assignment(text) for text in texts]


def nested(path: str, value: object) -> Layer:
    """The layer that sets one value.

    >>> nested("surgery.every", 500)
    {'surgery': {'every': 500}}
    """
    name, _, rest = path.partition(".")
    return {name: nested(rest, value) if rest else value}


def task_names(text: str) -> list[Layer]:
    """Tasks as a command line names them: an environment, or `matrix_game:` and the payoffs that follow each other.

    >>> task_names("predator_prey")
    [{'name': 'predator_prey', 'environment': 'predator_prey'}]
    >>> [task["options"] for task in task_names("matrix_game:knife,qtran")]
    [{'payoff': 'knife'}, {'payoff': 'qtran'}]
    """
    environment, _, payoffs = text.partition(":")
    if not payoffs:
        return [{"name": text, "environment": text}]
    names = [name.strip() for name in payoffs.split(",")]
    return [{"name": name, "environment": environment, "options": {"payoff": name}} for name in names]


def _assignment(text: str) -> Layer:
    path, equals, written = text.partition("=")
    if not equals or not all(path.strip().split(".")):
        raise SettingsError(f"{text!r} sets nothing; write it as learning.loss.gamma=0.9")
    try:
        value = _parse(written)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is {written!r}, which is no YAML; put text in quotes") from error
    return nested(path.strip(), value)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # of a package without types
    """Safe, and takes 5e-4 for the number that it is; YAML 1.1 asks for 5.0e-4."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


# -- from layers to settings


def _latest(name: str, layers: Sequence[Layer]) -> object:
    given = [layer[name] for layer in layers if name in layer]
    if not given:
        raise SettingsError(f"{name} is missing; {suggestion('', MIXERS)}")
    return given[-1]


def _without_mixers(layers: Sequence[Layer], algorithm: str) -> Iterator[Layer]:
    """The layers, of which those for another algorithm say nothing about the mixer."""
    meant: object = algorithm
    for layer in layers:
        meant, learning = layer.get("algorithm", meant), layer.get("learning")
        if meant != algorithm and isinstance(learning, Mapping):
            layer = {**layer, "learning": {name: value for name, value in learning.items() if name != "mixer"}}
        yield layer


@dataclass(frozen=True)
class _Builder:
    """Fills dataclasses by name; of all unions, that of the mixers is decided by the algorithm, not by the names."""

    mixer: type[DataclassInstance]

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
        return _leaf(hint, layers[-1], path)

    def _dataclass(self, kind: Any, layers: Sequence[Any], path: str) -> Any:
        hints, known = get_type_hints(kind), {each.name: each for each in fields(kind)}
        _require_known([name for layer in layers for name in _mapping(layer, path)], known, path)
        arguments = {}
        for name, each in known.items():
            given = [layer[name] for layer in layers if name in layer]
            if given:
                arguments[name] = self.value(hints[name], given, path=_join(path, name))
            elif each.default is MISSING and each.default_factory is MISSING:
                raise SettingsError(f"{_join(path, name)} is missing; set it")
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
        made = [self.value(Task, task, path=_join(path, str(number))) for number, task in enumerate(tasks)]
        sequence: TaskSequence = _made(TaskSequence, {"tasks": tuple(made)}, path)
        return sequence


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


def _leaf(hint: Any, value: object, path: str) -> Any:
    try:
        if isinstance(value, bool) and bool not in (hint, *get_args(hint)):
            raise SettingsError(f"{path} is {_shown(value)}; it must be {_described(hint)}")
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        if get_origin(hint) is Literal and isinstance(value, str):
            raise SettingsError(f"{path} is {value!r}; {suggestion(value, get_args(hint))}") from error
        raise SettingsError(f"{path} is {_shown(value)}; it must be {_described(hint)}") from error


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
        raise SettingsError(f"{path} is {_shown(layer)}; it must hold names and values")
    return layer


def _require_known(names: Iterable[str], known: Iterable[str], path: str) -> None:
    for name in names:
        if name not in known:
            raise SettingsError(f"there is no setting {_join(path, str(name))}; {_known(str(name), known)}")


def _known(name: str, known: Iterable[str]) -> str:
    return suggestion(name, known) if known else "nothing can be set here"


def _place(number: object, num_tasks: int, path: str) -> int:
    if str(number) not in map(str, range(num_tasks)):
        found = f"there are {num_tasks}, counted from 0" if num_tasks else "there are none; name an environment first"
        raise SettingsError(f"there is no {_join(path, str(number))}; {found}")
    return int(str(number))


def _names(kind: Any) -> set[str]:
    return {each.name for each in fields(kind)}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _shown(value: object) -> str:
    """A value as in a file, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6) if _is_plain(value) else repr(value)
    return " ".join(text.removesuffix("...\n").split())


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | list | dict)


# -- from settings to dictionaries


def _plain(value: Any) -> Any:
    if isinstance(value, TaskSequence):
        return _plain(value.tasks)
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.tolist()
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _leaves(value: object, *, path: str) -> Iterable[tuple[str, object]]:
    if isinstance(value, dict) and value:
        inside: Iterable[tuple[object, object]] = value.items()
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        inside = enumerate(value)
    else:
        return [(path, value)]
    return [leaf for name, each in inside for leaf in _leaves(each, path=_join(path, str(name)))]
