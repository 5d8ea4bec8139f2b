"""The use cases without HTTP: one property above all, that however a stream is cut, resent or crossed with others, its answers are the same bits."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service import detector
from service.catalog import Catalog
from service.errors import (
    AnswersForgotten,
    Deadline,
    Diverged,
    Draining,
    FingerprintMismatch,
    Gap,
    LayoutUnknown,
    ModelNotFound,
    NoEvents,
    NotFinite,
    ServiceError,
    SessionExpired,
    SessionNotFound,
    TakenOver,
    TooMany,
    WrongTime,
)
from service.frames import Payload
from service.metrics import Metrics
from service.options import Options
from service.predictor import Predictor
from service.record import Record
from service.runner import Stretch
from service.sessions import Session
from service.settings import Settings
from tests.toy_models import CHANNELS, EXPLOSIVE, GAPPY_GESTURES, GESTURES, example_frames, moving_frames

ALL = Options(scores="all")
CLIP = example_frames(CHANNELS, 150, seed=5)


@pytest.fixture(scope="module")
def catalog(models: Path) -> Catalog:
    return Catalog.load([models], "cpu", 1)


def raw(frames: np.ndarray) -> Payload:
    return Payload("raw", frames.tobytes(), frames.nbytes)


def serve(catalog: Catalog, scenario: Callable[[Predictor], Awaitable[Any]], **changes: Any) -> Any:
    async def run() -> Any:
        async with Predictor(catalog, Settings(**changes), Metrics()) as predictor:
            result = await scenario(predictor)
        assert len(predictor.sessions) == 0
        assert all(runner.rows.taken == 0 for runner in predictor.models)
        return result

    return asyncio.run(run())


async def whole(predictor: Predictor, frames: np.ndarray = CLIP, model: str = "channels") -> np.ndarray:
    return (await predictor.predict(model, None, raw(frames), ALL)).scores


STEPS = st.lists(st.tuples(st.integers(0, 25), st.integers(1, 40), st.booleans()), max_size=15)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_cut_resent_and_overlapping_messages_give_the_same_answers(catalog: Catalog, steps: list[tuple[int, int, bool]]) -> None:
    """Each step goes back by some frames, sends some more, and perhaps tries a gap before."""

    async def scenario(predictor: Predictor) -> None:
        expected = await whole(predictor)
        session = predictor.open("channels", None, ALL)
        for back, count, tries_gap in steps:
            first = max(0, session.next_frame - back)
            end = min(len(CLIP), first + count)
            if first == end:
                break
            if tries_gap:
                with pytest.raises(Gap):
                    await predictor.advance(session, session.next_frame + 1, 1, raw(CLIP[:1]), ALL)
            answer = await predictor.advance(session, first, end - first, raw(CLIP[first:end]), ALL)
            assert (answer.first, answer.count) == (first, end - first)
            assert answer.scores.tobytes() == expected[first:end].tobytes()

    serve(catalog, scenario)


def test_neighbours_do_not_change_a_bit(catalog: Catalog) -> None:
    async def scenario(predictor: Predictor) -> None:
        expected = await whole(predictor)

        async def stream(seed: int, frames: np.ndarray) -> np.ndarray:
            rng, parts, at = np.random.default_rng(seed), [], 0
            session = predictor.open("channels", None, ALL)
            while at < len(frames):
                count = int(rng.integers(1, 12)) if seed % 3 else 1
                answer = await predictor.advance(session, at, None, raw(frames[at : at + count]), ALL)
                parts.append(answer.scores)
                at += len(answer.scores)
            return np.concatenate(parts)

        clips = [example_frames(CHANNELS, 150, seed) for seed in range(32)]
        results = await asyncio.gather(stream(1, CLIP), stream(3, CLIP), *(stream(seed, clip) for seed, clip in enumerate(clips)))
        assert results[0].tobytes() == results[1].tobytes() == expected.tobytes()
        for result, clip in zip(results[2:], clips, strict=True):
            assert result.tobytes() == (await whole(predictor, clip)).tobytes()

    serve(catalog, scenario)


GESTURE = moving_frames(GESTURES, 150, seed=8)
GAPPY_GESTURE = moving_frames(GAPPY_GESTURES, 150, seed=9)
GAPPY_GESTURE[::7, 1] = np.nan
JITTER = np.cumsum(np.random.default_rng(4).choice([0.02, 0.033, 0.04, 0.1, 2.5], 150, p=[0.3, 0.4, 0.2, 0.09, 0.01])) + 1.7e9
RATES = st.sampled_from([("gestures", 30.0), ("gestures", 15.0), ("gestures", 60.0), ("gestures", 0.0), ("gappy-gestures", 12.5), ("gappy-gestures", 0.0)])


def timed(frames: np.ndarray, t: np.ndarray | None) -> Payload:
    return Payload("raw", frames.tobytes(), frames.nbytes, t=None if t is None else t.tolist())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS, RATES, st.sampled_from(["all", "last"]))
def test_time_and_events_do_not_depend_on_how_a_stream_is_cut(
    catalog: Catalog, steps: list[tuple[int, int, bool]], rate: tuple[str, float], scores: Literal["all", "last"]
) -> None:
    """Rates beside the model's, frames with their own times (0: a jittery camera), events: each step goes back by some frames and sends some more,
    perhaps after messages that fail."""
    model, fps = rate
    frames, t = (GESTURE if model == "gestures" else GAPPY_GESTURE), (None if fps else JITTER)
    options = Options(scores=scores, fps=fps or None)

    async def scenario(predictor: Predictor) -> None:
        whole = await predictor.predict(model, None, timed(frames, t), dataclasses.replace(options, scores="all"))
        assert len(whole.scores) == len(frames)
        assert len(whole.events) > 3
        session = predictor.open(model, None, options)
        for back, count, fails_before in steps:
            first = max(0, session.next_frame - back)
            end = min(len(frames), first + count)
            if first == end:
                break
            part = None if t is None else t[first:end]
            if fails_before:
                await fail(predictor, session, frames, t)
            answer = await predictor.advance(session, first, end - first, timed(frames[first:end], part), options)
            assert (answer.first, answer.count) == (first, end - first)
            assert answer.scores.tobytes() == whole.scores[first if scores == "all" else end - 1 : end].tobytes()
            expected = whole.part(first, end - first, options)
            assert list(answer.events) == list(expected.events)
            assert answer.to_dict()["time"] == expected.to_dict()["time"]

    serve(catalog, scenario)


async def fail(predictor: Predictor, session: Session, frames: np.ndarray, t: np.ndarray | None) -> None:
    """Messages that are refused at several places on their way; none may leave a trace."""
    at = session.next_frame
    with pytest.raises(Gap):
        await predictor.advance(session, at + 1, 1, timed(frames[:1], None if t is None else t[-1:]), ALL)
    with pytest.raises(WrongTime):
        await predictor.advance(session, at, 2, Payload("raw", frames[:2].tobytes(), 24, t=[3.0, 3.0]), ALL)
    with pytest.raises(NotFinite):
        await predictor.advance(session, at, 1, timed(np.full((1, 3), np.inf, np.float32), None if t is None else t[-1:]), ALL)
    if at and t is not None:
        with pytest.raises(WrongTime, match=f"frame {at}: this stream began with t"):
            await predictor.advance(session, at, 1, raw(frames[:1]), ALL)


def test_the_models_own_rate_is_the_path_without_a_resampler(catalog: Catalog) -> None:
    async def scenario(predictor: Predictor) -> None:
        for options in (ALL, dataclasses.replace(ALL, fps=30.0)):
            session = predictor.open("channels", None, options)
            assert session.progress.plain
            await predictor.advance(session, 0, None, raw(CLIP), options)
            assert session.progress.plain
            assert session.progress.resampler is None
        even = await predictor.predict("channels", None, timed(CLIP, np.arange(150) / 30), ALL)
        assert even.scores.tobytes() == (await whole(predictor)).tobytes()  # times of that rate change nothing either

    serve(catalog, scenario)


@pytest.mark.parametrize(("fps", "every"), [(60.0, 2), (15.0, 1)])
def test_scores_are_those_of_the_resampled_clip(catalog: Catalog, fps: float, every: int) -> None:
    """Twice the rate: every second frame. Half: the clip with its midpoints."""
    midpoints = (CLIP[:-1] + (CLIP[1:] - CLIP[:-1]) * np.float32(0.5)).astype(np.float32)
    model_frames = CLIP[::2] if fps == 60 else np.insert(CLIP, np.arange(1, 150), midpoints, axis=0)

    async def scenario(predictor: Predictor) -> None:
        expected = await whole(predictor, np.ascontiguousarray(model_frames))
        answer = await predictor.predict("channels", None, raw(CLIP), dataclasses.replace(ALL, fps=fps))
        assert answer.scores.tobytes() == (expected.repeat(2, axis=0) if every == 2 else expected[::2]).tobytes()
        assert answer.to_dict()["time"] == round(149 / fps, 6)

    serve(catalog, scenario)


def test_a_reset_ends_what_is_open_and_starts_the_clock_anew(catalog: Catalog) -> None:
    options = Options(scores="all", fps=20.0)

    async def scenario(predictor: Predictor) -> None:
        expected = await predictor.predict("gestures", None, raw(GESTURE[:60]), options)
        session = predictor.open("gestures", None, options)
        first = 0
        while session.progress.open_event() is None:
            await predictor.advance(session, first, 1, raw(GESTURE[first : first + 1]), options)
            first += 1
        started = session.facts()["open_event"]
        (end,) = await predictor.reset(session, first)
        assert await predictor.reset(session, first) == [end]  # repeating it tells the same
        assert (end.event.event, end.event.cause, end.event.label, end.event.frame, end.time) == ("end", "reset", started["label"], first, first / 20)
        assert session.facts()["open_event"] is None
        answer = await predictor.advance(session, first, None, raw(GESTURE[:60]), options)
        assert answer.scores.tobytes() == expected.scores.tobytes()
        assert [(one.event.event, one.event.frame - first, one.event.decided - first) for one in answer.events] == [
            (one.event.event, one.event.frame, one.event.decided) for one in expected.events
        ]
        predictor.acknowledge(session, first)
        kept = predictor.kept(session, options)
        assert kept is not None
        assert list(kept.events) == [end, *answer.events]  # what a resuming client may have missed, the reset's among it
        predictor.acknowledge(session, first + 1)
        assert list(predictor.kept(session, options).events) == list(answer.events)  # type: ignore[union-attr]
        counted = len(answer.events) + len(expected.events) + 2
        assert f'indrnn_events_total{{model="gestures",version="1"}} {counted}.0' in predictor.metrics.text().decode()

    serve(catalog, scenario)


def test_a_message_that_diverges_leaves_time_and_events_as_they_were(catalog: Catalog) -> None:
    frames = example_frames(EXPLOSIVE, 40)
    extreme = np.concatenate([frames[20:30], np.full((2, 2), 1e6, np.float32), np.array([[1e6, -1e6]], np.float32)])
    options = Options(scores="all", fps=45.0)

    async def scenario(predictor: Predictor) -> None:
        expected = (await predictor.predict("explosive", None, raw(frames), options)).scores
        session = predictor.open("explosive", None, options)
        await predictor.advance(session, 0, None, raw(frames[:20]), options)
        before = session.progress.to_dict()
        with pytest.raises(Diverged):
            await predictor.advance(session, 20, None, raw(extreme), options)
        assert session.progress.to_dict() == before
        answer = await predictor.advance(session, 20, None, raw(frames[20:]), options)
        assert answer.scores.tobytes() == expected[20:].tobytes()

    serve(catalog, scenario)


def test_a_message_that_is_dropped_half_way_leaves_time_and_events_as_they_were(catalog: Catalog) -> None:
    """Its time is over, or its caller leaves, while its slices run."""
    options, long = Options(scores="last", fps=20.0), np.tile(GESTURE, (6000, 1))

    async def scenario(predictor: Predictor) -> None:
        expected = await predictor.predict("gestures", None, raw(GESTURE), options)
        session = predictor.open("gestures", None, options)
        await predictor.advance(session, 0, None, raw(GESTURE[:40]), options)
        before = session.progress.to_dict()
        assert before["detector"]["rows"] or before["detector"]["run"]
        patient, predictor._settings = predictor._settings, Settings(deadline_s=0.6)
        with pytest.raises(Deadline):
            await predictor.advance(session, 40, None, raw(long), options)
        predictor._settings = patient
        ran = predictor.runner("gestures").frames_run
        leaver = asyncio.create_task(predictor.advance(session, 40, None, raw(long), options))
        for _ in range(1000):
            await asyncio.sleep(0.01)
            if predictor.runner("gestures").frames_run > ran + 2000:
                break
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        assert session.next_frame == 40
        assert session.progress.to_dict() == before
        answer = await predictor.advance(session, 40, None, raw(GESTURE[40:]), options)
        assert answer.scores.tobytes() == expected.scores.tobytes()
        assert list(answer.events) == [one for one in expected.events if one.event.decided >= 40]

    serve(catalog, scenario)


def test_events_may_be_switched_off_and_on_again(catalog: Catalog) -> None:
    """The detector goes on unseen."""
    off, on = Options(events=False), Options(events=True)

    async def scenario(predictor: Predictor) -> None:
        expected = (await predictor.predict("gestures", None, raw(GESTURE), on)).events
        assert "events" not in (await predictor.predict("gestures", None, raw(GESTURE), off)).to_dict()
        session = predictor.open("gestures", None, off)
        assert session.options.events is False
        assert "events" not in (await predictor.advance(session, 0, None, raw(GESTURE[:70]), session.options)).to_dict()
        answer = await predictor.advance(session, 70, None, raw(GESTURE[70:]), on)
        assert list(answer.events) == [one for one in expected if one.event.decided >= 70]
        with pytest.raises(NoEvents, match="channels has no events"):
            predictor.open("channels", None, on)
        assert predictor.open("channels", None, off).options.events is False

    serve(catalog, scenario)


def test_more_events_than_are_kept(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeat never tells less than the first answer did."""
    monkeypatch.setattr(detector, "KEPT_EVENTS", 3)

    async def scenario(predictor: Predictor) -> None:
        session = predictor.open("gestures", None, Options())
        answer = await predictor.advance(session, 0, None, raw(GESTURE), session.options)
        assert len(answer.events) > 3
        with pytest.raises(AnswersForgotten, match="events of frames 0 to"):
            await predictor.advance(session, 0, None, raw(GESTURE), session.options)
        late = answer.events[-3].event.decided
        again = await predictor.advance(session, late, None, raw(GESTURE[late:]), session.options)
        assert list(again.events) == list(answer.events[-3:])
        await predictor.advance(session, 0, None, raw(GESTURE), dataclasses.replace(session.options, events=False))

    serve(catalog, scenario)


def test_a_reset_begins_anew(catalog: Catalog) -> None:
    async def scenario(predictor: Predictor) -> None:
        expected = await whole(predictor, CLIP[:20])
        session = predictor.open("channels", None, ALL)
        await predictor.advance(session, 0, None, raw(CLIP[50:60]), ALL)
        await predictor.reset(session, 10)
        await predictor.reset(session, 10)
        answer = await predictor.advance(session, 10, None, raw(CLIP[:20]), ALL)
        assert answer.scores.tobytes() == expected.tobytes()

    serve(catalog, scenario)


def test_a_diverging_stream_leaves_its_neighbours_alone(catalog: Catalog) -> None:
    frames = example_frames(EXPLOSIVE, 40)
    extreme = np.concatenate([frames[:35], np.full((2, 2), 1e6, np.float32), np.array([[1e6, -1e6]], np.float32)])

    async def scenario(predictor: Predictor) -> None:
        expected = await whole(predictor, frames, "explosive")
        good, bad = predictor.open("explosive", None, ALL), predictor.open("explosive", None, ALL)
        first, second = await asyncio.gather(
            predictor.advance(good, 0, None, raw(frames), ALL), predictor.advance(bad, 0, None, raw(extreme), ALL), return_exceptions=True
        )
        assert isinstance(second, Diverged)
        assert first.scores.tobytes() == expected.tobytes()  # type: ignore[union-attr]
        assert bad.next_frame == 0
        answer = await predictor.advance(bad, 0, None, raw(frames), ALL)
        assert answer.scores.tobytes() == expected.tobytes()

    serve(catalog, scenario)


def test_a_caller_that_leaves_leaves_a_whole_session(catalog: Catalog) -> None:
    """Wherever the caller is cut off, its message took effect as a whole or not at all."""

    async def scenario(predictor: Predictor) -> None:
        expected = await whole(predictor)
        for pause in (0.0, 0.0001, 0.0005, 0.001, 0.003):
            session = predictor.open("channels", None, ALL)
            task = asyncio.create_task(predictor.advance(session, 0, None, raw(CLIP[:100]), ALL))
            await asyncio.sleep(pause)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert session.next_frame in (0, 100)
            at = session.next_frame
            answer = await predictor.advance(session, at, None, raw(CLIP[at:]), ALL)
            assert answer.scores.tobytes() == expected[at:].tobytes()

    serve(catalog, scenario)


def test_messages_of_one_session_take_turns(catalog: Catalog) -> None:
    async def scenario(predictor: Predictor) -> None:
        expected = await whole(predictor)
        session = predictor.open("channels", None, ALL)
        answers = await asyncio.gather(*(predictor.advance(session, at, 10, raw(CLIP[at : at + 10]), ALL) for at in range(0, 150, 10)))
        assert np.concatenate([answer.scores for answer in answers]).tobytes() == expected.tobytes()

    serve(catalog, scenario)


class Owner:
    def __init__(self) -> None:
        self.stopped: ServiceError | None = None

    def stop(self, error: ServiceError) -> None:
        self.stopped = error


def test_the_later_connection_wins(catalog: Catalog) -> None:
    async def scenario(predictor: Predictor) -> None:
        session = predictor.open("channels", None, ALL)
        first, second = Owner(), Owner()
        predictor.attach(session, first)
        predictor.attach(session, second)
        assert isinstance(first.stopped, TakenOver)
        with pytest.raises(TakenOver):
            await predictor.advance(session, 0, 1, raw(CLIP[:1]), ALL, first)
        await predictor.advance(session, 0, 1, raw(CLIP[:1]), ALL, second)
        predictor.detach(session, first)
        assert session.owner is second

    serve(catalog, scenario)


def test_idle_sessions_expire_but_a_connection_keeps_its_own_alive(catalog: Catalog) -> None:
    async def scenario(predictor: Predictor) -> None:
        idle, streamed, touched = (predictor.open("channels", None, ALL) for _ in range(3))
        owner = Owner()
        predictor.attach(streamed, owner)
        assert predictor.sessions.expires_in_s(streamed) is None
        for _ in range(200):
            await asyncio.sleep(0.02)
            predictor.touch(touched)
            if idle.ended:
                break
        assert (idle.ended, streamed.ended, touched.ended) == ("expired", None, None)
        predictor.detach(streamed, owner)  # from now on it is idle
        assert 0 < (predictor.sessions.expires_in_s(streamed) or 0) <= 0.4
        await asyncio.sleep(0.05)
        assert streamed.ended is None
        for _ in range(200):
            await asyncio.sleep(0.02)
            predictor.touch(touched)
            if streamed.ended:
                break
        assert (streamed.ended, touched.ended, owner.stopped) == ("expired", None, None)

    serve(catalog, scenario, idle_s=0.4)


def test_old_sessions_expire_and_their_owner_is_told(catalog: Catalog) -> None:
    async def scenario(predictor: Predictor) -> None:
        session, owner = predictor.open("channels", None, ALL), Owner()
        predictor.attach(session, owner)
        for _ in range(200):
            await asyncio.sleep(0.02)
            if session.ended:
                break
        assert session.ended == "aged"
        assert isinstance(owner.stopped, SessionExpired)
        with pytest.raises(SessionExpired):
            await predictor.advance(session, 0, 1, raw(CLIP[:1]), ALL)
        assert 'indrnn_sessions_ended_total{cause="aged",model="channels",version="10"} 1.0' in predictor.metrics.text().decode()

    serve(catalog, scenario, age_s=0.05)


def test_sessions_are_capped_and_closed(catalog: Catalog) -> None:
    async def scenario(predictor: Predictor) -> None:
        sessions = [predictor.open("channels", None, ALL) for _ in range(3)]
        with pytest.raises(TooMany):
            predictor.open("channels", None, ALL)
        await predictor.close(sessions[0], "closed")
        with pytest.raises(SessionNotFound):
            await predictor.close(sessions[0], "closed")
        predictor.open("channels", None, ALL)
        assert "indrnn_sessions_refused_total 1.0" in predictor.metrics.text().decode()

    serve(catalog, scenario, sessions=3)


def test_a_draining_service_takes_nothing_new(catalog: Catalog) -> None:
    async def scenario(predictor: Predictor) -> None:
        under_way = asyncio.create_task(whole(predictor))
        await asyncio.sleep(0)
        await predictor.drain()
        assert len(await under_way) == len(CLIP)
        with pytest.raises(Draining):
            predictor.open("channels", None, ALL)
        with pytest.raises(Draining):
            await whole(predictor)

    serve(catalog, scenario)


def test_warnings_about_endless_streams(catalog: Catalog) -> None:
    async def scenario(predictor: Predictor) -> None:
        assert "warning" not in predictor.opened(predictor.open("channels", None, ALL))
        assert "not verified for endless streams" in predictor.opened(predictor.open("skeleton", None, ALL))["warning"]
        runner = predictor.runner("channels")
        assert runner.manifest.stream is not None
        fading = dataclasses.replace(runner.manifest.stream, accuracy_last=0.5)
        runner.manifest = dataclasses.replace(runner.manifest, stream=fading)
        assert "declines from 90.0% to 50.0%" in predictor.opened(predictor.open("channels", None, ALL))["warning"]

    serve(catalog, scenario)


# Put away and taken up again


async def fed(predictor: Predictor, session: Session, frames: np.ndarray, t: list[float] | None, first: int, size: int) -> tuple[bytes, list[Any]]:
    """The scores' bits and the events of frames from `first` on, in messages of `size`."""
    bits, events = b"", []
    for at in range(first, len(frames), size):
        payload = raw(frames[at : at + size])
        payload.t = None if t is None else t[at : min(at + size, len(frames))]
        answer = await predictor.advance(session, at, None, payload, session.options)
        bits += answer.scores.tobytes()
        events += answer.events
    return bits, events


GESTURED = moving_frames(GESTURES, 120, seed=4)
HOLES = moving_frames(GAPPY_GESTURES, 120, seed=1)
HOLES[5:100:9, 2] = np.nan
UNEVEN = np.cumsum(np.random.default_rng(1).choice([0.02, 0.05, 0.3, 3.0], 120, p=[0.5, 0.3, 0.15, 0.05])).tolist()
STREAMS = [
    ("channels", CLIP[:120], None, None),
    ("channels", CLIP[:120], 12.0, None),
    ("gestures", GESTURED, None, None),
    ("gappy-gestures", HOLES, 60.0, None),
    ("gappy-gestures", HOLES, None, UNEVEN),
]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(STREAMS), st.integers(0, 120), st.integers(1, 40), st.booleans(), st.integers(0, 120))
def test_a_stream_taken_up_elsewhere_goes_on_with_the_same_bits(catalog: Catalog, stream: Any, cut: int, size: int, reset: bool, ack: int) -> None:
    """Cut at any frame; through bytes into a service that is new. Scores, events, numbers and kept answers are those of the stream left in peace."""
    model, frames, fps, t = stream
    options = Options(scores="all", fps=fps, top_k=3)

    async def before(predictor: Predictor) -> Any:
        session = predictor.open(model, None, options)
        await fed(predictor, session, frames[:cut], t, 0, size)
        if reset:
            await predictor.reset(session, cut)
        predictor.acknowledge(session, min(ack, cut))
        record = (await predictor.snapshot(session)).to_bytes()
        kept = predictor.kept(session, session.options)
        return record, kept and (kept.first, kept.to_json()), session.facts(), await fed(predictor, session, frames, t, cut, size)

    data, kept, facts, expected = serve(catalog, before)

    async def after(predictor: Predictor) -> None:
        session = predictor.restore(model, None, Record.from_bytes(data))
        again = predictor.kept(session, session.options)
        assert (again and (again.first, again.to_json())) == kept
        changing = {"digest", "idle_s", "epoch"}
        assert {name: value for name, value in session.facts().items() if name not in changing} == {k: v for k, v in facts.items() if k not in changing}
        assert await fed(predictor, session, frames, t, cut, size) == expected
        if reset and cut < len(frames):
            with pytest.raises(Gap):  # it knows where it began anew, and that frames came after it
                await predictor.reset(session, cut)

    serve(catalog, after)


def test_restored_twice_they_go_separate_ways_and_disturb_nobody(catalog: Catalog) -> None:
    async def scenario(predictor: Predictor) -> None:
        expected = await whole(predictor)
        session, neighbour = predictor.open("channels", None, ALL), predictor.open("channels", None, ALL)
        await predictor.advance(session, 0, 50, raw(CLIP[:50]), ALL)
        running = asyncio.create_task(predictor.advance(neighbour, 0, 150, raw(CLIP), ALL))
        record = await predictor.snapshot(session)
        twins = [predictor.restore("channels", None, record) for _ in range(2)]
        assert len({session.id, *(twin.id for twin in twins)}) == 3
        assert len({session.row, neighbour.row, *(twin.row for twin in twins)}) == 4
        await predictor.advance(twins[0], 50, 40, raw(-CLIP[50:90]), ALL)
        for one in (session, twins[1]):
            assert (await predictor.advance(one, 50, 100, raw(CLIP[50:]), ALL)).scores.tobytes() == expected[50:].tobytes()
        assert (await running).scores.tobytes() == expected.tobytes()
        await predictor.close(session, "closed")
        assert (twins[1].epoch, twins[1].ended, twins[1].next_frame) == (1, None, 150)

    serve(catalog, scenario)


def test_a_snapshot_is_taken_between_two_messages(catalog: Catalog) -> None:
    async def scenario(predictor: Predictor) -> None:
        session = predictor.open("channels", None, ALL)
        advancing = [asyncio.create_task(predictor.advance(session, at, 50, raw(CLIP[at : at + 50]), ALL)) for at in (0, 50, 100)]
        await asyncio.sleep(0)
        record = await predictor.snapshot(session)
        await asyncio.gather(*advancing)
        assert record.next_frame == 150
        other = predictor.open("channels", None, ALL)
        await predictor.advance(other, 0, 150, raw(CLIP), ALL)
        assert (await predictor.snapshot(other)).row.tobytes() == record.row.tobytes()

    serve(catalog, scenario)


def test_a_refused_record_takes_nothing(catalog: Catalog) -> None:
    async def scenario(predictor: Predictor) -> None:
        session = predictor.open("gestures", None, ALL)
        await predictor.advance(session, 0, 20, raw(GESTURED[:20]), ALL)
        record = await predictor.snapshot(session)
        runner = predictor.runner("gestures")
        row = record.row.copy()
        row[0] = np.nan
        for changed, model, error in [
            (record, "channels", FingerprintMismatch),
            (record, "nobody", ModelNotFound),
            (dataclasses.replace(record, row=row), "gestures", NotFinite),
            (dataclasses.replace(record, options=dataclasses.replace(record.options, layout="coco-17")), "gestures", LayoutUnknown),
            (record, "gestures", TooMany),
        ]:
            with pytest.raises(error):
                predictor.restore(model, None, changed)
            assert (len(predictor.sessions), runner.rows.taken) == (1, 1)

    serve(catalog, scenario, sessions=1)


def test_the_version_of_the_fingerprint_is_found(catalog: Catalog) -> None:
    async def scenario(predictor: Predictor) -> None:
        session = predictor.open("channels", "9", ALL)
        record = await predictor.snapshot(session)
        assert predictor.restore("channels", None, record).version == "9"
        assert predictor.restore("channels", "1", record).version == "1"  # the same network
        assert predictor.restore("channels", None, dataclasses.replace(record, version="77", model="renamed")).version == "10"

    serve(catalog, scenario)


def test_a_clip_is_let_go_of_once_it_is_answered(catalog: Catalog) -> None:
    """Without the collector, which comes seldom; the thread that ran it may be a moment behind."""

    def held() -> int:
        return sum(type(one) is Stretch for one in gc.get_objects())  # what `isinstance` asks, some objects of others warn of

    async def scenario(predictor: Predictor) -> None:
        gc.collect()
        before = held()
        gc.disable()
        try:
            await whole(predictor)
            for _ in range(1000):
                if held() <= before:
                    return
                await asyncio.sleep(0.01)
            raise AssertionError(f"{held() - before} are still there")
        finally:
            gc.enable()

    serve(catalog, scenario)
