"""The shipped files hold what their manifests promise, on the shipped recordings."""

from pathlib import Path

import onnx
import pytest

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


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parts[-3])
def test_a_shipped_file_names_public_data_and_no_machine(file: Path) -> None:
    manifest = read_manifest(onnx.load(file))
    assert any(word in manifest.data.terms for word in ("public domain", "Apache-2.0"))
    assert b"site-packages" not in file.read_bytes()
    assert file.stat().st_size < 3_000_000
