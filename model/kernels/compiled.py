"""Loops compiled by numba, and the threads that run them on slices of the data.

The loops release the GIL and are run on slices by a small thread pool of our own rather than by numba's `parallel=True`: its thread
layers are unsafe when two threads call at once (workqueue) or after a fork (OpenMP). Ours is safe in both, and follows
`torch.set_num_threads`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numba
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

# Elements that make another thread worth its while, about a millisecond's work: where torch's own threads have just been busy they still
# spin, and ours wait for a core.
SMALL = 1 << 20
LINE = 16  # float32 values in a cache line: slices of units start at multiples of it

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = threading.Lock()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`numba.njit` with the machine code cached on disk, where the installation leaves a place for it."""
    try:
        made = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # a read-only install with no writable cache folder: compile once per process
        made = numba.njit(nogil=True, error_model="numpy")(function)
    return made


def over_slices(work: Callable[[slice, slice], None], shape: torch.Size) -> None:
    """Runs `work(rows, units)` over the batch and the units, cut into as many slices as torch has threads."""
    steps, batch, units = shape
    threads = max(1, min(torch.get_num_threads(), steps * batch * units // SMALL))
    row_cuts = _cuts(batch, min(threads, batch), 1)
    unit_cuts = _cuts(units, max(1, threads // max(1, len(row_cuts))), LINE)
    pieces = [(rows, columns) for rows in row_cuts for columns in unit_cuts]
    if len(pieces) <= 1:
        for piece in pieces:
            work(*piece)
        return
    others: list[Future[None]] = [_executor(threads).submit(work, *piece) for piece in pieces[1:]]
    work(*pieces[0])
    for other in others:
        other.result()


def _cuts(size: int, parts: int, multiple: int) -> list[slice]:
    if size == 0:
        return []
    step = -(-size // max(1, parts))
    step = -(-step // multiple) * multiple
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _executor(threads: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _pool_lock:
        if _pool is None or _pool_size < threads:
            # An earlier, smaller pool is left to whoever still waits on it; its idle threads end with it.
            _pool, _pool_size = ThreadPoolExecutor(threads, thread_name_prefix="recurrence"), threads
        return _pool


def _forget_pool() -> None:
    """In a forked child the parent's threads do not exist: start anew."""
    global _pool, _pool_size, _pool_lock
    _pool, _pool_size, _pool_lock = None, 0, threading.Lock()


os.register_at_fork(after_in_child=_forget_pool)
