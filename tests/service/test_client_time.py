"""Frames with times of their own, from the client through a real server: the scores of the clip with these times, and `time` in binary answers."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from service import errors
from service.client import Answer, AsyncClient, Client, Timed
from tests.service.conftest import Server
from tests.service.test_client import QUICK, Proxy, check, run, whole
from tests.toy_models import CHANNELS, GAPPY, GAPPY_CHANNELS, GESTURES, example_frames, moving_frames

Frames = npt.NDArray[np.float32]
Times = npt.NDArray[np.float64]

NOW = 1.7e9  # a camera's clock


def jittered(count: int, fps: float = 24.0, seed: int = 0) -> Times:
    return NOW + (np.arange(count) + np.random.default_rng(seed).uniform(-0.4, 0.4, count)) / fps


def clip(url: str, model: str, frames: Frames, t: Times) -> Frames:
    with Client(url) as client:
        scores = client.predict(model, frames, t=t, scores="all").scores
    assert scores is not None
    return scores


def check_timed(answers: list[Answer], expected: Frames, t: Times) -> None:
    check(answers, expected)
    np.testing.assert_allclose([answer.time for answer in answers], t - t[0], atol=1e-6)


def uneven(frames: Frames, t: Times) -> Iterator[Timed]:
    start, sizes = 0, [1, 7, 2, 30, 1, 64, 5]
    while start < len(frames):
        size = sizes[start % len(sizes)]
        yield Timed(frames[start], float(t[start])) if size == 1 else Timed(frames[start : start + size], t[start : start + size])
        start += size


@pytest.mark.parametrize("form", ["array", "source", "asynchronous source"])
def test_a_stream_with_times_gives_the_scores_and_times_of_the_clip(server: Server, form: str) -> None:
    frames, t = moving_frames(GESTURES, 200), jittered(200)

    async def slowly() -> AsyncIterator[Timed]:
        for piece in uneven(frames, t):
            yield piece

    async def case() -> list[Answer]:
        async with AsyncClient(server.url) as client, client.stream("gestures") as stream:
            if form == "array":
                return [answer async for answer in stream.play(frames, chunk=9, t=t)]
            return [answer async for answer in stream.play(uneven(frames, t) if form == "source" else slowly())]

    answers = run(case())
    expected = clip(server.url, "gestures", frames, t)
    check_timed(answers, expected, t)
    assert not np.array_equal(expected, whole(server.url, "gestures", frames))  # the times do count
    with Client(server.url) as client:
        told = client.predict("gestures", frames, t=t).events
    assert told == tuple(event for answer in answers for event in answer.events)
    for event in told:
        assert event.time == pytest.approx(answers[event.frame].time, abs=1e-5)
    assert told


def test_times_at_the_models_own_rate_change_nothing(server: Server) -> None:
    frames = example_frames(GAPPY_CHANNELS, 60)
    frames[20:30, 1] = np.nan
    t = NOW + np.arange(60) / 30
    bodies = example_frames(GAPPY, 30)
    bodies[5:, 3] = np.nan

    async def case(model: str, given: Frames) -> list[Answer]:
        async with AsyncClient(server.url) as client, client.stream(model) as stream:
            return [answer async for answer in stream.play(given, chunk=7, t=t[: len(given)])]

    for model, given in (("gappy-channels", frames), ("gappy", bodies)):
        check_timed(run(case(model, given)), whole(server.url, model, given), t[: len(given)])


@pytest.mark.parametrize("every", [1, 5])
def test_times_are_right_however_often_the_connection_is_lost(server: Server, every: int) -> None:
    frames, t = example_frames(CHANNELS, 100), jittered(100)

    async def case() -> tuple[list[Answer], int]:
        async with Proxy(server.url).serving() as proxy, AsyncClient(proxy.url, retry=QUICK) as client, client.stream("channels") as stream:
            answers = []
            async for answer in stream.play(uneven(frames, t)):
                answers.append(answer)
                if answer.frame % (10 * every) == 3:
                    proxy.cut()
            return answers, stream.reconnects

    answers, reconnects = run(case())
    check_timed(answers, clip(server.url, "channels", frames, t), t)
    assert reconnects >= 1


def test_answers_for_messages_alone_have_the_time_of_their_last_frame(server: Server) -> None:
    frames, t = example_frames(CHANNELS, 20), jittered(20)

    async def case() -> list[Answer]:
        async with AsyncClient(server.url) as client, client.stream("channels", scores="last") as stream:
            return [answer async for answer in stream.play(frames, chunk=8, t=t)]

    answers = run(case())
    assert [answer.frame for answer in answers] == [7, 15, 19]
    np.testing.assert_allclose([answer.time for answer in answers], t[[7, 15, 19]] - t[0], atol=1e-6)


def test_a_session_that_another_program_began_goes_on_in_its_time(server: Server) -> None:
    frames, t = example_frames(CHANNELS, 30), jittered(30)

    async def case() -> list[Answer]:
        async with AsyncClient(server.url) as one, AsyncClient(server.url) as other:
            stream = await one.stream("channels").open()
            await stream.send(frames[:20], t[:20])
            answers = [await anext(stream) for _ in range(10)]
            await stream.close(keep=True)
            async with other.stream("channels", session=stream.session, ack=10) as again:
                answers += [await anext(again) for _ in range(10)]
                with pytest.raises(errors.WrongTime, match="frame 20: this stream began with t"):
                    await again.send(frames[20])
                return answers + [answer async for answer in again.play(frames[20:], t=t[20:])]

    answers = run(case())
    check(answers, clip(server.url, "channels", frames, t))
    told = np.array([answer.time for answer in answers])
    expected = t - t[0]
    expected[10:20] = np.nan  # whoever sent those frames knows
    np.testing.assert_allclose(told, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("t", "said"),
    [
        ([1.0, 2.0], "t has the shape \\(2,\\) for 3 frames"),
        (4.0, "for 3 frames"),
        ([[1.0], [2.0], [3.0]], "for 3 frames"),
        ([8.0, 9.0, math.nan], "finite"),
        (["8", "nine", "10"], "numbers of seconds"),
        (None, "frame 3: this stream began with t"),
        ([2.0, 3.0, 4.0], "frame 3: t must increase from frame to frame, but 2.000000 comes after 3.000000"),
        ([4.0, 5.0, 5.0], "frame 5: t must increase"),
    ],
)
def test_times_that_are_none_are_said_and_the_stream_goes_on(server: Server, t: Any, said: str) -> None:
    frames = example_frames(CHANNELS, 6)
    good = np.array([1.0, 2.0, 3.0, 4.0, 4.5, 6.0])

    async def case() -> list[Answer]:
        async with AsyncClient(server.url) as client, client.stream("channels") as stream:
            await stream.send(frames[:3], good[:3])
            with pytest.raises(errors.WrongTime, match=said):
                await stream.send(frames[3:], t)
            await stream.send(frames[3:], good[3:])
            return [await anext(stream) for _ in range(6)]

    check_timed(run(case()), clip(server.url, "channels", frames, good), good)


def test_a_stream_that_began_without_times_takes_none_and_only_arrays_have_them_apart(server: Server) -> None:
    async def case() -> None:
        async with AsyncClient(server.url) as client, client.stream("channels") as stream:
            await stream.send(example_frames(CHANNELS, 2))
            with pytest.raises(errors.WrongTime, match="frame 2: this stream began without t"):
                await stream.send(example_frames(CHANNELS, 1), 3.0)
            with pytest.raises(TypeError, match="Timed"):
                [answer async for answer in stream.play([example_frames(CHANNELS, 1)], t=[3.0])]

    run(case())


def test_what_is_infinite_is_refused_with_times_as_without(server: Server) -> None:
    """JSON has no infinity; it must not pass for a missing value where a model admits those."""

    async def case() -> None:
        async with AsyncClient(server.url) as client:
            for model, toy in (("channels", CHANNELS), ("gappy-channels", GAPPY_CHANNELS)):
                frames = example_frames(toy, 3)
                frames[1, 2] = -np.inf
                with pytest.raises(errors.NotFinite, match="frame 1"):
                    await client.predict(model, frames, t=[0, 1, 2])
                with pytest.raises(errors.NotFinite, match="frame 1"):
                    async with client.stream(model) as stream:
                        [answer async for answer in stream.play(frames, chunk=3, t=np.arange(3))]

    run(case())


def test_messages_with_times_are_no_larger_than_the_server_takes(start: Any) -> None:
    frames, t = (-np.float32(1.1754944e-38) * np.ones((100, 3))).astype(np.float32), NOW + np.arange(100) / 30 + 1e-7
    with start(INDRNN_MESSAGE_BYTES="1500") as server:

        async def case() -> list[Answer]:
            async with AsyncClient(server.url) as client, client.stream("channels") as stream:
                return [answer async for answer in stream.play(frames, chunk=64, t=t)]

        check_timed(run(case()), whole(server.url, "channels", frames), t)


def test_tracks_have_times_of_their_own(server: Server) -> None:
    frames = [example_frames(CHANNELS, 40, seed) for seed in range(3)]
    times = [jittered(40, seed=seed) + 1000 * seed for seed in range(3)]
    with Client(server.url) as client, client.tracks("channels") as tracks:
        streams = [tracks.stream().open() for _ in range(3)]
        answers: list[list[Answer]] = [[], [], []]
        for at in range(0, 40, 4):
            for stream, given, t in zip(streams, frames, times, strict=True):
                stream.send(given[at : at + 4], t[at : at + 4])
            for stream, heard in zip(streams, answers, strict=True):
                heard.extend(next(stream) for _ in range(4))
    for heard, given, t in zip(answers, frames, times, strict=True):
        check_timed(heard, clip(server.url, "channels", given, t), t)


def test_the_plain_client_plays_with_times(server: Server) -> None:
    frames, t = example_frames(CHANNELS, 30), jittered(30)
    with Client(server.url) as client:
        with client.stream("channels") as stream:
            check_timed(list(stream.play(frames, chunk=4, t=t)), clip(server.url, "channels", frames, t), t)
        with client.stream("channels") as stream:
            check_timed(list(stream.play(uneven(frames, t))), clip(server.url, "channels", frames, t), t)


def test_sessions_over_rest_take_times_and_rates(server: Server) -> None:
    frames, t = example_frames(CHANNELS, 30), jittered(30)
    expected = clip(server.url, "channels", frames, t)
    with Client(server.url) as client:
        session = client.open_session("channels")["session"]
        for at in range(0, 30, 10):
            answer = client.advance(session, at, frames[at : at + 10], t=t[at : at + 10], ack=at, scores="all")
            np.testing.assert_array_equal(answer.scores, expected[at : at + 10])
            assert answer.time == pytest.approx(t[at + 9] - t[0], abs=1e-5)
        with pytest.raises(errors.WrongTime):
            client.advance(session, 30, frames[:1])
        half = client.predict("channels", frames, fps=15, scores="all")
        assert half.time == pytest.approx(29 / 15)
        np.testing.assert_array_equal(half.scores, clip(server.url, "channels", frames, np.arange(30) / 15))
        assert client.open_session("channels", fps=15)["options"]["fps"] == 15
