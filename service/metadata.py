"""How the service and its models describe themselves to clients of the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from model.contract import FRAMES, LENGTHS, SCORES, Manifest
from service.settings import Settings

INPUTS = {FRAMES: "FP32", LENGTHS: "INT64"}  # what a request may send; the state is nobody's business, and `lengths` need not be known of
OUTPUTS = (SCORES,)

_EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "sequence",
    "sequence(string_id)",
    "statistics",
)
_PLATFORM, _BACKEND = "onnxruntime_onnx", "onnxruntime"  # as tools that read this know it


def server_metadata() -> dict[str, Any]:
    return {"name": "indrnn-service", "version": "1", "extensions": list(_EXTENSIONS)}


def model_metadata(name: str, versions: Sequence[str], manifest: Manifest) -> dict[str, Any]:
    """Shapes with the batch axis; -1 is a free axis."""
    return {
        "name": name,
        "versions": list(versions),
        "platform": _PLATFORM,
        "inputs": [{"name": FRAMES, "datatype": "FP32", "shape": [-1, -1, *manifest.frame_shape]}],
        "outputs": [{"name": SCORES, "datatype": "FP32", "shape": [-1, -1, len(manifest.classes)]}],
    }


def model_config(name: str, manifest: Manifest, settings: Settings) -> dict[str, Any]:
    """Triton's model configuration, as far as it means something here; `dims` are without the batch axis."""
    return {
        "name": name,
        "platform": _PLATFORM,
        "backend": _BACKEND,
        "version_policy": {"all": {}},
        "max_batch_size": settings.max_batch,
        "input": [{"name": FRAMES, "data_type": "TYPE_FP32", "dims": [-1, *manifest.frame_shape]}],
        "output": [{"name": SCORES, "data_type": "TYPE_FP32", "dims": [-1, len(manifest.classes)]}],
        "instance_group": [],
        "sequence_batching": {
            "max_sequence_idle_microseconds": int(1e6 * settings.idle_s),
            "oldest": {"max_candidate_sequences": settings.sessions, "max_queue_delay_microseconds": 0},
        },
        "model_transaction_policy": {"decoupled": False},
        "response_cache": {"enable": False},
    }
