"""Settings of a run from files and from single assignments, checked before anything is built.

Both are *layers*: names and values, nested as the settings are. Later layers go over earlier ones, and all of them over
the preset that they name, so that the order is preset < file < command line. Values are converted to the types of the
settings' fields (`"5e-4"` is a number), and whatever does not fit is refused in one line that says where.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

from marl.environments.tasks import TaskSequence
from marl.errors import SettingsError, suggestion
from marl.filling import Filler, join, leaf, shown
from marl.run_settings import RunSettings
from marl.sequences import SEQUENCES
from marl.settings import Algorithm, PresetName, QMIXSettings, QPLEXSettings, VDNSettings, preset

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "Layer",
    "assignments",
    "configure",
    "flat",
    "from_dict",
    "modern",
    "nested",
    "read_file",
    "to_dict",
    "to_yaml",
]

Layer = Mapping[str, object]
"""Names of settings -> their values, or layers themselves; `preset` is one of the names at the top."""

MIXERS: Mapping[str, type[DataclassInstance]] = {"vdn": VDNSettings, "qmix": QMIXSettings, "qplex": QPLEXSettings}

OLD_SWITCH = ("clear_replay", "restart_exploration")
"""Settings of `training` that `switch` has taken over."""


def configure(*layers: Layer) -> RunSettings:
    """The settings of a run, from layers in rising precedence.

    `algorithm` and `tasks` have to be in one of them. What a layer says of the mixer of another algorithm is passed
    over. `tasks` is a list, the name of one of `marl.sequences.SEQUENCES`, or text as `marl.filling.task_names` reads
    it; a layer that says `{"tasks": {"0": {...}}}` changes one task of the layers before. What a sequence of that name
    sets beside its tasks goes over the preset and under all layers.

    Raises:
        SettingsError: unknown names, wrong types, values out of range, or settings that make no game.

    >>> settings = configure({"algorithm": "qmix", "tasks": "predator_prey"}, {"learning": {"loss": {"gamma": "9e-1"}}})
    >>> settings.learning.loss.gamma, settings.learning.mixer.embed_size
    (0.9, 32)
    >>> configure({"algorithm": "qmix", "tasks": "predator_prey"}, {"learning": {"loss": {"gama": 0.9}}})
    Traceback (most recent call last):
    marl.errors.SettingsError: there is no setting learning.loss.gama; did you mean 'gamma'?
    """
    algorithm = leaf(Algorithm, _latest("algorithm", layers), "algorithm")
    learning = preset(leaf(PresetName, _latest("preset", ({"preset": "pymarl"}, *layers)), "preset"), algorithm)
    chosen: list[Layer] = [
        {name: value for name, value in modern(layer).items() if name != "preset"} for layer in layers
    ]
    base: Layer = {"learning": _plain(learning)}
    chosen = [*_of_sequence(chosen), *chosen]
    builder = Filler(MIXERS[algorithm])
    settings: RunSettings = builder.value(RunSettings, [base, *_without_mixers(chosen, algorithm)], path="")
    return settings


def from_dict(data: Layer) -> RunSettings:
    """The settings that `to_dict` wrote down; what is missing is the preset's, or the default."""
    return configure(data)


def to_dict(settings: RunSettings) -> dict[str, object]:
    """Settings as numbers, strings, lists and dictionaries.

    >>> from marl.run_settings import run_settings
    >>> settings = run_settings("vdn", "matrix_game", payoff="climbing")
    >>> to_dict(settings)["tasks"][0]["options"]
    {'payoff': 'climbing'}
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
        raise SettingsError(f"{path} holds {shown(found)}; it must hold names of settings and their values")
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


def _latest(name: str, layers: Sequence[Layer]) -> object:
    given = [layer[name] for layer in layers if name in layer]
    if not given:
        raise SettingsError(f"{name} is missing; {suggestion('', MIXERS)}")
    return given[-1]


def _of_sequence(layers: Sequence[Layer]) -> Iterator[Layer]:
    """What the sequence that the layers ask for by name sets beside its tasks."""
    named = [layer["tasks"] for layer in layers if isinstance(layer.get("tasks"), str | Sequence)]
    if named and isinstance(named[-1], str) and named[-1] in SEQUENCES:
        yield SEQUENCES[named[-1]].settings


def modern(layer: Layer) -> Layer:
    """A layer with what has another name now under that name.

    What a switch of tasks keeps was said by two settings of training once, and targets were not synced by it.

    >>> modern({"training": {"num_steps": 5, "clear_replay": False}})
    {'training': {'num_steps': 5}, 'switch': {'sync_targets': False, 'keep_episodes': None}}
    """
    training, switch = layer.get("training"), layer.get("switch", {})
    if not isinstance(training, Mapping) or not isinstance(switch, Mapping):
        return layer
    old = {name: leaf(bool, training[name], f"training.{name}") for name in OLD_SWITCH if name in training}
    if not old:
        return layer
    found: dict[str, object] = {"sync_targets": False}
    if "clear_replay" in old:
        found["keep_episodes"] = 0 if old["clear_replay"] else None
    if "restart_exploration" in old:
        found["restart_exploration"] = old["restart_exploration"]
    rest = {name: value for name, value in training.items() if name not in old}
    return {**layer, "training": rest, "switch": {**found, **switch}}


def _without_mixers(layers: Sequence[Layer], algorithm: str) -> Iterator[Layer]:
    """The layers, of which those for another algorithm say nothing about the mixer."""
    meant: object = algorithm
    for layer in layers:
        meant, learning = layer.get("algorithm", meant), layer.get("learning")
        if meant != algorithm and isinstance(learning, Mapping):
            layer = {**layer, "learning": {name: value for name, value in learning.items() if name != "mixer"}}
        yield layer


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
    return [leaf for name, each in inside for leaf in _leaves(each, path=join(path, str(name)))]
