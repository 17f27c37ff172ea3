"""What pyproject.toml declares is what the code imports, and what constraints.txt pins.

On the machine where something was installed by hand a missing line shows nowhere else.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.architecture import Module, read_package

ROOT = Path(__file__).parents[1]
PACKAGE = "neuronsurgery"
DEMO = (f"{PACKAGE}.demo", f"{PACKAGE}.comparison")  # may import what the extra `demo` installs


def declared(*extras: str) -> set[str]:
    """The distributions that an installation with these extras asks for itself."""
    requirements = [Requirement(line) for line in requires(PACKAGE) or []]
    wanted = [each for each in requirements if not each.marker or is_wanted(each, {"", *extras})]
    return {canonicalize_name(each.name) for each in wanted}


def is_wanted(requirement: Requirement, extras: set[str]) -> bool:
    return requirement.marker is not None and any(requirement.marker.evaluate({"extra": each}) for each in extras)


def third_party(module: Module) -> set[str]:
    """The distributions that a module imports; a package that is not installed counts under its own name."""
    tops = {found.target.partition(".")[0] for found in module.imports}
    outside = tops - set(sys.stdlib_module_names) - {PACKAGE, "__future__"}
    return {canonicalize_name(home) for top in outside for home in homes().get(top, [top])}


@cache  # reads the file lists of everything installed
def homes() -> Mapping[str, list[str]]:
    return packages_distributions()


def pinned() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {canonicalize_name(line.partition("==")[0]) for line in lines if "==" in line and not line.startswith("#")}


def test_the_library_imports_only_declared_dependencies() -> None:
    modules = read_package(ROOT / PACKAGE).values()
    undeclared = {each.name: third_party(each) - declared() for each in modules if not each.name.startswith(DEMO)}
    assert {name: missing for name, missing in undeclared.items() if missing} == {}


def test_the_demo_imports_only_declared_dependencies() -> None:
    modules = read_package(ROOT / PACKAGE).values()
    undeclared = {each.name: third_party(each) - declared("demo") for each in modules}
    assert {name: missing for name, missing in undeclared.items() if missing} == {}


def test_every_declared_dependency_is_imported() -> None:
    imported = set().union(*(third_party(each) for each in read_package(ROOT / PACKAGE).values()))
    assert declared("demo") - imported == set()


@pytest.mark.parametrize("extra", ["demo", "dev", "docs", "marl", "smax", "zoo"])
def test_every_requirement_is_pinned(extra: str) -> None:
    assert declared(extra) - pinned() == set()


def test_an_undeclared_import_is_found(tmp_path: Path) -> None:
    (tmp_path / PACKAGE).mkdir()
    source = "import os\nimport pytest\nfrom neuronsurgery import x\nimport not_installed.a\n"
    (tmp_path / PACKAGE / "a.py").write_text(source, encoding="utf-8")
    (module,) = read_package(tmp_path / PACKAGE).values()
    assert third_party(module) == {"pytest", "not-installed"}
    assert third_party(module) - declared() == {"pytest", "not-installed"}
