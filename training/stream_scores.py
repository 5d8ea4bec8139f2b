"""Three ways of using a network on a stream: left running, begun anew at every true boundary, and over a sliding window.

The first is what a service does. The second knows what nobody knows, when each action begins: how far a clip network can go. The third
is what is done without state, at the cost of running every frame as often as the window is long.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.network import Network
from training.datasets.clips import Frames
from training.datasets.recordings import Segments
from training.stream_figures import Scores

TOGETHER = 256  # clips or windows run at once
CHUNK = 256  # frames of a stream run at once

Watch = Callable[[int, int], None]


@torch.no_grad()
def left_running(network: Network, streams: Sequence[Frames]) -> list[Scores]:
    """Scores (T_i, classes) of each stream (T_i, *frame shape), from the zero state to its end."""
    state, pieces = network.initial_state(len(streams)), []
    lengths = np.array([len(stream) for stream in streams])
    for start in range(0, int(lengths.max()), CHUNK):
        parts = [stream[start : start + CHUNK] for stream in streams]
        scores, state = network.scores(_padded(parts), torch.tensor([len(part) for part in parts]), state)
        pieces.append(scores.cpu().numpy())
    together = np.concatenate(pieces, 1)
    return [row[:length] for row, length in zip(together, lengths, strict=True)]


def oracle(network: Network, streams: Sequence[Frames], segments: Sequence[Segments]) -> list[Scores]:
    """Each action, and each stretch between two, from the zero state of its own."""
    cuts = [sorted({0, len(stream), *of[:, 0].tolist(), *of[:, 1].tolist()}) for stream, of in zip(streams, segments, strict=True)]
    pieces = [(i, a, b) for i, places in enumerate(cuts) for a, b in itertools.pairwise(places)]
    pieces.sort(key=lambda piece: piece[1] - piece[2])
    out = [np.zeros((len(stream), network.classes), np.float32) for stream in streams]
    for first in range(0, len(pieces), TOGETHER):
        chosen = pieces[first : first + TOGETHER]
        scores = left_running(network, [streams[i][a:b] for i, a, b in chosen])
        for (i, a, b), piece in zip(chosen, scores, strict=True):
            out[i][a:b] = piece
    return out


@torch.no_grad()
def sliding(network: Network, streams: Sequence[Frames], window: int, watch: Watch | None = None) -> list[Scores]:
    """At every frame the scores at the end of the last `window` frames, run from the zero state; a stream's first frames have fewer behind them."""
    out = []
    for done, stream in enumerate(streams):
        scores = np.zeros((len(stream), network.classes), np.float32)
        for first in range(0, len(stream), TOGETHER):
            ends = range(first + 1, min(first + TOGETHER, len(stream)) + 1)
            parts = [stream[max(0, end - window) : end] for end in ends]
            lengths = torch.tensor([len(part) for part in parts])
            found, _ = network.scores(_padded(parts), lengths, network.initial_state(len(parts)))
            scores[first : first + len(parts)] = found[torch.arange(len(parts)), lengths - 1].cpu().numpy()
        out.append(scores)
        if watch:
            watch(done + 1, len(streams))
    return out


@torch.no_grad()
def multiplications(network: Network) -> int:
    """Of matrix products for one frame of one stream: all but a few in a thousand of what a network computes."""
    with FlopCounterMode(display=False) as counter:
        network.scores(torch.zeros(1, 1, *network.frame_shape), torch.ones(1, dtype=torch.int64), network.initial_state(1))
    return int(counter.get_total_flops()) // 2


def _padded(parts: Sequence[npt.NDArray[np.float32]]) -> torch.Tensor:
    frames = np.zeros((len(parts), max(1, max(len(part) for part in parts)), *parts[0].shape[1:]), np.float32)
    for row, part in zip(frames, parts, strict=True):
        row[: len(part)] = part
    return torch.from_numpy(frames)
