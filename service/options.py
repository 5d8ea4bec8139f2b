"""What a client may choose about its answers and its stream, in one value; read from a URL's query or from an `open` message."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from service.errors import Malformed

Scores = Literal["last", "all", "none"]


@dataclass(frozen=True, slots=True)
class Options:
    """Options, as asked for or in force. `layout` and `fps` are fixed when a stream opens, the others only dress its answers."""

    layout: str | None = None  # of the client's skeletons; None is the model's own
    fps: float | None = None  # of the client's frames; None is the model's own
    scores: Scores = "last"
    answers: Literal["json", "binary"] = "json"
    top_k: int = 5
    events: bool | None = None  # None: where the model has rules for them

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


NAMES = tuple(field.name for field in dataclasses.fields(Options))
_CHOICES = {"scores": ("last", "all", "none"), "answers": ("json", "binary")}


def read_options(given: Mapping[str, Any], base: Options) -> Options:
    """`base` with what was given on top; values may be strings, as in a query, or typed, as in JSON. Raises `Malformed` naming the option."""
    changes = {name: _read(name, value) for name, value in given.items() if value is not None}
    chosen = dataclasses.replace(base, **changes)
    if chosen.answers == "binary" and chosen.scores == "none":
        raise Malformed("answers=binary carries scores only: choose scores=last or scores=all with it")
    return chosen


def _read(name: str, value: Any) -> Any:
    if name not in NAMES:
        raise Malformed(f"unknown option {name!r:.60}; known: {', '.join(NAMES)}")
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise Malformed(f"{name} must be one of {', '.join(_CHOICES[name])}, got {value!r:.60}")
        return value
    if name == "layout":
        if not isinstance(value, str):
            raise Malformed(f"layout must be a name, got {value!r:.60}")
        return value
    return {"top_k": _read_top_k, "fps": _read_fps, "events": _read_events}[name](value)


def _read_events(value: Any) -> bool:
    chosen = {"true": True, "false": False}.get(value) if isinstance(value, str) else value
    if not isinstance(chosen, bool):
        raise Malformed(f"events must be true or false, got {value!r:.60}")
    return chosen


def _read_top_k(value: Any) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= 10_000:
        raise Malformed(f"top_k must be a whole number from 0 to 10000, got {value!r:.60}")
    return number


def _read_fps(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else 0.0
    except (ValueError, OverflowError):
        number = 0.0
    if not 0 < number < math.inf:
        raise Malformed(f"fps must be a number of frames a second above 0, got {value!r:.60}")
    return number
