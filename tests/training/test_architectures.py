"""Every architecture keeps every promise of the contract: parity, chunks, company, poison, streams that do not end."""

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.inliner
import pytest
import torch

from model.baselines import BaselineLayer
from model.config import ModelConfig
from model.network import Network
from model.recurrence import ONNX_DOMAIN
from tests.training.conftest import lived_in
from tests.training.synthetic import clip_set
from training import verify
from training.datasets.clips import Frames
from training.export import to_onnx
from training.verify import Runner, check_endless, check_file, check_neighbours, check_parity, measure_stream

Lengths = npt.NDArray[np.int64]
DENSE = {"kind": "dense", "blocks": (1,), "growth": 2, "horizon": 20}
# Settings beside 8 units and one layer, and the local functions that the file must have. Plain and residual stacks with ReLU: test_export.py; dense: tests/e2e.
ARCHITECTURES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "plain, tanh, convolution": ({"activation": "tanh", "filters": 2, "missing": True}, {"RecurrenceTanh", "Hold"}),
    "plain, identity": ({"activation": "identity"}, {"RecurrenceIdentity"}),
    "plain, tokens": ({"head": "tokens", "memory": "normal", "bound": "penalty"}, {"Recurrence"}),
    "residual, tanh": ({"kind": "residual", "layers": 2, "activation": "tanh"}, {"RecurrenceTanh"}),
    "residual, identity, averaged by weight": (
        {"kind": "residual", "layers": 2, "activation": "identity", "average": 5, "weighted": True},
        {"RecurrenceIdentity", "Recurrence"},
    ),
    "dense, tanh, norm before": (DENSE | {"activation": "tanh", "norm": "before"}, {"RecurrenceTanh"}),
    "plain, identity, soft reset": (
        {"activation": "identity", "reset": "soft", "boundary_units": 5, "norm": "before"},
        {"GatedRecurrenceIdentity", "RecurrenceIdentity"},
    ),
    "dense, tanh, convolution, soft reset": (
        DENSE | {"activation": "tanh", "filters": 2, "reset": "soft", "boundary_units": 5},
        {"GatedRecurrenceTanh", "RecurrenceTanh"},
    ),
    "dense, identity, no norm": (DENSE | {"activation": "identity", "norm": "none"}, {"RecurrenceIdentity"}),
    "rnn": ({"kind": "rnn", "horizon": 0}, {"RNNTanh"}),
    "irnn": ({"kind": "irnn", "horizon": 0}, {"RNNRelu"}),
    "gru": ({"kind": "gru", "horizon": 0, "layers": 2, "missing": True, "average": 5}, {"GRU", "Hold", "Recurrence"}),
    "lstm": ({"kind": "lstm", "horizon": 0, "norm": "none"}, {"LSTM"}),
}


def network(name: str) -> Network:
    settings = {"kind": "plain", "layers": 1, "units": 8, "horizon": 20} | ARCHITECTURES[name][0]
    made = lived_in(ModelConfig(**settings), (1,) if "head" in settings else (2,))
    with torch.no_grad():
        for layer in made.modules():
            if isinstance(layer, BaselineLayer):  # as after training; an IRNN as it starts integrates, which no stream allows
                weight = layer.cell.get_parameter("weight_hh_l0")
                weight.copy_(0.7 * weight + 0.1 * torch.randn_like(weight))
                layer.cell.get_parameter("weight_ih_l0").normal_(0, 0.5)
    return made


@functools.cache
def exported(name: str) -> tuple[Network, onnx.ModelProto]:
    """An export takes seconds. They are shared: do not change them."""
    made = network(name)
    return made, to_onnx(made)


def frames_for(made: Network, rng: np.random.Generator, rows: int, steps: int) -> Frames:
    """(rows, steps, *frame shape); ids where the network takes tokens."""
    shape = (rows, steps, *made.frame_shape)
    frames = rng.integers(0, made.classes, shape) if made.config.head == "tokens" else rng.normal(0, 1, shape)
    return frames.astype(np.float32)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exports_and_verifies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "STREAM_FRAMES", 4_000)
    made, model = exported(name)
    assert {node.op_type for node in model.graph.node if node.domain == ONNX_DOMAIN} == ARCHITECTURES[name][1]
    check_file(model)
    runner, rng = Runner(model), np.random.default_rng(0)
    assert runner.state_width == made.state_width
    clips = [frames_for(made, rng, 1, steps)[0] for steps in rng.integers(1, 25, 12)]
    assert check_parity(runner, clips, made).chunked_abs == 0.0
    check_neighbours(runner, clips)
    assert check_endless(runner, clips) == 4_000
    batch = frames_for(made, rng, 5, 30), np.array([30, 0, 7, 1, 29]), rng.random((5, runner.state_width), np.float32)  # states that are not zero
    _ragged_rows_say_what_torch_says(made, runner, *batch)
    _rows_of_no_length_stand_still(runner, *batch)
    _alone_to_the_bit(runner, *batch)
    _inlined_says_the_same(model, runner, *batch)


def _ragged_rows_say_what_torch_says(made: Network, runner: Runner, frames: Frames, lengths: Lengths, state: Frames) -> None:
    scores, end = runner(frames, lengths, state)
    with torch.no_grad():
        expected, expected_end = made.scores(torch.from_numpy(frames), torch.from_numpy(lengths), torch.from_numpy(state))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(scores[row, :n], expected[row, :n], rtol=0, atol=1e-4)
    np.testing.assert_allclose(end, expected_end, rtol=1e-3, atol=1e-4)


def _rows_of_no_length_stand_still(runner: Runner, frames: Frames, lengths: Lengths, state: Frames) -> None:
    clean, clean_end = runner(frames, lengths, state)
    frames = frames.copy()
    frames[1], frames[2, 7:] = np.nan, np.inf
    scores, end = runner(frames, lengths, state)
    assert np.array_equal(end, clean_end)
    assert np.array_equal(end[1], state[1])
    assert np.array_equal(scores[2, :7], clean[2, :7])


def _alone_to_the_bit(runner: Runner, frames: Frames, lengths: Lengths, state: Frames) -> None:
    """Alone, and frame by frame."""
    scores, end = runner(frames, lengths, state)
    for row, n in enumerate(lengths):
        h = state[row : row + 1]
        for t in range(n):
            said, h = runner(frames[row : row + 1, t : t + 1], [1], h)
            assert np.array_equal(said[0, 0], scores[row, t])
        assert np.array_equal(h[0], end[row])


def _inlined_says_the_same(model: onnx.ModelProto, runner: Runner, frames: Frames, lengths: Lengths, state: Frames) -> None:
    inlined = Runner(onnx.inliner.inline_local_functions(model))
    for ours, theirs in zip(runner(frames, lengths, state), inlined(frames, lengths, state), strict=True):
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6, atol=1e-6)


def test_an_irnn_as_it_starts_is_refused_for_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recurrent matrix is the identity: it integrates for ever."""
    monkeypatch.setattr(verify, "STREAM_FRAMES", 4_000)
    made = lived_in(ModelConfig(kind="irnn", units=8, layers=1), (2,))
    with pytest.raises(verify.VerificationError, match="the state grows on a stream"):
        check_endless(Runner(to_onnx(made)), clip_set(12).frames)


def test_a_graph_takes_the_nearest_token_for_an_id_outside_the_vocabulary() -> None:
    runner = Runner(exported("plain, tokens")[1])
    rows = np.array([[[0], [2], [1]], [[-7], [3e38], [1.2]], [[np.nan], [2.0], [0.6]], [[-np.inf], [np.inf], [1]]], np.float32)
    scores, _ = runner(rows, [3] * 4, runner.zeros(4))
    assert np.array_equal(scores, np.repeat(scores[:1], 4, 0))
    np.testing.assert_allclose(scores.sum(-1), 1, rtol=1e-5)


def test_stream_accuracy_of_tokens_is_that_of_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that says "one more" after each token, on clips that count up (it is always right) and on clips that count down (never)."""
    monkeypatch.setattr(verify, "STREAMS", 10)
    made = lived_in(ModelConfig(kind="plain", head="tokens", layers=1, units=5, norm="none"), (1,), classes=5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
        made.features.get_parameter("embedding.weight").copy_(torch.eye(5))
        made.backbone.get_parameter("cells.0.linear.weight").copy_(torch.eye(5))
        made.head.weight.copy_(9 * torch.eye(5).roll(1, 0))
    runner, up = Runner(to_onnx(made)), [np.arange(start, start + 70) % 5 for start in range(6)]
    for ids, right in ((up, 1.0), ([clip[::-1] for clip in up], 0.0)):
        frames = tuple(clip.astype(np.float32)[:, None] for clip in ids)
        report = measure_stream(runner, replace(clip_set(6), frames=frames, classes=tuple("abcde")), 20, 0, "tokens")
        assert (report.accuracy_first, report.accuracy_last) == (right, right)
