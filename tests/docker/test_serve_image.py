"""What the serving image holds, read from its Dockerfile: an image is built where a Docker engine is, but what it lacks shows everywhere."""

from __future__ import annotations

import ast
from pathlib import Path

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
