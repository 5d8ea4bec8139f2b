"""The shipped files hold what their manifests promise, on the shipped recordings."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from model import events
from model.contract import Manifest
from training.datasets import clip_folder
from training.datasets.clips import ClipSet
from training.onnx_file import read_manifest
from training.verify import Runner, verify_file

SERVICE = Path(__file__).resolve().parents[2] / "service"
FILES = sorted(SERVICE.glob("models/*/*/model.onnx"))


def recordings(file: Path, manifest: Manifest) -> ClipSet:
    folder = SERVICE / "samples" / file.parts[-3]
    return clip_folder.load(folder, units=manifest.units, layout=manifest.layout, fps=manifest.fps, missing=manifest.missing)


def test_both_models_ship() -> None:
    assert {file.parts[-3] for file in FILES} == {"rehab-exercises", "finger-gestures"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parts[-3])
def test_a_shipped_file_verifies(file: Path) -> None:
    model = onnx.load(file)
    report = verify_file(model, recordings(file, read_manifest(model)).frames)
    assert report.verified_frames == 100_000
    assert report.parity.chunked_abs == report.parity.batched_abs == 0.0


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parts[-3])
def test_a_shipped_file_recognises_recordings_it_has_not_seen(file: Path) -> None:
    model = onnx.load(file)
    manifest, runner = read_manifest(model), Runner(model)
    clips = recordings(file, manifest)
    said = [manifest.classes[int(runner.whole(frames)[0][-1].argmax())] for frames in clips.frames]
    right = [clips.classes[label] == name for label, name in zip(clips.labels, said, strict=True)]
    assert sum(right) >= len(right) - 1


def test_repetitions_are_told_by_their_starts_and_ends() -> None:
    """In each recording somebody does one exercise twice and is in the middle of the third time when it stops."""
    file = SERVICE / "models" / "rehab-exercises" / "1" / "model.onnx"
    model = onnx.load(file)
    manifest, runner = read_manifest(model), Runner(model)
    assert manifest.events is not None
    assert manifest.stream is not None
    assert not manifest.stream.declines
    clips = recordings(file, manifest)
    for frames, label in zip(clips.frames, clips.labels, strict=True):
        scores, _ = runner.whole(frames)
        state, found = events.advance(manifest.events, manifest.classes, events.EventState(), scores, np.arange(len(scores)))
        assert [(one.event, one.label) for one in found] == [(kind, clips.classes[label]) for kind in ("start", "end", "start", "end", "start")]
        assert state.label == clips.classes[label]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parts[-3])
def test_a_shipped_file_names_public_data_and_no_machine(file: Path) -> None:
    manifest = read_manifest(onnx.load(file))
    assert any(word in manifest.data.terms for word in ("public domain", "Apache-2.0"))
    assert b"site-packages" not in file.read_bytes()
    assert file.stat().st_size < 3_000_000
