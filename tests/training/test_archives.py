from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from training.datasets.archives import files
from training.datasets.clips import DataError

CONTENT = {"set/b.txt": b"two", "set/a.txt": b"one", "set/notes.md": b"no"}


def pack(archive: Path) -> None:
    with tarfile.open(archive, "w:xz") as tar:
        for name, data in CONTENT.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        folder = tarfile.TarInfo("set/c.txt")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)


def test_folder_and_archive_hold_the_same_files(tmp_path: Path) -> None:
    folder, archive = tmp_path / "set", tmp_path / "set.tar.xz"
    pack(archive)
    assert [(file.name, data) for file, _, data in files(folder, archive, ".txt")] == [("b.txt", b"two"), ("a.txt", b"one")]
    assert [where for _, where, _ in files(folder, archive, ".txt")] == [f"{archive}: set/b.txt", f"{archive}: set/a.txt"]
    folder.mkdir()
    for name, data in CONTENT.items():
        (tmp_path / name).write_bytes(data)
    assert list(files(folder, archive, ".txt")) == [(folder / name, str(folder / name), CONTENT[f"set/{name}"]) for name in ("a.txt", "b.txt")]


@pytest.mark.parametrize("content", [None, b"", b"no archive", "cut"])
def test_neither_folder_nor_sound_archive(tmp_path: Path, content: bytes | str | None) -> None:
    archive = tmp_path / "set.tar.xz"
    if content == "cut":
        pack(archive)
        archive.write_bytes(archive.read_bytes()[:100])
    elif isinstance(content, bytes):
        archive.write_bytes(content)
    with pytest.raises(DataError, match=r"set.tar.xz: expected this archive, readable, or a folder .*set: "):
        list(files(tmp_path / "set", archive, ".txt"))
