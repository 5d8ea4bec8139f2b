"""Batch normalisation over the real steps of padded sequences as one differentiable function, for one process or several.

    x       (T, B, N)  input
    mask    (T, B)     bool; masked steps count for nothing, come out as zeros and pass no gradient
    weight  (N,)       scale of each unit
    bias    (N,)       shift of each unit

Where several processes hold parts of one batch, `total` adds up what each has summed: outputs, statistics and gradients are then
those of the whole batch (S. Ioffe, C. Szegedy, ICML 2015, with the sums of all). The plain functions below are the definition; on
the CPU compiled kernels give the same numbers.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Total = Callable[[Tensor], Tensor]


def normalise(x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, eps: float, total: Total | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normalised x, and mean (N,), variance (N,) and number of the real steps, which are not differentiable.

    Half types are normalised in float32 and come out as they came in. Differentiable once: torch raises where a gradient's gradient is asked for.
    """
    whole = x if x.dtype in (torch.float32, torch.float64) else x.float()
    y, mean, var, count = _Normalise.apply(whole, mask, weight, bias, eps, total or _alone)  # type: ignore[no-untyped-call]
    return y.to(x.dtype), mean, var, count


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, eps: float, total: Total) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kernel = _kernel(x)
        first = kernel.sums(x, mask)
        first = total(torch.cat([first, mask.sum().to(first)[None]]))
        count = first[-1].clamp(min=1.0)
        mean = first[:-1] / count
        var = total(kernel.squares(x, mask, mean)) / count
        inverse = torch.rsqrt(var + eps)
        scale = weight * inverse
        y: Tensor = kernel.scaled(x, mask, scale.to(x.dtype), (bias - mean * scale).to(x.dtype))
        ctx.save_for_backward(x, mask, weight, mean, inverse, count)
        ctx.total = total
        mean, var, count = mean.to(x.dtype), var.to(x.dtype), count.to(x.dtype)
        ctx.mark_non_differentiable(mean, var, count)
        return y, mean, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, weight, mean, inverse, count = ctx.saved_tensors
        kernel = _kernel(x)
        own = kernel.gradient_sums(g, x, mask, mean)
        plain, weighted = ctx.total(own.clone()) / count
        scale = weight * inverse
        of_x = -scale * inverse.square() * weighted
        factors = torch.stack([scale, of_x, -scale * plain - of_x * mean]).to(x.dtype)
        # The gradients of weight and bias are this process's share: they are added up with those of all other parameters.
        return kernel.gradient(g, x, mask, factors), None, (own[1] * inverse).to(weight), own[0].to(weight), None, None


class _Definition:
    """The sums and products of normalisation in plain torch, on any device; see `model/kernels/norm.py` for what each is."""

    @staticmethod
    def sums(x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask[..., None], x, 0.0).sum((0, 1))  # a product with zero would let NaN and infinities of masked steps through

    @staticmethod
    def squares(x: Tensor, mask: Tensor, mean: Tensor) -> Tensor:
        return torch.where(mask[..., None], x - mean, 0.0).square().sum((0, 1))

    @staticmethod
    def scaled(x: Tensor, mask: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return torch.where(mask[..., None], x * scale + shift, 0.0)

    @staticmethod
    def gradient_sums(g: Tensor, x: Tensor, mask: Tensor, mean: Tensor) -> Tensor:
        real = torch.where(mask[..., None], g, 0.0)
        return torch.stack([real.sum((0, 1)), (real * torch.where(mask[..., None], x - mean, 0.0)).sum((0, 1))])

    @staticmethod
    def gradient(g: Tensor, x: Tensor, mask: Tensor, factors: Tensor) -> Tensor:
        return torch.where(mask[..., None], g * factors[0] + x * factors[1] + factors[2], 0.0)


def _kernel(x: Tensor) -> type[_Definition] | ModuleType:
    return (_compiled_cpu() if x.device.type == "cpu" else None) or _Definition


@functools.cache
def _compiled_cpu() -> ModuleType | None:
    if importlib.util.find_spec("numba") is None:
        return None
    from model.kernels import norm

    return norm


def _alone(sums: Tensor) -> Tensor:
    return sums
