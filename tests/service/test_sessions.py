from __future__ import annotations

import time

import numpy as np
import pytest

from service.errors import AnswersForgotten, Empty, Gap, SessionExpired, SessionNotFound, TooMany
from service.options import Options
from service.progress import Progress
from service.sessions import Answers, Cause, Rows, Session, Sessions, digest
from tests import toy_models

MANIFEST = toy_models.manifest_of(toy_models.CHANNELS, toy_models.build(toy_models.CHANNELS), "toy")


def scores(first: int, count: int, classes: int = 2) -> np.ndarray:
    return np.repeat(np.arange(first, first + count, dtype=np.float32)[:, None], classes, axis=1)


def session(rows: Rows | None = None) -> Session:
    return Session("toy", "1", rows.take() if rows else 1, 2, Options(), Progress(MANIFEST, MANIFEST.fps))


def test_rows_begin_with_zeros_and_are_given_back_once() -> None:
    rows = Rows(3)
    row = rows.take()
    rows.scatter([row], np.ones((1, 3), np.float32))
    rows.give(row)
    with pytest.raises(KeyError):
        rows.give(row)
    with pytest.raises(KeyError):
        rows.give(Rows.ZERO)
    assert rows.take() == row
    assert not rows.gather([row, Rows.ZERO]).any()


def test_rows_grow_and_keep_what_they_hold() -> None:
    rows = Rows(2)
    taken = [rows.take() for _ in range(1000)]
    assert len(set(taken)) == 1000
    assert Rows.ZERO not in taken
    values = np.arange(2000, dtype=np.float32).reshape(1000, 2)
    rows.scatter(taken, values)
    for _ in range(2000):
        rows.take()
    np.testing.assert_array_equal(rows.gather(taken), values)
    assert rows.taken == 3000


def test_answers_are_kept_up_to_the_limit() -> None:
    answers = Answers(2)
    assert answers.limit == 64
    for first in range(0, 100, 5):
        answers.add(scores(first, 5).tobytes())
    assert (answers.start, answers.end, answers.room) == (36, 100, 0)
    np.testing.assert_array_equal(answers.get(38, 99), scores(38, 61))
    with pytest.raises(AnswersForgotten):
        answers.get(35, 40)
    answers.forget(98)
    np.testing.assert_array_equal(answers.get(98, 100), scores(98, 2))
    assert answers.room


def test_times_are_kept_with_the_scores_of_their_frames() -> None:
    answers = Answers(2)
    for first in range(0, 100, 5):
        answers.add(scores(first, 5).tobytes(), np.arange(first, first + 5) / 7)
    np.testing.assert_array_equal(answers.times(38, 99), np.arange(38, 99) / 7)  # type: ignore[arg-type]
    answers.forget(98)
    np.testing.assert_array_equal(answers.times(98, 100), np.arange(98, 100) / 7)  # type: ignore[arg-type]
    with pytest.raises(AnswersForgotten):
        answers.times(97, 99)
    plain = Answers(2)
    plain.add(scores(0, 5).tobytes())
    assert plain.times(0, 5) is None


def test_wide_answers_are_limited_by_bytes() -> None:
    assert Answers(4096).limit == 16
    assert Answers(10**6).limit == 1


def test_one_large_message_keeps_its_end() -> None:
    answers = Answers(2)
    answers.add(scores(0, 500).tobytes())
    assert (answers.start, answers.end) == (436, 500)


def test_the_table_of_numbered_frames() -> None:
    one = session()
    one.answers.add(scores(0, 10).tobytes())
    assert one.known(10, 5) == 0
    assert one.known(8, 5) == 2
    assert one.known(3, 5) == 5
    with pytest.raises(Empty):
        one.known(10, 0)
    with pytest.raises(Gap, match="frames 10 to 11 are missing") as caught:
        one.known(12, 1)
    assert caught.value.facts == {"next_frame": 10}


def test_a_reset_has_a_place() -> None:
    one = session()
    one.answers.add(scores(0, 10).tobytes())
    with pytest.raises(Gap):
        one.reset(9)
    assert one.reset(10)
    assert not one.reset(10)  # repeating it does nothing
    one.answers.add(scores(10, 1).tobytes())
    with pytest.raises(Gap):
        one.reset(10)
    assert one.reset(11)


def test_sessions_end_once_with_one_cause() -> None:
    ended: list[tuple[Session, Cause]] = []
    sessions = Sessions(2, 600, lambda one, cause: ended.append((one, cause)))
    one, other = session(), session()
    sessions.add(one)
    sessions.add(other)
    with pytest.raises(TooMany):
        sessions.check_room()
    sessions.end(one, "closed")
    sessions.end(one, "expired")
    assert ended == [(one, "closed")]
    sessions.check_room()
    with pytest.raises(SessionNotFound):
        sessions.find(one.id)
    assert sessions.find(other.id) is other


def test_expired_sessions_are_remembered() -> None:
    sessions = Sessions(10, 0.05, lambda one, cause: None)
    one, fresh = session(), session()
    sessions.add(one)
    sessions.add(fresh)
    one.used = time.monotonic() - 1
    assert sessions.expire() == [one]
    with pytest.raises(SessionExpired):
        sessions.find(one.id)
    with pytest.raises(SessionExpired):
        sessions.check_live(one)
    assert sessions.find(fresh.id) is fresh


def test_old_sessions_expire_under_a_cause_of_their_own() -> None:
    ended: list[Cause] = []
    sessions = Sessions(10, 60, lambda one, cause: ended.append(cause), age_s=100)
    old, idle, fresh = session(), session(), session()
    for one in (old, idle, fresh):
        sessions.add(one)
    old.began -= 101  # used just now
    idle.began -= 61
    idle.used -= 61
    assert sessions.expires_in_s(old) == sessions.expires_in_s(idle) == 0
    assert sessions.expires_in_s(fresh) == pytest.approx(60, abs=5)
    fresh.began -= 70
    assert sessions.expires_in_s(fresh) == pytest.approx(30, abs=5)
    assert sessions.expire() == [old, idle]
    assert ended == ["aged", "expired"]
    with pytest.raises(SessionExpired, match="at the age of 100 s"):
        sessions.find(old.id)
    with pytest.raises(SessionExpired, match="after 60 s without a message"):
        sessions.find(idle.id)


def test_ids_are_secrets_and_digests_are_not() -> None:
    ids = {session().id for _ in range(100)}
    assert len(ids) == 100
    assert all(len(one) >= 22 for one in ids)  # 128 bits in base64
    one = session()
    assert one.id not in str(one.facts())
    assert one.digest == digest(one.id)
