"""Which servers the URL of a store names, and how they are reached."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from redis.asyncio import ConnectionPool, Redis, SSLConnection
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, ResponseError

from service.errors import StartupError, StoreUnavailable
from service.store import MOST_IN_BATCH, StoreSettings
from service.store_cluster import Cluster
from service.store_server import Call, Reply, Server, Servers, refused


class Single:
    """One server has all keys: a batch is one call."""

    keys_in_call = MOST_IN_BATCH

    def __init__(self, server: Server, sentinel: Sentinel | None = None) -> None:
        self._server = server
        self._sentinel = sentinel

    async def run(self, calls: list[Call], confirm: bool, deadline: float) -> list[Reply | StoreUnavailable]:
        if not calls:
            return []
        return [refused(reply) if isinstance(reply, ResponseError) else reply for reply in await self._server.run(calls, confirm, deadline)]

    async def check(self, deadline: float) -> None:
        await self._server.check(deadline)

    async def close(self) -> None:
        await self._server.close()
        if self._sentinel is not None:
            await asyncio.gather(*(client.aclose() for client in self._sentinel.sentinels))


def open_servers(settings: StoreSettings) -> Servers:
    parts = urlsplit(settings.url)
    scheme, _, kind = parts.scheme.partition("+")
    credentials, _, hosts = parts.netloc.rpartition("@")
    try:
        addresses = [_address(host, 26379 if kind == "sentinel" else 6379) for host in hosts.split(",")]
        path = [unquote(part) for part in parts.path.split("/") if part]
        plain = f"{scheme}://{credentials + '@' if credentials else ''}{hosts.split(',')[0]}"
        database = path.pop() if path and path[-1].isdigit() and (kind != "sentinel" or len(path) > 1) else "0"
        options: dict[str, Any] = {**parse_url(f"{plain}/{database}?{parts.query}")}
    except ValueError as error:
        raise StartupError(f"the store's URL cannot be read: {error}") from None
    for name in parse_qs(parts.query):
        if name != "sentinel_password" and not name.startswith("ssl_"):
            raise StartupError(f"the store's URL has an unknown option {name}: there are ssl_... for TLS, and sentinel_password")
    options |= {
        "socket_timeout": settings.timeout_s,
        "socket_connect_timeout": settings.timeout_s,
        "socket_keepalive": True,
        "retry": Retry(NoBackoff(), 1, (ConnectionError,)),  # once, for a connection that the server has closed meanwhile
    }
    sentinel_password = options.pop("sentinel_password", None)
    if kind == "cluster":
        if database != "0" or path:
            raise StartupError("the store's URL names a database, and a Cluster has but one: end it after the hosts")
        return Cluster(addresses, options, settings)
    if kind == "sentinel":
        if len(path) != 1:
            raise StartupError("the store's URL names no primary: redis+sentinel://host:port,host:port/NAME")
        return _behind_sentinels(addresses, path[0], sentinel_password, options, settings)
    if path or len(addresses) > 1:
        raise StartupError("the store's URL has more than host, port and the number of a database: redis://host:port/0")
    host, port = addresses[0]
    client = Redis.from_pool(ConnectionPool(**{**options, "host": host, "port": port}))
    return Single(Server(client, f"{host}:{port}", settings, cluster=False))


def _behind_sentinels(addresses: list[tuple[str, int]], name: str, password: str | None, options: dict[str, Any], settings: StoreSettings) -> Single:
    options = {key: value for key, value in options.items() if key not in ("host", "port")}
    if options.pop("connection_class", None) is SSLConnection:
        options["ssl"] = True
    own = {key: value for key, value in options.items() if key not in ("username", "password", "db")} | ({"password": password} if password else {})
    sentinel = Sentinel(addresses, sentinel_kwargs=own)  # type: ignore[no-untyped-call]
    client = sentinel.master_for(name, **options)
    where = f"{name} of " + ",".join(f"{host}:{port}" for host, port in addresses)
    return Single(Server(client, where, settings, cluster=False), sentinel)


def _address(host: str, port: int) -> tuple[str, int]:
    parts = urlsplit(f"//{host}")
    if not parts.hostname:
        raise ValueError("it names no host")
    return parts.hostname, parts.port or port
