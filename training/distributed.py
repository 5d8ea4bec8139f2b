"""Several processes that train one network, as `torchrun` starts them, on one machine or many.

Every process makes the same global batches and takes its rows of each; sums of normalisation, gradients, losses and scores are added up.
So the split shows in nothing but the last digits. One process is a group of one, and adds up nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.config import ConfigError, TrainConfig

T = TypeVar("T")
CPU = torch.device("cpu")


class ProcessLost(RuntimeError):
    """Another process of the run has ended or cannot be reached; the last checkpoint is intact."""


@dataclass(frozen=True)
class Group:
    """This process among those of its run: its number, how many there are, and the device it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    @property
    def rows(self) -> slice:
        """Its rows of a batch, every `size`-th: batches are sorted by length, so all get their share of long ones."""
        return slice(self.rank, None, self.size)

    def total(self, own: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            _or_lost(lambda: dist.all_reduce(own), self.rank)
        return own

    def from_first(self, value: T) -> T:
        """The first process's value, for all of them."""
        box: list[Any] = [value if self.first else None]
        if self.size > 1:
            _or_lost(lambda: dist.broadcast_object_list(box, device=self.device), self.rank)
        return box[0]  # type: ignore[no-any-return]

    def agree(self, value: object) -> None:
        """Raises `ConfigError` where a process has another configuration or other clips than the first: they would wait for each other."""
        if self.from_first(value) != value:
            raise ConfigError(f"process {self.rank}: configuration or clips are not those of the first process: start all with the same command and data")

    def total_gradients(self, network: nn.Module, figures: Tensor) -> Tensor:
        """Adds up gradients and, in the same message, a few figures (K,) of the step, which are returned."""
        if self.size == 1:
            return figures
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        flat = self.total(torch.cat([figures.to(torch.float32), *(g.flatten() for g in gradients)]))
        parts = torch.split(flat, [len(figures), *(g.numel() for g in gradients)])
        for gradient, part in zip(gradients, parts[1:], strict=True):
            gradient.copy_(part.view_as(gradient))
        return parts[0]


@contextmanager
def joined(config: TrainConfig) -> Iterator[Group]:
    """The group that the environment names: that of `torchrun`, or one process alone. Raises `ConfigError` where the device is not there."""
    size, rank, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")))
    device = choose_device(config, local)
    if size == 1:
        yield Group(device=device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    signal.signal(signal.SIGTERM, lambda *_: _lose(rank, "torchrun has asked this one to end"))
    _or_lost(lambda: dist.init_process_group("nccl" if device.type == "cuda" else "gloo"), rank)
    try:
        yield Group(rank, size, device)
    finally:
        dist.destroy_process_group()


def leave() -> None:
    """Ends a process that was one of several and has done its work, at once: gloo's threads can outlive their group, and then abort the process
    while the interpreter takes itself down, which `torchrun` would take for a failure. Returns where there was but one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def choose_device(config: TrainConfig, local: int = 0) -> torch.device:
    """Where to compute: "auto" takes a GPU where there is one, the `local`-th of them."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cpu" or (config.device == "auto" and not there):
        return CPU
    if not there:
        raise ConfigError("train.device = cuda: torch sees no NVIDIA GPU; set train.device = auto or cpu, or install torch with CUDA")
    if local >= there:
        raise ConfigError(f"process {local} of this machine has no GPU of its own: there are {there}; start {there} with --nproc-per-node {there}")
    return torch.device("cuda", local)


def _or_lost(call: Callable[[], Any], rank: int) -> None:
    try:
        call()
    except (RuntimeError, ValueError) as error:  # what gloo, nccl and the store raise, by their own taste
        _lose(rank, " ".join(str(error).split()))


def _lose(rank: int, reason: str) -> None:
    raise ProcessLost(f"process {rank}: another process of this run ended or cannot be reached; go on with --resume ({reason:.160})") from None
