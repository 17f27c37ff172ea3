"""The layout of the package, as rules over its source: who may import whom, what must be documented.

Each rule is a function from modules to violations. It runs twice: on the package, where it must find nothing,
and on a few lines that break it, where it must find just that.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

from tests.architecture import Import, Module, cycle, imported_modules, module_called, read_package

ROOT = Path(__file__).parents[1]
PACKAGE = "neuronsurgery"
BACKEND = f"{PACKAGE}.pytorch"
FRAMEWORKS = ("torch", "jax", "jaxlib", "flax", "tensorflow", "array_api_compat.torch")

# The exceptions, all of them. The door is the one file of the core that reaches a backend, in its functions.
DOOR = f"{PACKAGE}.surgery"
# Applications are users of the library that travel with it: they may import all of it, none of it them.
APPLICATIONS = (f"{PACKAGE}.__main__", f"{PACKAGE}.cli", f"{PACKAGE}.demo", f"{PACKAGE}.comparison")

STAGES = [
    *("errors", "sites", "evidence", "criteria", "scores", "selection", "plans"),
    *("composites", "reports", "backend", "surgery"),
]

Modules = Mapping[str, Module]
Rule = Callable[[Modules], list[str]]


def within(name: str, *packages: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def core(modules: Modules) -> Iterable[Module]:
    return [module for name, module in modules.items() if not within(name, BACKEND, *APPLICATIONS)]


def offense(module: Module, found: Import) -> str:
    return f"{module.name}:{found.line} imports {found.target}"


def core_imports_a_framework(modules: Modules) -> list[str]:
    """Not even for type checkers: an annotation that names `torch.Tensor` is a promise about torch."""
    return [
        offense(module, found)
        for module in core(modules)
        for found in module.imports
        if any(found.reaches(framework) for framework in FRAMEWORKS) or found.target == "<computed>"
    ]


def backend_imports_another_framework(modules: Modules) -> list[str]:
    others = [framework for framework in FRAMEWORKS if "torch" not in framework]
    return [
        offense(module, found)
        for name, module in modules.items()
        for found in module.imports
        if within(name, BACKEND) and any(found.reaches(other) for other in others)
    ]


def core_imports_a_backend_outside_the_door(modules: Modules) -> list[str]:
    return [
        offense(module, found)
        for module in core(modules)
        for found in module.imports
        if found.reaches(BACKEND) and not (module.name == DOOR and (found.in_function or found.typing_only))
    ]


def library_imports_an_application(modules: Modules) -> list[str]:
    return [
        offense(module, found)
        for name, module in modules.items()
        for found in module.imports
        if not within(name, *APPLICATIONS) and any(found.reaches(each) for each in APPLICATIONS)
    ]


def anything_imports_marl(modules: Modules) -> list[str]:
    return [offense(module, found) for module in modules.values() for found in module.imports if found.reaches("marl")]


def imports_form_a_cycle(modules: Modules) -> list[str]:
    found = cycle(modules)
    return [" -> ".join(found)] if found else []


def print_or_hasattr_is_called(modules: Modules) -> list[str]:
    """Output goes through values and the command line's console; what a thing is, its type says."""
    return [
        f"{module.name}:{call.lineno} calls {getattr(call.func, 'id', '?')}"
        for module in modules.values()
        for call in module.calls("print", "hasattr")
    ]


# Rule, the lines that break it (file -> source), and how many violations it must find in them.
RULES: list[tuple[Rule, dict[str, str], int]] = [
    (
        core_imports_a_framework,
        {"sites.py": "import torch.nn as nn\ndef f():\n    from jax import numpy\n"},
        2,
    ),
    (core_imports_a_framework, {"sites.py": "import importlib\nimportlib.import_module('torch')\n"}, 1),
    (core_imports_a_framework, {"sites.py": "def f(name):\n    return __import__(name)\n"}, 1),
    (core_imports_a_framework, {"surgery.py": "if TYPE_CHECKING:\n    from torch import Tensor\n"}, 1),
    (core_imports_a_framework, {"sites.py": "from array_api_compat import torch\n"}, 1),
    (core_imports_a_framework, {"pytorch/sites.py": "import torch\n", "demo/run.py": "import torch\n"}, 0),
    (core_imports_a_framework, {"sites.py": "import torchless\nfrom neuronsurgery.pytorch import x\n"}, 0),
    (backend_imports_another_framework, {"pytorch/sites.py": "import torch\nimport jax.numpy\n"}, 1),
    (
        core_imports_a_backend_outside_the_door,
        {"sites.py": "def f():\n    import neuronsurgery.pytorch\n"},
        1,
    ),
    (core_imports_a_backend_outside_the_door, {"surgery.py": "from neuronsurgery import pytorch\n"}, 1),
    (core_imports_a_backend_outside_the_door, {"surgery.py": "from . import pytorch\n"}, 1),
    (core_imports_a_backend_outside_the_door, {"surgery.py": "def f():\n    from .pytorch import x\n"}, 0),
    (library_imports_an_application, {"pytorch/sites.py": "from neuronsurgery.demo import run\n"}, 1),
    (library_imports_an_application, {"cli.py": "def f():\n    from neuronsurgery.demo import run\n"}, 0),
    (anything_imports_marl, {"demo/run.py": "def f():\n    import marl.training\n"}, 1),
    (
        imports_form_a_cycle,
        {"a.py": "from neuronsurgery import b\n", "b.py": "def f():\n    from .a import x\n"},
        1,
    ),
    (
        imports_form_a_cycle,
        {"a.py": "from .b import x\n", "b.py": "if TYPE_CHECKING:\n    from .a import y\n"},
        0,
    ),
    (print_or_hasattr_is_called, {"a.py": "print(hasattr(1, 'x'))\n", "b.py": "self.print()\n"}, 2),
]


@pytest.mark.parametrize(("rule", "sources", "expected"), RULES)
def test_rule_finds_what_breaks_it(rule: Rule, sources: dict[str, str], expected: int, tmp_path: Path) -> None:
    found = rule(write_package(tmp_path / PACKAGE, sources))
    assert len(found) == expected, found


@pytest.fixture(scope="module")
def package() -> Modules:
    return read_package(ROOT / PACKAGE)


@pytest.mark.parametrize("rule", dict.fromkeys(rule for rule, _, _ in RULES), ids=lambda rule: rule.__name__)
def test_no_module_breaks_rule(rule: Rule, package: Modules) -> None:
    assert rule(package) == []


def test_core_has_the_files_of_the_design() -> None:
    missing = [name for name in STAGES if not (ROOT / PACKAGE / f"{name}.py").is_file()]
    assert missing == []


def test_the_door_is_the_one_way_into_the_backend() -> None:
    """Guards the rules above against a rename, after which they would hold for want of anything to check."""
    modules = read_package(ROOT / PACKAGE)
    assert any(within(target, BACKEND) for target in imported_modules(modules[DOOR], modules))


def test_every_file_of_the_backend_has_one_place_in_the_table_of_files() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("| file | does |")[2].partition("\n\n")[0]
    listed = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split(" | ")[0])]
    files = [path.stem for path in (ROOT / PACKAGE / "pytorch").glob("*.py") if path.stem != "__init__"]
    assert sorted(listed) == sorted(files)


@pytest.mark.parametrize("module", [PACKAGE, *(f"{PACKAGE}.{name}" for name in STAGES)])
def test_importing_the_core_does_not_load_a_framework(module: str) -> None:
    assert frameworks_loaded_by(f"import {module}") == []


def test_a_loaded_framework_is_found() -> None:
    assert frameworks_loaded_by("import sys; sys.modules['jax'] = sys") == ["jax"]


def frameworks_loaded_by(code: str) -> list[str]:
    report = f"{code}\nimport sys\nprint(*sorted({set(FRAMEWORKS)!r} & set(sys.modules)))"
    command = [sys.executable, "-W", "error", "-c", report]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.split()


@pytest.mark.parametrize("module", [PACKAGE, DOOR])
def test_every_exported_name_is_public_documented_and_in_the_reference(module: str) -> None:
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert undocumented(importlib.import_module(module), reference) == []


def undocumented(module: types.ModuleType, reference: str) -> list[str]:
    return [
        f"{name}: {problem}"
        for name in module.__all__
        for problem in problems(name, getattr(module, name, None), reference)
    ]


def problems(name: str, value: object, reference: str) -> Iterable[str]:
    if re.fullmatch("__[a-z]+__", name):  # `__version__` and its like explain themselves
        return
    if name.startswith("_"):
        yield "is exported, but private by its name"
    if value is None:
        yield "is exported, but not there"
    elif not has_docstring(value):
        yield "has no docstring"
    if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", reference):
        yield "is not in docs/reference.md"


def has_docstring(value: object) -> bool:
    if not (callable(value) or isinstance(value, types.ModuleType)):
        return False  # a constant has only the docstring of its class
    signature = f"{getattr(value, '__name__', '')}("  # which @dataclass writes where there is no docstring
    return bool(value.__doc__) and not (dataclasses.is_dataclass(value) and value.__doc__.startswith(signature))


def test_undocumented_names_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "from dataclasses import dataclass\n"
        "def good():\n    'Documented.'\n"
        "def bare(): ...\n"
        "def elsewhere():\n    'Documented, but not in the reference.'\n"
        "def _private():\n    'Documented.'\n"
        "@dataclass\nclass Automatic:\n    x: int\n"
        "number = 3\n"
        "__version__ = '1'\n"
        "__all__ = ['good', 'bare', 'elsewhere', '_private', 'Automatic', 'number', 'gone', '__version__']\n"
    )
    (tmp_path / "half_documented.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("half_documented")
    reference = "`good(x)` `bare` `elsewhere_not` `_private` `Automatic` `number` `gone`"
    assert undocumented(module, reference) == [
        "bare: has no docstring",
        "elsewhere: is not in docs/reference.md",
        "_private: is exported, but private by its name",
        "Automatic: has no docstring",
        "number: has no docstring",
        "gone: is exported, but not there",
    ]


def test_a_name_inside_a_module_is_an_import_of_the_module() -> None:
    names = {"a", "a.b"}
    assert [module_called(target, names) for target in ("a.b.f", "a.b", "a.c", "z.b")] == [
        "a.b",
        "a.b",
        "a",
        None,
    ]


def test_relative_imports_are_read_as_absolute_ones(tmp_path: Path) -> None:
    sources = {
        "__init__.py": "from .sites import Site\n",
        "pytorch/__init__.py": "from . import sites\n",
        "pytorch/sites.py": "from ..sites import *\n",
    }
    modules = write_package(tmp_path / PACKAGE, sources)
    assert {name: [found.target for found in module.imports] for name, module in modules.items()} == {
        PACKAGE: [f"{PACKAGE}.sites.Site"],
        BACKEND: [f"{BACKEND}.sites"],
        f"{BACKEND}.sites": [f"{PACKAGE}.sites"],
    }


def write_package(folder: Path, sources: Mapping[str, str]) -> dict[str, Module]:
    for name, source in {"__init__.py": "", **sources}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source, encoding="utf-8")
    return read_package(folder)
