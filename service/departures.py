"""Requests of streams that need no task of their own: their frames go to the model at once, and the answer back as soon as it is there.

Whatever there is more to a request than that, or wrong with it, is left to the handler of its route, which says it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from starlette.responses import Response

from service import steps
from service.bodies import KINDS, frames_of, media_type_of
from service.compression import ENCODINGS
from service.gate import Gate
from service.metadata import INPUTS, OUTPUTS
from service.open_inference import LENGTH, written
from service.predictor import Flight, Landed, Predictor
from service.protocol import frame_number
from service.routes import answer_response, chosen_options
from service.sequences import Sequences, may_be_guessed
from service.shortcut import Reader
from service.tensors import split_lean, write_lean_response


class Departure:
    """Frames with what makes their answer."""

    __slots__ = ("_frames", "write")

    def __init__(self, frames: steps.Departure, write: Callable[[Flight], Response]) -> None:
        self._frames = frames
        self.write = write

    def launch(self, landed: Landed) -> bool:
        return self._frames.launch(landed)


class Departures:
    """Readers of requests, by their routes. They raise `ServiceError` or return None where the route's handler is to be asked."""

    def __init__(self, predictor: Predictor, sequences: Sequences, gate: Gate) -> None:
        self._predictor = predictor
        self._sequences = sequences
        self._gate = gate
        infer = self.infer
        self.readers: dict[str, Reader] = {
            "/v1/sessions/{session_id}/frames": self.step,
            "/v2/models/{name}/infer": infer,
            "/v2/models/{name}/versions/{version}/infer": infer,
        }

    def step(self, path: Mapping[str, str], asked: Any, headers: Mapping[bytes, bytes], body: bytes) -> Departure | None:
        """Frames of a session over REST."""
        predictor, session_id = self._predictor, path["session_id"]
        if predictor.keeper is not None:  # the store is to have the step before the answer is given
            return None
        session = predictor.sessions.get(session_id)
        kind = media_type_of(headers)
        if session is None or kind not in KINDS or b"content-encoding" in headers or may_be_guessed(session_id):
            return None
        payload, fields = frames_of(kind, body, ("first",), ("ack", "t"))
        first, ack, given = asked
        if fields:
            payload.t = fields.get("t")
            first = frame_number(fields["first"], "first")
            ack = None if fields.get("ack") is None else frame_number(fields["ack"], "ack")
        options = chosen_options(given, session.options)
        frames = steps.prepare(predictor, session, first, payload, options)
        if frames is None:
            return None

        def write(flight: Flight) -> Response:
            if ack is not None:
                predictor.acknowledge(session, ack)
            return answer_response(flight.answer(options, flight.first, flight.count))

        return Departure(frames, write)

    def infer(self, path: Mapping[str, str], asked: Any, headers: Mapping[bytes, bytes], body: bytes) -> Departure | None:
        """A lean request of the Open Inference Protocol."""
        length = headers.get(LENGTH)
        if (
            length is None
            or self._predictor.keeper is not None
            or b"content-encoding" in headers
            or headers.get(b"accept-encoding", b"").decode("latin-1") in ENCODINGS
            or b"origin" in headers
        ):
            return None
        found = split_lean(body, length.decode("latin-1"), INPUTS, OUTPUTS)
        if found is None:
            return None
        head, rest = found
        step, name = head.step, path["name"]
        assert step is not None
        ready = self._sequences.prepare(name, path.get("version"), step, head.tensors[0].shape, rest)
        if ready is None:
            return None
        version = ready.session.version

        def write(flight: Flight) -> Response:
            return written(*write_lean_response(head, step, name, version, flight.first + flight.count, flight.count, flight.scores))

        return Departure(ready, write)
