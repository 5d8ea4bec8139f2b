"""One address or several: read, and gone through in turn."""

from __future__ import annotations

import pytest

from service.client_addresses import Addresses, read_addresses
from service.client_errors import ClientError

THREE = ("http://a:1", "http://b:2", "http://c:3")


def test_one_address_or_a_list_is_read() -> None:
    assert read_addresses("http://a:1/") == ("http://a:1",)
    assert read_addresses(["http://a:1", "https://b/svc/"]) == ("http://a:1", "https://b/svc")
    for wrong in ([], ["http://a:1", "b:2"], "a:1", ["http://a:1?x=1"]):
        with pytest.raises(ClientError, match="http://127"):
            read_addresses(wrong)


def test_a_round_begins_where_it_worked_and_goes_to_all() -> None:
    addresses = Addresses(THREE)
    for url in THREE:
        addresses.use(url)
        assert addresses.current == url
        assert addresses.round()[0] == url
        assert sorted(addresses.round()) == sorted(THREE)


def test_what_goes_away_comes_last() -> None:
    addresses = Addresses(THREE)
    left = addresses.current
    addresses.leave()
    assert addresses.round()[-1] == left
    alone = Addresses(THREE[:1])
    alone.leave()
    assert alone.round() == ["http://a:1"]


def test_streams_begin_at_different_ones() -> None:
    assert {Addresses(THREE).current for _ in range(200)} == set(THREE)
