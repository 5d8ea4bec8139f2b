"""An experiment as a value: one TOML file, every key known, `--set section.key=value` on top."""

from __future__ import annotations

import copy
import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from model.config import ModelConfig
from model.contract import NAME_PATTERN, EventRules, ManifestError, decode

Schedule = Literal["cosine", "one-cycle", "plateau", "constant"]
Precision = Literal["float32", "bfloat16", "float16"]


class ConfigError(ValueError):
    """A configuration has an unknown key, a value of another type, or values that contradict each other; the message names the key."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where clips come from and which of them are for what."""

    reader: str  # a module in training/datasets: "ui_prmd", "finger_points", "nw_ucla", "uea", "utkinect", "clip_folder", "recording_folder"
    path: str = ""  # of the data; usually given with --set data.path=...
    options: dict[str, Any] = field(default_factory=dict)  # further arguments of the reader, e.g. layout
    evaluation_options: dict[str, Any] = field(default_factory=dict)  # on top of options, for validation and test clips: e.g. windows
    test: dict[str, list[str]] = field(default_factory=lambda: {"split": ["test"]})  # group -> values; the rest is training data
    validation: dict[str, list[str]] = field(default_factory=dict)  # held out of the training data, to choose on
    validation_share: float = 0.0  # instead: this share of every class, drawn once and for all seeds alike
    folds: int = 0  # instead: one of so many parts, which `crossvalidate` holds out in turn
    fold: int = 0  # which of them
    fold_by: str = ""  # group that parts keep together, e.g. subject; empty: every class is divided alike
    drop_copies: bool = False  # whether training clips that are test or validation clips as well, number for number, are left out of training


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of training clips; never part of the exported file. Zero turns a change off."""

    rotate: float = 0.0  # degrees about the vertical axis, to either side
    tilt: float = 0.0  # degrees about the two horizontal axes
    scale: float = 0.0  # relative change of body size
    amplitude: float = 1.0  # movements are up to this many times larger or smaller, seen from a pose of rest
    speed: float = 1.0  # clips are played up to this many times faster or slower
    noise: float = 0.0  # standard deviation of independent noise, in units of the data
    drop_joints: float = 0.0  # share of clips in which joints (channels) go missing for a while; needs model.missing
    mirror: bool = False  # swap left and right in half the clips; only where no class is about a side
    offset: float = 0.0  # standard deviation of a shift of the whole clip, in units of the data
    cut_start: float = 0.0  # share of clips that start at a random frame, within their first half


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Training on streams that do not end instead of on cut clips: `train.batch` of them side by side, the state carried from step to step.

    A stream is made of stretches: one person before one camera, doing one thing after another. Raises `ConfigError` naming the key.
    """

    together: tuple[str, ...] = ()  # groups whose values stay the same inside a stretch, e.g. subject and view; none: anybody's clips follow anybody's
    steps: int = 20  # in an epoch, which starts from the zero state
    frames: int = 128  # in a step: as far as gradients go back in time
    stay: tuple[int, ...] = (6, 16)  # actions in a stretch, drawn from the first to the second
    cuts: float = 0.35  # share of stretches whose clips follow each other by raw cuts; in the others the body moves from one to the next
    blend: tuple[int, ...] = (10, 20)  # frames of such a movement, drawn from the first to the second
    repeat: float = 0.0  # share of actions that are done again next, by another clip of their class; the others are drawn from all
    pauses: float = 0.6  # share of movements with idle frames before, after or on both sides of them
    idle: int = 60  # idle frames, drawn up to this many
    whole: float = 0.5  # of recordings: share of stretches that are the recordings as they are; the others are made of clips cut from them
    nothing: str = "nothing"  # class of frames between actions, the network's last; empty: there is none, and such frames do not count
    nothing_weight: float = 1.0  # of its frames in the loss, beside a last frame of an action
    action_frames: int = 0  # every action weighs as much as one of so many frames, however long it is; 0: each of its frames counts
    least_pause: int = 0  # frames: a shorter pause weighs as much as one of so many, as it tells two repetitions apart no less
    dropped: float = 0.0  # share of frames that are lost, drawn up to this for each stretch
    validation: tuple[int, ...] = (24, 12)  # streams of each form that an epoch is judged by, and actions in each of them

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"streams.{name} must be a finite number, not negative, got {value}")
        for name in ("stay", "blend", "validation"):
            if len(value := getattr(self, name)) != 2 or min(value) < 1:
                raise ConfigError(f"streams.{name} must be two whole numbers of at least 1, got {list(value)}")
        for holds, message in (
            (self.steps >= 1 and self.frames >= 1, "steps and frames must be at least 1"),
            (self.stay[0] <= self.stay[1], f"stay goes from the lower to the higher number, got {list(self.stay)}"),
            (self.blend[0] <= self.blend[1], f"blend goes from the lower to the higher number, got {list(self.blend)}"),
            (self.idle >= 0, f"idle must not be negative, got {self.idle}"),
            (self.action_frames >= 0, f"action_frames must not be negative, got {self.action_frames}"),
            (self.least_pause >= 0, f"least_pause must not be negative, got {self.least_pause}"),
            (max(self.cuts, self.pauses, self.whole, self.repeat) <= 1, "cuts, pauses, whole and repeat are shares: at most 1"),
            (self.dropped < 1, f"dropped must be in [0, 1), got {self.dropped}"),
            (len(set(self.together)) == len(self.together), f"together names a group twice: {list(self.together)}"),
        ):
            if not holds:
                raise ConfigError(f"streams.{message}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to fit."""

    epochs: int = 60
    batch: int = 64  # clips in a step, or streams, over all processes
    optimizer: Literal["adamw", "adam"] = "adamw"  # adam adds weight decay to the gradient, adamw takes it off the weights
    learning_rate: float = 2e-3
    weight_decay: float = 0.02  # on matrices only, never on u, biases and norms
    clip_gradient: float = 1.0
    warm_up: float = 0.1  # share of the steps before the learning rate is at its peak
    schedule: Schedule = "cosine"  # of the learning rate after that; plateau: falls when the validation loss has not for a while
    plateau_factor: float = 0.5  # what the learning rate is then multiplied with
    plateau_patience: int = 5  # epochs without a lower validation loss before that
    early_stop: int = 0  # epochs without a better validation accuracy after which training ends; 0: never
    class_weights: Literal["none", "balanced"] = "none"  # balanced: every class counts the same in the loss, however many clips it has
    label_smoothing: float = 0.1
    early: float = 0.5  # weight of the first step of a clip or action in the loss, rising to 1 at its last: 0 forgives early doubt, 1 does not
    boundary: float = 0.1  # weight in the loss of telling where the class changes, for networks with model.reset
    ema: float = 0.0  # decay of the running mean of the weights that is evaluated and exported; 0: the weights themselves
    max_frames: int = 64  # of longer training clips random stretches of consecutive frames are drawn, as many as make up their length
    precision: Precision = "float32"  # of matrix products; weights, sums, state and evaluation stay float32
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: an NVIDIA GPU where there is one
    threads: int = 0  # of torch; 0: all cores


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What the manifest says beyond what is measured."""

    chunk: int = 8  # suggested frames per message
    protocol: str = ""  # how accuracy was measured, in a sentence
    events: EventRules | None = None  # when a stream's scores say that something starts and ends; absent: the rules that find most on validation streams


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment. `name` is the model's name and that of the run folder."""

    name: str
    seed: int = 0
    final: bool = False  # train on the validation part as well, for the fixed number of epochs; nothing is chosen any more
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    streams: StreamConfig | None = None  # absent: cut clips, each from the zero state
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self) -> None:
        d, t, a = self.data, self.train, self.augment
        ways = bool(d.validation) + (d.validation_share > 0) + (d.folds > 0)
        for section in (t, a):
            for name, value in vars(section).items():
                if not isinstance(value, str) and (not math.isfinite(value) or value < 0):
                    raise ConfigError(f"{'train' if section is t else 'augment'}.{name} must be a finite number, not negative, got {value}")
        for holds, message in (
            (NAME_PATTERN.fullmatch(self.name) is not None, f"name {self.name!r} must match {NAME_PATTERN.pattern}: it becomes a folder and part of a URL"),
            (self.seed >= 0, f"seed must not be negative, got {self.seed}"),
            (t.epochs >= 1 and t.batch >= 1 and t.max_frames >= 1, "train: epochs, batch and max_frames must be at least 1"),
            (t.learning_rate > 0, f"train.learning_rate must be positive, got {t.learning_rate}"),
            (t.clip_gradient > 0, f"train.clip_gradient must be positive, got {t.clip_gradient}"),
            (t.label_smoothing < 1, f"train.label_smoothing must be in [0, 1), got {t.label_smoothing}"),
            (0 <= t.ema < 1, f"train.ema must be in [0, 1), got {t.ema}"),
            (0 <= t.warm_up < 1, f"train.warm_up must be in [0, 1), got {t.warm_up}"),
            (0 <= t.early <= 1, f"train.early must be in [0, 1], got {t.early}"),
            (a.speed >= 1, f"augment.speed must be at least 1, got {a.speed}"),
            (a.amplitude >= 1, f"augment.amplitude must be at least 1, got {a.amplitude}"),
            (a.scale < 1, f"augment.scale must be in [0, 1), got {a.scale}"),
            (a.drop_joints <= 1 and a.cut_start <= 1, "augment.drop_joints and augment.cut_start are shares of clips: at most 1"),
            (self.export.chunk >= 1, f"export.chunk must be at least 1, got {self.export.chunk}"),
            (a.drop_joints == 0 or self.model.missing, "augment.drop_joints makes values missing: set model.missing = true"),
            (self.streams is None or self.model.head == "step", f"streams teach every step, and model.head is {self.model.head!r}: set it to step"),
            (t.optimizer in ("adamw", "adam"), f"train.optimizer must be adamw or adam, got {t.optimizer!r}"),
            (t.schedule in get_args(Schedule), f"train.schedule must be one of {', '.join(get_args(Schedule))}, got {t.schedule!r}"),
            (0 < t.plateau_factor < 1, f"train.plateau_factor must be between 0 and 1, got {t.plateau_factor}"),
            (not self.final or t.schedule != "plateau", "train.schedule = plateau goes by the validation part, and final = true has none: take another"),
            (not self.final or t.early_stop == 0, "train.early_stop goes by the validation part, and final = true has none: set train.epochs instead"),
            (t.class_weights in ("none", "balanced"), f"train.class_weights must be none or balanced, got {t.class_weights!r}"),
            (t.precision in get_args(Precision), f"train.precision must be one of {', '.join(get_args(Precision))}, got {t.precision!r}"),
            (t.device in ("auto", "cpu", "cuda"), f"train.device must be auto, cpu or cuda, got {t.device!r}"),
            (0 <= d.validation_share < 1, f"data.validation_share must be in [0, 1), got {d.validation_share}"),
            (d.folds == 0 or d.folds >= 2, f"data.folds must be at least 2, got {d.folds}"),
            (0 <= d.fold < max(1, d.folds), f"data.fold must be in 0..{max(1, d.folds) - 1}, got {d.fold}"),
            (ways <= 1, "data.validation, data.validation_share and data.folds each say what to hold out: give one of them"),
            (self.final or ways == 1, "data.validation is empty: name what to hold out and choose on, or set data.validation_share, or final = true"),
        ):
            if not holds:
                raise ConfigError(message)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as TOML has them: what is None is left out."""
        return _without_none(dataclasses.asdict(self))


def _without_none(value: dict[str, Any]) -> dict[str, Any]:
    return {name: _without_none(item) if isinstance(item, dict) else item for name, item in value.items() if item is not None}


def from_dict(value: Any) -> Config:
    """A configuration from parsed TOML; raises `ConfigError` naming the key that is unknown, absent or of another type."""
    try:
        config: Config = decode(value, Config, "config")
    except ConfigError:
        raise
    except (ManifestError, ValueError) as error:
        raise ConfigError(str(error)) from None
    return config


def load(path: Path, overrides: list[str] | None = None) -> Config:
    """Reads a TOML file and applies "section.key=value" overrides; raises `ConfigError` naming file and fault."""
    try:
        value = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    for override in overrides or []:
        _apply(value, override)
    try:
        return from_dict(value)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def override(config: Config, overrides: list[str] | None) -> Config:
    """A configuration with "section.key=value" laid over it; raises `ConfigError` as `load` does."""
    value = copy.deepcopy(config.to_dict())
    for one in overrides or []:
        _apply(value, one)
    return from_dict(_listed(value)) if overrides else config


def _listed(value: Any) -> Any:
    """TOML has lists, not tuples."""
    if isinstance(value, dict):
        return {name: _listed(item) for name, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def _apply(value: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"--set {override}: expected section.key=value")
    try:
        parsed = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = text  # a bare word is a string
    *sections, last = key.strip().split(".")
    for section in sections:
        value = value.setdefault(section, {})
        if not isinstance(value, dict):
            raise ConfigError(f"--set {override}: {section} is not a section")
    value[last] = parsed
