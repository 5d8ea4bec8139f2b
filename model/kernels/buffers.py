"""Large buffers for results, used again once nobody holds them.

A fresh block of memory costs a page fault for every page that is written to, and C libraries give large blocks back to the system as soon
as they are free: at tensors above 32 MB that takes more time than the recurrence itself. A buffer here comes back when the storage of the
tensor that was made of it is released: by autograd, by views, by whoever held it last. The pool never holds more than was in use at once.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]

LARGE = 1 << 20  # bytes; below, the C library's own allocator is as good
ALIGNMENT = 64  # bytes in a cache line
STEPS = 8  # sizes are rounded up to eighths of a power of two, so that batches of unequal length share buffers; what is not written to costs nothing


class Pool:
    """Buffers by size. Safe under threads; a forked child has its own copies of the buffers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Bytes] = []  # the longest unused first
        self._returned: deque[Bytes] = deque()  # a finaliser may run in the middle of anything, even of `empty`: it must take no lock
        self._used = self._peak = 0

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Like `torch.empty` on the CPU, contiguous; its contents are undefined."""
        size = shape.numel() * dtype.itemsize
        if size < LARGE:
            return torch.empty(shape, dtype=dtype)
        buffer = self._take(_rounded(size))
        start = -buffer.ctypes.data % ALIGNMENT
        lent = buffer[start : start + size]  # torch holds this view as long as the storage lives
        weakref.finalize(lent, self._returned.append, buffer).atexit = False
        return torch.from_numpy(lent).view(dtype).view(shape)

    def _take(self, size: int) -> Bytes:
        with self._lock:
            self._collect()
            fitting = [index for index, buffer in enumerate(self._idle) if len(buffer) == size + ALIGNMENT]
            buffer = self._idle.pop(fitting[-1]) if fitting else np.empty(size + ALIGNMENT, np.uint8)
            self._used += len(buffer)
            self._peak = max(self._peak, self._used)
            self._shrink()
            return buffer

    def _collect(self) -> None:
        while self._returned:
            buffer = self._returned.popleft()
            self._used -= len(buffer)
            self._idle.append(buffer)

    def _shrink(self) -> None:
        """Gives back what has been unused longest while more is held than was ever in use at once."""
        while self._idle and self._used + self.idle > self._peak:
            del self._idle[0]

    def release(self) -> None:
        """Gives back all that is not in use."""
        with self._lock:
            self._collect()
            self._idle.clear()
            self._peak = self._used

    def forget_threads(self) -> None:
        """In a forked child the thread that held the lock at that moment does not exist."""
        self._lock = threading.Lock()

    @property
    def idle(self) -> int:
        """Bytes that are held and not in use."""
        return sum(len(buffer) for buffer in self._idle)


def _rounded(size: int) -> int:
    step = max(1, (1 << (size - 1).bit_length()) // (2 * STEPS))
    return -(-size // step) * step


_pool = Pool()
empty, release = _pool.empty, _pool.release
os.register_at_fork(after_in_child=_pool.forget_threads)
