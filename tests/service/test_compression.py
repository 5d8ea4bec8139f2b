from __future__ import annotations

import gzip
import zlib

import pytest

from service.compression import deflate, inflate
from service.errors import Malformed, TooLarge, UnknownEncoding

BODY = b"frames " * 1000


def test_what_other_programs_pack_is_unpacked() -> None:
    assert inflate(gzip.compress(BODY), "gzip", len(BODY)) == BODY
    assert inflate(zlib.compress(BODY), " Deflate", len(BODY)) == BODY
    assert inflate(BODY, "", 1) == inflate(BODY, "identity", 1) == BODY  # its size was checked when it was read


def test_what_is_packed_other_programs_unpack() -> None:
    assert gzip.decompress(deflate(BODY, "gzip")) == BODY
    assert zlib.decompress(deflate(BODY, "deflate")) == BODY


@pytest.mark.parametrize("limit", [0, 1, len(BODY) - 1])
def test_a_small_body_does_not_become_a_large_one(limit: int) -> None:
    with pytest.raises(TooLarge):
        inflate(gzip.compress(BODY), "gzip", limit)


@pytest.mark.parametrize(
    ("body", "encoding", "words"),
    [
        (BODY, "gzip", "not gzip"),
        (zlib.compress(BODY), "gzip", "not gzip"),
        (gzip.compress(BODY), "deflate", "not deflate"),
        (gzip.compress(BODY)[:-3], "gzip", "ends too early"),
        (gzip.compress(BODY) + b"more", "gzip", "goes on"),
        (b"", "gzip", "ends too early"),
    ],
)
def test_broken_streams(body: bytes, encoding: str, words: str) -> None:
    with pytest.raises(Malformed, match=words):
        inflate(body, encoding, 10**6)


def test_unknown_encodings_are_told_the_known_ones() -> None:
    with pytest.raises(UnknownEncoding) as caught:
        inflate(BODY, "br", 10**6)
    assert caught.value.facts["accept_encoding"] == "gzip, deflate"
