"""The estimate of memory: near what is measured, and said before anything of that size is made."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.kernels import buffers
from tests.training.synthetic import clip_set, config
from training import memory
from training.checkpoint import Subject
from training.config import ConfigError
from training.distributed import CPU

ROOT = Path(__file__).parents[2]
SUBJECT = Subject.of(clip_set(6))
MEASURE = """
from training import memory
from training.batches import collate
from training.checkpoint import build
from training.loss import sequence_loss
from tests.training.test_memory import *
import numpy as np
settings = config(model={"units": 256, "layers": 4, "kind": sys.argv[1], "horizon": 0}, train={"batch": 64, "threads": 1})
network = build(settings, SUBJECT)
def step(clips, frames):
    batch = collate([np.zeros((frames, 2), np.float32)] * clips, [0] * clips)
    logits = network.outputs(batch.frames, batch.lengths, network.initial_state(clips)).logits
    sequence_loss(logits, batch, settings.train).backward()
def peak():
    return memory._field(Path("/proc/self/status"), "VmHWM:")
step(2, 4)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: compiling takes more than a step
before = peak()
step(64, 150)
print((peak() - before) / memory.check(settings, SUBJECT, 150, CPU).activations)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc/self/clear_refs here: the peak of memory cannot be measured")
@pytest.mark.parametrize("kind", ["plain", "lstm"])
def test_activations_are_near_what_is_measured(kind: str) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, kind], cwd=ROOT, capture_output=True, text=True, timeout=100, check=True)
    assert 0.6 < float(done.stdout) < 1.6


def test_grows_with_batch_frames_and_units() -> None:
    def total(steps: int = 50, **sections: dict[str, int]) -> int:
        return memory.check(config(**sections), SUBJECT, steps, CPU).total

    assert total(100) > 1.8 * total(50) > 0
    assert total(train={"batch": 16}) > 1.8 * total(train={"batch": 8})
    assert total(model={"units": 64}) > 4 * total(model={"units": 8})


@pytest.mark.parametrize(
    ("sections", "lower"),
    [
        ({"model": {"units": 10**7}}, "lower model.units or model.layers"),  # a matrix of 400 TB: to make it would fail
        ({"train": {"batch": 10**9}}, "lower train.batch or train.max_frames"),
    ],
)
def test_what_cannot_fit_is_said_with_what_is_there_and_what_to_lower(sections: dict[str, dict[str, int]], lower: str) -> None:
    with pytest.raises(ConfigError, match=r"estimated to need [\d.]+ GiB, and [\d.]+ GiB of memory are free: weights and optimiser") as error:
        memory.check(config(**sections), SUBJECT, 64, CPU)
    assert lower in str(error.value)


def test_what_to_lower_is_named_for_streams_too() -> None:
    with pytest.raises(ConfigError, match=r"activations of 1000000000 streams of 64 frames .* lower train.batch or streams.frames"):
        memory.check(config(train={"batch": 10**9}, streams={}), SUBJECT, 64, CPU)


def test_what_an_earlier_run_left_is_there_to_take() -> None:
    buffers.empty(torch.Size([1 << 22]), torch.float32)
    assert buffers._pool._returned or buffers._pool.idle
    memory.available(CPU)
    assert not buffers._pool._returned
    assert buffers._pool.idle == 0


def test_several_processes_share_the_machine_and_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_field", lambda *_: 2**33)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    whole = memory.available(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available(CPU) == pytest.approx(whole / 4, rel=0.01)
    alone, divided = (memory.check(config(), SUBJECT, 50, torch.device("cpu"), processes).activations for processes in (1, 4))
    assert divided == pytest.approx(alone / 4, rel=0.01)
