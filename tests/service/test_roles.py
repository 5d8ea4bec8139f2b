from __future__ import annotations

from pathlib import Path

import pytest

from service.roles import ROLES_FILE, Roles, RolesError


def test_without_a_file_no_version_has_a_role(tmp_path: Path) -> None:
    assert Roles.read(tmp_path) == Roles(None, None, 0.0)


@pytest.mark.parametrize(
    ("text", "roles"),
    [
        ("{}", Roles()),
        ('{"stable": "1"}', Roles("1")),
        ('{"stable": "1", "candidate": "2", "share": 0.1}', Roles("1", "2", 0.1)),
        ('{"candidate": "2", "share": 1}', Roles(None, "2", 1.0)),
    ],
)
def test_what_the_file_says(tmp_path: Path, text: str, roles: Roles) -> None:
    (tmp_path / ROLES_FILE).write_text(text)
    assert Roles.read(tmp_path) == roles


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON"),
        ('{"stable": "1"', "is not JSON"),
        ("[]", "is no object; it may have stable, candidate, share"),
        ('{"stabel": "1"}', "has stabel; it may have stable"),
        ('{"stable": 1}', "stable must be the name of a version, got 1"),
        ('{"candidate": "2", "share": 1.1}', "share must be a number from 0 to 1"),
        ('{"candidate": "2", "share": true}', "share must be a number from 0 to 1"),
        ('{"candidate": "2", "share": NaN}', "share must be a number from 0 to 1"),
        ('{"share": 0.5}', "a share, but no candidate"),
        ('{"stable": "1", "candidate": "1"}', "both stable and candidate"),
    ],
)
def test_what_is_wrong_with_it(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / ROLES_FILE).write_text(text)
    with pytest.raises(RolesError, match=said):
        Roles.read(tmp_path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / ROLES_FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(RolesError, match="cannot be read"):
        Roles.read(tmp_path)
