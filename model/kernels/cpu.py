"""The recurrence on the CPU, compiled with numba: forward and backward, time-major, masked.

The compiled loops release the GIL and are run on slices of the batch by a small thread pool of our own rather than by numba's
`parallel=True`: its thread layers are unsafe when two threads call at once (workqueue) or after a fork (OpenMP). Ours is safe in
both, and follows `torch.set_num_threads`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

HALVES = (torch.bfloat16, torch.float16)
SMALL = 1 << 14  # elements below which handing work to another thread costs more than it saves
RELU, TANH, IDENTITY = 0, 1, 2
KINDS = {"relu": RELU, "tanh": TANH, "identity": IDENTITY}
LINE = 16  # float32 values in a cache line: slices of units start at multiples of it

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
_pool_lock = threading.Lock()


def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """`numba.njit` with the machine code cached on disk, where the installation leaves a place for it."""
    try:
        compiled = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # a read-only install with no writable cache folder: compile once per process
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return compiled


@_compiled
def _forward(z: Array, u: Array, h0: Array, mask: Array, y: Array, kind: int, rows: slice, units: slice) -> None:
    zero = z.dtype.type(0)
    first, count = units.start, units.stop - units.start
    decay = u[units].copy()
    for b in range(rows.start, rows.stop):
        h = h0[b, units].copy()
        for t in range(z.shape[0]):
            z_t, y_t = z[t, b, first : first + count], y[t, b, first : first + count]
            if mask[t, b]:
                for n in range(count):
                    v = z_t[n] + decay[n] * h[n]
                    if kind == RELU:
                        v = zero if v <= zero else v  # written so that NaN stays NaN, as in torch and onnxruntime
                    elif kind == TANH:
                        v = np.tanh(v)
                    h[n] = v
                    y_t[n] = v
            else:
                for n in range(count):
                    y_t[n] = h[n]


@_compiled
def _backward(gy: Array, y: Array, u: Array, h0: Array, mask: Array, gz: Array, gu_rows: Array, gh: Array, kind: int, rows: slice, units: slice) -> None:
    zero, one = gy.dtype.type(0), gy.dtype.type(1)
    first, count = units.start, units.stop - units.start
    decay = u[units].copy()
    for b in range(rows.start, rows.stop):
        g = np.zeros(count, gy.dtype)
        gu = np.zeros(count, gy.dtype)
        for t in range(gy.shape[0] - 1, -1, -1):
            gy_t, gz_t = gy[t, b, first : first + count], gz[t, b, first : first + count]
            if mask[t, b]:
                y_t = y[t, b, first : first + count]
                before = y[t - 1, b, first : first + count] if t > 0 else h0[b, first : first + count]
                for n in range(count):
                    d = gy_t[n] + g[n]
                    if kind == RELU:
                        d = zero if y_t[n] <= zero else d
                    elif kind == TANH:
                        d *= one - y_t[n] * y_t[n]
                    gz_t[n] = d
                    gu[n] += d * before[n]
                    g[n] = d * decay[n]
            else:
                for n in range(count):
                    gz_t[n] = zero
                    g[n] += gy_t[n]
        gu_rows[b, units] = gu
        gh[b, units] = g


def forward(z: Tensor, u: Tensor, h: Tensor, mask: Tensor, activation: str) -> Tensor:
    """`recur` for CPU tensors: z (T, B, N), u (N,), h (B, N), mask (T, B) bool -> y (T, B, N). Half types are computed in float32."""
    if z.dtype in HALVES:
        return forward(z.float(), u.float(), h.float(), mask, activation).to(z.dtype)
    y = torch.empty(z.shape, dtype=z.dtype)
    arrays = [_numpy(x) for x in (z, u, h, mask, y)]
    kind = KINDS[activation]
    _over_slices(lambda rows, units: _forward(*arrays, kind, rows, units), z.shape)
    return y


def backward(gy: Tensor, y: Tensor, u: Tensor, h: Tensor, mask: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to z, u and h, given the gradient gy of the output y."""
    if y.dtype in HALVES:
        gz, gu, gh = backward(gy.float(), y.float(), u.float(), h.float(), mask, activation)
        return gz.to(y.dtype), gu.to(u.dtype), gh.to(h.dtype)
    gz, gu_rows, gh = torch.empty(y.shape, dtype=y.dtype), torch.empty(h.shape, dtype=h.dtype), torch.empty(h.shape, dtype=h.dtype)
    arrays = [_numpy(x) for x in (gy, y, u, h, mask, gz, gu_rows, gh)]
    kind = KINDS[activation]
    _over_slices(lambda rows, units: _backward(*arrays, kind, rows, units), y.shape)
    return gz, gu_rows.sum(0), gh


def _numpy(x: Tensor) -> Array:
    return x.detach().contiguous().numpy()


def _over_slices(work: Callable[[slice, slice], None], shape: torch.Size) -> None:
    """Runs `work(rows, units)` over the batch and the units, cut into as many slices as torch has threads."""
    steps, batch, units = shape
    threads = 1 if steps * batch * units < SMALL else torch.get_num_threads()
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
