"""Model files in their folders: what is there now, and one of them read. May be used from any thread."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from model.contract import MODEL_FILE, NAME_PATTERN
from service.engine import DeviceChoice, Engine, EngineError, resident_bytes
from service.errors import StartupError
from service.roles import ALIASES, Roles, RolesError

Key = tuple[str, str]  # name, version

_RESERVED = ("stats",)

log = structlog.get_logger("models")


@dataclass(frozen=True, slots=True)
class Place:
    """A version's folder, and what its file looks like from outside; None where there is no file."""

    folder: Path
    stamp: tuple[int, int, int] | None  # time of change in ns, bytes, inode


@dataclass(frozen=True, slots=True)
class Entry:
    """A model that can be served: the folders' names, the engine, and what loading it took."""

    name: str
    version: str
    engine: Engine
    place: Place
    seconds: float
    memory_bytes: int  # growth of the process while it was loaded, at least the file's size; other work at the same time makes it inexact

    @property
    def key(self) -> Key:
        return self.name, self.version


@dataclass(frozen=True, slots=True)
class Failure:
    """A model that is there but cannot be served, and why."""

    name: str
    version: str
    reason: str

    @property
    def key(self) -> Key:
        return self.name, self.version

    def to_dict(self) -> dict[str, str]:
        return {"name": self.name, "version": self.version, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Look:
    """What the folders held at one moment."""

    places: dict[Key, Place] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()  # folders that cannot be read or hold nothing
    roles: dict[str, Roles | Failure] = field(default_factory=dict)  # of each model
    absent: tuple[Path, ...] = ()  # directories that are not there

    def of(self, name: str) -> dict[Key, Place]:
        return {key: place for key, place in self.places.items() if key[0] == name}

    def wrong(self) -> list[Failure]:
        """What is wrong with whole folders, whatever their versions are like."""
        return [*self.failures, *(roles for roles in self.roles.values() if isinstance(roles, Failure))]

    def hides(self, key: Key, place: Place) -> bool:
        """Whether a file may be there although it was not seen: its folder could not be read."""
        return place.folder.parent.parent in self.absent or any(failure.name == key[0] for failure in self.failures)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """The directories that models come from, the first that has a name hiding it in later ones, and what they are to run on."""

    directories: tuple[Path, ...]
    device: DeviceChoice
    threads: int | None

    def look(self) -> Look:
        """Raises `StartupError` when a directory cannot be read."""
        places: dict[Key, Place] = {}
        failures: list[Failure] = []
        roles: dict[str, Roles | Failure] = {}
        for name, folder in _model_folders(self.directories):
            try:
                versions = sorted(_folders(folder))
            except OSError as error:
                failures.append(Failure(name, "", f"{folder} cannot be read: {error.strerror}"))
                continue
            if not versions:
                failures.append(Failure(name, "", f"{folder} holds no <version>/{MODEL_FILE}"))
            roles[name] = _roles(name, folder)
            places |= {(name, version.name): Place(version, _stamp(version / MODEL_FILE)) for version in versions}
        return Look(places, tuple(failures), roles, tuple(directory for directory in self.directories if not directory.is_dir()))

    def read(self, key: Key, place: Place) -> Entry | Failure:
        """Loads one file, which takes seconds where it is large; raises `StartupError` for a device that cannot run."""
        name, version = key
        began, before = time.perf_counter(), resident_bytes()
        path = place.folder / MODEL_FILE
        try:
            _check_names(name, version)
            engine = Engine.load(path, self.device, self.threads)
        except EngineError as error:
            log.error("model not served", model=name, version=version, file=str(path), reason=str(error))
            return Failure(name, version, str(error))
        size = place.stamp[1] if place.stamp else 0
        entry = Entry(name, version, engine, place, time.perf_counter() - began, max(size, resident_bytes() - before))
        facts = engine.device.to_dict()
        log.info(
            "model loaded", model=name, version=version, device=facts.pop("name"), seconds=round(entry.seconds, 3), memory_bytes=entry.memory_bytes, **facts
        )
        return entry


def _roles(name: str, folder: Path) -> Roles | Failure:
    try:
        return Roles.read(folder)
    except RolesError as error:
        return Failure(name, "", str(error))


def _check_names(name: str, version: str) -> None:
    for part in (name, version):
        if not NAME_PATTERN.fullmatch(part):
            raise EngineError(f"the folder's name {part!r} must match {NAME_PATTERN.pattern}")
    if name in _RESERVED:
        raise EngineError(f"the name {name!r} means something else in the paths of the Open Inference Protocol: choose another")
    if version in ALIASES:
        raise EngineError(f"{version!r} is no version but stands for one: call the folder otherwise")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        facts = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return (0, 0, 0)  # it is there; reading it says what is wrong
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


def _model_folders(directories: Sequence[Path]) -> list[tuple[str, Path]]:
    found: dict[str, Path] = {}
    for directory in directories:
        if directory.is_dir():
            try:
                folders = _folders(directory)
            except OSError as error:
                raise StartupError(f"the models directory {directory} cannot be read: {error.strerror}") from None
            for folder in folders:
                found.setdefault(folder.name, folder)
    return sorted(found.items())


def _folders(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))]
