from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from model.contract import FRAMES, MANIFEST_KEY
from service import engine
from service.engine import Engine, EngineError
from service.errors import StartupError
from tests import toy_models
from tests.server_process import ROOT
from tests.toy_models import CHANNELS, GAPPY, GAPPY_CHANNELS, SKELETON, Toy


def load(path: Path) -> Engine:
    return Engine.load(path, "cpu", 1)


@pytest.mark.parametrize("toy", [CHANNELS, SKELETON, GAPPY, GAPPY_CHANNELS])
def test_chunks_equal_the_clip_and_rows_their_lonely_selves(tmp_path: Path, toy: Toy) -> None:
    one = load(toy_models.write_toy(tmp_path, "toy", toy))
    frames, zero = toy_models.example_frames(toy, 60), np.zeros((1, toy.width), np.float32)
    if toy.missing:
        frames[5, 1] = np.nan
    whole, end = one.run_batch(frames[None], np.array([60]), zero)
    state, parts = zero, []
    for first, last in ((0, 1), (1, 20), (20, 60)):
        scores, state = one.run_batch(frames[None, first:last], np.array([last - first]), state)
        parts.append(scores[0])
    assert np.concatenate(parts).tobytes() == whole[0].tobytes()
    assert state.tobytes() == end.tobytes()
    neighbours = np.stack([frames, *(toy_models.example_frames(toy, 60, seed) for seed in range(5))])
    scores, states = one.run_batch(neighbours, np.array([60, 1, 0, 60, 17, 3]), np.zeros((6, toy.width), np.float32))
    assert scores[0].tobytes() == whole[0].tobytes()
    assert states[0].tobytes() == end[0].tobytes()
    assert not states[2].any()  # no real step: the row did not move


def test_it_says_where_it_runs(tmp_path: Path) -> None:
    path = toy_models.write_toy(tmp_path, "toy")
    assert load(path).device.to_dict() == {"name": "cpu", "provider": "CPUExecutionProvider", "threads": 1, "reason": ""}
    if obstacle := engine.cuda_obstacle():
        assert Engine.load(path, "auto").device.reason == f"cuda not used: {obstacle}"
        with pytest.raises(StartupError, match="device cuda cannot run"):
            Engine.load(path, "cuda")


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(tmp_path: Path) -> None:
    if obstacle := engine.cuda_obstacle():
        pytest.skip(f"no CUDA: {obstacle}")
    path = toy_models.write_toy(tmp_path, "toy", toy_models.WIDE)
    cpu, cuda = load(path), Engine.load(path, "cuda", 1)
    frames, zero = toy_models.example_frames(toy_models.WIDE, 40)[None], np.zeros((1, toy_models.WIDE.width), np.float32)
    assert cuda.device.name == "cuda"
    np.testing.assert_allclose(cuda.run_batch(frames, np.array([40]), zero)[0], cpu.run_batch(frames, np.array([40]), zero)[0], atol=1e-5)


def test_a_file_that_breaks_its_promise_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"self-test: scores differ from the manifest's by 0\.\d+ at frame \d+, allowed 0\.0001"):
        load(toy_models.write_failing_self_test(tmp_path, "wrong"))


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="has no 'manifest'"):
        load(toy_models.write_without_manifest(tmp_path, "bare"))
    with pytest.raises(EngineError, match="cannot be read"):
        load(tmp_path / "nothing.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(EngineError, match="onnxruntime cannot load it"):
        load(tmp_path / "text.onnx")


def test_a_manifest_that_does_not_fit_the_graph(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="state has shape"):
        load(toy_models.write_toy(tmp_path, "width", state_width=7))
    with pytest.raises(EngineError, match="frames has shape"):
        load(toy_models.write_toy(tmp_path, "shape", frame_shape=(4,)))
    manifest = toy_models.manifest_of(CHANNELS, toy_models.build(CHANNELS), "toy")
    test = dataclasses.replace(manifest.self_test, scores=[row[:3] for row in manifest.self_test.scores])
    with pytest.raises(EngineError, match="scores has shape"):
        load(toy_models.write_toy(tmp_path, "classes", classes=manifest.classes[:3], self_test=test))


def test_tensors_of_other_names_and_a_broken_manifest(tmp_path: Path) -> None:
    path = toy_models.write_toy(tmp_path, "toy")
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {MANIFEST_KEY: "{}"})
    onnx.save(model, path)
    with pytest.raises(EngineError, match="manifest: field"):
        load(path)
    model = onnx.load(toy_models.write_toy(tmp_path, "toy"))
    for node in model.graph.node:
        node.input[:] = ["input" if name == FRAMES else name for name in node.input]
    model.graph.input[0].name = "input"
    onnx.save(model, path)
    with pytest.raises(EngineError, match="inputs are input, lengths, state; the contract says frames"):
        load(path)


def test_both_builds_of_onnxruntime_stop_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine.importlib.metadata, "distribution", lambda name: None)
    engine._refuse_both_builds.cache_clear()
    try:
        with pytest.raises(StartupError, match="both onnxruntime and onnxruntime-gpu"):
            load(toy_models.write_toy(tmp_path, "toy"))
    finally:
        engine._refuse_both_builds.cache_clear()


def test_threads_leave_a_core_to_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads in ((1, 1), (2, 1), (4, 2), (64, 4)):
        monkeypatch.setattr(engine, "usable_cores", lambda cores=cores: cores)
        assert engine.default_threads() == threads


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("9900000 100000", 8), ("nonsense", 8)])
def test_cores_are_cut_by_the_control_group(monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    monkeypatch.setattr(engine.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(Path, "read_text", lambda self: quota)
    assert engine.usable_cores() == cores


def test_a_model_does_not_keep_its_file_in_memory(tmp_path: Path) -> None:
    path = toy_models.write_toy(tmp_path, "toy", dataclasses.replace(toy_models.CHANNELS, units=1024, layers=8))
    size = path.stat().st_size
    assert size > 25e6, "too small to be told from everything else"
    script = f"""
from pathlib import Path
from service.engine import Engine, resident_bytes
first = Engine.load(Path({str(path)!r}), "cpu", 1)
before = resident_bytes()
second = Engine.load(Path({str(path)!r}), "cpu", 1)
print(resident_bytes() - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True, timeout=120).stdout)
    assert 0.8 * size < grown < 1.6 * size
