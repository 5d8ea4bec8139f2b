"""Bodies that are compressed: gzip and deflate (a zlib stream), with a bound on what comes out."""

from __future__ import annotations

import zlib

from service.errors import Malformed, TooLarge, UnknownEncoding

ENCODINGS = {"gzip": 31, "deflate": 15}  # zlib's window bits
_LEVEL = 1  # scores hardly get smaller with more work


def inflate(body: bytes, encoding: str, limit: int) -> bytes:
    """Raises `UnknownEncoding`, `TooLarge` as soon as more than `limit` bytes come out, or `Malformed`."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return body
    if name not in ENCODINGS:
        raise UnknownEncoding(f"content-encoding {encoding!r:.60} is not supported, only {' and '.join(ENCODINGS)}", accept_encoding=", ".join(ENCODINGS))
    stream = zlib.decompressobj(ENCODINGS[name])
    try:
        inflated = stream.decompress(body, limit + 1)
    except zlib.error as error:
        raise Malformed(f"the body is not {name}: {error}") from None
    if len(inflated) > limit:
        raise TooLarge(f"the body is larger than {limit} bytes once it is inflated", limit=limit)
    if not stream.eof or stream.unused_data:
        raise Malformed(f"the body is not one {name} stream: it {'goes on behind its end' if stream.eof else 'ends too early'}")
    return inflated


def deflate(body: bytes, encoding: str) -> bytes:
    """`encoding` is one of `ENCODINGS`."""
    stream = zlib.compressobj(_LEVEL, wbits=ENCODINGS[encoding])
    return stream.compress(body) + stream.flush()
