"""What a program is told beside answers and events."""

from __future__ import annotations

from service.client_notices import Notice, Notices, Served, Warned


def test_a_warning_is_kept_once_and_told_each_time() -> None:
    told: list[Notice] = []
    notices = Notices(told.append)
    for _ in range(2):
        notices.warn("the store is down", "store_unavailable")
    assert notices.warnings == ["the store is down"]
    assert told == [Warned("store_unavailable", "the store is down")] * 2


def test_the_latest_warnings_are_kept_and_no_more() -> None:
    notices = Notices(None)
    for number in range(1000):
        notices.warn(f"{number}")
    assert len(notices.warnings) == 64
    assert notices.warnings[-1] == "999"


def test_a_model_is_another_by_its_fingerprint() -> None:
    first = Served.from_opened({"model": "m", "version": "1", "fingerprint": "f", "task": "classification", "classes": ["a", "b"]})
    second = first.changed({"version": "2", "fingerprint": "g", "classes": ["a", "c"]})
    assert (second.name, second.labels) == ("m", ("a", "c"))
    assert not first.is_like(second)
    assert second.is_like(second.changed({"version": "3", "fingerprint": "g", "classes": ["a", "c"]}))  # the same file under another number
    assert not Served(version="1").is_like(Served(version="2"))
    assert Served.from_opened({"model": "m", "version": "1", "task": "regression", "classes": ["x"]}).labels == ()
