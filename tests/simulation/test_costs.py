"""The measurement of costs measures: a few streams on real processes, for a moment."""

from __future__ import annotations

import dataclasses
import math

import pytest

from tests.docker.compose_stack import need_image
from tests.docker.test_balancers import HAPROXY
from tests.simulation import costs
from tests.valkey_process import need_program


@pytest.mark.docker
@pytest.mark.timeout(180)
def test_every_figure_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    need_program()
    monkeypatch.setenv("HAPROXY_IMAGE", need_image("HAPROXY_IMAGE", *HAPROXY))
    monkeypatch.setattr(costs, "SETTLE_S", 0.5)
    found = costs.run(4, 1.0, 1)["costs"]
    assert set(found) == {field.name for field in dataclasses.fields(costs.Costs)}
    assert all(math.isfinite(value) for value in found.values())
    assert found["streams"] == 4
    assert 0 < found["stream_cpu"] < 1
    assert 1000 < found["record_bytes"] < found["store_save_bytes"] < 20_000
    assert found["client_out_bytes"] > 30 * 4 * 11
    assert found["takeovers_s"] > 0
