from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.catalog import Catalog, natural
from service.errors import ModelNotFound, StartupError
from tests import toy_models


def load(*directories: Path) -> Catalog:
    return Catalog.load(directories, "cpu", 1)


def test_versions_are_ordered_as_people_count() -> None:
    assert sorted(["10", "9", "1.2", "1.10", "v2", "v11", "1"], key=natural) == ["v2", "v11", "1", "1.2", "1.10", "9", "10"]


def test_the_highest_version_is_the_default(tmp_path: Path) -> None:
    for version in ("2", "10", "9"):
        toy_models.write_toy(tmp_path, "toy", version=version)
    catalog = load(tmp_path)
    assert catalog.versions("toy") == ["2", "9", "10"]
    assert catalog.find("toy").version == "10"
    assert catalog.find("toy", "2").version == "2"
    with pytest.raises(ModelNotFound, match="no version '3'"):
        catalog.find("toy", "3")
    with pytest.raises(ModelNotFound) as caught:
        catalog.find("boy")
    assert caught.value.facts == {"models": ["toy"]}


def test_the_folder_names_the_model(tmp_path: Path) -> None:
    toy_models.write_toy(tmp_path, "toy").parent.parent.rename(tmp_path / "renamed")
    found = load(tmp_path).find("renamed")
    assert (found.name, found.engine.manifest.model) == ("renamed", "toy")


def test_an_earlier_directory_hides_names_of_later_ones(tmp_path: Path) -> None:
    toy_models.write_toy(tmp_path / "own", "toy", version="1", made_by="us")
    toy_models.write_toy(tmp_path / "shipped", "toy", version="2", made_by="them")
    toy_models.write_toy(tmp_path / "shipped", "other")
    catalog = load(tmp_path / "own", tmp_path / "shipped")
    assert catalog.names() == ["other", "toy"]
    assert catalog.find("toy").engine.manifest.made_by == "us"


def test_what_is_broken_is_reported_and_the_rest_serves(tmp_path: Path) -> None:
    toy_models.write_toy(tmp_path, "toy", version="1")
    toy_models.write_without_manifest(tmp_path, "bare")
    toy_models.write_failing_self_test(tmp_path, "wrong")
    (tmp_path / "toy" / "2").mkdir()
    (tmp_path / "empty").mkdir()
    toy_models.write_toy(tmp_path, "toy").parent.rename(tmp_path / "toy" / "bad name")
    toy_models.write_toy(tmp_path, "toy")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "README.md").write_text("no model")
    catalog = load(tmp_path, tmp_path / "nowhere")
    reasons = {(failure.name, failure.version): failure.reason for failure in catalog.failures}
    assert set(reasons) == {("bare", "1"), ("wrong", "1"), ("toy", "2"), ("toy", "bad name"), ("empty", "")}
    assert "cannot be read" in reasons["toy", "2"]
    assert "must match" in reasons["toy", "bad name"]
    assert catalog.find("toy").version == "1"
    with pytest.raises(ModelNotFound, match="self-test"):
        catalog.find("wrong")


def test_nothing_to_serve_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no models: put them into"):
        load(tmp_path)
    toy_models.write_without_manifest(tmp_path, "bare")
    with pytest.raises(StartupError, match=r"none of the models .* bare 1: the file's metadata has no 'manifest'"):
        load(tmp_path)


def test_a_folder_that_may_not_be_read_keeps_nothing_else_from_being_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_models.write_toy(tmp_path, "channels")
    (locked := tmp_path / "locked").mkdir()
    listing = Path.iterdir

    def refusing(path: Path) -> Iterator[Path]:
        if path == locked:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", refusing)
    catalog = load(tmp_path)
    assert catalog.names() == ["channels"]
    assert [failure.reason for failure in catalog.failures] == [f"{locked} cannot be read: Permission denied"]
    with pytest.raises(StartupError, match="locked cannot be read: Permission denied"):
        load(locked)
