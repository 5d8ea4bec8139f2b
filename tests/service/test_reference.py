from __future__ import annotations

import re

import httpx
import pytest


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_a_page_needs_nothing_from_elsewhere(http: httpx.Client, path: str) -> None:
    page = http.get(path)
    assert page.status_code == 200
    assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page.text)
    files = re.findall(r"""<(?:script|link)[^>]* (?:src|href)=["']([^"']+)["']""", page.text)
    assert len(files) >= 2
    for file in files:
        answer = http.get(file)
        assert (answer.status_code, bool(answer.content)) == (200, True), file
    assert "/openapi.json" in page.text


def test_viewers_are_no_calls_of_the_api(http: httpx.Client) -> None:
    assert not [path for path in http.get("/openapi.json").json()["paths"] if "docs" in path]
    assert http.get("/docs/viewers/../../app.py").status_code == 404
    assert http.get("/docs/viewers/nothing.js").status_code == 404
