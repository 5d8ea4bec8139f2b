from __future__ import annotations

import os
from pathlib import Path

from model.contract import MODEL_FILE
from service.model_files import Entry, Failure, Look, ModelFiles
from service.roles import ROLES_FILE, Roles
from tests import toy_models


def files(*directories: Path) -> ModelFiles:
    return ModelFiles(directories, "cpu", 1)


def test_a_look_is_the_same_until_a_file_changes(tmp_path: Path) -> None:
    path = toy_models.write_toy(tmp_path, "toy")
    (tmp_path / "toy" / "2").mkdir()
    before = files(tmp_path).look()
    assert before == files(tmp_path).look()
    assert set(before.places) == {("toy", "1"), ("toy", "2")}
    assert before.places["toy", "2"].stamp is None
    os.utime(path, ns=(1, 1))
    after = files(tmp_path).look()
    assert after.places["toy", "1"] != before.places["toy", "1"]
    assert after.places["toy", "2"] == before.places["toy", "2"]
    same_size = path.with_suffix(".new")
    same_size.write_bytes(path.read_bytes())
    os.utime(same_size, ns=(1, 1))
    same_size.rename(path)  # another file of the same size and time
    assert files(tmp_path).look().places["toy", "1"] != after.places["toy", "1"]


def test_what_may_be_there_although_it_was_not_seen(tmp_path: Path) -> None:
    toy_models.write_toy(tmp_path / "here", "toy")
    place = files(tmp_path / "here").look().places["toy", "1"]
    assert not Look().hides(("toy", "1"), place)
    assert Look(absent=(tmp_path / "here",)).hides(("toy", "1"), place)
    assert Look(failures=(Failure("toy", "", "cannot be read"),)).hides(("toy", "1"), place)
    assert not Look(failures=(Failure("other", "", "cannot be read"),)).hides(("toy", "1"), place)
    assert files(tmp_path / "nowhere").look().absent == (tmp_path / "nowhere",)


def test_roles_are_seen_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    toy_models.write_toy(tmp_path, "toy")
    assert files(tmp_path).look().roles == {"toy": Roles()}
    (tmp_path / "toy" / ROLES_FILE).write_text('{"stable": "1"}')
    assert files(tmp_path).look().roles == {"toy": Roles("1")}
    (tmp_path / "toy" / ROLES_FILE).write_text('{"stable": 1}')
    [wrong] = files(tmp_path).look().wrong()
    assert (wrong.name, wrong.version) == ("toy", "")
    assert "stable must be" in wrong.reason


def test_reading_says_what_it_took(tmp_path: Path) -> None:
    path = toy_models.write_toy(tmp_path, "toy", toy_models.WIDE)
    [(key, place)] = files(tmp_path).look().places.items()
    read = files(tmp_path).read(key, place)
    assert isinstance(read, Entry)
    assert read.place.folder / MODEL_FILE == path
    assert read.memory_bytes >= path.stat().st_size
    assert 0 < read.seconds < 60
