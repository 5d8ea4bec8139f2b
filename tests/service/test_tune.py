"""What is chosen from timings, and the command on a real model."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from service.engine import default_threads
from service.errors import StartupError
from service.settings import load_settings
from service.tune import Bench, Choice, Timings, choose, find, table, thread_counts, write
from tests.server_process import ROOT

DEFAULT = (1, 64)


def timings_of(rates: dict[tuple[int, int], float], scatter: float = 0.0) -> Timings:
    """Five rounds in which these frames a second were measured, give or take."""
    timings = Timings()
    for (threads, batch), rate in rates.items():
        for off in (-1, -0.5, 0, 0.5, 1):
            timings.add((threads, batch), batch / rate * (1 + off * scatter))
    return timings


def test_a_real_difference_is_chosen_with_its_gain() -> None:
    chosen = choose(timings_of({(1, 64): 1000, (1, 128): 1500, (1, 256): 1520}), 1, DEFAULT)
    assert (chosen.threads, chosen.max_batch) == (1, 128), "the smallest of those that are about as fast"
    assert "50% more than the defaults" in chosen.reason
    assert chosen.settings() == {"INDRNN_THREADS": "1", "INDRNN_MAX_BATCH": "128"}


def test_a_small_difference_is_none() -> None:
    chosen = choose(timings_of({(1, 32): 1040, (1, 64): 1000, (1, 256): 1045}), 4, DEFAULT)
    assert (chosen.threads, chosen.max_batch) == DEFAULT
    assert chosen.reason.startswith("no real difference")


def test_what_scatters_as_much_as_it_differs_is_no_difference() -> None:
    rates = {(1, 64): 1000.0, (1, 128): 1200.0}
    assert choose(timings_of(rates, scatter=0.02), 4, DEFAULT).max_batch == 128
    assert choose(timings_of(rates, scatter=0.5), 4, DEFAULT).max_batch == 64


def test_one_round_is_too_little_to_say_anything() -> None:
    timings = Timings()
    timings.add((1, 64), 0.064)
    timings.add((1, 128), 0.080)
    assert choose(timings, 4, DEFAULT).reason.startswith("no real difference")


def test_one_core_is_left_to_the_event_loop() -> None:
    rates = {(1, 64): 1000.0, (2, 64): 1700.0, (4, 64): 3000.0}
    four = choose(timings_of(rates), 4, DEFAULT)
    assert four.threads == 2
    assert "With 4 threads it is 76% faster alone, but they leave no core to the event loop" in four.reason
    assert choose(timings_of(rates), 8, DEFAULT).threads == 4
    assert choose(timings_of(rates), 1, DEFAULT).threads == 1


def test_the_fewest_threads_among_those_that_are_about_as_fast() -> None:
    chosen = choose(timings_of({(1, 64): 1000, (2, 64): 2000, (4, 64): 2050}), 16, DEFAULT)
    assert (chosen.threads, chosen.max_batch) == (2, 64)


def test_without_the_defaults_nothing_is_chosen() -> None:
    with pytest.raises(ValueError, match="1 threads with 64 streams were not measured"):
        choose(timings_of({(1, 1): 10}), 4, DEFAULT)


@pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (64, [1, 2, 4, 8, 16, 32, 64])])
def test_counts_of_threads(cores: int, counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.tune.default_threads", lambda: 1)
    assert thread_counts(cores) == counts


def test_the_table_shows_what_is_missing() -> None:
    timings = timings_of({(1, 1): 1000, (1, 64): 64_000, (2, 1): 500})
    assert table(timings).splitlines() == [
        "                         1 thread                 2 threads",
        "streams     ms a run     frames/s     ms a run     frames/s",
        "      1        1.000        1,000        2.000          500",
        "     64        1.000       64,000            -            -",
    ]


def test_other_lines_of_the_file_stay(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("# mine\nINDRNN_TOKEN=secret=1\nINDRNN_THREADS=9\nexport INDRNN_MAX_BATCH=3")
    write(path, Choice(1, 128, "").settings())
    assert path.read_text() == "# mine\nINDRNN_TOKEN=secret=1\nINDRNN_THREADS=1\nINDRNN_MAX_BATCH=128\n"
    with pytest.raises(StartupError, match="cannot be written"):
        write(tmp_path, {})


def test_measuring_fills_every_cell_once_a_round(models: Path) -> None:
    timings, seen = Timings(), []
    bench = Bench.load(find([models], "channels", None, "cpu"), "cpu", [1, 2])
    bench.measure(timings, [1, 4], 3, lambda done, of: seen.append((done, of)))
    assert {cell: len(values) for cell, values in timings.seconds.items()} == {(1, 1): 3, (1, 4): 3, (2, 1): 3, (2, 4): 3}
    assert all(0 < value < 1 for values in timings.seconds.values() for value in values)
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_the_model_is_the_one_that_is_served(models: Path) -> None:
    assert find([models], "channels", None, "cpu").version == "10"
    assert find([models], "channels", "9", "cpu").version == "9"
    with pytest.raises(StartupError, match=r"no model 'nothing'; there are bare, channels, .*gestures"):
        find([models], "nothing", None, "cpu")
    with pytest.raises(StartupError, match="self-test"):
        find([models], "wrong", None, "cpu")


def tuned(models: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "service", "tune", "--models", str(models), *options]
    own = {name: value for name, value in os.environ.items() if not name.startswith("INDRNN_")}
    return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=120)


def test_the_command_prints_a_table_and_writes_settings_that_the_service_takes(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tuned.env"
    done = tuned(models, "--model", "channels", "--rounds", "3", "--batches", "1,8", "--write", str(file))
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^ +(\d+)  .*[\d.]+ +[\d,]+$", done.stdout, re.MULTILINE)
    assert rows == ["1", "8", "64"], "the default is always measured"
    assert "round 3 of 3" in done.stderr
    settings = dict(line.split("=") for line in file.read_text().splitlines())
    assert set(settings) == {"INDRNN_THREADS", "INDRNN_MAX_BATCH"}
    assert all(f"{name}={value}" in done.stdout for name, value in settings.items())
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert load_settings().max_batch == int(settings["INDRNN_MAX_BATCH"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model", "nothing"), "error: no model 'nothing'; there are "),
        (("--model", "channels", "--batches", "1,x"), "error: --batches: numbers from 1 to 4096"),
        (("--model", "channels", "--batches", "0"), "error: --batches: numbers from 1 to 4096"),
        (("--model", "channels", "--device", "tpu"), "error: --device: "),
    ],
)
def test_what_cannot_be_measured_is_said(models: Path, options: tuple[str, ...], said: str) -> None:
    done = tuned(models, *options)
    assert (done.returncode, done.stderr.splitlines()[-1][: len(said)]) == (1, said)


def test_ctrl_c_shows_what_is_known_and_writes_nothing(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "tuned.env"
    command = [sys.executable, "-m", "service", "tune", "--models", str(models), "--model", "channels", "--batches", "64"]
    command += ["--rounds", "400", "--write", str(file)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "  round 100 of 400\n"
        process.send_signal(signal.SIGINT)
        out, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"INDRNN_THREADS={default_threads()}" in out
    assert re.findall(r"^ +(\d+)  ", out, re.MULTILINE) == ["64"]
    assert "nothing was written" in told
    assert "Traceback" not in told
    assert not file.exists()
