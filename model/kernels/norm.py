"""Normalisation over time and batch on the CPU, compiled with numba: what torch does in a dozen passes over memory, in six.

Arrays are (T, B, N), sums run over the steps where `mask` (T, B) is True. Sums are float64, so that how steps are divided among
processes does not show in them. Slices of units are independent and run on the threads of the recurrence.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from model.kernels.compiled import Array, compiled
from model.kernels.threads import over_slices

CPU = torch.device("cpu")  # said where tensors are made, or a default device would be taken


@compiled
def _sums(x: Array, mask: Array, out: Array, units: slice) -> None:
    first, count = units.start, units.stop - units.start
    total = np.zeros(count, np.float64)
    for t in range(x.shape[0]):
        for b in range(x.shape[1]):
            if mask[t, b]:
                row = x[t, b, first : first + count]
                for n in range(count):
                    total[n] += row[n]
    out[units] = total


@compiled
def _squares(x: Array, mask: Array, mean: Array, out: Array, units: slice) -> None:
    first, count = units.start, units.stop - units.start
    centre, total = mean[units].copy(), np.zeros(count, np.float64)
    for t in range(x.shape[0]):
        for b in range(x.shape[1]):
            if mask[t, b]:
                row = x[t, b, first : first + count]
                for n in range(count):
                    d = row[n] - centre[n]
                    total[n] += d * d
    out[units] = total


@compiled
def _scaled(x: Array, mask: Array, scale: Array, shift: Array, y: Array, units: slice) -> None:
    zero = x.dtype.type(0)
    first, count = units.start, units.stop - units.start
    a, b0 = scale[units].copy(), shift[units].copy()
    for t in range(x.shape[0]):
        for b in range(x.shape[1]):
            row, out = x[t, b, first : first + count], y[t, b, first : first + count]
            if mask[t, b]:
                for n in range(count):
                    out[n] = row[n] * a[n] + b0[n]
            else:
                for n in range(count):
                    out[n] = zero


@compiled
def _gradient_sums(g: Array, x: Array, mask: Array, mean: Array, out: Array, units: slice) -> None:
    first, count = units.start, units.stop - units.start
    centre, plain, weighted = mean[units].copy(), np.zeros(count, np.float64), np.zeros(count, np.float64)
    for t in range(x.shape[0]):
        for b in range(x.shape[1]):
            if mask[t, b]:
                g_t, row = g[t, b, first : first + count], x[t, b, first : first + count]
                for n in range(count):
                    plain[n] += g_t[n]
                    weighted[n] += g_t[n] * (row[n] - centre[n])
    out[0, units] = plain
    out[1, units] = weighted


@compiled
def _gradient(g: Array, x: Array, mask: Array, factors: Array, gx: Array, units: slice) -> None:
    zero = x.dtype.type(0)
    first, count = units.start, units.stop - units.start
    of_g, of_x, constant = factors[0, units].copy(), factors[1, units].copy(), factors[2, units].copy()
    for t in range(x.shape[0]):
        for b in range(x.shape[1]):
            out = gx[t, b, first : first + count]
            if mask[t, b]:
                g_t, row = g[t, b, first : first + count], x[t, b, first : first + count]
                for n in range(count):
                    out[n] = g_t[n] * of_g[n] + row[n] * of_x[n] + constant[n]
            else:
                for n in range(count):
                    out[n] = zero


def sums(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of x over real steps: (N,) float64."""
    out = torch.empty(x.shape[-1], dtype=torch.float64, device=CPU)
    arrays = [_numpy(v) for v in (x, mask, out)]
    _over_units(_sums, arrays, x)
    return out


def squares(x: Tensor, mask: Tensor, mean: Tensor) -> Tensor:
    """Sum of (x - mean)^2 over real steps: (N,) float64."""
    out = torch.empty(x.shape[-1], dtype=torch.float64, device=CPU)
    arrays = [_numpy(v) for v in (x, mask, mean.to(x.dtype), out)]
    _over_units(_squares, arrays, x)
    return out


def scaled(x: Tensor, mask: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x * scale + shift at real steps, zero at masked ones."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    arrays = [_numpy(v) for v in (x, mask, scale, shift, y)]
    _over_units(_scaled, arrays, x)
    return y


def gradient_sums(g: Tensor, x: Tensor, mask: Tensor, mean: Tensor) -> Tensor:
    """Sums over real steps of g and of g * (x - mean): (2, N) float64."""
    out = torch.empty(2, x.shape[-1], dtype=torch.float64, device=CPU)
    arrays = [_numpy(v) for v in (g, x, mask, mean.to(x.dtype), out)]
    _over_units(_gradient_sums, arrays, x)
    return out


def gradient(g: Tensor, x: Tensor, mask: Tensor, factors: Tensor) -> Tensor:
    """g * factors[0] + x * factors[1] + factors[2] at real steps, zero at masked ones; factors (3, N)."""
    gx = torch.empty_like(x, memory_format=torch.contiguous_format)
    arrays = [_numpy(v) for v in (g, x, mask, factors, gx)]
    _over_units(_gradient, arrays, x)
    return gx


def _numpy(x: Tensor) -> Array:
    return x.detach().contiguous().numpy()


def _over_units(work: Callable[..., None], arrays: list[Array], x: Tensor) -> None:
    """Runs `work(*arrays, units)` on the threads of the recurrence, with slices of the units alone: a sum over rows has one writer."""
    over_slices(lambda _, units: work(*arrays, units), torch.Size((x.shape[0] * x.shape[1], 1, x.shape[2])))
