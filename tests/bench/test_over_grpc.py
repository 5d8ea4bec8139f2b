"""The comparison of gRPC with HTTP runs, and what it sends is answered with the same bits. Its figures mean nothing here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="grpcio is not installed (extra `grpc`): the benchmark of gRPC is not tested")
pytest.importorskip("numba", reason="numba is not installed (extra `test`): the benchmark of gRPC is not tested")

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_of_moments_measures_everything() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.bench.over_grpc", "--quick", "--sequences", "5"], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for variant in ("HTTP", "gRPC", "gRPC stream", "echo", "echo stream"):
        assert f"│ {variant} " in done.stdout
    assert "the same bits" in done.stdout
    assert "NOT" not in done.stdout
