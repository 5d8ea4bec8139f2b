"""Steps that go straight to the model say what those that wait in line say: for any messages, right or wrong, one by one or at once."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service import steps
from service.catalog import Catalog
from service.errors import Diverged, NotFinite, ServiceError, SessionNotFound
from service.frames import Payload
from service.metrics import Metrics
from service.options import Options
from service.predictor import Predictor
from service.sessions import Session
from service.settings import Settings
from tests.toy_models import CHANNELS, GAPPY_CHANNELS, GESTURES, SKELETON, example_frames, moving_frames

MODELS = {"channels": CHANNELS, "gestures": GESTURES, "gappy-channels": GAPPY_CHANNELS, "skeleton": SKELETON}


@pytest.fixture(scope="module")
def catalog(models: Path) -> Catalog:
    return Catalog.load([models], "cpu", 1)


def payload(form: str, frames: np.ndarray, fault: str) -> Payload:
    if fault == "bad" and frames.size:
        frames = frames.copy()
        frames.flat[-1] = np.nan
    if form == "npy":
        stream = io.BytesIO()
        np.save(stream, frames)
        return Payload("npy", stream.getvalue(), frames.nbytes)
    if form == "array":
        return Payload("array", frames if fault != "short" else frames[..., :-1], frames.nbytes)
    if form == "raw":
        data = frames.tobytes()
        return Payload("raw", data[:-2] if fault == "short" else data, frames.nbytes)
    value = [[None if number != number else number for number in frame] for frame in frames.tolist()] if frames.ndim == 2 else frames.tolist()
    return Payload("json", value[:-1] if fault == "short" else value, frames.nbytes, t=[1.0] * len(frames) if fault == "times" else None)


async def outcome(asked: Any) -> Any:
    try:
        answer = await asked
    except ServiceError as error:
        return type(error), error.message, error.facts
    return answer.to_json(), answer.to_binary() if answer.options.scores != "none" else None


MESSAGES = st.lists(
    st.tuples(
        st.sampled_from([0, 0, 0, 0, 1, -1, -3, -80]),  # from the next frame
        st.integers(0, 6) | st.just(70),
        st.sampled_from(["raw", "raw", "json", "npy", "array"]),
        st.sampled_from(["", "", "", "bad", "short", "times"]),
        st.sampled_from([None, "all", "none"]),
        st.sampled_from([None, True, False]),
    ),
    max_size=12,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(sorted(MODELS)), opened=st.sampled_from(["last", "all"]), messages=MESSAGES, fps=st.sampled_from([None, None, 10.0]))
def test_the_short_way_and_the_long_way_say_the_same(catalog: Catalog, name: str, opened: Any, messages: list[Any], fps: float | None) -> None:
    frames = moving_frames(MODELS[name], 200, seed=3)

    async def scenario() -> None:
        async with Predictor(catalog, Settings(), Metrics()) as predictor:
            short, long = (predictor.open(name, None, Options(scores=opened, fps=fps)) for _ in range(2))
            for off, count, form, fault, scores, events in messages:
                first = max(0, short.next_frame + off)
                some = payload(form, frames[first : first + count], fault)
                options = Options(fps=fps, scores=scores or opened, events=events)
                number = len(some.value) if isinstance(some.value, list) else None
                expected = await outcome(predictor.advance(long, first, number, some, options))
                assert await outcome(steps.advance(predictor, short, first, some, options)) == expected
                assert (short.next_frame, short.answers.start, short.queued) == (long.next_frame, long.answers.start, 0)

    asyncio.run(scenario())


def serve(catalog: Catalog, scenario: Any, name: str = "channels") -> None:
    async def run() -> None:
        async with Predictor(catalog, Settings(), Metrics()) as predictor:
            await scenario(predictor, predictor.open(name, None, Options(scores="all")))
            assert all(not session.queued for session in predictor.sessions)

    asyncio.run(run())


def raw(frames: np.ndarray) -> Payload:
    return Payload("raw", frames.tobytes(), frames.nbytes)


def test_nearly_all_steps_go_the_short_way(catalog: Catalog) -> None:
    clip = example_frames(CHANNELS, 100)

    async def scenario(predictor: Predictor, session: Session) -> None:
        for at in range(100):  # past the frames whose answers are kept
            flight = await steps.fly(predictor, session, at, raw(clip[at : at + 1]), session.options)
            assert flight is not None
            assert (flight.first, flight.count) == (at, 1)
        assert await steps.fly(predictor, session, 99, raw(clip[99:]), session.options) is None
        assert await steps.fly(predictor, session, 101, raw(clip[:1]), session.options) is None

    serve(catalog, scenario)


def test_steps_sent_at_once_wait_for_each_other(catalog: Catalog) -> None:
    clip = example_frames(CHANNELS, 30)

    async def scenario(predictor: Predictor, session: Session) -> None:
        expected = (await predictor.predict("channels", None, raw(clip), Options(scores="all"))).scores
        asked = [steps.advance(predictor, session, at, raw(clip[at : at + 3]), session.options) for at in range(0, 30, 3)]
        answers = await asyncio.gather(*asked)
        assert np.concatenate([answer.scores for answer in answers]).tobytes() == expected.tobytes()

    serve(catalog, scenario)


def test_a_suspect_among_neighbours_is_told_alone(catalog: Catalog) -> None:
    good, bad = example_frames(CHANNELS, 2), example_frames(CHANNELS, 2)
    bad[1, 0] = np.inf

    async def scenario(predictor: Predictor, session: Session) -> None:
        other = predictor.open("channels", None, Options())
        asked = [steps.advance(predictor, one, 0, raw(frames), one.options) for one, frames in ((session, bad), (other, good))]
        error, answer = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(error, NotFinite)
        assert "frame 1" in error.message
        assert (session.next_frame, other.next_frame) == (0, 2)
        assert not isinstance(answer, BaseException)

    serve(catalog, scenario)


def test_a_step_that_diverges_changes_nothing(catalog: Catalog) -> None:
    async def scenario(predictor: Predictor, session: Session) -> None:
        with pytest.raises(Diverged):
            await steps.advance(predictor, session, 0, raw(np.array([[1e6, 1e6]], np.float32)), session.options)
        assert session.next_frame == 0
        await steps.advance(predictor, session, 0, raw(np.zeros((1, 2), np.float32)), session.options)

    serve(catalog, scenario, "explosive")


def test_what_a_caller_who_left_has_sent_takes_effect(catalog: Catalog) -> None:
    clip = example_frames(CHANNELS, 2)

    async def scenario(predictor: Predictor, session: Session) -> None:
        task = asyncio.create_task(steps.advance(predictor, session, 0, raw(clip), session.options))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with session.turn:
            assert session.next_frame == 2
        predictor.end(session, "closed")
        with pytest.raises(SessionNotFound):
            await steps.advance(predictor, session, 2, raw(clip), session.options)

    serve(catalog, scenario)
