"""The models there are: `<directory>/<name>/<version>/model.onnx`. A file that cannot be served is reported, the others serve."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from model.contract import MODEL_FILE, NAME_PATTERN
from service.engine import DeviceChoice, Engine, EngineError
from service.errors import ModelNotFound, StartupError

SHIPPED = Path(__file__).parent / "models"
_RESERVED = ("stats",)

log = structlog.get_logger("catalog")


@dataclass(frozen=True, slots=True)
class Entry:
    """A served model: the folders' names and the engine."""

    name: str
    version: str
    engine: Engine


@dataclass(frozen=True, slots=True)
class Failure:
    """A model that is there but cannot be served, and why."""

    name: str
    version: str
    reason: str

    def to_dict(self) -> dict[str, str]:
        return {"name": self.name, "version": self.version, "reason": self.reason}


class Catalog:
    """Loaded models by name and version; of each name the highest version, in natural order, is the default."""

    def __init__(self, entries: Sequence[Entry], failures: Sequence[Failure]) -> None:
        self._models: dict[str, dict[str, Entry]] = {}
        for entry in sorted(entries, key=lambda entry: (entry.name, natural(entry.version))):
            self._models.setdefault(entry.name, {})[entry.version] = entry
        self.failures = tuple(failures)

    @classmethod
    def load(cls, directories: Sequence[Path], device: DeviceChoice, threads: int | None) -> Catalog:
        """Loads every model of every directory; a name found in an earlier directory hides the same name in later ones.

        Raises `StartupError` when nothing can be served or a directory cannot be read.
        """
        entries: list[Entry] = []
        failures: list[Failure] = []
        for name, folder in _model_folders(directories):
            try:
                versions = sorted(_folders(folder), key=lambda path: natural(path.name))
            except OSError as error:
                failures.append(Failure(name, "", f"{folder} cannot be read: {error.strerror}"))
                continue
            if not versions:
                failures.append(Failure(name, "", f"{folder} holds no <version>/{MODEL_FILE}"))
            for version in versions:
                loaded = _load(name, version, device, threads)
                if isinstance(loaded, Entry):
                    entries.append(loaded)
                else:
                    failures.append(loaded)
        if not entries:
            raise StartupError(_nothing_to_serve(directories, failures))
        return cls(entries, failures)

    def __iter__(self) -> Iterator[Entry]:
        return (entry for versions in self._models.values() for entry in versions.values())

    def names(self) -> list[str]:
        return list(self._models)

    def versions(self, name: str) -> list[str]:
        """Versions that are served, the default last."""
        return list(self._models[name])

    def find(self, name: str, version: str | None = None) -> Entry:
        """Raises `ModelNotFound` saying what there is instead."""
        versions = self._models.get(name)
        broken = [failure for failure in self.failures if failure.name == name and version in (None, failure.version)]
        if versions is None:
            raise ModelNotFound(f"no model {name!r:.140}" + (f": {broken[0].reason}" if broken else ""), models=self.names())
        if version is None:
            return next(reversed(versions.values()))
        if version not in versions:
            raise ModelNotFound(f"model {name} has no version {version!r:.140}" + (f": {broken[0].reason}" if broken else ""), versions=list(versions))
        return versions[version]


def natural(text: str) -> list[tuple[int, int, str]]:
    """A sort key under which 10 comes after 9, and v2 after v1."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", text) if part]


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
    return [path for path in directory.iterdir() if path.is_dir() and not _hidden(path)]


def _hidden(path: Path) -> bool:
    return path.name.startswith((".", "_"))


def _load(name: str, folder: Path, device: DeviceChoice, threads: int | None) -> Entry | Failure:
    version, path = folder.name, folder / MODEL_FILE
    try:
        for part in (name, version):
            if not NAME_PATTERN.fullmatch(part):
                raise EngineError(f"the folder's name {part!r} must match {NAME_PATTERN.pattern}")
        if name in _RESERVED:
            raise EngineError(f"the name {name!r} means something else in the paths of the Open Inference Protocol: choose another")
        engine = Engine.load(path, device, threads)
    except EngineError as error:
        log.error("model not served", model=name, version=version, file=str(path), reason=str(error))
        return Failure(name, version, str(error))
    device_facts = engine.device.to_dict()
    log.info("model loaded", model=name, version=version, device=device_facts.pop("name"), **device_facts)
    return Entry(name, version, engine)


def _nothing_to_serve(directories: Sequence[Path], failures: Sequence[Failure]) -> str:
    searched = ", ".join(str(directory) for directory in directories)
    if not failures:
        return f"no models: put them into <name>/<version>/{MODEL_FILE} under one of {searched}, or name a directory with --models"
    reasons = "; ".join(f"{failure.name} {failure.version}: {failure.reason}".replace("  ", " ") for failure in failures)
    return f"none of the models under {searched} can be served: {reasons}"
