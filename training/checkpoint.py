"""A checkpoint: everything needed to go on, or to export, in one file that is never half written."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from model.contract import DataSource
from model.network import Network
from training.config import Config, ConfigError, StreamConfig, from_dict
from training.datasets.clips import ClipSet
from training.streams import classes_of

_STATE = ("epoch", "weights", "training_weights", "optimizer", "best", "stale", "schedule", "scaler")
LAST, BEST = "last.pt", "best.pt"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or of another configuration."""


@dataclass(frozen=True)
class Subject:
    """What the network is about: the facts of its data that the manifest will need."""

    classes: tuple[str, ...]
    frame_shape: tuple[int, ...]
    layout: str | None
    fps: float
    units: str
    source: DataSource

    @classmethod
    def of(cls, clips: ClipSet, streams: StreamConfig | None = None) -> Subject:
        """That of clips; of a network that is taught streams also the class of frames between them, which no clip has."""
        return cls(classes_of(clips, streams), clips.frame_shape, clips.layout, clips.fps, clips.units, clips.source)


@dataclass
class Checkpoint:
    """State after `epoch` whole epochs. `weights` are those to evaluate (the running mean where there is one)."""

    config: Config
    subject: Subject
    epoch: int
    weights: dict[str, torch.Tensor]
    training_weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    best: float  # best validation accuracy so far, -1 before the first
    stale: int = 0  # epochs since it last rose
    schedule: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)  # of float16 gradients

    def network(self) -> Network:
        """The network with the weights to evaluate, in evaluation mode."""
        network = build(self.config, self.subject)
        try:
            network.load_state_dict(self.weights)
        except RuntimeError as error:
            raise CheckpointError(f"the checkpoint's weights do not fit its configuration: {' '.join(str(error).split())}") from None
        return network.eval()


def build(config: Config, subject: Subject) -> Network:
    """A network with fresh weights for this configuration and data; raises `ConfigError` when they do not go together."""
    try:
        return Network(config.model, subject.frame_shape, len(subject.classes), subject.layout)
    except ValueError as error:
        raise ConfigError(f"{subject.source.name}: {error}") from None


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Writes beside `path`, then renames: whoever looks finds the old file or the new one."""
    value = {
        "format": 1,
        "config": checkpoint.config.to_dict(),
        "subject": asdict(checkpoint.subject),
        **{name: getattr(checkpoint, name) for name in _STATE},
    }
    temporary = path.with_suffix(".part")
    with temporary.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load(path: Path) -> Checkpoint:
    """Reads a checkpoint, tensors and plain values only; raises `CheckpointError` naming the file."""
    try:
        value = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; train first") from None
    except Exception as error:  # torch.load raises whatever its zip reader and unpickler raise
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: not a checkpoint of this project, or damaged: {type(error).__name__}: {reason:.200}") from None
    if not isinstance(value, dict) or value.pop("format", None) != 1:
        raise CheckpointError(f"{path}: not a checkpoint of this project")
    try:
        subject = value["subject"] | {"source": DataSource(**value["subject"]["source"])}
        return Checkpoint(**value | {"config": from_dict(_lists(value["config"])), "subject": Subject(**subject)})
    except (ConfigError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: a checkpoint of another version of this project: {error}") from None


def _lists(value: Any) -> Any:
    """Tuples as lists, all the way down: what TOML would have given."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value
