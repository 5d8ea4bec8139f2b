"""The models that are served, by name and version: which of them an asked version means, and which files were refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from model.contract import MODEL_FILE
from service.engine import DeviceChoice
from service.errors import ModelNotFound, StartupError
from service.model_files import Entry, Failure, Key, Look, ModelFiles
from service.roles import Roles

SHIPPED = Path(__file__).parent / "models"


class Catalog:
    """Loaded models by name and version. Of each name the default is the stable version, else the highest, in natural order, that is no candidate."""

    def __init__(self, files: ModelFiles, look: Look, entries: Iterable[Entry], failures: Iterable[Failure]) -> None:
        self.files = files
        self.look = look  # what the folders held when it was made
        self._models: dict[str, dict[str, Entry]] = {}
        self._refused: dict[Key, Failure] = {failure.key: failure for failure in failures}
        self._roles: dict[str, Roles] = {}
        for entry in sorted(entries, key=lambda entry: entry.name):
            self._put(entry)
        for name, roles in look.roles.items():
            if isinstance(roles, Roles):
                self.assign(name, roles)

    @classmethod
    def load(cls, directories: Sequence[Path], device: DeviceChoice, threads: int | None) -> Catalog:
        """Loads every model of every directory; a name found in an earlier directory hides the same name in later ones.

        Raises `StartupError` when nothing can be served or a directory cannot be read.
        """
        files = ModelFiles(tuple(directories), device, threads)
        look = files.look()
        loaded = [files.read(key, place) for key, place in sorted(look.places.items(), key=lambda item: (item[0][0], natural(item[0][1])))]
        entries = [one for one in loaded if isinstance(one, Entry)]
        failures = [*look.wrong(), *(one for one in loaded if isinstance(one, Failure))]
        if not entries:
            raise StartupError(_nothing_to_serve(directories, failures))
        return cls(files, look, entries, failures)

    def __iter__(self) -> Iterator[Entry]:
        return (entry for versions in self._models.values() for entry in versions.values())

    @property
    def failures(self) -> tuple[Failure, ...]:
        return tuple(sorted(self._refused.values(), key=lambda failure: (failure.name, natural(failure.version))))

    def serves(self, name: str) -> bool:
        return name in self._models

    def names(self) -> list[str]:
        return list(self._models)

    def versions(self, name: str) -> list[str]:
        """Versions that are served, the highest last."""
        return list(self._models[name])

    def get(self, key: Key) -> Entry | None:
        return self._models.get(key[0], {}).get(key[1])

    def find(self, name: str, version: str | None = None) -> Entry:
        """Raises `ModelNotFound` saying what there is instead."""
        versions = self._models.get(name, {})
        found = versions.get(self._meant(name, version)) if versions else None
        if found is not None:
            return found
        broken = [failure for failure in self.failures if failure.name == name and version in (None, failure.version)]
        reason = f": {broken[0].reason}" if broken else ""
        if not versions:
            raise ModelNotFound(f"no model {name!r:.140}{reason}", models=self.names())
        raise ModelNotFound(f"model {name} has no version {self._meant(name, version)!r:.140}{reason}", versions=list(versions))

    def candidate(self, name: str) -> tuple[str, float] | None:
        """The version that is tried out and its share of new sessions; None where there is none, or one that takes other frames than the default."""
        roles, versions = self._roles.get(name, Roles()), self._models.get(name, {})
        if roles.candidate not in versions:
            return None
        tried, default = (versions[one].engine.manifest for one in (roles.candidate, self._meant(name, None)))
        alike = (tried.frame_shape, tried.layout, tried.task) == (default.frame_shape, default.layout, default.task)
        return (roles.candidate, roles.share) if alike else None

    def roles(self, name: str) -> dict[str, Any]:
        """What the aliases stand for now."""
        tried = self.candidate(name)
        return {
            "latest": self._meant(name, "latest"),
            "stable": self._meant(name, "stable"),
            "candidate": self._roles.get(name, Roles()).candidate,
            "share": tried[1] if tried else 0.0,
        }

    def _meant(self, name: str, version: str | None) -> str:
        """The version's own name; `name` must be served."""
        roles, versions = self._roles.get(name, Roles()), list(self._models[name])
        if version == "latest":
            return versions[-1]
        if version == "candidate" and roles.candidate is not None:
            return roles.candidate
        if version not in (None, "stable"):
            return version
        if roles.stable in versions:
            return roles.stable
        return ([one for one in versions if one != roles.candidate] or versions)[-1]

    # What changes while the service runs, on its event loop alone.

    def put(self, entry: Entry) -> None:
        """Serves this file, in the place of one of the same name and version if there is one."""
        self._refused.pop(entry.key, None)
        self._put(entry)
        self._models = dict(sorted(self._models.items()))

    def refuse(self, failure: Failure) -> None:
        """Remembers why a file is not served; what is served under its name and version stays."""
        self._refused[failure.key] = failure

    def remove(self, key: Key) -> None:
        """Serves this version no longer."""
        versions = self._models.get(key[0], {})
        versions.pop(key[1], None)
        if not versions:
            self._models.pop(key[0], None)

    def forget(self, key: Key) -> None:
        """Its file is gone, and with it whatever was wrong with it."""
        self._refused.pop(key, None)

    def assign(self, name: str, roles: Roles) -> None:
        """From now on its versions are there for this."""
        self._roles[name] = roles

    def refuse_folders(self, failures: Iterable[Failure]) -> None:
        """What is wrong with whole models' folders now, in the place of what was."""
        self._refused = {key: failure for key, failure in self._refused.items() if key[1]} | {failure.key: failure for failure in failures}

    def _put(self, entry: Entry) -> None:
        versions = {**self._models.get(entry.name, {}), entry.version: entry}
        self._models[entry.name] = dict(sorted(versions.items(), key=lambda item: natural(item[0])))


def natural(text: str) -> list[tuple[int, int, str]]:
    """A sort key under which 10 comes after 9, and v2 after v1."""
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", text) if part]


def _nothing_to_serve(directories: Sequence[Path], failures: Sequence[Failure]) -> str:
    searched = ", ".join(str(directory) for directory in directories)
    if not failures:
        return f"no models: put them into <name>/<version>/{MODEL_FILE} under one of {searched}, or name a directory with --models"
    reasons = "; ".join(f"{failure.name} {failure.version}: {failure.reason}".replace("  ", " ") for failure in failures)
    return f"none of the models under {searched} can be served: {reasons}"
