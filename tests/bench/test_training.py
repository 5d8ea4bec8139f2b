"""The training benchmark works: a run of moments gives finite figures, Ctrl-C keeps what was measured. Its figures mean nothing here."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra `train`): the training benchmark is not tested")
pytest.importorskip("numba", reason="numba is not installed (extra `train`): the training benchmark is not tested")

from tests.bench.training import Timings

ROOT = Path(__file__).resolve().parents[2]
BENCH = [sys.executable, "-W", "error", "-m", "tests.bench.training", "--device", "cpu", "--threads", "1"]


def test_a_quick_run(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = subprocess.run([*BENCH, "--quick", "--json", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    variants = {"Linear", "IndRNN", "recur", "copy", "RNN", "GRU", "LSTM", "plain loop"}
    assert [set(timed) for timed in found["seconds"].values()] == [variants] * 2 + [{"IndRNN"}] * 2
    assert all(math.isfinite(s) and s > 0 for timed in found["seconds"].values() for rounds in timed.values() for s in rounds)
    assert math.isfinite(found["growth"])
    assert "| T, batch, units |" in done.stdout
    assert "CUDA" in done.stdout


def test_ctrl_c_shows_what_was_measured() -> None:
    with subprocess.Popen([*BENCH, "--quick", "--rounds", "10000"], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert "measuring" in process.stdout.readline()
        time.sleep(2)  # far longer than the first figures take
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped" in rest
    assert "IndRNN / Linear" in rest


def test_ratios_are_medians_of_the_ratios_within_rounds() -> None:
    timings, shape = Timings({"device": "cpu"}), (784, 32, 128)
    for linear, ours, lstm in ((1.0, 2.0, 20.0), (10.0, 12.0, 60.0), (1.0, 1.1, 3.3)):
        for variant, seconds in (("Linear", linear), ("IndRNN", ours), ("LSTM", lstm)):
            timings.add(shape, variant, seconds)
    assert timings.ratio(shape, "IndRNN", "Linear") == pytest.approx(1.2)
    assert timings.bars() == {
        "784, 32, 128: IndRNN over Linear": (pytest.approx(1.2), 1.3, True),
        "784, 32, 128: LSTM over IndRNN": (pytest.approx(5.0), 5.0, False),
    }
    assert math.isnan(timings.ratio(shape, "GRU", "IndRNN"))


def test_time_per_step_is_compared_over_the_long_sequences() -> None:
    timings = Timings({"device": "cpu"})
    for steps, seconds in ((5000, 1.0), (10_000, 2.0), (50_000, 15.0)):
        timings.add((steps, 16, 128), "IndRNN", seconds)
    assert timings.growth() == pytest.approx(1.5)
