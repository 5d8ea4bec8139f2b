"""The client against a real server, through a proxy that cuts connections where a test says so: every answer once, in order, the same bits."""

from __future__ import annotations

import asyncio
import gc
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pytest

from service import errors
from service.client import Answer, AsyncClient, AsyncStream, Client, ClientError, Retry, StreamClosed, Unreachable, error_from
from tests.service.conftest import Server
from tests.toy_models import CHANNELS, GAPPY, SKELETON, example_frames

Frames = npt.NDArray[np.float32]

QUICK = Retry(give_up_s=2.0, first_s=0.01, longest_s=0.05)


class Proxy:
    """Forwards TCP to `target`, and cuts: now (`cut`), or each connection after `budget` bytes to the client; `closed` takes no new ones."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.budget: int | None = None
        self.closed = False
        self.connections = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Proxy]:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            self.cut()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        parts = urlsplit(self.target)
        with suppress(OSError):
            if self.closed:
                writer.transport.abort()
                return
            up_reader, up_writer = await asyncio.open_connection(parts.hostname, parts.port)
            self._writers |= {writer, up_writer}
            await asyncio.gather(self._pump(reader, up_writer, None), self._pump(up_reader, writer, self.budget))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, budget: int | None) -> None:
        with suppress(OSError):
            while data := await reader.read(4096):
                writer.write(data if budget is None else data[:budget])
                await writer.drain()
                if budget is not None and (budget := budget - len(data)) <= 0:
                    self.cut()
        writer.close()


def run(case: Awaitable[Any]) -> Any:
    """Runs a case within a time in which it must end."""

    async def bounded() -> Any:
        async with asyncio.timeout(60):
            return await case

    return asyncio.run(bounded())


def played(url: str, model: str, source: Any, **options: Any) -> list[Answer]:
    async def case() -> list[Answer]:
        async with AsyncClient(url) as client, client.stream(model, **options) as stream:
            return [answer async for answer in stream.play(source)]

    return list(run(case()))


def uneven(frames: Frames) -> Iterator[Frames]:
    sizes = [1, 7, 2, 30, 1, 64, 5]
    start = 0
    while start < len(frames):
        size = sizes[start % len(sizes)]
        yield frames[start : start + size]
        start += size


def whole(url: str, model: str, frames: Frames) -> Frames:
    """Scores (count, classes) of the same frames as one clip."""
    with Client(url) as client:
        scores = client.predict(model, frames, scores="all").scores
        assert scores is not None
        return scores


def check(answers: list[Answer], expected: Frames) -> None:
    assert [answer.frame for answer in answers] == list(range(len(expected)))
    np.testing.assert_array_equal(np.stack([answer.scores for answer in answers if answer.scores is not None]), expected)


# Streams that are left in peace


def test_a_stream_in_uneven_chunks_gives_the_scores_of_the_clip(server: Server) -> None:
    frames = example_frames(CHANNELS, 300)
    answers = played(server.url, "channels", uneven(frames))
    expected = whole(server.url, "channels", frames)
    check(answers, expected)
    best = int(expected[-1].argmax())
    assert (answers[-1].label, answers[-1].score) == (CHANNELS.classes[best], float(expected[-1][best]))
    assert answers[-1].top[0] == (answers[-1].label, answers[-1].score)
    assert answers[30].time == pytest.approx(30 / CHANNELS.fps)


def test_an_array_is_sent_chunk_by_chunk_and_scores_last_answers_each_message(server: Server) -> None:
    frames = example_frames(CHANNELS, 20)

    async def case() -> list[int]:
        async with AsyncClient(server.url) as client, client.stream("channels", scores="last") as stream:
            return [answer.frame async for answer in stream.play(frames, chunk=8)]

    assert run(case()) == [7, 15, 19]


def test_send_waits_for_answers_to_be_read(server: Server) -> None:
    async def case() -> None:
        async with AsyncClient(server.url) as client, client.stream("channels") as stream:
            sending = asyncio.create_task(stream.send(example_frames(CHANNELS, 3 * stream.window)))
            await asyncio.sleep(0.3)
            assert not sending.done()
            assert stream.next_frame == stream.window
            for expected in range(3 * stream.window):
                assert (await anext(stream)).frame == expected
            assert await sending == 0

    run(case())


@pytest.mark.parametrize("before", [1, 10, 15, 63])
def test_a_message_of_a_whole_window_fits_after_any_number_of_frames(server: Server, before: int) -> None:
    """The server counts from the last ack, which may lie behind what was read."""

    async def case() -> None:
        async with AsyncClient(server.url) as client, client.stream("channels") as stream:
            for count in (before, stream.window, stream.window):
                first = await stream.send(example_frames(CHANNELS, count))
                assert [(await anext(stream)).frame for _ in range(count)] == list(range(first, first + count))

    run(case())


def test_one_frame_may_come_without_its_count(server: Server) -> None:
    async def case() -> None:
        async with AsyncClient(server.url) as client, client.stream("channels") as stream:
            assert await stream.send([0.1, 0.2, 0.3]) == 0
            assert (await anext(stream)).frame == 0

    run(case())


def test_missing_joints_and_another_layout(server: Server) -> None:
    frames = example_frames(GAPPY, 20)
    frames[5:, 3] = np.nan
    check(played(server.url, "gappy", frames), whole(server.url, "gappy", frames))
    kinect = np.random.default_rng(1).normal(0, 0.5, (10, 25, 3)).astype(np.float32)
    assert len(played(server.url, "skeleton", kinect, layout="kinect-v2")) == 10
    assert played(server.url, "skeleton", example_frames(SKELETON, 3), layout="body-13")[0].frame == 0


def test_a_reset_begins_anew_and_numbering_goes_on(server: Server) -> None:
    frames = example_frames(CHANNELS, 20)

    async def case() -> list[Answer]:
        async with AsyncClient(server.url) as client, client.stream("channels") as stream:
            await stream.send(frames)
            await stream.reset()
            await stream.reset()
            await stream.send(frames)
            return [await anext(stream) for _ in range(40)]

    expected = whole(server.url, "channels", frames)
    check(run(case()), np.concatenate([expected, expected]))


def test_a_source_that_fails_says_so_and_a_consumer_may_leave(server: Server) -> None:
    def camera() -> Iterator[Frames]:
        yield example_frames(CHANNELS, 3)
        raise OSError("the camera is gone")

    async def case() -> None:
        async with AsyncClient(server.url) as client, client.stream("channels") as stream:
            with pytest.raises(OSError, match="camera"):
                async for _ in stream.play(camera()):
                    pass
            async for answer in stream.play(example_frames(CHANNELS, 500)):
                if answer.frame > 10:
                    break

    run(case())


def test_a_model_that_was_only_tested_on_clips_comes_with_a_warning(server: Server) -> None:
    async def warnings(model: str) -> list[str]:
        async with AsyncClient(server.url) as client, client.stream(model) as stream:
            return stream.warnings

    assert run(warnings("channels")) == []
    assert "not verified for endless streams" in run(warnings("skeleton"))[0]


def test_a_closed_stream_takes_and_gives_nothing(server: Server) -> None:
    async def case() -> None:
        async with AsyncClient(server.url) as client:
            async with client.stream("channels") as stream:
                await stream.send(example_frames(CHANNELS, 2))
                await anext(stream)
            with pytest.raises(StreamClosed):
                await stream.send(example_frames(CHANNELS, 1))
            assert [answer.frame async for answer in stream] == [1]
            with pytest.raises(errors.SessionNotFound):
                await client.session(stream.session)

    run(case())


def test_a_kept_session_is_opened_again_with_the_answers_asked_for(server: Server) -> None:
    frames = example_frames(CHANNELS, 30)

    async def case() -> list[Answer]:
        async with AsyncClient(server.url) as client:
            async with client.stream("channels") as stream:
                await stream.send(frames[:20])
                answers = [await anext(stream) for _ in range(20)]
                await stream.close(keep=True)
            kept_from = (await client.session(stream.session))["kept_from"]
            async with client.stream("channels", session=stream.session, ack=kept_from) as again:
                assert again.next_frame == 20
                repeated = [await anext(again) for _ in range(kept_from, 20)]
                assert [answer.frame for answer in repeated] == list(range(kept_from, 20))
                return answers + [answer async for answer in again.play(frames[20:])]

    check(run(case()), whole(server.url, "channels", frames))


# Streams that lose their connection


def cut_stream(server: Server, frames: Frames, disturb: Callable[[Proxy, int], None]) -> tuple[list[Answer], AsyncStream]:
    """Plays through a proxy; `disturb` is called with the number of answers after each."""

    async def case() -> tuple[list[Answer], AsyncStream]:
        answers = []
        async with Proxy(server.url).serving() as proxy, AsyncClient(proxy.url, retry=QUICK) as client:
            async with client.stream("channels") as stream:
                async for answer in stream.play(uneven(frames)):
                    answers.append(answer)
                    disturb(proxy, len(answers))
            return answers, stream

    result: tuple[list[Answer], AsyncStream] = run(case())
    return result


@pytest.mark.parametrize("every", [1, 13, 64, 150])
def test_a_stream_that_is_cut_again_and_again_delivers_every_answer_once(server: Server, every: int) -> None:
    frames = example_frames(CHANNELS, max(200, every + 100))  # more than a window behind the first cut: they cannot have been answered before it

    def disturb(proxy: Proxy, answers: int) -> None:
        if answers % every == 0:
            proxy.cut()

    answers, stream = cut_stream(server, frames, disturb)
    check(answers, whole(server.url, "channels", frames))
    assert stream.reconnects >= 1


@pytest.mark.parametrize("budget", [2000, 2111, 2300, 2600])
def test_connections_that_break_in_the_middle_of_a_message(server: Server, budget: int) -> None:
    """Each connection lets so many bytes through: handshake, `opened` and a window of kept answers (2000 at most), then it breaks anywhere."""
    frames = example_frames(CHANNELS, 600)

    def disturb(proxy: Proxy, answers: int) -> None:
        proxy.budget = budget + 10 * answers
        if answers == 1:
            proxy.cut()

    answers, stream = cut_stream(server, frames, disturb)
    check(answers, whole(server.url, "channels", frames))
    assert stream.reconnects >= 2


def test_a_reset_is_not_lost_with_the_connection(server: Server) -> None:
    frames = example_frames(CHANNELS, 20)

    async def case() -> list[Answer]:
        async with Proxy(server.url).serving() as proxy, AsyncClient(proxy.url, retry=QUICK) as client, client.stream("channels") as stream:
            await stream.send(frames)
            answers = [await anext(stream) for _ in range(20)]
            proxy.cut()
            await stream.reset()
            proxy.cut()
            await stream.send(frames)
            proxy.cut()
            return answers + [await anext(stream) for _ in range(20)]

    expected = whole(server.url, "channels", frames)
    check(run(case()), np.concatenate([expected, expected]))


def test_a_stream_waits_while_the_way_is_closed_and_then_goes_on(server: Server) -> None:
    async def case() -> None:
        retry = Retry(first_s=0.01, longest_s=0.05)
        async with Proxy(server.url).serving() as proxy, AsyncClient(proxy.url, retry=retry) as client, client.stream("channels") as stream:
            await stream.send(example_frames(CHANNELS, 5))
            proxy.closed = True
            proxy.cut()
            await asyncio.sleep(0.3)
            assert not stream.connected
            await stream.send(example_frames(CHANNELS, 5))
            proxy.closed = False
            assert [(await anext(stream)).frame for _ in range(10)] == list(range(10))
            assert stream.reconnects == 1

    run(case())


def test_a_stream_that_cannot_come_back_gives_up(server: Server) -> None:
    async def case() -> None:
        retry = Retry(give_up_s=0.5, first_s=0.01, longest_s=0.05)
        async with Proxy(server.url).serving() as proxy, AsyncClient(proxy.url, retry=retry) as client, client.stream("channels") as stream:
            await stream.send(example_frames(CHANNELS, 1))
            await anext(stream)
            before, began = proxy.connections, time.monotonic()
            proxy.closed = True
            proxy.cut()
            with pytest.raises(Unreachable, match=r"did not come back within 0\.5 s, in \d+ attempts"):
                await anext(stream)
            assert 0.5 <= time.monotonic() - began < 5
            with pytest.raises(Unreachable):
                await stream.send(example_frames(CHANNELS, 1))
            assert proxy.connections - before > 3

    run(case())


def test_pauses_double_up_to_a_limit_and_differ() -> None:
    retry = Retry(first_s=0.1, longest_s=5.0)
    for attempt, longest in enumerate([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]):
        pauses = {retry.pause_s(attempt) for _ in range(50)}
        assert len(pauses) > 1
        assert longest / 2 <= min(pauses) <= max(pauses) <= longest
    assert retry.pause_s(1000) <= 5.0


def test_a_session_that_the_server_lost_is_said_to_be_lost(server: Server, start: Any) -> None:
    async def case(other: Server) -> None:
        async with Proxy(server.url).serving() as proxy, AsyncClient(proxy.url, retry=QUICK) as client, client.stream("channels") as stream:
            await stream.send(example_frames(CHANNELS, 1))
            await anext(stream)
            proxy.target = other.url
            proxy.cut()
            with pytest.raises(errors.SessionNotFound):
                await anext(stream)

    with start() as other:
        run(case(other))


def test_a_later_connection_takes_the_session_over(server: Server) -> None:
    async def case() -> None:
        async with AsyncClient(server.url, retry=QUICK) as client, client.stream("channels") as earlier:
            await earlier.send(example_frames(CHANNELS, 4))
            assert [(await anext(earlier)).frame for _ in range(4)] == [0, 1, 2, 3]
            async with client.stream("channels", session=earlier.session) as later:
                with pytest.raises(errors.TakenOver):
                    assert [answer.frame async for answer in earlier] == []
                await later.send(example_frames(CHANNELS, 1))
                assert (await anext(later)).frame == 4

    run(case())


# What is refused


def test_refusals_have_their_class_code_and_facts(server: Server) -> None:
    async def case() -> None:
        async with AsyncClient(server.url) as client:
            with pytest.raises(errors.ModelNotFound) as caught:
                await client.model("nope")
            assert caught.value.code == "model_not_found"
            assert "channels" in caught.value.facts["models"]
            with pytest.raises(errors.ModelNotFound):
                async with client.stream("nope"):
                    pass
            with pytest.raises(errors.SessionNotFound):
                async with client.stream("channels", session="x" * 32):
                    pass
            with pytest.raises(errors.LayoutUnknown):
                async with client.stream("skeleton", layout="horse"):
                    pass
            with pytest.raises(errors.Malformed, match="frames a second"):
                async with client.stream("channels", fps=1200):
                    pass
            with pytest.raises(errors.WrongShape):
                await client.predict("channels", np.zeros((4, 5)))

    run(case())


def test_bad_frames_end_the_stream_with_their_error_and_leave_the_session(server: Server) -> None:
    async def case() -> None:
        async with AsyncClient(server.url) as client:
            async with client.stream("channels") as stream:
                with pytest.raises(errors.WrongShape, match="expected frames of shape"):
                    await stream.send(np.zeros((2, 4)))
                with pytest.raises(errors.Empty):
                    await stream.send(np.zeros((0, 3)))
                await stream.send(example_frames(CHANNELS, 3))
                await stream.send([[0.1, np.inf, 0.2]])
                assert [(await anext(stream)).frame for _ in range(3)] == [0, 1, 2]
                with pytest.raises(errors.NotFinite) as caught:
                    await anext(stream)
                assert caught.value.facts["frame"] == 3
            assert (await client.session(stream.session))["next_frame"] == 3
            await client.close_session(stream.session)

    run(case())


def test_an_error_of_a_newer_service_keeps_its_code() -> None:
    error = error_from({"error": "too hot", "code": "overheated", "degrees": 90})
    assert (error.code, str(error), error.facts) == ("overheated", "too hot", {"degrees": 90})
    assert type(error_from({"error": "wait", "code": "overloaded", "retry_after": 3})) is errors.Overloaded
    assert errors.ServiceError.code == "internal"


def test_no_service_there() -> None:
    for address in ("localhost:8000", "http://", "http://localhost:99999", "http://[::1", "http://localhost:8000?x=1", ""):
        with pytest.raises(ClientError, match="looks like http"):
            AsyncClient(address)
    with Client("http://127.0.0.1:9", retry=QUICK) as client:
        with pytest.raises(Unreachable, match=re.escape("no service at http://127.0.0.1:9")):
            client.models()
        with pytest.raises(Unreachable, match="no service at"), client.stream("channels"):
            pass


@pytest.mark.parametrize("status", ["404", "200"])
def test_another_server_than_ours(status: str) -> None:
    async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status} Whatever\r\n".encode() + b"content-length: 4\r\nconnection: close\r\n\r\nhtml")
        await writer.drain()
        writer.close()

    async def case() -> None:
        other = await asyncio.start_server(page, "127.0.0.1", 0)
        async with other, AsyncClient(f"http://127.0.0.1:{other.sockets[0].getsockname()[1]}") as client:
            with pytest.raises(ClientError, match=f"status {status}, not by this service"):
                await client.models()
            with pytest.raises(ClientError, match=f"status {status}, not by this service"):
                async with client.stream("channels"):
                    pass

    run(case())


def test_a_token_is_sent_everywhere(start: Any) -> None:
    with start(INDRNN_TOKEN="correct horse") as server:
        with Client(server.url) as client:
            with pytest.raises(errors.Unauthenticated):
                client.models()
            with pytest.raises(errors.Unauthenticated), client.stream("channels"):
                pass
        with Client(server.url, token="correct horse") as client:
            assert "channels" in [model["name"] for model in client.models()]
            with client.stream("channels") as stream:
                assert len(list(stream.play(example_frames(CHANNELS, 3)))) == 3


# Without an event loop


@pytest.mark.parametrize("example", [0, 1, 2])
def test_the_examples_of_the_readme_run_as_written(server: Server, example: int, capsys: pytest.CaptureFixture[str]) -> None:
    readme = Path(__file__).resolve().parents[2] / "service" / "README.md"
    code = re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)[example]
    exec(code.replace("http://127.0.0.1:8000", server.url), {})
    assert len(capsys.readouterr().out.splitlines()) == [101, 10, 20][example]


def test_the_plain_client_does_the_same(server: Server) -> None:
    frames = example_frames(CHANNELS, 100)
    with Client(server.url) as client:
        model = client.model("channels", "10")
        assert (model.frame_shape, model.classes, model.version) == (CHANNELS.shape, CHANNELS.classes, "10")
        clip = client.predict("channels", frames, scores="all", top_k=2)
        assert clip.scores is not None
        assert clip.frame == 99
        assert len(clip.top) == 2
        with client.stream("channels") as stream:
            check(list(stream.play(uneven(frames))), clip.scores)
            stream.reset()
            assert stream.send(frames[:2]) == 100
            assert [next(stream).frame, next(stream).frame] == [100, 101]


def test_the_plain_client_reads_an_iterable_that_waits_off_its_loop(server: Server) -> None:
    with Client(server.url) as client, client.stream("channels") as stream:
        answered: list[int] = []

        def camera() -> Iterator[Frames]:
            for frame in example_frames(CHANNELS, 5):
                yield frame[None]

        for answer in stream.play(camera()):
            answered.append(answer.frame)
        assert answered == [0, 1, 2, 3, 4]


def test_a_plain_client_that_is_closed_ends_what_was_left_open(server: Server) -> None:
    with Client(server.url) as client:
        stream = client.stream("channels")
        stream.__enter__()
        answers = stream.play(example_frames(CHANNELS, 50))
        assert next(answers).frame == 0
    client.close()
    del answers, stream
    gc.collect()  # a task or socket that was left behind would warn here, and fail the test


def test_sessions_over_rest(server: Server) -> None:
    frames = example_frames(CHANNELS, 10)
    expected = whole(server.url, "channels", frames)
    with Client(server.url) as client:
        opened = client.open_session("channels")
        session = opened["session"]
        first = client.advance(session, 0, frames[:4], scores="all")
        again = client.advance(session, 0, frames[:4], scores="all")
        last = client.advance(session, 4, frames[4:], ack=4)
        np.testing.assert_array_equal(first.scores, expected[:4])
        np.testing.assert_array_equal(again.scores, expected[:4])
        np.testing.assert_array_equal(last.scores, expected[-1])
        with pytest.raises(errors.Gap) as caught:
            client.advance(session, 20, frames[:1])
        assert caught.value.facts["next_frame"] == 10
        client.reset_session(session, 10)
        np.testing.assert_array_equal(client.advance(session, 10, frames, scores="all").scores, expected)
        assert client.session(session)["next_frame"] == 20
        client.close_session(session)
        with pytest.raises(errors.SessionNotFound):
            client.session(session)


def test_the_service_does_not_import_its_client() -> None:
    root = Path(__file__).resolve().parents[2] / "service"
    importing = {path.name for path in root.glob("*.py") if "from service.client" in path.read_text()}
    assert {name for name in importing if not name.startswith("client")} <= {"player.py"}
