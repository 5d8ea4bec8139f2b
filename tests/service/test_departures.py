"""Which requests go to the model without a task, and which are left to their handlers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.catalog import Catalog
from service.departures import Departure, Departures
from service.errors import ServiceError
from service.frames import Payload
from service.gate import Gate
from service.metrics import Metrics
from service.options import Options
from service.predictor import Flight, Predictor
from service.sequences import Sequences, session_id
from service.settings import Settings
from tests.toy_models import CHANNELS, example_frames

CLIP = example_frames(CHANNELS, 8)
RAW, JSON, LENGTH = {b"content-type": b"application/octet-stream"}, {b"content-type": b"application/json"}, b"inference-header-content-length"


def serve(models: Path, scenario: Callable[[Predictor, Departures], Any]) -> None:
    async def run() -> None:
        async with Predictor(Catalog.load([models], "cpu", 1), Settings(), Metrics()) as predictor:
            await scenario(predictor, Departures(predictor, Sequences(predictor, True), Gate(Settings())))

    asyncio.run(run())


async def landing(departure: Departure | None) -> bytes:
    assert departure is not None, "it was left to the handler"
    future: asyncio.Future[Flight] = asyncio.get_running_loop().create_future()

    def landed(error: BaseException | None, flight: Flight) -> None:
        future.set_exception(error) if error else future.set_result(flight)

    assert departure.launch(landed)
    return bytes(departure.write(await future).body)


def test_steps_over_rest(models: Path) -> None:
    async def scenario(predictor: Predictor, departures: Departures) -> None:
        expected = (await predictor.predict("channels", None, _payload(CLIP), Options(scores="all"))).scores
        session = predictor.open("channels", None, Options())
        path = {"session_id": session.id}
        value = json.loads(await landing(departures.step(path, (0, None, (("scores", "all"),)), RAW, CLIP[:3].tobytes())))
        assert np.array_equal(np.array(value["scores"], np.float32), expected[:3])
        body = json.dumps({"first": 3, "ack": 2, "frames": CLIP[3:5].tolist()}).encode()
        value = json.loads(await landing(departures.step(path, (None, None, ()), JSON, body)))
        assert np.array_equal(np.array(value["scores"], np.float32), expected[4])
        assert session.answers.start == 2
        body = CLIP[5:6].tobytes()
        for asked, headers in (
            ((4, None, ()), RAW),
            ((6, None, ()), RAW),
            ((5, None, ()), {**RAW, b"content-encoding": b"gzip"}),
            ((5, None, ()), {b"content-type": b"text/x"}),
        ):
            assert departures.step(path, asked, headers, body) is None
        assert departures.step({"session_id": "nobody's"}, (5, None, ()), RAW, body) is None
        for asked, headers, wrong in (
            ((None, None, ()), JSON, b"{"),
            ((5, None, ()), JSON, b"[]"),
            ((5, None, (("answers", "binary"), ("scores", "none"))), RAW, body),
        ):
            with pytest.raises(ServiceError):
                departures.step(path, asked, headers, wrong)
        predictor.end(session, "closed")
        assert departures.step(path, (5, None, ()), RAW, body) is None

    serve(models, scenario)


def test_steps_of_sequences(models: Path) -> None:
    async def scenario(predictor: Predictor, departures: Departures) -> None:
        expected = (await predictor.predict("channels", None, _payload(CLIP), Options(scores="all"))).scores
        session = predictor.open("channels", None, Options(scores="all"), session_id("channels", 7))
        path = {"name": "channels"}
        body, headers = _infer(CLIP[:2], sequence_id=7)
        answer = await landing(departures.infer(path, (), headers, body))
        assert answer.endswith(expected[:2].tobytes())
        head = json.loads(answer.removesuffix(expected[:2].tobytes()))
        assert head["parameters"] == {"sequence_id": 7, "sequence_step": 2}
        for name, parameters, more in (
            ("channels", {"sequence_id": 8}, {}),
            ("channels", {"sequence_id": 7, "sequence_end": True}, {}),
            ("channels", {"sequence_id": 7, "sequence_step": 1}, {}),
            ("channels", {"sequence_id": 7, "timeout": 1000}, {}),
            ("skeleton", {"sequence_id": 7}, {}),
            ("channels", {}, {}),
            ("channels", {"sequence_id": 7}, {b"origin": b"http://elsewhere"}),
            ("channels", {"sequence_id": 7}, {b"accept-encoding": b"gzip"}),
        ):
            body, headers = _infer(CLIP[2:3], **parameters)
            assert departures.infer({"name": name}, (), {**headers, **more}, body) is None
        body, headers = _infer(CLIP[2:3, :2], sequence_id=7)
        assert departures.infer(path, (), headers, body) is None
        assert departures.infer(path, (), {}, body) is None
        with pytest.raises(ServiceError):
            departures.infer(path, (), headers, body[:20])
        predictor.end(session, "closed")

    serve(models, scenario)


def _payload(frames: np.ndarray) -> Payload:
    return Payload("raw", frames.tobytes(), frames.nbytes)


def _infer(frames: np.ndarray, **parameters: Any) -> tuple[bytes, dict[bytes, bytes]]:
    described = {"name": "frames", "shape": [1, *frames.shape], "datatype": "FP32", "parameters": {"binary_data_size": frames.nbytes}}
    value = {"inputs": [described], "outputs": [{"name": "scores", "parameters": {"binary_data": True}}], "parameters": parameters}
    head = json.dumps(value).encode()
    return head + frames.tobytes(), {LENGTH: b"%d" % len(head)}
