"""The endless benchmark on toys: what it reports of a short stream, and that each bar it has can be missed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from model.contract import MANIFEST_KEY, MODEL_FILE
from tests.bench import endless
from tests.bench.conftest import PLAIN, arguments
from tests.bench.endless import Beside, Memory, Report, Streamed, chance, resident_mb
from tests.bench.held_out import BenchError
from tests.toy_models import build, manifest_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("model", ["bodies", "plain"])
def test_a_short_stream(toys: dict[str, Path], tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "endless.json"
    monkeypatch.setattr(sys, "argv", ["endless", *arguments(toys, model, "--frames", "4000", "--json", str(file))])
    status = endless.main()
    said = capsys.readouterr()
    assert status == 0, said.err
    kept = json.loads(file.read_text())
    assert kept["finite"]
    assert kept["difference"] == 0
    assert kept["missed"] == []
    assert 60 < kept["actions"]["count"] < 250
    assert len(kept["memory"]["mb"]) > 100
    assert 20 < kept["memory"]["mb"][0] < 1000
    assert 0 < kept["state"]["largest"] < 1000
    assert (kept["events"].get("found", 0) > 0) == (model == "bodies")
    assert "same bits" in said.out
    assert ("events that started" in said.out) == (model == "bodies")


def test_a_network_that_forgets_nothing_is_found_out(
    toys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With u = 1 in every unit the state adds up whatever comes, and the scores stay finite."""
    graph = build(PLAIN)
    for constant in graph.graph.initializer:
        if constant.name in ("u0", "u1"):
            constant.CopyFrom(numpy_helper.from_array(np.ones(PLAIN.units, np.float32), constant.name))
    onnx.helper.set_model_props(graph, {MANIFEST_KEY: manifest_of(PLAIN, graph, "endless").to_json()})
    path = tmp_path / "endless" / "1" / MODEL_FILE
    path.parent.mkdir(parents=True)
    onnx.save(graph, path)
    monkeypatch.setattr(sys, "argv", ["endless", *arguments({**toys, "models": tmp_path}, "endless", "--frames", "2000")])
    status = endless.main()
    said = capsys.readouterr()
    assert status == 1
    assert "MISSED: the state is not bounded" in said.err
    assert "| all scores finite" in said.out


def test_ctrl_c_leaves_nothing_behind(toys: dict[str, Path]) -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.bench.endless", *arguments(toys, "plain", "--frames", "10000000")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (children := _servers(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "stopped" in said
    assert "Traceback" not in said
    assert children
    assert not [child for child in children if Path(f"/proc/{child}").exists()]


def _servers(process: int) -> list[int]:
    """Child processes that are past their fork and run the service."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in children if b"\0service\0" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.parametrize(
    ("model", "changes", "fault"),
    [
        ("absent", {}, "no model there"),
        ("channels", {}, "the model channels takes (3,)"),
        ("plain", {"config": "absent.toml"}, "no such file"),
        ("plain", {"data": "absent"}, "absent"),
        ("plain", {"frames": "20"}, "ask for more"),
    ],
)
def test_faults_are_one_line(
    toys: dict[str, Path], model: str, changes: dict[str, str], fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [value for name, text in changes.items() for value in (f"--{name}", text)]
    monkeypatch.setattr(sys, "argv", ["endless", *arguments(toys, model, *more)])
    assert endless.main() == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert fault in error
    assert error.count("\n") == 1


def report(**changes: Any) -> Report:
    """Of a run in which all is well: 200 actions, all but each tenth right."""
    frames = list(range(0, 1000, 10))
    memory = Memory(0, frames, changes.pop("mb", [100.0] * len(frames)))
    scores = changes.pop("scores", np.full((1000, 3), 1 / 3, np.float32))
    beside = Beside(changes.pop("state", np.full(20, 7.0)), 0.0)
    right = changes.pop("right", np.arange(200) % 10 > 0)
    assert not changes
    return Report({}, Streamed(scores, memory, seconds=1.0), beside, right, 0.9, {})


def test_a_run_in_which_all_is_well_misses_nothing() -> None:
    assert report().missed() == []
    assert report(state=np.array([5.0] + [9.9] * 19)).missed() == []
    assert report(mb=[100.0 + (0 if i < 10 else 30.0) for i in range(100)]).missed() == []  # grew while it warmed up
    assert report(right=np.arange(200) < 196).missed() == []  # four of the last fifty are wrong, which may be luck


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scores": np.where(np.arange(1000)[:, None] < 640, np.float32(0.5), np.float32(np.nan))}, "not finite from frame 640 on"),
        ({"state": np.array([1.0, 1.0, *[2.1] * 18])}, "the state is not bounded: at most 1 in the first tenth of the frames, 2.1 in the last"),
        ({"state": np.array([1.0] * 19 + [np.nan])}, "the state is not bounded"),
        ({"mb": [100 + 0.06 * i for i in range(100)]}, "memory of the service grows by 5.3 MB"),
        ({"right": np.arange(200) < 190}, "the last 50 actions are recognised less often than the first: 40 against 50"),
    ],
)
def test_each_bar_can_be_missed(changes: dict[str, Any], sentence: str) -> None:
    missed = report(**changes).missed()
    assert len(missed) == 1
    assert sentence in missed[0]


def test_chance_is_fishers() -> None:
    assert chance(3, 1, 4) == pytest.approx((4 * 4 + 1) / 70)  # of 8 choose 4 ways those with at most one right at the end
    assert chance(50, 50, 50) == 1
    assert chance(45, 50, 50) == 1


def test_memory_is_that_of_the_process() -> None:
    before = resident_mb(os.getpid())
    held = np.ones(2**23)  # 64 MB
    assert 40 < resident_mb(os.getpid()) - before < 90, held[0]
    with pytest.raises(BenchError, match="cannot be read"):
        resident_mb(2**22 + 1)
