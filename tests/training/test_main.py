"""The command line: from a clip folder to a verified file; faults in one line; Ctrl-C and resume."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests import toy_models
from tests.training.synthetic import clip_set, recording_set, write_config, write_folder, write_recordings
from training import verify
from training.__main__ import app, main
from training.checkpoint import load
from training.config import load as load_config
from training.onnx_file import read_manifest

ROOT = Path(__file__).parents[2]
COMMANDS = [command.callback.__name__ for command in app.registered_commands if command.callback]


class Result:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `python -m training ARGUMENTS` in this process."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["training", *map(str, arguments)])
        code: Any = 0
        try:
            main()
        except SystemExit as leave:
            code = leave.code or 0
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "it's [mine]", clip_set(96, shortest=1))


@pytest.fixture
def one_line(training: Any) -> Any:
    """Runs a command that must fail with status 1 and one line that says why."""

    def run(*arguments: object) -> str:
        result = training(*arguments)
        assert result.code == 1, result.err
        lines = result.err.strip().splitlines()
        assert len(lines) == 1, result.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in result.err
        return str(lines[0])

    return run


def test_from_a_clip_folder_to_a_verified_file(training: Any, one_line: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "tiny.toml", train={"epochs": 15})

    trained = training("train", config, "--data", folder, "--set", "seed=3", "--set", "model.missing=true")
    assert trained.code == 0, trained.err
    assert "validation" in trained.out
    assert f"next: {sys.executable} -m training evaluate {Path('runs/tiny/seed-3')} " in trained.err
    assert "epoch and configuration chosen on subject c of the training data, held out" in trained.err
    run = tmp_path / "runs" / "tiny" / "seed-3"
    assert {"best.pt", "last.pt", "metrics.jsonl", "config.toml", "curves.png", "confusion.png", "tensorboard"} <= set(os.listdir(run))
    assert list((run / "tensorboard").iterdir())
    assert load_config(run / "config.toml") == load(run / "best.pt").config
    assert load(run / "best.pt").config.data.path == str(folder)

    assert "holds a run: go on with --resume" in one_line("train", config, "--data", folder, "--set", "seed=3", "--set", "model.missing=true")

    first = training("evaluate", run)
    assert first.code == 0, first.err
    kept = json.loads((run / "test.json").read_text())
    assert kept["accuracy"] > 0.75
    assert (kept["clips"], kept["seed"], kept["split"]) == (24, 3, "test")
    assert "subject c" in kept["chosen"]
    before = (run / "test.json").stat().st_mtime_ns
    again = training("evaluate", run)
    assert "already run" in again.err
    assert json.loads(again.out) == kept
    assert (run / "test.json").stat().st_mtime_ns == before
    assert training("evaluate", run, "--split", "validation").code == 0
    assert "no split 'tests'" in training("evaluate", run, "--split", "tests").err

    exported = training("export", run)
    assert exported.code == 0, exported.err
    file = tmp_path / "models" / "tiny" / "1" / "model.onnx"
    manifest = read_manifest(onnx.load(file))
    assert manifest.metrics.values["accuracy"] == pytest.approx(kept["accuracy"], abs=1e-4)
    assert manifest.stream is not None
    assert manifest.stream.verified_frames == 100_000
    assert b"mine" not in file.read_bytes().replace(manifest.data.name.encode(), b"")  # the folder's name is the data's, its path nobody's business

    assert "exists: choose another --to, or pass --replace" in one_line("export", run, "--to", file.parent)

    verified = training("verify", file, "--clips", folder, "--run", run)
    assert verified.code == 0, verified.err
    assert "verified" in verified.err
    assert "against torch and itself" in verified.err

    model = onnx.load(file)
    model.graph.initializer[0].raw_data = bytes(len(model.graph.initializer[0].raw_data))
    onnx.save(model, tmp_path / "tampered.onnx")
    assert "fingerprint" in training("verify", tmp_path / "tampered.onnx", "--clips", folder).err


def test_from_recordings_to_a_verified_file_that_knows_nothing(training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "STREAM_FRAMES", 8_000)
    monkeypatch.chdir(tmp_path)
    data = write_recordings(tmp_path / "recordings", recording_set(16))
    streams = {"steps": 10, "frames": 32, "validation": [4, 4], "together": ["subject"], "whole": 1.0}
    fit: dict[str, Any] = {"train": {"epochs": 12, "batch": 16}, "model": {"units": 24}}
    config = write_config(tmp_path / "tiny.toml", data={"reader": "recording_folder"}, augment={"scale": 0.0}, streams=streams, **fit)
    trained = training("train", config, "--data", data)
    assert trained.code == 0, trained.err
    assert "validation, clip by clip" in trained.out
    run = tmp_path / "runs" / "tiny" / "seed-0"
    found = load(run / "best.pt")
    assert f"validation streams, left running: {100 * found.best:.1f} % of the actions are right; epoch {found.epoch} is the best" in trained.err
    assert load_config(run / "config.toml") == found.config
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"validation_cuts", "validation_smooth", "validation_nothing_accuracy"} <= set(last)
    assert last["validation_whole"] > 0.8

    evaluated = training("evaluate", run)
    assert evaluated.code == 0, evaluated.err
    assert json.loads((run / "test.json").read_text())["clips"] == 20
    exported = training("export", run)
    assert exported.code == 0, exported.err
    manifest = read_manifest(onnx.load(tmp_path / "models" / "tiny" / "1" / "model.onnx"))
    assert manifest.classes == (*sorted(recording_set(16).classes[:3]), "nothing")
    assert manifest.stream is not None
    assert manifest.stream.accuracy_last > 0.8


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_of_every_command(training: Any, command: str) -> None:
    result = training(*filter(None, [command]), "--help")
    assert result.code == 0
    assert "Usage" in result.out


def test_there_are_the_commands_of_the_readme() -> None:
    assert {"train", "evaluate", "export", "verify"} <= set(COMMANDS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.lr=1"], "config.train: unknown field 'lr'"),
        (["seed"], "expected section.key=value"),
        (["seed=x"], "config.seed: expected int, got 'x'"),
        (["name=[/red]"], "name '[/red]' must match"),
        (["name=7"], "config.name: expected str"),
        (["data.path="], "data.path is not set"),
        (["data.path=/nowhere/at/all"], "/nowhere/at/all/index.csv"),
        (["data.reader=nothing"], "data.reader 'nothing' is unknown"),
        (["data.options.layout=nobody"], "unknown layout 'nobody'"),
        (["data.options.units=1"], "data.options.units: expected str"),
        (['data.test={view=["1"]}'], "no group 'view'"),
    ],
)
def test_faults_of_a_configuration_are_one_line(one_line: Any, tmp_path: Path, folder: Path, overrides: list[str], message: str) -> None:
    config = write_config(tmp_path / "tiny.toml", data={"path": str(folder)})
    error = one_line("train", config, "--out", tmp_path / "runs", *(word for override in overrides for word in ("--set", override)))
    assert message in error


def test_a_fault_found_late_ends_in_one_line_and_leaves_no_run(training: Any, tmp_path: Path, folder: Path) -> None:
    config = write_config(tmp_path / "tiny.toml", data={"path": str(folder), "options": {"units": "m", "fps": 30, "frame_shape": [1, 2]}})
    for _ in range(2):
        result = training("train", config, "--out", tmp_path / "runs")
        assert result.code == 1
        assert result.err.strip().splitlines()[-1].endswith("expected (channels,); name the skeleton's layout")
        assert "Traceback" not in result.err


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_a_run_that_is_none_is_one_line(one_line: Any, tmp_path: Path, command: str) -> None:
    assert "best.pt: no such checkpoint; train first" in one_line(command, tmp_path)
    (tmp_path / "best.pt").write_bytes(b"\x80\x02nonsense\n\nof several lines")
    assert "best.pt: not a checkpoint of this project" in one_line(command, tmp_path)


def test_a_file_that_is_no_model_is_one_line(one_line: Any, tmp_path: Path, folder: Path) -> None:
    assert "none.onnx: no such file" in one_line("verify", tmp_path / "none.onnx", "--clips", folder)
    for content, message in ((b"", "has no manifest"), (b"\n\n not an\nonnx file", "not an ONNX file")):
        (tmp_path / "bad.onnx").write_bytes(content)
        assert message in one_line("verify", tmp_path / "bad.onnx", "--clips", folder)


def test_clips_of_another_kind_are_one_line(one_line: Any, tmp_path: Path, folder: Path) -> None:
    file = toy_models.write_toy(tmp_path, "toy", replace(toy_models.CHANNELS, shape=(5,)))
    assert "frames of shape (2,), expected (5,)" in one_line("verify", file, "--clips", folder)
    assert "index.csv" in one_line("verify", file, "--clips", tmp_path)


def test_a_configuration_that_is_a_folder_or_missing_is_one_line(one_line: Any, tmp_path: Path) -> None:
    assert "no such file" in one_line("train", tmp_path / "none.toml")
    assert str(tmp_path) in one_line("train", tmp_path)


def test_nothing_to_resume_is_one_line(one_line: Any, tmp_path: Path, folder: Path) -> None:
    config = write_config(tmp_path / "tiny.toml", data={"path": str(folder)})
    assert "nothing to resume" in one_line("train", config, "--resume", "--out", tmp_path / "runs")


def _interrupted(config: Path, out: Path, metrics: Path, rows: int) -> tuple[int, str]:
    """Trains in a process of its own, presses Ctrl-C after that many epochs; status and what it said."""
    command = [sys.executable, "-m", "training", "train", str(config), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 100
        while not metrics.exists() or len(metrics.read_text().splitlines()) < rows:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, err


def test_ctrl_c_keeps_the_last_epoch_and_resume_ends_where_an_unbroken_run_ends(training: Any, tmp_path: Path, folder: Path) -> None:
    config = write_config(tmp_path / "tiny.toml", data={"path": str(folder)}, train={"epochs": 24})
    run, other = tmp_path / "runs" / "tiny" / "seed-0", tmp_path / "unbroken" / "tiny" / "seed-0"
    code, err = _interrupted(config, tmp_path / "runs", run / "metrics.jsonl", 3)
    assert code == 130
    assert "stopped; the last whole epoch is kept" in err
    assert "Traceback" not in err
    assert 2 <= load(run / "last.pt").epoch < 24
    assert (run / "curves.png").exists()

    assert training("train", config, "--out", tmp_path / "runs", "--resume").code == 0
    assert training("train", config, "--out", tmp_path / "unbroken").code == 0
    for name in ("last.pt", "best.pt"):
        ours, theirs = load(run / name), load(other / name)
        assert ours.epoch == theirs.epoch
        assert all(torch.equal(value, theirs.weights[key]) for key, value in ours.weights.items())
        assert all(torch.equal(value, theirs.training_weights[key]) for key, value in ours.training_weights.items())
    rows = [[json.loads(line) | {"seconds": 0, "waiting": 0} for line in (of / "metrics.jsonl").read_text().splitlines()] for of in (run, other)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 24


def test_a_run_stopped_in_its_first_epoch_may_simply_be_started_again(training: Any, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path / "tiny.toml", data={"path": str(folder)}, train={"epochs": 1})

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.__main__.fit", interrupted)
    stopped = training("train", config, "--out", tmp_path / "runs")
    assert stopped.code == 130
    assert "stopped before the first epoch was done" in stopped.err
    monkeypatch.undo()
    assert training("train", config, "--out", tmp_path / "runs").code == 0


def test_several_seeds_their_mean_and_their_ensemble(training: Any, one_line: Any, tmp_path: Path, folder: Path) -> None:
    config = write_config(tmp_path / "tiny.toml", data={"path": str(folder)}, train={"epochs": 2}, model={"missing": True})
    done = training("train", config, "--out", tmp_path / "runs", "--seeds", "1,4")
    assert done.code == 0, done.err
    runs = [tmp_path / "runs" / "tiny" / f"seed-{seed}" for seed in (1, 4)]
    assert [load(run / "best.pt").config.seed for run in runs] == [1, 4]
    best = [load(run / "best.pt").best for run in runs]
    assert re.search(rf"mean +│ +{100 * np.mean(best):.1f}", done.out)
    assert re.search(rf"standard deviation +│ +{100 * np.std(best, ddof=1):.1f}", done.out)
    assert "seed-1 holds a run" in one_line("train", config, "--out", tmp_path / "runs", "--seeds", "2")  # 0 and 1
    assert not (tmp_path / "runs" / "tiny" / "seed-0").exists()

    result = training("evaluate", *runs, "--ensemble")
    assert result.code == 0, result.err
    kept = [np.load(run / "test.npz") for run in runs]
    accuracies = [json.loads((run / "test.json").read_text())["accuracy"] for run in runs]
    together = float((np.mean([one["scores"] for one in kept], 0).argmax(1) == kept[0]["labels"]).mean())
    assert [float((one["scores"].argmax(1) == one["labels"]).mean()) for one in kept] == accuracies
    assert re.search(rf"mean +│ +{100 * np.mean(accuracies):.1f}", result.out)
    assert re.search(rf"scores averaged +│ +{100 * together:.1f}", result.out)
    again = training("evaluate", *runs, "--ensemble")
    assert again.err.count("already run") == 2
    assert f"{100 * together:.1f}" in again.out


def test_test_clips_that_training_has_as_well_are_said(training: Any, tmp_path: Path) -> None:
    clips = clip_set(48)
    test, known = (np.flatnonzero(clips.groups["split"] == split)[:5] for split in ("test", "train"))
    frames = list(clips.frames)
    for copy, original in zip(test, known, strict=True):
        frames[copy] = frames[original]
    data = write_folder(tmp_path / "data", replace(clips, frames=tuple(frames)))
    config = write_config(tmp_path / "tiny.toml", data={"path": str(data)}, train={"epochs": 1})
    assert training("train", config, "--out", tmp_path / "runs", "--seeds", "2").code == 0
    runs = [tmp_path / "runs" / "tiny" / f"seed-{seed}" for seed in range(2)]
    result = training("evaluate", *runs)
    figures = [json.loads((run / "test.json").read_text()) for run in runs]
    assert [one["copies"] for one in figures] == [5, 5]
    for one in figures:
        others = f"of the other 7, {100 * one['accuracy_without_copies']:.1f} % are right"
        assert f"5 of the test clips are training clips as well, number for number; {others}" in result.err
    assert "without copies %" in result.out


@pytest.mark.parametrize("seeds", ["x", "1,1", "1,,2", "-1", "0"])
def test_seeds_that_are_none_are_one_line(one_line: Any, tmp_path: Path, folder: Path, seeds: str) -> None:
    config = write_config(tmp_path / "tiny.toml", data={"path": str(folder)})
    assert "expected different numbers" in one_line("train", config, "--out", tmp_path / "runs", f"--seeds={seeds}")


def test_crossvalidation_holds_every_subject_out_once(training: Any, one_line: Any, tmp_path: Path, folder: Path) -> None:
    config = write_config(tmp_path / "tiny.toml", data={"path": str(folder)}, train={"epochs": 2}, model={"missing": True})
    done = training("crossvalidate", config, "--out", tmp_path / "runs", "--folds", "3", "--by", "subject")
    assert done.code == 0, done.err
    whole = tmp_path / "runs" / "tiny" / "folds-3-by-subject"
    kept = json.loads((whole / "crossvalidation.json").read_text())
    assert kept["clips"] == [24, 24, 24]  # a, b and c; d is the test part
    best = [load(whole / f"fold-{fold}-seed-0" / "best.pt").best for fold in range(3)]
    assert kept["best_epoch"]["accuracy"] == pytest.approx(best)
    assert kept["best_epoch"]["mean"] == pytest.approx(np.mean(best))
    assert kept["last_epoch"]["deviation"] == pytest.approx(np.std(kept["last_epoch"]["accuracy"], ddof=1))
    assert f"{100 * kept['last_epoch']['mean']:.1f} % on average" in done.err
    assert "holds a run" in one_line("crossvalidate", config, "--out", tmp_path / "runs", "--folds", "3", "--by", "subject")
    assert "4 folds of 3 groups (a, b, c)" in training("crossvalidate", config, "--out", tmp_path / "runs", "--folds", "4", "--by", "subject").err
    assert "no group 'person'" in training("crossvalidate", config, "--out", tmp_path / "runs", "--by", "person").err
    assert training("crossvalidate", config, "--folds", "1").code == 2
    folds = [whole / f"fold-{fold}-seed-0" for fold in range(2)]  # as many clips, in the same order of classes
    assert "fold-1-seed-0: its validation clips or its classes are not those" in one_line("evaluate", *folds, "--split", "validation", "--ensemble")
    assert not list(whole.glob("*/validation.json"))
    assert training("evaluate", *folds, "--ensemble").code == 0


def test_a_fault_of_the_test_clips_is_found_before_training(training: Any, tmp_path: Path) -> None:
    clips = clip_set(24)
    clips.frames[int(np.flatnonzero(clips.groups["split"] == "test")[1])][2] = np.nan
    data = {"path": str(write_folder(tmp_path / "clips", clips)), "options": {"units": "metres", "fps": 30, "missing": True}}
    result = training("train", write_config(tmp_path / "tiny.toml", data=data), "--out", tmp_path / "runs")
    assert result.code == 1
    assert "values are missing in test clips: set model.missing = true (the first is clip 1)" in result.err
    assert not (tmp_path / "runs").exists()


def test_what_cannot_fit_leaves_no_run(training: Any, tmp_path: Path, folder: Path) -> None:
    config = write_config(tmp_path / "tiny.toml", data={"path": str(folder)}, train={"batch": 10**9}, model={"missing": True})
    result = training("train", config, "--out", tmp_path / "runs")
    assert result.code == 1
    assert "estimated to need" in result.err
    assert not (tmp_path / "runs").exists()


def test_messages_keep_brackets(one_line: Any, tmp_path: Path) -> None:
    """Rich would take them for markup: paths and values are shown as they are."""
    strange = tmp_path / "[bold]runs[/]"
    assert re.search(r"\[bold\]runs\[/\]/best\.pt: no such checkpoint", one_line("evaluate", strange))


def test_a_clip_of_one_frame_is_in_the_folder(folder: Path) -> None:
    assert min(len(np.load(path)) for path in folder.glob("*.npy")) == 1
