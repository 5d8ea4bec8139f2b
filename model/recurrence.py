"""The IndRNN recurrence as one torch operator: h[t] = relu(z[t] + u * h[t-1]) (Li et al., CVPR 2018, equation 2).

    z     (T, B, N)  input of the recurrence, W x[t] + b
    u     (N,)       one recurrent weight per unit
    h     (B, N)     state before the first step
    mask  (T, B)     bool; where False the row stands still: the output repeats the state
    ->    (T, B, N)  states; the last one is the state to carry on with

`recur_loop` is the definition. `recur` gives the same numbers through compiled kernels; under `torch.export` it becomes one
`indrnn::Recurrence` node, to which the exporter gives meaning by an ONNX local function. `hold` is its sibling for missing data.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

ONNX_DOMAIN = "indrnn"
RECURRENCE, HOLD = "Recurrence", "Hold"  # local functions in the exported file


def recur_loop(z: Tensor, u: Tensor, h: Tensor, mask: Tensor) -> Tensor:
    """The reference: a plain loop over time, differentiable by autograd. Slow; see `recur`."""
    states = []
    for z_t, mask_t in zip(z.unbind(0), mask.unbind(0), strict=True):  # unbind: indexing would cost a full-size zero tensor per step backward
        h = torch.where(mask_t[:, None], torch.relu(z_t + u * h), h)
        states.append(h)
    return torch.stack(states) if states else z.new_empty(z.shape)


def recur(z: Tensor, u: Tensor, h: Tensor, mask: Tensor) -> Tensor:
    """h[t] = relu(z[t] + u * h[t-1]) over time; shapes at the top of the module.

    Floating types must agree. Raises `ValueError` when shapes do not fit together.
    """
    if _exporting():
        return _symbol(RECURRENCE, (z, u, h, mask[..., None]), z)
    _check(z, u, h, mask)
    y: Tensor = _recur(z, u, h, mask)
    return y


def hold(x: Tensor, valid: Tensor, h: Tensor) -> Tensor:
    """y[t] = x[t] where valid[t], else y[t-1]; y[-1] is h. Shapes (T, B, N), (T, B, N) bool, (B, N) -> (T, B, N). Not differentiable."""
    if _exporting():
        return _symbol(HOLD, (x, valid, h), x)
    steps = torch.arange(1, len(x) + 1, device=x.device)[:, None, None]
    latest = torch.where(valid, steps, 0).cummax(0).values if len(x) else steps.expand_as(x)
    held: Tensor = torch.cat([h[None], x]).gather(0, latest)
    return held


def _exporting() -> bool:
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def _symbol(name: str, inputs: tuple[Tensor, ...], like: Tensor) -> Tensor:
    symbol: Tensor = torch.onnx.ops.symbolic(f"{ONNX_DOMAIN}::{name}", inputs, dtype=like.dtype, shape=like.shape, version=1)
    return symbol


def _check(z: Tensor, u: Tensor, h: Tensor, mask: Tensor) -> None:
    steps, batch, units = z.shape
    if u.shape != (units,) or h.shape != (batch, units) or mask.shape != (steps, batch) or mask.dtype != torch.bool:
        raise ValueError(
            f"recur: z {tuple(z.shape)} needs u ({units},), h ({batch}, {units}), mask ({steps}, {batch}) bool; "
            f"got u {tuple(u.shape)}, h {tuple(h.shape)}, mask {tuple(mask.shape)} {mask.dtype}"
        )
    if not z.dtype == u.dtype == h.dtype:
        raise ValueError(f"recur: z, u and h must have one dtype, got {z.dtype}, {u.dtype}, {h.dtype}")


@functools.cache
def _compiled_cpu() -> ModuleType | None:
    if importlib.util.find_spec("numba") is None:
        return None
    from model.kernels import cpu

    return cpu


def _kernel(z: Tensor) -> ModuleType | None:
    """The compiled kernel for this device and dtype, or None: the loop serves."""
    if z.device.type == "cpu" and z.dtype in (torch.float32, torch.float64):
        return _compiled_cpu()
    return None


@torch.library.custom_op("indrnn::recur", mutates_args=())
def _recur(z: Tensor, u: Tensor, h: Tensor, mask: Tensor) -> Tensor:
    kernel = _kernel(z)
    forward: Callable[..., Tensor] = kernel.forward if kernel else recur_loop
    return forward(z, u, h, mask)


@_recur.register_fake
def _(z: Tensor, u: Tensor, h: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@torch.library.custom_op("indrnn::recur_backward", mutates_args=())
def _recur_backward(gy: Tensor, y: Tensor, u: Tensor, h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _kernel(y)
    if kernel:
        gradients: tuple[Tensor, Tensor, Tensor] = kernel.backward(gy, y, u, h, mask)
        return gradients
    g, gu, gz = torch.zeros_like(h), torch.zeros_like(h), torch.empty_like(y)
    for t in range(len(y) - 1, -1, -1):
        total = gy[t] + g
        d = torch.where((y[t] <= 0) | ~mask[t][:, None], 0.0, total)
        gz[t] = d
        gu += d * (y[t - 1] if t else h)
        g = torch.where(mask[t][:, None], d * u, total)
    return gz, gu.sum(0), g


@_recur_backward.register_fake
def _(gy: Tensor, y: Tensor, u: Tensor, h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(y), torch.empty_like(u), torch.empty_like(h)


def _remember(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, u, h, mask = inputs
    ctx.save_for_backward(output, u, h, mask)


def _differentiate(ctx: torch.autograd.function.FunctionCtx, gy: Tensor) -> tuple[Tensor | None, ...]:
    y, u, h, mask = ctx.saved_tensors  # type: ignore[attr-defined]
    gz, gu, gh = _recur_backward(gy, y, u, h, mask)
    return gz, gu, gh, None


_recur.register_autograd(_differentiate, setup_context=_remember)
