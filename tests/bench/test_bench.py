"""The benchmark works: a run of moments gives finite figures, and the scores it measured are onnxruntime's. Its figures mean nothing here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.figures import Figure, Report, Variant

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("entry", [["-m", "tests.bench"], ["tests/bench"]])
def test_a_quick_run(tmp_path: Path, entry: list[str]) -> None:
    file = tmp_path / "bench.json"
    done = subprocess.run([sys.executable, "-W", "error", *entry, "--quick", "--json", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert len(found["medians"]) == 11
    figures = [value for variant in found["medians"].values() for value in variant.values()] + list(found["ratios"].values())
    assert all(math.isfinite(figure) and figure > 0 for figure in figures)
    assert found["equality"]["answers"] > 100
    assert found["equality"]["same_bits"], found["equality"]
    assert "service 64 over echo" in done.stdout


def test_ratios_are_medians_of_the_ratios_within_rounds() -> None:
    report = Report({})
    for service, echo, alone in ((10.0, 100.0, 50.0), (30.0, 100.0, 50.0), (20.0, 400.0, 50.0)):
        for who, frames_per_s in (("service", service), ("echo", echo), ("alone", alone)):
            report.add(Variant(who, 1), Figure(frames_per_s, p50_ms=1000 / frames_per_s, p99_ms=1.0))
    assert report.ratio(Variant("service", 1), Variant("echo", 1)) == pytest.approx(0.1)
    assert report.round_trip_ratio() == pytest.approx(50 / (2.5 + 20))  # the others are 100 / (10 + 20) and 33.3 / (10 + 20)
