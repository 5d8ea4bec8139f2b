"""What a network is made of, as a value: written in a run's TOML file, kept in its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["plain", "residual", "dense", "rnn", "irnn", "gru", "lstm"]
Activation = Literal["relu", "tanh", "identity"]
BASELINES = ("rnn", "irnn", "gru", "lstm")  # what an IndRNN is held against; their matrices have no bound, so no horizon either


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a network. Raises `ValueError` naming the field when a value makes no sense."""

    kind: Kind = "residual"
    layers: int = 4  # recurrent layers; a residual block has two; a dense stack goes by `blocks` instead
    units: int = 256  # of each layer; a dense stack goes by `growth` instead
    blocks: tuple[int, ...] = (8, 6, 4)  # dense layers in each block of a dense stack
    growth: int = 16  # features that each dense layer adds
    norm: Literal["before", "after", "none"] = "after"  # batch normalisation beside the recurrence; a residual stack always has its own
    activation: Activation = "relu"  # of the recurrences
    horizon: int = 0  # frames after which the past is forgotten: bounds |u| below one; 0: |u| <= 1
    bound: Literal["clamp", "penalty"] = "clamp"  # u is put back after each training step, or what is beyond is added to the loss
    memory: Literal["every", "last", "ones", "normal"] = "every"  # how u starts: see `model.indrnn.Recurrence`
    head: Literal["step", "last", "tokens"] = "step"  # what is taught: each step's class, the last step's, or the token after each step
    filters: int = 0  # maps of a convolution over neighbouring joints (channels) as first layer; 0: none
    kernel: int = 3  # joints (channels) that each of them looks at
    dropout: float = 0.1  # after each layer
    input_dropout: float = 0.0
    bottleneck_dropout: float = 0.1  # inside each dense layer
    transition_dropout: float = 0.3  # after each block of a dense stack
    view: Literal["camera", "body"] = "camera"  # skeletons: keep the camera's directions, or turn each body to face the same way
    average: int = 0  # frames over which scores are averaged, older ones fading out; 0: each step's own
    weighted: bool = False  # let the network learn what each frame counts in that average: most say nothing of an action that is over in a moment
    motion: bool = True  # add what changed since the previous frame
    positions: bool = True  # keep the values themselves (off: only what changes counts, wherever it happens)
    bones: bool = False  # skeletons: add where each joint lies, seen from its parent
    missing: bool = False  # may joints or channels be absent (NaN)
    reset: Literal["none", "soft"] = "none"  # soft: the network clears its state where it finds that something new begins
    boundary_units: int = 48  # of each layer of the small stack that finds it
    boundary_layers: int = 2
    boundary_horizon: int = 20  # frames that it looks back on

    def __post_init__(self) -> None:
        for holds, message in (
            (self.kind in get_args(Kind), f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}"),
            (self.layers >= 1, f"layers must be at least 1, got {self.layers}"),
            (self.kind != "residual" or self.layers % 2 == 0, f"layers of a residual network come in pairs, got {self.layers}"),
            (self.units >= 1, f"units must be at least 1, got {self.units}"),
            (len(self.blocks) >= 1 and min(self.blocks) >= 1, f"blocks must name at least one layer each, got {self.blocks}"),
            (self.growth >= 1, f"growth must be at least 1, got {self.growth}"),
            (self.norm in ("before", "after", "none"), f"norm must be before, after or none, got {self.norm!r}"),
            (self.activation in get_args(Activation), f"activation must be one of {', '.join(get_args(Activation))}, got {self.activation!r}"),
            (self.horizon >= 0, f"horizon must not be negative, got {self.horizon}"),
            (self.average >= 0, f"average must not be negative, got {self.average}"),
            (self.bound in ("clamp", "penalty"), f"bound must be clamp or penalty, got {self.bound!r}"),
            (self.average > 0 or not self.weighted, "weighted is about the average of scores: set average"),
            (self.memory in ("every", "last", "ones", "normal"), f"memory must be every, last, ones or normal, got {self.memory!r}"),
            (self.head in ("step", "last", "tokens"), f"head must be step, last or tokens, got {self.head!r} (the mean over time is model.average)"),
            (self.filters >= 0, f"filters must not be negative, got {self.filters}"),
            (self.kernel >= 1 and self.kernel % 2 == 1, f"kernel must be odd: as many joints on either side, got {self.kernel}"),
            (self.head != "tokens" or not self.filters, "filters: a token has no neighbours in its frame to convolve over"),
            (self.head != "tokens" or not self.missing, "missing: a token cannot be absent"),
            (all(0 <= rate < 1 for rate in self._dropouts), "dropout rates must be in [0, 1)"),
            (self.view in ("camera", "body"), f"view must be camera or body, got {self.view!r}"),
            (self.reset in ("none", "soft"), f"reset must be none or soft, got {self.reset!r}"),
            (self.reset == "none" or self.head == "step", f"reset needs a class at every step to learn where it changes: head is {self.head!r}"),
            (self.boundary_units >= 1, f"boundary_units must be at least 1, got {self.boundary_units}"),
            (self.boundary_layers >= 1, f"boundary_layers must be at least 1, got {self.boundary_layers}"),
            (self.boundary_horizon >= 1, f"boundary_horizon must be at least 1, got {self.boundary_horizon}"),
            (self.motion or self.positions or self.bones, "motion, positions and bones cannot all be off: nothing would be left"),
        ):
            if not holds:
                raise ValueError(f"model: {message}")
        if self.kind in BASELINES:
            self._check_baseline()

    def _check_baseline(self) -> None:
        """What only an IndRNN has is refused rather than silently left out of a comparison."""
        for holds, message in (
            (self.norm != "before", 'norm = "before" stands between the linear map and the recurrence, which are one in {}: take "after" or "none"'),
            (self.horizon == 0, "horizon bounds u, and {} has none: set horizon = 0"),
            (self.memory == "every", "memory initialises u, and {} has none"),
            (self.bound == "clamp", "bound is that of u, and {} has none"),
            (self.activation == "relu", "activation is that of an IndRNN; {} has its own"),
            (self.reset == "none", "reset clears the state of an IndRNN; {} has gates of its own or none"),
            (self.filters == 0, "filters make an IndRNN layer in front; {} would be no baseline any more"),
        ):
            if not holds:
                raise ValueError(f"model: {message.format(self.kind)}")

    @property
    def _dropouts(self) -> tuple[float, ...]:
        return self.dropout, self.input_dropout, self.bottleneck_dropout, self.transition_dropout
