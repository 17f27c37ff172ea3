"""Settings from files and assignments: what they become, and what is refused in which words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from marl.configuring import Layer, assignments, configure, flat, from_dict, read_file, to_dict, to_yaml
from marl.errors import SettingsError
from marl.run_settings import RunSettings, run_settings
from marl.settings import Algorithm, HardTargets, PolyakTargets, PresetName, QMIXSettings, QPLEXSettings, preset
from tests.marl.runs import KNIFE, PREDATOR_PREY, small

GAME: Layer = {"algorithm": "qmix", "tasks": "predator_prey_tiny"}


def assigned(*texts: str) -> RunSettings:
    return configure(GAME, *assignments(texts))


@pytest.mark.parametrize("algorithm", ["vdn", "qmix", "qplex"])
@pytest.mark.parametrize("base", ["pymarl", "reborn", "pymarl2"])
def test_without_layers_of_its_own_a_run_has_the_presets_settings(algorithm: Algorithm, base: PresetName) -> None:
    settings = configure({"algorithm": algorithm, "tasks": "predator_prey", "preset": base})
    assert settings == run_settings(algorithm, "predator_prey", base=base)
    assert settings.learning == preset(base, algorithm)


@pytest.mark.parametrize(
    "settings",
    [
        small(KNIFE, PREDATOR_PREY),
        small({"algorithm": "vdn"}),
        configure({"algorithm": "qplex", "preset": "reborn", "tasks": "two_step_game"}),
        assigned("learning.targets.rate=0.1", "surgery.every=null", "learning.agent.inputs=[obs]"),
        run_settings("qmix", "matrix_game", payoff=[[1, 2.5], [3, 4]]),
    ],
)
def test_settings_survive_dictionaries_and_files(settings: RunSettings, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(to_yaml(settings), encoding="utf-8")
    assert from_dict(to_dict(settings)) == settings
    assert configure(read_file(path)) == settings


def test_later_layers_go_over_earlier_ones_and_all_over_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "asked.yaml"
    path.write_text("preset: reborn\nlearning:\n  loss: {gamma: 0.5, scale: 2}\nseed: 3\n", encoding="utf-8")
    settings = configure(GAME, read_file(path), *assignments(["learning.loss.gamma=0.25"]))
    assert settings.learning.loss.gamma == 0.25
    assert settings.learning.loss.scale == 2.0
    assert settings.learning.mixer == QMIXSettings(embed_size=64)
    assert settings.seed == 3
    assert configure(read_file(path), {"preset": "pymarl"}, GAME).learning.mixer == QMIXSettings(embed_size=32)


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("learning.optimizer.learning_rate=5e-4", "learning.optimizer.learning_rate", 5e-4),
        ("learning.optimizer.learning_rate='5e-4'", "learning.optimizer.learning_rate", 5e-4),
        ("learning.loss.gamma=1", "learning.loss.gamma", 1.0),
        ("training.num_steps=1e6", "training.num_steps", 1_000_000),
        ("training.num_steps=20_000", "training.num_steps", 20_000),
        ("surgery.threshold=0.5", "surgery.threshold", 0.5),
        ("surgery.every=null", "surgery.every", None),
        ("surgery.method=none", "surgery.method", "none"),
        ("surgery.parts=[agent]", "surgery.parts", ["agent"]),
        ("switch.sync_targets=false", "switch.sync_targets", False),
        ("tasks.0.options.punishment=-5e-1", "tasks.0.options.punishment", -0.5),
        ("tasks.0.name=3", None, "tasks.0.name is 3; it must be text"),
    ],
)
def test_values_become_what_the_setting_is(text: str, path: str | None, expected: object) -> None:
    if path is None:
        with pytest.raises(SettingsError, match=f"^{expected}$"):
            configure(GAME, {"surgery": {"method": "knife", "after_task_change": 0}}, *assignments([text]))
        return
    found = flat(configure(GAME, {"surgery": {"after_task_change": 0}}, *assignments([text])))[path]
    assert found == expected
    assert type(found) is type(expected)


def test_the_mixer_is_the_algorithms_and_others_are_passed_over() -> None:
    asked = configure(GAME, {"learning": {"mixer": {"embed_size": 7}}})
    saved = to_dict(asked)
    assert asked.learning.mixer == QMIXSettings(embed_size=7)
    assert configure(saved, {"algorithm": "qplex"}).learning.mixer == QPLEXSettings()
    assert configure(saved, {"algorithm": "qplex"}, {"algorithm": "qmix"}).learning.mixer == asked.learning.mixer


def test_targets_are_of_the_kind_that_has_the_names() -> None:
    assert assigned("learning.targets.rate=0.1").learning.targets == PolyakTargets(0.1)
    assert assigned("learning.targets.every=5").learning.targets == HardTargets(5)
    both = assigned("learning.targets.rate=0.1", "learning.targets.every=5")
    assert both.learning.targets == HardTargets(5)


def test_tasks_can_be_named_listed_and_changed_one_by_one() -> None:
    settings = configure(GAME, {"tasks": "matrix_game:knife,qtran"}, *assignments(["tasks.1.options.payoff=climbing"]))
    assert [task.options["payoff"] for task in settings.tasks.tasks] == ["knife", "climbing"]
    assert str(settings.tasks) == "knife -> qtran"
    listed = configure(to_dict(settings), {"tasks": [{"name": "a", "environment": "two_step_game"}]})
    assert str(listed.tasks) == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # unknown names
        ("algorithm=qmx", "algorithm is 'qmx'; did you mean 'qmix'?"),
        ("preset=rebron", "preset is 'rebron'; did you mean 'reborn'?"),
        ("tasks=predator_pray", "tasks.0: there is no environment 'predator_pray'; did you mean 'predator_prey'"),
        ("tasks=matrix_game:knives", "tasks.0: there is no payoff 'knives'; did you mean 'knife'?"),
        ("tasks.0.options.punish=1", "tasks.0: predator_prey_tiny has no option 'punish'; did you mean 'punishment'?"),
        ("learning.loss.gama=1", "there is no setting learning.loss.gama; did you mean 'gamma'?"),
        ("learnings.loss.gamma=1", "there is no setting learnings; did you mean 'learning'?"),
        ("learning.targets.rat=1", "there is no setting learning.targets.rat; did you mean 'rate'?"),
        ("surgery.method=knif", "surgery: unknown method 'knif': choose one of 'none', 'knife'"),
        ("learning.agent.kind=gru", "learning.agent.kind is 'gru'; known are 'feed_forward', 'recurrent'"),
        ("tasks.1.name=a", "there is no tasks.1; there are 1, counted from 0"),
        ("tasks.first.name=a", "there is no tasks.first; there are 1, counted from 0"),
        ("surgery.parts=[agents]", "surgery.parts is [agents]; it must be a list of agent or mixer"),
        # wrong types
        ("learning.loss.gamma=high", "learning.loss.gamma is high; it must be a number"),
        ("learning.loss.gamma=true", "learning.loss.gamma is true; it must be a number"),
        ("training.num_steps=1.5", "training.num_steps is 1.5; it must be a whole number"),
        ("surgery.every=none", "surgery.every is none; it must be a whole number or null"),
        ("surgery.method=", "surgery.method is null; it must be text"),
        ("training.clear_replay=maybe", "training.clear_replay is maybe; it must be true or false"),
        ("learning.loss=0.9", "learning.loss is 0.9; it must hold names and values"),
        ("learning.targets=hard", "learning.targets is hard; it must hold names and values"),
        ("tasks=5", "tasks is 5; it must hold names and values"),
        ("tasks.0.options=5", "tasks.0.options is 5; it must hold names and values"),
        ("tasks.0.options.height=high", "tasks.0: height is 'high'; it must be of type int"),
        ("learning.targets={rate: 0.1, every: 5}", "learning.targets has rate, every, which do not go together"),
        # values out of range
        ("seed=-1", "seed is -1: it must be at least 0"),
        ("training.num_parallel=-4", "training: num_parallel is -4: it must be at least 1"),
        ("learning.loss.gamma=2", "learning.loss: gamma is 2.0: it must be from 0.0 to 1.0"),
        ("learning.replay.capacity=-1", "learning.replay: capacity is -1: it must be above 0"),
        ("tasks.0.options.width=-7", "tasks.0: width is -7; it must be at least 1"),
        ("tasks.0.options.num_agents=100", "tasks.0: 104 animals do not fit into 49 cells"),
        ("training.num_parallel=6000", "6000 episodes side by side do not fit into a replay of 5000"),
        # no assignments
        ("surgery.every", "'surgery.every' sets nothing; write it as learning.loss.gamma=0.9"),
        ("=5", "'=5' sets nothing"),
        ("surgery..every=5", "'surgery..every=5' sets nothing"),
        ("surgery.parts=[agent", "surgery.parts is '[agent', which is no YAML"),
    ],
)
def test_bad_settings_are_refused_in_one_line_that_says_where(text: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        assigned(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"tasks": "predator_prey"}, "algorithm is missing; known are 'qmix', 'qplex', 'vdn'"),
        ({"algorithm": "qmix"}, "tasks is missing; set it"),
        ({"algorithm": "qmix", "tasks": [{"name": "a"}]}, "tasks.0.environment is missing; set it"),
        ({"algorithm": "qmix", "tasks": {"0": {"name": "a"}}}, "there is no tasks.0; there are none"),
        ({"algorithm": "qmix", "tasks": []}, "tasks: a sequence needs at least one task"),
    ],
)
def test_what_is_missing_is_said(layer: Layer, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        configure(layer)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no settings can be read from"),
        ("algorithm: [", "is no YAML"),
        ("- algorithm", "holds [algorithm]; it must hold names of settings"),
        ("", "holds null; it must hold names of settings"),
    ],
)
def test_a_file_without_settings_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(SettingsError) as caught:
        read_file(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_cannot_make_objects(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("algorithm: !!python/object/apply:os.getcwd []\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="is no YAML"):
        read_file(path)


def test_a_seed_of_its_own_gives_settings_of_its_own() -> None:
    settings = small()
    assert flat(replace(settings, seed=1)) != flat(settings)
    assert flat(small()) == flat(settings)
