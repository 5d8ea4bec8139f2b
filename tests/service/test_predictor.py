"""The use cases without HTTP: one property above all, that however a stream is cut, resent or crossed with others, its answers are the same bits."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.catalog import Catalog
from service.errors import Diverged, Draining, Gap, ServiceError, SessionExpired, SessionNotFound, TakenOver, TooMany
from service.frames import Payload
from service.metrics import Metrics
from service.options import Options
from service.predictor import Predictor
from service.settings import Settings
from tests.toy_models import CHANNELS, EXPLOSIVE, example_frames

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
        assert all(runner.rows.taken == 0 for runner in predictor._runners.values())
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


def test_idle_sessions_expire_and_their_owner_is_told(catalog: Catalog) -> None:
    async def scenario(predictor: Predictor) -> None:
        session, owner = predictor.open("channels", None, ALL), Owner()
        predictor.attach(session, owner)
        for _ in range(200):
            await asyncio.sleep(0.02)
            if session.ended:
                break
        assert session.ended == "expired"
        assert isinstance(owner.stopped, SessionExpired)
        with pytest.raises(SessionExpired):
            await predictor.advance(session, 0, 1, raw(CLIP[:1]), ALL)
        assert 'indrnn_sessions_ended_total{cause="expired",model="channels"} 1.0' in predictor.metrics.text().decode()

    serve(catalog, scenario, idle_s=0.05)


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
