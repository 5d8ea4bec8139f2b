"""`recur` against the plain loop: values, gradients, masks, non-finite numbers, threads, read-only installs."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from model.config import Activation
from model.kernels import cpu, threads
from model.recurrence import RECURRENCES, hold, recur, recur_loop

ROOT = Path(__file__).parents[2]


ACTIVATIONS = list(RECURRENCES)


@pytest.fixture(autouse=True, scope="module")
def _threads_for_little_work() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "SMALL", 1 << 12)
        yield


def case(steps: int, batch: int, units: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(steps, batch, units, generator=g, dtype=dtype)
    u = torch.rand(units, generator=g, dtype=dtype) * 2.4 - 1.2  # negative and beyond one as well
    h = torch.rand(batch, units, generator=g, dtype=dtype)
    lengths = torch.randint(0, steps + 1, (batch,), generator=g)
    return z, u, h, torch.arange(steps)[:, None] < lengths


@settings(deadline=None, max_examples=60)
@given(steps=st.integers(0, 40), batch=st.integers(0, 9), units=st.integers(0, 70), seed=st.integers(0, 2**31), activation=st.sampled_from(ACTIVATIONS))
def test_kernel_equals_loop_on_ragged_batches(steps: int, batch: int, units: int, seed: int, activation: Activation) -> None:
    inputs = *case(steps, batch, units, seed=seed), activation
    # A compiler may contract z + u * h into one rounding; so float32 agreement is to the last place, not to the bit.
    torch.testing.assert_close(recur(*inputs), recur_loop(*inputs), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (50, 4, 33), (300, 8, 64), (200, 1, 512)])
def test_gradients_equal_those_of_the_loop(shape: tuple[int, int, int], activation: Activation) -> None:
    z, u, h, mask = case(*shape, dtype=torch.float64)
    leaves = [x.clamp(-1, 1).requires_grad_() for x in (z, u, h)]
    gy = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(recur(*leaves, mask, activation), leaves, gy)
    theirs = torch.autograd.grad(recur_loop(*leaves, mask, activation), leaves, gy)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference)


@settings(deadline=None, max_examples=40)
@given(steps=st.integers(0, 12), batch=st.integers(0, 5), units=st.integers(0, 35), seed=st.integers(0, 2**31), activation=st.sampled_from(ACTIVATIONS))
def test_gradients_equal_those_of_the_loop_on_ragged_batches(steps: int, batch: int, units: int, seed: int, activation: Activation) -> None:
    z, u, h, mask = case(steps, batch, units, torch.float64, seed)
    u[::3] = 0.0
    leaves, gy = [x.requires_grad_() for x in (z, u, h)], torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ours = torch.autograd.grad(recur(*leaves, mask, activation), leaves, gy, materialize_grads=True)
    theirs = torch.autograd.grad(recur_loop(*leaves, mask, activation).requires_grad_(), leaves, gy, allow_unused=True, materialize_grads=True)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("weight", [None, 0.0, -0.7, 1.3, -1.3])
@pytest.mark.parametrize("shape", [(7, 3, 5), (1, 2, 3), (6, 1, 4), (0, 2, 3)])
def test_gradcheck_in_float64(shape: tuple[int, int, int], weight: float | None, activation: Activation) -> None:
    z, u, h, mask = case(*shape, torch.float64, seed=4)
    if weight is not None:
        u.fill_(weight)
    assert torch.autograd.gradcheck(lambda z, u, h: recur(z, u, h, mask, activation), [x.requires_grad_() for x in (z, u, h)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registered_operator_obeys_the_rules_of_torch(dtype: torch.dtype, activation: Activation) -> None:
    z, u, h, mask = case(5, 2, 3)
    torch.library.opcheck(torch.ops.indrnn.recur.default, (z.to(dtype).requires_grad_(), u.requires_grad_(), h.requires_grad_(), mask, activation))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["float32", "half"])
def test_half_types_are_computed_in_float32(half: torch.dtype, parameters: str, activation: Activation) -> None:
    z, u, h, mask = case(60, 3, 20)
    z, u, h = z.to(half), (u * 0.8).to(half), h.to(half)
    if parameters == "float32":
        u, h = u.float(), h.float()
    leaves, gy = [x.requires_grad_() for x in (z, u, h)], torch.randn(60, 3, 20, generator=torch.Generator().manual_seed(1)).to(half)
    y = recur(*leaves, mask, activation)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    reference = recur_loop(*exact, mask, activation)
    assert y.dtype == half
    rounding = torch.finfo(half).eps  # one rounding on the way out, none carried along
    torch.testing.assert_close(y.double(), reference, rtol=rounding, atol=1e-5)
    ours, theirs = torch.autograd.grad(y, leaves, gy), torch.autograd.grad(reference, exact, gy.double())
    loops = torch.autograd.grad(recur_loop(*leaves, mask, activation), leaves, gy)
    for leaf, mine, loop, exactly in zip(leaves, ours, loops, theirs, strict=True):
        assert mine.dtype == loop.dtype == leaf.dtype
        torch.testing.assert_close(mine.double(), exactly, rtol=4 * rounding, atol=4 * rounding * float(exactly.abs().max()))


def test_autocast_gives_the_recurrence_half_inputs_and_float32_weights() -> None:
    linear, u, mask = torch.nn.Linear(6, 8), torch.rand(8, requires_grad=True), torch.ones(5, 2, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        y = recur(linear(torch.randn(5, 2, 6)), u, torch.zeros(2, 8), mask)
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert u.grad is not None
    assert u.grad.dtype == torch.float32


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loop_serves_where_no_kernel_does(activation: Activation, monkeypatch: pytest.MonkeyPatch) -> None:
    z, u, h, mask = case(7, 3, 5, torch.float64, seed=4)
    with monkeypatch.context() as patch:
        patch.setattr("model.recurrence._kernel", lambda x: None)
        assert torch.autograd.gradcheck(lambda z, u, h: recur(z, u, h, mask, activation), [x.requires_grad_() for x in (z, u, h)])


def test_two_chunks_equal_one_clip() -> None:
    z, u, h, mask = case(40, 3, 20)
    whole = recur(z, u, h, mask)
    first = recur(z[:13], u, h, mask[:13])
    assert torch.equal(torch.cat([first, recur(z[13:], u, first[-1], mask[13:])]), whole)


def test_rows_alone_equal_rows_in_a_ragged_batch() -> None:
    z, u, h, mask = case(30, 6, 17)
    together = recur(z, u, h, mask)
    for b in range(6):
        assert torch.equal(recur(z[:, b : b + 1], u, h[b : b + 1], mask[:, b : b + 1])[:, 0], together[:, b])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_travel_as_in_torch(poison: float) -> None:
    z, u, h, mask = case(12, 2, 40)
    mask[:] = True
    z[3, 0, 5] = poison
    u[5], u[6] = 0.0, 0.7
    leaves = [x.requires_grad_() for x in (z, u, h)]
    ours, theirs = recur(*leaves, mask), recur_loop(*leaves, mask)
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-6)
    for mine, reference in zip(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(theirs.sum(), leaves), strict=True):
        torch.testing.assert_close(mine, reference, equal_nan=True, rtol=1e-4, atol=1e-5)


def _layouts(x: Tensor) -> dict[str, Tensor]:
    """The numbers of x (T, B, N), lying differently in memory; `expanded` holds other numbers."""
    wide = torch.full((*x.shape[:2], x.shape[2] + 5), float("nan"), dtype=x.dtype)
    wide[..., 2:-3] = x
    long = torch.full((2 * len(x), *x.shape[1:]), float("nan"), dtype=x.dtype)
    long[1::2] = x
    return {
        "batch first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "time last": x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "slice of units": wide[..., 2:-3],
        "every second step": long[1::2],
        "expanded over time": x[:1].expand_as(x),
        "one number": x[:1, :1, :1].expand_as(x),
    }


LAYOUTS = list(_layouts(torch.zeros(1, 1, 1)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_that_are_not_contiguous(layout: str, activation: Activation) -> None:
    z, u, h, mask = case(40, 9, 70)  # large enough for two threads
    gy = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    odd = _layouts(z)[layout], u.repeat_interleave(2)[::2], h.t().contiguous().t(), _layouts(mask[..., None])["batch first"][..., 0]
    odd_gy = _layouts(gy)[layout]
    results = []
    for inputs, gradient in ((odd, odd_gy), ([x.contiguous() for x in odd], odd_gy.contiguous())):
        leaves = [x.detach().requires_grad_() for x in inputs[:3]]
        assert [leaf.stride() for leaf in leaves] == [x.stride() for x in inputs[:3]]
        y = recur(*leaves, inputs[3], activation)
        results.append((y, *torch.autograd.grad(y, leaves, gradient)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    torch.testing.assert_close(results[0][0], recur_loop(*odd, activation), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_input_is_copied(layout: str) -> None:
    z, u, h, mask = case(64, 8, 64)
    z, gy, mask = _layouts(z)[layout], _layouts(z)[layout], _layouts(mask[..., None])["batch first"][..., 0]
    with torch.profiler.profile(profile_memory=True) as profile:
        y = cpu.forward(z, u, h, mask, "relu")
        cpu.backward(gy, y, u, h, mask, "relu")
    taken = sum(event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0)
    assert y.nbytes * 2 <= taken < y.nbytes * 2 + 4 * h.nbytes  # y and gz, and what has no time axis


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_states_are_those_of_the_loop_to_the_bit(activation: Activation) -> None:
    z, u, h, mask = case(300, 7, 37)
    ours, reference = recur(z, u * 0.8, h, mask, activation), recur_loop(z, u * 0.8, h, mask, activation)
    if activation == "tanh":  # torch's own is right to a few units in the last place
        torch.testing.assert_close(ours, reference, rtol=2e-6, atol=2e-7)
    else:
        assert torch.equal(ours, reference)


def test_tanh_is_right_everywhere() -> None:
    x = torch.cat([torch.linspace(-25, 25, 40_001, dtype=torch.float64), torch.logspace(-320, 308, 20_000, dtype=torch.float64)])
    z = torch.cat([x, -x, torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan")], dtype=torch.float64)])[None, None]
    y = recur(z, torch.zeros(z.shape[2], dtype=torch.float64), torch.zeros_like(z[0]), torch.ones(1, 1, dtype=torch.bool), "tanh")
    torch.testing.assert_close(y, torch.tanh(z), rtol=1e-15, atol=0, equal_nan=True)


def test_shapes_that_do_not_fit_are_named() -> None:
    z, u, h, mask = case(3, 2, 4)
    with pytest.raises(ValueError, match=r"u \(5,\)"):
        recur(z, torch.rand(5), h, mask)
    with pytest.raises(ValueError, match=r"\(steps, batch, units\), got \(2, 4\)"):
        recur(z[0], u, h, mask)
    with pytest.raises(ValueError, match="one device; got cpu, meta, cpu, cpu"):
        recur(z, u.to("meta"), h, mask)
    for wrong in ((z, u.double(), h), (z, u.bfloat16(), h), (z.bfloat16(), u.half(), h), (z.double(), u, h), (z.long(), u.long(), h.long())):
        with pytest.raises(ValueError, match="one floating dtype"):
            recur(*wrong, mask)
    with pytest.raises(ValueError, match="relu, tanh, identity, not 'gelu'"):
        recur(z, u, h, mask, "gelu")  # type: ignore[arg-type]


def test_called_from_several_threads_at_once() -> None:
    cases = [case(200, 8, 64, seed=seed) for seed in range(4)]
    expected = [recur(*inputs) for inputs in cases]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(20):
            if not torch.equal(recur(*cases[i]), expected[i]):
                wrong.append(i)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


def test_thread_count_follows_torch_and_does_not_change_the_numbers() -> None:
    inputs, before = case(100, 5, 200), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            results.append(recur(*inputs))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, on first use of the mode
@pytest.mark.parametrize("which", [0, 1, 2])
def test_derivatives_in_forward_mode_are_refused_rather_than_zero(which: int) -> None:
    inputs = list(case(5, 2, 3))
    with forward_ad.dual_level():
        inputs[which] = forward_ad.make_dual(inputs[which], torch.ones_like(inputs[which]))
        with pytest.raises(NotImplementedError, match="use recur_loop"):
            recur(*inputs)
        assert forward_ad.unpack_dual(recur_loop(*inputs)).tangent is not None


READ_ONLY = """
import os, sys, torch, model.kernels.cpu as cpu
from model.recurrence import recur
assert type(cpu._forward._cache).__name__ == "NullCache"  # else this test tests nothing
assert torch.isfinite(recur(torch.randn(5, 2, 8), torch.rand(8), torch.zeros(2, 8), torch.ones(5, 2, dtype=torch.bool))).all()
"""


def test_works_from_an_install_where_nothing_can_be_written(tmp_path: Path) -> None:
    """numba has nowhere to keep its cache: neither beside the module nor below HOME."""
    (tmp_path / "model").symlink_to(ROOT / "model")
    env = os.environ | {"HOME": "/dev/null/none", "XDG_CACHE_HOME": "/dev/null/none", "NUMBA_CACHE_LOCATOR_CLASSES": "UserWideCacheLocator"}
    subprocess.run([sys.executable, "-B", "-c", READ_ONLY], check=True, timeout=120, cwd=tmp_path, env=env)


@settings(deadline=None, max_examples=30)
@given(steps=st.integers(0, 20), seed=st.integers(0, 1000))
def test_hold_repeats_the_last_valid_value(steps: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, valid, h = torch.randn(steps, 2, 3, generator=g), torch.rand(steps, 2, 3, generator=g) < 0.5, torch.randn(2, 3, generator=g)
    x[~valid] = float("nan")
    expected, last = [], h
    for t in range(steps):
        last = torch.where(valid[t], x[t], last)
        expected.append(last)
    assert torch.equal(hold(x, valid, h), torch.stack(expected) if expected else x)
