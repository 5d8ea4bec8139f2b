from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_open_metrics
from prometheus_client.parser import text_string_to_metric_families

from service.histogram import Histogram, quantile
from service.metrics import _ROWS, _SECONDS, Metrics

VALUES = np.concatenate([np.random.default_rng(0).lognormal(-6, 2, 500), [0.0, 0.0005, 0.001, 10, 10.5, 1000]])
CREATED = re.compile(r"(_created\{.*?\}) \S+")


def both(buckets: tuple[float, ...], *, fine: bool = False) -> tuple[CollectorRegistry, CollectorRegistry, Histogram, prometheus_client.Histogram]:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    own = Histogram("indrnn_test_seconds", "what for", ["model", "version"], buckets=buckets, registry=ours, fine=fine)
    other = prometheus_client.Histogram("indrnn_test_seconds", "what for", ["model", "version"], buckets=buckets, registry=theirs)
    return ours, theirs, own, other


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("buckets", [_SECONDS, _ROWS])
@pytest.mark.parametrize("pieces", [[len(VALUES)], [1, 2, 12, 13, 200]])
def test_the_exposition_is_the_client_librarys(buckets: tuple[float, ...], fine: bool, pieces: list[int]) -> None:
    """With values on the bounds, beyond them and one by one; for two sets of labels, one of which needs escapes."""
    ours, theirs, own, other = both(buckets, fine=fine)
    for labels in (("a", "1"), ('b"\n\\', "2")):
        for value in VALUES:
            other.labels(*labels).observe(float(value))
        half = len(VALUES) // 2
        for value in VALUES[:half]:
            own.labels(*labels).observe(float(value))
        for piece in np.split(VALUES[half:], np.cumsum(pieces)):
            own.labels(*labels).observe_many(piece)
    for write in (generate_latest, generate_open_metrics):
        told, expected = (CREATED.sub(r"\1", write(registry).decode()).splitlines() for registry in (ours, theirs))
        sums = [[float(line.split()[-1]) for line in lines if "_sum{" in line] for lines in (told, expected)]
        assert sums[0] == pytest.approx(sums[1], rel=1e-12)  # added up in another order
        assert [line for line in told if "_sum{" not in line] == [line for line in expected if "_sum{" not in line]


def test_without_values_there_are_zeros_as_in_the_client_library() -> None:
    ours, theirs, own, other = both(_ROWS)
    own.labels("a", "1")
    other.labels("a", "1")
    told, expected = (CREATED.sub(r"\1", generate_latest(registry).decode()) for registry in (ours, theirs))
    assert told == expected
    assert 'le="+Inf"' in told


def test_series_of_creation_times_can_be_switched_off_as_in_the_client_library() -> None:
    script = """
from service.metrics import Metrics
metrics = Metrics()
metrics.run_seconds.labels("a", "1").observe(1)
metrics.frames.labels("a", "1").inc()
print(metrics.text().decode())
"""
    for switch, there in (("", True), ("true", False)):
        environment = {"PROMETHEUS_DISABLE_CREATED_SERIES": switch}
        text = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
        assert ("indrnn_run_seconds_created" in text, "indrnn_frames_created" in text) == (there, there)


def test_labels_are_kept_and_counted() -> None:
    _, _, own, _ = both(_ROWS)
    assert own.labels("a", "1") is own.labels("a", "1")
    with pytest.raises(ValueError, match="has the labels model, version, got 1 values"):
        own.labels("a")


def test_a_name_cannot_be_taken_twice() -> None:
    registry = CollectorRegistry()
    Histogram("indrnn_test_seconds", "", [], buckets=_ROWS, registry=registry)
    with pytest.raises(ValueError, match="Duplicated"):
        Histogram("indrnn_test_seconds", "", [], buckets=_ROWS, registry=registry)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99])
def test_quantiles_are_within_a_tenth(share: float) -> None:
    _, _, own, _ = both(_SECONDS, fine=True)
    values = np.random.default_rng(1).lognormal(-6, 1, 20_000)
    own.labels("a", "1").observe_many(values)
    assert quantile(own.bounds, own.labels("a", "1").counts(), share) == pytest.approx(float(np.quantile(values, share)), rel=0.1)


def test_quantiles_at_the_ends() -> None:
    _, _, own, _ = both((1, 2, 4))
    child = own.labels("a", "1")
    assert quantile(own.bounds, child.counts(), 0.5) is None
    child.observe(3)
    assert quantile(own.bounds, child.counts(), 1.0) == 4
    child.observe_many(np.full(100, 1000.0))
    assert quantile(own.bounds, child.counts(), 0.99) == 4  # all that is known


def test_everything_the_service_counts_is_read_back_by_the_client_librarys_parser() -> None:
    metrics = Metrics()
    metrics.queue_seconds.labels("m", "1").observe_many(np.array([0.001, 0.2]))
    metrics.padded.labels("m", "1").inc(3)
    metrics.state_rows.labels("m", "1", "taken").set(2)
    families = {family.name: family for family in text_string_to_metric_families(metrics.text().decode())}
    samples = {sample.name: sample.value for sample in families["indrnn_queue_seconds"].samples}
    assert (families["indrnn_queue_seconds"].type, samples["indrnn_queue_seconds_count"]) == ("histogram", 2)
    assert families["indrnn_padded_frames"].samples[0].value == 3
    metrics.forget_version("m", "1")
    assert "indrnn_state_rows{" not in metrics.text().decode()
