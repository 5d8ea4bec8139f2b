"""What a network is made of, as a value: written in a run's TOML file, kept in its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a network. Raises `ValueError` naming the field when a value makes no sense."""

    kind: Literal["plain", "residual"] = "residual"
    layers: int = 4  # recurrent layers; a residual block has two
    units: int = 256
    norm: Literal["before", "after", "none"] = "after"  # batch normalisation beside the recurrence of a plain stack
    horizon: int = 0  # frames after which the past is forgotten: bounds |u| below one; 0: |u| <= 1
    memory: Literal["every", "last"] = "every"  # initialisation of u in the last layer: a score at every step, or one at the end
    dropout: float = 0.1
    input_dropout: float = 0.0
    view: Literal["camera", "body"] = "camera"  # skeletons: keep the camera's directions, or turn each body to face the same way
    average: int = 0  # frames over which scores are averaged, older ones fading out; 0: each step's own
    motion: bool = True  # add what changed since the previous frame
    positions: bool = True  # keep the values themselves (off: only what changes counts, wherever it happens)
    missing: bool = False  # may joints or channels be absent (NaN)

    def __post_init__(self) -> None:
        for holds, message in (
            (self.kind in ("plain", "residual"), f"kind must be plain or residual, got {self.kind!r}"),
            (self.layers >= 1, f"layers must be at least 1, got {self.layers}"),
            (self.kind != "residual" or self.layers % 2 == 0, f"layers of a residual network come in pairs, got {self.layers}"),
            (self.units >= 1, f"units must be at least 1, got {self.units}"),
            (self.norm in ("before", "after", "none"), f"norm must be before, after or none, got {self.norm!r}"),
            (self.horizon >= 0, f"horizon must not be negative, got {self.horizon}"),
            (self.average >= 0, f"average must not be negative, got {self.average}"),
            (self.memory in ("every", "last"), f"memory must be every or last, got {self.memory!r}"),
            (0 <= self.dropout < 1 and 0 <= self.input_dropout < 1, "dropout rates must be in [0, 1)"),
            (self.view in ("camera", "body"), f"view must be camera or body, got {self.view!r}"),
            (self.motion or self.positions, "motion and positions cannot both be off: nothing would be left"),
        ):
            if not holds:
                raise ValueError(f"model: {message}")
