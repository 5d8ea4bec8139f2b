"""The files of a data set, from the folder they were unpacked into or straight from the archive they came in."""

from __future__ import annotations

import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path

from training.datasets.clips import DataError


def files(folder: Path, archive: Path, ending: str) -> Iterator[tuple[Path, str, bytes]]:
    """Every file of this ending: its path in the data set, where it is (for messages), its bytes.

    `folder` is read where there is one, else `archive`, a `.tar.xz`. Raises `DataError` when there is neither or the archive is damaged.
    """
    if folder.is_dir():
        for file in sorted(folder.glob(f"*{ending}")):
            yield file, str(file), file.read_bytes()
        return
    try:
        # One pass in the order of the archive: nothing is unpacked to disk, and no part is decompressed twice.
        with lzma.open(archive) as data, tarfile.open(fileobj=data, mode="r|") as tar:
            for member in tar:
                if member.isfile() and member.name.endswith(ending) and (stream := tar.extractfile(member)):
                    yield Path(member.name), f"{archive}: {member.name}", stream.read()
            while data.read(1 << 20):  # to the end: tarfile takes an archive that was cut between two members for whole
                pass
    except (OSError, EOFError, tarfile.TarError, lzma.LZMAError) as error:
        raise DataError(f"{archive}: expected this archive, readable, or a folder {folder}: {error}") from error
