"""The books of a stream without a socket: what is written when, what is sent again, which answers count."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from service import protocol
from service.client_ledger import Ledger, as_frames
from service.errors import Empty, Gap, WrongShape

SHAPE = (2,)


def ledger(next_frame: int = 0, read: int | None = None, window: int = 8, **options: Any) -> Ledger:
    made = Ledger(next_frame, next_frame if read is None else read, window, **options)
    made.resume(next_frame)
    return made


def put(books: Ledger, count: int) -> None:
    first = books.next_frame
    books.put(np.arange(2 * first, 2 * (first + count), dtype=np.float32).reshape(count, 2))


def written(books: Ledger) -> list[Any]:
    """All that may be written now: ("frames", first, count), ("ack", first), ("reset", at), ("close",); frames hold what `put` gave them."""
    messages: list[Any] = []
    while (message := books.message()) is not None:
        if isinstance(message, str):
            messages.append(tuple(json.loads(message).values()))
            continue
        _, kind, _, count, first = protocol.HEADER.unpack_from(message)
        if kind == protocol.KIND_FRAMES:
            np.testing.assert_array_equal(np.frombuffer(message, "<f4", offset=protocol.HEADER.size), np.arange(2 * first, 2 * (first + count)))
        messages.append(("frames", first, count) if kind == protocol.KIND_FRAMES else ("ack", first))
    return messages


def read(books: Ledger, *frames: int) -> None:
    for frame in frames:
        books.mark_read(frame)


def test_everything_is_written_once_and_in_order() -> None:
    books = ledger()
    put(books, 2)
    assert written(books) == [("frames", 0, 2)]
    books.reset()
    put(books, 1)
    books.close()
    assert written(books) == [("reset", 2), ("frames", 2, 1), ("close",)]
    assert written(books) == []


def test_nothing_follows_the_farewell() -> None:
    books = ledger()
    put(books, 4)
    books.close()
    assert written(books) == [("frames", 0, 4), ("close",)]
    read(books, *books.take(0, 4))
    assert written(books) == []


def test_the_window_counts_what_is_not_read() -> None:
    books = ledger(window=4)
    assert books.fits(4)
    put(books, 3)
    assert not books.fits(2)
    answers = books.take(0, 3)
    assert not books.fits(2)
    read(books, answers[0])
    assert books.fits(2)


def test_acks_come_by_quarters_or_where_credit_is_needed() -> None:
    books = ledger(window=16)
    put(books, 16)
    assert written(books) == [("frames", 0, 16)]
    read(books, *books.take(0, 16)[:3])
    assert written(books) == []
    put(books, 2)
    assert written(books) == [("ack", 3), ("frames", 16, 2)]
    read(books, 3, 4, 5, 6)
    assert written(books) == [("ack", 7)]


@pytest.mark.parametrize(
    ("taken", "again"),
    [(0, [("frames", 0, 3), ("reset", 3), ("frames", 3, 2)]), (2, [("frames", 2, 1), ("reset", 3), ("frames", 3, 2)]),
     (3, [("reset", 3), ("frames", 3, 2)]), (4, [("frames", 4, 1)]), (5, [])],
)  # fmt: skip
def test_a_server_that_comes_back_gets_what_it_has_not_taken(taken: int, again: list[Any]) -> None:
    books = ledger()
    put(books, 3)
    books.reset()
    put(books, 2)
    written(books)
    books.resume(taken)
    assert written(books) == again
    books.resume(taken)
    put(books, 1)
    assert written(books) == [*again, ("frames", 5, 1)]


def test_an_ack_is_said_again_to_a_new_connection() -> None:
    books = ledger()
    put(books, 8)
    written(books)
    read(books, *books.take(0, 8))
    books.resume(8)  # whether or not it was written to the old one
    put(books, 1)
    assert written(books) == [("ack", 8), ("frames", 8, 1)]


def test_answers_that_come_again_are_not_new() -> None:
    books = ledger()
    put(books, 6)
    assert books.take(0, 4) == [0, 1, 2, 3]
    books.resume(4)
    assert books.take(0, 4) == []
    assert books.take(2, 4) == [4, 5]
    assert books.received == 6


def test_one_answer_for_each_message_whatever_a_server_that_comes_back_sends() -> None:
    books = ledger(every=False, window=64)
    for count in (8, 8, 4):
        put(books, count)
    books.take(7, 1)
    books.resume(16)
    assert books.take(0, 16) == [15]
    assert books.take(16, 4) == [19]
    opened = ledger(next_frame=16, read=0, every=False, window=64)
    assert opened.take(15, 1) == [15]


def test_a_server_that_lost_too_much_or_knows_too_much_is_refused() -> None:
    books = ledger()
    put(books, 4)
    read(books, *books.take(0, 4))
    put(books, 2)
    for taken in (3, 7):
        with pytest.raises(Gap, match="this client has frames 4 to 6"):
            books.resume(taken)
    books.resume(4)


def test_what_is_not_durable_is_kept_and_sent_again_within_the_credit() -> None:
    books = ledger(window=4)
    books.secure(0)
    for first in (0, 2, 4, 6):
        put(books, 2)
        written(books)
        read(books, *books.take(first, 2))
    books.resume(0)
    assert written(books) == [("frames", 0, 2), ("frames", 2, 2)]
    assert books.take(0, 2) == []
    assert written(books) == [("ack", 2), ("frames", 4, 2)]
    books.secure(6)
    with pytest.raises(Gap):
        books.resume(4)
    books.resume(6)


def test_a_reset_is_kept_until_something_after_it_was_answered() -> None:
    books = ledger()
    put(books, 1)
    books.reset()
    read(books, *books.take(0, 1))
    books.resume(1)
    assert ("reset", 1) in written(books)
    put(books, 1)
    read(books, *books.take(1, 1))
    books.resume(2)
    assert written(books) == [("ack", 2)]


def test_a_reset_is_kept_while_only_what_came_before_it_was_answered() -> None:
    books = ledger()
    put(books, 1)
    books.reset()
    put(books, 2)
    written(books)
    read(books, *books.take(0, 1))
    books.resume(1)  # the connection was lost before the server read the reset, or before its answer came
    assert written(books) == [("reset", 1), ("frames", 1, 2)]
    read(books, *books.take(1, 1))
    books.resume(2)
    assert written(books) == [("ack", 2), ("frames", 2, 1)]


def test_resets_at_one_place_are_one() -> None:
    books = ledger()
    put(books, 1)
    for _ in range(3):
        books.reset()
    assert written(books) == [("frames", 0, 1), ("reset", 1)]
    books.reset()
    assert written(books) == []
    put(books, 1)
    books.reset()
    assert written(books) == [("frames", 1, 1), ("reset", 2)]


def test_answers_that_will_not_come_hold_up_nothing() -> None:
    books = ledger(next_frame=20, read=0)
    assert not books.fits(1)
    books.forgo(20)
    assert books.fits(8)
    late = ledger(next_frame=20, read=0)
    late.forgo(18)
    read(late, *late.take(18, 2))
    assert late.read == 20


def test_frames_are_checked_and_copied() -> None:
    buffer = np.zeros((3, 2), np.float32)
    frames = as_frames(buffer, SHAPE)
    buffer[:] = 1
    assert not frames.any()
    assert as_frames([1, 2], SHAPE).shape == (1, 2)
    for wrong in (0.5, [1, 2, 3], np.zeros((2, 2, 2))):
        with pytest.raises(WrongShape, match="expected frames of shape"):
            as_frames(wrong, SHAPE)
    with pytest.raises(Empty):
        as_frames(np.zeros((0, 2)), SHAPE)


# Where a server may die


def answered(books: Ledger, count: int) -> None:
    """So many frames go, and their answers come and are read."""
    for first in range(books.next_frame, books.next_frame + count):
        put(books, 1)
        written(books)
        read(books, *books.take(first, 1))


def test_frames_are_kept_until_they_are_durable_and_a_horizon_longer() -> None:
    books = ledger()
    books.agree(True, 3, 100)
    answered(books, 20)
    books.resume(0)
    books.secure(12)
    with pytest.raises(Gap, match="frames 9 to 20"):
        books.resume(8)
    books.resume(9)
    books.secure(5)  # an older promise takes nothing back
    with pytest.raises(Gap):
        books.resume(8)
    books.secure(20)
    with pytest.raises(Gap):
        books.resume(16)
    books.resume(17)


def test_a_server_without_a_store_is_believed_to_remember_but_for_the_horizon() -> None:
    books = ledger()
    books.agree(False, 2, 100)
    answered(books, 10)
    books.resume(8)
    with pytest.raises(Gap):
        books.resume(7)
    books.agree(True, 0, 100)  # the next one has a store, which need not have what the one before had
    answered(books, 10)
    books.resume(8)


def test_no_more_is_kept_than_was_allowed_and_older_frames_go_first() -> None:
    books = ledger(window=4)
    books.agree(True, 1000, 10)
    answered(books, 10)
    assert not books.fits(1)
    assert books.brims(1)
    books.resume(0)
    written(books)
    books.secure(6)
    assert books.fits(4)
    books.resume(0)  # the horizon has the room that is left
    read(books, *books.take(0, 10))
    answered(books, 4)
    with pytest.raises(Gap, match="frames 4 to 14"):
        books.resume(3)
    assert not books.fits(3)


def test_a_session_may_be_begun_anew_while_nothing_was_promised() -> None:
    books = ledger()
    assert not books.whole
    books.agree(True, 0, 100)
    answered(books, 5)
    assert books.whole
    books.secure(1)
    assert not books.whole
    later = ledger(next_frame=3)
    later.agree(True, 0, 100)
    assert not later.whole


def test_another_model_is_shown_the_horizon_again_and_its_answers_are_not_new() -> None:
    books = ledger(window=8)
    books.agree(True, 4, 100)
    answered(books, 10)
    books.secure(8)
    put(books, 2)
    assert books.renew(10, 6) == 6
    assert written(books) == [("frames", 6, 1), ("frames", 7, 1), ("frames", 8, 1), ("frames", 9, 1), ("frames", 10, 2)]
    assert books.take(6, 4) == []
    assert written(books) == [("ack", 10)]
    assert books.take(10, 2) == [10, 11]


def test_what_was_taken_and_not_answered_is_answered_by_the_other_model() -> None:
    books = ledger(window=8)
    books.agree(True, 4, 100)
    answered(books, 3)
    put(books, 4)
    written(books)
    assert books.renew(7, 3) == 3
    assert written(books) == [("frames", 3, 4)]
    assert books.take(3, 4) == [3, 4, 5, 6]


def test_another_model_begins_after_a_reset_and_need_not_be_told_of_it() -> None:
    books = ledger(window=16)
    books.agree(True, 10, 100)
    answered(books, 4)
    books.reset()
    answered(books, 4)
    assert books.renew(8, 0) == 4
    assert written(books) == [("frames", frame, 1) for frame in range(4, 8)]
    books.reset()
    put(books, 2)
    assert books.renew(8, 0) == 8
    assert written(books) == [("frames", 8, 2)]


def test_a_reset_among_frames_that_wait_for_their_answers_is_told_in_its_place() -> None:
    books = ledger(window=16)
    books.agree(True, 2, 100)
    answered(books, 4)
    put(books, 1)
    books.reset()
    put(books, 2)
    written(books)
    assert books.renew(7, 2) == 2
    assert written(books) == [("frames", 2, 1), ("frames", 3, 1), ("frames", 4, 1), ("reset", 5), ("frames", 5, 2)]
