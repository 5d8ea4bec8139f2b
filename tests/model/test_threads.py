"""Slices on torch's own threads and on the pool: every cell once, faults reach the caller, several callers at once, forks."""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from model.kernels import threads
from model.kernels.threads import over_slices
from model.recurrence import recur

ROOT = Path(__file__).parents[2]
WAYS = ["team", "pool"]


@pytest.fixture(params=WAYS, autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    chosen: str = request.param
    if chosen == "pool":
        monkeypatch.setattr(threads, "_team", lambda: None)
    elif threads._team() is None:
        pytest.skip("torch has no OpenMP library with GOMP_parallel here: only the pool can be tested")
    monkeypatch.setattr(threads, "SMALL", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield chosen
    torch.set_num_threads(before)


def on_linux_torch_has_such_a_library() -> bool:
    return sys.platform.startswith("linux") and torch.backends.openmp.is_available()


def test_a_team_is_found_where_torch_runs_on_openmp() -> None:
    threads._find_team.cache_clear()
    assert threads._find_team() is not None or not on_linux_torch_has_such_a_library()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("shape", [(4, 1, 1), (4, 5, 40), (4, 1, 200), (4, 2, 130), (4, 64, 3), (0, 3, 3), (4, 0, 3), (4, 3, 0)])
def test_every_cell_is_worked_on_once(shape: tuple[int, int, int], count: int) -> None:
    torch.set_num_threads(count)
    visits, pieces = np.zeros(shape[1:], np.int64), list[tuple[slice, slice]]()

    def work(rows: slice, units: slice) -> None:
        visits[rows, units] += 1
        pieces.append((rows, units))

    over_slices(work, torch.Size(shape))
    assert (visits == 1).all()
    assert len(pieces) <= max(1, count)


@pytest.mark.parametrize("way", ["team"], indirect=True)
def test_the_team_is_that_of_torch(way: str) -> None:
    """No thread is started for slices: they run on those which torch's own operators have left behind."""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("no /proc/self/task here: threads can be counted on Linux only")
    torch.randn(600, 600) @ torch.randn(600, 600)
    torch.randn(1 << 20).sin_()  # torch's own loops, beside those of its matrix library
    before, used, meet = set(os.listdir("/proc/self/task")), set[int](), threading.Barrier(3)

    def work(rows: slice, units: slice) -> None:
        used.add(threading.get_native_id())
        meet.wait(20)  # three slices at once need three threads

    for _ in range(5):
        over_slices(work, torch.Size((1, 3, 16)))
    assert {str(one) for one in used} <= before
    assert len(used) == 3
    assert set(os.listdir("/proc/self/task")) == before


def test_a_fault_reaches_the_caller_and_the_other_slices_are_done() -> None:
    done: list[int] = []

    def work(rows: slice, units: slice) -> None:
        if rows.start == 1:
            raise ArithmeticError("slice 1")
        done.append(rows.start)

    with pytest.raises(ArithmeticError, match="slice 1"):
        over_slices(work, torch.Size((1, 3, 16)))
    assert sorted(done) == [0, 2]
    over_slices(lambda rows, units: done.append(rows.start + 10), torch.Size((1, 3, 16)))  # and the threads live on
    assert sorted(done) == [0, 2, 10, 11, 12]


def test_what_a_team_leaves_is_done_by_the_caller() -> None:
    """A signal's exception may end a thread's share before it has begun."""
    done: list[int] = []
    threads._on_team(lambda *_: None, lambda rows, units: done.append(rows.start), [(slice(i, i + 1), slice(0, 1)) for i in range(4)])
    assert done == [0, 1, 2, 3]


def test_slices_within_slices() -> None:
    visits = np.zeros((3, 5), np.int64)

    def outer(rows: slice, units: slice) -> None:
        def inner(_: slice, columns: slice) -> None:
            visits[rows, columns] += 1

        over_slices(inner, torch.Size((1, 1, 5)))

    over_slices(outer, torch.Size((1, 3, 5)))
    assert (visits >= 1).all()


def test_several_callers_at_once_beside_matrix_products() -> None:
    """Each with operators of torch in between, forwards and backwards."""
    weight, u, mask = torch.randn(64, 64) / 8, torch.rand(64, requires_grad=True), torch.ones(50, 8, dtype=torch.bool)
    inputs = [torch.randn(50, 8, 64, generator=torch.Generator().manual_seed(seed), requires_grad=True) for seed in range(3)]

    def step(i: int) -> torch.Tensor:
        y = recur(inputs[i] @ weight, u, torch.zeros(8, 64), mask)
        return torch.cat([y.detach(), torch.autograd.grad(y.sum(), inputs[i])[0]])

    expected, wrong, ended = [step(i) for i in range(3)], list[int](), list[int]()

    def work(i: int) -> None:
        torch.set_num_threads(2)
        wrong.extend(i for _ in range(15) if not torch.equal(step(i), expected[i]))
        ended.append(i)

    callers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert sorted(ended) == [0, 1, 2]
    assert not wrong


@pytest.mark.parametrize("missing", ["library", "symbol", "file", "OpenMP"])
def test_without_the_library_the_pool_serves(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: str) -> object:
        if missing == "library":
            raise OSError("not here")
        return object()

    with monkeypatch.context() as patch:
        if missing == "OpenMP":
            patch.setattr(torch.backends.openmp, "is_available", lambda: False)
        elif missing == "file":
            patch.setattr(torch._C, "__file__", None)
        else:
            patch.setattr(ctypes, "CDLL", load)
        threads._find_team.cache_clear()
        assert threads._find_team() is None
    threads._find_team.cache_clear()


FORKED = """
import os, signal, sys, torch
from model.kernels import threads
from model.recurrence import recur
way = sys.argv[1]
if way == "pool":
    threads._team = lambda: None
torch.set_num_threads(2)
threads.SMALL = 1 << 12
weight, args = torch.randn(300, 300), (torch.randn(300, 8, 64), torch.rand(64), torch.zeros(8, 64), torch.ones(300, 8, dtype=torch.bool))
product, expected = weight @ weight, recur(*args)
assert (threads._pool is None) == (way == "team")
for count in (1, 2):
    child = os.fork()
    if child == 0:
        signal.alarm(40)  # ends a child that hangs
        torch.set_num_threads(count)
        right = (recur(*args).numpy() == expected.numpy()).all()
        if count == 1:  # with more, torch's own operators wait for ever for the parent's threads; the recurrence must not
            right = right and torch.allclose(weight @ weight, product, rtol=1e-4, atol=1e-4)
        os._exit(0 if right else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, f"a child with {count} threads"
assert torch.equal(recur(*args), expected)  # and the parent goes on
"""


def test_works_in_forked_workers(way: str) -> None:
    subprocess.run([sys.executable, "-c", FORKED, way], check=True, timeout=110, cwd=ROOT)
