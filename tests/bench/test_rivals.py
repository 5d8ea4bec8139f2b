"""Others' servers: what is sent to them, and a run with the one that needs no installation. The rest is measured by `make bench-rivals` alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.bench.load import Group, run
from tests.bench.rivals.dialects import BentoML, BentoMLClips, LitServe, LitServeClips, MLServer, MLServerClips, Named
from tests.bench.rivals.rival import RIVALS, Rival
from tests.bench.test_load import FRAMES, GOOD, http_peer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("per_message", [1, 5])
@pytest.mark.parametrize("dialect", [BentoML, BentoMLClips, LitServe, LitServeClips, MLServer, MLServerClips])
def test_requests_name_their_stream_and_hold_its_frames(dialect: type[Named], per_message: int) -> None:
    with http_peer(GOOD) as (url, bodies):
        run([Group(dialect(url), 1, per_message)], FRAMES * np.float32(1.1), 0.05, warmup=0.02)
    sent = [json.loads(body) for body in bodies[:10]]
    if issubclass(dialect, MLServer):
        streams = [one["inputs"][0]["data"] for one in sent]
        frames = [np.array(one["inputs"][1]["data"], np.float32).reshape(one["inputs"][1]["shape"])[0] for one in sent]
    else:
        streams, frames = [one["stream"] for one in sent], [np.array(one["frames"], np.float32) for one in sent]
    assert all(stream == streams[0] for stream in streams)
    assert (streams[0] in ("", [0])) == dialect.stateless
    assert np.array_equal(np.concatenate(frames), np.take(FRAMES, range(len(sent) * per_message), axis=0, mode="wrap") * np.float32(1.1))


def test_a_quick_run_beside_the_service_written_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "rivals.json"
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "tests.bench.rivals",
        "--quick",
        "--only",
        "^(service|hand-written [a-z]+) (16|16 x 64)$",
        "--json",
        str(file),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert set(found["medians"]) == {"service 16", "hand-written JSON 16", "hand-written websocket 16", "hand-written clips 16 x 64"}
    assert all(math.isfinite(value) and value > 0 for figures in found["medians"].values() for value in figures.values())
    assert found["facts"]["same bits"]
    assert "hand-written JSON" in done.stdout


def test_what_cannot_be_installed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tests.bench.rivals.rival.ENVIRONMENTS", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    rival = Rival("nowhere", ("indrnn-no-such-server==1",), RIVALS[0].dialect, RIVALS[0].clips, RIVALS[0].command)
    assert "indrnn-no-such-server" in rival.install()
