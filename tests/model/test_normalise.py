"""Normalisation over real steps: the compiled kernels give the definition's numbers, and parts of a batch give the whole's."""

import threading

import pytest
import torch
from torch import Tensor

from model import normalise as module
from model.layers import step_mask
from model.normalise import normalise


def case(steps: int = 9, lengths: tuple[int, ...] = (9, 4, 1, 0, 6), units: int = 37, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(steps, len(lengths), units, generator=g, dtype=torch.float64) * 3 + 2
    weight, bias = torch.randn(2, units, generator=g, dtype=torch.float64)
    return [x.to(dtype), step_mask(torch.tensor(lengths), steps), weight.to(dtype), bias.to(dtype)]


def outcome(x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, **more: object) -> list[Tensor]:
    leaves = [v.clone().requires_grad_() for v in (x, weight, bias)]
    y, mean, var, count = normalise(leaves[0], mask, *leaves[1:], 1e-5, **more)  # type: ignore[arg-type]
    (y * torch.arange(y.numel()).reshape(y.shape).sin().to(y.dtype)).sum().backward()
    return [y.detach(), mean, var, count, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("lengths", [(9, 4, 1, 0, 6), (1,), (9, 9)])
def test_gradients_are_those_of_finite_differences(lengths: tuple[int, ...]) -> None:
    x, mask, weight, bias = case(lengths=lengths, units=3)
    leaves = [v.requires_grad_() for v in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda x, w, b: normalise(x, mask, w, b, 1e-1)[0], leaves)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("lengths", [(9, 4, 1, 0, 6), (0, 0), ()])
def test_compiled_kernels_give_the_numbers_of_the_definition(monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], contiguous: bool) -> None:
    pytest.importorskip("numba", reason="numba is missing: the compiled kernels cannot run")
    x, *rest = case(lengths=lengths)
    x = x if contiguous else x.transpose(0, 1).contiguous().transpose(0, 1)
    compiled = outcome(x, *rest)
    monkeypatch.setattr(module, "_compiled_cpu", lambda: None)
    for ours, plain in zip(compiled, outcome(x, *rest), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_normalised_in_float32(dtype: torch.dtype) -> None:
    x, mask, weight, bias = case(dtype=torch.float32)
    y, mean, var, _ = normalise(x.to(dtype), mask, weight, bias, 1e-5)
    expected = normalise(x.to(dtype).float(), mask, weight, bias, 1e-5)
    assert (y.dtype, mean.dtype, var.dtype) == (dtype, torch.float32, torch.float32)
    assert torch.equal(y, expected[0].to(dtype))


def test_gradients_of_gradients_are_refused_rather_than_zero() -> None:
    x, mask, weight, bias = case()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(normalise(x, mask, weight, bias, 1e-5)[0].pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (gradient.square().sum() + x.square().sum()).backward()


def test_a_default_device_changes_nothing() -> None:
    x, mask, weight, bias = case()
    expected = outcome(x, mask, weight, bias)[0]
    with torch.device("meta"):
        y = normalise(x, mask, weight, bias, 1e-5)[0]
    assert torch.equal(y, expected)


def test_threads_change_no_bits() -> None:
    x, *rest = case(steps=200, lengths=(200, 150, 200), units=64, dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(outcome(x, *rest))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("cuts", [[slice(0, 2), slice(2, 5)], [slice(0, None, 2), slice(1, None, 2)], [slice(0, 5), slice(5, 5)]])
def test_parts_that_add_up_their_sums_give_what_the_whole_gives(cuts: list[slice]) -> None:
    x, mask, weight, bias = case()
    whole, factor = outcome(x, mask, weight, bias), torch.arange(x.numel()).reshape(x.shape).sin().to(x)
    meeting, sums, found = threading.Barrier(2), [torch.empty(0)] * 2, list[list[Tensor]]([[], []])

    def part(i: int) -> None:
        def total(own: Tensor) -> Tensor:
            sums[i] = own
            meeting.wait(10)
            result = sums[0] + sums[1]
            meeting.wait(10)
            return result

        rows = cuts[i]
        leaves = [v.clone().requires_grad_() for v in (x[:, rows], weight, bias)]
        y, mean, var, count = normalise(leaves[0], mask[:, rows], *leaves[1:], 1e-5, total)
        # Backward runs on this thread: a leaf on the CPU.
        gradients = torch.autograd.grad((y * factor[:, rows]).sum(), leaves)
        found[i] = [y.detach(), mean, var, count, *gradients]

    threads = [threading.Thread(target=part, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for i, rows in enumerate(cuts):
        torch.testing.assert_close(found[i][0], whole[0][:, rows])
        torch.testing.assert_close(found[i][4], whole[4][:, rows])
        for k in (1, 2, 3):
            torch.testing.assert_close(found[i][k], whole[k])
    for k in (5, 6):
        torch.testing.assert_close(found[0][k] + found[1][k], whole[k])
