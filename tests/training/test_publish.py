"""Publication: a file only when every check held, and then one that explains itself."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from model.network import Network
from tests.training.synthetic import clip_set, config
from training import publish as publication
from training import verify
from training.checkpoint import Checkpoint, Subject
from training.onnx_file import fingerprint
from training.publish import metrics_of, next_version, publish
from training.verify import VerificationError, verify_file

CLIPS = clip_set(40)


@pytest.fixture
def found(networks: dict[str, Network], exported: Any, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """A checkpoint of the network whose graph is exported already."""
    monkeypatch.setattr(verify, "STREAM_FRAMES", 4_000)
    monkeypatch.setattr(verify, "STREAMS", 20)
    monkeypatch.setattr(publication, "to_onnx", lambda network: exported["channels"])
    settings = config(model={"missing": True, "dropout": 0.0, "norm": "after"}, augment={}, export={"chunk": 3})
    weights = networks["channels"].state_dict()
    return Checkpoint(settings, Subject.of(CLIPS), 5, weights, weights, {}, 0.9)


def test_the_file_explains_itself_and_verifies(found: Checkpoint, tmp_path: Path) -> None:
    said: list[str] = []
    manifest = publish(found, CLIPS, metrics_of("by hand", accuracy=2 / 3), tmp_path / "tiny" / "1", said.append)
    model = onnx.load(tmp_path / "tiny" / "1" / "model.onnx")
    report = verify_file(model, CLIPS.frames, found.network())
    assert report.manifest == manifest
    assert manifest.fingerprint == fingerprint(model)
    assert (manifest.model, manifest.frame_shape, manifest.classes, manifest.fps, manifest.units) == ("tiny", (2,), CLIPS.classes, 30.0, "metres")
    assert (manifest.chunk, manifest.missing, manifest.layout, manifest.joints) == (3, True, None, ())
    assert manifest.metrics.values == {"accuracy": 0.6667}
    assert manifest.stream is not None
    assert (manifest.stream.verified_frames, manifest.stream.horizon) == (4_000, 20)
    assert manifest.architecture.parameters == sum(p.numel() for p in found.network().parameters())
    assert manifest.data == CLIPS.source
    assert manifest.parity.clips == 40
    assert len(said) == 5
    assert model.producer_name == "indrnn-service"


def test_published_twice_is_the_same_file(found: Checkpoint, tmp_path: Path) -> None:
    for version in "12":
        publish(found, CLIPS, metrics_of("", accuracy=0.5), tmp_path / version, lambda _: None)
    assert (tmp_path / "1" / "model.onnx").read_bytes() == (tmp_path / "2" / "model.onnx").read_bytes()


@pytest.mark.parametrize("check", ["check_file", "check_parity", "check_neighbours", "check_endless"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_check_that_fails_leaves_everything_as_it_was(found: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str, existing: bool) -> None:
    target = tmp_path / "tiny" / "1"
    if existing:
        target.mkdir(parents=True)
        (target / "model.onnx").write_bytes(b"old")

    def fail(*_: Any) -> None:
        raise VerificationError("no")

    monkeypatch.setattr(publication, check, fail)
    with pytest.raises(VerificationError, match="no"):
        publish(found, CLIPS, metrics_of("", accuracy=0.5), target, lambda _: None)
    left = [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))]
    assert left == (["tiny", "tiny/1", "tiny/1/model.onnx"] if existing else [])
    if existing:
        assert (target / "model.onnx").read_bytes() == b"old"


def test_other_weights_than_the_networks_are_never_published(found: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = publication.to_onnx(found.network())
    bias = next(w for w in model.graph.initializer if list(w.dims) == [3])
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.array([0.1, 0, 0], np.float32), bias.name))
    monkeypatch.setattr(publication, "to_onnx", lambda network: model)
    with pytest.raises(VerificationError, match="scores differ"):
        publish(found, CLIPS, metrics_of("", accuracy=0.5), tmp_path / "x", lambda _: None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("there", "expected"), [([], "1"), (["1", "2", "10"], "11"), (["1.5", "old", "²", "3"], "4")])
def test_next_version_is_one_above_the_highest_number(tmp_path: Path, there: list[str], expected: str) -> None:
    for name in there:
        (tmp_path / "m" / name).mkdir(parents=True)
    assert next_version(tmp_path / "m") == tmp_path / "m" / expected
