from __future__ import annotations

import time

from service.statistics import Statistics


def test_an_idle_model_has_every_entry() -> None:
    value = Statistics().to_dict()
    assert set(value["inference_stats"]) == {"success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit", "cache_miss"}
    assert all(entry == {"count": 0, "ns": 0} for entry in value["inference_stats"].values())
    assert (value["last_inference"], value["inference_count"], value["execution_count"], value["batch_stats"]) == (0, 0, 0, [])


def test_a_batch_counts_once_for_each_inference_in_it_and_once_as_a_batch() -> None:
    statistics = Statistics()
    for _ in range(8):
        statistics.waited(5)
    statistics.ran(8, 8, 10, 2000, 30)
    for _ in range(8):
        statistics.succeeded(2100)
    value = statistics.to_dict()
    stats = value["inference_stats"]
    assert stats["success"] == {"count": 8, "ns": 16_800}
    assert stats["queue"] == {"count": 8, "ns": 40}
    assert stats["compute_input"] == {"count": 8, "ns": 80}
    assert stats["compute_infer"] == {"count": 8, "ns": 16_000}
    assert stats["compute_output"] == {"count": 8, "ns": 240}
    assert (value["inference_count"], value["execution_count"]) == (8, 1)
    batch = {"compute_input": {"count": 1, "ns": 10}, "compute_infer": {"count": 1, "ns": 2000}, "compute_output": {"count": 1, "ns": 30}}
    assert value["batch_stats"] == [{"batch_size": 8, **batch}]
    assert abs(value["last_inference"] / 1000 - time.time()) < 60


def test_several_at_once_are_as_many_one_by_one() -> None:
    together, apart = Statistics(), Statistics()
    together.waited(15, 3)
    together.succeeded(300, 3)
    for _ in range(3):
        apart.waited(5)
        apart.succeeded(100)
    assert {**together.to_dict(), "last_inference": 0} == {**apart.to_dict(), "last_inference": 0}


def test_a_long_clip_counts_once_however_many_runs_it_takes() -> None:
    statistics = Statistics()
    for finished in (0, 0, 1):
        statistics.ran(1, finished, 1, 100, 2)
    statistics.failed(7)
    value = statistics.to_dict()
    assert value["inference_stats"]["compute_infer"] == {"count": 1, "ns": 300}
    assert value["batch_stats"][0]["compute_infer"] == {"count": 3, "ns": 300}
    assert value["execution_count"] == 3
    assert (value["inference_count"], value["inference_stats"]["fail"]) == (0, {"count": 1, "ns": 7})
