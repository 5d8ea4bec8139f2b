"""The player as people use it: the command in a process of its own, against a real server, into a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from service import player
from service.client import Client, Model, ModelChanged, Warned
from service.player import PlayerError, Recording, find_recording, fit, read_recording
from tests.server_process import ROOT, Server
from tests.toy_models import CHANNELS, EXPLOSIVE, GESTURES, SKELETON, example_frames, moving_frames

WITHIN_S = 60.0


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "service", "stream", *map(str, arguments)]


def stream(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=WITHIN_S)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A recording of the toy `channels` of 60 frames in which the label changes."""
    path = tmp_path / "clip.npy"
    np.save(path, example_frames(CHANNELS, 60))
    return path


# Reading recordings


def saved(folder: Path, suffix: str, frames: Any) -> Path:
    path = folder / f"recording{suffix}"
    if suffix == ".npy":
        np.save(path, frames)
    elif suffix == ".npz":
        np.savez(path, frames=frames, fps=25.0, layout="body-13")
    elif suffix == ".json":
        listed = [[None if np.isnan(joint).any() else joint.tolist() for joint in frame] for frame in frames]
        path.write_text(json.dumps({"frames": listed, "fps": 25, "layout": "body-13"}))
    else:
        path.write_text("\n".join(",".join("" if np.isnan(v) else repr(float(v)) for v in frame.ravel()) for frame in frames))
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".json", ".csv"])
def test_every_format_gives_the_same_frames_with_missing_ones_as_nan(tmp_path: Path, suffix: str) -> None:
    frames = example_frames(SKELETON, 8)
    frames[2, 4] = np.nan
    recording = read_recording(saved(tmp_path, suffix, frames))
    assert recording.frames.dtype == np.float32
    np.testing.assert_array_equal(recording.frames.reshape(8, 13, 3), frames)
    if suffix in (".npz", ".json"):
        assert (recording.fps, recording.layout) == (25.0, "body-13")


def test_plain_lists_single_arrays_and_headers(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[[1, 2], [3, null]]")
    np.testing.assert_array_equal(read_recording(tmp_path / "a.json").frames, [[1, 2], [3, np.nan]])
    np.savez(tmp_path / "b.npz", whatever=np.ones((3, 2)))
    assert read_recording(tmp_path / "b.npz").shape == (2,)
    (tmp_path / "c.csv").write_text("x,y\n1,2\n\n3,nan\n")
    np.testing.assert_array_equal(read_recording(tmp_path / "c.csv").frames, [[1, 2], [3, np.nan]])


BAD: list[tuple[str, str | bytes, str]] = [
    ("a.txt", "1 2 3", "ends in .npy, .npz, .json, .csv"),
    ("a.npy", b"nonsense", "cannot be read"),
    ("a.npz", b"PK nonsense", "cannot be read"),
    ("b.npz", b"PK\x03\x04 cut off", "cannot be read"),
    ("a.json", "{", "cannot be read"),
    ("a.json", "[" * 9000 + "]" * 9000, "cannot be read"),
    ("a.json", "[[1" + 400 * "0" + "]]", "cannot be read"),
    ("a.json", '{"frames": [[1, 2]], "fps": 0}', "got fps 0"),
    ("a.json", '{"clip": []}', "expected"),
    ("a.json", "[[1, 2], [3]]", "cannot be read"),
    ("a.json", '[["a"], ["b"]]', "cannot be read"),
    ("a.json", "[]", "expected frames of shape"),
    ("a.json", "[1, 2]", "expected frames of shape"),
    ("a.csv", "1,2\n3\n", "line 2: expected 2 values, got 1"),
    ("a.csv", "1,2\n3,four\n", "line 2: 'four' is no number"),
    ("a.csv", "", "expected frames of shape"),
    ("a.csv", b"\xff\xfe\x00", "cannot be read"),
    ("a.csv", '"' + 200_000 * "1" + '",2', "cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_what_cannot_be_read_is_said_with_the_file(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PlayerError) as caught:
        read_recording(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_pickles_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(PlayerError, match="cannot be read"):
        read_recording(tmp_path / "a.npy")


def test_a_shipped_sample_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rehab").mkdir()
    sample = saved(tmp_path / "rehab", ".npy", example_frames(CHANNELS, 2)).rename(tmp_path / "rehab" / "deep-squat.npy")
    (tmp_path / "rehab" / "index.csv").write_text("file,label\ndeep-squat.npy,deep squat\n")
    monkeypatch.setattr(player, "SAMPLES", tmp_path)
    assert find_recording("deep-squat") == find_recording("deep-squat.npy") == find_recording(str(sample)) == sample
    with pytest.raises(PlayerError, match=r"shipped samples: deep-squat$"):
        find_recording("deep-squad")
    with pytest.raises(PlayerError, match="is a folder"):
        find_recording(str(tmp_path))


@pytest.fixture
def skeleton(server: Server) -> Model:
    with Client(server.url) as client:
        return client.model("skeleton")


def recording(*shape: int) -> Recording:
    return Recording("test", np.zeros((2, *shape), np.float32))


def test_flat_frames_are_folded_and_other_shapes_are_refused_with_advice(skeleton: Model) -> None:
    assert fit(recording(13, 3), skeleton, None).shape == (2, 13, 3)
    assert fit(recording(39), skeleton, None).shape == (2, 13, 3)
    assert fit(recording(25, 3), skeleton, "kinect-v2").shape == (2, 25, 3)
    assert fit(recording(75), skeleton, "kinect-v2").shape == (2, 25, 3)
    with pytest.raises(PlayerError, match=re.escape("(25, 3), skeleton takes (13, 3) (layout body-13); try --layout kinect-v2")):
        fit(recording(25, 3), skeleton, None)
    with pytest.raises(PlayerError, match=re.escape("skeleton takes (13, 3)")):
        fit(recording(3, 13), skeleton, None)
    with pytest.raises(PlayerError, match="--layout may be one of: body-13, kinect-v1"):
        fit(recording(13, 3), skeleton, "horse")


def test_a_model_without_skeletons_takes_no_layout(server: Server) -> None:
    with Client(server.url) as client, pytest.raises(PlayerError, match="leave --layout out"):
        fit(recording(3), client.model("channels"), "body-13")


# Playing


def test_into_a_pipe_it_prints_changes_and_a_summary(server: Server, clip: Path) -> None:
    done = stream(clip, "--model", "channels", "--url", server.url, "--speed", 10)
    assert done.returncode == 0, done.stderr
    *lines, summary = done.stdout.splitlines()
    with Client(server.url) as client:
        scores = client.predict("channels", np.load(clip), scores="all").scores
    assert scores is not None
    best = scores.argmax(axis=1)
    changes = [frame for frame in range(60) if frame == 0 or best[frame] != best[frame - 1]]
    assert lines == [f"{frame} {frame / 30:.2f} {CHANNELS.classes[best[frame]]} {scores[frame].max():.3f}" for frame in changes]
    assert summary.startswith("60 answers to frame 60 in ")
    assert f"{len(changes)} changes, last {CHANNELS.classes[best[-1]]}" in summary
    assert "round trip p50" in summary


def test_events_are_lines_as_they_come(server: Server, tmp_path: Path) -> None:
    frames = moving_frames(GESTURES, 120, seed=21)
    np.save(tmp_path / "a.npy", frames)
    with Client(server.url) as client:
        events = client.predict("gestures", frames).events
    assert len(events) > 2
    done = stream(tmp_path / "a.npy", "--model", "gestures", "--url", server.url, "--speed", 20)
    assert done.returncode == 0, done.stderr
    *lines, summary = done.stdout.splitlines()
    printed = [f"{event.frame} {event.time:.2f} {event.event} {event.label} {event.score:.3f} decided {event.decided}" for event in events]
    assert [line for line in lines if " decided " in line] == printed
    assert f", {len(events)} events, last " in summary


def test_the_pace_is_the_recordings_own(server: Server, clip: Path) -> None:
    took = {}
    for speed in (2, 8):
        done = stream(clip, "--model", "channels", "--url", server.url, "--speed", speed, "--chunk", 4)
        found = re.search(r"in ([0-9.]+) s", done.stdout)
        assert found, done.stderr
        took[speed] = float(found[1])
    assert 0.95 <= took[2] <= 3  # 60 frames at 30 a second, twice as fast
    assert 0.2 <= took[8] < took[2]


def test_regression_prints_values(server: Server, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", example_frames(EXPLOSIVE, 4))
    done = stream(tmp_path / "a.npy", "--model", "explosive", "--url", server.url)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"0 0\.00 -?[0-9.]+ -?[0-9.]+", done.stdout.splitlines()[0])


FAULTS: list[tuple[str, Callable[[Path], list[Any]], str]] = [
    ("no such file", lambda clip: [clip.with_name("nope.npy"), "--model", "channels"], "is no file"),
    ("unknown model", lambda clip: [clip, "--model", "nope"], "this service has: channels"),
    ("wrong shape", lambda clip: [clip, "--model", "skeleton"], "skeleton takes (13, 3)"),
    ("wrong layout", lambda clip: [clip, "--model", "skeleton", "--layout", "horse"], "--layout may be one of"),
    ("wrong rate", lambda clip: [clip, "--model", "channels", "--fps", "1200"], "from 0.001 to 1000 frames a second are taken"),
    ("bad address", lambda clip: [clip, "--model", "channels", "--url", "nowhere"], "looks like http://127.0.0.1:8000"),
    ("endless rate", lambda clip: [clip, "--model", "channels", "--fps", "inf"], "--fps must be a number above 0"),
    ("token beyond ASCII", lambda clip: [clip, "--model", "channels", "--token", "pässword"], "printable ASCII"),
    ("nothing there", lambda clip: [clip, "--model", "channels", "--url", "http://127.0.0.1:9"], "start it with `python -m service`"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), FAULTS, ids=[name for name, *_ in FAULTS])
def test_faults_are_one_line_and_status_1(server: Server, clip: Path, name: str, arguments: Callable[[Path], list[Any]], message: str) -> None:
    given = arguments(clip)
    done = stream(*given, *([] if "--url" in given else ["--url", server.url]))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_frames_that_the_service_refuses_end_it_with_the_reason(server: Server, tmp_path: Path) -> None:
    frames = example_frames(CHANNELS, 6)
    frames[3] = np.inf
    np.save(tmp_path / "a.npy", frames)
    done = stream(tmp_path / "a.npy", "--model", "channels", "--url", server.url)
    assert done.returncode == 1
    assert done.stderr.startswith("error: frame 3: ")
    assert "3 answers to frame 3" in done.stdout


def test_wrong_usage_is_status_2(clip: Path) -> None:
    assert stream(clip).returncode == 2
    assert stream(clip, "--model", "channels", "--chunk", "0").returncode == 2


def test_what_happens_to_the_stream_itself_is_noted_beside_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    playback = player.Playback(60, 30.0)
    playback.note_notice(Warned("store_unavailable", "the store is down"))
    playback.on_notice = player.PlainView(Console()).show_notice
    playback.note_notice(ModelChanged(40, "2", "f2", 8, ("rest",)))
    told = capsys.readouterr()
    assert told.err.splitlines() == ["note: the store is down", "note: from frame 40 on version 2 answers, the one before is gone"]
    assert not told.out


def test_a_token_may_be_given(start: Any, clip: Path) -> None:
    with start(INDRNN_TOKEN="correct horse") as server:
        arguments = [clip, "--model", "channels", "--url", server.url, "--speed", 20]
        assert "token" in stream(*arguments).stderr
        assert stream(*arguments, "--token", "correct horse").returncode == 0


def test_the_end_of_the_reader_is_no_traceback(server: Server, clip: Path) -> None:
    process = subprocess.Popen(
        command(clip, "--model", "channels", "--url", server.url, "--loop", "--speed", 5), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(WITHIN_S) == 1
    process.stderr.close()
    assert "Traceback" not in errors


def on_terminal(arguments: list[str], until: bytes) -> tuple[bytes, int]:
    """Runs on a terminal of 100 columns, presses Ctrl-C once `until` is seen; what was drawn and the exit status."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    process = subprocess.Popen(arguments, cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True)
    os.close(slave)
    drawn, pressed, deadline = b"", False, time.monotonic() + WITHIN_S
    try:
        while time.monotonic() < deadline:
            if select.select([master], [], [], 0.2)[0]:
                try:
                    data = os.read(master, 65536)
                except OSError:  # how a terminal tells that its last program ended
                    break
                drawn += data
            if until in drawn and not pressed:
                process.send_signal(signal.SIGINT)
                pressed = True
        return drawn, process.wait(WITHIN_S)
    finally:
        process.kill()
        process.wait(WITHIN_S)
        os.close(master)


def test_on_a_terminal_events_stay_above_what_is_drawn(server: Server, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", moving_frames(GESTURES, 120, seed=21))
    drawn, _ = on_terminal(command(tmp_path / "a.npy", "--model", "gestures", "--url", server.url, "--speed", 10), b"never seen")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
    assert re.search(r"\d+ \d+\.\d\d start \w+ 0\.\d+ decided \d+\s", text), text
    assert "Traceback" not in text


def test_on_a_terminal_it_draws_and_ctrl_c_ends_it_with_the_summary(server: Server, clip: Path) -> None:
    drawn, status = on_terminal(command(clip, "--model", "channels", "--url", server.url, "--loop"), b"frame 7")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.decode())
    assert status == 130, text
    assert "clip into channels" in text
    assert all(label in text for label in CHANNELS.classes)
    assert "round trip p50" in text
    assert re.search(r"answers to frame \d+ in ", text.splitlines()[-1]), text
    assert "Traceback" not in text
