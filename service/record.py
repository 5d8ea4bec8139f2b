"""The session record: all that a stream is, as one value and as bytes. Pure: no I/O and no clock.

A record taken up by a model of the same fingerprint goes on with the same bits: scores, events, numbering, kept answers, time.

Bytes, little-endian: a header of 16 (magic, u16 format, u16 zero, u32 bytes of facts, u32 bytes of blocks), the facts (a JSON object, `Facts`), the
blocks, and a CRC-32 (u32) over everything before it. Blocks, one after another: the state row (width,) float32; the scores of the frames
whose answers are kept (kept, classes) float32; their times (kept,) float64 where frames carry times.

The checksum tells damage, not forgery (a cryptographic one took half the time of making a record): who may bring a record in is for the edge to decide,
and `Record.check` looks at every value that a stream computes with. The record holds the session's id, which is the key to that session while it lives.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.contract import Manifest
from model.events import Event, EventState
from service.detector import KEPT_EVENTS, TimedEvent
from service.errors import FingerprintMismatch, Malformed, NotFinite, WrongShape
from service.options import Options, read_options
from service.resampler import Floats, Times

FORMAT = 2
MAGIC = b"IRSR"
MOST_FRAMES = 2**64 - 1
_HEADER = struct.Struct("<4sHHII")
_CHECKSUM = 4

Count = Annotated[int, Field(ge=0, le=MOST_FRAMES)]
Seconds = Annotated[float, Field(ge=0, le=1e300)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ResamplerFields(_Fields):
    """As `ResamplerState.to_dict`."""

    origin: float | None
    time: Seconds
    started: Seconds
    step: Count
    last: list[float | None] | None


class ProgressFields(_Fields):
    """As `Progress.to_dict`."""

    resampler: ResamplerFields | None
    detector: EventState | None
    latest: list[float] | None
    moments: list[tuple[Count, float]]


class EventFields(_Fields):
    """A kept event; its time is not rounded."""

    event: Literal["start", "end"]
    label: str
    score: float
    frame: Count
    decided: Count
    cause: Literal["reset"] | None
    time: float


class Facts(_Fields):
    """What of a record is no array."""

    session: str
    model: str
    version: str
    fingerprint: str
    manifest: str
    epoch: Count
    next_frame: Count
    reset_at: Count
    options: dict[str, Any]
    progress: ProgressFields
    events: Annotated[list[EventFields], Field(max_length=KEPT_EVENTS)]
    forgotten: Count
    created: Seconds
    used: Seconds
    width: Annotated[Count, Field(ge=1)]
    classes: Annotated[Count, Field(ge=1)]
    kept: Count
    timed: bool


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One stream between two of its messages."""

    session: str  # its id
    model: str  # as it was served, as is `version`
    version: str
    fingerprint: str  # of the model's graph
    manifest: str  # `manifest_digest`
    epoch: int  # how often the stream was taken up from a record
    next_frame: int
    reset_at: int  # frame at which it last began anew
    options: Options  # in force
    progress: dict[str, Any]  # as `Progress.to_dict`: resampler, event detector, latest scores
    events: tuple[TimedEvent, ...]  # kept, oldest first
    forgotten: int  # frames below may have decided events that are no longer kept
    created: float  # when the stream began, and its last use, in seconds since 1970
    used: float
    row: Floats  # (width,)
    scores: Floats  # (kept, classes), of the frames up to `next_frame` whose answers are kept
    times: Times | None  # (kept,) of frames that carry their own, seconds since frame 0

    def to_bytes(self) -> bytes:
        """Raises nothing: whatever a session holds can be written."""
        facts = orjson.dumps(
            {
                "session": self.session,
                "model": self.model,
                "version": self.version,
                "fingerprint": self.fingerprint,
                "manifest": self.manifest,
                "epoch": self.epoch,
                "next_frame": self.next_frame,
                "reset_at": self.reset_at,
                "options": _options_json(self.options),
                "progress": self.progress,
                "events": [{**dataclasses.asdict(one.event), "time": one.time} for one in self.events],
                "forgotten": self.forgotten,
                "created": self.created,
                "used": self.used,
                "width": len(self.row),
                "classes": self.scores.shape[1],
                "kept": len(self.scores),
                "timed": self.times is not None,
            }
        )
        blocks = [
            np.asarray(self.row, "<f4").tobytes(),
            np.asarray(self.scores, "<f4").tobytes(),
            b"" if self.times is None else np.asarray(self.times, "<f8").tobytes(),
        ]
        body = b"".join([_HEADER.pack(MAGIC, FORMAT, 0, len(facts), sum(map(len, blocks))), facts, *blocks])
        return body + _checksum(body)

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """Raises `Malformed` saying what is wrong: no record, another format, cut short, damaged, or fields that make no sense."""
        facts, blocks = _parts(data)
        sizes = [4 * facts.width, 4 * facts.kept * facts.classes, 8 * facts.kept * facts.timed]
        if sum(sizes) != len(blocks):
            raise Malformed(f"the session record holds {len(blocks)} bytes of arrays, and its facts speak of {sum(sizes)}")
        values = facts.model_dump(exclude={"width", "classes", "kept", "timed", "events", "options"})
        split = sizes[0] + sizes[1]
        return cls(
            **values,
            options=read_options(facts.options, Options()),
            events=tuple(TimedEvent(Event(one.event, one.label, one.score, one.frame, one.decided, one.cause), one.time) for one in facts.events),
            row=np.frombuffer(blocks[: sizes[0]], "<f4").astype(np.float32),
            scores=np.frombuffer(blocks[sizes[0] : split], "<f4").astype(np.float32).reshape(facts.kept, facts.classes),
            times=np.frombuffer(blocks[split:], "<f8").astype(np.float64) if facts.timed else None,
        )

    def check(self, manifest: Manifest) -> None:
        """Whether a stream of this model may stand here; nothing of the record is computed with before.

        Raises `FingerprintMismatch`, `WrongShape`, `NotFinite` or `Malformed`.
        """
        if self.fingerprint != manifest.fingerprint:
            raise FingerprintMismatch("the session record is of another model", fingerprint=self.fingerprint, served=manifest.fingerprint)
        if self.manifest != manifest_digest(manifest):
            raise FingerprintMismatch(
                "the session record is of the same graph with another manifest: its rate, classes or rules for events differ",
                fingerprint=self.fingerprint,
                served=manifest.fingerprint,
            )
        if len(self.row) != manifest.state_width:
            raise WrongShape(f"the session record has a state of {len(self.row)} values, the model one of {manifest.state_width}")
        if self.scores.shape[1] != len(manifest.classes):
            raise WrongShape(f"the session record has answers of {self.scores.shape[1]} classes, the model {len(manifest.classes)}")
        for name, array in (("state", self.row), ("kept answers", self.scores), ("kept times", self.times)):
            if array is not None and not np.isfinite(array).all():
                raise NotFinite(f"the session record's {name} hold values that are not finite")
        self._check_place()
        self._check_progress(manifest)

    def _check_place(self) -> None:
        if len(self.scores) > self.next_frame:
            raise _senseless("kept", f"{len(self.scores)} answers of {self.next_frame} frames")
        if self.reset_at > self.next_frame:
            raise _senseless("reset_at", f"{self.reset_at}, after the next frame {self.next_frame}")
        if self.forgotten > self.next_frame + 1:  # a reset at the next frame is decided there
            raise _senseless("forgotten", f"{self.forgotten}, after the next frame {self.next_frame}")
        decided = [one.event.decided for one in self.events]
        if decided != sorted(decided) or (decided and decided[-1] > self.next_frame) or any(one.event.frame > one.event.decided for one in self.events):
            raise _senseless("events", "frames that are out of order")

    def _check_progress(self, manifest: Manifest) -> None:
        resampler, detector, latest = self.progress["resampler"], self.progress["detector"], self.progress["latest"]
        moments = {frame for frame, _ in self.progress["moments"]}
        if (detector is None) != (manifest.events is None) or (self.events and detector is None):
            raise _senseless("progress.detector", "events of a model that has none" if manifest.events is None else "no detector, and the model has events")
        if resampler is None and self.options.fps != manifest.fps:
            raise _senseless("progress.resampler", f"none for frames at {self.options.fps} a second, and the model's rate is {manifest.fps}")
        timed = resampler is not None and resampler["origin"] is not None
        if (timed and not self.next_frame) or (len(self.scores) and timed != (self.times is not None)):
            raise _senseless("progress.resampler.origin", "times of frames that have none, or none of those that do")
        if resampler is not None:
            self._check_resampler(resampler, latest, manifest)
        if detector is not None:
            state = EventState.from_dict(detector)
            try:
                state.check(manifest.classes, self.next_frame)
            except ValueError as error:
                raise _senseless("progress.detector", str(error)) from None
            if timed and not {frame for frame in state.frames if frame < self.next_frame} <= moments:
                raise _senseless("progress.moments", "no times of frames that coming events may name")
            if unknown := {one.event.label for one in self.events} - set(manifest.classes):
                raise _senseless("events", f"a class that the model has not: {min(unknown)!r:.60}")

    def _check_resampler(self, resampler: dict[str, Any], latest: list[float] | None, manifest: Manifest) -> None:
        last = resampler["last"]
        if resampler["started"] > resampler["time"]:
            raise _senseless("progress.resampler.started", "after the last frame")
        if latest is not None and len(latest) != len(manifest.classes):
            raise WrongShape(f"the session record's latest scores are of {len(latest)} classes, the model's of {len(manifest.classes)}")
        if last is None:
            return
        if latest is None:
            raise _senseless("progress.latest", "no scores of the last step")
        size = int(np.prod(manifest.frame_shape))
        if len(last) != size:
            raise WrongShape(f"the session record's last frame has {len(last)} values, the model's frames have {size}")
        if not manifest.missing and None in last:
            raise NotFinite("the session record's last frame has missing values, which the model does not admit")


def manifest_digest(manifest: Manifest) -> str:
    """What beside the graph decides how a stream goes on: two models of one fingerprint and one digest continue each other's streams."""
    rules = None if manifest.events is None else dataclasses.astuple(manifest.events)
    if rules is not None and not rules[-1]:
        rules = rules[:-1]  # as it was before rules could be pooled: streams from then go on
    said = [manifest.task, manifest.frame_shape, manifest.layout, manifest.fps, manifest.classes, manifest.missing, manifest.state_width, rules]
    return hashlib.blake2b(orjson.dumps(said), digest_size=16).hexdigest()


@lru_cache(maxsize=1024)
def _options_json(options: Options) -> orjson.Fragment:
    """Of a session they never change, and of many sessions they are the same."""
    return orjson.Fragment(orjson.dumps(options.to_dict()))


def _parts(data: bytes) -> tuple[Facts, bytes]:
    if len(data) < _HEADER.size + _CHECKSUM or not data.startswith(MAGIC):
        raise Malformed("this is no session record: it is what GET /v1/sessions/ID/state answers with")
    _, number, zero, facts_size, blocks_size = _HEADER.unpack_from(data)
    if number != FORMAT or zero:
        raise Malformed(f"the session record has format {number}, this service reads {FORMAT}", format=number, formats=[FORMAT])
    end = _HEADER.size + facts_size
    length = end + blocks_size + _CHECKSUM
    if len(data) != length:
        raise Malformed(f"the session record has {len(data)} bytes, its header speaks of {length}: it was cut short or something follows it")
    if _checksum(data[:-_CHECKSUM]) != data[-_CHECKSUM:]:
        raise Malformed("the session record's checksum is wrong: it was damaged on its way")
    try:
        return Facts.model_validate_json(data[_HEADER.size : end]), data[end:-_CHECKSUM]
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        raise _senseless(".".join(map(str, fault["loc"])) or "facts", fault["msg"]) from None


def _checksum(body: bytes) -> bytes:
    return zlib.crc32(body).to_bytes(_CHECKSUM, "little")


def _senseless(field: str, why: str) -> Malformed:
    return Malformed(f"the session record's {field} makes no sense: {why}", field=field)
