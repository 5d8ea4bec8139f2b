"""The locked versions are ones that pyproject.toml admits, agree with each other, and keep apart what must not meet."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
SERVED = ["redis", "grpc", "otel"]  # what the image has beside its onnxruntime
EXTRAS = {"cpu": ["cpu", *SERVED], "gpu": ["gpu", *SERVED], "test": ["cpu", *SERVED, "test"], "train": ["cpu", "train"]}


def locked(name: str) -> dict[str, set[str]]:
    """Package -> its versions; a few have one for older and one for newer Pythons."""
    versions: dict[str, set[str]] = {}
    for line in (ROOT / f"requirements-{name}.txt").read_text().splitlines():
        if line and line[0] not in " #":
            requirement = Requirement(line)
            [pin] = requirement.specifier
            assert pin.operator == "==", line
            versions.setdefault(canonicalize_name(requirement.name), set()).add(pin.version)
    return versions


@pytest.mark.parametrize("name", EXTRAS)
def test_locks_hold_what_the_project_asks_for(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(line for extra in EXTRAS[name] for line in project["optional-dependencies"][extra])]
    versions = {**locked(name), **locked("torch")}
    for requirement in map(Requirement, wanted):
        pins = versions.get(canonicalize_name(requirement.name), set())
        assert pins, f"requirements-{name}.txt lacks {requirement}; run `make lock`"
        assert all(pin in requirement.specifier for pin in pins), f"requirements-{name}.txt: {requirement} is not met by {pins}; run `make lock`"


@pytest.mark.parametrize("name", ["gpu", "test", "train"])
def test_locks_agree(name: str) -> None:
    other, cpu = locked(name), locked("cpu")
    assert {package: other[package] for package in cpu.keys() & other.keys()} == {package: cpu[package] for package in cpu.keys() & other.keys()}


def test_the_two_runtimes_never_meet_and_serving_needs_no_torch() -> None:
    for name in EXTRAS:
        assert len({"onnxruntime", "onnxruntime-gpu"} & locked(name).keys()) == 1
        assert "torch" not in locked(name)
        assert ("triton" in locked(name)) == (name == "train")
