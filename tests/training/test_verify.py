"""Verification catches what it is for: every promise broken once, on purpose."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from model.contract import Manifest, ManifestError
from model.network import Network
from tests import toy_models
from tests.training.synthetic import clip_set
from training import verify
from training.datasets.clips import Frames
from training.onnx_file import fingerprint, with_manifest
from training.verify import (
    Runner,
    VerificationError,
    check_endless,
    check_file,
    check_neighbours,
    check_parity,
    measure_stream,
    self_test,
    verify_file,
)

TOY = replace(toy_models.CHANNELS, shape=(2,), classes=("rising", "falling", "waving"))


@pytest.fixture(autouse=True)
def _short_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "STREAM_FRAMES", 8_000)
    monkeypatch.setattr(verify, "STREAMS", 40)


@pytest.fixture
def clips() -> Sequence[Frames]:
    return clip_set(12, shortest=1).frames


def toy_model() -> ModelProto:
    return toy_models.build(TOY)


def manifest_for(model: ModelProto) -> Manifest:
    return replace(toy_models.manifest_of(TOY, toy_model(), "toy"), fingerprint=fingerprint(model))


def finished(model: ModelProto, **changes: Any) -> ModelProto:
    return with_manifest(model, replace(manifest_for(model), **changes))


def weight(model: ModelProto, name: str) -> onnx.TensorProto:
    return next(w for w in model.graph.initializer if w.name == name)


def set_weight(model: ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    old = weight(model, name)
    old.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(old)).astype(np.float32), name))


def leaking(model: ModelProto) -> ModelProto:
    """Adds nothing times the sum over the whole batch to the scores: harmless until one row is not finite."""
    graph = model.graph
    for node in graph.node:
        for i, name in enumerate(node.output):
            if name == "scores":
                node.output[i] = "own_scores"
    graph.initializer.append(numpy_helper.from_array(np.float32(0), "nothing"))
    graph.node.extend(
        [
            helper.make_node("ReduceSum", ["frames"], ["everything"], keepdims=0),
            helper.make_node("Mul", ["everything", "nothing"], ["leak"]),
            helper.make_node("Add", ["own_scores", "leak"], ["scores"]),
        ]
    )
    return model


def test_a_good_file_passes_and_the_figures_come_back(clips: Sequence[Frames]) -> None:
    seen: list[tuple[int, int]] = []
    report = verify_file(finished(toy_model()), clips, watch=lambda done, total: seen.append((done, total)))
    assert report.parity.scores_abs <= 1e-5
    assert report.parity.clips == len(clips)
    assert report.verified_frames == 8_000
    assert seen[-1] == (8_000, 8_000)


@pytest.mark.parametrize("kind", ["channels", "body"])
def test_exported_networks_pass_every_check(kind: str, exported: Any, networks: dict[str, Network]) -> None:
    clips = list(clip_set(10, shortest=1, joints=13 if kind == "body" else 0).frames)
    clips[0] = np.full_like(clips[0], np.nan)
    model = exported[kind]
    check_file(model)
    runner = Runner(model)
    parity = check_parity(runner, clips, networks[kind])
    assert parity.batched_abs == 0
    check_neighbours(runner, clips)
    assert check_endless(runner, clips) == 8_000


def test_changed_weights_are_caught_by_the_fingerprint(clips: Sequence[Frames]) -> None:
    model = finished(toy_model())
    set_weight(model, "V", lambda v: v * 1.0001)
    with pytest.raises(VerificationError, match="the fingerprint in the manifest is not that of the graph"):
        verify_file(model, clips)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame_shape": (3,)}, r"the manifest says frames \(3,\)"),
        ({"state_width": 5}, "state 5"),
        ({"fingerprint": "0" * 64}, "fingerprint"),
    ],
)
def test_a_manifest_of_another_graph_is_caught(clips: Sequence[Frames], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        verify_file(finished(toy_model(), **changes), clips)


def test_a_manifest_with_another_number_of_classes_is_caught(clips: Sequence[Frames]) -> None:
    test = manifest_for(toy_model()).self_test
    four = replace(test, scores=[[*row, 0.0] for row in test.scores])
    with pytest.raises(VerificationError, match="4 classes, the graph"):
        verify_file(finished(toy_model(), classes=("a", "b", "c", "d"), self_test=four), clips)


def test_a_self_test_that_fails_is_caught(clips: Sequence[Frames]) -> None:
    test = manifest_for(toy_model()).self_test
    with pytest.raises(VerificationError, match="self-test: scores differ by"):
        verify_file(finished(toy_model(), self_test=replace(test, scores=[[1 - v for v in row] for row in test.scores])), clips)


@pytest.mark.parametrize("frames", [[[0.0]], [[[0.0, 1.0]]], [[0.0, "x"]], [[0.0, 1.0, 2.0]]])
def test_a_self_test_of_other_frames_is_caught(clips: Sequence[Frames], frames: list[Any]) -> None:
    test = replace(manifest_for(toy_model()).self_test, frames=frames, scores=[[0.2, 0.3, 0.5]])
    with pytest.raises(VerificationError, match=r"self-test: its frames are not of shape \(2,\)"):
        verify_file(finished(toy_model(), self_test=test), clips)


def test_clips_of_another_shape_are_named(clips: Sequence[Frames]) -> None:
    with pytest.raises(VerificationError, match=r"a clip has frames of shape \(3,\), the model takes \(2,\)"):
        verify_file(finished(toy_model()), [*clips, np.zeros((4, 3), np.float32)])


def test_the_network_of_another_run_is_named(clips: Sequence[Frames], networks: dict[str, Network]) -> None:
    with pytest.raises(VerificationError, match="the run's network takes frames"):
        verify_file(finished(toy_model()), clips, networks["body"])


def test_a_graph_that_is_not_valid_is_caught(clips: Sequence[Frames]) -> None:
    model = toy_model()
    model.graph.node[-1].op_type = "Nonsense"
    with pytest.raises(VerificationError, match="not valid ONNX"):
        verify_file(finished(model), clips)


def test_a_graph_with_other_tensors_is_caught(clips: Sequence[Frames]) -> None:
    model = toy_model()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    with pytest.raises((VerificationError, ManifestError)):
        verify_file(finished(model), clips)


def test_weights_that_are_not_those_of_the_network_are_caught(exported: Any, networks: dict[str, Network], clips: Sequence[Frames]) -> None:
    model = exported["bare"]
    name = next(w.name for w in model.graph.initializer if list(w.dims) == [3])  # the head's bias
    set_weight(model, name, lambda v: v + np.array([0.01, 0, 0]))
    with pytest.raises(VerificationError, match="scores differ by up to"):
        check_parity(Runner(model), clips, networks["bare"])


@pytest.mark.parametrize("frame", [np.nan, 3e38])
def test_scores_or_states_that_are_not_finite_are_no_parity(frame: float) -> None:
    """Each of the three ways gives NaN or infinity alike: that must not count as agreement."""
    runner = Runner(toy_models.build(replace(TOY, gain=1e33, missing=False)))
    with pytest.raises(VerificationError, match="inf"):
        check_parity(runner, [np.full((6, 2), frame, np.float32)], None)


def test_a_row_that_reaches_its_neighbours_is_caught(clips: Sequence[Frames]) -> None:
    runner = Runner(leaking(toy_model()))
    check_parity(runner, clips, None)  # finite frames do not show it
    with pytest.raises(VerificationError, match="nan in one row of a batch changed the scores of its neighbours"):
        check_neighbours(runner, clips)


def growing(recurrent: float, push: float, lived_in: Any) -> Runner:
    """A one-layer toy in which every unit has this recurrent weight and gets about `push` a step."""
    model = toy_models.build(replace(TOY, layers=1))
    set_weight(model, "u0", lambda u: np.full_like(u, recurrent))
    set_weight(model, "W0", lambda w: np.full_like(w, push))
    return Runner(model)


@pytest.mark.parametrize("push", [1.0, 0.01])
def test_a_state_that_drifts_is_caught(push: float, lived_in: Any) -> None:
    """u = 1 integrates: a straight line, which no single step gives away."""
    with pytest.raises(VerificationError, match="the state grows on a stream"):
        check_endless(growing(1.0, push, lived_in), [np.ones((9, 2), np.float32)])


def test_a_random_walk_is_caught(lived_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "STREAM_FRAMES", 40_000)
    rng = np.random.default_rng(0)
    with pytest.raises(VerificationError, match="the state grows on a stream"):
        check_endless(growing(1.0, 1.0, lived_in), [rng.normal(0, 1, (50, 2)).astype(np.float32) for _ in range(400)])


def test_a_state_that_explodes_is_caught(lived_in: Any) -> None:
    with pytest.raises(VerificationError, match="no longer finite after 500 frames"):
        check_endless(growing(1.3, 1.0, lived_in), [np.ones((9, 2), np.float32)])


def test_a_long_but_bounded_memory_passes(lived_in: Any) -> None:
    assert check_endless(growing(0.99, 1.0, lived_in), [np.ones((9, 2), np.float32)]) == 8_000


def test_stream_report_of_a_model_that_forgets_and_of_one_that_does_not(exported: Any) -> None:
    report = measure_stream(Runner(exported["channels"]), clip_set(30), 20, 8_000)
    assert (report.verified_frames, report.horizon) == (8_000, 20)
    assert 0 <= report.accuracy_first <= 1
    assert 0 <= report.accuracy_last <= 1
    assert report.ci95 > 0


def test_stream_accuracy_is_that_of_whole_clips_at_the_first_position(exported: Any) -> None:
    """At position 1 a stream is a clip; so labels that the model itself gives are right all the time."""
    runner, clips = Runner(exported["channels"]), clip_set(30, longest=150)
    labels = np.array([runner.whole(clip)[0][-1].argmax() for clip in clips.frames])
    assert measure_stream(runner, replace(clips, labels=labels), 20, 0).accuracy_first == 1.0


def test_a_class_that_no_clip_has_is_no_trouble_on_streams(lived_in: Any) -> None:
    """A network taught streams has one class more than the clips, that of nothing between them."""
    runner = Runner(toy_models.build(replace(TOY, classes=("rising", "falling", "waving", "nothing"))))
    report = measure_stream(runner, clip_set(30), 20, 8_000)
    assert 0 <= report.accuracy_last <= 1


def test_self_test_holds_gaps_as_null_and_its_own_scores(exported: Any) -> None:
    runner, clip = Runner(exported["channels"]), clip_set(1, shortest=20).frames[0].copy()
    clip[3] = np.nan
    test = self_test(runner, clip)
    assert test.frames[3] == [None, None]
    assert len(test.frames) == len(test.scores) == 16
    assert np.array_equal(np.array(test.frames, np.float32), clip[:16], equal_nan=True)
    assert np.array_equal(np.array(test.scores, np.float32), runner.whole(clip[:16])[0])
    assert len(self_test(runner, clip[:1]).frames) == 1


def test_runner_gives_an_empty_chunk_no_step(exported: Any) -> None:
    runner = Runner(exported["channels"])
    state = torch.rand(1, runner.state_width).numpy()
    _, end = runner(np.zeros((1, 1, 2), np.float32), [0], state)
    assert np.array_equal(end, state)
