"""The event detector of one stream: where it stands, and the events it has decided, kept until they are acknowledged."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from model.events import Event, EventRules, EventState, Floats, Numbers, advance, close

KEPT_EVENTS = 1024

TimeOf = Callable[[int], float]  # a client frame's number -> seconds since frame 0


@dataclass(frozen=True, slots=True)
class TimedEvent:
    """An event and when it happened, in seconds of the stream since its frame 0."""

    event: Event
    time: float

    def to_dict(self) -> dict[str, Any]:
        """What goes over the wire."""
        event = self.event
        value = {
            "event": event.event, "label": event.label, "score": round(event.score, 6),
            "frame": event.frame, "decided": event.decided, "time": round(self.time, 6),
        }  # fmt: skip
        return value if event.cause is None else {**value, "cause": event.cause}


class Detector:
    """Detector of one stream; `state` is all that later scores depend on."""

    def __init__(self, rules: EventRules, classes: Sequence[str]) -> None:
        self._rules = rules
        self._classes = classes
        self.state = EventState()
        self.kept: deque[TimedEvent] = deque(maxlen=KEPT_EVENTS)
        self.forgotten = 0  # frames below may have decided events that are no longer kept though nobody acknowledged them

    def advance(self, scores: Floats, frames: Numbers, time_of: TimeOf) -> list[TimedEvent]:
        """Takes scores (steps, classes) of client frames (steps,); the events they decide are kept."""
        self.state, events = advance(self._rules, self._classes, self.state, scores, frames)
        return self._keep(events, time_of) if events else []

    def close(self, at: int, time_of: TimeOf) -> list[TimedEvent]:
        """Begins anew at frame `at`; what is open ends there."""
        self.state, events = close(self._rules, self._classes, self.state, at)
        return self._keep(events, time_of)

    def restore(self, state: EventState, kept: Iterable[TimedEvent], forgotten: int) -> None:
        """Goes on where another detector of these rules was."""
        self.state = state
        self.kept = deque(kept, maxlen=KEPT_EVENTS)
        self.forgotten = forgotten

    def decided(self, first: int, end: int, *, resets: bool = False) -> list[TimedEvent]:
        """Kept events that frames [first, end) decided; with `resets` those as well that a reset at one of them brought about."""
        return [one for one in self.kept if first <= one.event.decided < end and (resets or one.event.cause is None)]

    def of_reset(self, at: int) -> list[TimedEvent]:
        """Kept events of a reset at that frame."""
        return [one for one in self.kept if one.event.decided == at and one.event.cause is not None]

    def forget(self, below: int) -> None:
        """Drops events that were decided below this frame."""
        while self.kept and self.kept[0].event.decided < below:
            self.kept.popleft()

    def open_event(self, time_of: TimeOf) -> dict[str, Any] | None:
        """The event that has started and not ended, for people; None if there is none."""
        state = self.state
        if state.label is None:
            return None
        return {"label": state.label, "score": round(state.score, 6), "frame": state.start, "time": round(time_of(state.start), 6)}

    def _keep(self, events: list[Event], time_of: TimeOf) -> list[TimedEvent]:
        timed = [TimedEvent(event, time_of(event.frame)) for event in events]
        room = KEPT_EVENTS - len(self.kept)
        if len(timed) > room:
            lost = [*self.kept, *timed][: len(timed) - room]
            self.forgotten = lost[-1].event.decided + 1
        self.kept.extend(timed)
        return timed
