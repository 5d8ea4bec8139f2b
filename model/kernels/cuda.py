"""The recurrence on a GPU, in Triton: forward and backward in one kernel each, time-major, masked.

Every thread owns one (row, unit) pair, keeps its u and its state in registers and walks over time. Nothing else is shared between
steps, so each tensor crosses the memory bus once: forward reads z and writes y, backward reads gy and y and writes gz. In float32 that
is 8 and 12 bytes a step and pair; on a card of 3 TB/s (T, B, N) = (784, 32, 128) takes at least 9 and 13 microseconds.

What can keep it from that is latency. A step of the chain takes about 15 cycles (multiply-add, maximum, select), a load from memory
500 or more, and no load depends on the chain: so loads run `AHEAD` steps before it, in a ring of registers. By Little's law some 32 KB
must be in flight on each multiprocessor; `_plan` picks `AHEAD` to get there, and small blocks, so that few rows still reach all
multiprocessors. It is a formula and no search: what is chosen does not depend on what was timed. A small batch cannot fill the pipe,
for registers end at 32 steps: (784, 32, 128) keeps 4 KB in flight and is bound by the latency of 32 steps' loads, about as long as the
23 instructions a step takes (counted in sm_90's machine code). None of these times is measured yet.

Half types are read and written as they are; state and sums are float32 in registers (float64 for float64). Offsets are 64 bits wide.
With `TRITON_INTERPRET=1` set before triton is imported the same code runs on CPU tensors, slowly: that is how it is tested without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

IN_FLIGHT = 32 << 10  # bytes on their way to one multiprocessor that hide the latency of its memory
GROUP = 8  # loads issued together
MANY = 32 << 7  # threads per multiprocessor beyond which blocks of four warps do: the number of blocks there is limited too

# One compilation serves all lengths, batches and strides; that units lie side by side is worth knowing.
_SIZES = ("T", "pairs", "N", "zt", "zb", "mt", "mb", "kt", "kb", "yt", "yb", "gt", "gb", "dt", "db", "hb")
_PLACES = ("z", "u", "h", "mask", "keep", "y", "gy", "gz", "gu", "gh", "gk", "zn", "un", "hn", "yn", "gn", "dn")


@triton.jit
@no_type_check
def _tanh(x):
    """libdevice's is not there under the interpreter. Near 0, where 1 - exp(-2x) cancels, a continued fraction good to 2e-13."""
    s = x * x
    e = tl.exp(-2.0 * tl.abs(x))
    near = tl.abs(x) < 0.5
    above = tl.where(near, x * (10395.0 + s * (1260.0 + 21.0 * s)), tl.where(x < 0, e - 1.0, 1.0 - e))
    below = tl.where(near, 10395.0 + s * (4725.0 + s * (210.0 + s)), 1.0 + e)
    return above / below


@triton.jit
@no_type_check
def _pairs(pairs, N, BLOCK: tl.constexpr):
    """Row and unit of each thread, and whether there is such a pair."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return i // N, i % N, i < pairs


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PLACES)
@no_type_check
def _forward(
    z, u, h, mask, keep, y, T, pairs, N, zt, zb, zn, un, hb, hn, mt, mb, kt, kb, yt, yb, yn,
    WIDE: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    b, n, there = _pairs(pairs, N, BLOCK)
    decay = tl.load(u + n * un, mask=there, other=0.0).to(WIDE)
    state = tl.load(h + b * hb + n * hn, mask=there, other=0.0).to(WIDE)
    z += b * zb + n * zn
    mask += b * mb
    keep += b * kb
    y += b * yb + n * yn

    nothing = tl.zeros_like(decay)
    inputs, moves, shares = (), (), ()  # rings: what was loaded for the next AHEAD steps
    for _ in tl.static_range(AHEAD):
        inputs += (nothing.to(z.dtype.element_ty),)
        moves += (there & (T < 0),)
        if GATED:
            shares += (nothing.to(keep.dtype.element_ty),)
    # The round at -AHEAD loads for the first one; in it, and beyond the end, no row moves.
    for start in range(-AHEAD, T, AHEAD):
        z_t, mask_t = z + tl.cast(start + AHEAD, tl.int64) * zt, mask + tl.cast(start + AHEAD, tl.int64) * mt
        keep_t = keep + tl.cast(start + AHEAD, tl.int64) * kt
        y_t = y + tl.cast(start, tl.int64) * yt
        next_inputs, next_moves, next_shares = (), (), ()
        for group in tl.static_range(0, AHEAD, GROUP):
            for s in tl.static_range(group, group + GROUP):
                coming = there & (start + AHEAD + s < T)
                next_inputs += (tl.load(z_t, mask=coming, other=0.0),)
                next_moves += (tl.load(mask_t, mask=coming, other=0),)
                z_t += zt
                mask_t += mt
                if GATED:
                    next_shares += (tl.load(keep_t, mask=coming, other=0.0),)
                    keep_t += kt
            for s in tl.static_range(group, group + GROUP):
                kept = state
                if GATED:
                    kept = shares[s].to(WIDE) * state
                value = inputs[s].to(WIDE) + decay * kept
                if ACTIVATION == "relu":
                    value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
                elif ACTIVATION == "tanh":
                    value = _tanh(value)
                state = tl.where(moves[s], value, state)
                tl.store(y_t, state.to(y.dtype.element_ty), mask=there & (start >= 0) & (start + s < T))
                y_t += yt
        inputs, moves, shares = next_inputs, next_moves, next_shares


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PLACES)
@no_type_check
def _backward(
    gy, y, u, h, mask, keep, gz, gu, gh, gk, T, pairs, N, gt, gb, gn, yt, yb, yn, un, hb, hn, mt, mb, kt, kb, dt, db, dn,
    WIDE: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    b, n, there = _pairs(pairs, N, BLOCK)
    decay = tl.load(u + n * un, mask=there, other=0.0).to(WIDE)
    first = tl.load(h + b * hb + n * hn, mask=there, other=0.0).to(WIDE)
    last = tl.cast(T - 1, tl.int64)  # step s of the walk is time last - s
    gy += b * gb + n * gn + last * gt
    y += b * yb + n * yn + last * yt
    mask += b * mb + last * mt
    keep += b * kb + last * kt
    gz += b * db + n * dn + last * dt
    gk += b * db + n * dn + last * dt  # one product for each pair and step, laid out as gz
    g = tl.zeros_like(decay)
    sums = tl.zeros_like(decay)
    gradients, outputs, moves, shares = (), (), (), ()
    for _ in tl.static_range(AHEAD):
        gradients += (g.to(gy.dtype.element_ty),)
        outputs += (g.to(y.dtype.element_ty),)
        moves += (there & (T < 0),)
        if GATED:
            shares += (g.to(keep.dtype.element_ty),)
    for start in range(-AHEAD, T, AHEAD):
        coming_from, store_from = tl.cast(start + AHEAD, tl.int64), tl.cast(start, tl.int64)
        gy_t, y_t, mask_t, gz_t = gy - coming_from * gt, y - coming_from * yt, mask - coming_from * mt, gz - store_from * dt
        keep_t, gk_t = keep - coming_from * kt, gk - store_from * dt
        next_gradients, next_outputs, next_moves, next_shares = (), (), (), ()
        for group in tl.static_range(0, AHEAD, GROUP):
            for s in tl.static_range(group, group + GROUP):
                coming = there & (start + AHEAD + s < T)
                next_gradients += (tl.load(gy_t, mask=coming, other=0.0),)
                next_outputs += (tl.load(y_t, mask=coming, other=0.0),)
                next_moves += (tl.load(mask_t, mask=coming, other=0),)
                gy_t -= gt
                y_t -= yt
                mask_t -= mt
                if GATED:
                    next_shares += (tl.load(keep_t, mask=coming, other=0.0),)
                    keep_t -= kt
            for s in tl.static_range(group, group + GROUP):
                out = outputs[s].to(WIDE)
                before = (outputs + next_outputs)[s + 1].to(WIDE)
                before = tl.where(start + s + 1 < T, before, first)
                total = gradients[s].to(WIDE) + g
                through = total
                if ACTIVATION == "relu":
                    through = tl.where(out <= 0, 0.0, total)  # NaN passes, as in torch
                elif ACTIVATION == "tanh":
                    through = total * (1.0 - out * out)
                kept, back = before, through * decay
                if GATED:
                    kept = shares[s].to(WIDE) * before
                    tl.store(gk_t, tl.where(moves[s], back * before, 0.0), mask=there & (start >= 0) & (start + s < T))
                    gk_t -= dt
                    back = back * shares[s].to(WIDE)
                sums = tl.where(moves[s], sums + through * kept, sums)
                g = tl.where(moves[s], back, total)
                tl.store(gz_t, tl.where(moves[s], through, 0.0).to(gz.dtype.element_ty), mask=there & (start >= 0) & (start + s < T))
                gz_t -= dt
        gradients, outputs, moves, shares = next_gradients, next_outputs, next_moves, next_shares
    tl.store(gu + b * N + n, sums, mask=there)
    tl.store(gh + b * N + n, g.to(gh.dtype.element_ty), mask=there)


class Plan(NamedTuple):
    """How a launch is cut: threads per block, four warps at most; steps loaded ahead."""

    block: int
    warps: int
    ahead: int


def _plan(pairs: int, itemsize: int, multiprocessors: int) -> Plan:
    """Blocks of one warp, unless there are more than a multiprocessor takes; as many steps ahead as fill the memory pipe, from 8 to 32.

    For (B, N) = (32, 128) in float32 on 132 multiprocessors one step is 124 bytes for each: 32 steps ahead, no more for want of
    registers. (128, 512): 2 KB, 16 steps.
    """
    warps = 4 if pairs > MANY * multiprocessors else 1
    wanted = IN_FLIGHT * multiprocessors // max(1, pairs * itemsize)
    ahead = 32 if wanted >= 32 and itemsize < 8 else 16 if wanted >= 16 else 8
    return Plan(32 * warps, warps, ahead)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _launch(
    kernel: Callable[..., None], tensors: tuple[Tensor, ...], shape: torch.Size, strides: tuple[int, ...], activation: str, *, gated: bool = False
) -> None:
    like = tensors[0]
    steps, batch, units = shape
    plan = _plan(batch * units, like.element_size(), _multiprocessors(like.device))
    # Triton launches on the current device, which need not be the one where the tensors are.
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[(triton.cdiv(batch * units, plan.block),)](  # type: ignore[index]
            *tensors, steps, batch * units, units, *strides,
            WIDE=tl.float64 if like.dtype == torch.float64 else tl.float32, GATED=gated, ACTIVATION=activation,
            BLOCK=plan.block, AHEAD=plan.ahead, GROUP=GROUP, num_warps=plan.warps,
        )  # fmt: skip


NOTHING = (0, 0)  # strides of what is not there; the mask stands in its place and is not read


def forward(z: Tensor, u: Tensor, h: Tensor, mask: Tensor, activation: str) -> Tensor:
    """`recur`: z (T, B, N), u (N,), h (B, N), mask (T, B) bool -> y (T, B, N) in the type of z; strides as they come."""
    y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if y.numel():
        strides = *z.stride(), *u.stride(), *h.stride(), *mask.stride(), *NOTHING, *y.stride()
        _launch(_forward, (z, u, h, mask, mask, y), z.shape, strides, activation)
    return y


def backward(gy: Tensor, y: Tensor, u: Tensor, h: Tensor, mask: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to z, u and h, given the gradient gy of the output y.

    For half types y counts as it was stored. The sum over the batch is torch's, not one of atomics: the same bits every time.
    """
    gz, gu, gh = _gradients(y, h)
    if y.numel():
        strides = *gy.stride(), *y.stride(), *u.stride(), *h.stride(), *mask.stride(), *NOTHING, *gz.stride()
        _launch(_backward, (gy, y, u, h, mask, mask, gz, gu, gh, gu), y.shape, strides, activation)
    return gz, gu.sum(0).to(u.dtype), gh


def forward_gated(z: Tensor, u: Tensor, h: Tensor, mask: Tensor, keep: Tensor, activation: str) -> Tensor:
    """`forward` with keep (T, B) in the type of z, or float32 beside a half type."""
    y = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if y.numel():
        strides = *z.stride(), *u.stride(), *h.stride(), *mask.stride(), *keep.stride(), *y.stride()
        _launch(_forward, (z, u, h, mask, keep, y), z.shape, strides, activation, gated=True)
    return y


def backward_gated(gy: Tensor, y: Tensor, u: Tensor, h: Tensor, mask: Tensor, keep: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to z, u, h and keep. What units add to that of keep is written out in float32 (float64) and summed by torch."""
    gz, gu, gh = _gradients(y, h)
    gk = torch.empty(y.shape, dtype=gu.dtype, device=y.device)
    if y.numel():
        strides = *gy.stride(), *y.stride(), *u.stride(), *h.stride(), *mask.stride(), *keep.stride(), *gz.stride()
        _launch(_backward, (gy, y, u, h, mask, keep, gz, gu, gh, gk), y.shape, strides, activation, gated=True)
    return gz, gu.sum(0).to(u.dtype), gh, gk.sum(-1).to(keep.dtype)


def _gradients(y: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for those of z, of u in each row, and of h."""
    gz = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    gu = torch.zeros(h.shape, dtype=torch.float64 if y.dtype == torch.float64 else torch.float32, device=h.device)
    return gz, gu, torch.zeros(h.shape, dtype=h.dtype, device=h.device)
