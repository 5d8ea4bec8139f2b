"""The wire: what messages mean, as values. No I/O: text and bytes come in, messages go out, and the other way round.

Binary messages, little-endian: `u8 version=1, u8 kind, u16 track, u32 count, u64 first`, then the payload.

    kind  direction   payload
    1     to server   frames: count x frame shape, float32
    2     to client   scores: count x classes, float32
    3     to server   ack: none; `first` is the ack
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from model.contract import Manifest
from service.detector import TimedEvent
from service.errors import Malformed, ServiceError, TooMany, TrackNotOpen
from service.options import NAMES as OPTION_NAMES
from service.options import Options
from service.resampler import Times

Floats = npt.NDArray[np.float32]

HEADER = struct.Struct("<BBHIQ")
_F4 = np.dtype("<f4")
VERSION = 1
KIND_FRAMES, KIND_SCORES, KIND_ACK = 1, 2, 3
MOST_FRAMES = 2**64 - 1
_FRAME_NUMBER = re.compile("[0-9]{1,20}")
OPEN_FIELDS = ("version", "session", "ack", *OPTION_NAMES)
MOST_TRACKS = 64  # of one connection
MOST_WAITING = 16 * 2**20  # bytes of messages of one connection that are read and not answered


@dataclass(frozen=True, slots=True)
class Open:
    """Begins a stream on `track`, or goes on with `session`; `options` as the client wrote them. `named`: the client wrote which track."""

    options: dict[str, Any]
    version: str | None = None
    session: str | None = None
    ack: int | None = None
    track: int = 0
    named: bool = False


@dataclass(slots=True)  # not frozen, here and in `Answer`: those of each message take four times as long to make
class Frames:
    """`count` frames from number `first` on; `payload` is nested lists or raw bytes, `size` its length on the wire, `t` the time of each as sent."""

    first: int
    count: int
    payload: list[Any] | memoryview
    size: int
    t: list[Any] | None = None
    track: int = 0


@dataclass(frozen=True, slots=True)
class Ack:
    """Every frame below `first` was answered and its answer received."""

    first: int
    track: int = 0


@dataclass(frozen=True, slots=True)
class Reset:
    at: int
    track: int = 0


@dataclass(frozen=True, slots=True)
class Close:
    """Ends the track and its session; `keep` leaves the session, to be resumed."""

    keep: bool = False
    track: int = 0


@dataclass(frozen=True, slots=True)
class Refused:
    """What a message deserves that may not come now on this track: an error that names the track, and the end of that track."""

    track: int
    error: ServiceError


Message = Open | Frames | Ack | Reset | Close


@dataclass(slots=True)
class Credit:
    """What one track may still send: `frames` in `size` bytes are read and not answered, of at most `window`. A reset counts as a frame."""

    window: int
    frames: int = 0
    size: int = 0


class Connection:
    """One websocket as seen by the server: which tracks are open, which messages may come now, and how much of them is unanswered.

    Each track has a window of its own; a connection is `full`, and its socket not read, while a client has overdrawn one of them, or while
    `MOST_WAITING` bytes are unanswered.

    `many`: an `open` has named its track. Such a connection stays open without tracks, and an error about one of them leaves the others alone. Any
    other carries one stream, and ends with it.
    """

    def __init__(self, window: int, most_tracks: int = MOST_TRACKS) -> None:
        self.many = False
        self.waiting = 0  # bytes
        self._window = window
        self._most_tracks = most_tracks
        self._open: dict[int, Credit] = {}
        self._ending: Counter[int] = Counter()  # closed by the client, while what came before is still being answered
        self._refused: set[int] = set()  # the client was told of an error; what it had sent before it heard of it is dropped
        self.begun = False  # whether there was an `open`

    def receive(self, data: str | bytes) -> Message | Refused | None:
        """Reads one message; None for one that nobody waits for any more. Raises `Malformed` for what cannot be read, which ends the connection."""
        message = read_text(data) if isinstance(data, str) else read_binary(data)
        kind = type(message)
        if kind is Open:
            return self._begin(message)  # type: ignore[arg-type]
        credit = self._open.get(message.track)
        if credit is None:
            return self._stray(message.track)
        if type(message) is Frames:
            credit.frames += message.count
            credit.size += message.size
            self.waiting += message.size
        elif kind is Reset:
            credit.frames += 1
        elif type(message) is Close:
            del self._open[message.track]
            self._ending[message.track] += 1
        return message

    def open_by_query(self, query: Mapping[str, str]) -> Open | None:
        """The `open` that a URL's query stands for; None without a query."""
        if not query:
            return None
        given: dict[str, Any] = dict(query)
        if "ack" in given:
            given["ack"] = int(given["ack"]) if _FRAME_NUMBER.fullmatch(given["ack"]) else given["ack"]
        opened = _read_open(given)
        self._begin(opened)
        return opened

    def is_open(self, track: int) -> bool:
        return track in self._open

    def credit(self, track: int) -> Credit:
        """Of an open track."""
        return self._open[track]

    def full(self, credit: Credit) -> bool:
        """Whether the socket must not be read for now. `credit` is that of the latest message's track, the only one that has changed."""
        return credit.frames > credit.window or self.waiting >= MOST_WAITING

    def has_room(self) -> bool:
        """Whether a socket that was full may be read again."""
        return self.waiting < MOST_WAITING and all(credit.frames <= credit.window for credit in self._open.values())

    def answered(self, message: Frames | Reset, credit: Credit) -> None:
        if type(message) is Frames:
            credit.frames -= message.count
            credit.size -= message.size
            self.waiting -= message.size
        else:
            credit.frames -= 1

    def ended(self, track: int, credit: Credit, *, refused: bool) -> None:
        """The track is at its end, and with it what was not answered; `refused`: its client is told of an error."""
        self.waiting -= credit.size
        credit.frames = credit.size = 0
        if self._open.get(track) is credit:
            del self._open[track]
            if refused:
                self._refused.add(track)
        else:
            self._ending -= Counter((track,))  # which forgets those that are at zero

    def _begin(self, message: Open) -> Open | Refused:
        track = message.track
        if track in self._open:
            return Refused(track, Malformed(f"track {track} is open already: `open` comes once, until the track is closed"))
        self.begun = True
        self.many = self.many or message.named
        if len(self._open) + self._ending.total() >= self._most_tracks:
            self._refused.add(track)
            return Refused(track, TooMany(f"{self._most_tracks} tracks of this connection are not `closed` yet, which is the most: wait or open another"))
        self._refused.discard(track)
        self._open[track] = Credit(self._window)
        return message

    def _stray(self, track: int) -> Refused | None:
        if not self.begun:
            raise Malformed("the first message must be `open` (or put its options into the URL's query, e.g. ?scores=all)")
        if track in self._refused:
            return None
        self._refused.add(track)
        why = "nothing may follow `close`" if track in self._ending else "begin with `open`"
        return Refused(track, TrackNotOpen(f"track {track} is not open: {why}"))


def join(messages: Sequence[Frames]) -> Frames:
    """Messages that follow each other, all lists or all bytes, as one."""
    first, count, size = messages[0].first, sum(message.count for message in messages), sum(message.size for message in messages)
    if isinstance(messages[0].payload, list):
        times = None if messages[0].t is None else [t for message in messages for t in message.t or ()]
        return Frames(first, count, [frame for message in messages for frame in message.payload], size, times)
    return Frames(first, count, memoryview(b"".join(message.payload for message in messages)), size)  # type: ignore[misc]


def may_join(before: Frames, after: Frames) -> bool:
    if after.first != before.first + before.count or not after.count or isinstance(after.payload, list) != isinstance(before.payload, list):
        return False
    if before.t is None or after.t is None:
        return before.t is after.t
    return len(before.t) == before.count and len(after.t) == after.count  # else the times would slip to other frames


def read_text(text: str) -> Message:
    """A message to the server from JSON; raises `Malformed` naming the field."""
    value = read_object(text)
    kind = value.pop("type", None)
    reader = _READERS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        raise Malformed(f"unknown message type {kind!r:.60}; known: {', '.join(_READERS)}")
    named, track = "track" in value, value.pop("track", 0)
    if type(track) is not int or not 0 <= track < 2**16:
        raise Malformed(f"track must be a whole number from 0 to 65535, got {track!r:.60}")
    message: Message = reader(value, track, named, len(text))
    return message


def read_binary(data: bytes) -> Message:
    """A message to the server from bytes; raises `Malformed` for a bad header."""
    if len(data) < HEADER.size:
        raise Malformed(f"a binary message begins with a header of {HEADER.size} bytes, this one has {len(data)}")
    version, kind, track, count, first = HEADER.unpack_from(data)
    if version != VERSION:
        raise Malformed(f"binary version {version}, this server reads {VERSION}")
    if kind == KIND_FRAMES:
        return Frames(first, count, memoryview(data)[HEADER.size :], len(data), None, track)
    if kind == KIND_ACK:
        if len(data) > HEADER.size or count:
            raise Malformed("an ack has no payload and count 0")
        return Ack(first, track)
    raise Malformed(f"unknown binary kind {kind}; to the server go {KIND_FRAMES} (frames) and {KIND_ACK} (ack)")


def read_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object; raises `Malformed`, for NaN and Infinity too, which are no JSON."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if "infinity" not in str(error):
            raise Malformed(f"not JSON: {error}") from None
        value = _with_infinities(text)
    if not isinstance(value, dict):
        raise Malformed(f"expected a JSON object, got {type(value).__name__}")
    return value


def _with_infinities(text: str | bytes) -> Any:
    """A number too large for a double is legal JSON; it becomes infinity, which is refused where its place is known."""
    try:
        return json.loads(text, parse_int=_whole_number, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # broken, or nested too deeply
        raise Malformed("not JSON: it cannot be read around a number that is too large") from None


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) <= 20 else float(digits)


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def check_fields(value: Mapping[str, Any], required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Raises `Malformed` naming a field that is missing or unknown."""
    for name in required:
        if name not in value:
            raise Malformed(f"field {name!r} is missing")
    for name in value:
        if name not in required and name not in optional:
            raise Malformed(f"unknown field {name!r:.60}; known: {', '.join((*required, *optional))}")


def frame_number(value: Any, name: str) -> int:
    """A frame's number, 0 to 2**64 - 1; raises `Malformed`."""
    if type(value) is not int or not 0 <= value <= MOST_FRAMES:
        raise Malformed(f"{name} must be a whole number from 0 to 2**64 - 1, got {value!r:.60}")
    return value


def _read_open(value: dict[str, Any], track: int = 0, named: bool = False, _size: int = 0) -> Open:
    check_fields(value, (), OPEN_FIELDS)
    for name in ("version", "session"):
        if not isinstance(value.get(name), str | None):
            raise Malformed(f"{name} must be a string, got {value[name]!r:.60}")
    ack = None if value.get("ack") is None else frame_number(value["ack"], "ack")
    return Open({name: value[name] for name in OPTION_NAMES if name in value}, value.get("version"), value.get("session"), ack, track, named)


def _read_frames(value: dict[str, Any], track: int, _named: bool, size: int) -> Frames:
    check_fields(value, ("first", "frames"), ("t",))
    for name in ("frames", "t"):
        if not isinstance(value.get(name, []), list):
            raise Malformed(f"{name} must be a list, got {type(value[name]).__name__}")
    return Frames(frame_number(value["first"], "first"), len(value["frames"]), value["frames"], size, value.get("t"), track)


def _read_ack(value: dict[str, Any], track: int, _named: bool, _size: int) -> Ack:
    check_fields(value, ("first",))
    return Ack(frame_number(value["first"], "first"), track)


def _read_reset(value: dict[str, Any], track: int, _named: bool, _size: int) -> Reset:
    check_fields(value, ("at",))
    return Reset(frame_number(value["at"], "at"), track)


def _read_close(value: dict[str, Any], track: int, _named: bool, _size: int) -> Close:
    check_fields(value, (), ("keep",))
    if type(value.get("keep", False)) is not bool:
        raise Malformed(f"keep must be true or false, got {value['keep']!r:.60}")
    return Close(value.get("keep", False), track)


_READERS: dict[str, Any] = {"open": _read_open, "frames": _read_frames, "ack": _read_ack, "reset": _read_reset, "close": _read_close}


@dataclass(slots=True)
class Answer:
    """Scores for frames [first, first + count): `scores` (count, classes), or (1, classes) of the last frame unless all were asked for.

    `times` are those of the frames that have scores here, where frames carry their own; `events` what all these frames decided.
    """

    manifest: Manifest
    options: Options
    first: int
    count: int
    scores: Floats
    times: Times | None = None
    events: Sequence[TimedEvent] = ()

    def to_dict(self) -> dict[str, Any]:
        frame = self.first + self.count - 1
        time = frame / (self.options.fps or self.manifest.fps) if self.times is None else float(self.times[-1])
        value: dict[str, Any] = {"first": self.first, "count": self.count, "frame": frame, "time": round(time, 6)}
        last = self.scores[-1]
        if self.manifest.task == "classification":
            value.update(self._labels(last))
        if self.options.scores == "all":
            value["scores"] = self.scores
        elif self.options.scores == "last":
            value["scores"] = last
        if self.manifest.events is not None and self.options.events is not False:
            value["events"] = [event.to_dict() for event in self.events]
        return value

    def _labels(self, last: Floats) -> dict[str, Any]:
        order = np.argsort(-last, kind="stable")[: max(1, self.options.top_k)].tolist()
        top = [{"label": self.manifest.classes[i], "score": last[i]} for i in order]
        return {"label": top[0]["label"], "score": top[0]["score"], "top": top[: self.options.top_k]}

    def part(self, first: int, count: int, options: Options) -> Answer:
        """The answer for some of the frames alone, in the form that `options` ask for; this one has the scores of all its frames."""
        begin = first - self.first
        end = begin + count
        some = slice(begin if options.scores == "all" else end - 1, end)
        times = None if self.times is None else self.times[some]
        events = [one for one in self.events if first <= one.event.decided < first + count] if self.events else ()
        return Answer(self.manifest, options, first, count, self.scores[some], times, events)

    def joined(self, rest: Answer) -> Answer:
        """The answer for these frames and those that follow; both have the scores of all their frames, `rest` the events of both."""
        times = None if self.times is None or rest.times is None else np.concatenate([self.times, rest.times])
        return Answer(self.manifest, self.options, self.first, self.count + len(rest.scores), np.concatenate([self.scores, rest.scores]), times, rest.events)

    def to_json(self) -> bytes:
        return encode(self.to_dict())

    def to_binary(self, track: int = 0) -> bytes:
        """A message of kind 2: all frames' scores, or the last frame's alone under its own number."""
        first = self.first + self.count - len(self.scores)
        return write_scores(first, len(self.scores), self.scores.astype(_F4, copy=False).tobytes(), track)


def write_scores(first: int, count: int, scores: bytes, track: int = 0) -> bytes:
    """The binary message that carries scores (count, classes) of the frames from `first` on to a client."""
    return HEADER.pack(VERSION, KIND_SCORES, track, count, first) + scores


def write_answer(answer: Answer, track: int = 0) -> str | bytes:
    """An answer as a websocket message, text or binary as the stream's options say."""
    if answer.options.answers == "binary":
        return answer.to_binary(track)
    fields = answer.to_dict()
    fields.pop("events", None)  # they are messages of their own
    return write("scores", track=track, **fields)


def write_event(event: TimedEvent, track: int = 0) -> str:
    return write("event", track=track, **event.to_dict())


def write_events(answer: Answer, track: int = 0) -> list[str]:
    """The messages that go before an answer, whatever its form: one for each event that its frames decided."""
    return [write_event(event, track) for event in answer.events]


def write(kind: str, **fields: Any) -> str:
    """A text message to the client."""
    return encode({"type": kind, **fields}).decode()


def write_frames(first: int, frames: Floats, track: int = 0) -> bytes:
    """The binary message that carries frames (count, *frame_shape) to a server."""
    return HEADER.pack(VERSION, KIND_FRAMES, track, len(frames), first) + np.ascontiguousarray(frames, "<f4").tobytes()


def write_timed_frames(first: int, frames: Floats, t: Times) -> str:
    """The text message that carries frames (count, *frame_shape) and the time of each (count,) to a server; binary ones have no room for times."""
    return write("frames", first=first, frames=for_json(frames), t=t)


def for_json(frames: Floats) -> Floats:
    """The same frames, but JSON has no infinity, which would be written as a missing value: it becomes the largest number, which is refused as well."""
    return np.ascontiguousarray(np.nan_to_num(frames, nan=np.nan), np.float32)


def encode(value: Any) -> bytes:
    """JSON; float32 values are written so that reading them back gives the same bits."""
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
