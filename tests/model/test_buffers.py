"""Buffers come back when nobody holds them, and not before."""

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from model.kernels.buffers import ALIGNMENT, LARGE, Pool
from model.recurrence import recur

SHAPE = torch.Size([4, 10, LARGE // 64])  # 2.5 MB of float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_released_buffer_is_used_again(dtype: torch.dtype) -> None:
    pool = Pool()
    first = pool.empty(SHAPE, dtype).fill_(1)
    assert (first.shape, first.dtype, first.is_contiguous()) == (SHAPE, dtype, True)
    assert first.data_ptr() % ALIGNMENT == 0
    address = first.data_ptr()
    second = pool.empty(SHAPE, dtype).fill_(2)
    assert second.data_ptr() != address
    assert first.eq(1).all()
    del first
    assert pool.empty(SHAPE, dtype).data_ptr() == address


@pytest.mark.parametrize("hold", [lambda x: x[1:2, :, 3], lambda x: x.numpy()[1:, 2], lambda x: x.untyped_storage(), lambda x: memoryview(x.numpy())])
def test_whoever_looks_at_a_buffer_keeps_it(hold: object) -> None:
    pool = Pool()
    x = pool.empty(SHAPE, torch.float32)
    address, held = x.data_ptr(), hold(x)  # type: ignore[operator]
    del x
    assert pool.empty(SHAPE, torch.float32).data_ptr() != address
    del held
    gc.collect()
    assert address in {one.data_ptr() for one in [pool.empty(SHAPE, torch.float32) for _ in range(2)]}


def test_lengths_that_differ_a_little_share_buffers() -> None:
    pool = Pool()
    address = pool.empty(torch.Size([1000, 1000]), torch.float32).data_ptr()
    assert pool.empty(torch.Size([990, 1000]), torch.float32).data_ptr() == address


def test_never_holds_more_than_was_in_use_at_once() -> None:
    pool = Pool()
    most = 0
    for size in range(LARGE, 12 * LARGE, LARGE // 2):
        x = pool.empty(torch.Size([size]), torch.uint8)
        most = max(most, size)
        del x
        pool.empty(torch.Size([LARGE]), torch.uint8)
        assert pool.idle <= 1.25 * most + 2 * ALIGNMENT


def test_small_tensors_are_left_to_torch() -> None:
    pool = Pool()
    pool.empty(torch.Size([100]), torch.float32)
    pool.empty(torch.Size([0, 3, 4]), torch.float32)
    pool.empty(torch.Size([100]), torch.float32)
    assert pool.idle == 0


def test_threads_never_share_a_buffer() -> None:
    pool, wrong = Pool(), []

    def work(number: int) -> None:
        for _ in range(30):
            x = pool.empty(SHAPE, torch.float32).fill_(number)
            if not x.eq(number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_graphs_of_large_tensors_keep_what_they_need() -> None:
    """Several graphs at once, with outputs dropped before backward: saved states must not be written over."""
    u, mask, leaves, losses = torch.rand(64), torch.ones(600, 8, dtype=torch.bool), [], []
    for seed in range(4):
        z = torch.randn(600, 8, 64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        losses.append(recur(recur(z, u, torch.zeros(8, 64), mask), -u, torch.zeros(8, 64), mask).square().sum())
        leaves.append(z)
        recur(torch.full((600, 8, 64), 9.0), u, torch.zeros(8, 64), mask)
    together = torch.autograd.grad(losses, leaves)
    for z, gradient in zip(leaves, together, strict=True):
        y = recur(recur(z.double(), u.double(), torch.zeros(8, 64).double(), mask), -u.double(), torch.zeros(8, 64).double(), mask)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), z)[0], gradient, rtol=1e-4, atol=1e-4)


FORKED = """
import os, signal, sys, torch
from model.kernels import buffers
buffers._pool._lock.acquire()  # as another thread of the parent may
child = os.fork()
if child == 0:
    signal.alarm(20)
    buffers.empty(torch.Size([1 << 20]), torch.float32)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_does_not_wait_for_threads_of_its_parent() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60, cwd=Path(__file__).parents[2])
