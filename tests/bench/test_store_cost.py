"""What the store costs is measured against a real server, quickly: that it works, not what it finds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.valkey_process import need_program

ROOT = Path(__file__).resolve().parents[2]


def test_it_measures_each_load_with_and_without_the_store(tmp_path: Path) -> None:
    need_program()
    file = tmp_path / "cost.json"
    command = [sys.executable, "-m", "tests.bench.store_cost", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())["found"]
    assert len(found) == 3
    for name, [pair] in found.items():
        assert name in done.stdout
        assert min(pair["without"], pair["with"], pair["frames"]) > 0
        assert pair["bytes"] >= 4 * 3072 * pair["saves"] > 0, "a record has the whole state"
    [websockets], [steps], _ = found.values()
    assert websockets["saves"] < websockets["frames"] / 4, "of a stream, not every frame is saved"
    assert steps["saves"] > 0.5 * steps["frames"], "a step is saved before it is answered"
