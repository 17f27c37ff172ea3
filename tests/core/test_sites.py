from __future__ import annotations

import pytest

from neuronsurgery.errors import SiteError
from neuronsurgery.sites import Site, Sites
from tests.core_values import sites_of

REASON = "range-bearing: sigmoid"


def test_sites_print_as_a_table_with_the_declined_and_their_reasons() -> None:
    text = str(sites_of(fc1=64, fc2=1, declined={"gate": REASON, "head": "no activation", "out": "no activation"}))
    lines = text.splitlines()
    assert lines[0] == "2 sites, 65 units"
    assert lines[3].split() == ["|", "fc1", "|", "|", "Linear", "|", "relu", "|", "64", "|", "0", "|"]
    assert lines[5:] == ["declined: gate: range-bearing: sigmoid", "declined: head, out: no activation"]


def test_no_sites_print_without_a_table() -> None:
    assert str(Sites({})) == "0 sites, 0 units"


def test_names_with_brackets_and_colons_print_as_they_are() -> None:
    name = "blocks[0].:smile:.[red]fc"
    assert name in str(Sites({name: Site(name, "", "Linear", "relu", 2)}))


def test_subset_keeps_the_order_of_the_model() -> None:
    assert list(sites_of(a=1, b=1, c=1).subset(["c", "a"])) == ["a", "c"]


def test_subset_takes_a_single_name() -> None:
    assert list(sites_of(fc1=1, fc2=1).subset("fc2")) == ["fc2"]


def test_subset_of_an_unknown_site_offers_near_names() -> None:
    with pytest.raises(SiteError, match=r"no site is named 'fc3': did you mean 'fc2' or 'fc1'\?"):
        sites_of(fc1=1, fc2=1, body=1).subset(["fc3"])


def test_subset_of_an_unknown_site_lists_the_known_where_none_is_near() -> None:
    with pytest.raises(SiteError, match="no site is named 'critic': known: 'fc1', 'fc2'"):
        sites_of(fc1=1, fc2=1).subset(["critic"])


def test_subset_of_a_declined_producer_gives_its_reason() -> None:
    with pytest.raises(SiteError, match=f"'gate' is no site, it was declined: {REASON}"):
        sites_of(fc1=1, declined={"gate": REASON}).subset(["gate"])
