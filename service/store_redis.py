"""A store on a server that many replicas share: Valkey 8 or Redis 7.2 and newer, alone, behind Sentinel, or as a Cluster; package `redis` (extra `redis`).

    redis://[user:password@]host:port[/db]                              rediss:// for TLS, ?ssl_ca_certs=FILE for an authority of one's own
    redis+sentinel://[user:password@]host:port,host:port/primary[/db]   ?sentinel_password= where the Sentinels have one of theirs
    redis+cluster://[user:password@]host:port,host:port                 rediss+sentinel://, rediss+cluster:// for TLS

A session is one hash, `indrnn:{digest of its id}`; the braces keep all that may ever belong to a session in one slot of a Cluster. Each rule of
`service.store` is one script on the server, which compares and writes in one step. A batch is one round trip (of a Cluster: one to each node, together).

`memory`: the server's process has run the script. With an append-only file (`appendonly yes`) it was also written to that file, so a crash of the process
loses nothing and one of its machine the latest second; without, all. `fsynced` waits for the disk (WAITAOF) and asks for `appendfsync always`, without
which that word cannot be believed. `replicated` waits for one replica's memory (WAIT). A failover to another replica, or of `memory` and `fsynced` to one
that lagged, loses what that replica had not got; those who serve the sessions then write it again.
Eviction would lose sessions without a word: leave `maxmemory-policy` at `noeviction`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from service.errors import SessionNotFound, StartupError, StoreUnavailable
from service.store import LEAST_MARK_S, Attached, Checkpoint, Outcome, StoreSettings, check_batch, key
from service.store_scripts import ATTACH, END, LOAD, PLACE, SAVE, TOUCH, Script
from service.store_server import Call, Reply, Unfit
from service.store_servers import open_servers


class RedisStore:
    """As `Store`. Connects when it is first used, and again by itself."""

    def __init__(self, settings: StoreSettings) -> None:
        """Raises `StartupError` for a URL that cannot be read."""
        self.settings = settings
        self._servers = open_servers(settings)
        self._head = [settings.owner, round(settings.idle_s * 1000), round((settings.age_s or 0) * 1000)]

    async def start(self) -> None:
        try:
            await self.ping()
        except Unfit as error:
            raise StartupError(error.message) from None

    async def attach(self, session_id: str, *, create: bool = True) -> Attached:
        reply = await self._one(ATTACH, session_id, [int(create)], confirm=True)
        if not reply.confirmed:
            raise StoreUnavailable(f"the store did not confirm in time that the session is {self.settings.durability}")
        attached = _attached(reply.values[0])
        if attached is None:
            raise SessionNotFound("no such session: the store does not have it, or it was ended")
        return attached

    async def load(self, session_id: str) -> Attached | None:
        return _attached((await self._one(LOAD, session_id, [])).values[0])

    async def save(self, checkpoints: Sequence[Checkpoint]) -> list[Outcome]:
        check_batch([one.session_id for one in checkpoints])
        arguments = [[one.epoch, PLACE.format(one.next_frame, one.sequence), one.record] for one in checkpoints]
        replies = await self._many(SAVE, [one.session_id for one in checkpoints], arguments, confirm=True)
        outcomes = []
        for value, confirmed in replies:
            outcome = Outcome.UNCONFIRMED if isinstance(value, StoreUnavailable) else Outcome(value.decode())
            outcomes.append(Outcome.UNCONFIRMED if outcome is Outcome.SAVED and not confirmed else outcome)
        return outcomes

    async def touch(self, session_ids: Sequence[str]) -> list[str]:
        check_batch(session_ids)
        replies = await self._many(TOUCH, session_ids, [[] for _ in session_ids])
        return [session_id for session_id, (there, _) in zip(session_ids, replies, strict=True) if there == 0]

    async def end(self, session_id: str, epoch: int) -> bool:
        mark_ms = round(max(self.settings.idle_s, LEAST_MARK_S) * 1000)
        return (await self._one(END, session_id, [epoch, mark_ms])).values == [1]

    async def ping(self) -> None:
        await self._servers.check(time.monotonic() + self.settings.timeout_s)

    async def close(self) -> None:
        async with asyncio.timeout(self.settings.timeout_s):
            await self._servers.close()

    def _key(self, session_id: str) -> str:
        return f"{self.settings.prefix}{{{key(session_id)}}}"

    async def _one(self, script: Script, session_id: str, arguments: list[Any], *, confirm: bool = False) -> Reply:
        call = Call(script, [self._key(session_id)], [*self._head, *arguments])
        [reply] = await self._servers.run([call], confirm, time.monotonic() + self.settings.timeout_s)
        if isinstance(reply, StoreUnavailable):
            raise reply
        return reply

    async def _many(self, script: Script, session_ids: Sequence[str], arguments: list[list[Any]], *, confirm: bool = False) -> list[tuple[Any, bool]]:
        """One (value, confirmed) per session, the value being a `StoreUnavailable` where its part failed; raised where all have."""
        size = self._servers.keys_in_call
        calls = [
            Call(
                script,
                [self._key(one) for one in session_ids[begin : begin + size]],
                [*self._head, *(value for some in arguments[begin : begin + size] for value in some)],
            )
            for begin in range(0, len(session_ids), size)
        ]
        replies = await self._servers.run(calls, confirm, time.monotonic() + self.settings.timeout_s)
        failures = [reply for reply in replies if isinstance(reply, StoreUnavailable)]
        if failures and len(failures) == len(replies):
            raise failures[0]
        values: list[tuple[Any, bool]] = []
        for call, reply in zip(calls, replies, strict=True):
            if isinstance(reply, StoreUnavailable):
                values += [(reply, False)] * len(call.keys)
            else:
                values += [(value, reply.confirmed) for value in reply.values]
        return values


def _attached(value: Any) -> Attached | None:
    return None if value is None else Attached(value[0], value[1])
