"""A store in one SQLite file on this machine: a restart of the service resumes its sessions, and several processes may share it.

One thread of each store does all reading and writing; what would queue up behind it beyond `MOST_QUEUED` calls is refused. The file must lie on a local
disk: its write-ahead log is shared memory.

`memory`: the operating system holds the record (no write is waited for); a crash of the service loses nothing, one of the machine the latest seconds.
`fsynced`: every save waits for the disk. `replicated` is not to be had.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from service.errors import SessionNotFound, StartupError, StoreUnavailable
from service.store import LEAST_MARK_S, Attached, Checkpoint, Mark, Outcome, StoreSettings, check_batch, decide, key

APPLICATION = 0x49524E4E  # says whose file it is
VERSION = 1  # of the table below
MOST_QUEUED = 64  # calls, each of at most one batch
START_WITHIN_S = 60.0  # the whole file is checked
_AGAIN_S = 0.005
_PURGE_S = 10.0
_PLACE = struct.Struct(">QQ")  # next_frame and sequence: SQLite's own integers have a sign
_TABLE = """
CREATE TABLE sessions (
    key BLOB PRIMARY KEY, epoch INTEGER NOT NULL, owner TEXT NOT NULL, place BLOB NOT NULL, ended INTEGER NOT NULL,
    created REAL NOT NULL, expires REAL NOT NULL, record BLOB
);
CREATE INDEX sessions_expire ON sessions (expires);
"""

T = TypeVar("T")


class SqliteStore:
    """As `Store`."""

    def __init__(self, settings: StoreSettings, path: Path) -> None:
        self.settings = settings
        self._path = path
        self._thread = ThreadPoolExecutor(1, "store-sqlite")
        self._database: sqlite3.Connection | None = None  # the thread's
        self._patience_s = 0.8 * settings.timeout_s  # with other processes at the file, within the time of a call
        self._places = threading.Semaphore(MOST_QUEUED)
        self._purge_at = 0.0

    async def start(self) -> None:
        if self.settings.durability == "replicated":
            raise StartupError(f"a file has no replica: sessions in {self._path} can be memory or fsynced")
        try:
            await self._call(lambda database: None, within_s=START_WITHIN_S)
        except StoreUnavailable as error:
            if isinstance(error.__cause__, StartupError):
                raise error.__cause__ from None
            raise

    async def attach(self, session_id: str, *, create: bool = True) -> Attached:
        def work(database: sqlite3.Connection) -> Attached | None:
            with _transaction(database):
                now = time.time()
                found = _find(database, session_id, now)
                if found is None or found[0].ended:
                    if not create:
                        return None
                    mark = Mark(1 if found is None else found[0].epoch + 1, self.settings.owner)
                    self._write(database, session_id, mark, now, now, None)
                    return Attached(mark.epoch, None)
                mark = Mark(found[0].epoch + 1, self.settings.owner)
                database.execute(
                    "UPDATE sessions SET epoch = ?, owner = ?, place = ?, expires = ? WHERE key = ?",
                    (mark.epoch, mark.owner, _PLACE.pack(0, 0), self._expires(found[1], now), _key(session_id)),
                )
                return Attached(mark.epoch, _record(database, session_id))

        attached = await self._call(work)
        if attached is None:
            raise SessionNotFound("no such session: the store does not have it, or it was ended")
        return attached

    async def load(self, session_id: str) -> Attached | None:
        def work(database: sqlite3.Connection) -> Attached | None:
            with _transaction(database, write=False):
                found = _find(database, session_id, time.time())
                return None if found is None or found[0].ended else Attached(found[0].epoch, _record(database, session_id))

        return await self._call(work)

    async def save(self, checkpoints: Sequence[Checkpoint]) -> list[Outcome]:
        check_batch([one.session_id for one in checkpoints])

        def work(database: sqlite3.Connection) -> list[Outcome]:
            with _transaction(database):
                now = time.time()
                self._purge(database, now)
                return [self._save(database, one, now) for one in checkpoints]

        return await self._call(work) if checkpoints else []

    def _save(self, database: sqlite3.Connection, checkpoint: Checkpoint, now: float) -> Outcome:
        found = _find(database, checkpoint.session_id, now)
        outcome = decide(None if found is None else found[0], checkpoint, self.settings.owner)
        if outcome is Outcome.SAVED:
            created = now if found is None or found[0].ended else found[1]
            mark = Mark(checkpoint.epoch, self.settings.owner, checkpoint.next_frame, checkpoint.sequence)
            self._write(database, checkpoint.session_id, mark, created, now, checkpoint.record)
        return outcome

    async def touch(self, session_ids: Sequence[str]) -> list[str]:
        check_batch(session_ids)

        def work(database: sqlite3.Connection) -> list[str]:
            absent = []
            with _transaction(database):
                now = time.time()
                for session_id in session_ids:
                    found = _find(database, session_id, now)
                    if found is None or found[0].ended:
                        absent.append(session_id)
                    else:
                        database.execute("UPDATE sessions SET expires = ? WHERE key = ?", (self._expires(found[1], now), _key(session_id)))
            return absent

        return await self._call(work) if session_ids else []

    async def end(self, session_id: str, epoch: int) -> bool:
        def work(database: sqlite3.Connection) -> bool:
            with _transaction(database):
                now = time.time()
                found = _find(database, session_id, now)
                held = None if found is None else found[0]
                if held is not None and not held.may_end(epoch, self.settings.owner):
                    return False
                mark = Mark(epoch if held is None else max(epoch, held.epoch), self.settings.owner, ended=True)
                self._write(database, session_id, mark, now, now, None)
                return True

        return await self._call(work)

    async def ping(self) -> None:
        await self._call(lambda database: database.execute("SELECT 1 FROM sessions LIMIT 1").fetchall())

    async def close(self) -> None:
        def work() -> None:
            if self._database is not None:
                self._database.close()
                self._database = None

        with contextlib.suppress(TimeoutError, RuntimeError):  # it is stuck; or closed already
            async with asyncio.timeout(self.settings.timeout_s):
                await asyncio.get_running_loop().run_in_executor(self._thread, work)
        self._thread.shutdown(wait=False, cancel_futures=True)

    # Inside

    async def _call(self, work: Callable[[sqlite3.Connection], T], within_s: float | None = None) -> T:
        """Does the work in the thread, for at most `timeout_s`; what had not begun by then is not done, but keeps its place."""
        if not self._places.acquire(blocking=False):
            raise StoreUnavailable(f"{MOST_QUEUED} calls wait for the file of sessions already: its disk is too slow")
        given_up = threading.Event()
        try:
            running = asyncio.wrap_future(self._thread.submit(self._work, work, given_up))
        except RuntimeError:
            self._places.release()
            raise StoreUnavailable("the store of sessions is closed") from None
        running.add_done_callback(lambda done: done.cancelled() or done.exception())  # also if nobody waits for it any more
        within_s = within_s or self.settings.timeout_s
        try:
            async with asyncio.timeout(within_s):
                return await asyncio.shield(running)
        except TimeoutError:
            raise StoreUnavailable(f"the file of sessions did not answer within {within_s:g} s") from None
        finally:
            given_up.set()

    def _work(self, work: Callable[[sqlite3.Connection], T], given_up: threading.Event) -> T:
        try:
            if given_up.is_set():
                raise StoreUnavailable("too late")
            if self._database is None:
                self._database = self._open()
            return work(self._database)
        except StartupError as error:
            raise StoreUnavailable(str(error)) from error
        except sqlite3.Error as error:
            raise StoreUnavailable(f"the file of sessions {self._path}: {error}") from error
        finally:
            self._places.release()

    def _open(self) -> sqlite3.Connection:
        """Raises `StartupError` for a file that is none of ours, `sqlite3.Error` for one that is locked."""
        try:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))  # records hold ids, which are keys to sessions
        except OSError as error:
            raise StartupError(f"sessions cannot be kept in {self._path}: {error.strerror}") from None
        database = sqlite3.connect(self._path, timeout=self._patience_s, isolation_level=None)
        try:
            self._prepare(database)
        except BaseException:
            database.close()
            raise
        return database

    def _prepare(self, database: sqlite3.Connection) -> None:
        try:
            with _transaction(database, write=False):  # another process may be making it
                self._check_ours(database)  # before anything is written
            if self._write_ahead(database) != "wal":
                raise StartupError(f"sessions cannot be kept in {self._path}: no write-ahead log there; is it on a network file system?")
            database.execute(f"PRAGMA synchronous = {'FULL' if self.settings.durability == 'fsynced' else 'NORMAL'}")
            with _transaction(database):
                if self._check_ours(database):  # nobody was faster
                    for statement in _TABLE.strip().split(";")[:-1]:
                        database.execute(statement)
                    database.execute(f"PRAGMA application_id = {APPLICATION}")
                    database.execute(f"PRAGMA user_version = {VERSION}")
            [fault] = database.execute("PRAGMA quick_check(1)").fetchone()
            if fault != "ok":
                raise StartupError(f"{self._path} is damaged ({fault}): move it away, and the service begins a new one")
        except sqlite3.OperationalError:
            raise  # locked, full, read-only: may pass
        except sqlite3.DatabaseError as error:
            raise StartupError(f"{self._path} cannot be read ({error}): move it away, and the service begins a new one") from None

    def _write_ahead(self, database: sqlite3.Connection) -> str:
        """Turns the log on and returns its mode. SQLite does not wait for another process in this one statement: it says at once that the file is locked."""
        until = time.monotonic() + self._patience_s
        while True:
            try:
                [mode] = database.execute("PRAGMA journal_mode = WAL").fetchone()
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                    raise
                time.sleep(_AGAIN_S)
            else:
                return str(mode)

    def _check_ours(self, database: sqlite3.Connection) -> bool:
        """Whether the file is empty; raises `StartupError` for what others wrote."""
        questions = ("SELECT count(*) FROM sqlite_master", "PRAGMA application_id", "PRAGMA user_version")
        [tables], [application], [version] = (database.execute(question).fetchone() for question in questions)
        if (application, version, tables) == (0, 0, 0):
            return True
        if application != APPLICATION:
            raise StartupError(f"{self._path} is a database of something else: name another file for sessions")
        if version != VERSION:
            raise StartupError(f"{self._path} has sessions in version {version}, this service reads {VERSION}: name another file")
        return False

    def _write(self, database: sqlite3.Connection, session_id: str, mark: Mark, created: float, now: float, record: bytes | None) -> None:
        expires = now + max(self.settings.idle_s, LEAST_MARK_S) if mark.ended else self._expires(created, now)
        place = _PLACE.pack(mark.next_frame, mark.sequence)
        database.execute(
            "INSERT OR REPLACE INTO sessions (key, epoch, owner, place, ended, created, expires, record) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (_key(session_id), mark.epoch, mark.owner, place, mark.ended, created, expires, record),
        )

    def _expires(self, created: float, now: float) -> float:
        return now + self.settings.idle_s if self.settings.age_s is None else min(now + self.settings.idle_s, created + self.settings.age_s)

    def _purge(self, database: sqlite3.Connection, now: float) -> None:
        if now >= self._purge_at:
            database.execute("DELETE FROM sessions WHERE expires <= ?", (now,))
            self._purge_at = now + _PURGE_S


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection, *, write: bool = True) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE" if write else "BEGIN")  # what is read may be written: nobody comes between
    try:
        yield
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


def _key(session_id: str) -> bytes:
    return bytes.fromhex(key(session_id))


def _find(database: sqlite3.Connection, session_id: str, now: float) -> tuple[Mark, float] | None:
    """Who wrote last, and when the session was first stored; None if it is not there, or has expired."""
    row = database.execute("SELECT epoch, owner, place, ended, created FROM sessions WHERE key = ? AND expires > ?", (_key(session_id), now)).fetchone()
    if row is None:
        return None
    epoch, owner, place, ended, created = row
    next_frame, sequence = _PLACE.unpack(place)
    return Mark(epoch, owner, next_frame, sequence, bool(ended)), created


def _record(database: sqlite3.Connection, session_id: str) -> bytes | None:
    [record] = database.execute("SELECT record FROM sessions WHERE key = ?", (_key(session_id),)).fetchone()
    return record  # type: ignore[no-any-return]
