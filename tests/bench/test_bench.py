"""The benchmark works: a run of moments measures everything, and the scores it got are onnxruntime's. Its figures mean nothing here."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.bench import bars
from tests.bench.bars import BARS, Bar, chosen, fact, ratio
from tests.bench.bench import Bench
from tests.bench.dialects import RestSteps
from tests.bench.figures import Figure, Report, Variant
from tests.bench.machine import Usage
from tests.bench.servers import DIALECTS

ROOT = Path(__file__).resolve().parents[2]
ABOVE, BELOW = Variant("service", 1), Variant("echo", 1)


def command(*options: str, entry: tuple[str, ...] = ("-m", "tests.bench")) -> list[str]:
    return [sys.executable, "-W", "error", *entry, *options]


def test_a_quick_run(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    done = subprocess.run(command("--quick", "--json", str(file)), cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    _, variants, facts = chosen(None)
    assert set(found["medians"]) == {variant.name for variant in variants}
    assert facts <= set(found["facts"])
    figures = [value for variant in found["medians"].values() for value in variant.values()]
    assert all(math.isfinite(figure) and figure > 0 for figure in figures)
    assert found["facts"]["answers compared"] > 500
    assert found["facts"]["same bits"], found["facts"]
    judged = {bar["name"]: bar["verdict"] for bar in found["bars"]}
    assert judged.keys() == {bar.name for bar in BARS}
    assert {name for name, verdict in judged.items() if verdict == "not measured"} <= {"the same: frames computed over frames taken"}
    assert "service 64 over echo 64" in done.stdout


def test_some_rows_only(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    options = ("--quick", "--only", "^alone 16$", "--json", str(file))
    done = subprocess.run(command(*options, entry=("tests/bench",)), cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(file.read_text())["medians"]) == ["alone 16"]
    wrong = subprocess.run(command("--only", "nothing is called so"), cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert wrong.returncode == 2
    assert "service 64 over echo 64" in wrong.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_shows_what_it_has(tmp_path: Path, number: signal.Signals) -> None:
    """Wherever that comes: half of the time it runs compiled code, which knows no signals. Nothing that it started is left."""
    file = tmp_path / "bench.json"
    options = command("--only", "^(alone|echo) 1$", "--seconds", "0.3", "--warmup", "0.1", "--rounds", "1000", "--json", str(file))
    process = subprocess.Popen(options, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        for line in iter(process.stdout.readline, ""):
            if line.startswith("starts"):
                break
        time.sleep(5)  # for the start of an echo, and some rounds
        started = children(process.pid)
        os.kill(process.pid, number)
        out, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "stopped: figures are of what was measured until then" in out
    found = json.loads(file.read_text())
    assert found["stopped"]
    assert found["medians"]
    assert len(started) == 2  # the service, of which an answer is measured, and the echo
    assert not [one for one in started if Path(f"/proc/{one}").exists()]


def children(process: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_what_fails_is_told_and_the_rest_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that never starts its sessions: the JSON echo stands in the service's place, and refuses to open one."""
    args = Namespace(rounds=2, seconds=0.05, warmup=0.01, open_sessions=0)
    report = Report({})
    monkeypatch.setitem(DIALECTS, "steps", ("json echo", RestSteps, False))
    with ExitStack() as stack:
        bench = Bench(tmp_path, args, stack)
        bench.compare([("steps", 2, 1), ("service", 2, 1)], report)
        bench.rounds([Variant("steps", 2), Variant("alone", 2)], report, Console(quiet=True))
    assert set(report.failures) == {"scores of steps", "steps 2"}
    assert "404" in report.failures["steps 2"]
    assert list(report.figures) == [Variant("alone", 2)]
    assert bars.DIFFERENCE not in report.facts
    assert report.facts["answers compared"] > 8


def report_of(*rounds: tuple[float, float]) -> Report:
    report = Report({})
    for number, (above, below) in enumerate(rounds):
        report.add(ABOVE, number, Figure(above, 1000 / above, 1.0))
        report.add(BELOW, number, Figure(below, 1000 / below, 1.0))
    return report


def test_ratios_are_medians_of_the_ratios_within_rounds() -> None:
    report = report_of((10.0, 100.0), (30.0, 100.0), (20.0, 400.0))
    assert report.ratio(ABOVE, BELOW) == pytest.approx(0.1)
    report.add(ABOVE, 3, Figure(99.0, 1.0, 1.0))  # a round that was interrupted
    assert report.ratio(ABOVE, BELOW) == pytest.approx(0.1)
    assert report.ratio(ABOVE, Variant("alone", 1)) is None


def test_rounds_in_which_others_were_at_work_do_not_count() -> None:
    report = report_of((10.0, 100.0), (30.0, 100.0), (50.0, 100.0))
    report.add(ABOVE, 1, Figure(30.0, 1.0, 1.0, others=0.9))
    report.add(BELOW, 2, Figure(100.0, 1.0, 1.0, others=0.5))
    assert report.ratio(ABOVE, BELOW) == pytest.approx(0.3)  # of 10 and 50 of 100: the calmer half, and that is two of three
    report.add(BELOW, 0, Figure(100.0, 1.0, 1.0, others=0.05))
    report.add(ABOVE, 3, Figure(20.0, 1.0, 1.0))
    report.add(BELOW, 3, Figure(100.0, 1.0, 1.0))
    assert report.ratio(ABOVE, BELOW) == pytest.approx(0.15)  # of 10 and 20, which were calm


def test_what_others_take_of_the_cores_is_told_from_what_our_servers_take() -> None:
    cores = sorted(os.sched_getaffinity(0))
    spin = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(spin, start_new_session=True) as process:
        try:
            time.sleep(0.1)
            before, began = [Usage.now(cores, known) for known in ([], [process.pid])], time.perf_counter()
            time.sleep(1.0)
            after, seconds = [Usage.now(cores, known) for known in ([], [process.pid])], time.perf_counter() - began
        finally:
            process.kill()
    theirs, ours = (now.others_since(then, seconds) for now, then in zip(after, before, strict=True))
    assert 0.2 < theirs - ours < 1.1  # one busy process, on a machine where others may be busy too
    assert theirs < len(cores) + 0.1


@pytest.mark.parametrize(
    ("bar", "verdict"),
    [
        (ratio(ABOVE, BELOW, 0.1), (0.1, 0.1, "met")),
        (ratio(ABOVE, BELOW, 0.2), (0.1, 0.2, "missed")),
        (ratio(ABOVE, BELOW), (0.1, None, "")),
        (ratio(ABOVE, Variant("alone", 1), 0.2), (None, 0.2, "not measured")),
        (fact("memory", 12.0), (11.0, 12.0, "met")),
        (fact("memory", 10.0), (11.0, 10.0, "missed")),
        (fact("memory", "most"), (11.0, 10.5, "missed")),
        (fact("time", 1.0), (None, 1.0, "not measured")),
    ],
)
def test_a_bar_is_met_missed_or_not_measured(bar: Bar, verdict: tuple[Any, ...]) -> None:
    report = report_of((10.0, 100.0))
    report.facts = {"memory": 11.0, "most": 10.5}
    value, limit, said = bar.judge(report)
    assert (value and round(value, 6), limit, said) == verdict


def test_a_pattern_chooses_a_bar_with_all_it_is_computed_from() -> None:
    some, variants, facts = chosen("over echo 256")
    assert [bar.name for bar in some] == ["service 256 over echo 256", "picows echo 256 over echo 256"]
    assert variants == [Variant("service", 256), Variant("echo", 256), Variant("picows echo", 256)]
    assert not facts
    assert chosen("memory of an idle")[2] == {bars.SESSION_KB, bars.SESSION_LIMIT_KB}
