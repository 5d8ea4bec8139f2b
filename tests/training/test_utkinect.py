from __future__ import annotations

import io
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from model.skeletons import layout
from training.datasets import utkinect
from training.datasets.clips import ClipSet, DataError

DATA = os.environ.get("TRAINING_DATA")

NUMBERS = list(range(10, 130, 2))
RANGES = {
    "walk": "20 28",
    "sitDown": "30 38",
    "standUp": "38 44",
    "pickUp": "48 50 ",
    "carry": " NaN NaN",
    "throw": "61 67",
    "pull": "70 72",
    "push": "74 80",
    "waveHands": "90 91",
    "clapHands": "120 128",
}
FIRST = "s01_e02"


def skeleton(number: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(number).uniform(-1, 3, (20, 3)).round(6).astype(np.float32)


def line(number: int, values: npt.NDArray[np.float32] | None = None) -> str:
    return f"{number}  " + "  ".join(f"{value:f}" for value in (skeleton(number) if values is None else values).ravel()) + " "


def labels(*names: str, **changes: str) -> str:
    ranges = {name: value for name, value in (RANGES | changes).items() if value != "-"}
    return "\n".join(f"{name}\n" + "\n".join(f"{action}: {value}" for action, value in ranges.items()) for name in names) + "\n\n"


def write(folder: Path, files: dict[str, str | None] | None = None, *, packed: bool = False) -> Path:
    """Two recordings; `files` replaces some files, or leaves them out where the value is None."""
    track = "\n".join(map(line, NUMBERS)) + "\n"
    texts: dict[str, str | None] = {
        "joints_s01_e02.txt": track,
        "joints_s10_e01.txt": track,
        "actionLabel.txt": "the original, which is not read",
        "actionLabel_modified.txt": labels("s10_e01", FIRST),
    }
    present = {name: text for name, text in (texts | (files or {})).items() if text is not None}
    if packed:
        with tarfile.open(folder / "joints.tar.xz", "w:xz") as tar:
            for name, text in present.items():
                member = tarfile.TarInfo(f"joints/{name}")
                member.size = len(text.encode())
                tar.addfile(member, io.BytesIO(text.encode()))
    else:
        (folder / "joints").mkdir()
        for name, text in present.items():
            (folder / "joints" / name).write_text(text)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_reads_folder_and_archive(tmp_path: Path, packed: bool) -> None:
    recordings = utkinect.load(write(tmp_path, packed=packed))
    assert {name: column.tolist() for name, column in recordings.groups.items()} == {
        "subject": ["1", "10"],
        "episode": ["2", "1"],
        "recording": ["s01_e02", "s10_e01"],
    }
    for frames in recordings.frames:
        assert frames.flags.c_contiguous
        np.testing.assert_array_equal(frames, np.stack([skeleton(number) for number in NUMBERS]))
    assert (recordings.units, recordings.layout, recordings.nothing) == ("metres", "kinect-v1", "nothing")
    assert (len(recordings.classes), recordings.classes[-1]) == (11, "nothing")
    assert recordings.times is not None
    np.testing.assert_allclose(recordings.times[0], np.arange(len(NUMBERS)) / 30)


def test_ranges_of_frame_numbers_become_ranges_of_frames_in_the_order_of_time(tmp_path: Path) -> None:
    recordings = utkinect.load(write(tmp_path))
    found = [(recordings.classes[label], NUMBERS[first], NUMBERS[end - 1]) for first, end, label in recordings.segments[0].tolist()]
    assert found == [
        ("walk", 20, 28),
        ("sit down", 30, 38),
        ("stand up", 40, 44),  # 38 is the last of sit down
        ("pick up", 48, 50),
        ("throw", 62, 66),  # 61 and 67 were not recorded
        ("pull", 70, 72),
        ("push", 74, 80),
        ("wave hands", 90, 90),
        ("clap hands", 120, 128),
    ]
    assert recordings.labels[0][NUMBERS.index(46)] == recordings.classes.index("nothing")


def test_of_frames_with_one_number_the_first_is_kept_and_gaps_stay(tmp_path: Path) -> None:
    second_guess = skeleton(30) + 1
    kept = [number for number in NUMBERS if number not in (32, 34, 36, 54, 56)]
    lines = [line(number) for number in kept]
    lines.insert(kept.index(30) + 1, line(30, second_guess))
    recordings = utkinect.load(write(tmp_path, {"joints_s01_e02.txt": "\n".join(lines)}))
    np.testing.assert_array_equal(recordings.frames[0], np.stack([skeleton(number) for number in kept]))
    assert recordings.times is not None
    np.testing.assert_allclose(recordings.times[0], (np.array(kept) - 10) / 60)
    sit = recordings.segments[0][recordings.segments[0][:, 2] == recordings.classes.index("sit down")]
    assert [kept[sit[0, 0]], kept[sit[0, 1] - 1], sit[0, 1] - sit[0, 0]] == [30, 38, 2]


@pytest.mark.parametrize(
    ("text", "line_number", "message"),
    [
        ("", None, "expected actionLabel_modified.txt with at least one recording"),
        ("walk: 1 2\n", 1, "'walk: 1 2', expected a recording like s01_e01, and below it"),
        ("s1_e2\n", 1, "'s1_e2', expected a recording"),
        (labels(FIRST) + labels(FIRST), 13, "recording s01_e02 again"),
        (labels(FIRST, walk="-"), None, "recording s01_e02 has sitDown, .*, expected each of walk, .* once"),
        (labels(FIRST) + "walk: 20 28", None, "recording s01_e02 has walk, .*, walk, expected each"),
        (f"{FIRST}\n", None, "recording s01_e02 has no actions"),
        (labels(FIRST, jump="1 2"), 12, "'jump: 1 2', expected"),
        (labels(FIRST, walk="20"), 2, "'walk: 20', expected"),
        (labels(FIRST, walk="28 20"), 2, "range '28 20', expected first and last frame number, first not after last"),
        (labels(FIRST, walk="20 NaN"), 2, "range '20 NaN'"),
        (labels(FIRST, walk="-20 28"), 2, "range '-20 28'"),
        (labels(FIRST, sitDown="26 36"), 3, "range 26 36 starts before another action ends \\(28\\)"),
        (labels(FIRST, waveHands="91 91"), 10, "range 91 91 holds no frame of .*joints_s01_e02.txt \\(10 to 128\\)"),
        (labels(FIRST, clapHands="130 140"), 11, "range 130 140 holds no frame"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_faults_of_the_labels(tmp_path: Path, text: str, line_number: int | None, message: str, packed: bool) -> None:
    write(tmp_path, {"actionLabel_modified.txt": text, "joints_s10_e01.txt": None}, packed=packed)
    label_file = f"{tmp_path / 'joints.tar.xz'}: joints" if packed else str(tmp_path / "joints")
    where = f"{label_file}/actionLabel_modified.txt:{line_number}: " if line_number else f"{tmp_path}"
    with pytest.raises(DataError, match=f"^{re.escape(where)}.*{message}"):
        utkinect.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("", "", "no frames, expected one a line"),
        (line(10).rsplit(maxsplit=1)[0], ":1", "60 fields, expected a frame number and 60 coordinates"),
        (f"{line(10)}\n\n{line(12)}", ":2", "0 fields"),
        (f"{line(10)} 1", ":1", "62 fields"),
        ("1.5" + line(10)[2:], ":1", "starts with '1.5', expected a frame number"),
        (f"{line(10)}\n{line(8)}", ":2", "frame 8 after 10, expected numbers that never fall"),
        (line(10).replace("  ", "  x", 1), ":1", "expected numbers: "),
        (f"{line(10)}\n{line(12, np.full((20, 3), np.nan, np.float32))}", ":2", "NaN or a coordinate beyond 100 m"),
        (line(10, np.full((20, 3), 1e6, np.float32)), ":1", "NaN or a coordinate beyond 100 m"),
    ],
)
def test_faults_of_a_recording(tmp_path: Path, text: str, where: str, message: str) -> None:
    write(tmp_path, {"joints_s01_e02.txt": text})
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path / 'joints' / 'joints_s01_e02.txt'))}{where}: {message}"):
        utkinect.load(tmp_path)


def test_every_recording_has_frames_and_labels(tmp_path: Path) -> None:
    for name, files, message in (
        ("a", {"joints_s01_e02.txt": None}, "recording s01_e02 has no file joints_s01_e02.txt"),
        ("b", {"actionLabel_modified.txt": labels("s10_e01")}, "recording s01_e02 is not in actionLabel_modified.txt"),
    ):
        (tmp_path / name).mkdir()
        with pytest.raises(DataError, match=message):
            utkinect.load(write(tmp_path / name, files))
    with pytest.raises(DataError, match=r"joints.tar.xz: expected this archive, readable, or a folder"):
        utkinect.load(tmp_path)
    (tmp_path / "joints").mkdir()
    (tmp_path / "joints" / "actionLabel_modified.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"actionLabel_modified.txt: expected text in UTF-8"):
        utkinect.load(tmp_path)


@pytest.mark.skipif(DATA is None, reason="TRAINING_DATA does not name the folder of data sets (needs utkinect/joints.tar.xz)")
def test_real_data() -> None:
    recordings = utkinect.load(Path(DATA or "") / "utkinect")
    lengths = [len(frames) for frames in recordings.frames]
    assert (len(recordings), sum(lengths), min(lengths), max(lengths)) == (20, 15_318, 526, 1283)
    assert sorted(map(len, recordings.segments)) == [9] + 19 * [10]
    assert sum(int((one[1:, 0] == one[:-1, 1]).sum()) for one in recordings.segments) == 7, "actions that follow each other without a frame between"
    assert np.mean(np.concatenate(recordings.labels) == recordings.classes.index("nothing")) == pytest.approx(0.62, abs=0.005)
    clips = recordings.clips()
    lengths = [len(clip) for clip in clips.frames]
    assert (len(clips), min(lengths), np.median(lengths), max(lengths)) == (199, 5, 28, 110)
    assert np.bincount(clips.labels).tolist() == [20, 20, 20, 20, 19, 20, 20, 20, 20, 20]
    assert len(set(clips.groups["subject"].tolist())) == 10
    assert _nearest_neighbour(clips) > 0.85, "labels belong to their frames: a nearest neighbour of another person names the action"


@pytest.mark.skipif(DATA is None, reason="TRAINING_DATA does not name the folder of data sets (needs utkinect/joints.tar.xz)")
def test_real_time() -> None:
    """The rate that `fps` states, and where the person was lost for a while."""
    recordings = utkinect.load(Path(DATA or "") / "utkinect")
    assert recordings.times is not None
    steps = [np.diff(times) for times in recordings.times]
    pauses = [(i, int(at)) for i, one in enumerate(steps) for at in np.flatnonzero(one > 0.3)]
    assert len(pauses) == 10
    nothing = recordings.classes.index("nothing")
    assert all((recordings.labels[i][at : at + 2] == nothing).all() for i, at in pauses), "nobody is lost within an action"
    tracked = np.concatenate(steps)
    assert 1 / tracked[tracked <= 0.3].mean() == pytest.approx(recordings.fps, abs=0.05)


@pytest.mark.skipif(DATA is None, reason="TRAINING_DATA does not name the folder of data sets (needs utkinect/joints.tar.xz)")
def test_real_joints_are_in_the_order_and_axes_of_the_layout() -> None:
    known = layout("kinect-v1")
    for frames in utkinect.load(Path(DATA or "") / "utkinect").frames:
        joint = {name: frames[:, i] for i, name in enumerate(known.joints)}
        bones = {known.joints[child]: np.median(np.linalg.norm(frames[:, child] - frames[:, parent], axis=-1)) for child, parent in known.bones}
        for name, length in bones.items():
            assert 0.03 < length < 0.6, name
            assert length == pytest.approx(bones[name.replace("left", "right")], rel=0.2), name
        assert 1.3 < np.median(joint["head"][:, 1] - joint["left_ankle"][:, 1]) < 1.8
        assert 1.0 < np.median(frames[..., 2]) < 4.0
        assert (joint["left_shoulder"][:, 0] < joint["right_shoulder"][:, 0]).mean() > 0.95, "people face the sensor"
        # In a right-handed frame, left x up points forward, where the toes are: in a mirrored one it would point back.
        ahead = np.cross(joint["left_shoulder"] - joint["right_shoulder"], joint["head"] - joint["pelvis"])
        toes = joint["left_foot"] - joint["left_ankle"] + joint["right_foot"] - joint["right_ankle"]
        assert ((ahead * toes).sum(-1) > 0).mean() > 0.85


def _nearest_neighbour(clips: ClipSet) -> float:
    """Share of clips whose nearest clip of another subject (16 frames, pelvis at the origin) has their label."""
    chosen = [clip[np.linspace(0, len(clip) - 1, 16).round().astype(int)] for clip in clips.frames]
    points = np.stack([(clip - clip[:, :1]).ravel() for clip in chosen])
    distance = ((points[:, None] - points[None]) ** 2).sum(-1)
    subject = clips.groups["subject"]
    distance[subject[:, None] == subject[None]] = np.inf
    return float(np.mean(clips.labels[distance.argmin(1)] == clips.labels))
