"""One Redis or Valkey server as a store uses it: checked, called in one round trip, left alone for a while when it does not answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import structlog
from redis.asyncio import Redis
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, NoScriptError, RedisError, ResponseError

from service.backoff import Backoff
from service.errors import StoreUnavailable
from service.store import Durability, StoreSettings
from service.store_scripts import SCRIPTS, Script

log = structlog.get_logger("store")

OLDEST = (7, 2)  # the first version with WAITAOF; Valkey says which Redis it is equal to
MOST_UNDER_WAY = 16  # calls, each on a connection of its own
FIRST_PAUSE_S, LAST_PAUSE_S = 0.05, 1.0  # for which a server that does not answer is left alone
_WAIT = 0.75  # part of the time that is left which confirming may take

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call:
    """One run of a script."""

    script: Script
    keys: list[str]
    arguments: list[Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """One value per key of the call; `confirmed`: as durable as was asked."""

    values: list[Any]
    confirmed: bool


class Unfit(StoreUnavailable):
    """The server answers, but cannot be used as it is."""


class Servers(Protocol):
    """Where calls go: to one server, or to many that share the keys."""

    keys_in_call: int

    async def run(self, calls: list[Call], confirm: bool, deadline: float) -> list[Reply | StoreUnavailable]: ...
    async def check(self, deadline: float) -> None: ...
    async def close(self) -> None: ...


class Server:
    """One server, or whichever the Sentinels call the primary. One that does not answer is left alone for a while, and calls fail at once."""

    def __init__(self, client: Redis, where: str, settings: StoreSettings, *, cluster: bool) -> None:
        self._client = client
        self._where = where
        self._settings = settings
        self._cluster = cluster
        self._fit = False  # it was checked since it last failed
        self._places = asyncio.Semaphore(MOST_UNDER_WAY)
        self._backoff = Backoff(FIRST_PAUSE_S, LAST_PAUSE_S)
        self._down_until = 0.0
        self._reason = ""

    async def run(self, calls: list[Call], confirm: bool, deadline: float, *, asking: bool = False) -> list[Reply | ResponseError]:
        """All in one round trip; raises `StoreUnavailable` if the server did not answer."""

        async def work() -> list[Reply | ResponseError]:
            await self._check()
            replies = await self._send(calls, confirm, asking, deadline)
            if any(isinstance(one, NoScriptError) for one in replies):  # somebody has flushed them
                await self._load_scripts()
                again = [call for call, reply in zip(calls, replies, strict=True) if isinstance(reply, NoScriptError)]
                rest = iter(await self._send(again, confirm, asking, deadline))
                replies = [next(rest) if isinstance(reply, NoScriptError) else reply for reply in replies]
            return replies

        return await self._guarded(work, deadline)

    async def check(self, deadline: float) -> None:
        async def work() -> None:
            await self._check()
            await cast("Awaitable[Any]", self._client.ping())

        await self._guarded(work, deadline)

    async def slots(self, deadline: float) -> list[Any]:
        """Which node of the Cluster has which slots, as it sees it: [first, last, [host, port, ...], ...]."""

        async def work() -> list[Any]:
            await self._check()
            slots: list[Any] = await cast("Awaitable[Any]", self._client.execute_command("CLUSTER SLOTS"))  # type: ignore[no-untyped-call]
            return slots

        return await self._guarded(work, deadline)

    async def close(self) -> None:
        await self._client.aclose()

    async def _guarded(self, work: Callable[[], Awaitable[T]], deadline: float) -> T:
        if (pause := self._down_until - time.monotonic()) > 0:
            raise StoreUnavailable(self._reason, retry_after=max(1, round(pause)))
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())), self._places:
                value = await work()
        except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
            raise Unfit(f"the store at {self._where} refuses us ({error}): look at the user and the password in its URL") from None
        except Unfit:
            raise
        except TimeoutError:
            raise self._down("did not answer in time") from None
        except (RedisError, OSError) as error:
            raise self._down(f"cannot be used: {error}") from None
        self._backoff.succeeded()
        return value

    def _down(self, why: str) -> StoreUnavailable:
        self._fit = False
        pause = self._backoff.failed()
        self._down_until = time.monotonic() + pause
        self._reason = f"the store at {self._where} {why}"
        return StoreUnavailable(self._reason, retry_after=max(1, round(pause)))

    async def _send(self, calls: list[Call], confirm: bool, asking: bool, deadline: float) -> list[Reply | ResponseError]:
        pipe = self._client.pipeline(transaction=False)
        for call in calls:
            if asking:
                pipe.execute_command("ASKING")
            pipe.execute_command("EVALSHA", call.script.sha, len(call.keys), *call.keys, *call.arguments)
        wait_ms = max(1, round((deadline - time.monotonic()) * _WAIT * 1000))  # 0 would mean for ever
        durability = self._settings.durability if confirm else "memory"
        if durability == "fsynced":
            pipe.execute_command("WAITAOF", 1, 0, wait_ms)
        elif durability == "replicated":
            pipe.execute_command("WAIT", 1, wait_ms)
        replies: list[Any] = await pipe.execute(raise_on_error=False)
        confirmed = durability == "memory" or _reached(durability, replies.pop())
        if asking:
            replies = replies[1::2]
        return [reply if isinstance(reply, ResponseError) else Reply(reply, confirmed) for reply in replies]

    async def _check(self) -> None:
        """Raises `Unfit` for what waiting does not mend."""
        if self._fit:
            return
        info: dict[str, Any] = await cast("Awaitable[Any]", self._client.info())
        told = str(info.get("redis_version", "unknown"))
        name = f"the store at {self._where}, {info.get('server_name', 'redis')} {info.get('valkey_version', told)},"
        if _version(told) < OLDEST:
            raise Unfit(f"{name} is too old: Redis {'.'.join(map(str, OLDEST))} or Valkey 8 is needed")
        mode = info.get("redis_mode", info.get("server_mode"))
        if mode == "sentinel":
            raise Unfit(f"{name} is a Sentinel: name it in a URL redis+sentinel://")
        if self._cluster != (mode == "cluster"):
            raise Unfit(f"{name} is {'a node of a Cluster: use' if mode == 'cluster' else 'no Cluster: do not use'} a URL redis+cluster://")
        if info.get("role") == "slave" and not self._cluster:
            raise Unfit(f"{name} is a replica, which takes no writes: name the primary, or the Sentinels")
        if self._settings.durability == "fsynced" and not info.get("aof_enabled"):
            raise Unfit(f"{name} keeps no append-only file, so nothing can be fsynced: set appendonly yes there, or ask for durability memory")
        if self._settings.durability == "fsynced":
            await self._check_fsync(name)
        if "noeviction" not in str(info.get("maxmemory_policy", "noeviction")):
            log.warning("the store may drop sessions when its memory is full; set maxmemory-policy noeviction there", store=self._where)
        await self._load_scripts()
        self._fit = True

    async def _check_fsync(self, name: str) -> None:
        """WAITAOF is to be believed only with `appendfsync always`: Valkey (seen in 8.1) and older Redis say with `everysec` that it is on the disk when
        it is not."""
        try:
            found = await cast("Awaitable[dict[str, str]]", self._client.config_get("appendfsync"))
        except ResponseError:  # hosted servers forbid it
            log.warning("the store does not tell its appendfsync; fsynced is to be believed only where that is always", store=self._where)
            return
        if (told := found.get("appendfsync")) != "always":
            raise Unfit(f"{name} has appendfsync {told}, with which it confirms what is not on its disk yet: set appendfsync always, or ask for memory")

    async def _load_scripts(self) -> None:
        pipe = self._client.pipeline(transaction=False)
        for script in SCRIPTS:
            pipe.script_load(script.text)
        await pipe.execute()


def _version(told: str) -> tuple[int, ...]:
    return tuple(int(part) for part in told.split(".")[:2] if part.isdigit())


def _reached(durability: Durability, reply: Any) -> bool:
    """Whether as many disks or replicas as were asked for have it."""
    if isinstance(reply, ResponseError):
        log.warning("the store cannot confirm what it saved", durability=durability, reason=str(reply))
        return False
    return bool(reply[0] >= 1 if durability == "fsynced" else reply >= 1)


def refused(error: ResponseError) -> StoreUnavailable:
    return StoreUnavailable(f"the store refused: {error}")
