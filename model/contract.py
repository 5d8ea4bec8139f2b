"""The contract between training and serving: tensor names and the manifest inside every `model.onnx`.

Standard library only: the service imports this module, `model.events` and `model.skeletons` and nothing else of `model/`.

    tensor       type     shape                          meaning
    frames       float32  (batch, time, *frame_shape)    raw input, as the client has it
    lengths      int64    (batch,)                       real steps of each row; 0 is legal, time >= 1
    state        float32  (batch, state_width)           one opaque row per stream, zeros is the start
    scores       float32  (batch, time, classes)         per-step scores, unspecified beyond a row's length
    next_state   float32  (batch, state_width)
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

CONTRACT_VERSION = 1
MANIFEST_KEY = "manifest"  # name of the entry in the ONNX file's metadata

FRAMES, LENGTHS, STATE = "frames", "lengths", "state"
SCORES, NEXT_STATE = "scores", "next_state"
INPUTS = (FRAMES, LENGTHS, STATE)
OUTPUTS = (SCORES, NEXT_STATE)

MODEL_FILE = "model.onnx"  # lies in <models>/<name>/<version>/
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # what a served name and a version may look like

Task = Literal["classification", "regression", "tokens"]


class ManifestError(ValueError):
    """A manifest is missing, malformed or contradicts itself; the message names the field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What the network is, for people; the service never acts on it."""

    kind: str  # "plain", "residual", ...
    layers: int
    units: int
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """The data set a model was trained on and the terms that come with it."""

    name: str
    terms: str
    citation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """What was measured at export: fractions in [0, 1] by name, and the protocol they were measured under."""

    protocol: str
    values: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Largest differences found when the file was verified against torch and against itself on real clips."""

    scores_abs: float  # torch whole clip against every ONNX way of running it
    state_rel: float
    chunked_abs: float  # ONNX whole clip against ONNX in random chunks
    batched_abs: float  # ONNX alone against ONNX in a ragged batch of unrelated rows
    clips: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamReport:
    """How a model behaves on streams of many clips end to end; see "streams" in the contract's description."""

    verified_frames: int  # longest stream that was run with a finite, bounded state
    horizon: int  # frames after which the past is forgotten, and a cold start has warmed up
    accuracy_first: float  # at position 1 of a stream
    accuracy_last: float  # mean of the last five positions
    ci95: float = 0.0  # half width of the 95 % interval of the difference

    @property
    def declines(self) -> bool:
        """Whether late positions are worse than the first by more than chance."""
        return self.accuracy_last < self.accuracy_first - max(self.ci95, 0.01)


@dataclass(frozen=True, slots=True)
class EventRules:
    """When a stream of scores says that something starts and ends; what exactly they mean is in `model.events`.

    Raises `ManifestError` naming the field that makes no sense.
    """

    nothing: str | None  # the class that means no action; None where every class is one
    enter: float  # score from which on a class may start
    leave: float  # score below which it may end; not above `enter` (hysteresis)
    least: int  # model steps a class must hold before its start is decided: the minimum length
    gap: int  # model steps it must be gone before its end is decided
    pooled: bool = False  # whether it is all classes but `nothing` together, their scores added up, that start and end

    def __post_init__(self) -> None:
        _need(0 < self.enter <= 1, f"events.enter {self.enter} must be above 0 and at most 1")
        _need(0 < self.leave <= self.enter, f"events.leave {self.leave} must be above 0 and at most events.enter, {self.enter}")
        _need(self.least >= 1, f"events.least {self.least} must be at least 1")
        _need(self.gap >= 1, f"events.gap {self.gap} must be at least 1")
        _need(not self.pooled or self.nothing is not None, "events.pooled needs events.nothing: it adds up the scores of all other classes")


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """A few frames, fed from the zero state, and the scores they must give; run by the service at load."""

    frames: list[Any]  # nested lists, (time, *frame_shape); null is a missing value
    scores: list[list[float]]  # (time, classes)
    tolerance: float = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything a server or client must know of a model. Validates itself; see `from_json`.

    Raises `ManifestError` when fields contradict each other.
    """

    contract: int
    model: str
    task: Task
    frame_shape: tuple[int, ...]
    units: str  # of the input, e.g. "metres"
    layout: str | None  # a name in `model.skeletons`, or None where frames are no skeleton
    joints: tuple[str, ...]
    axes: str  # e.g. "x to the sensor's left, y up, z away from the sensor"
    fps: float
    classes: tuple[str, ...]
    missing: bool  # may joints (channels, where there is no layout) be absent
    state_width: int
    chunk: int  # suggested frames per message
    stream: StreamReport | None
    architecture: Architecture
    data: DataSource
    metrics: Metrics
    parity: Parity
    self_test: SelfTest
    fingerprint: str  # sha256 over the graph, hex
    made_by: str
    events: EventRules | None = None  # files from before there were events say nothing of them

    def __post_init__(self) -> None:
        need = _need
        need(self.contract == CONTRACT_VERSION, f"contract version {self.contract}, this program reads {CONTRACT_VERSION}")
        need(NAME_PATTERN.fullmatch(self.model) is not None, f"model name {self.model!r} must match {NAME_PATTERN.pattern}")
        need(len(self.frame_shape) > 0 and all(n > 0 for n in self.frame_shape), f"frame_shape {self.frame_shape} must be positive")
        need(self.state_width > 0, f"state_width {self.state_width} must be positive")
        need(self.chunk > 0, f"chunk {self.chunk} must be positive")
        need(math.isfinite(self.fps) and self.fps > 0, f"fps {self.fps} must be positive")
        need(len(self.classes) > 0, "classes must not be empty")
        need(len(set(self.classes)) == len(self.classes), "classes must differ from each other")
        if self.layout is not None:
            need(len(self.frame_shape) >= 2 and len(self.joints) == self.frame_shape[-2], f"{len(self.joints)} joint names for frame_shape {self.frame_shape}")
        if self.events is not None:
            need(self.task == "classification", f"events: a model whose task is {self.task} has none")
            nothing = self.events.nothing
            need(nothing is None or nothing in self.classes, f"events.nothing {nothing!r} is none of the classes")
            need(set(self.classes) != {nothing}, f"events: there is no class but {nothing!r}, which means no action")
        need(re.fullmatch(r"[0-9a-f]{64}", self.fingerprint) is not None, "fingerprint must be 64 hex digits")
        need(len(self.self_test.frames) == len(self.self_test.scores) > 0, "self_test needs as many scores as frames, at least one")
        need(all(len(row) == len(self.classes) for row in self.self_test.scores), "self_test.scores must have one value per class")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def summary(self) -> dict[str, Any]:
        """The manifest without the self-test's numbers: what clients and people want to see."""
        return {name: value for name, value in self.to_dict().items() if name != "self_test"}

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parses and validates; raises `ManifestError` naming the field that is missing, unknown or of the wrong type."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"manifest: not JSON: {error}") from None
        manifest: Manifest = decode(value, cls, "manifest")
        return manifest


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise ManifestError(f"manifest: {message}")


def decode(value: Any, kind: Any, where: str) -> Any:
    """Turns parsed JSON or TOML into `kind` (a dataclass, tuple, list, dict, Literal, union or scalar), strictly.

    Raises `ManifestError` naming the field, below `where`, that is missing, unknown or of another type.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_record(value, kind, where)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return decode(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        if value not in args:
            raise ManifestError(f"{where}: {value!r} is none of {', '.join(map(repr, args))}")
        return value
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise ManifestError(f"{where}: expected a list, got {type(value).__name__}")
        return origin(decode(item, args[0], f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ManifestError(f"{where}: expected an object, got {type(value).__name__}")
        return {str(key): decode(item, args[1], f"{where}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ManifestError(f"{where}: {value!r:.20}... is beyond any float") from None
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ManifestError(f"{where}: expected {kind.__name__}, got {value!r:.80}")
    return value


def _decode_record(value: Any, kind: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ManifestError(f"{where}: expected an object, got {type(value).__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(value) - set(fields)):
        raise ManifestError(f"{where}: unknown field {unknown[0]!r}")
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING}
    if absent := sorted(required - set(value)):
        raise ManifestError(f"{where}: field {absent[0]!r} is missing")
    hints = typing.get_type_hints(kind)
    return kind(**{name: decode(item, hints[name], f"{where}.{name}") for name, item in value.items()})
