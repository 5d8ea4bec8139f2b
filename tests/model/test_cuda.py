"""The Triton kernels against the plain loop: on the CPU in Triton's interpreter, on a GPU where there is one.

Whether triton interprets is settled when it is imported; so the interpreted kernels live in a process of their own, and this one stays as
a user's is.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from model.config import Activation
from model.recurrence import RECURRENCES, recur, recur_loop

pytest.importorskip("triton", reason="triton is not installed (Linux; in requirements-train.txt): the GPU kernels are not tested")

import triton
from triton.backends.compiler import GPUTarget

from model.kernels import cuda

ACTIVATIONS = list(RECURRENCES)
HALVES = [torch.bfloat16, torch.float16]
on_gpu = pytest.param("cuda", marks=pytest.mark.gpu)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: torch.compile's inductor is not tested on the CPU")

KERNELS = cuda.forward, cuda.backward, cuda.forward_gated, cuda.backward_gated

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


class Kernels(NamedTuple):
    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    forward_gated: Callable[..., Tensor]
    backward_gated: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    device: str


def need_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no NVIDIA GPU: the kernels ran in Triton's interpreter only")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[concurrent.futures.Executor]:
    """A process in which triton interprets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            assert pool.submit(os.getenv, "TRITON_INTERPRET").result() == "1"  # it has started, with the variable set
            patch.undo()
            yield pool


@pytest.fixture(params=["interpreter", on_gpu])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "cuda":
        need_gpu()
        return Kernels(*KERNELS, "cuda")
    pool: concurrent.futures.Executor = request.getfixturevalue("interpreter")

    def elsewhere(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: pool.submit(function, *(x.detach() if isinstance(x, Tensor) else x for x in arguments)).result(timeout=120)

    return Kernels(*(elsewhere(kernel) for kernel in KERNELS), "cpu")


class Recur(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: Kernels, z: Tensor, u: Tensor, h: Tensor, mask: Tensor, activation: Activation) -> Tensor:
        y = kernels.forward(z, u, h, mask, activation)
        ctx.save_for_backward(y, u, h, mask)
        ctx.kernels, ctx.activation = kernels, activation
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.kernels.backward(gy, *ctx.saved_tensors, ctx.activation), None, None


def case(kernels: Kernels, steps: int, batch: int, units: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Rows end at different steps and have gaps; u is negative, 0 and beyond 1 as well."""
    g = torch.Generator().manual_seed(steps + batch + units)
    z = torch.randn(steps, batch, units, generator=g, dtype=torch.float64)
    u = torch.rand(units, generator=g, dtype=torch.float64) * 2.4 - 1.2
    u[::5] = 0.0
    h = torch.randn(batch, units, generator=g, dtype=torch.float64)
    mask = torch.arange(steps)[:, None] < torch.randint(0, steps + 1, (batch,), generator=g)
    mask &= torch.rand(steps, batch, generator=g) < 0.8
    mask[:, 0] = True
    moved = [x.to(dtype).to(kernels.device) for x in (z, u, h)]
    return moved[0], moved[1], moved[2], mask.to(kernels.device)


def values_and_gradients(function: Callable[..., Tensor], inputs: Inputs, activation: Activation, gy: Tensor) -> list[Tensor]:
    *floats, mask = inputs
    leaves = [x.detach().requires_grad_() for x in floats]
    y = function(*leaves, mask, activation)
    return [y.detach(), *torch.autograd.grad(y, leaves, gy)]


def assert_equal_to_the_loop(kernels: Kernels, inputs: Inputs, activation: Activation, **tolerance: float) -> None:
    z = inputs[0]
    gy = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(z)
    ours = values_and_gradients(lambda *x: Recur.apply(kernels, *x), inputs, activation, gy)
    theirs = values_and_gradients(recur_loop, inputs, activation, gy)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, **tolerance)


# Lengths about that of the ring, several rounds of it; one pair, one block, several; 4141 pairs: blocks of four warps, 8 steps ahead.
SHAPES = [(1, 1, 1), (2, 3, 5), (32, 1, 7), (33, 2, 33), (70, 1, 4), (9, 4, 140), (3, 41, 101)]


# Every shape with one activation, and every activation over several rounds of the ring: they differ in one line of a step.
@pytest.mark.parametrize(("shape", "activation"), [*((shape, "relu") for shape in SHAPES[:-2]), ((33, 2, 33), "tanh"), ((33, 2, 33), "identity")])
def test_equal_to_the_loop(kernels: Kernels, shape: tuple[int, int, int], activation: Activation) -> None:
    assert_equal_to_the_loop(kernels, case(kernels, *shape, torch.float64), activation, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_the_loop_in_float32(kernels: Kernels, shape: tuple[int, int, int]) -> None:
    z, u, h, mask = case(kernels, *shape)
    # Beyond 1 the loop and the kernel, of which one multiplies and adds in one rounding, drift apart exponentially.
    assert_equal_to_the_loop(kernels, (z, u.clamp(-1, 1), h, mask), "relu", rtol=2e-5, atol=2e-5)


def test_no_steps_no_rows_no_units(kernels: Kernels) -> None:
    for shape in [(0, 2, 3), (4, 0, 3), (4, 2, 0)]:
        z, u, h = torch.zeros(shape), torch.ones(shape[2]), torch.ones(shape[1:])
        z, u, h, mask = (x.to(kernels.device) for x in (z, u, h, torch.ones(shape[:2], dtype=torch.bool)))
        y = kernels.forward(z, u, h, mask, "relu")
        gradients = kernels.backward(torch.ones_like(y), y, u, h, mask, "relu")
        assert [tuple(x.shape) for x in (y, *gradients)] == [shape, shape, shape[2:], shape[1:]]
        assert not any(x.any() for x in gradients)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_in_float64(kernels: Kernels, activation: Activation) -> None:
    z, u, h, mask = case(kernels, 7, 3, 5, torch.float64)
    leaves = [x.requires_grad_() for x in (z, u, h)]
    slow = kernels.device == "cpu"  # the interpreter: random directions there, every element on a GPU
    assert torch.autograd.gradcheck(lambda z, u, h: Recur.apply(kernels, z, u, h, mask, activation), leaves, fast_mode=slow)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("parameters", ["float32", "half"])
def test_half_types_are_computed_in_float32(kernels: Kernels, half: torch.dtype, parameters: str, activation: Activation) -> None:
    """Against float64 on the same rounded inputs: values to one rounding, gradients, which see y rounded, to a few."""
    z, u, h, mask = case(kernels, 18, 2, 7, half)
    u = (u * 0.8).to(half)
    if parameters == "float32":
        u, h = u.float(), h.float()
    gy = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).to(z)
    ours = values_and_gradients(lambda *x: Recur.apply(kernels, *x), (z, u, h, mask), activation, gy)
    exact = values_and_gradients(recur_loop, (z.double(), u.double(), h.double(), mask), activation, gy.double())
    assert [x.dtype for x in ours] == [half, half, u.dtype, h.dtype]
    rounding = torch.finfo(half).eps
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=rounding, atol=1e-5)
    for mine, reference in zip(ours[1:], exact[1:], strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=4 * rounding, atol=4 * rounding * float(reference.abs().max()))


def test_state_of_half_types_is_not_rounded_on_the_way(kernels: Kernels) -> None:
    """The sum of 300 times 1 + 1/128; added up in bfloat16 it would stop at 256."""
    z = torch.full((300, 1, 1), 1 + 1 / 128, dtype=torch.bfloat16, device=kernels.device)
    u, h = torch.ones(1, device=kernels.device), torch.zeros(1, 1, device=kernels.device)
    y = kernels.forward(z, u, h, torch.ones(300, 1, dtype=torch.bool, device=kernels.device), "relu")
    assert float(y[-1]) == float(torch.tensor(300 * (1 + 1 / 128)).bfloat16())


def test_tensors_that_are_not_contiguous(kernels: Kernels) -> None:
    z, u, h, mask = case(kernels, 12, 3, 13)
    gy = torch.randn(12, 3, 13, generator=torch.Generator().manual_seed(1)).to(kernels.device)
    y = kernels.forward(z, u, h, mask, "relu")
    gradients = kernels.backward(gy, y, u, h, mask, "relu")

    def spread(x: Tensor) -> Tensor:
        """The same values with the axes turned about in memory, and every second value somebody else's."""
        order = tuple(reversed(range(x.dim())))
        wide = torch.full((*(x.shape[i] for i in order), 2), 77, device=x.device).to(x.dtype)
        wide[..., 1] = x.permute(order)
        return wide[..., 1].permute(order)

    spread_inputs = [spread(x) for x in (z, u, h, mask)]
    assert not any(x.is_contiguous() for x in spread_inputs)
    assert torch.equal(kernels.forward(*spread_inputs, "relu"), y)
    for mine, reference in zip(kernels.backward(spread(gy), spread(y), *spread_inputs[1:], "relu"), gradients, strict=True):
        assert torch.equal(mine, reference)
    one = torch.ones((), device=kernels.device)  # the gradient of a sum has no strides at all
    for mine, reference in zip(
        kernels.backward(one.expand(12, 3, 13), y, u, h, mask, "relu"), kernels.backward(torch.ones_like(y), y, u, h, mask, "relu"), strict=True
    ):
        assert torch.equal(mine, reference)


def test_rows_alone_and_two_chunks_give_the_same_bits(kernels: Kernels) -> None:
    z, u, h, mask = case(kernels, 37, 3, 13)
    whole = kernels.forward(z, u, h, mask, "tanh")
    first = kernels.forward(z[:11], u, h, mask[:11], "tanh")
    assert torch.equal(torch.cat([first, kernels.forward(z[11:], u, first[-1], mask[11:], "tanh")]), whole)
    for b in range(3):
        assert torch.equal(kernels.forward(z[:, b : b + 1], u, h[b : b + 1], mask[:, b : b + 1], "tanh")[:, 0], whole[:, b])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_travel_as_in_torch_and_stay_in_their_row(kernels: Kernels, poison: float, activation: Activation) -> None:
    z, u, h, _ = case(kernels, 12, 2, 9)
    mask = torch.ones(12, 2, dtype=torch.bool, device=kernels.device)
    u[5], u[6] = 0.0, 0.7
    clean = kernels.forward(z, u, h, mask, activation)
    z[3, 0, 5:7] = poison
    y = kernels.forward(z, u, h, mask, activation)
    torch.testing.assert_close(y, recur_loop(z, u, h, mask, activation), equal_nan=True, rtol=1e-5, atol=1e-6)
    assert torch.equal(y[:, 1], clean[:, 1])
    gz, _, gh = kernels.backward(torch.ones_like(y), y, u, h, mask, activation)
    assert torch.isfinite(gz[:, 1]).all()
    assert torch.isfinite(gh[1]).all()
    if poison != poison:
        assert gz[3, 0, 5].isnan() if activation == "tanh" else gz[3, 0, 5] == 1  # a gate that NaN opens, as torch's


def test_what_stands_at_masked_steps_does_not_matter(kernels: Kernels) -> None:
    z, u, h, mask = case(kernels, 20, 3, 9)
    y = kernels.forward(z, u, h, mask, "relu")
    assert torch.equal(y[1:][~mask[1:]], y[:-1][~mask[1:]])
    dirty = torch.where(mask[..., None], z, float("nan"))
    assert torch.equal(kernels.forward(dirty, u, h, mask, "relu"), y)


def gated_case(kernels: Kernels, steps: int, batch: int, units: int, dtype: torch.dtype = torch.float32) -> tuple[Inputs, Tensor]:
    """`case`, u within 1, and keep: 0 and 1 as well, NaN where nothing moves."""
    z, u, h, mask = case(kernels, steps, batch, units, dtype)
    keep = (torch.rand(steps, batch, generator=torch.Generator().manual_seed(5)) * 1.4 - 0.2).clamp(0, 1).to(z)
    return (z, u.clamp(-1, 1), h, mask), torch.where(mask, keep, float("nan"))


@pytest.mark.parametrize(
    ("shape", "activation", "dtype"),
    [
        ((1, 1, 1), "relu", torch.float64),
        ((33, 2, 33), "tanh", torch.float64),
        ((70, 1, 4), "identity", torch.float64),
        ((33, 3, 23), "relu", torch.bfloat16),
    ],
)
def test_with_keep_equal_to_the_loop(kernels: Kernels, shape: tuple[int, int, int], activation: Activation, dtype: torch.dtype) -> None:
    (z, u, h, mask), keep = gated_case(kernels, *shape, dtype)
    gy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(z)
    y = kernels.forward_gated(z, u, h, mask, keep, activation)
    ours = [y, *kernels.backward_gated(gy, y, u, h, mask, keep, activation)]
    assert [x.dtype for x in ours] == [dtype] * 5
    leaves = [x.double().requires_grad_() for x in (z, u, h, keep)]
    reference = recur_loop(*leaves[:3], mask, activation, leaves[3])
    theirs = [reference.detach(), *torch.autograd.grad(reference, leaves, gy.double())]
    rounding = torch.finfo(dtype).eps
    for mine, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=4 * rounding + 1e-9, atol=4 * rounding * float(exact.abs().max()) + 1e-11)
    assert not ours[4][~mask].any()


def test_with_keep_of_one_the_bits_are_those_without(kernels: Kernels) -> None:
    z, u, h, mask = case(kernels, 20, 3, 9)
    keep, gy = torch.ones(3, 20, device=kernels.device).t(), torch.randn(20, 3, 9, generator=torch.Generator().manual_seed(1)).to(kernels.device)
    y = kernels.forward(z, u, h, mask, "relu")
    assert torch.equal(kernels.forward_gated(z, u, h, mask, keep, "relu"), y)
    gradients = kernels.backward_gated(gy, y, u, h, mask, keep, "relu")
    assert all(torch.equal(a, b) for a, b in zip(gradients, kernels.backward(gy, y, u, h, mask, "relu"), strict=False))


def far_apart() -> bool:
    """Steps 2^26 elements apart, so that the 32nd begins where 32 bits end; memory that nobody touches is only promised."""
    memory = torch.empty((34 << 26) + 8, dtype=torch.bfloat16)
    z = memory.as_strided((35, 2, 4), (1 << 26, 4, 1))
    z[:] = torch.rand(35, 2, 4, generator=torch.Generator().manual_seed(1))
    u, h, mask = torch.full((4,), 0.5), torch.ones(2, 4), torch.ones(35, 2, dtype=torch.bool)
    y = cuda.forward(z, u, h, mask, "identity")
    same = torch.equal(y, cuda.forward(z.contiguous(), u, h, mask, "identity"))
    pairs = zip(cuda.backward(z, z, u, h, mask, "tanh"), cuda.backward(z.contiguous(), z.contiguous(), u, h, mask, "tanh"), strict=True)
    return same and all(torch.equal(a, b) for a, b in pairs)


def test_offsets_beyond_31_bits(interpreter: concurrent.futures.Executor) -> None:
    assert interpreter.submit(far_apart).result(timeout=120)


@pytest.mark.parametrize("pairs", [1, 4096, 65536, 10**7])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_plan(pairs: int, itemsize: int) -> None:
    plan = cuda._plan(pairs, itemsize, multiprocessors=132)
    assert plan.block == 32 * plan.warps
    assert plan.ahead % cuda.GROUP == 0
    blocks = -(-pairs // plan.block)
    assert blocks >= min(pairs // 32, 132), "multiprocessors without work"
    resident = min(pairs, 2048 * 132)
    assert plan.ahead == (16 if itemsize == 8 else 32) or plan.ahead * resident * itemsize >= 132 * cuda.IN_FLIGHT / 2, "memory not kept busy"


class AbsentGpu:
    """What triton asks a driver when it compiles; nothing is launched."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # triton keeps what it has compiled by this number

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """The kernels in order of their calls, compiled as for a launch, in the place of which nothing happens."""
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set, so triton compiles nothing: run without it")
    kernels: list[Any] = []
    run = triton.JITFunction.run
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *x, grid, warmup, **y: kernels.append(run(self, *x, grid=grid, warmup=True, **y)))
    yield kernels
    for kernel in (cuda._forward, cuda._backward):
        kernel.device_caches.clear()


@pytest.mark.parametrize(
    ("capability", "dtype", "activation"), [(80, "bfloat16", "tanh"), (90, "float32", "relu"), (90, "float16", "identity"), (100, "float64", "relu")]
)
def test_compiles_for_gpus_that_are_not_here(capability: int, dtype: str, activation: Activation, compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes more than the compiler does. And what was written to be early must be: a group of loads before the first store."""
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGpu(capability))
    floating = getattr(torch, dtype)
    wide = torch.float64 if floating == torch.float64 else torch.float32
    gated = capability < 100 and activation != "identity"  # two of the four: compiling takes seconds
    for steps, batch, units in [(3, 8, 640), (1, 11, 480)]:  # other sizes, the same machine code
        z, u, h = torch.zeros(steps, batch, units, dtype=floating), torch.zeros(units, dtype=wide), torch.zeros(batch, units, dtype=wide)
        mask = torch.ones(steps, batch, dtype=torch.bool)
        cuda.forward(z, u, h, mask, activation)
        cuda.backward(torch.zeros((), dtype=floating).expand(z.shape), z, u, h, mask, activation)
        cuda.backward(z, z, u, h, mask, activation)
        if gated:
            keep = torch.ones(steps, batch, dtype=wide)
            cuda.forward_gated(z, u, h, mask, keep, activation)
            cuda.backward_gated(z, z, u, h, mask, keep, activation)
    assert len(set(compiled)) == 3 + 2 * gated  # forward, backward, backward from a gradient without strides; the first two with keep
    for kernel, inputs in zip(compiled, (2, 3, 3, 3, 4)[: 3 + 2 * gated], strict=False):
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared == 0  # nothing passes between threads
        before_first_store, _, _ = kernel.asm["ptx"].partition("st.global")
        assert before_first_store.count("ld.global") >= cuda.GROUP * inputs


class Layer(nn.Module):
    """A linear map, as autocast makes half values of, and the recurrence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.u = nn.Linear(6, 40), nn.Parameter(torch.rand(40))

    def forward(self, x: Tensor, h: Tensor, mask: Tensor) -> Tensor:
        return recur(self.linear(x), self.u, h, mask, "tanh")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("device", ["cpu", on_gpu])
@pytest.mark.parametrize(("backend", "autocast"), [("aot_eager", False), pytest.param("inductor", True, marks=needs_compiler)])
def test_under_torch_compile_and_autocast(backend: str, autocast: bool, device: str) -> None:
    if device == "cuda":
        need_gpu()
    g = torch.Generator().manual_seed(1)
    layer, x, h = Layer().to(device), torch.randn(9, 3, 6, generator=g).to(device), torch.randn(3, 40, generator=g).to(device).requires_grad_()
    mask, gy = (torch.rand(9, 3, generator=g) < 0.8).to(device), torch.randn(9, 3, 40, generator=g).to(device)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    results = []
    for module in (layer, compiled):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = module(x, h, mask)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        results.append([y, *torch.autograd.grad(y, [*layer.parameters(), h], gy.to(y.dtype))])
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    for mine, reference in zip(*results, strict=True):
        assert mine.dtype == reference.dtype
        torch.testing.assert_close(mine, reference, **tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_operator_reaches_the_kernels_on_a_gpu(activation: Activation) -> None:
    need_gpu()
    z, u, h, mask = case(Kernels(*KERNELS, "cuda"), 50, 8, 64)
    y = recur(z, u, h, mask, activation)
    assert torch.equal(y, cuda.forward(z, u, h, mask, activation))
    torch.library.opcheck(torch.ops.indrnn.recur.default, (z.requires_grad_(), u.requires_grad_(), h.requires_grad_(), mask, activation))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    need_gpu()
    steps, batch, units = 1 << 19, 8, 513  # 2.15e9 elements, 4.3 GB in bfloat16
    if torch.cuda.mem_get_info()[0] < 5 * 2 * steps * batch * units:
        pytest.skip("the GPU has less than 22 GB free: offsets beyond 31 bits are not tested")
    z = torch.zeros(steps, batch, units, dtype=torch.bfloat16, device="cuda")
    z[0], z[-1] = 1.0, 2.0
    u, h, mask = torch.full((units,), 0.5, device="cuda"), torch.zeros(batch, units, device="cuda"), torch.ones(steps, batch, dtype=torch.bool, device="cuda")
    y = cuda.forward(z, u, h, mask, "relu")
    assert (y[-1] == 2).all()
    gy = torch.zeros((), dtype=z.dtype, device="cuda").expand(z.shape)
    gz, _, gh = cuda.backward(torch.cat([gy[:1] + 1, gy[1:]]), y, u, h, mask, "relu")
    assert (gz[0] == 1).all()
    assert (gh == 0.5).all()
