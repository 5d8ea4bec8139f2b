"""Items made ahead: all of them in order, errors in their place, nothing left running."""

import threading
import time
from collections.abc import Iterator

import pytest

from training.prefetch import Prefetch


def _running() -> bool:
    return any(thread.name == "prefetch" for thread in threading.enumerate())


def test_gives_everything_in_order_and_then_ends() -> None:
    with Prefetch(lambda: iter(range(50)), 4) as items:
        assert list(items) == list(range(50))
        assert list(items) == []
    assert not _running()


def test_runs_ahead_but_not_further_than_it_may() -> None:
    made: list[int] = []

    def make() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    with Prefetch(make, 3) as items:
        next(items)
        deadline = time.monotonic() + 5
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(made) == 5  # one taken, three ready, one in hand
    assert not _running()


def test_an_error_comes_in_its_place() -> None:
    def make() -> Iterator[int]:
        yield 1
        raise ValueError("broken clip")

    with Prefetch(make, 4) as items:
        assert next(items) == 1
        for _ in range(2):
            with pytest.raises(ValueError, match="broken clip"):
                next(items)


def test_leaving_early_ends_the_thread_even_in_an_error() -> None:
    def interrupted() -> None:
        with Prefetch(lambda: iter(range(10**9)), 2) as items:
            next(items)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not _running()


def test_says_how_long_it_kept_its_reader_waiting() -> None:
    def make() -> Iterator[int]:
        for i in range(3):
            time.sleep(0.05)
            yield i

    with Prefetch(make, 2) as items:
        list(items)
        assert 0.1 < items.waited < 5
    with Prefetch(lambda: iter(range(3)), 3) as items:
        time.sleep(0.1)
        list(items)
        assert items.waited < 0.05
