"""`python -m training streams`, on networks trained in a moment."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training.synthetic import cued_clips, write_config, write_folder
from training.__main__ import main
from training.stream_report import CLIPS_ORACLE, CLIPS_RUNNING, CLIPS_WINDOW, STREAMS

STREAMED = {"together": ["split"], "steps": 20, "frames": 64, "stay": [3, 6], "blend": [3, 6], "idle": 10, "validation": [4, 4]}
SMALL = ("--streams", "6", "--actions", "6", "--window", "12")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on streams and one on clips, of actions whose class shows at their beginning alone; and where the data lie."""
    folder = tmp_path_factory.mktemp("streams")
    data = write_folder(folder / "data", cued_clips(120))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, sections in (("streamed", {"streams": STREAMED}), ("clipped", {})):
            model = {"units": 24, "horizon": 30, "dropout": 0.0}
            train = {"epochs": 12, "batch": 16, "learning_rate": 1e-2, "ema": 0.9, "threads": 1, "max_frames": 64}
            path = write_config(folder / f"{name}.toml", name=name, model=model, train=train, augment={"cut_start": 0.0, "speed": 1.0}, **sections)
            patch.setattr(sys, "argv", ["training", "train", str(path), "--data", str(data), "--out", str(folder / "runs")])
            _run()
    return {name: folder / "runs" / name / "seed-0" for name in ("streamed", "clipped")} | {"data": data}


def _run() -> int:
    try:
        main()
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0


def test_a_network_for_streams_beside_one_for_clips(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["streams", runs["streamed"], "--clips", runs["clipped"], "--data", runs["data"], *SMALL]
    monkeypatch.setattr(sys, "argv", ["training", *map(str, arguments)])
    assert _run() == 0, capsys.readouterr().err
    shown = capsys.readouterr()
    kept = json.loads((runs["streamed"] / "streams-test.json").read_text())
    assert set(kept["forms"]) == {"cuts", "smooth"}
    for form, rows in kept["forms"].items():
        assert f"streamed, test, {form}" in shown.out
        by_name: dict[str, Any] = {row["name"]: row for row in rows}
        assert set(by_name) == {STREAMS, CLIPS_RUNNING, CLIPS_ORACLE, CLIPS_WINDOW}
        for name, row in by_name.items():
            assert name in shown.out
            assert len(row["early"]) == 10
            assert len(row["figures"]["by_position"]) == 6
        assert by_name[CLIPS_WINDOW]["multiplications"] == 12 * by_name[CLIPS_RUNNING]["multiplications"]
        assert by_name[CLIPS_ORACLE]["rules"] is None
        assert by_name[CLIPS_RUNNING]["rules"]["nothing"] is None
        assert by_name[STREAMS]["rules"]["nothing"] == "nothing"
    assert all(row["figures"]["actions_without_copies"] is None for row in kept["forms"]["smooth"]), "no clip is a copy"
    smooth = {row["name"]: row["figures"]["actions"] for row in kept["forms"]["smooth"]}
    assert smooth[STREAMS] > 0.6, smooth  # a third is chance
    assert smooth[CLIPS_ORACLE] >= smooth[CLIPS_RUNNING]


def test_every_run_of_several_is_measured_in_every_form(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    several = [Path(shutil.copytree(runs["streamed"], tmp_path / f"seed-{seed}")) for seed in range(3)]
    for run in several:
        (run / "streams-test.json").unlink(missing_ok=True)
    monkeypatch.setattr(sys, "argv", ["training", "streams", *map(str, several), "--data", str(runs["data"]), *SMALL])
    assert _run() == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    kept = [json.loads((run / "streams-test.json").read_text())["forms"] for run in several]
    for form in ("cuts", "smooth"):
        assert f"streamed, test, {form}, mean of 3 runs" in shown
        assert [one[form] for one in kept] == [kept[0][form]] * 3


def test_actions_that_were_trained_on_are_told_apart(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = cued_clips(120)
    known = np.flatnonzero((clips.groups["split"] == "test") & (clips.labels == 0))
    trained = np.flatnonzero((clips.groups["split"] != "test") & (clips.labels == 0))[: len(known)]
    frames = list(clips.frames)
    for copy, original in zip(known, trained, strict=True):
        frames[copy] = frames[original]
    data = write_folder(tmp_path / "copied", replace(clips, frames=tuple(frames)))
    monkeypatch.setattr(sys, "argv", ["training", "streams", str(runs["streamed"]), "--data", str(data), "--form", "smooth", *SMALL])
    assert _run() == 0, capsys.readouterr().err
    assert "without" in capsys.readouterr().out  # copies %, on the next line of the head
    (row,) = json.loads((runs["streamed"] / "streams-test.json").read_text())["forms"]["smooth"]
    assert 0.5 < row["figures"]["actions_without_copies"] <= 1


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["{clipped}"], "was not trained on streams"),
        (["{streamed}", "--clips", "{clipped}", "--clips", "{clipped}"], "give one for each"),
        (["{streamed}", "--split", "training"], "there are test and validation"),
        (["{streamed}", "--form", "jumps"], "there are cuts, smooth, whole, repeats"),
        (["{streamed}", "--form", "whole"], "streams of the form whole need recordings"),
    ],
)
def test_faults_are_one_line(
    runs: dict[str, Path], arguments: list[str], fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [one.format(**runs) for one in arguments]
    monkeypatch.setattr(sys, "argv", ["training", "streams", *given, "--data", str(runs["data"]), *SMALL])
    assert _run() == 1
    error = capsys.readouterr().err
    assert fault in " ".join(error.split())
    assert "Traceback" not in error
