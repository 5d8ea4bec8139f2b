"""Who may come in: bearer tokens, compared in constant time, and the origins of websockets."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from pydantic import SecretStr

from service.errors import Forbidden, Unauthenticated
from service.settings import Settings

SUBPROTOCOL = "indrnn"
TOKEN_SUBPROTOCOL = "indrnn.token."  # browsers cannot send an Authorization header with a websocket; the token follows, base64url without padding


class Gate:
    """Checks headers (lower-case names) against the settings. A management token opens everything that the ordinary one does."""

    def __init__(self, settings: Settings) -> None:
        self._token = _bytes(settings.token)
        self._management = _bytes(settings.management_token)
        self._origins = settings.origins

    @property
    def asks(self) -> bool:
        """Whether a token is asked for."""
        return self._token is not None

    def check_token(self, headers: Mapping[str, str], subprotocols: Iterable[str] = ()) -> None:
        """Raises `Unauthenticated` unless no token is asked for or one was sent."""
        if self._token is None:
            return
        given = _bearer(headers) or _from_subprotocols(subprotocols)
        if given is None:
            raise Unauthenticated("this service asks for a token: send the header `Authorization: Bearer <token>`")
        if not (_same(given, self._token) or _same(given, self._management)):
            raise Unauthenticated("the token is wrong")

    def check_management(self, headers: Mapping[str, str]) -> None:
        """Raises `Forbidden` unless management is on and its token was sent."""
        if self._management is None:
            raise Forbidden("management is off: start the service with INDRNN_MANAGEMENT_TOKEN set")
        if not self.is_manager(headers):
            raise Forbidden("this call needs the management token")

    def is_manager(self, headers: Mapping[str, str]) -> bool:
        given = _bearer(headers)
        return given is not None and _same(given, self._management)

    def check_origin(self, headers: Mapping[str, str]) -> None:
        """Raises `Forbidden` when a page of another host opens a websocket. Programs send no origin and pass."""
        origin = headers.get("origin")
        if origin is None or "*" in self._origins:
            return
        allowed = origin in self._origins if self._origins else _host(origin) == headers.get("host", "").lower()
        if not allowed:
            raise Forbidden(f"pages of {origin[:200]} may not open streams here; allow them with INDRNN_ORIGINS")


def _host(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:  # brackets that hold no address
        return ""


def _bearer(headers: Mapping[str, str]) -> bytes | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip().encode("utf-8", "surrogateescape") if scheme.lower() == "bearer" and token.strip() else None


def _from_subprotocols(subprotocols: Iterable[str]) -> bytes | None:
    for name in subprotocols:
        if name.startswith(TOKEN_SUBPROTOCOL):
            text = name.removeprefix(TOKEN_SUBPROTOCOL)
            try:
                return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
            except (binascii.Error, ValueError):
                return b""
    return None


def _same(given: bytes, expected: bytes | None) -> bool:
    return expected is not None and hmac.compare_digest(given, expected)


def _bytes(secret: SecretStr | None) -> bytes | None:
    return None if secret is None else secret.get_secret_value().encode()
