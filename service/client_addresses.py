"""Where a service is reached: at one address, or at those of its replicas, each of which will do. No I/O."""

from __future__ import annotations

import random
from collections.abc import Sequence
from urllib.parse import urlsplit

from service.client_errors import ClientError


def read_addresses(url: str | Sequence[str]) -> tuple[str, ...]:
    """One address or several, without slashes at their ends. Raises `ClientError` for what is none."""
    urls = (url,) if isinstance(url, str) else tuple(url)
    if not urls:
        raise ClientError("an empty list of addresses: name at least one, such as http://127.0.0.1:8000")
    for one in urls:
        if not _is_address(one):
            raise ClientError(f"{one!r} is no address of a service; it looks like http://127.0.0.1:8000")
    return tuple(one.rstrip("/") for one in urls)


class Addresses:
    """The one in use, and the others. Each stream has its own, in an order left to chance, so that streams spread over the replicas."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._urls = random.sample(urls, len(urls))
        self._current = 0

    def __len__(self) -> int:
        return len(self._urls)

    @property
    def current(self) -> str:
        return self._urls[self._current]

    def round(self) -> list[str]:
        """All of them once, that in use first: after a short break it is the one that still has the session in memory."""
        return [*self._urls[self._current :], *self._urls[: self._current]]

    def use(self, url: str) -> None:
        self._current = self._urls.index(url)

    def leave(self) -> None:
        """What is there goes away: the next one comes first from now on."""
        self._current = (self._current + 1) % len(self._urls)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.query and not parts.fragment
    except ValueError:  # a port beyond 65535, brackets that hold no address
        return False
