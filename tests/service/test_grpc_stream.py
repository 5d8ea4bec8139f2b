"""A stream of requests without a socket: order, what runs side by side, credit, ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import pytest

pytest.importorskip("google.protobuf", reason="protobuf is not installed (extra `grpc`): gRPC's streams are not tested")

from service.errors import Draining, Malformed, SlowReader
from service.grpc_messages import ModelInferRequest, ModelStreamInferResponse
from service.grpc_stream import MOST_BYTES, MOST_REQUESTS, Stream

END = object()


def request(number: int, sequence: int | str | None = None, size: int = 4, model: str = "m") -> Any:
    message = ModelInferRequest(model_name=model, id=str(number), raw_input_contents=[bytes(size)])
    if isinstance(sequence, str):
        message.parameters["sequence_id"].string_param = sequence
    elif sequence is not None:
        message.parameters["sequence_id"].int64_param = sequence
    return message


def answer_to(message: Any) -> Any:
    response = ModelStreamInferResponse()
    response.infer_response.id = message.id
    return response


class Client:
    """Gives the messages one after another, then nothing more or the end, and takes answers as long as it `reads`."""

    def __init__(self, messages: Iterable[Any], ends: bool = True) -> None:
        self.messages, self.ends = iter(messages), ends
        self.given = 0
        self.got: list[str] = []
        self.reads = asyncio.Event()
        self.reads.set()

    async def read(self) -> Any:
        await asyncio.sleep(0)
        message = next(self.messages, None)
        if message is not None:
            self.given += 1
            return message
        if not self.ends:
            await asyncio.Event().wait()
        return END

    async def write(self, answer: Any) -> None:
        await self.reads.wait()
        self.got.append(answer.infer_response.id)


Run = Callable[[Any, float], Awaitable[Any]]


def stream_of(client: Client, run: Run) -> Stream:
    return Stream(client.read, client.write, END, run)


async def at_once(message: Any, came: float) -> Any:
    return answer_to(message)


async def settled() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


def test_every_request_is_answered_and_then_it_ends() -> None:
    async def case() -> None:
        client = Client(request(i, sequence=i % 7 or None) for i in range(2000))
        await asyncio.wait_for(stream_of(client, at_once).run(), 20)
        assert sorted(map(int, client.got)) == list(range(2000))

    asyncio.run(case())


def test_nothing_sent_is_nothing_answered() -> None:
    asyncio.run(stream_of(Client([]), at_once).run())


def test_a_sequence_runs_in_order_while_others_overtake_it() -> None:
    async def case() -> None:
        client, gates, running = Client([request(0, 1), request(1, 1), request(2, 2), request(3), request(4, "1"), request(5, 1, model="n")]), {}, []

        async def run(message: Any, came: float) -> Any:
            running.append(message.id)
            gate = gates[message.id] = asyncio.Event()
            await gate.wait()
            return answer_to(message)

        task = asyncio.create_task(stream_of(client, run).run())
        await settled()
        assert sorted(running) == ["0", "2", "3", "4", "5"]  # 1 waits for 0; the string 1 and that of another model are other sequences
        for number in ("4", "3", "2", "0", "5"):
            gates[number].set()
            await settled()
        assert client.got == ["4", "3", "2", "0", "5"]
        assert running[-1] == "1"
        gates["1"].set()
        await asyncio.wait_for(task, 5)
        assert client.got[-1] == "1"

    asyncio.run(case())


@pytest.mark.parametrize(("sequence", "size", "most"), [(None, 4, MOST_REQUESTS), (1, 4, MOST_REQUESTS), (None, MOST_BYTES // 4, 4), (1, 2 * MOST_BYTES, 1)])
def test_who_does_not_read_answers_is_not_read_either(sequence: int | None, size: int, most: int) -> None:
    async def case() -> None:
        client = Client(request(i, sequence, size) for i in range(2 * most + 3))

        async def run(message: Any, came: float) -> Any:
            response = answer_to(message)
            response.infer_response.raw_output_contents.append(bytes(size))
            return response

        client.reads.clear()
        task = asyncio.create_task(stream_of(client, run).run())
        for _ in range(20):
            await settled()
        assert client.given == most
        client.reads.set()
        await asyncio.wait_for(task, 20)
        assert client.got == [str(i) for i in range(2 * most + 3)]

    asyncio.run(case())


def test_who_does_not_read_for_long_is_left() -> None:
    async def case() -> None:
        client, stopped = Client([request(0), request(1, 1), request(2, 1), request(3)], ends=False), []
        client.reads.clear()

        async def run(message: Any, came: float) -> Any:
            if message.id != "3":
                return answer_to(message)
            try:
                await asyncio.Event().wait()
            finally:
                stopped.append(message.id)

        with pytest.raises(SlowReader, match=r"not read an answer for 0\.05 s"):
            await asyncio.wait_for(Stream(client.read, client.write, END, run, patience_s=0.05).run(), 5)
        assert (client.got, stopped) == ([], ["3"])

    asyncio.run(case())


def test_what_was_being_sent_to_who_is_left_is_waited_for_and_nothing_follows_it() -> None:
    async def case() -> None:
        client = Client([request(0), request(1), request(2)], ends=False)
        client.reads.clear()
        stream = Stream(client.read, client.write, END, at_once, patience_s=0.05)
        with pytest.raises(SlowReader):
            await asyncio.wait_for(stream.run(), 5)
        gone = asyncio.create_task(stream.flushed())
        await settled()
        assert not gone.done()
        client.reads.set()
        await asyncio.wait_for(gone, 5)
        assert client.got == ["0"]

    asyncio.run(case())


@pytest.mark.parametrize("slow", [True, False])
def test_nothing_is_sent_any_more_to_who_has_left(slow: bool) -> None:
    async def case() -> None:
        client = Client([request(0), request(1)], ends=False)
        client.reads.clear()
        stream = Stream(client.read, client.write, END, at_once, patience_s=0.05 if slow else 5)
        task = asyncio.create_task(stream.run())
        if slow:
            with pytest.raises(SlowReader):
                await asyncio.wait_for(task, 5)
            task = asyncio.create_task(stream.flushed())
        await settled()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await settled()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert client.got == []

    asyncio.run(case())


def test_drained_it_answers_what_it_read_and_says_why_it_ends() -> None:
    async def case() -> None:
        client, gate = Client([request(0, 1), request(1, 1), request(2)], ends=False), asyncio.Event()

        async def run(message: Any, came: float) -> Any:
            await gate.wait()
            return answer_to(message)

        stream = stream_of(client, run)
        task = asyncio.create_task(stream.run())
        await settled()
        stream.drain()
        await settled()
        assert not task.done()
        gate.set()
        with pytest.raises(Draining):
            await asyncio.wait_for(task, 5)
        assert sorted(client.got) == ["0", "1", "2"]

    asyncio.run(case())


@pytest.mark.parametrize("before", [True, False])
def test_an_idle_stream_is_drained_at_once(before: bool) -> None:
    async def case() -> None:
        stream = stream_of(Client([], ends=False), at_once)
        if before:
            stream.drain()
        task = asyncio.create_task(stream.run())
        await settled()
        stream.drain()
        with pytest.raises(Draining):
            await asyncio.wait_for(task, 5)

    asyncio.run(case())


def test_an_error_that_is_not_for_one_request_ends_it_and_stops_the_others() -> None:
    async def case() -> None:
        stopped = []

        async def run(message: Any, came: float) -> Any:
            if message.id == "1":
                raise Malformed("no")
            try:
                await asyncio.Event().wait()
            finally:
                stopped.append(message.id)

        with pytest.raises(Malformed, match="no"):
            await asyncio.wait_for(stream_of(Client([request(0), request(1), request(2)], ends=False), run).run(), 5)
        assert set(stopped) <= {"0", "2"}
        assert "0" in stopped

    asyncio.run(case())


def test_a_client_that_leaves_stops_what_is_under_way() -> None:
    async def case() -> None:
        stopped = []

        async def run(message: Any, came: float) -> Any:
            try:
                await asyncio.Event().wait()
            finally:
                stopped.append(message.id)

        task = asyncio.create_task(stream_of(Client([request(0, 1), request(1, 1), request(2)], ends=False), run).run())
        await settled()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(stopped) == ["0", "2"]  # 1 had not begun

    asyncio.run(case())


def test_a_client_that_cannot_be_written_to_ends_it() -> None:
    async def case() -> None:
        client = Client([request(0)], ends=False)

        async def write(answer: Any) -> None:
            raise ConnectionError("gone")

        with pytest.raises(ConnectionError):
            await asyncio.wait_for(Stream(client.read, write, END, at_once).run(), 5)

    asyncio.run(case())
