"""The recurrence on the CPU, compiled with numba: forward and backward, time-major, masked.

Memory is read and written in the order in which it lies, step by step and row by row: at these sizes the recurrence is bound by memory.
Tensors of size T are read where they are, whatever their strides. The state is the last row written; backwards it is the gradient
of the first state.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from model.kernels.buffers import empty
from model.kernels.compiled import Array, compiled
from model.kernels.threads import over_slices

Strides = tuple[int, ...]

HALVES = (torch.bfloat16, torch.float16)
RELU, TANH, IDENTITY = 0, 1, 2
KINDS = {"relu": RELU, "tanh": TANH, "identity": IDENTITY}

_FACTORIALS = tuple(1 / math.factorial(n) for n in range(13, 1, -1))


@compiled
def _tanh(x: float) -> float:
    """tanh in double precision to 2 units in the last place, without a branch or a call, so that loops over it are vectorised."""
    a = abs(x)
    a = 20.0 if a > 20.0 else a  # tanh is 1 beyond 19.1; NaN passes
    # expm1(2 a) = 2^k expm1(r) + 2^k - 1 with |r| <= ln(2) / 2; adding 1.5 * 2^52 rounds to a whole number, left in the lowest bits.
    rounded = 2.0 * a * 1.4426950408889634 + 6755399441055744.0
    k = rounded - 6755399441055744.0
    r = 2.0 * a - k * 0.693147180369123816490 - k * 1.90821492927058770002e-10  # ln(2) in two parts
    series = 1 / 87178291200.0  # 1 / 14!, of the series of exp
    for reciprocal in _FACTORIALS:
        series = series * r + reciprocal
    scale = np.int64((np.float64(rounded).view(np.int64) + 1023) << 52).view(np.float64)  # 2^k, made in the bits of the exponent
    e = scale * (series * r * r + r) + (scale - 1.0)
    return float(np.copysign(e / (e + 2.0), x))


@compiled
def _copy_rows(x: Array, at: int, row: int, unit: int, block: Array, rows: int, units: int) -> None:
    for b in range(rows):
        for n in range(units):
            block[b * units + n] = x[at + b * row + n * unit]


@compiled
def _step(
    z: Array, z_at: int, z_row: int, before: Array, before_at: int, u: Array, moves: Array, moves_at: int, moves_row: int,
    y: Array, y_at: int, width: int, rows: int, kind: int,
) -> None:  # fmt: skip
    """One time step of some rows. `before` and y have rows of `width`, z rows `z_row` apart; u is as long as the slice of units."""
    units, zero = len(u), z.dtype.type(0)
    for b in range(rows):
        i, j, k = z_at + b * z_row, before_at + b * width, y_at + b * width
        z_b, before_b, y_b = z[i : i + units], before[j : j + units], y[k : k + units]
        if not moves[moves_at + b * moves_row]:
            for n in range(units):
                y_b[n] = before_b[n]
        elif kind == RELU:
            for n in range(units):
                v = z_b[n] + u[n] * before_b[n]
                y_b[n] = zero if v <= zero else v  # written so that NaN stays NaN, as in torch and onnxruntime
        elif kind == TANH:
            for n in range(units):
                y_b[n] = _tanh(z_b[n] + u[n] * before_b[n])
        else:
            for n in range(units):
                y_b[n] = z_b[n] + u[n] * before_b[n]


@compiled
def _forward(
    z: Array, z_strides: Strides, u: Array, h: Array, mask: Array, mask_strides: Strides, y: Array, shape: Strides, kind: int, rows: slice, units: slice
) -> None:
    steps, batch, width = shape
    z_step, z_row, z_unit = z_strides
    mask_step, mask_row = mask_strides
    count, decay, start = rows.stop - rows.start, u[units], rows.start * width + units.start
    block = np.empty(0 if z_unit == 1 else count * len(decay), z.dtype)
    for t in range(steps):
        z_at, y_at, mask_at = t * z_step + rows.start * z_row + units.start * z_unit, start + t * batch * width, t * mask_step + rows.start * mask_row
        before_at = y_at - batch * width
        if z_unit != 1:
            _copy_rows(z, z_at, z_row, z_unit, block, count, len(decay))
            if t == 0:
                _step(block, 0, len(decay), h, start, decay, mask, mask_at, mask_row, y, y_at, width, count, kind)
            else:
                _step(block, 0, len(decay), y, before_at, decay, mask, mask_at, mask_row, y, y_at, width, count, kind)
        elif t == 0:
            _step(z, z_at, z_row, h, start, decay, mask, mask_at, mask_row, y, y_at, width, count, kind)
        else:
            _step(z, z_at, z_row, y, before_at, decay, mask, mask_at, mask_row, y, y_at, width, count, kind)


@compiled
def _step_back(
    gy: Array, gy_at: int, gy_row: int, y: Array, y_at: int, before: Array, before_at: int, u: Array, moves: Array, moves_at: int, moves_row: int,
    gz: Array, gu: Array, g: Array, start: int, width: int, rows: int, kind: int,
) -> None:  # fmt: skip
    """`_step` backwards; g is the gradient of the state, behind this step and then before it."""
    units, zero, one = len(u), gy.dtype.type(0), gy.dtype.type(1)
    for b in range(rows):
        i, j, k, s = gy_at + b * gy_row, before_at + b * width, y_at + b * width, start + b * width
        gy_b, y_b, before_b, gz_b = gy[i : i + units], y[k : k + units], before[j : j + units], gz[k : k + units]
        gu_b, g_b = gu[s : s + units], g[s : s + units]
        if not moves[moves_at + b * moves_row]:
            for n in range(units):
                gz_b[n] = zero
                g_b[n] += gy_b[n]
        elif kind == RELU:
            for n in range(units):
                d = gy_b[n] + g_b[n]
                d = zero if y_b[n] <= zero else d
                gz_b[n] = d
                gu_b[n] += d * before_b[n]
                g_b[n] = d * u[n]
        elif kind == TANH:
            for n in range(units):
                d = (gy_b[n] + g_b[n]) * (one - y_b[n] * y_b[n])
                gz_b[n] = d
                gu_b[n] += d * before_b[n]
                g_b[n] = d * u[n]
        else:
            for n in range(units):
                d = gy_b[n] + g_b[n]
                gz_b[n] = d
                gu_b[n] += d * before_b[n]
                g_b[n] = d * u[n]


@compiled
def _backward(
    gy: Array, gy_strides: Strides, y: Array, u: Array, h: Array, mask: Array, mask_strides: Strides, gz: Array, gu: Array, g: Array,
    shape: Strides, kind: int, rows: slice, units: slice,
) -> None:  # fmt: skip
    steps, batch, width = shape
    gy_step, gy_row, gy_unit = gy_strides
    mask_step, mask_row = mask_strides
    count, decay, start = rows.stop - rows.start, u[units], rows.start * width + units.start
    block = np.empty(0 if gy_unit == 1 else count * len(decay), gy.dtype)
    for t in range(steps - 1, -1, -1):
        gy_at, y_at, mask_at = t * gy_step + rows.start * gy_row + units.start * gy_unit, start + t * batch * width, t * mask_step + rows.start * mask_row
        before_at = y_at - batch * width
        if gy_unit != 1:
            _copy_rows(gy, gy_at, gy_row, gy_unit, block, count, len(decay))
            if t == 0:
                _step_back(block, 0, len(decay), y, y_at, h, start, decay, mask, mask_at, mask_row, gz, gu, g, start, width, count, kind)
            else:
                _step_back(block, 0, len(decay), y, y_at, y, before_at, decay, mask, mask_at, mask_row, gz, gu, g, start, width, count, kind)
        elif t == 0:
            _step_back(gy, gy_at, gy_row, y, y_at, h, start, decay, mask, mask_at, mask_row, gz, gu, g, start, width, count, kind)
        else:
            _step_back(gy, gy_at, gy_row, y, y_at, y, before_at, decay, mask, mask_at, mask_row, gz, gu, g, start, width, count, kind)


@compiled
def _kept(
    before: Array, before_at: int, keep: Array, keep_at: int, keep_row: int, moves: Array, moves_at: int, moves_row: int,
    kept: Array, width: int, rows: int, units: int,
) -> None:  # fmt: skip
    """keep * before for some rows of `width`, which is what a gated step remembers; a row that stands still keeps all."""
    for b in range(rows):
        share = keep[keep_at + b * keep_row] if moves[moves_at + b * moves_row] else keep.dtype.type(1)
        before_b, kept_b = before[before_at + b * width : before_at + b * width + units], kept[b * width : b * width + units]
        for n in range(units):
            kept_b[n] = share * before_b[n]


@compiled
def _forward_gated(
    z: Array, z_strides: Strides, u: Array, h: Array, mask: Array, mask_strides: Strides, keep: Array, keep_strides: Strides, y: Array,
    shape: Strides, kind: int, rows: slice, units: slice,
) -> None:  # fmt: skip
    steps, batch, width = shape
    z_step, z_row, z_unit = z_strides
    mask_step, mask_row = mask_strides
    keep_step, keep_row = keep_strides
    count, decay, start = rows.stop - rows.start, u[units], rows.start * width + units.start
    block, kept = np.empty(0 if z_unit == 1 else count * len(decay), z.dtype), np.empty(count * width, z.dtype)
    for t in range(steps):
        z_at, y_at = t * z_step + rows.start * z_row + units.start * z_unit, start + t * batch * width
        mask_at, keep_at = t * mask_step + rows.start * mask_row, t * keep_step + rows.start * keep_row
        if t == 0:
            _kept(h, start, keep, keep_at, keep_row, mask, mask_at, mask_row, kept, width, count, len(decay))
        else:
            _kept(y, y_at - batch * width, keep, keep_at, keep_row, mask, mask_at, mask_row, kept, width, count, len(decay))
        if z_unit != 1:
            _copy_rows(z, z_at, z_row, z_unit, block, count, len(decay))
            _step(block, 0, len(decay), kept, 0, decay, mask, mask_at, mask_row, y, y_at, width, count, kind)
        else:
            _step(z, z_at, z_row, kept, 0, decay, mask, mask_at, mask_row, y, y_at, width, count, kind)


@compiled
def _share_out(
    g: Array, start: int, before: Array, before_at: int, keep: Array, keep_at: int, keep_row: int, moves: Array, moves_at: int, moves_row: int,
    gk: Array, gk_at: int, products: Array, width: int, rows: int,
) -> None:  # fmt: skip
    """From the gradient of keep * before, in g, to those of keep and of before. Sums are taken by halves: less is rounded away, and they are vectorised."""
    units = len(products)
    for b in range(rows):
        if not moves[moves_at + b * moves_row]:
            gk[gk_at + b] = 0
            continue
        share, s, j = keep[keep_at + b * keep_row], start + b * width, before_at + b * width
        g_b, before_b = g[s : s + units], before[j : j + units]
        for n in range(units):
            products[n] = g_b[n] * before_b[n]
            g_b[n] *= share
        left = units
        while left > 1:
            half = (left + 1) // 2
            low, high = products[:half], products[half:left]
            for n in range(len(high)):
                low[n] += high[n]
            left = half
        gk[gk_at + b] = products[0] if units else 0


@compiled
def _backward_gated(
    gy: Array, gy_strides: Strides, y: Array, u: Array, h: Array, mask: Array, mask_strides: Strides, keep: Array, keep_strides: Strides,
    gz: Array, gu: Array, g: Array, gk: Array, shape: Strides, kind: int, rows: slice,
) -> None:  # fmt: skip
    steps, batch, width = shape
    gy_step, gy_row, gy_unit = gy_strides
    mask_step, mask_row = mask_strides
    keep_step, keep_row = keep_strides
    count, start = rows.stop - rows.start, rows.start * width
    block, kept, products = np.empty(0 if gy_unit == 1 else count * width, gy.dtype), np.empty(count * width, gy.dtype), np.empty(width, gy.dtype)
    for t in range(steps - 1, -1, -1):
        gy_at, y_at, gk_at = t * gy_step + rows.start * gy_row, start + t * batch * width, t * batch + rows.start
        mask_at, keep_at = t * mask_step + rows.start * mask_row, t * keep_step + rows.start * keep_row
        before, before_at = (h, start) if t == 0 else (y, y_at - batch * width)
        _kept(before, before_at, keep, keep_at, keep_row, mask, mask_at, mask_row, kept, width, count, width)
        if gy_unit != 1:
            _copy_rows(gy, gy_at, gy_row, gy_unit, block, count, width)
            _step_back(block, 0, width, y, y_at, kept, 0, u, mask, mask_at, mask_row, gz, gu, g, start, width, count, kind)
        else:
            _step_back(gy, gy_at, gy_row, y, y_at, kept, 0, u, mask, mask_at, mask_row, gz, gu, g, start, width, count, kind)
        _share_out(g, start, before, before_at, keep, keep_at, keep_row, mask, mask_at, mask_row, gk, gk_at, products, width, count)


def forward(z: Tensor, u: Tensor, h: Tensor, mask: Tensor, activation: str) -> Tensor:
    """`recur` for CPU tensors: z (T, B, N), u (N,), h (B, N), mask (T, B) bool -> y (T, B, N). Half types are computed in float32."""
    if z.dtype in HALVES:
        return forward(z.float(), u.float(), h.float(), mask, activation).to(z.dtype)
    y = empty(z.shape, z.dtype)
    arguments = _span(z), z.stride(), _row(u), _row(h), _span(mask), mask.stride(), _row(y), tuple(z.shape), KINDS[activation]
    over_slices(lambda rows, units: _forward(*arguments, rows, units), z.shape)
    return y


def backward(gy: Tensor, y: Tensor, u: Tensor, h: Tensor, mask: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to z, u and h, given the gradient gy of the output y."""
    if y.dtype in HALVES:
        gz, gu, gh = backward(gy.float(), y.float(), u.float(), h.float(), mask, activation)
        return gz.to(y.dtype), gu.to(u.dtype), gh.to(h.dtype)
    gz, gu_rows, gh = empty(y.shape, y.dtype), torch.zeros(h.shape, dtype=h.dtype), torch.zeros(h.shape, dtype=h.dtype)
    outputs = _row(gz), _row(gu_rows), _row(gh)
    arguments = _span(gy), gy.stride(), _row(y), _row(u), _row(h), _span(mask), mask.stride(), *outputs, tuple(y.shape), KINDS[activation]
    over_slices(lambda rows, units: _backward(*arguments, rows, units), y.shape)
    return gz, gu_rows.sum(0), gh


def forward_gated(z: Tensor, u: Tensor, h: Tensor, mask: Tensor, keep: Tensor, activation: str) -> Tensor:
    """`forward` with keep (T, B) in the type of z, or float32 beside a half type."""
    if z.dtype in HALVES:
        return forward_gated(z.float(), u.float(), h.float(), mask, keep.float(), activation).to(z.dtype)
    y = empty(z.shape, z.dtype)
    inputs = _span(z), z.stride(), _row(u), _row(h), _span(mask), mask.stride(), _span(keep), keep.stride()
    arguments = *inputs, _row(y), tuple(z.shape), KINDS[activation]
    over_slices(lambda rows, units: _forward_gated(*arguments, rows, units), z.shape)
    return y


def backward_gated(gy: Tensor, y: Tensor, u: Tensor, h: Tensor, mask: Tensor, keep: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to z, u, h and keep, given the gradient gy of the output y. Slices are of rows alone: that of keep is a sum over units."""
    if y.dtype in HALVES:
        gz, gu, gh, gk = backward_gated(gy.float(), y.float(), u.float(), h.float(), mask, keep.float(), activation)
        return gz.to(y.dtype), gu.to(u.dtype), gh.to(h.dtype), gk.to(keep.dtype)
    steps, batch, units = y.shape
    gz, gu_rows, gh = empty(y.shape, y.dtype), torch.zeros(h.shape, dtype=h.dtype), torch.zeros(h.shape, dtype=h.dtype)
    gk = torch.zeros(keep.shape, dtype=keep.dtype)
    inputs = _span(gy), gy.stride(), _row(y), _row(u), _row(h), _span(mask), mask.stride(), _span(keep), keep.stride()
    arguments = *inputs, _row(gz), _row(gu_rows), _row(gh), _row(gk), tuple(y.shape), KINDS[activation]
    over_slices(lambda rows, _: _backward_gated(*arguments, rows), torch.Size((steps * units, batch, 1)))
    return gz, gu_rows.sum(0), gh, gk


def _row(x: Tensor) -> Array:
    """A tensor as one row of numbers: itself where it is contiguous (always so for those of size T), else a copy."""
    return x.detach().contiguous().view(-1).numpy()


def _span(x: Tensor) -> Array:
    """The memory from the first to the last element of x, whatever its strides: nothing is copied."""
    if x.is_contiguous():
        return _row(x)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.detach().as_strided((extent,), (1,)).numpy()
