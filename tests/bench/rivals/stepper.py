"""The model with the states of its streams in a dict: what every rival holds. Knows numpy and onnxruntime alone, for it runs in their environments."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime

Floats = npt.NDArray[np.float32]


class Stepper:
    """One onnxruntime session with one thread."""

    def __init__(self, path: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        width = next(one.shape[1] for one in self._session.get_inputs() if one.name == "state")
        self._start = np.zeros(width, np.float32)
        self._states: dict[Hashable, Floats] = {}

    def step(self, streams: Sequence[Hashable], frames: Floats) -> Floats:
        """frames (streams, time, ...) -> scores (streams, classes) of the last frame of each.

        A stream that is new begins at zero; one whose name is empty or 0 is a clip, which always does.
        """
        state = np.stack([self._states.get(stream, self._start) for stream in streams])
        lengths = np.full(len(frames), frames.shape[1], np.int64)
        scores, state = self._session.run(["scores", "next_state"], {"frames": frames, "lengths": lengths, "state": state})
        self._states.update((stream, row) for stream, row in zip(streams, state, strict=True) if stream)
        return scores[:, -1]

    def forget(self, stream: Hashable) -> None:
        self._states.pop(stream, None)
