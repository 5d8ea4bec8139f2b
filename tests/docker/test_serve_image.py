"""What the serving image holds and is told, read from its files: an image is built where a Docker engine is, but what is missing shows everywhere."""

from __future__ import annotations

import ast
from pathlib import Path

import yaml

from service.settings import Settings

ROOT = Path(__file__).resolve().parents[2]


def test_the_image_has_every_module_of_model_that_the_service_imports() -> None:
    imported = set()
    for path in (ROOT / "service").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"model/{alias.name}.py" for alias in node.names] if node.module == "model" else [node.module.replace(".", "/") + ".py"]
                imported |= {name for name in names if name.startswith("model/")}
    [copied] = [line.split()[1:-1] for line in (ROOT / "docker" / "serve.Dockerfile").read_text().splitlines() if line.startswith("COPY model/")]
    assert imported
    assert imported <= set(copied)


def test_compose_hands_every_setting_on() -> None:
    service = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]["indrnn"]
    inside = {"host", "port", "models"}  # these mean the outside of the container there, and are fixed within
    expected = {f"INDRNN_{name.upper()}" for name in Settings.model_fields if name not in inside | {"workers"}}
    assert set(service["environment"]) == expected
