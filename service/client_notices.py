"""What a stream tells its program beside answers and events: that another model answers now, and warnings. And which model that is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_MOST_WARNINGS = 64  # that are kept to be read; all are told


@dataclass(frozen=True)
class ModelChanged:
    """The version that a stream ran on is gone, as after a rolling update: from `frame` on another one answers.

    It began with nothing at `warm_from` and was shown the frames from there on again, whose answers were delivered before; where it can remember
    further back than that, its first answers are those of a stream that has just begun.
    """

    frame: int  # the first that it answers
    version: str
    fingerprint: str
    warm_from: int
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Warned:
    """The stream goes on, but one should know: the service said so, or the client found it."""

    code: str  # such as `store_unavailable`; "" for what is true of the model as such
    message: str  # one line for a person


Notice = ModelChanged | Warned
OnNotice = Callable[[Notice], None]


@dataclass(frozen=True)
class Served:
    """The model that a server runs a stream on; the default is one that nothing is known of."""

    name: str = ""
    version: str = ""
    fingerprint: str = ""
    task: str = ""
    classes: tuple[str, ...] = ()

    @classmethod
    def from_opened(cls, opened: Mapping[str, Any]) -> Served:
        return cls(opened["model"], opened["version"], opened.get("fingerprint", ""), opened["task"], tuple(opened["classes"]))

    def changed(self, message: Mapping[str, Any]) -> Served:
        """The one that a `model_changed` names."""
        return dataclasses.replace(self, version=message["version"], fingerprint=message["fingerprint"], classes=tuple(message["classes"]))

    @property
    def labels(self) -> tuple[str, ...]:
        """Of its scores; none where they are no classification."""
        return self.classes if self.task == "classification" else ()

    def is_like(self, other: Served) -> bool:
        """Whether both give the same answers, under whatever version."""
        return self.fingerprint == other.fingerprint if self.fingerprint and other.fingerprint else self.version == other.version


class Notices:
    """Tells a listener, and keeps the latest different warnings."""

    def __init__(self, listener: OnNotice | None) -> None:
        self.warnings: list[str] = []
        self._listener = listener

    def warn(self, message: str, code: str = "") -> None:
        if message not in self.warnings:
            del self.warnings[: 1 - _MOST_WARNINGS]  # nothing, while there is room
            self.warnings.append(message)
        self.tell(Warned(code, message))

    def tell(self, notice: Notice) -> None:
        if self._listener is not None:
            self._listener(notice)
