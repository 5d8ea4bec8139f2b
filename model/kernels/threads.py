"""Slices of the data on several threads: on those that torch has already, or on a few of our own.

After a matrix product torch's OpenMP threads spin for a while and wait for the next one. Other threads would wait for their cores, so
slices run on these very threads: `GOMP_parallel`, which GNU's OpenMP library and LLVM's on Linux export, runs a function on the team that
the calling thread already has. Where torch has no such library (macOS, Windows) a small thread pool takes its place; so it does in
a forked child, to which the parent's team has not come along. numba's own `parallel=True` is no choice: its thread layers are unsafe when
two threads call at once (workqueue) or end a forked child (OpenMP).

As many threads work as `torch.set_num_threads` says, and every slice is computed by one of them: the numbers do not depend on how many.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

Work = Callable[[slice, slice], None]
Piece = tuple[slice, slice]

SMALL = 1 << 20  # elements that make another thread worth its while, about a millisecond's work
LINE = 16  # float32 values in a cache line: slices of units start at multiples of it

_Region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = threading.Lock()
_forked = False


def over_slices(work: Work, shape: torch.Size) -> None:
    """Runs `work(rows, units)` over the batch and the units, cut into as many slices as torch has threads."""
    steps, batch, units = shape
    threads = max(1, min(torch.get_num_threads(), steps * batch * units // SMALL))
    row_cuts = _cuts(batch, min(threads, batch), 1)
    unit_cuts = _cuts(units, max(1, threads // max(1, len(row_cuts))), LINE)
    pieces = [(rows, columns) for rows in row_cuts for columns in unit_cuts]
    if len(pieces) <= 1:
        for piece in pieces:
            work(*piece)
    elif team := _team():
        _on_team(team, work, pieces)
    else:
        _on_pool(work, pieces)


def _cuts(size: int, parts: int, multiple: int) -> list[slice]:
    if size == 0:
        return []
    step = -(-size // max(1, parts))
    step = -(-step // multiple) * multiple
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _team() -> Callable[..., None] | None:
    return None if _forked else _find_team()


@functools.cache
def _find_team() -> Callable[..., None] | None:
    """`GOMP_parallel(function, data, threads, flags)` of the OpenMP library that torch itself runs on, or None."""
    if not torch.backends.openmp.is_available() or torch._C.__file__ is None:  # type: ignore[no-untyped-call]
        return None
    try:
        # Looked up through torch's own module, which reaches the libraries that it depends on: another OpenMP in the process has other threads.
        parallel = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    parallel.argtypes, parallel.restype = [_Region, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return parallel


def _on_team(team: Callable[..., None], work: Work, pieces: list[Piece]) -> None:
    todo, faults = iter(pieces), list[BaseException]()  # one iterator: every thread takes the next piece, however many threads there turn out to be

    def region(_: int | None) -> None:
        try:
            for piece in todo:
                work(*piece)
        except BaseException as fault:  # must not leave through the library's frames
            faults.append(fault)

    # All threads of the team, also where fewer have something to do: the library would end the others, to start them again for torch's next operator.
    team(_Region(region), None, torch.get_num_threads(), 0)
    if faults:
        raise faults[0]
    for piece in todo:  # left over where a signal's exception came before `region` could catch it
        work(*piece)


def _on_pool(work: Work, pieces: list[Piece]) -> None:
    others: list[Future[None]] = [_executor(len(pieces)).submit(work, *piece) for piece in pieces[1:]]
    work(*pieces[0])
    for other in others:
        other.result()


def _executor(threads: int) -> ThreadPoolExecutor:
    global _pool, _pool_size
    with _pool_lock:
        if _pool is None or _pool_size < threads:
            # An earlier, smaller pool is left to whoever still waits on it; its idle threads end with it.
            _pool, _pool_size = ThreadPoolExecutor(threads, thread_name_prefix="recurrence"), threads
        return _pool


def _forget_threads() -> None:
    """In a forked child the parent's threads do not exist: start anew."""
    global _forked, _pool, _pool_size, _pool_lock
    _forked, _pool, _pool_size, _pool_lock = True, None, 0, threading.Lock()


os.register_at_fork(after_in_child=_forget_threads)
