"""What has come for the program and is not read yet: answers and events, each once and in order, and by which model."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from service import protocol
from service.client_ledger import Ledger
from service.client_notices import ModelChanged, Notices, Served
from service.client_values import Answer, Event, OnEvent
from service.detector import KEPT_EVENTS


class Inbox:
    """Of one stream over all its connections. What its listeners raise comes out of the call that told them."""

    def __init__(self, on_event: OnEvent | None, notices: Notices) -> None:
        self.answers: deque[Answer] = deque()
        self.served = Served()  # the model of this connection
        self._answering = Served()  # the model of the latest answer
        self._warm_from = 0
        self._on_event, self._notices = on_event, notices
        self._events: deque[Event] = deque(maxlen=KEPT_EVENTS)  # that were told, without scores; a server that comes back says again what it kept
        self._undelivered: deque[Event] = deque()  # whose answer has not come yet
        self._answered = 0  # frames below have an answer here; those that were forgotten have none

    def begin(self, served: Served, frame: int) -> None:
        """The first connection, from this frame on."""
        self.served = self._answering = served
        self._answered = frame

    def connect(self, served: Served, warm_from: int) -> None:
        """Another connection; if its model is another one as well, that began with nothing at `warm_from`."""
        self.served, self._warm_from = served, warm_from

    def change(self, message: Mapping[str, Any], warm_from: int) -> None:
        """The server says that the model of this connection is another one than before."""
        if self._answering is self.served:  # which is not known: another program has streamed the session until now
            self._answering = Served()
        self.connect(self.served.changed(message), warm_from)

    def take_scores(self, message: bytes, ledger: Ledger, fps: float) -> bool:
        """A binary message came; whether there is news in it. What is no answer, and answers that were here before, change nothing."""
        _, kind, _, count, first = protocol.HEADER.unpack_from(message)
        if kind != protocol.KIND_SCORES or not count:
            return False
        before, scores = ledger.received, np.frombuffer(message, "<f4", offset=protocol.HEADER.size).reshape(count, -1)
        for frame in ledger.take(first, count):
            changed = None
            if self.served is not self._answering:  # what is new on a connection is said by its model
                changed = self._change(frame)
            time = ledger.time(frame)
            answer = Answer.from_scores(frame, frame / fps if time is None else time, scores[frame - first], self._answering.labels)
            if changed is not None or self._undelivered:
                answer = dataclasses.replace(answer, events=self._events_until(frame), changed=changed)
            self.answers.append(answer)
        self._answered = max(self._answered, first + count)
        return ledger.received > before

    def take_event(self, event: Event) -> None:
        """Before the answer to its frame, or it was told before; by a model that is gone, perhaps, which was as sure of it as that model was."""
        known = dataclasses.replace(event, score=0.0)
        if event.decided >= self._answered and known not in self._events:
            self._events.append(known)
            self._undelivered.append(event)
            if self._on_event is not None:
                self._on_event(event)

    def _change(self, frame: int) -> ModelChanged | None:
        before, self._answering = self._answering, self.served
        if before.is_like(self.served):
            return None
        changed = ModelChanged(frame, self.served.version, self.served.fingerprint, min(self._warm_from, frame), self.served.classes)
        self._notices.tell(changed)
        return changed

    def _events_until(self, frame: int) -> tuple[Event, ...]:
        """Those that were decided at or before the frame and belong to no answer yet."""
        events = []
        while self._undelivered and self._undelivered[0].decided <= frame:
            events.append(self._undelivered.popleft())
        return tuple(events)
