from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service import protocol
from service.errors import Malformed, ServiceError, TooMany, TrackNotOpen
from service.options import Options, read_options
from service.protocol import Ack, Answer, Close, Connection, Frames, Open, Refused, Reset
from tests import toy_models
from tests.toy_models import CHANNELS, EXPLOSIVE

MANIFEST = toy_models.manifest_of(CHANNELS, toy_models.build(CHANNELS), "toy")
REGRESSION = toy_models.manifest_of(EXPLOSIVE, toy_models.build(EXPLOSIVE), "toy")
SCORES = np.array([[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.15, 0.1]], np.float32)


def text(**fields: Any) -> str:
    return json.dumps(fields)


def opened() -> Connection:
    connection = Connection(64)
    connection.receive(text(type="open"))
    return connection


def test_messages_become_values() -> None:
    connection = Connection(64)
    assert connection.receive(text(type="open", session="abc", ack=3, scores="all", version="2")) == Open({"scores": "all"}, "2", "abc", 3)
    assert connection.receive(text(type="frames", track=0, first=4, frames=[[1]])).first == 4  # type: ignore[union-attr]
    assert connection.receive(text(type="ack", first=2)) == Ack(2)
    assert connection.receive(text(type="reset", at=9)) == Reset(9)
    assert connection.receive(text(type="close")) == Close()
    assert connection.receive(text(type="open", track=7)) == Open({}, track=7, named=True)
    assert connection.receive(text(type="ack", first=2, track=7)) == Ack(2, 7)
    assert connection.receive(protocol.HEADER.pack(1, 3, 7, 0, 5)) == Ack(5, 7)
    assert connection.receive(text(type="reset", at=9, track=7)) == Reset(9, 7)
    assert connection.receive(text(type="close", keep=True, track=7)) == Close(True, 7)


def refused(message: Any, track: int, kind: type[ServiceError], match: str) -> None:
    assert isinstance(message, Refused)
    assert (message.track, type(message.error)) == (track, kind)
    assert match in message.error.message


def test_open_comes_first_and_once() -> None:
    with pytest.raises(Malformed, match="first message must be `open`"):
        Connection(64).receive(text(type="ack", first=0))
    refused(opened().receive(text(type="open")), 0, Malformed, "once")


def test_only_an_open_that_names_its_track_begins_a_connection_of_many() -> None:
    assert not opened().many
    connection = opened()
    connection.receive(text(type="open", track=3))
    assert connection.many
    alone = Connection(64)
    alone.receive(text(type="open", track=0))
    assert alone.many


def test_what_a_track_that_is_not_open_is_told_it_is_told_once() -> None:
    connection = opened()
    frames = protocol.write_frames(0, np.zeros((1, 3), np.float32), 9)
    refused(connection.receive(frames), 9, TrackNotOpen, "begin with `open`")
    assert connection.receive(frames) is None
    connection.receive(text(type="open", track=9))
    assert isinstance(connection.receive(frames), Frames)
    credit = connection.credit(9)
    connection.receive(text(type="close", track=9))
    refused(connection.receive(frames), 9, TrackNotOpen, "nothing may follow `close`")
    connection.ended(9, credit, refused=False)
    connection.receive(text(type="open", track=9))
    connection.ended(9, connection.credit(9), refused=True)
    assert connection.receive(frames) is None


def test_a_track_may_be_opened_again_while_what_came_before_its_close_is_answered() -> None:
    connection = opened()
    connection.receive(text(type="open", track=5))
    old = connection.credit(5)
    connection.receive(text(type="close", track=5))
    connection.receive(text(type="open", track=5))
    connection.ended(5, old, refused=False)
    assert connection.is_open(5)
    assert connection.credit(5) is not old


def test_tracks_are_capped_and_those_that_are_ending_count() -> None:
    connection = Connection(64, most_tracks=2)
    for track in (1, 2):
        connection.receive(text(type="open", track=track))
    refused(connection.receive(text(type="open", track=3)), 3, TooMany, "not `closed` yet, which is the most: wait or open another")
    credit = connection.credit(1)
    connection.receive(text(type="close", track=1))
    refused(connection.receive(text(type="open", track=3)), 3, TooMany, "not `closed` yet, which is the most: wait or open another")
    connection.ended(1, credit, refused=False)
    assert connection.receive(text(type="open", track=3)) == Open({}, track=3, named=True)


def test_a_query_opens() -> None:
    connection = Connection(64)
    assert connection.open_by_query({}) is None
    assert not connection.is_open(0)
    assert connection.open_by_query({"session": "abc", "ack": "7", "top_k": "2"}) == Open({"top_k": "2"}, None, "abc", 7)
    assert connection.is_open(0)
    assert not connection.many
    for bad in ({"ack": "x"}, {"ack": "-1"}, {"ack": "²"}, {"ok": "1"}, {"track": "1"}):
        with pytest.raises(Malformed):
            Connection(64).open_by_query(bad)


def test_frames_are_counted_against_the_window_of_their_track() -> None:
    connection = opened()
    connection.receive(text(type="open", track=1))
    credit, other = connection.credit(0), connection.credit(1)
    message = connection.receive(protocol.write_frames(0, np.zeros((64, 3), np.float32)))
    assert isinstance(message, Frames)
    assert not connection.full(credit)
    reset = connection.receive(text(type="reset", at=64))
    assert isinstance(reset, Reset)
    assert connection.full(credit)
    assert not connection.full(other)
    connection.answered(message, credit)
    assert not connection.full(credit)
    assert (credit.frames, credit.size, connection.waiting) == (1, 0, 0)
    connection.answered(reset, credit)
    assert credit.frames == 0


def test_bytes_are_counted_over_all_tracks() -> None:
    connection = opened()
    connection.receive(text(type="open", track=1))
    data = protocol.HEADER.pack(1, 1, 0, 1, 0) + bytes(protocol.MOST_WAITING // 2)
    connection.receive(data)
    assert not connection.full(connection.credit(0))
    connection.receive(data[:2] + b"\1\0" + data[4:])
    assert connection.full(connection.credit(1))
    connection.ended(0, connection.credit(0), refused=True)
    assert not connection.full(connection.credit(1))
    assert connection.waiting == len(data)


@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        message = protocol.read_binary(data)
    except Malformed:
        return
    assert isinstance(message, Frames | Ack)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from(["", "3", "a"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["type", "first", "frames", "at", "track", "ack", "x"]), inner, max_size=4),
    max_leaves=5,
)


TYPES = st.sampled_from(["open", "frames", "ack", "reset", "close", "x"])


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.fixed_dictionaries({"type": TYPES}, optional=dict.fromkeys(("first", "frames", "at", "track", "ack"), JSON)))
def test_any_json_is_read_or_refused(value: dict[str, Any]) -> None:
    try:
        protocol.read_text(orjson.dumps(value).decode())
    except Malformed as error:
        refused = error.message
    else:
        return
    assert 0 < len(refused) < 500


@given(st.integers(0, 2**64 - 1), st.integers(1, 5))
def test_frames_travel(first: int, count: int) -> None:
    frames = np.random.default_rng(count).normal(size=(count, 3)).astype(np.float32)
    message = protocol.read_binary(protocol.write_frames(first, frames))
    assert isinstance(message, Frames)
    assert (message.first, message.count) == (first, count)
    np.testing.assert_array_equal(np.frombuffer(message.payload, "<f4").reshape(-1, 3), frames)  # type: ignore[arg-type]


def test_an_answer_for_people() -> None:
    value = json.loads(Answer(MANIFEST, Options(scores="all", top_k=2), 30, 2, SCORES).to_json())
    assert value == {
        "first": 30, "count": 2, "frame": 31, "time": 1.033333, "label": "rest", "score": 0.5,
        "top": [{"label": "rest", "score": 0.5}, {"label": "wave", "score": 0.25}],
        "scores": [[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.15, 0.1]],
    }  # fmt: skip
    last = json.loads(Answer(MANIFEST, Options(), 30, 2, SCORES[-1:]).to_json())
    assert last["scores"] == [0.5, 0.25, 0.15, 0.1]
    assert "scores" not in json.loads(Answer(MANIFEST, Options(scores="none"), 30, 2, SCORES[-1:]).to_json())
    assert len(json.loads(Answer(MANIFEST, Options(top_k=99), 30, 2, SCORES[-1:]).to_json())["top"]) == 4


def test_regression_has_no_labels() -> None:
    assert set(json.loads(Answer(REGRESSION, Options(), 0, 1, SCORES[:1, :2]).to_json())) == {"first", "count", "frame", "time", "scores"}


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4))
def test_json_keeps_every_bit(values: list[float]) -> None:
    scores = np.array([values], np.float32)
    back = np.array(json.loads(Answer(MANIFEST, Options(), 0, 1, scores).to_json())["scores"], np.float32)
    assert back.tobytes() == scores[0].tobytes()


def test_a_binary_answer() -> None:
    data = Answer(MANIFEST, Options(scores="all", answers="binary"), 5, 2, SCORES).to_binary()
    assert protocol.HEADER.unpack_from(data) == (1, 2, 0, 2, 5)
    np.testing.assert_array_equal(np.frombuffer(data, "<f4", offset=16).reshape(2, 4), SCORES)
    last = Answer(MANIFEST, Options(scores="last", answers="binary"), 5, 2, SCORES[-1:]).to_binary()
    assert protocol.HEADER.unpack_from(last) == (1, 2, 0, 1, 6)


@pytest.mark.parametrize(
    "given_options", [{"top_k": "x"}, {"top_k": -1}, {"top_k": True}, {"scores": "some"}, {"layout": 3}, {"fps": 0}, {"fps": "nan"}, {"fps": True}, {"x": 1}]
)
def test_options_that_are_refused(given_options: dict[str, Any]) -> None:
    with pytest.raises(Malformed):
        read_options(given_options, Options())


def test_binary_answers_need_scores() -> None:
    with pytest.raises(Malformed, match="scores=last or scores=all"):
        read_options({"answers": "binary", "scores": "none"}, Options())
