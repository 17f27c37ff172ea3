from __future__ import annotations

import inspect
import pickle

import pytest

from neuronsurgery import errors
from neuronsurgery.errors import SurgeryError, UntraceableError, near_names

CLASSES = [one for _, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, Exception)]
BUILTINS = {
    "CriterionError": ValueError,
    "EvidenceError": ValueError,
    "SiteError": ValueError,
    "PlanError": ValueError,
    "OptimizerError": ValueError,
    "ScheduleError": ValueError,
    "DrawError": ValueError,
    "ModelError": TypeError,
    "UndoError": ValueError,
    "FormatError": ValueError,
    "UntraceableError": RuntimeError,
}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_is_a_surgery_error(cls: type[Exception]) -> None:
    assert issubclass(cls, SurgeryError)


@pytest.mark.parametrize(("name", "builtin"), BUILTINS.items())
def test_error_has_the_builtin_parent_that_a_user_expects(name: str, builtin: type[Exception]) -> None:
    assert issubclass(getattr(errors, name), builtin)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_tree_in_the_docstring_draws_every_error(cls: type[Exception]) -> None:
    assert cls.__name__ in (errors.__doc__ or "")


def test_untraceable_error_carries_reason_file_and_line() -> None:
    error = UntraceableError("branches on a tensor", "net.py", 12)
    assert (error.reason, error.file, error.line) == ("branches on a tensor", "net.py", 12)
    assert str(pickle.loads(pickle.dumps(error))) == "branches on a tensor (net.py:12)"
    assert str(UntraceableError("branches on a tensor")) == "branches on a tensor"


def test_near_names_ignore_the_case() -> None:
    assert near_names("Stagnant", ["stagnant", "dormant"]) == "did you mean 'stagnant'?"


def test_near_names_list_a_few_of_many() -> None:
    text = near_names("zzz", [f"layer{index}" for index in range(20)])
    assert text.endswith("'layer7' and 12 more")


def test_near_names_of_nothing_say_so() -> None:
    assert near_names("fc1", []) == "there are none"
