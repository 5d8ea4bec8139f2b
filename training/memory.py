"""How much memory a run will need, before anything of that size exists.

    weights      4 bytes a parameter, each of: weights, their running mean, gradients, two moments of Adam           20 P
    activations  what sixteen more frames add to what autograd keeps of a small batch, times clips * frames / 16 of the largest batch,
                 and half as much again, as measured, for results in between and gradients on their way back: but half of
                 the workspace of oneDNN's LSTM, more of which is never written to
    batches      frames of the batches that are made ahead

In float32, also where half precision would need less; what torch and the data themselves take is there already. An estimate:
allocators round up, kernels use scratch.
"""

from __future__ import annotations

import contextlib
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from model.kernels.buffers import release
from model.network import Network
from training.checkpoint import Subject, build
from training.config import Config, ConfigError

BATCHES_AHEAD = 16
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Bytes that one process will need."""

    weights: int
    activations: int = 0
    batches: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.activations + self.batches


def check(config: Config, subject: Subject, steps: int, device: torch.device, processes: int = 1) -> Estimate:
    """What batches of clips of up to `steps` frames, or of so many steps of streams, will take.

    Raises `ConfigError` saying what would be needed, what there is, and what to lower, when a run cannot fit.
    """
    with torch.device("meta"):  # shapes without content
        parameters = sum(p.numel() for p in build(config, subject).parameters())
    there = available(device)
    found = Estimate(weights=20 * parameters)
    if found.total <= there:  # else the network itself might be too much to look at
        clips = -(-config.train.batch // processes)
        batches = BATCHES_AHEAD * config.train.batch * steps * math.prod(subject.frame_shape) * 4 if device.type == "cpu" else 0
        found = replace(found, activations=_activations(build(config, subject).train(), clips * steps), batches=batches)
    if found.total > there:
        where = "of the GPU" if device.type == "cuda" else "of memory"
        sequences, frames = ("streams", "streams.frames") if config.streams else ("clips", "train.max_frames")
        activations = f", activations of {config.train.batch} {sequences} of {steps} frames {found.activations / GIB:.1f}" if found.activations else ""
        lower = f"train.batch or {frames}, or model.units or model.layers" if found.weights < there else "model.units or model.layers"
        raise ConfigError(
            f"estimated to need {found.total / GIB:.1f} GiB, and {there / GIB:.1f} GiB {where} are free: weights and optimiser "
            f"{found.weights / GIB:.1f}{activations}, batches made ahead {found.batches / GIB:.1f}; lower {lower}"
        )
    return found


def available(device: torch.device) -> int:
    """Bytes that this process may still take: of its GPU; else its share of what the machine or its container has free.

    What an earlier run of this process left is given back first.
    """
    release()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    free = [_field(Path("/proc/meminfo"), "MemAvailable:") or (1 << 62)]
    for limit, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        with contextlib.suppress(OSError, ValueError):  # no such control group, or "max": no limit
            free.append(int(Path("/sys/fs/cgroup", limit).read_text()) - int(Path("/sys/fs/cgroup", used).read_text()))
    return min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _activations(network: Network, frames: int) -> int:
    """Bytes for so many frames in all: what sixteen frames add to a small batch, times as many."""
    return round((_kept(network, 16) - _kept(network, 8)) * frames / 16)


def _kept(network: Network, steps: int) -> float:
    """Bytes that autograd keeps of two clips of so many steps, each storage counted once, and what goes with them."""
    kept: dict[int, float] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        workspace = tensor.dtype == torch.uint8  # of oneDNN's LSTM
        kept[storage.data_ptr()] = storage.nbytes() * (0.5 if workspace else 1.5)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network.outputs(torch.zeros(2, steps, *network.frame_shape), torch.tensor([steps, steps]), network.initial_state(2))
    del outputs  # until here: addresses are not used twice
    return sum(kept.values())


def _field(path: Path, name: str) -> int:
    """A line "NAME  N kB" as bytes; 0 where the system has none."""
    with contextlib.suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0
