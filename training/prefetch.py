"""Items made ahead in the background, so that the one who computes with them does not wait; and how long it waited all the same."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterates over what `make()` yields, which a thread runs at most `ahead` items ahead. A context manager: leaving it ends the thread.

    The order is that of `make`, whose error is raised where its item would have come. A thread is enough: arrays are filled, and batches
    computed with, without Python's lock.
    """

    def __init__(self, make: Callable[[], Iterator[T]], ahead: int) -> None:
        self.waited = 0.0  # seconds that the reader has spent without an item
        self._make, self._left = make, threading.Event()
        self._items: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
        self._thread = threading.Thread(target=self._fill, name="prefetch", daemon=True)

    def __enter__(self) -> Prefetch[T]:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        while self._thread.is_alive():
            self._drain()
            self._thread.join(0.02)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        started = time.perf_counter()
        item, error = self._items.get()
        self.waited += time.perf_counter() - started
        if error is not None:
            self._items.put((None, error))  # whoever asks again hears the same
            raise error
        return item  # type: ignore[return-value]

    def _fill(self) -> None:
        end: BaseException = StopIteration()
        try:
            for item in self._make():
                self._items.put((item, None))
                if self._left.is_set():
                    return
        except BaseException as error:
            end = error
        self._items.put((None, end))

    def _drain(self) -> None:
        try:
            while True:
                self._items.get_nowait()
        except queue.Empty:
            pass
