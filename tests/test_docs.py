"""What the READMEs say exists: settings, errors, links, commands, options."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from service import errors
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
NOT_OURS = "build"  # what others installed


def _is_ours(path: Path) -> bool:
    return not any(part.startswith(".") or part == NOT_OURS for part in path.relative_to(ROOT).parts)


PAGES = sorted(path for path in ROOT.rglob("*.md") if _is_ours(path))
SERVICE = (ROOT / "service" / "README.md").read_text()


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_every_setting_is_documented(name: str) -> None:
    assert f"INDRNN_{name.upper()}`" in SERVICE


def test_every_variable_in_the_documentation_is_a_setting() -> None:
    known = {f"INDRNN_{name.upper()}" for name in Settings.model_fields}
    for page in PAGES:
        assert not set(re.findall(r"\bINDRNN_[A-Z_]+", page.read_text())) - known, page


def all_errors(kind: type[errors.ServiceError] = errors.ServiceError) -> list[type[errors.ServiceError]]:
    """The leaves of the tree; what lies between only groups them."""
    children = kind.__subclasses__()
    return [one for child in children for one in all_errors(child)] if children else [kind]


@pytest.mark.parametrize("code", sorted({kind.code for kind in all_errors()}))
def test_every_error_code_is_documented(code: str) -> None:
    assert f"`{code}`" in SERVICE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), f"{page}: {target}"
    for target in re.findall(r"(?:^|[\s@`\"])((?:service|training|tests|docker|model)/[\w./-]+\.(?:py|json|toml|yaml|md))\b", text):
        assert (ROOT / target).exists() or (page.parent / target).exists(), f"{page}: {target}"


def test_make_targets_in_the_documentation_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", page.read_text(), re.MULTILINE))
        assert not {a or b for a, b in named} - targets, page
