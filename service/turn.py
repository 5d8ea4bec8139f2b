"""A session's turn: its messages take effect one after another, and those that waited too long, or for nothing, are told."""

from __future__ import annotations

import time

from service.errors import Deadline, Overloaded, ServiceError, TakenOver
from service.sessions import Owner, Session, Sessions

MOST_QUEUED = 64  # messages of one session that wait for their turn


def give_back(session: Session) -> None:
    session.queued -= 1
    session.turn.release()


class Turn:
    """Waits for the session's turn and checks that there is still something to do in it. A class, because each message passes here:
    `contextlib.asynccontextmanager` takes three times as long."""

    __slots__ = ("_deadline", "_owner", "_session", "_sessions")

    def __init__(self, sessions: Sessions, session: Session, deadline: float, owner: Owner | None) -> None:
        self._sessions = sessions
        self._session = session
        self._deadline = deadline
        self._owner = owner

    async def __aenter__(self) -> None:
        session = self._session
        if session.queued >= MOST_QUEUED:
            raise Overloaded(f"{session.queued} messages of this session are waiting already")
        session.queued += 1
        try:
            await session.turn.acquire()
        except BaseException:
            session.queued -= 1
            raise
        try:
            self._check()
        except ServiceError:
            self._release()
            raise

    def _check(self) -> None:
        session = self._session
        self._sessions.check_live(session)
        if self._owner is not None and session.owner is not self._owner:
            raise TakenOver("another connection has taken this session over", next_frame=session.next_frame)
        now = time.monotonic()
        if now > self._deadline:
            raise Deadline("the message waited too long for earlier messages of its session")
        session.used = now

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._session.used = time.monotonic()
        self._release()

    def _release(self) -> None:
        give_back(self._session)
