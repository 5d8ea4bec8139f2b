"""Which kind of store a URL names: `memory://`, `sqlite:///path` (`sqlite:path` from where the service was started), or a server's, see `store_redis`."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from service.errors import StartupError
from service.store import Store, StoreSettings
from service.store_memory import MemoryStore
from service.store_sqlite import SqliteStore

KINDS = ("memory", "sqlite", "redis", "rediss", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")


def open_store(settings: StoreSettings) -> Store:
    """The store, not yet reached: `start` does that. Raises `StartupError` for a URL that cannot be read; what it says never has the URL's password."""
    parts = urlsplit(settings.url)
    if parts.scheme not in KINDS:
        raise StartupError(f"a store's URL begins with {', '.join(f'{kind}:' for kind in KINDS)}, not with {parts.scheme or settings.url[:10]!r}")
    if parts.scheme == "memory":
        return MemoryStore(settings)
    if parts.scheme == "sqlite":
        path = unquote(parts.path)
        if parts.netloc or not path or path.endswith("/"):
            raise StartupError("a store's URL of kind sqlite names a file: sqlite:///var/lib/sessions, or sqlite:sessions for one in this folder")
        return SqliteStore(settings, Path(path))
    try:
        from service.store_redis import RedisStore  # an extra: who has no server need not have its client
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "redis":
            raise
        raise StartupError("a store on a server needs the package redis: pip install 'indrnn-service[redis]'") from None
    return RedisStore(settings)
