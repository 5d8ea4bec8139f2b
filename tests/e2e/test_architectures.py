"""State widths differ, the service does not notice: a GRU, a dense stack, one that resets itself and a language model, published and served side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from model.contract import Manifest
from service.client import Client
from tests.server_process import Server, running
from tests.training.synthetic import clip_set, config

torch = pytest.importorskip("torch", reason="torch is not installed (extra `train`): that every architecture can be served is not tested")

MODELS: dict[str, dict[str, Any]] = {
    "gru": {"kind": "gru", "layers": 2, "horizon": 0},
    "dense": {"kind": "dense", "blocks": [1, 1], "growth": 4},
    "reset": {"kind": "residual", "layers": 2, "average": 8, "reset": "soft", "boundary_units": 6},
    "tokens": {"kind": "residual", "layers": 2, "head": "tokens", "memory": "normal"},
}
VOCABULARY = tuple("abcdefg")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[Any, Manifest]]]:
    """The folder of models, and of each its network and manifest."""
    from training import publish, verify
    from training.checkpoint import Checkpoint, Subject, build

    folder, made = tmp_path_factory.mktemp("models"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "STREAM_FRAMES", 2_000)
        patch.setattr(verify, "STREAMS", 20)
        for name, settings in MODELS.items():
            clips = clip_set(12)
            if name == "tokens":
                ids = tuple((np.arange(len(clip)) % 7).astype(np.float32)[:, None] for clip in clips.frames)
                clips = dataclasses.replace(clips, frames=ids, classes=VOCABULARY, units="ids")
            experiment, subject = config(name=name, model={"units": 24, **settings}), Subject.of(clips)
            torch.manual_seed(0)
            weights = build(experiment, subject).state_dict()
            checkpoint = Checkpoint(experiment, subject, 1, weights, weights, {}, 0.0)
            manifest = publish.publish(checkpoint, clips, publish.metrics_of("none: untrained", accuracy=0.0), folder / name / "1", lambda _: None)
            made[name] = checkpoint.network(), manifest
    return folder, made


@pytest.fixture(scope="module")
def server(published: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(published[0], tmp_path_factory.mktemp("server") / "log", "--deadline-s", "60") as started:
        yield started


def frames_for(name: str) -> npt.NDArray[np.float32]:
    rng = np.random.default_rng(3)
    return (rng.integers(0, 7, (40, 1)) if name == "tokens" else rng.normal(0, 1, (40, 2))).astype(np.float32)


@pytest.mark.parametrize("name", MODELS)
def test_a_stream_in_chunks_says_what_the_whole_clip_says(server: Server, published: Any, name: str) -> None:
    frames, (network, manifest) = frames_for(name), published[1][name]
    with Client(server.url, timeout_s=60) as client:
        whole = client.predict(name, frames, scores="all").scores
        with client.stream(name) as stream:
            streamed = np.array([answer.scores for answer in stream.play(frames, chunk=7)])
    assert whole is not None
    assert whole.shape == (40, len(manifest.classes))
    assert np.array_equal(streamed, whole)
    with torch.no_grad():
        expected, _ = network.scores(torch.from_numpy(frames)[None], torch.tensor([40]), network.initial_state(1))
    np.testing.assert_allclose(whole, expected[0], rtol=0, atol=1e-4)


def test_manifests_say_what_each_is(published: Any) -> None:
    said = {name: (m.task, m.architecture.kind, m.architecture.layers, m.architecture.units, m.state_width) for name, (_, m) in published[1].items()}
    assert said == {
        "gru": ("classification", "gru", 2, 24, 4 + 48),  # 4: the frame before, and that it was seen
        "dense": ("classification", "dense", 7, 24, 4 + 24 + 20 + 14 + 20 + 9),
        "reset": ("classification", "residual, soft reset", 2, 24, 4 + 3 * 24 + 4 + 2 * 6),  # 4 of the average: three classes and their weight
        "tokens": ("tokens", "residual", 2, 24, 3 * 24),
    }


def test_a_language_model_answers_with_probabilities_of_the_next_token_and_no_label(server: Server, published: Any) -> None:
    with Client(server.url, timeout_s=60) as client:
        assert client.model("tokens").classes == VOCABULARY
        answer = client.predict("tokens", frames_for("tokens"), scores="all")
    assert answer.label is None
    assert answer.scores is not None
    np.testing.assert_allclose(answer.scores.sum(-1), 1, rtol=1e-5)
