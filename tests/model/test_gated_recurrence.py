"""`recur` with keep, a share of the state that each step forgets, against the plain loop: on the same odd cases as without."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from model.config import Activation
from model.kernels import cpu, threads
from model.recurrence import GATED_RECURRENCES, RECURRENCES, recur, recur_loop

ACTIVATIONS = list(RECURRENCES)
NAN = float("nan")


@pytest.fixture(autouse=True, scope="module")
def _threads_for_little_work() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threads, "SMALL", 1 << 12)
        yield


class Case(NamedTuple):
    z: Tensor
    u: Tensor
    h: Tensor
    mask: Tensor
    keep: Tensor

    def recur(self, activation: Activation = "relu") -> Tensor:
        return recur(self.z, self.u, self.h, self.mask, activation, self.keep)

    def loop(self, activation: Activation = "relu") -> Tensor:
        return recur_loop(self.z, self.u, self.h, self.mask, activation, self.keep)

    def leaves(self) -> "Case":
        """The same with gradients."""
        return self._replace(**{name: getattr(self, name).detach().requires_grad_() for name in ("z", "u", "h", "keep")})

    @property
    def differentiable(self) -> list[Tensor]:
        return [self.z, self.u, self.h, self.keep]


def case(steps: int, batch: int, units: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Case:
    """Rows end at different steps and have gaps; u is negative, 0 and beyond one as well; keep is 0 and 1 as well, NaN where nothing moves."""
    g = torch.Generator().manual_seed(seed)
    z, h = torch.randn(steps, batch, units, generator=g, dtype=dtype), torch.randn(batch, units, generator=g, dtype=dtype)
    u = torch.rand(units, generator=g, dtype=dtype) * 2.4 - 1.2
    u[::5] = 0.0
    mask = torch.arange(steps)[:, None] < torch.randint(0, steps + 1, (batch,), generator=g)
    mask &= torch.rand(steps, batch, generator=g) < 0.9
    keep = (torch.rand(steps, batch, generator=g, dtype=dtype) * 1.4 - 0.2).clamp(0, 1)
    return Case(z, u, h, mask, torch.where(mask, keep, NAN))


def assert_gradients_equal(one: Case, activation: Activation, seed: int = 1) -> None:
    gy = torch.randn(one.z.shape, dtype=one.z.dtype, generator=torch.Generator().manual_seed(seed))
    ours, theirs = one.leaves(), one.leaves()
    mine = torch.autograd.grad(ours.recur(activation), ours.differentiable, gy, materialize_grads=True)
    reference = torch.autograd.grad(theirs.loop(activation).requires_grad_(), theirs.differentiable, gy, allow_unused=True, materialize_grads=True)
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b)
    assert not mine[3][~one.mask].any()


@settings(deadline=None, max_examples=40)
@given(steps=st.integers(0, 40), batch=st.integers(0, 9), units=st.integers(0, 70), seed=st.integers(0, 2**31), activation=st.sampled_from(ACTIVATIONS))
def test_kernel_equals_loop_on_ragged_batches(steps: int, batch: int, units: int, seed: int, activation: Activation) -> None:
    one = case(steps, batch, units, seed=seed)
    torch.testing.assert_close(one.recur(activation), one.loop(activation), rtol=2e-5, atol=2e-6)


@settings(deadline=None, max_examples=30)
@given(steps=st.integers(0, 12), batch=st.integers(0, 5), units=st.integers(0, 35), seed=st.integers(0, 2**31), activation=st.sampled_from(ACTIVATIONS))
def test_gradients_equal_those_of_the_loop_on_ragged_batches(steps: int, batch: int, units: int, seed: int, activation: Activation) -> None:
    assert_gradients_equal(case(steps, batch, units, torch.float64, seed), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(50, 4, 33), (100, 8, 64), (90, 1, 257)])
def test_gradients_equal_those_of_the_loop_on_several_threads(shape: tuple[int, int, int], activation: Activation) -> None:
    one = case(*shape, torch.float64)
    assert_gradients_equal(one._replace(u=one.u.clamp(-1, 1)), activation)


@pytest.mark.parametrize("served_by", ["kernel", "loop"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("shape", "weight"), [((7, 3, 5), None), ((7, 3, 5), -0.7), ((6, 1, 4), 1.3), ((1, 2, 3), -1.3), ((0, 2, 3), None)])
def test_gradcheck_in_float64(
    shape: tuple[int, int, int], weight: float | None, activation: Activation, served_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = case(*shape, torch.float64, seed=4)
    if weight is not None:
        one.u.fill_(weight)
    keep = torch.rand(shape[:2], dtype=torch.float64, generator=torch.Generator().manual_seed(3))  # numbers everywhere, to be moved a little
    inputs = one._replace(keep=keep).leaves().differentiable
    if served_by == "loop":
        monkeypatch.setattr("model.recurrence._kernel", lambda x: None)
    assert torch.autograd.gradcheck(lambda z, u, h, keep: recur(z, u, h, one.mask, activation, keep), inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_forgetting_the_bits_are_those_without_keep(activation: Activation) -> None:
    one = case(60, 7, 37)
    one = one._replace(keep=torch.ones(60, 7)).leaves()
    plain = recur(one.z, one.u, one.h, one.mask, activation)
    gated = one.recur(activation)
    assert torch.equal(gated, plain)
    gy = torch.randn(plain.shape)
    ours, theirs = torch.autograd.grad(gated, one.differentiable[:3], gy), torch.autograd.grad(plain, one.differentiable[:3], gy)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_step_that_keeps_nothing_starts_anew() -> None:
    z, u, mask, keep = torch.randn(20, 2, 9), torch.rand(9), torch.ones(20, 2, dtype=torch.bool), torch.ones(20, 2)
    keep[8, 0] = 0
    y = recur(z, u, torch.rand(2, 9), mask, "relu", keep)
    assert torch.equal(y[8:, :1], recur(z[8:, :1], u, torch.zeros(1, 9), mask[8:, :1]))
    assert not torch.equal(y[8:, 1:], recur(z[8:, 1:], u, torch.zeros(1, 9), mask[8:, 1:]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["float32", "half"])
def test_half_types_are_computed_in_float32(half: torch.dtype, parameters: str, activation: Activation) -> None:
    one = case(60, 3, 20)
    one = one._replace(z=one.z.to(half), u=(one.u * 0.8).to(half), h=one.h.to(half), keep=one.keep.to(half))
    if parameters == "float32":
        one = one._replace(u=one.u.float(), h=one.h.float(), keep=one.keep.float())
    one, gy = one.leaves(), torch.randn(60, 3, 20, generator=torch.Generator().manual_seed(1)).to(half)
    exact = Case(*(x.detach() if x.dtype == torch.bool else x.detach().double() for x in one)).leaves()
    y, reference, loop = one.recur(activation), exact.loop(activation), one.loop(activation)
    rounding = torch.finfo(half).eps
    torch.testing.assert_close(y.double(), reference, rtol=rounding, atol=1e-5)
    assert y.dtype == loop.dtype == half
    gradients = (torch.autograd.grad(out, of.differentiable, gy.to(out.dtype)) for out, of in ((y, one), (reference, exact)))
    for leaf, mine, exactly in zip(one.differentiable, *gradients, strict=True):
        assert mine.dtype == leaf.dtype
        torch.testing.assert_close(mine.double(), exactly, rtol=4 * rounding, atol=4 * rounding * float(exactly.abs().max()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registered_operator_obeys_the_rules_of_torch(dtype: torch.dtype, activation: Activation) -> None:
    one = case(5, 2, 3)
    z, u, h, keep = (x.requires_grad_() for x in (one.z.to(dtype), one.u, one.h, torch.rand(5, 2)))
    torch.library.opcheck(torch.ops.indrnn.recur_gated.default, (z, u, h, one.mask, keep, activation))


def test_two_chunks_equal_one_clip_and_rows_alone_the_same_in_a_batch() -> None:
    z, u, h, mask, keep = case(40, 5, 20)
    whole = recur(z, u, h, mask, "relu", keep)
    first = recur(z[:13], u, h, mask[:13], "relu", keep[:13])
    assert torch.equal(torch.cat([first, recur(z[13:], u, first[-1], mask[13:], "relu", keep[13:])]), whole)
    for b in range(5):
        row = slice(b, b + 1)
        assert torch.equal(recur(z[:, row], u, h[row], mask[:, row], "relu", keep[:, row]), whole[:, row])


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_float32_states_are_those_of_the_loop_to_the_bit(activation: Activation) -> None:
    one = case(300, 7, 37)
    one = one._replace(u=one.u * 0.8)
    assert torch.equal(one.recur(activation), one.loop(activation))


@pytest.mark.parametrize("poison", [NAN, float("inf"), float("-inf")])
def test_non_finite_values_travel_as_in_torch(poison: float) -> None:
    one = case(12, 2, 40)
    one = one._replace(mask=torch.ones(12, 2, dtype=torch.bool), keep=torch.rand(12, 2))
    one.z[3, 0, 5] = poison
    one.u[5], one.u[6], one.keep[6, 0] = 0.5, 0.7, 0.0  # 0 * inf: to be forgotten is not enough for what is not a number
    one = one.leaves()
    ours, theirs = one.recur(), one.loop()
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-6)
    for mine, reference in zip(*(torch.autograd.grad(y.sum(), one.differentiable) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, reference, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_inputs_that_are_not_contiguous(activation: Activation) -> None:
    one = case(40, 9, 70)
    gy = torch.randn(40, 9, 70, generator=torch.Generator().manual_seed(1))
    wide = torch.full((40, 9, 75), NAN)
    wide[..., 2:-3] = one.z
    layouts = [
        (one.z.transpose(0, 1).contiguous().transpose(0, 1), gy.permute(1, 2, 0).contiguous().permute(2, 0, 1)),
        (wide[..., 2:-3], torch.stack([gy, gy])[1]),
        (one.z.permute(1, 2, 0).contiguous().permute(2, 0, 1), gy.transpose(0, 1).contiguous().transpose(0, 1)),
    ]
    straight = one.leaves()
    expected = [straight.recur(activation), *torch.autograd.grad(straight.recur(activation), straight.differentiable, gy)]
    for z, gradient in layouts:
        spread = torch.stack([one.keep, one.keep]).permute(2, 1, 0).contiguous().permute(2, 1, 0)[1]
        odd = Case(z, one.u.repeat_interleave(2)[::2], one.h.t().contiguous().t(), one.mask.t().contiguous().t(), spread).leaves()
        assert not odd.z.is_contiguous()
        assert not odd.keep.is_contiguous()
        y = odd.recur(activation)
        for mine, reference in zip([y, *torch.autograd.grad(y, odd.differentiable, gradient)], expected, strict=True):
            assert torch.equal(mine, reference)


def test_thread_count_does_not_change_the_numbers() -> None:
    one, before, results = case(60, 5, 200), torch.get_num_threads(), []
    gy = torch.randn(60, 5, 200)
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            y = cpu.forward_gated(*one, "relu")
            results.append((y, *cpu.backward_gated(gy, y, one.u, one.h, one.mask, one.keep, "relu")))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


def test_what_does_not_fit_is_named() -> None:
    z, u, h, mask, keep = case(3, 2, 4)
    for wrong, named in (
        (keep.t(), r"needs keep \(3, 2\) of that type.*got \(2, 3\)"),
        (keep.double(), "float64"),
        (keep.bool(), "bool"),
        (keep.to("meta"), "on meta"),
    ):
        with pytest.raises(ValueError, match=named):
            recur(z, u, h, mask, "relu", wrong)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, on first use of the mode
def test_derivatives_in_forward_mode_are_refused_rather_than_zero() -> None:
    one = case(5, 2, 3)
    with forward_ad.dual_level():
        moving = one._replace(keep=forward_ad.make_dual(torch.rand(5, 2), torch.ones(5, 2)))
        with pytest.raises(NotImplementedError, match="use recur_loop"):
            moving.recur()


def test_every_activation_has_a_name_in_the_file() -> None:
    assert list(GATED_RECURRENCES) == list(RECURRENCES)
    assert not set(GATED_RECURRENCES.values()) & set(RECURRENCES.values())
