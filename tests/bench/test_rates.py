"""The benchmark of frame rates on toys: what its cameras see, what it reports, and that its bar can be missed."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.bench import rates
from tests.bench.conftest import arguments
from tests.bench.rates import OWN, RATES, Rate, Report, Result, sample
from training.streams import Stream

FRAMES = np.stack([np.arange(41), np.arange(41) ** 2], 1).astype(np.float32)
STREAM = Stream(FRAMES, np.zeros(41, np.int64), np.array([[3, 10, 1], [10, 20, 0], [25, 41, 2]]), np.zeros(3, bool))
HALF, TWICE, JITTERED = RATES[1:]


def seen(rate: Rate, stream: Stream = STREAM) -> rates.Sampled:
    return sample(stream, rate, np.random.default_rng(0))


def test_half_the_rate_is_every_second_frame() -> None:
    sampled = seen(HALF)
    np.testing.assert_array_equal(sampled.frames, FRAMES[::2])
    assert sampled.segments.tolist() == [[2, 5, 1], [5, 10, 0], [13, 21, 2]]


def test_twice_the_rate_has_the_middles_between() -> None:
    sampled = seen(TWICE)
    np.testing.assert_array_equal(sampled.frames[::2], FRAMES)
    np.testing.assert_array_equal(sampled.frames[1::2], (FRAMES[:-1] + FRAMES[1:]) / 2)
    assert sampled.segments.tolist() == [[6, 20, 1], [20, 40, 0], [50, 81, 2]]


def test_a_jittery_camera_takes_its_frames_in_order_at_its_own_times() -> None:
    sampled = seen(JITTERED)
    steps = np.diff(sampled.places)
    assert (steps > 0).all()
    assert steps.max() > 1.3 > 0.7 > steps.min()
    assert 0 <= sampled.places.min() < sampled.places.max() <= 40
    np.testing.assert_allclose(sampled.frames[:, 0], sampled.places, atol=1e-5)
    for (first, end, _), (own_first, own_end, _) in zip(STREAM.segments, sampled.segments, strict=True):
        inside = np.flatnonzero((sampled.places >= first) & (sampled.places < end))
        assert (inside[0], inside[-1] + 1) == (own_first, own_end)


def test_between_a_missing_and_a_seen_value_the_nearer_is_taken() -> None:
    frames = FRAMES.copy()
    frames[4, 1] = np.nan
    sampled = seen(Rate("", 4.0), replace(STREAM, frames=frames))
    assert np.isnan(sampled.frames[:, 1]).nonzero()[0].tolist() == [14, 15, 16, 17]
    assert np.isfinite(sampled.frames[:, 0]).all()


@pytest.mark.parametrize("model", ["bodies", "plain"])
def test_toy_streams_at_all_rates(
    toys: dict[str, Path], tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rates.json"
    monkeypatch.setattr(sys, "argv", ["rates", *arguments(toys, model, "--streams", "3", "--actions", "8", "--json", str(file))])
    status = rates.main()
    said = capsys.readouterr()
    kept = json.loads(file.read_text())
    assert list(kept["results"]) == [rate.name for rate in RATES]
    own, twice = kept["results"][OWN.name], kept["results"][TWICE.name]
    assert 0 < own["frames"] < 1
    assert twice["frames"] == pytest.approx(own["frames"], abs=0.02)  # every second score is the same
    assert (own["f1"] is None) == (model == "plain")
    assert status == bool(kept["missed"])  # random weights may do better or worse at another rate
    assert len(said.err.splitlines()) >= len(kept["missed"])
    for name in ("15, half", "30, its own rate", "60, twice", "30, jittered, with t"):
        assert f"| {name}" in said.out


def report(frames: float, actions: float) -> Report:
    return Report({}, {OWN.name: Result(0.9, 0.95, math.nan, math.nan), HALF.name: Result(frames, actions, math.nan, math.nan)})


def test_the_bar_is_three_points_of_frames_and_of_actions() -> None:
    assert report(0.871, 0.99).missed() == []
    assert len(report(0.8699, 0.95).missed()) == 1
    assert report(0.95, 0.91).missed() == ["half: right actions are 4.0 points below those at the model's own rate, at most 3 are allowed"]
    assert len(report(0.8, 0.8).missed()) == 2


def test_faults_are_one_line(toys: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["rates", *arguments(toys, "absent")])
    assert rates.main() == 1
    assert "no model there" in capsys.readouterr().err
