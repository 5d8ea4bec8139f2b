"""A store in this process: what the others are measured against, and for tests. It loses everything with its process.

Several owners share it by sharing `records`: `MemoryStore(settings, first.records)`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from service.errors import SessionNotFound, StartupError
from service.store import LEAST_MARK_S, Attached, Checkpoint, Mark, Outcome, StoreSettings, check_batch, decide, key


@dataclass(slots=True)
class Held:
    """One session in the store."""

    mark: Mark
    record: bytes | None
    created: float  # on the store's clock
    expires: float


Records = dict[str, Held]  # by `key`


class MemoryStore:
    """As `Store`. Its only durability is `memory`."""

    def __init__(self, settings: StoreSettings, records: Records | None = None, clock: Callable[[], float] = time.time) -> None:
        self.settings = settings
        self.records: Records = {} if records is None else records
        self._clock = clock

    async def start(self) -> None:
        if self.settings.durability != "memory":
            raise StartupError(f"a store in memory cannot make records {self.settings.durability}: name a file or a server, or ask for durability memory")

    async def attach(self, session_id: str, *, create: bool = True) -> Attached:
        held = self._find(session_id)
        if held is None or held.mark.ended:
            if not create:
                raise SessionNotFound("no such session: the store does not have it, or it was ended")
            epoch = 1 if held is None else held.mark.epoch + 1
            held = self.records[key(session_id)] = Held(Mark(epoch, self.settings.owner), None, self._clock(), 0.0)
        else:
            held.mark = Mark(held.mark.epoch + 1, self.settings.owner)
        self._keep(held)
        return Attached(held.mark.epoch, held.record)

    async def load(self, session_id: str) -> Attached | None:
        held = self._find(session_id)
        return None if held is None or held.mark.ended else Attached(held.mark.epoch, held.record)

    async def save(self, checkpoints: Sequence[Checkpoint]) -> list[Outcome]:
        check_batch([one.session_id for one in checkpoints])
        return [self._save(one) for one in checkpoints]

    def _save(self, checkpoint: Checkpoint) -> Outcome:
        held = self._find(checkpoint.session_id)
        outcome = decide(None if held is None else held.mark, checkpoint, self.settings.owner)
        if outcome is Outcome.SAVED:
            mark = Mark(checkpoint.epoch, self.settings.owner, checkpoint.next_frame, checkpoint.sequence)
            created = self._clock() if held is None or held.mark.ended else held.created
            held = self.records[key(checkpoint.session_id)] = Held(mark, checkpoint.record, created, 0.0)
            self._keep(held)
        return outcome

    async def touch(self, session_ids: Sequence[str]) -> list[str]:
        check_batch(session_ids)
        absent = []
        for session_id in session_ids:
            held = self._find(session_id)
            if held is None or held.mark.ended:
                absent.append(session_id)
            else:
                self._keep(held)
        return absent

    async def end(self, session_id: str, epoch: int) -> bool:
        held = self._find(session_id)
        if held is not None and not held.mark.may_end(epoch, self.settings.owner):
            return False
        last = epoch if held is None else max(epoch, held.mark.epoch)
        now = self._clock()
        self.records[key(session_id)] = Held(Mark(last, self.settings.owner, ended=True), None, now, now + max(self.settings.idle_s, LEAST_MARK_S))
        return True

    async def ping(self) -> None:
        return

    async def close(self) -> None:
        return

    def _find(self, session_id: str) -> Held | None:
        held = self.records.get(key(session_id))
        if held is not None and held.expires <= self._clock():
            del self.records[key(session_id)]
            return None
        return held

    def _keep(self, held: Held) -> None:
        held.expires = self._clock() + self.settings.idle_s
        if self.settings.age_s is not None:
            held.expires = min(held.expires, held.created + self.settings.age_s)
