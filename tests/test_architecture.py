"""Who may import whom, as data; every file of the three packages is read against it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Rows from low to high: a module imports only modules of lower rows, never of its own. "datasets.*" stands for every module of that folder.
LAYERS = {
    "model": [
        ["contract", "skeletons", "config", "kernels.buffers", "kernels.compiled", "kernels.threads"],
        ["kernels.*", "events"],
        ["recurrence"],
        ["normalise"],
        ["layers"],
        ["indrnn", "features", "baselines", "tokens"],
        ["dense", "convolution"],
        ["backbones"],
        ["boundary"],
        ["network"],
    ],
    "training": [
        ["config", "console", "datasets.clips", "onnx_file", "prefetch", "folds"],
        ["datasets.recordings", "datasets.archives", "datasets.frame_files"],
        ["datasets.*", "augment", "splits", "distributed", "schedule"],
        ["streams"],
        ["samples", "batches", "checkpoint"],
        ["evaluate", "export", "verify", "loss", "memory", "stream_figures"],
        ["stream_scores", "event_rules"],
        ["report", "publish", "preflight", "scores", "feed"],
        ["loop", "stream_report"],
        ["stream_command"],
        ["__main__"],
    ],
    "service": [
        ["histogram", "inline", "notes", "client_notices", "grpc_messages", "grpc_gather", "reference"],
        ["errors", "metrics", "logs", "detector", "statistics", "roles", "backoff", "lock"],
        ["settings", "shortcut", "history", "options", "resampler", "compression", "store", "store_scripts", "client_values", "client_errors"],
        ["progress", "record", "client_patience", "client_addresses", "store_memory", "store_sqlite", "store_server", "checkpoints"],
        ["grpc_status"],
        ["engine", "batcher", "sessions", "protocol", "frames", "gate", "store_cluster"],
        ["model_files", "bodies", "schemas", "tensors", "metadata", "tracing", "client_ledger", "client_socket", "websocket", "store_servers"],
        ["catalog", "runner", "client_inbox", "store_redis", "edge"],
        ["repository", "tune", "stores", "direct"],
        ["turn", "keeper"],
        ["house"],
        ["predictor", "client_stream"],
        ["app_state", "tracks", "steps", "clips", "client_tracks"],
        ["sequences"],
        ["calls"],
        ["routes", "stats", "open_inference", "streaming", "client_async"],
        ["departures"],
        ["app", "client"],
        ["grpc_tensors", "grpc_edge"],
        ["grpc_stream"],
        ["grpc_service"],
        ["grpc_server"],
        ["server", "player"],
        ["__main__"],
    ],
}

# What else a package may import, beside the standard library and itself; the longest name that fits a module decides.
OUTSIDE = {
    "model": {"torch"},
    "model.contract": set(),
    "model.events": {"numpy"},
    "model.skeletons": set(),
    "model.kernels": {"torch", "numba", "numpy", "triton"},
    "training": {"model", "torch", "numpy", "onnx", "matplotlib", "rich", "tensorboard", "tomli_w", "typer"},
    "training.verify": {"model", "torch", "numpy", "onnx", "onnxruntime"},
    "service": {
        "model.contract", "model.events", "model.skeletons", "numpy", "orjson", "pydantic", "pydantic_settings", "fastapi", "starlette", "uvicorn",
        "prometheus_client", "structlog", "typer", "rich",
    },
    "service.engine": {"model.contract", "numpy", "onnxruntime"},
    "service.websocket": {"picows", "starlette", "uvicorn"},
    "service.reference": {"fastapi", "starlette"},
    "service.tracing": {"opentelemetry"},
    "service.grpc_messages": {"google.protobuf"},
    "service.grpc_status": {"grpc"},
    "service.grpc_edge": {"grpc", "structlog"},
    "service.grpc_service": {"grpc", "google.protobuf"},
    "service.grpc_server": {"grpc", "structlog"},
    "service.client": {"numpy"},
    "service.client_async": {"numpy", "httpx"},
    "service.client_errors": set(),
    "service.client_ledger": {"numpy"},
    "service.client_socket": {"websockets"},
    "service.client_stream": {"numpy", "websockets"},
    "service.client_tracks": {"websockets"},
    "service.client_values": {"numpy"},
    "service.store": set(),
    "service.store_memory": set(),
    "service.store_sqlite": {"structlog"},
    "service.store_scripts": set(),
    "service.store_server": {"redis", "structlog"},
    "service.store_cluster": {"redis"},
    "service.store_servers": {"redis"},
    "service.store_redis": set(),
}  # fmt: skip


def _modules() -> list[str]:
    paths = [path for package in LAYERS for path in (ROOT / package).rglob("*.py")]
    return sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)


MODULES = _modules()


def _imports(module: str) -> set[str]:
    """Full names of imported modules; `from package import module` counts as package.module."""
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            name = node.module or ""
            inner = {f"{name}.{alias.name}" for alias in node.names}
            found |= {one if one in MODULES else name for one in inner}
    return found


def _row(module: str) -> int:
    package, _, name = module.partition(".")
    wildcard = name.rpartition(".")[0] + ".*"
    for wanted in (name, wildcard):
        for height, row in enumerate(LAYERS[package]):
            if wanted in row:
                return height
    raise AssertionError(f"{module} has no place in the table of layers: give it one")


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downhill(module: str) -> None:
    package = module.split(".")[0]
    own = {name for name in _imports(module) if name.split(".")[0] == package}
    if module.endswith("__init__"):
        assert not _imports(module), f"{module} holds a docstring and no imports"
        return
    height = _row(module)
    uphill = sorted(name for name in own if name in MODULES and _row(name) >= height)
    assert not uphill, f"{module} imports {', '.join(uphill)}, which is not below it"


@pytest.mark.parametrize("module", MODULES)
def test_imports_from_outside(module: str) -> None:
    package = module.split(".")[0]
    allowed = OUTSIDE[max((name for name in OUTSIDE if module == name or module.startswith(name + ".")), key=len)]
    outside = {name for name in _imports(module) if name.split(".")[0] not in {package, "__future__"} | sys.stdlib_module_names}
    foreign = sorted(name for name in outside if not any(name == one or name.startswith(one + ".") for one in allowed))
    assert not foreign, f"{module} may not import {', '.join(foreign)}"


@pytest.mark.parametrize("module", MODULES)
def test_modules_say_what_they_are(module: str) -> None:
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    assert ast.get_docstring(tree), f"{module} needs a docstring"


def test_the_service_needs_no_training_half() -> None:
    """`service.server` imports in a fresh interpreter in which torch, onnx and training cannot be imported."""
    script = """
import sys
for name in ("torch", "onnx", "training", "model.network", "model.recurrence", "numba"):
    sys.modules[name] = None
import service.app, service.server, service.__main__, service.client
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], cwd=ROOT, check=True, timeout=120)
