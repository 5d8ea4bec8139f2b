"""Three ways of using a network on a stream, held against running it step by step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.network import Network
from training import stream_scores
from training.stream_scores import left_running, multiplications, oracle, sliding


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    network = Network(ModelConfig(kind="plain", layers=2, units=8, average=10), (4,), 3)
    network.fit_features([(torch.randn(3, 20, 4), torch.tensor([20, 20, 20]))])
    return network.eval()


@pytest.fixture(scope="module")
def streams() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(n, 4)).astype(np.float32) for n in (37, 60, 5)]


def alone(network: Network, frames: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        scores, _ = network.scores(torch.from_numpy(frames)[None], torch.tensor([len(frames)]), network.initial_state(1))
    return scores[0].numpy()


def test_left_running_carries_the_state_across_chunks(network: Network, streams: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_scores, "CHUNK", 7)
    for scores, stream in zip(left_running(network, streams), streams, strict=True):
        np.testing.assert_allclose(scores, alone(network, stream), atol=1e-6)


def test_the_oracle_begins_anew_at_both_ends_of_each_action(network: Network, streams: list[np.ndarray]) -> None:
    segments = [np.array(rows, np.int64).reshape(-1, 3) for rows in ([(3, 10, 0), (10, 37, 1)], [(0, 60, 2)], [])]
    found = oracle(network, streams, segments)
    expected = [(0, 0, 3), (0, 3, 10), (0, 10, 37), (1, 0, 60), (2, 0, 5)]
    for i, first, end in expected:
        np.testing.assert_allclose(found[i][first:end], alone(network, streams[i][first:end]), atol=1e-6)


def test_a_window_forgets_everything_before_it(network: Network, streams: list[np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_scores, "TOGETHER", 16)
    found = sliding(network, streams, 9)
    for scores, stream in zip(found, streams, strict=True):
        assert len(scores) == len(stream)
        for end in (1, 4, len(stream)):
            np.testing.assert_allclose(scores[end - 1], alone(network, stream[max(0, end - 9) : end])[-1], atol=1e-6)


def test_multiplications_are_those_of_the_linear_maps(network: Network) -> None:
    assert multiplications(network) == sum(module.weight.numel() for module in network.modules() if isinstance(module, torch.nn.Linear))
