"""The session record: it goes to bytes and back without losing a bit, and nothing that is damaged, forged or another's is taken up."""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import zlib
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.contract import Manifest
from model.events import EventState
from service.errors import FingerprintMismatch, Malformed, NotFinite, ServiceError, WrongShape
from service.options import Options
from service.progress import Progress
from service.record import FORMAT, MAGIC, Record, manifest_digest
from service.sessions import Session
from tests import toy_models
from tests.toy_models import CHANNELS, GAPPY_GESTURES, Toy, moving_frames

PLAIN = toy_models.manifest_of(CHANNELS, toy_models.build(CHANNELS), "plain")
EVENTS = toy_models.manifest_of(GAPPY_GESTURES, toy_models.build(GAPPY_GESTURES), "events")
FRAMES = moving_frames(GAPPY_GESTURES, 120, seed=1)
FRAMES[5:100:9, 2] = np.nan
TIMES = np.cumsum(np.random.default_rng(1).choice([0.02, 0.05, 0.3, 3.0], 120, p=[0.5, 0.3, 0.15, 0.05]))


def sharp(steps: np.ndarray) -> np.ndarray:
    """Scores (steps, 4) that say something for some steps, so that events start and end."""
    seen = np.nan_to_num(steps)
    logits = 4 * np.stack([seen[:, 0], seen[:, 1], seen[:, 2], -seen[:, 0]], axis=1)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(odds / odds.sum(axis=1, keepdims=True), np.float32)


def take(session: Session, first: int, end: int, timed: bool) -> None:
    """Frames [first, end) as the service takes them, but for the network."""
    passage = session.progress.prepare(first, FRAMES[first:end], TIMES[first:end] if timed else None)
    passage.commit(sharp(passage.steps))
    session.answers.add(passage.scores.tobytes(), passage.times)


def begun(manifest: Manifest, fps: float, session_id: str | None = None) -> Session:
    options = Options(layout=manifest.layout, fps=fps, scores="all", events=manifest.events is not None)
    return Session("toy", "1", 1, len(manifest.classes), options, Progress(manifest, fps), session_id)


def stream(manifest: Manifest = EVENTS, fps: float = 25.0, end: int = 90, *, timed: bool = False, acked: int = 0, resets: tuple[int, ...] = ()) -> Session:
    session = begun(manifest, fps)
    for at in range(0, end, 7):
        take(session, at, min(at + 7, end), timed)
        if session.next_frame in resets:
            assert session.reset(session.next_frame)
            session.progress.reset(session.next_frame)
    session.answers.forget(acked)
    return session


def record_of(session: Session, manifest: Manifest = EVENTS) -> Record:
    return session.record(manifest, manifest_digest(manifest), np.random.default_rng(3).normal(size=manifest.state_width).astype(np.float32))


def same(one: Record, other: Record) -> bool:
    """Bit for bit."""
    arrays = ("row", "scores", "times")
    rest = [field.name for field in dataclasses.fields(Record) if field.name not in arrays]
    bits = [None if array is None else (array.dtype.str, array.shape, array.tobytes()) for r in (one, other) for array in (r.row, r.scores, r.times)]
    return bits[:3] == bits[3:] and all(orjson.dumps(_plain(getattr(one, name))) == orjson.dumps(_plain(getattr(other, name))) for name in rest)


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, Options) else value


RATES = st.sampled_from([25.0, 10.0, 60.0, None])


@settings(deadline=None, max_examples=60)
@given(RATES, st.integers(1, 119), st.integers(0, 119), st.sets(st.sampled_from([28, 49, 84]), max_size=2), st.text(max_size=20))
def test_to_bytes_and_back_is_the_same_stream(fps: float | None, cut: int, acked: int, resets: set[int], name: str) -> None:
    """Not only the record is the same: the stream that is taken up from it goes on as the one that was never put away."""
    timed = fps is None
    session = stream(fps=fps or 25.0, end=cut, timed=timed, acked=acked, resets=tuple(resets))
    session.model = session.id = name
    record = record_of(session)
    taken = Record.from_bytes(record.to_bytes())
    assert same(taken, record)
    taken.check(EVENTS)
    other = begun(EVENTS, fps or 25.0)
    other.restore(taken)
    for one in (session, other):
        take(one, cut, 120, timed)
    one, two = record_of(session), record_of(other)
    assert (two.epoch, two.session == one.session) == (1, False)
    assert same(dataclasses.replace(two, epoch=0, session=one.session, model=one.model, used=one.used), one)


SCORES = st.floats(width=32, allow_nan=False, allow_infinity=False)
NUMBERS = st.integers(0, 2**64 - 1)


@settings(deadline=None, max_examples=60)
@given(st.lists(SCORES, min_size=1, max_size=9), st.lists(SCORES, max_size=8), NUMBERS, NUMBERS, st.floats(0, 1e300), st.sampled_from([None, True, False]))
def test_any_values_survive(row: list[float], scores: list[float], next_frame: int, epoch: int, time: float, events: bool | None) -> None:
    kept = np.array(scores, np.float32)[:, None]
    record = dataclasses.replace(
        record_of(stream()), row=np.array(row, np.float32), scores=kept, times=None if events else kept[:, 0].astype(np.float64) / 3,
        next_frame=next_frame, epoch=epoch, created=time, used=time / 7, options=Options(events=events, fps=time + 1),
    )  # fmt: skip
    assert same(Record.from_bytes(record.to_bytes()), record)


@pytest.mark.parametrize("manifest", [PLAIN, EVENTS])
def test_a_session_that_has_only_begun(manifest: Manifest) -> None:
    record = record_of(begun(manifest, manifest.fps), manifest)
    taken = Record.from_bytes(record.to_bytes())
    taken.check(manifest)
    assert (taken.next_frame, taken.scores.shape, taken.times, taken.events) == (0, (0, 4), None, ())


def test_it_is_compact() -> None:
    """Beside its row and the kept answers, which are as large as they are, a plain stream's record is small."""
    record = record_of(stream(PLAIN, 30.0, 90), PLAIN)
    assert len(record.to_bytes()) < record.row.nbytes + record.scores.nbytes + 700


GOOD = record_of(stream(timed=True, acked=60)).to_bytes()


def test_every_flipped_bit_is_refused() -> None:
    for place in range(len(GOOD)):
        damaged = bytearray(GOOD)
        damaged[place] ^= 1 << (place % 8)
        with pytest.raises(Malformed):
            Record.from_bytes(bytes(damaged))


@settings(deadline=None, max_examples=100)
@given(st.integers(0, len(GOOD) - 1), st.binary(max_size=40), st.booleans())
def test_what_was_cut_short_or_grew_is_refused(length: int, tail: bytes, whole: bool) -> None:
    data = GOOD + tail + b"!" if whole else GOOD[:length] + tail
    if data != GOOD:
        with pytest.raises(Malformed):
            Record.from_bytes(data)


def test_another_format_is_refused_by_name() -> None:
    data = bytearray(GOOD)
    data[4] = 1
    with pytest.raises(Malformed, match="format 1, this service reads 2") as caught:
        Record.from_bytes(bytes(data))
    assert caught.value.facts == {"format": 1, "formats": [2]}
    with pytest.raises(Malformed, match="no session record"):
        Record.from_bytes(b'{"scores": "all", "an open": "message", "with": "options"}')


def forged(change: Any, manifest: Manifest = EVENTS) -> None:
    """Takes up a record with facts of somebody's making and a right checksum."""
    _, _, _, size, blocks = struct.unpack_from("<4sHHII", GOOD)
    facts = orjson.loads(GOOD[16 : 16 + size])
    made = change(facts)
    text = orjson.dumps(facts) if made is None else made
    body = struct.pack("<4sHHII", MAGIC, FORMAT, 0, len(text), blocks) + text + GOOD[16 + size : -4]
    Record.from_bytes(body + zlib.crc32(body).to_bytes(4, "little")).check(manifest)


def put(path: str, value: Any) -> Any:
    def change(facts: Any) -> None:
        *way, name = path.split(".")
        for step in way:
            facts = facts[int(step) if isinstance(facts, list) else step]
        facts[int(name) if isinstance(facts, list) else name] = value

    return change


FORGED = [
    ("next_frame", -1), ("next_frame", 1.5), ("next_frame", "90"), ("next_frame", True), ("next_frame", 2**64 - 1 + 0.5), ("next_frame", 3), ("reset_at", 91),
    ("epoch", None), ("forgotten", 200), ("created", -1.0), ("used", "now"), ("session", None), ("width", 0), ("width", 2**64 - 1), ("classes", 0), ("kept", 2),
    ("kept", 2**64 - 1), ("timed", False), ("options", []), ("options.top_k", -1), ("options.scores", "some"), ("options.fps", 0), ("options.unknown", 1),
    ("options.fps", -5), ("unknown", 1), ("progress.unknown", 1), ("progress.resampler", None), ("progress.resampler.started", 1e6),
    ("progress.resampler.time", -1.0), ("progress.resampler.step", -1), ("progress.resampler.last", [0.0]), ("progress.resampler.last", "x"),
    ("progress.resampler.origin", None), ("progress.latest", None), ("progress.latest", [0.1]), ("progress.moments", []), ("progress.moments", [[-1, 0.0]]),
    ("progress.detector", None), ("progress.detector.label", "nobody"), ("progress.detector.rows", -1), ("progress.detector.start", 1000),
    ("progress.detector.total", "1"), ("progress.detector.candidate", "wave"), ("progress.detector.gone", 1.5), ("progress.detector.unknown", 0),
    ("events.0.label", "nobody"), ("events.0.decided", 1000), ("events.0.frame", 89), ("events.0.event", "pause"), ("events.0.cause", "boredom"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), FORGED, ids=[f"{path}={value!r:.20}" for path, value in FORGED])
def test_forged_facts_are_refused(path: str, value: Any) -> None:
    forged(lambda facts: None)  # as it is, it is taken up
    with pytest.raises((Malformed, WrongShape, NotFinite), match=r"session record|option|must be"):
        forged(put(path, value))


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"{", b"null", b'{"created": NaN}', b"\xff\xfe", b"[" * 100_000])
def test_facts_that_are_no_record(text: bytes) -> None:
    with pytest.raises(Malformed):
        forged(lambda facts: text)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"null"])
def test_facts_are_finite(number: bytes) -> None:
    def change(facts: Any) -> bytes:
        facts["progress"]["latest"] = ["here", 0.1, 0.2, 0.3]
        return bytes(orjson.dumps(facts)).replace(b'"here"', number)

    with pytest.raises(Malformed, match="latest"):
        forged(change)


def altered(error: type[ServiceError], **changes: Any) -> ServiceError:
    record = dataclasses.replace(Record.from_bytes(GOOD), **changes)
    with pytest.raises(error) as caught:
        Record.from_bytes(record.to_bytes()).check(EVENTS)
    return caught.value


def test_width_and_finiteness() -> None:
    good = Record.from_bytes(GOOD)
    for bad in (np.nan, np.inf, -np.inf):
        row, scores = good.row.copy(), good.scores.copy()
        row[5] = scores[-1, 2] = bad
        assert "state" in altered(NotFinite, row=row).message
        assert "kept answers" in altered(NotFinite, scores=scores).message
    assert good.times is not None
    assert "kept times" in altered(NotFinite, times=good.times * np.nan).message
    assert "a state of 34" in altered(WrongShape, row=good.row[:-1]).message
    assert "answers of 3 classes" in altered(WrongShape, scores=good.scores[:, :3].copy()).message


def test_records_of_other_models_are_refused() -> None:
    assert altered(FingerprintMismatch, fingerprint=PLAIN.fingerprint).facts == {"fingerprint": PLAIN.fingerprint, "served": EVENTS.fingerprint}
    other: Any = dataclasses.replace(EVENTS, fps=30.0)
    with pytest.raises(FingerprintMismatch, match="rate, classes or rules"):
        Record.from_bytes(GOOD).check(other)


@pytest.mark.parametrize(
    "changes",
    [{"fps": 30.0}, {"classes": ("a", "b", "c", "d")}, {"events": None}, {"missing": False}, {"frame_shape": (1, 3)}],
    ids=lambda changes: next(iter(changes)),
)
def test_the_digest_knows_what_a_stream_depends_on(changes: Any) -> None:
    assert manifest_digest(dataclasses.replace(EVENTS, **changes)) != manifest_digest(EVENTS)
    assert manifest_digest(dataclasses.replace(EVENTS, made_by="somebody else")) == manifest_digest(EVENTS)


def test_rules_that_are_not_pooled_have_the_digest_of_before_there_were_pooled_ones() -> None:
    """So that a record goes on after the service was renewed; a record from then has no sums of a run."""
    rules = EVENTS.events
    assert rules is not None
    fields = [EVENTS.task, EVENTS.frame_shape, EVENTS.layout, EVENTS.fps, EVENTS.classes, EVENTS.missing, EVENTS.state_width]
    before = [*fields, (rules.nothing, rules.enter, rules.leave, rules.least, rules.gap)]
    assert manifest_digest(EVENTS) == hashlib.blake2b(orjson.dumps(before), digest_size=16).hexdigest()
    pooled = dataclasses.replace(EVENTS, events=dataclasses.replace(rules, nothing=EVENTS.classes[0], pooled=True))
    apart = dataclasses.replace(EVENTS, events=dataclasses.replace(rules, nothing=EVENTS.classes[0]))
    assert manifest_digest(pooled) != manifest_digest(apart)
    state = EventState(candidate="a", run=1)
    assert EventState.from_dict({name: value for name, value in state.to_dict().items() if name != "run_sums"}) == state


@pytest.mark.parametrize("toy", [CHANNELS, GAPPY_GESTURES], ids=["plain", "events"])
def test_missing_values_only_where_the_model_admits_them(toy: Toy) -> None:
    manifest = dataclasses.replace(EVENTS, missing=toy.missing)
    record = dataclasses.replace(Record.from_bytes(GOOD), manifest=manifest_digest(manifest))
    record.progress["resampler"]["last"][1] = None
    if toy.missing:
        record.check(manifest)
    else:
        with pytest.raises(NotFinite, match="last frame"):
            record.check(manifest)
