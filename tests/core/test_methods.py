"""The registry of methods agrees with the functions themselves, and its page with the registry."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from benchmarks.methods import PAGE, page_with_table
from neuronsurgery import surgery
from neuronsurgery.methods import METHODS, Method

SHARED = {"evidence", "optimizer", "sites", "verify", "generator", "init", "example", "initial"}
"""Arguments that methods share, whose defaults are nothing in particular."""


def defaults_of(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


@pytest.mark.parametrize("name", METHODS)
def test_method_of_the_registry_is_public(name: str) -> None:
    assert name in surgery.__all__


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_defaults_of_the_registry_are_those_of_the_signature(method: Method) -> None:
    defaults = defaults_of(getattr(surgery, method.name))
    own = {name: value for name, value in defaults.items() if name not in SHARED}
    assert dict(method.defaults) == own


def test_page_holds_the_table_of_the_registry() -> None:
    page = Path(PAGE).read_text(encoding="utf-8")
    assert page == page_with_table(page), "run: make methods"


def test_no_cell_breaks_the_table() -> None:
    broken = [m.name for m in METHODS.values() if any("|" in str(v) for v in vars(m).values())]
    assert broken == []
