"""Answers and events in the order in which servers may send them, and which model they are of."""

from __future__ import annotations

import numpy as np

from service import protocol
from service.client_inbox import Inbox
from service.client_ledger import Ledger
from service.client_notices import ModelChanged, Notice, Notices, Served
from service.client_values import Event

ONE = Served("m", "1", "f1", "classification", ("a", "b"))
TWO = Served("m", "2", "f2", "classification", ("c", "d", "e"))


def start(frame: int, score: float = 0.5) -> Event:
    return Event("start", "a", score, frame, frame, frame / 30)


class Books:
    """An inbox with its ledger, both on their first connection, to which `count` frames were handed over."""

    def __init__(self, count: int) -> None:
        self.told: list[Notice] = []
        self.events: list[Event] = []
        self.ledger = Ledger(window=64)
        self.ledger.resume(0)
        self.ledger.agree(True, 4, 64)
        self.ledger.put(np.zeros((count, 1), np.float32))
        self.inbox = Inbox(self.events.append, Notices(self.told.append))
        self.inbox.begin(ONE, 0)

    def scores(self, first: int, count: int, classes: int = 2) -> bool:
        scores = np.eye(classes, dtype="<f4")[np.zeros(count, int)]
        return self.inbox.take_scores(protocol.write_scores(first, count, scores.tobytes()), self.ledger, 30.0)

    def answered(self) -> list[tuple[int, str | None]]:
        return [(answer.frame, answer.label) for answer in self.inbox.answers]


def test_only_what_is_new_is_news() -> None:
    books = Books(6)
    assert books.scores(0, 3)
    assert not books.scores(0, 3)
    assert books.scores(1, 4)
    assert not books.inbox.take_scores(protocol.HEADER.pack(1, protocol.KIND_ACK, 0, 0, 9), books.ledger, 30.0)
    assert books.answered() == [(frame, "a") for frame in range(5)]


def test_events_are_told_once_whatever_is_run_again() -> None:
    books = Books(6)
    books.inbox.take_event(start(1))
    books.scores(0, 3)
    books.inbox.take_event(start(3))
    for event in (start(1), start(3), start(3, score=0.75), start(4)):  # the server came back with less, and perhaps with another model
        books.inbox.take_event(event)
    books.scores(3, 3)
    assert books.events == [start(1), start(3), start(4)]
    assert [answer.events for answer in books.inbox.answers] == [(), (start(1),), (), (start(3),), (start(4),), ()]


def test_events_of_frames_that_were_answered_are_not_told_again_however_many_there_were() -> None:
    """Nor what another model finds there, which is only being warmed up."""
    books = Books(2000)
    events = [start(frame) for frame in range(1500)]
    for event in events:
        books.inbox.take_event(event)
        books.scores(event.frame, 1)
    for event in (*events, Event("end", "b", 0.5, 700, 700, 700 / 30)):
        books.inbox.take_event(event)
    assert books.events == events


def test_another_model_is_told_before_its_first_answer_and_labels_only_its_own() -> None:
    books = Books(8)
    books.scores(0, 5)
    books.inbox.connect(TWO, 5)
    begin = books.ledger.renew(6, 2)
    books.inbox.change({"version": "2", "fingerprint": "f2", "classes": ["c", "d", "e"]}, begin)
    assert books.told == []
    books.scores(begin, 5 - begin, 3)  # warming up
    assert books.told == []
    books.scores(5, 3, 3)
    assert books.told == [ModelChanged(5, "2", "f2", begin, ("c", "d", "e"))]
    assert books.answered() == [*((frame, "a") for frame in range(5)), *((frame, "c") for frame in range(5, 8))]
    assert [answer.changed for answer in books.inbox.answers] == [*[None] * 5, books.told[0], None, None]


def test_a_server_that_has_the_same_model_is_no_news_and_one_that_has_the_older_again_is() -> None:
    books = Books(8)
    books.scores(0, 2)
    books.inbox.connect(Served(**vars(ONE)), 2)
    books.ledger.resume(2)
    books.scores(2, 2)
    assert books.told == []
    for served, first in ((TWO, 4), (ONE, 6)):
        books.inbox.connect(served, first)
        books.ledger.resume(first)
        books.scores(first, 2, len(served.classes))
    assert [(told.frame, told.version) for told in books.told if isinstance(told, ModelChanged)] == [(4, "2"), (6, "1")]


def test_a_session_whose_model_is_gone_before_this_program_came_is_told_too() -> None:
    books = Books(4)
    books.inbox.change({"version": "2", "fingerprint": "f2", "classes": ["c", "d", "e"]}, 0)
    books.scores(0, 1, 3)
    assert books.told == [ModelChanged(0, "2", "f2", 0, ("c", "d", "e"))]
