"""Proof that an exported file says what the network says, in whatever pieces and company it is asked.

Every check raises `VerificationError` with the figure and the bar; what was measured goes into the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
import onnxruntime
import torch
from onnx import ModelProto

from model.contract import INPUTS, OUTPUTS, Manifest, Parity, SelfTest, StreamReport, Task
from model.network import Network
from training.datasets.clips import ClipSet, Frames
from training.onnx_file import fingerprint, interface, read_manifest

Array = npt.NDArray[np.float32]

SCORES_BAR = 1e-4  # largest absolute difference of scores
STATE_BAR = 1e-3  # largest difference of state, relative to its largest value
STREAM_FRAMES = 100_000
STREAMS, ACTIONS = 200, 20


class VerificationError(RuntimeError):
    """An exported file does not hold what the contract promises; it must not be used."""


class Runner:
    """onnxruntime on the CPU, one thread, over one model: frames in any pieces, rows in any company."""

    def __init__(self, model: ModelProto) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        shape = interface(model)
        self.frame_shape, self.state_width, self.classes = shape.frame_shape, shape.state_width, shape.classes

    def __call__(self, frames: Array, lengths: Sequence[int], state: Array) -> tuple[Array, Array]:
        """frames (B, T, *shape), lengths (B,), state (B, S) -> scores (B, T, classes), next state (B, S)."""
        feed = dict(zip(INPUTS, (frames, np.asarray(lengths, np.int64), state), strict=True))
        scores, next_state = self.session.run(list(OUTPUTS), feed)
        return scores, next_state

    def zeros(self, rows: int) -> Array:
        return np.zeros((rows, self.state_width), np.float32)

    def whole(self, clip: Frames) -> tuple[Array, Array]:
        """One clip at once: scores (T, classes), state (S,)."""
        scores, state = self(clip[None], [len(clip)], self.zeros(1))
        return scores[0], state[0]

    def chunked(self, clip: Frames, rng: np.random.Generator) -> tuple[Array, Array]:
        """One clip in chunks of random length, an empty one among them."""
        state, pieces, at = self.zeros(1), [], 0
        while at < len(clip):
            size = int(rng.integers(0, 17))
            chunk = clip[at : at + size] if size else clip[:1]
            scores, state = self(chunk[None], [min(size, len(chunk))], state)
            pieces.append(scores[0, :size])
            at += size
        return np.concatenate(pieces)[: len(clip)], state[0]


def check_file(model: ModelProto) -> None:
    """The checker's full check and strict shape inference; also of the file with its local functions inlined."""
    for variant in (model, onnx.inliner.inline_local_functions(model)):
        try:
            onnx.checker.check_model(variant, full_check=True)
            onnx.shape_inference.infer_shapes(variant, check_type=True, strict_mode=True, data_prop=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise VerificationError(f"the file is not valid ONNX: {error}") from None


def check_parity(runner: Runner, clips: Sequence[Frames], network: Network | None) -> Parity:
    """torch whole = ONNX whole = ONNX in random chunks = ONNX in a batch of unrelated rows with unequal lengths.

    Without a network the three ONNX ways are held against each other alone.
    """
    rng = np.random.default_rng(0)
    longest = max(len(clip) for clip in clips)
    frames = np.zeros((len(clips), longest, *runner.frame_shape), np.float32)
    for row, clip in zip(frames, clips, strict=True):
        row[: len(clip)] = clip
    together, together_state = runner(frames, [len(clip) for clip in clips], runner.zeros(len(clips)))
    torch_abs = chunked_abs = batched_abs = state_rel = 0.0
    for i, clip in enumerate(clips):
        scores, state = runner.whole(clip)
        in_chunks, chunk_state = runner.chunked(clip, rng)
        chunked_abs = max(chunked_abs, _difference(in_chunks, scores))
        batched_abs = max(batched_abs, _difference(together[i, : len(clip)], scores))
        states = [chunk_state, together_state[i]]
        if network is not None:
            with torch.no_grad():
                from_torch, end = network.scores(torch.from_numpy(clip)[None], torch.tensor([len(clip)]), network.initial_state(1))
            torch_abs = max(torch_abs, _difference(from_torch[0].numpy(), scores))
            states.append(end[0].numpy())
        state_rel = max(state_rel, *(_difference(other, state) / max(1.0, float(np.abs(state).max())) for other in states))
    scores_abs = max(torch_abs, chunked_abs, batched_abs)
    if not scores_abs <= SCORES_BAR or not state_rel <= STATE_BAR:
        raise VerificationError(
            f"scores differ by up to {scores_abs:.2e} (bar {SCORES_BAR:.0e}; torch {torch_abs:.2e}, chunks {chunked_abs:.2e}, batch {batched_abs:.2e}), "
            f"state by {state_rel:.2e} relative (bar {STATE_BAR:.0e})"
        )
    return Parity(scores_abs=scores_abs, state_rel=state_rel, chunked_abs=chunked_abs, batched_abs=batched_abs, clips=len(clips))


def check_neighbours(runner: Runner, clips: Sequence[Frames]) -> None:
    """NaN, infinities and huge coordinates in one row leave the other rows of the batch untouched, bit for bit."""
    steps = min(32, max(len(clip) for clip in clips))
    rows = [clip[:steps] for clip in clips[:7]]
    frames = np.zeros((len(rows) + 1, steps, *runner.frame_shape), np.float32)
    for row, clip in zip(frames, rows, strict=False):
        row[: len(clip)] = clip
    lengths = [*(len(clip) for clip in rows), steps]
    clean, clean_state = runner(frames, lengths, runner.zeros(len(lengths)))
    for poison in (np.nan, np.inf, -np.inf, 3e38, -1e30):
        frames[-1] = poison
        scores, state = runner(frames, lengths, runner.zeros(len(lengths)))
        same = all(np.array_equal(scores[i, :n], clean[i, :n]) for i, n in enumerate(lengths[:-1]))
        if not same or not np.array_equal(state[:-1], clean_state[:-1]):
            raise VerificationError(f"{poison} in one row of a batch changed the scores of its neighbours")


def check_endless(runner: Runner, clips: Sequence[Frames], watch: Callable[[int, int], None] | None = None) -> int:
    """Streams 100 000 frames, clips end to end: the state stays finite and does not grow. Returns the frames run.

    Eight streams side by side, each of the full length, so that one lucky order of clips decides nothing.
    """
    rng, rows, chunk = np.random.default_rng(1), 8, 500
    sources = [_endless(clips, rng) for _ in range(rows)]
    state, sizes = runner.zeros(rows), np.zeros((STREAM_FRAMES // chunk, runner.state_width))
    for i in range(len(sizes)):
        frames = np.stack([[next(source) for _ in range(chunk)] for source in sources])
        scores, state = runner(frames, [chunk] * rows, state)
        sizes[i] = np.abs(state).mean(0)
        if not (np.isfinite(scores).all() and np.isfinite(sizes[i]).all()):
            raise VerificationError(f"the state is no longer finite after {(i + 1) * chunk} frames of a stream")
        if watch:
            watch((i + 1) * chunk, STREAM_FRAMES)
    quarter = len(sizes) // 4
    early, late = sizes[:quarter].mean(0), sizes[-quarter:].mean(0)  # of each unit: a steady drift makes them differ sevenfold, a random walk threefold
    worst = int((late - 2 * early).argmax())
    if late[worst] > 2 * early[worst] + 1:
        raise VerificationError(
            f"the state grows on a stream: value {worst} of it is {early[worst]:.3g} on average over the first quarter of {STREAM_FRAMES} frames, "
            f"{late[worst]:.3g} over the last; bound the recurrent weights below one (model.horizon; an IRNN has no such bound)"
        )
    return STREAM_FRAMES


def measure_stream(runner: Runner, clips: ClipSet, horizon: int, verified_frames: int, task: Task = "classification") -> StreamReport:
    """Accuracy along 200 streams of 20 clips end to end, never reset: at the first position and at the last five.

    Of a clip its label is to be found at the last frame; of tokens, each next one inside the clip.
    """
    rng = np.random.default_rng(2)
    picks = rng.integers(0, len(clips), (STREAMS, ACTIONS))
    state, right = runner.zeros(STREAMS), np.zeros((STREAMS, ACTIONS))
    for position in range(ACTIONS):
        chosen = picks[:, position]
        lengths = np.array([len(clips.frames[i]) for i in chosen])
        last, hits = np.zeros((STREAMS, runner.classes), np.float32), np.zeros(STREAMS)
        for start in range(0, lengths.max(), 64):
            size = min(64, lengths.max() - start)
            frames = np.zeros((STREAMS, size, *runner.frame_shape), np.float32)
            for row, i in zip(frames, chosen, strict=True):
                piece = clips.frames[i][start : start + size]
                row[: len(piece)] = piece
            counts = np.clip(lengths - start, 0, size)
            scores, state = runner(frames, counts, state)
            ended = (counts > 0) & (lengths <= start + size)
            last[ended] = scores[ended, counts[ended] - 1]
            if task == "tokens":
                for row, i in enumerate(chosen):
                    following = clips.frames[i][start + 1 : start + 1 + size, 0]
                    hits[row] += (scores[row, : len(following)].argmax(-1) == following).sum()
        right[:, position] = hits / np.maximum(lengths - 1, 1) if task == "tokens" else last.argmax(1) == clips.labels[chosen]
    late = right[:, -5:].mean(1)
    spread = (late - right[:, 0]).std(ddof=1) / np.sqrt(STREAMS)
    return StreamReport(
        verified_frames=verified_frames, horizon=horizon, accuracy_first=float(right[:, 0].mean()), accuracy_last=float(late.mean()), ci95=float(1.96 * spread)
    )


def self_test(runner: Runner, clip: Frames) -> SelfTest:
    """The first 16 frames of a clip and what the file makes of them."""
    frames = clip[:16]
    scores, _ = runner.whole(frames)
    values = [None if np.isnan(v) else float(v) for v in frames.ravel()]
    return SelfTest(frames=_nested(values, frames.shape), scores=scores.astype(float).tolist())


@dataclass(frozen=True)
class FileReport:
    """What `verify_file` found."""

    manifest: Manifest
    parity: Parity
    verified_frames: int


def verify_file(model: ModelProto, clips: Sequence[Frames], network: Network | None = None, watch: Callable[[int, int], None] | None = None) -> FileReport:
    """Everything that can be proved of a finished file, with clips of its own kind; raises `VerificationError` at the first fault."""
    manifest = read_manifest(model)
    check_file(model)
    runner = Runner(model)
    if (said := (manifest.frame_shape, manifest.state_width, len(manifest.classes))) != (has := (runner.frame_shape, runner.state_width, runner.classes)):
        raise VerificationError(f"the manifest says frames {said[0]}, state {said[1]} and {said[2]} classes, the graph {has[0]}, {has[1]} and {has[2]}")
    if network is not None and (of := (network.frame_shape, network.state_width, network.classes)) != has:
        raise VerificationError(f"the run's network takes frames {of[0]}, state {of[1]} and {of[2]} classes, the graph {has[0]}, {has[1]} and {has[2]}")
    if fingerprint(model) != manifest.fingerprint:
        raise VerificationError("the fingerprint in the manifest is not that of the graph: the file was changed after export")
    wrong = next((clip.shape for clip in clips if clip.shape[1:] != runner.frame_shape), None)
    if wrong:
        raise VerificationError(f"a clip has frames of shape {wrong[1:]}, the model takes {runner.frame_shape}")
    try:
        test = np.array(manifest.self_test.frames, np.float32)
    except (TypeError, ValueError):
        test = np.zeros(0, np.float32)
    if test.shape[1:] != runner.frame_shape:
        raise VerificationError(f"self-test: its frames are not of shape {runner.frame_shape}")
    difference = _difference(runner.whole(test)[0], np.array(manifest.self_test.scores, np.float32))
    if not difference <= manifest.self_test.tolerance:
        raise VerificationError(f"self-test: scores differ by {difference:.2e}, tolerance {manifest.self_test.tolerance:.0e}")
    parity = check_parity(runner, clips, network)
    check_neighbours(runner, clips)
    return FileReport(manifest, parity, check_endless(runner, clips, watch))


def _endless(clips: Sequence[Frames], rng: np.random.Generator) -> Iterator[Array]:
    while True:
        yield from clips[int(rng.integers(len(clips)))]


def _difference(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    with np.errstate(invalid="ignore"):  # inf - inf
        difference = np.abs(np.asarray(a) - np.asarray(b))
    return float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))  # NaN would get lost in max()


def _nested(values: list[float | None], shape: tuple[int, ...]) -> list[object]:
    """Nested lists of this shape from flat values."""
    nested: list[object] = list(values)
    for size in reversed(shape[1:]):
        nested = [nested[i : i + size] for i in range(0, len(nested), size)]
    return nested
