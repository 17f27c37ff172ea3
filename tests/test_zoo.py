"""What the library promises of models as people publish and train them, measured on a zoo of them."""

from __future__ import annotations

import functools
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch

from tests.assertions import TOLERANCES, assert_unchanged, bank_tensors, state_of
from tests.zoo import SPECIMENS, Specimen
from tests.zoo.measuring import Census, Operated, census, operated, producers_of

SHARE_OF_EACH, SHARE_OF_ALL = 0.80, 0.95
NUM_STEPS = 20
PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
BY_NAME = {specimen.name: specimen for specimen in SPECIMENS}
DECLINING = [name for name, specimen in BY_NAME.items() if specimen.declined]

every_specimen = pytest.mark.parametrize("name", BY_NAME)


@functools.cache  # several tests read one census
def counted(name: str) -> Census:
    return census(BY_NAME[name])


@pytest.fixture(scope="module", params=BY_NAME)
def subject(request: pytest.FixtureRequest) -> Operated:
    """A specimen after its operations; the tests that share it change nothing, but for the last."""
    return operated(BY_NAME[request.param])


# -- how many --------------------------------------------------------------------------------------------------------


@every_specimen
def test_most_hidden_units_are_operable(name: str) -> None:
    found = counted(name)
    assert found.num_hidden > 0
    if found.specimen.exempt is None:
        assert found.share >= SHARE_OF_EACH, found.declined


def test_nearly_all_hidden_units_of_the_zoo_are_operable() -> None:
    found = [counted(name) for name, specimen in BY_NAME.items() if specimen.exempt is None]
    share = sum(each.num_operable for each in found) / sum(each.num_hidden for each in found)
    assert share >= SHARE_OF_ALL


@every_specimen
def test_every_site_holds_hidden_units(name: str) -> None:
    assert counted(name).unseen == ()


@every_specimen
def test_what_is_declined_is_what_has_to_be(name: str) -> None:
    specimen, found = BY_NAME[name], counted(name).declined
    assert {producer: each.reason for producer, each in found.items() if not expected(specimen, producer)} == {}
    missing = [pattern for pattern in specimen.declined if not any(fnmatchcase(each, pattern) for each in found)]
    assert missing == []


@pytest.mark.parametrize("name", DECLINING)
def test_the_reason_for_declining_is_true(name: str) -> None:
    specimen, found = BY_NAME[name], counted(name).declined
    wrong = {each: why.reason for each, why in found.items() if (expected(specimen, each) or "") not in why.reason}
    assert wrong == {}


def expected(specimen: Specimen, producer: str) -> str | None:
    """Words of the true reason for which a producer is declined; None where it should not be."""
    return next((words for pattern, words in specimen.declined.items() if fnmatchcase(producer, pattern)), None)


@pytest.mark.parametrize("name", [name for name, specimen in BY_NAME.items() if specimen.exempt])
def test_an_exempt_model_is_one_whose_declined_units_exceed_what_others_may_leave(name: str) -> None:
    assert counted(name).share < SHARE_OF_EACH


# -- what operating does ---------------------------------------------------------------------------------------------


def test_the_output_is_kept(subject: Operated) -> None:
    tolerance = TOLERANCES[subject.specimen.dtype]
    assert set(subject.errors) == {"train", "eval", "served"}
    assert {mode: error for mode, error in subject.errors.items() if not error <= tolerance} == {}


def test_all_operable_units_were_operated_on_and_half_of_them_again(subject: Operated) -> None:
    at_once, *halves = subject.num_operated
    assert at_once == sum(site.num_units for site in subject.sites.values())
    assert all(0 < half <= at_once / 2 for half in halves) or at_once == 0


def test_slots_hold_fresh_weights(subject: Operated) -> None:
    untouched = dict(subject.specimen.make().named_parameters())
    for site in subject.sites:
        for name in producers_of(subject.model, site):
            assert not torch.equal(untouched[name], subject.first_slots[name]), name


def test_training_goes_on_in_every_active_member_and_in_nothing_frozen(subject: Operated) -> None:
    parameters = dict(subject.model.named_parameters())
    before, frozen = state_of(subject.model), bank_tensors(subject.model)
    reached = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in parameters.items()}
    for _ in range(NUM_STEPS):
        assert bool(subject.step().isfinite())
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                reached[name] |= parameter.grad.abs() > BEYOND_ROUNDING
    for site in subject.sites:
        assert any(bool(reached[name].any()) for name in producers_of(subject.model, site)), f"{site} had no gradient"
    for name, parameter in parameters.items():
        stuck = reached[name] & (parameter.detach() == before[name])
        assert not bool(stuck.any()), f"{int(stuck.sum())} values of {name} had a gradient and did not move"
    assert bool(frozen) == bool(subject.sites)
    for name, value in bank_tensors(subject.model).items():
        if not is_statistic(name):
            assert_unchanged(name, frozen[name], value)


BEYOND_ROUNDING = 1e-9
"""A gradient that Adam turns into an update larger than the rounding of a weight, in float32 too."""


def is_statistic(name: str) -> bool:
    """Running statistics of a BatchNorm, which a bank updates in training as the slots' are updated."""
    return "running" in name or "num_batches" in name


# -- the page --------------------------------------------------------------------------------------------------------


@every_specimen
def test_the_page_gives_the_numbers_of_each_model(name: str) -> None:
    found = counted(name)
    row = re.search(rf"^\| {re.escape(name)} \|.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert row is not None, "make zoo writes the page"
    cells = [cell.strip() for cell in row.group().split("|")]
    assert cells[3:5] == [str(found.num_hidden), str(found.num_operable)], "make zoo writes the page"
