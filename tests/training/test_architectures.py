"""Every architecture keeps every promise of the contract: parity, chunks, company, poison, streams that do not end."""

from typing import Any

import numpy as np
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
from training.export import to_onnx
from training.verify import Runner, check_endless, check_file, check_neighbours, check_parity

DENSE = {"kind": "dense", "blocks": (2, 1), "growth": 2, "horizon": 20}
# Settings beside two layers of 8 units, and the local functions that the file must have. Plain and residual stacks with ReLU: test_export.py.
ARCHITECTURES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "plain, tanh": ({"kind": "plain", "activation": "tanh", "horizon": 20}, {"RecurrenceTanh"}),
    "plain, identity": ({"kind": "plain", "activation": "identity", "horizon": 20}, {"RecurrenceIdentity"}),
    "residual, tanh": ({"kind": "residual", "activation": "tanh", "horizon": 20}, {"RecurrenceTanh"}),
    "residual, identity, averaged": ({"kind": "residual", "activation": "identity", "horizon": 20, "average": 5}, {"RecurrenceIdentity", "Recurrence"}),
    "dense": (DENSE, {"Recurrence"}),
    "dense, tanh, norm before": (DENSE | {"activation": "tanh", "norm": "before"}, {"RecurrenceTanh"}),
    "dense, identity, no norm": (DENSE | {"activation": "identity", "norm": "none"}, {"RecurrenceIdentity"}),
    "rnn": ({"kind": "rnn"}, {"RNNTanh"}),
    "irnn": ({"kind": "irnn"}, {"RNNRelu"}),
    "gru": ({"kind": "gru", "missing": True, "average": 5}, {"GRU", "Hold", "Recurrence"}),
    "lstm": ({"kind": "lstm", "norm": "none"}, {"LSTM"}),
}
CLIPS = clip_set(12, shortest=1).frames


def network(name: str) -> Network:
    made = lived_in(ModelConfig(units=8, **({"layers": 2} | ARCHITECTURES[name][0])), (2,))
    with torch.no_grad():
        for layer in made.modules():
            if isinstance(layer, BaselineLayer):  # as after training; an IRNN as it starts integrates, which no stream allows
                weight = layer.cell.get_parameter("weight_hh_l0")
                weight.copy_(0.7 * weight + 0.1 * torch.randn_like(weight))
                layer.cell.get_parameter("weight_ih_l0").normal_(0, 0.5)
    return made


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exports_and_verifies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "STREAM_FRAMES", 4_000)
    made = network(name)
    model = to_onnx(made)
    assert {node.op_type for node in model.graph.node if node.domain == ONNX_DOMAIN} == ARCHITECTURES[name][1]
    check_file(model)
    runner = Runner(model)
    assert runner.state_width == made.state_width
    assert check_parity(runner, CLIPS, made).chunked_abs == 0.0
    check_neighbours(runner, CLIPS)
    assert check_endless(runner, CLIPS) == 4_000
    _ragged_rows_say_what_torch_says(made, runner)
    _rows_of_no_length_stand_still(runner)
    _alone_to_the_bit(runner)
    _inlined_says_the_same(model, runner)


def _batch(runner: Runner, seed: int = 0) -> tuple[Any, Any, Any]:
    """Rows of all lengths, from states that are not zero."""
    rng = np.random.default_rng(seed)
    frames = rng.normal(0, 1, (5, 30, *runner.frame_shape)).astype(np.float32)
    return frames, np.array([30, 0, 7, 1, 29]), rng.random((5, runner.state_width), np.float32)


def _ragged_rows_say_what_torch_says(made: Network, runner: Runner) -> None:
    frames, lengths, state = _batch(runner)
    scores, end = runner(frames, lengths, state)
    with torch.no_grad():
        expected, expected_end = made.scores(torch.from_numpy(frames), torch.from_numpy(lengths), torch.from_numpy(state))
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(scores[row, :n], expected[row, :n], rtol=0, atol=1e-4)
    np.testing.assert_allclose(end, expected_end, rtol=1e-3, atol=1e-4)


def _rows_of_no_length_stand_still(runner: Runner) -> None:
    frames, lengths, state = _batch(runner)
    clean, clean_end = runner(frames, lengths, state)
    frames[1], frames[2, 7:] = np.nan, np.inf
    scores, end = runner(frames, lengths, state)
    assert np.array_equal(end, clean_end)
    assert np.array_equal(end[1], state[1])
    assert np.array_equal(scores[2, :7], clean[2, :7])


def _alone_to_the_bit(runner: Runner) -> None:
    """Alone, and frame by frame."""
    frames, lengths, state = _batch(runner, 1)
    scores, end = runner(frames, lengths, state)
    for row, n in enumerate(lengths):
        h = state[row : row + 1]
        for t in range(n):
            said, h = runner(frames[row : row + 1, t : t + 1], [1], h)
            assert np.array_equal(said[0, 0], scores[row, t])
        assert np.array_equal(h[0], end[row])


def _inlined_says_the_same(model: onnx.ModelProto, runner: Runner) -> None:
    frames, lengths, state = _batch(runner, 2)
    inlined = Runner(onnx.inliner.inline_local_functions(model))
    for ours, theirs in zip(runner(frames, lengths, state), inlined(frames, lengths, state), strict=True):
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6, atol=1e-6)


def test_an_irnn_as_it_starts_is_refused_for_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recurrent matrix is the identity: it integrates for ever."""
    monkeypatch.setattr(verify, "STREAM_FRAMES", 4_000)
    made = lived_in(ModelConfig(kind="irnn", units=8, layers=1), (2,))
    with pytest.raises(verify.VerificationError, match="the state grows on a stream"):
        check_endless(Runner(to_onnx(made)), CLIPS)
