"""The IndRNN recurrence as one torch operator: h[t] = activation(z[t] + u * h[t-1]) (Li et al., CVPR 2018, equation 2).

    z           (T, B, N)  input of the recurrence, W x[t] + b
    u           (N,)       one recurrent weight per unit
    h           (B, N)     state before the first step
    mask        (T, B)     bool; where False the row stands still: the output repeats the state
    activation             "relu", "tanh" or "identity"
    keep        (T, B)     share of the state before each step that is kept, in [0, 1]: h[t] = activation(z[t] + u * (keep[t] * h[t-1])); None: all of it
    ->          (T, B, N)  states, in the dtype of z; the last one is the state to carry on with

`recur_loop` is the definition. `recur` gives the same numbers through compiled kernels; under `torch.export` it becomes one
node, `indrnn::Recurrence` for ReLU (`indrnn::GatedRecurrence` with keep), to which the exporter gives meaning by an ONNX local function.
`hold` is its sibling for missing data.

Floating types: z, u, h and keep share one of float32 and float64; or z is bfloat16 or float16, as autocast makes it, and the others are float32
or the type of z. Half types are for storage only: the state is carried, and all arithmetic done, in float32.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from model.config import Activation

ONNX_DOMAIN = "indrnn"
# Local functions in the exported file.
RECURRENCES: dict[Activation, str] = {"relu": "Recurrence", "tanh": "RecurrenceTanh", "identity": "RecurrenceIdentity"}
GATED_RECURRENCES: dict[Activation, str] = {"relu": "GatedRecurrence", "tanh": "GatedRecurrenceTanh", "identity": "GatedRecurrenceIdentity"}
HOLD = "Hold"

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *HALVES)

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "tanh": torch.tanh, "identity": lambda x: x}


def recur_loop(z: Tensor, u: Tensor, h: Tensor, mask: Tensor, activation: Activation = "relu", keep: Tensor | None = None) -> Tensor:
    """The reference: a plain loop over time, differentiable by autograd. Slow; see `recur`."""
    return _loop(z, u, h, mask, activation, keep)


def _loop(z: Tensor, u: Tensor, h: Tensor, mask: Tensor, activation: str, keep: Tensor | None = None) -> Tensor:
    wide, act = _wide(z.dtype), _ACTIVATIONS[activation]
    u, state, states = u.to(wide), h.to(wide), []
    shares: Sequence[Tensor | None] = (
        [None] * len(z) if keep is None else torch.where(mask, keep.to(wide), 1.0).unbind(0)
    )  # what stands at masked steps does not matter
    for z_t, mask_t, share in zip(z.unbind(0), mask.unbind(0), shares, strict=True):  # unbind: indexing would cost a full-size zero tensor per step backward
        kept = state if share is None else share[:, None] * state
        state = torch.where(mask_t[:, None], act(z_t.to(wide) + u * kept), state)
        states.append(state.to(z.dtype))
    return torch.stack(states) if states else z.new_empty(z.shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which the state is carried for a z of this type."""
    return torch.float32 if dtype in HALVES else dtype


def recur(z: Tensor, u: Tensor, h: Tensor, mask: Tensor, activation: Activation = "relu", keep: Tensor | None = None) -> Tensor:
    """h[t] = activation(z[t] + u * (keep[t] * h[t-1])) over time; shapes and types at the top of the module. That keep is in [0, 1] is not checked.

    Raises `ValueError` when shapes or types do not fit together, or the activation is none of the three; `NotImplementedError` for
    derivatives in forward mode, which `recur_loop` has.
    """
    if activation not in RECURRENCES:
        raise ValueError(f"recur: activation is one of {', '.join(RECURRENCES)}, not {activation!r}")
    if _exporting():
        if keep is None:
            return _symbol(RECURRENCES[activation], (z, u, h, mask[..., None]), z)
        return _symbol(GATED_RECURRENCES[activation], (z, u, h, mask[..., None], keep[..., None]), z)
    _check(z, u, h, mask, keep)
    if not torch.compiler.is_compiling() and any(_has_tangent(x) for x in (z, u, h, keep) if x is not None):
        raise NotImplementedError("recur has no derivative in forward mode (jvp): use recur_loop")  # torch would take it for zero
    y: Tensor = _recur(z, u, h, mask, activation) if keep is None else _recur_gated(z, u, h, mask, keep, activation)
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


def _has_tangent(x: Tensor) -> bool:
    return unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def _check(z: Tensor, u: Tensor, h: Tensor, mask: Tensor, keep: Tensor | None) -> None:
    if z.dim() != 3:
        raise ValueError(f"recur: z must be (steps, batch, units), got {tuple(z.shape)}")
    steps, batch, units = z.shape
    if u.shape != (units,) or h.shape != (batch, units) or mask.shape != (steps, batch) or mask.dtype != torch.bool:
        raise ValueError(
            f"recur: z {tuple(z.shape)} needs u ({units},), h ({batch}, {units}), mask ({steps}, {batch}) bool; "
            f"got u {tuple(u.shape)}, h {tuple(h.shape)}, mask {tuple(mask.shape)} {mask.dtype}"
        )
    if z.dtype not in FLOATS or any(x.dtype not in (z.dtype, _wide(z.dtype)) for x in (u, h)):
        raise ValueError(f"recur: z, u and h must have one floating dtype, or z a half type and u, h float32; got {z.dtype}, {u.dtype}, {h.dtype}")
    if not z.device == u.device == h.device == mask.device:
        raise ValueError(f"recur: z, u, h and mask must be on one device; got {z.device}, {u.device}, {h.device}, {mask.device}")
    if keep is None:
        return
    if keep.shape != (steps, batch) or keep.dtype not in (z.dtype, _wide(z.dtype)) or keep.device != z.device:
        raise ValueError(
            f"recur: z {tuple(z.shape)} {z.dtype} on {z.device} needs keep ({steps}, {batch}) of that type, or float32 beside a half type, on that device; "
            f"got {tuple(keep.shape)} {keep.dtype} on {keep.device}"
        )


@functools.cache
def _compiled(device: str) -> ModuleType | None:
    """The kernels for a kind of device, where what compiles them is installed."""
    if device == "cpu" and importlib.util.find_spec("numba"):
        return importlib.import_module("model.kernels.cpu")
    if device == "cuda" and importlib.util.find_spec("triton"):
        return importlib.import_module("model.kernels.cuda")
    return None


def _kernel(x: Tensor) -> ModuleType | None:
    """The compiled kernels for this tensor's device, or None: the loop serves."""
    return _compiled(x.device.type)


@torch.library.custom_op("indrnn::recur", mutates_args=())
def _recur(z: Tensor, u: Tensor, h: Tensor, mask: Tensor, activation: str = "relu") -> Tensor:
    kernel = _kernel(z)
    forward: Callable[..., Tensor] = kernel.forward if kernel else _loop
    return forward(z, u, h, mask, activation)


@_recur.register_fake
def _(z: Tensor, u: Tensor, h: Tensor, mask: Tensor, activation: str = "relu") -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@torch.library.custom_op("indrnn::recur_backward", mutates_args=())
def _recur_backward(gy: Tensor, y: Tensor, u: Tensor, h: Tensor, mask: Tensor, activation: str = "relu") -> tuple[Tensor, Tensor, Tensor]:
    kernel = _kernel(y)
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = kernel.backward if kernel else _loop_backward
    return backward(gy, y, u, h, mask, activation)


def _loop_backward(gy: Tensor, y: Tensor, u: Tensor, h: Tensor, mask: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(y.dtype)
    decay, start, gz = u.to(wide), h.to(wide), torch.empty(y.shape, dtype=y.dtype, device=y.device)
    g, gu = torch.zeros_like(start), torch.zeros_like(start)
    for t in range(len(y) - 1, -1, -1):
        moves, y_t, total = mask[t][:, None], y[t].to(wide), gy[t].to(wide) + g
        d = torch.where(moves, _through(total, y_t, activation), 0.0)
        gz[t] = d
        gu += d * (y[t - 1] if t else start)
        g = torch.where(moves, d * decay, total)
    return gz, gu.sum(0).to(u.dtype), g.to(h.dtype)


def _through(g: Tensor, y: Tensor, activation: str) -> Tensor:
    """The gradient before the activation, from the one behind it and from its output y alone."""
    if activation == "relu":
        return torch.where(y <= 0, 0.0, g)
    return g * (1 - y * y) if activation == "tanh" else g


@_recur_backward.register_fake
def _(gy: Tensor, y: Tensor, u: Tensor, h: Tensor, mask: Tensor, activation: str = "relu") -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return tuple(torch.empty_like(x, memory_format=contiguous) for x in (y, u, h))  # type: ignore[return-value]


def _remember(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor, Tensor, str], output: Tensor) -> None:
    _, u, h, mask, activation = inputs
    ctx.save_for_backward(output, u, h, mask)
    ctx.activation = activation  # type: ignore[attr-defined]


def _differentiate(ctx: torch.autograd.function.FunctionCtx, gy: Tensor) -> tuple[Tensor | None, ...]:
    y, u, h, mask = ctx.saved_tensors  # type: ignore[attr-defined]
    gz, gu, gh = _recur_backward(gy, y, u, h, mask, ctx.activation)  # type: ignore[attr-defined]
    return gz, gu, gh, None, None


_recur.register_autograd(_differentiate, setup_context=_remember)


@torch.library.custom_op("indrnn::recur_gated", mutates_args=())
def _recur_gated(z: Tensor, u: Tensor, h: Tensor, mask: Tensor, keep: Tensor, activation: str = "relu") -> Tensor:
    """`_recur` with keep: an operator of its own, so that without one nothing is different, neither in time nor in bits."""
    kernel = _kernel(z)
    forward: Callable[..., Tensor] = kernel.forward_gated if kernel else _loop_gated
    return forward(z, u, h, mask, keep, activation)


def _loop_gated(z: Tensor, u: Tensor, h: Tensor, mask: Tensor, keep: Tensor, activation: str) -> Tensor:
    return _loop(z, u, h, mask, activation, keep)


@_recur_gated.register_fake
def _(z: Tensor, u: Tensor, h: Tensor, mask: Tensor, keep: Tensor, activation: str = "relu") -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("indrnn::recur_gated_backward", mutates_args=())
def _recur_gated_backward(
    gy: Tensor, y: Tensor, u: Tensor, h: Tensor, mask: Tensor, keep: Tensor, activation: str = "relu"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel = _kernel(y)
    backward: Callable[..., Gradients] = kernel.backward_gated if kernel else _loop_gated_backward
    return backward(gy, y, u, h, mask, keep, activation)


def _loop_gated_backward(gy: Tensor, y: Tensor, u: Tensor, h: Tensor, mask: Tensor, keep: Tensor, activation: str) -> Gradients:
    wide = _wide(y.dtype)
    decay, start, gz = u.to(wide), h.to(wide), torch.empty(y.shape, dtype=y.dtype, device=y.device)
    g, gu, gk = torch.zeros_like(start), torch.zeros_like(start), torch.zeros(keep.shape, dtype=wide, device=keep.device)
    for t in range(len(y) - 1, -1, -1):
        moves, y_t, total = mask[t][:, None], y[t].to(wide), gy[t].to(wide) + g
        share, before = torch.where(moves, keep[t].to(wide)[:, None], 1.0), y[t - 1].to(wide) if t else start
        d = torch.where(moves, _through(total, y_t, activation), 0.0)
        gz[t] = d
        gu += d * (share * before)
        gk[t] = torch.where(moves, d * decay * before, 0.0).sum(1)
        g = torch.where(moves, d * decay * share, total)
    return gz, gu.sum(0).to(u.dtype), g.to(h.dtype), gk.to(keep.dtype)


@_recur_gated_backward.register_fake
def _(gy: Tensor, y: Tensor, u: Tensor, h: Tensor, mask: Tensor, keep: Tensor, activation: str = "relu") -> Gradients:
    contiguous = torch.contiguous_format
    return tuple(torch.empty_like(x, memory_format=contiguous) for x in (y, u, h, keep))  # type: ignore[return-value]


def _remember_gated(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, str], output: Tensor) -> None:
    _, u, h, mask, keep, activation = inputs
    ctx.save_for_backward(output, u, h, mask, keep)
    ctx.activation = activation  # type: ignore[attr-defined]


def _differentiate_gated(ctx: torch.autograd.function.FunctionCtx, gy: Tensor) -> tuple[Tensor | None, ...]:
    y, u, h, mask, keep = ctx.saved_tensors  # type: ignore[attr-defined]
    gz, gu, gh, gk = _recur_gated_backward(gy, y, u, h, mask, keep, ctx.activation)  # type: ignore[attr-defined]
    return gz, gu, gh, None, gk, None


_recur_gated.register_autograd(_differentiate_gated, setup_context=_remember_gated)
