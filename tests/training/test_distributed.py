"""Two processes train what one trains: the same losses, weights and statistics, also when cut and resumed; and when one of them goes, so do all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.training.synthetic import clip_set, config, write_config, write_folder
from training.batches import collate, epoch_batches
from training.checkpoint import LAST, Subject, build, load
from training.config import ConfigError, TrainConfig
from training.config import load as load_config
from training.distributed import CPU, Group, choose_device, joined
from training.loop import train
from training.loss import sequence_loss
from training.splits import load as load_splits

ROOT = Path(__file__).parents[2]
BATCH = 11
# Everything that draws random numbers or looks across the batch is on.
SECTIONS: dict[str, Any] = {
    "model": {"norm": "after", "dropout": 0.3, "input_dropout": 0.1, "average": 8, "reset": "soft", "boundary_units": 4},
    "train": {"epochs": 4, "batch": BATCH, "class_weights": "balanced", "ema": 0.9},
}


def command(processes: int, config: Path, out: Path, *more: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    return [sys.executable, *launcher, "-m", "training", "train", str(config), "--out", str(out), *more]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(*arguments: Any) -> str:
    done = subprocess.run(command(*arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    data = write_folder(folder / "clips", clip_set(110, shortest=1, longest=20))
    return write_config(folder / "tiny.toml", data={"path": str(data)}, **SECTIONS)


def wait_for(metrics: Path, count: int, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers(launcher: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc here: the processes of a run cannot be found, so none can be killed")
def test_two_processes_one_of_which_dies_once_equal_one(settings: Path) -> None:
    out = settings.parent / "two"
    together = out / "tiny" / "seed-0"
    process = subprocess.Popen(command(2, settings, out), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for(together / "metrics.jsonl", 1, process)
        os.kill(workers(process.pid)[1], signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode != 0
    assert "another process of this run ended or cannot be reached; go on with --resume" in err
    assert "SIGKILL" in err
    assert load(together / LAST).epoch < 4
    run(2, settings, out, "--resume")

    training = load_splits(load(together / LAST).config).training
    assert len(training) % BATCH == 1, "the last batch is to leave a process without rows"
    assert epoch_batches(training, BATCH, 16) == len(training) // BATCH + 1
    alone = settings.parent / "one"
    alone.mkdir()
    splits = load_splits(load_config(settings))
    train(load_config(settings), splits.training, splits.validation, alone, watch=lambda _: None)
    assert len(rows(together)) == 4
    for ours, theirs in zip(rows(together), rows(alone), strict=True):
        for name in ("loss", "accuracy", "validation_loss", "validation_accuracy", "validation_frame_accuracy", "learning_rate"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), (ours["epoch"], name)
    ours, theirs = load(together / LAST), load(alone / LAST)
    statistics = [name for name in ours.weights if "running" in name]
    assert statistics
    for name, value in ours.training_weights.items():
        torch.testing.assert_close(value, theirs.training_weights[name], rtol=1e-3, atol=2e-5, msg=name)
    for name in statistics:
        torch.testing.assert_close(ours.weights[name], theirs.weights[name], rtol=1e-5, atol=1e-5, msg=name)


def test_two_processes_on_streams_equal_one(tmp_path: Path) -> None:
    """Each carries the state of its own streams, and takes its share of those that an epoch is judged by: three, one of them has fewer."""
    data = write_folder(tmp_path / "clips", clip_set(60))
    streams = {"steps": 3, "frames": 24, "validation": [3, 4], "together": ["subject"], "nothing_weight": 0.5}
    sections = SECTIONS | {"train": SECTIONS["train"] | {"epochs": 2, "batch": 5}, "streams": streams}
    path = write_config(tmp_path / "tiny.toml", data={"path": str(data)}, **sections)
    run(2, path, tmp_path / "two")
    alone, splits = tmp_path / "one", load_splits(load_config(path))
    alone.mkdir()
    train(load_config(path), splits.training, splits.validation, alone, watch=lambda _: None)
    together = tmp_path / "two" / "tiny" / "seed-0"
    for ours, theirs in zip(rows(together), rows(alone), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"waiting", "seconds"}:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-5), (ours["epoch"], name)
    ours, theirs = load(together / LAST), load(alone / LAST)
    for name, value in ours.training_weights.items():
        torch.testing.assert_close(value, theirs.training_weights[name], rtol=1e-3, atol=2e-5, msg=name)


FORKED = """
import os, socket, sys
from training.config import ConfigError, TrainConfig
from training.distributed import ProcessLost, joined
with socket.create_server(("localhost", 0)) as free:
    port = free.getsockname()[1]
child = os.fork()
os.environ |= {"WORLD_SIZE": "2", "RANK": str(int(child == 0)), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
code = 3
with joined(TrainConfig(device="cpu")) as group:
    group.agree("the same")
    try:
        group.agree(("data of", group.rank))
        code = 0 if group.first else 4
    except ConfigError as error:
        code = 0 if "process 1: configuration or clips are not those of the first process" in str(error) else 5
if child == 0:
    os._exit(code)
sys.exit(code or os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_processes_with_other_clips_are_refused_before_they_wait_for_each_other() -> None:
    subprocess.run([sys.executable, "-c", FORKED], cwd=ROOT, env=environment(), check=True, timeout=60)


def test_one_process_is_a_group_that_adds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with joined(TrainConfig(device="cpu")) as group:
        assert (group.first, group.size, group.device, group.rows) == (True, 1, CPU, slice(0, None, 1))
        assert group.total(torch.ones(3)).tolist() == [1, 1, 1]
        assert group.from_first("x") == "x"
        assert group.total_gradients(nn.Linear(2, 1), torch.tensor([3.0])).tolist() == [3.0]


def test_rows_of_all_processes_are_the_batch() -> None:
    batch = collate([np.full((n, 2), n, np.float32) for n in (2, 5, 1, 4)], [0, 1, 0, 1])
    parts = [batch.take(Group(rank, 3).rows) for rank in range(3)]
    assert [part.lengths.tolist() for part in parts] == [[2, 4], [5], [1]]
    assert [part.frames.shape[1] for part in parts] == [4, 5, 1]
    assert sum(float(part.weights.sum()) for part in parts) == pytest.approx(1)
    none = batch.take(Group(4, 5).rows)
    assert none.frames.shape == (0, 1, 2)


@pytest.mark.parametrize("kind", ["plain", "residual", "dense", "rnn", "irnn", "gru", "lstm"])
def test_a_process_without_rows_takes_part_with_gradients_of_zero(kind: str) -> None:
    settings = config(model={"kind": kind, "horizon": 0, "average": 4, "norm": "after"})
    network = build(settings, Subject.of(clip_set(6))).train()
    batch = collate([np.zeros((3, 2), np.float32)] * 2, [0, 1]).take(Group(4, 5).rows)
    logits = network.outputs(batch.frames, batch.lengths, network.initial_state(0)).logits
    sequence_loss(logits, batch, settings.train).backward()
    assert all(p.grad is not None and not p.grad.any() for p in network.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: that there is none cannot be tested")
def test_a_device_that_is_not_there_is_said() -> None:
    assert choose_device(TrainConfig()) == CPU
    with pytest.raises(ConfigError, match="torch sees no NVIDIA GPU"):
        choose_device(config(train={"device": "cuda"}).train)


@pytest.mark.parametrize(("size", "ended"), [("2", b"said"), ("1", b"said and on")])
def test_one_of_several_processes_ends_at_once_with_all_that_it_said(size: str, ended: bytes) -> None:
    """Nothing of the interpreter's end is run, in which threads that were left behind would abort it."""
    script = "import atexit, sys; from training.distributed import leave; atexit.register(sys.stdout.write, ' and on'); sys.stdout.write('said'); leave()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "WORLD_SIZE": size}, capture_output=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ended), done.stderr
