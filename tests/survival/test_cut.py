"""One replica is cut off from the store, or all are, while they can still be reached: there are never two truths, and all recovers by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed

from tests.e2e.test_survival import CLIP, Stream, assert_same, whole
from tests.server_process import Server
from tests.survival.cable import Cable
from tests.survival.fleet import Fleet
from tests.valkey_process import Valkey

WITHIN_S = 20.0


@dataclass
class Three:
    """Replicas on one store; that of `refusing` refuses work while the store is down."""

    cut: Server
    whole: Server
    refusing: Server
    cable: Cable  # between `cut` and the store
    refusing_cable: Cable


@pytest.fixture(scope="module")
def replicas(models: Path, valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Three]:
    with Cable(valkey.port) as cable, Cable(valkey.port) as other:
        each = [{"INDRNN_STORE": f"redis://127.0.0.1:{port}"} for port in (cable.port, valkey.port, other.port)]
        fleet = Fleet(3, models, tmp_path_factory.mktemp("cut"), [*each[:2], {**each[2], "INDRNN_STORE_DOWN": "refuse"}])
        try:
            asyncio.run(fleet.__aenter__())
            cut, unharmed, refusing = (replica.server for replica in fleet.replicas)
            assert cut is not None
            assert unharmed is not None
            assert refusing is not None
            yield Three(cut, unharmed, refusing, cable, other)
            assert fleet.errors() == []
        finally:
            asyncio.run(fleet.__aexit__())


@pytest.fixture
def three(replicas: Three) -> Iterator[Three]:
    yield replicas
    replicas.cable.heal()
    replicas.refusing_cable.heal()
    for server in (replicas.cut, replicas.refusing):
        wait_until(lambda server=server: store_of(server)["state"] == "up")


def wait_until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + WITHIN_S
    while not true():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.05)


def ready(server: Server) -> httpx.Response:
    return httpx.get(f"{server.url}/health/ready", timeout=WITHIN_S)


def store_of(server: Server) -> Any:
    return ready(server).json().get("store", {"state": "down"})


def metric(server: Server, name: str) -> float:
    [line] = [line for line in httpx.get(f"{server.url}/metrics", timeout=WITHIN_S).text.splitlines() if line.startswith(name + " ")]
    return float(line.split()[-1])


def assert_overtaken(stream: Stream) -> None:
    """It is told, and its connection ends."""
    assert stream.until("error")["code"] == "taken_over"
    with pytest.raises(ConnectionClosed):
        stream.hear()
    assert stream.socket.close_code == 4409


def cut_off(three: Three, frames: int) -> Stream:
    """A stream on the replica that is cut off, durable so far."""
    stream = Stream(three.cut, "channels")
    stream.step(CLIP, 0, frames)
    stream.wait_durable(frames)
    three.cable.freeze()
    return stream


def test_two_owners_at_the_same_frame(three: Three) -> None:
    """Both have gone on for as long; the one that the store knows keeps the session, and the other's writes, late ones too, are refused."""
    before = cut_off(three, 60)
    before.step(CLIP, 60, 90)
    assert before.until("warning")["code"] == "store_unavailable"
    after = Stream(three.whole, "channels", before.session, ack=75)
    assert after.opened["next_frame"] == 60
    after.step(CLIP, 60, 90)
    after.wait_durable(90)
    assert {frame: before.scores[frame] for frame in range(60, 90)} == after.scores, "before it is fenced it has told nothing that is not so"
    three.cable.heal()
    assert_overtaken(before)
    after.step(CLIP, 90, 120)
    after.wait_durable(120)
    assert_same({**{frame: before.scores[frame] for frame in range(60)}, **after.scores}, whole(three.whole, "channels", CLIP[:120]))
    back = Stream(three.cut, "channels", before.session, ack=120)
    assert back.opened["next_frame"] == 120


def test_a_stale_replica_that_is_ahead_in_frames(three: Three) -> None:
    before = cut_off(three, 40)
    before.step(CLIP, 40, 150)
    after = Stream(three.whole, "channels", before.session, ack=40)
    after.step(CLIP, 40, 60)
    three.cable.heal()
    assert_overtaken(before)
    after.wait_durable(60)
    back = Stream(three.cut, "channels", before.session, ack=60)
    assert back.opened["next_frame"] == 60, "the 90 frames more that this replica had taken count for nothing"
    back.step(CLIP, 60, 90)
    assert_same({**{frame: before.scores[frame] for frame in range(40)}, **after.scores, **back.scores}, whole(three.cut, "channels", CLIP[:90]))


def test_a_reset_during_the_cut(three: Three) -> None:
    """It was made where nobody else heard of it: the client that went on elsewhere has not lost its past."""
    before = cut_off(three, 40)
    before.socket.send('{"type": "reset", "at": 40}')
    before.step(CLIP, 40, 60)
    after = Stream(three.whole, "channels", before.session, ack=40)
    assert after.opened["next_frame"] == 40
    after.step(CLIP, 40, 60)
    assert after.scores[59] != before.scores[59], "the reset makes no difference, so this shows nothing"
    three.cable.heal()
    assert_overtaken(before)
    after.step(CLIP, 60, 80)
    after.wait_durable(80)
    back = Stream(three.cut, "channels", before.session, ack=80)
    back.step(CLIP, 80, 90)
    assert_same({**{frame: before.scores[frame] for frame in range(40)}, **after.scores, **back.scores}, whole(three.cut, "channels", CLIP[:90]))


def test_who_is_cut_off_resumes_nothing(three: Three) -> None:
    """It cannot know whether its copy is the latest: here it is not."""
    before = Stream(three.cut, "channels")
    before.step(CLIP, 0, 30)
    before.wait_durable(30)
    after = Stream(three.whole, "channels", before.session, ack=30)
    after.step(CLIP, 30, 60)
    after.wait_durable(60)
    three.cable.freeze()
    for ack in (30, 60):
        again = httpx.get(f"{three.cut.url}/v1/sessions/{before.session}", timeout=WITHIN_S)
        assert (again.status_code, again.json()["code"]) == (503, "store_unavailable"), ack
    after.step(CLIP, 60, 90)
    assert_same({**before.scores, **after.scores}, whole(three.whole, "channels", CLIP[:90]))


def test_steps_over_rest_while_one_replica_is_cut_off(three: Three) -> None:
    def step(server: Server, first: int) -> httpx.Response:
        body = {"first": first, "frames": CLIP[first : first + 10].tolist()}
        return httpx.post(f"{server.url}/v1/sessions/{session}/frames?scores=all", json=body, timeout=WITHIN_S)

    session = httpx.post(f"{three.cut.url}/v1/models/channels/sessions?scores=all", json={}).raise_for_status().json()["session"]
    certain = step(three.cut, 0)
    assert "warning" not in certain.headers
    three.cable.cut()
    uncertain = step(three.cut, 10)
    assert uncertain.status_code == 200
    assert "a crash would lose this step" in uncertain.headers["warning"]
    elsewhere = step(three.whole, 20)
    assert (elsewhere.status_code, elsewhere.json()["next_frame"]) == (409, 10), "which is what the warning said"
    again = step(three.whole, 10)
    assert again.json()["scores"] == uncertain.json()["scores"]
    more = step(three.whole, 20)
    three.cable.heal()
    wait_until(lambda: store_of(three.cut)["state"] == "up")
    last = step(three.cut, 30)
    assert last.status_code == 200, last.text
    assert "warning" not in last.headers
    scores = [row for answer in (certain, again, more, last) for row in answer.json()["scores"]]
    assert scores == whole(three.cut, "channels", CLIP[:40])


@pytest.mark.parametrize("how", ["cut", "freeze"])
def test_streams_go_on_while_the_store_is_down_and_are_saved_when_it_is_back(three: Three, how: str) -> None:
    stream = Stream(three.cut, "channels")
    stream.step(CLIP, 0, 30)
    stream.wait_durable(30)
    getattr(three.cable, how)()
    stream.step(CLIP, 30, 60)
    assert stream.until("warning")["code"] == "store_unavailable"
    assert stream.durable == 30
    answer = ready(three.cut)
    assert (answer.status_code, answer.json()["store"]["state"]) == (200, "down")
    assert answer.json()["store"]["unsaved"] >= 1
    assert metric(three.cut, "indrnn_store_degraded") == 1
    three.cable.heal()
    stream.wait_durable(60)
    wait_until(lambda: metric(three.cut, "indrnn_store_degraded") == 0)
    after = Stream(three.whole, "channels", stream.session, ack=60)
    after.step(CLIP, 60, 90)
    assert_same({**stream.scores, **after.scores}, whole(three.whole, "channels", CLIP[:90]))


@pytest.mark.parametrize("how", ["cut", "freeze"])
def test_work_is_refused_while_the_store_is_down(three: Three, how: str) -> None:
    stream = Stream(three.refusing, "channels")
    stream.step(CLIP, 0, 30)
    stream.wait_durable(30)
    getattr(three.refusing_cable, how)()
    stream.step(CLIP, 30, 40)
    assert stream.until("error")["code"] == "store_unavailable"
    with pytest.raises(ConnectionClosed):
        stream.hear()
    assert stream.socket.close_code == 1013
    answer = ready(three.refusing)
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    opening = httpx.post(f"{three.refusing.url}/v1/models/channels/sessions", json={}, timeout=WITHIN_S)
    assert opening.status_code == 503
    assert int(opening.headers["retry-after"]) >= 1
    after = Stream(three.whole, "channels", stream.session, ack=40)  # its client moves
    after.step(CLIP, after.opened["next_frame"], 60)
    after.wait_durable(60)
    three.refusing_cable.heal()
    wait_until(lambda: ready(three.refusing).status_code == 200)
    back = Stream(three.refusing, "channels", stream.session, ack=60)
    assert back.opened["next_frame"] == 60
    back.step(CLIP, 60, 90)
    assert_same({**stream.scores, **after.scores, **back.scores}, whole(three.whole, "channels", CLIP[:90]))
