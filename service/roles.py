"""What the versions of a model are there for, as the file `versions.json` in its folder says: which one is stable, which one is tried out."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ROLES_FILE = "versions.json"
ALIASES = ("latest", "stable", "candidate")  # may be asked for in the place of a version


class RolesError(Exception):
    """The file cannot be read; the message says why."""


@dataclass(frozen=True, slots=True)
class Roles:
    """`share`, from 0 to 1, is the part of the new sessions that ask for no version which go to the `candidate`."""

    stable: str | None = None
    candidate: str | None = None
    share: float = 0.0

    @classmethod
    def read(cls, folder: Path) -> Roles:
        """Of a model's folder; without a file, no version has a role. Raises `RolesError`."""
        try:
            text = (folder / ROLES_FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return cls()
        except (OSError, UnicodeDecodeError) as error:
            raise RolesError(f"{ROLES_FILE} cannot be read: {error}") from None
        try:
            value = json.loads(text)
        except ValueError as error:
            raise RolesError(f"{ROLES_FILE} is not JSON: {error}") from None
        return cls._checked(value)

    @classmethod
    def _checked(cls, value: Any) -> Roles:
        known = [field.name for field in fields(cls)]
        if not isinstance(value, dict) or (unknown := sorted(set(value) - set(known))):
            found = f"has {', '.join(unknown)}" if isinstance(value, dict) else "is no object"
            raise RolesError(f"{ROLES_FILE} {found}; it may have {', '.join(known)}")
        for name in ("stable", "candidate"):
            if not isinstance(value.get(name), str | None):
                raise RolesError(f"{ROLES_FILE}: {name} must be the name of a version, got {value[name]!r:.60}")
        share = value.get("share", 0.0)
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise RolesError(f"{ROLES_FILE}: share must be a number from 0 to 1, got {share!r:.60}")
        roles = cls(value.get("stable"), value.get("candidate"), float(share))
        if roles.share and roles.candidate is None:
            raise RolesError(f"{ROLES_FILE}: there is a share, but no candidate")
        if roles.candidate is not None and roles.candidate == roles.stable:
            raise RolesError(f"{ROLES_FILE}: version {roles.stable!r} cannot be both stable and candidate")
        return roles
