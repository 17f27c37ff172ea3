"""The examples in the docstrings of the core run and show what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = [
    *("errors", "values", "tables", "sites", "evidence", "combining", "measuring", "choosing", "criteria"),
    *("scores", "selection", "plans", "reports", "triggers", "schedules", "methods"),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_show_what_they_say(name: str) -> None:
    module = importlib.import_module(f"neuronsurgery.{name}")
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", [name for name in MODULES if name != "combining"])
def test_module_has_an_example(name: str) -> None:
    assert doctest.testmod(importlib.import_module(f"neuronsurgery.{name}")).attempted > 0
