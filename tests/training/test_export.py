"""The exported graph: its form, and that it says what torch says, in any pieces and any company."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.contract import INPUTS, OUTPUTS
from model.indrnn import Recurrence, ScoreAverage
from model.layers import SequenceNorm
from model.network import Network
from model.recurrence import ONNX_DOMAIN
from training.export import fold, to_onnx
from training.onnx_file import fingerprint, interface
from training.verify import Runner

KINDS = ["channels", "body", "bare", "reset"]


@pytest.fixture(scope="module")
def runners(exported: Any) -> dict[str, Runner]:
    return {kind: Runner(exported[kind]) for kind in KINDS}


def frames_for(runner: Runner, rows: int, steps: int, *, gaps: bool, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    frames = rng.normal(0, 1, (rows, steps, *runner.frame_shape)).astype(np.float32)
    if gaps:
        frames[rng.random(frames.shape[:3]) < 0.2] = np.nan
    return frames


def through_torch(network: Network, frames: np.ndarray, lengths: list[int], state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        scores, end = network.scores(torch.from_numpy(frames), torch.tensor(lengths), torch.from_numpy(state))
    return scores.numpy(), end.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_one_node_per_recurrent_layer(kind: str, exported: Any, networks: dict[str, Network]) -> None:
    model = exported[kind]
    nodes = [node.op_type for node in model.graph.node if node.domain == ONNX_DOMAIN]
    recurrences = sum(isinstance(module, Recurrence | ScoreAverage) for module in networks[kind].modules())
    ungated = recurrences if networks[kind].boundary is None else networks[kind].config.boundary_layers
    assert (nodes.count("Recurrence"), nodes.count("GatedRecurrence")) == (ungated, recurrences - ungated)
    assert nodes.count("Hold") == networks[kind].config.missing
    assert {function.name for function in model.functions} == set(nodes)
    assert not any(node.op_type in ("Scan", "Loop", "If") for node in model.graph.node)


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_those_of_the_contract_with_free_batch_and_time(kind: str, exported: Any, networks: dict[str, Network]) -> None:
    model, network = exported[kind], networks[kind]
    assert tuple(value.name for value in model.graph.input) == INPUTS
    assert tuple(value.name for value in model.graph.output) == OUTPUTS
    found = interface(model)
    assert (found.frame_shape, found.state_width, found.classes) == (network.frame_shape, network.state_width, network.classes)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_machine_is_in_the_file(kind: str, exported: Any) -> None:
    content = exported[kind].SerializeToString()
    for trace in (b".py", b"site-packages", os.getcwd().encode(), str(Path.home()).encode() + b"/", b"stack_trace", b"pkg."):
        assert trace not in content, trace


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=25)
@given(steps=st.integers(1, 50), rows=st.integers(1, 9), seed=st.integers(0, 99))
def test_says_what_torch_says_for_any_batch_and_time(kind: str, runners: Any, networks: dict[str, Network], steps: int, rows: int, seed: int) -> None:
    runner, network = runners[kind], networks[kind]
    rng = np.random.default_rng(seed)
    frames = frames_for(runner, rows, steps, gaps=network.config.missing, seed=seed)
    lengths, state = rng.integers(0, steps + 1, rows).tolist(), rng.random((rows, runner.state_width), np.float32)
    scores, end = runner(frames, lengths, state)
    expected, expected_end = through_torch(network, frames, lengths, state)
    assert scores.shape == (rows, steps, 3)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(scores[row, :n], expected[row, :n], rtol=0, atol=1e-4)
    np.testing.assert_allclose(end, expected_end, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15)
@given(cut=st.integers(1, 29), seed=st.integers(0, 99))
def test_two_chunks_equal_one_clip(kind: str, runners: Any, networks: dict[str, Network], cut: int, seed: int) -> None:
    runner = runners[kind]
    frames = frames_for(runner, 3, 30, gaps=networks[kind].config.missing, seed=seed)
    lengths = np.array([30, seed % 31, 0])
    whole, end = runner(frames, lengths, runner.zeros(3))
    first, middle = runner(frames[:, :cut], lengths.clip(max=cut), runner.zeros(3))
    rest, last = runner(frames[:, cut:], (lengths - cut).clip(min=0), middle)
    both = np.concatenate([first, rest], 1)
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(both[row, :n], whole[row, :n], rtol=0, atol=1e-5)
    np.testing.assert_allclose(last, end, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15)
@given(rows=st.integers(2, 9), seed=st.integers(0, 99))
def test_a_row_alone_equals_a_row_in_a_ragged_batch_to_the_bit(kind: str, runners: Any, networks: dict[str, Network], rows: int, seed: int) -> None:
    runner, rng = runners[kind], np.random.default_rng(seed)
    frames = frames_for(runner, rows, 33, gaps=networks[kind].config.missing, seed=seed)
    lengths, state = rng.integers(0, 34, rows).tolist(), rng.random((rows, runner.state_width), np.float32)
    scores, end = runner(frames, lengths, state)
    for row, n in enumerate(lengths):
        alone, alone_end = runner(frames[row : row + 1, : max(1, n)], [n], state[row : row + 1])
        assert np.array_equal(alone[0, :n], scores[row, :n])
        assert np.array_equal(alone_end[0], end[row])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [0.0, np.nan, np.inf, 3e38])
def test_padding_is_never_read_and_a_row_of_no_length_stands_still(kind: str, runners: Any, garbage: float) -> None:
    runner = runners[kind]
    frames = frames_for(runner, 3, 10, gaps=False)
    state = np.random.default_rng(0).random((3, runner.state_width), np.float32)
    clean, clean_end = runner(frames, [10, 4, 0], state)
    frames[1, 4:], frames[2] = garbage, garbage
    scores, end = runner(frames, [10, 4, 0], state)
    assert np.array_equal(scores[0], clean[0])
    assert np.array_equal(scores[1, :4], clean[1, :4])
    assert np.array_equal(end, clean_end)
    assert np.array_equal(end[2], state[2])


@pytest.mark.parametrize("kind", ["channels", "body"])
def test_whatever_is_missing_scores_are_probabilities(kind: str, runners: Any) -> None:
    runner = runners[kind]
    frames = frames_for(runner, 3, 12, gaps=True)
    frames[0], frames[1, 5:] = np.nan, np.nan
    scores, end = runner(frames, [12] * 3, runner.zeros(3))
    np.testing.assert_allclose(scores.sum(-1), 1, rtol=1e-5)
    assert np.isfinite(end).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frame", [0.0, 1.0, 1e6, -1e6])
def test_degenerate_and_huge_legal_frames_give_finite_scores(kind: str, runners: Any, frame: float) -> None:
    runner = runners[kind]
    scores, end = runner(np.full((2, 20, *runner.frame_shape), frame, np.float32), [20, 20], runner.zeros(2))
    assert np.isfinite(scores).all()
    assert np.isfinite(end).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_with_its_functions_inlined_says_the_same(kind: str, exported: Any, runners: Any, networks: dict[str, Network]) -> None:
    inlined = onnx.inliner.inline_local_functions(exported[kind])
    assert not inlined.functions
    assert {node.domain for node in inlined.graph.node} <= {"", "ai.onnx"}
    onnx.checker.check_model(inlined, full_check=True)
    frames = frames_for(runners[kind], 4, 21, gaps=networks[kind].config.missing)
    lengths, state = [21, 0, 5, 20], runners[kind].zeros(4)
    for ours, theirs in zip(runners[kind](frames, lengths, state), Runner(inlined)(frames, lengths, state), strict=True):
        np.testing.assert_allclose(ours[[0]], theirs[[0]], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(ours[2, :5], theirs[2, :5], rtol=1e-6, atol=1e-6)


def test_two_exports_of_the_same_weights_are_the_same_file(exported: Any, networks: dict[str, Network]) -> None:
    before = torch.get_rng_state()
    again = to_onnx(networks["channels"])
    assert again.SerializeToString(deterministic=True) == exported["channels"].SerializeToString(deterministic=True)
    assert fingerprint(again) == fingerprint(exported["channels"])
    assert torch.equal(torch.get_rng_state(), before)  # an export in the middle of a run changes nothing of it


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 99))
def test_a_network_that_resets_itself_frame_by_frame_and_in_a_batch_to_the_bit(runners: Any, seed: int) -> None:
    runner, rng = runners["reset"], np.random.default_rng(seed)
    frames, state = frames_for(runner, 5, 19, gaps=False, seed=seed), runner.zeros(5)
    together, end = runner(frames, [19] * 5, state)
    for row in range(5):
        in_chunks, chunk_end = runner.chunked(frames[row], rng)
        assert np.array_equal(in_chunks, together[row])
        assert np.array_equal(chunk_end, end[row])


@settings(deadline=None, max_examples=20)
@given(norm=st.sampled_from(["before", "after", "none"]), layers=st.integers(1, 3), seed=st.integers(0, 99), reset=st.sampled_from(["none", "soft"]))
def test_folding_changes_no_score(lived_in: Callable[..., Network], norm: Any, layers: int, seed: int, reset: Any) -> None:
    network = lived_in(ModelConfig(kind="plain", layers=layers, units=6, norm=norm, dropout=0.3, reset=reset, boundary_units=4), (3,), seed=seed)
    folded = fold(network)
    assert not any(isinstance(module, SequenceNorm) for module in folded.modules())
    assert sum(isinstance(module, SequenceNorm) for module in network.modules()) == (0 if norm == "none" else layers + 2 * (reset == "soft"))
    frames, lengths, state = torch.randn(3, 15, 3), torch.tensor([15, 4, 0]), torch.rand(3, network.state_width)
    with torch.no_grad():
        expected, end = network(frames, lengths, state)
        got, got_end = folded(frames, lengths, state)
    for row, n in ((0, 15), (1, 4)):
        torch.testing.assert_close(got[row, :n], expected[row, :n], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got_end, end, rtol=1e-4, atol=1e-4)


def test_folding_leaves_the_network_itself_and_residual_stacks_alone(networks: dict[str, Network]) -> None:
    before = {name: value.clone() for name, value in networks["channels"].state_dict().items()}
    fold(networks["channels"])
    assert all(torch.equal(value, before[name]) for name, value in networks["channels"].state_dict().items())
    assert any(isinstance(module, SequenceNorm) for module in fold(networks["body"]).modules())
