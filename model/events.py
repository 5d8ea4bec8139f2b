"""When something starts and ends: events read from a stream of scores by hysteresis and a minimum length.

The rules (`EventRules`, part of the manifest) are chosen on validation data in training; the service applies them. Two thresholds keep a score
that trembles about one of them from giving an event per frame (J. Canny, *A Computational Approach to Edge Detection*, IEEE PAMI 8(6), 1986:
hysteresis), the two lengths do so in time.

With no event open, the candidate is the best class that is not `nothing`. Where one and the same candidate has a score of at least `enter` for
`least` rows in a row it starts: `frame` is that of the first of those rows, `decided` of the last, `score` its mean over them.

With an event of class L open:

- L's score is below `leave` for `gap` rows in a row: it ends. `frame` is that of the first of those rows, the first that is no longer part of it.
- the candidate is another class than L and holds as above: L ends at the first row of that run, and the new one starts there; both decided now.

With `pooled` rules it is that something happens at all which starts and ends, whatever it is: one action that is taken for two in turns is one event.
Where 1 - the score of `nothing` is at least `enter` for `least` rows in a row it starts, with the class whose mean over those rows is the highest; where
that is below `leave` for `gap` rows in a row it ends. No class takes over from another: for that there must be nothing between them.

`score` of an end is the mean of L's score from its first row to the last before its end. A candidate's run goes on counting when L ends beneath
it; its start is then put no earlier than that end, so that events of one stream never overlap. Rows are steps of the model; frames are numbered
as the client counts them, so several rows may carry one number and numbers may be left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from model.contract import EventRules

__all__ = ["Event", "EventRules", "EventState", "advance", "close"]

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Event:
    """Something started or ended at `frame`, which was known at frame `decided`; `score` is a mean over its rows, as the module says."""

    event: Literal["start", "end"]
    label: str
    score: float
    frame: int
    decided: int
    cause: Literal["reset"] | None = None  # of an end that the scores did not bring about


@dataclass(frozen=True, slots=True)
class EventState:
    """What the rows so far leave for the rows to come, in plain numbers and names; as it is made, nothing has been seen."""

    label: str | None = None  # of the open event
    start: int = 0  # its frame
    rows: int = 0  # since its start, and the sum of its scores over them
    total: float = 0.0
    gone: int = 0  # rows in a row below `leave`
    gone_frame: int = 0  # the first of them, and `rows` and `total` before it
    gone_rows: int = 0
    gone_total: float = 0.0
    candidate: str | None = None  # the class that holds `enter`, other than the open event's
    run: int = 0  # for how many rows in a row
    run_frame: int = 0  # the first of them, the sum of its scores, and `rows` and `total` of the open event before it
    run_sum: float = 0.0
    run_rows: int = 0
    run_total: float = 0.0
    ended: int = 0  # frame of the last end
    run_sums: tuple[float, ...] = ()  # with pooled rules, of a run: the sum of each class's scores over it

    @property
    def score(self) -> float:
        """Mean score of the open event so far; 0 where none is open."""
        return self.total / self.rows if self.rows else 0.0

    @property
    def frames(self) -> set[int]:
        """The frames before the next row that the next events may name."""
        named = {self.ended, self.start} if self.label is not None else {self.ended}
        return named | ({self.gone_frame} if self.gone else set()) | ({self.run_frame} if self.run else set())

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> EventState:
        """Raises `TypeError` for fields that are unknown."""
        return cls(**{**value, "run_sums": tuple(value.get("run_sums", ()))})

    def check(self, classes: Sequence[str], end: int) -> None:
        """For a state that comes from elsewhere: raises `ValueError` unless rows of these classes, of frames below `end`, may leave it."""
        for label in (self.label, self.candidate):
            if label is not None and label not in classes:
                raise ValueError(f"{label!r:.60} is none of these classes")
        numbers = [self.start, self.rows, self.gone, self.gone_frame, self.gone_rows, self.run, self.run_frame, self.run_rows, self.ended]
        if min(numbers) < 0 or max(self.start, self.gone_frame, self.run_frame, self.ended) > end:
            raise ValueError(f"a number below 0, or a frame that is not below {end}")
        if not np.isfinite([self.total, self.gone_total, self.run_sum, self.run_total, *self.run_sums]).all():
            raise ValueError("a sum of scores that is not finite")
        if self.run_sums and (len(self.run_sums) != len(classes) or not self.run or self.label is not None):
            raise ValueError(f"sums of {len(self.run_sums)} classes over a run, where there are {len(classes)} or no such run can be")
        opened = self.label is not None
        if opened != (self.rows > 0) or (self.gone and not (opened and 0 < self.gone_rows <= self.rows)):
            raise ValueError("rows of an event that is not open, or an open one of no rows")
        if (self.candidate is None) != (self.run == 0) or (self.run and opened and not 0 < self.run_rows <= self.rows):
            raise ValueError("a run of no candidate, or a candidate of no run")
        if opened and self.candidate == self.label:
            raise ValueError("a candidate that is open already")


def advance(rules: EventRules, classes: Sequence[str], state: EventState, scores: Floats, frames: Numbers) -> tuple[EventState, list[Event]]:
    """Rows of scores (n, classes) at client frames (n,), which never go back -> the state after them and the events they decide, in order.

    A pure function: however rows are cut into calls, the events are the same. Raises `ValueError` for shapes that do not fit, and for rules or
    a state of other classes.
    """
    if scores.ndim != 2 or scores.shape[1] != len(classes) or frames.shape != scores.shape[:1]:
        raise ValueError(f"scores {scores.shape} and frames {frames.shape} do not fit {len(classes)} classes")
    if not len(scores):
        return state, []
    detector, some = _Detector(rules, classes, state), scores
    if rules.nothing is not None:
        some = scores.copy()
        some[:, detector.nothing] = -1.0 if rules.pooled else -np.inf  # below every score; sums of it are finite
    if rules.pooled:
        happening = (1.0 - scores[:, detector.nothing].astype(np.float64)).tolist()
        for row, frame in enumerate(frames.tolist()):
            detector.take_pooled(scores, some, row, happening[row], frame)
        return detector.state(), detector.events
    best, tops = some.argmax(axis=1).tolist(), some.max(axis=1).tolist()  # Python's doubles, so that sums do not depend on the array's type
    for row, frame in enumerate(frames.tolist()):
        detector.take(scores, row, best[row], tops[row], frame)
    return detector.state(), detector.events


def close(rules: EventRules, classes: Sequence[str], state: EventState, at: int) -> tuple[EventState, list[Event]]:
    """A reset at frame `at`, the next one: everything begins anew, and an event that is open ends there."""
    del rules, classes  # whatever they are, a reset ends what is open
    if state.label is None:
        return EventState(ended=at), []
    return EventState(ended=at), [Event("end", state.label, state.score, at, at, "reset")]


class _Detector:
    """`EventState` thawed for a run of rows: one new frozen value per row would take longer than the rest."""

    def __init__(self, rules: EventRules, classes: Sequence[str], state: EventState) -> None:
        self._rules = rules
        self._classes = classes
        self.events: list[Event] = []
        self.nothing = self._index(rules.nothing, "these rules are")
        self._open, self._candidate = self._index(state.label, "this state is"), self._index(state.candidate, "this state is")
        self._start, self._rows, self._total = state.start, state.rows, state.total
        self._gone, self._gone_frame, self._gone_rows, self._gone_total = state.gone, state.gone_frame, state.gone_rows, state.gone_total
        self._run, self._run_frame, self._run_sum = state.run, state.run_frame, state.run_sum
        self._run_rows, self._run_total = state.run_rows, state.run_total
        self._ended = state.ended
        self._run_sums = np.array(state.run_sums, np.float64)

    def state(self) -> EventState:
        return EventState(
            self._label(self._open), self._start, self._rows, self._total,
            self._gone, self._gone_frame, self._gone_rows, self._gone_total,
            self._label(self._candidate), self._run, self._run_frame, self._run_sum, self._run_rows, self._run_total,
            self._ended, tuple(self._run_sums.tolist()) if self._run else (),
        )  # fmt: skip

    def take(self, scores: Floats, row: int, best: int, top: float, frame: int) -> None:
        """One row of scores (rows, classes): its best class that is something, that class's score, and the frame it belongs to."""
        holds = top >= self._rules.enter and best != self._open
        if not holds:
            self._candidate, self._run, self._run_sum = None, 0, 0.0
        elif best != self._candidate:
            self._candidate, self._run, self._run_frame, self._run_sum = best, 0, frame, 0.0
            self._run_rows, self._run_total = self._rows, self._total
        if self._open is not None:
            score = scores.item(row, self._open)
            self._count_open(score, score, frame)
        if holds:
            self._run += 1
            self._run_sum += top
        if self._open is not None and self._gone >= self._rules.gap:
            self._end(self._gone_frame, self._gone_rows, self._gone_total, frame)
        if self._run >= self._rules.least:
            if self._open is not None:
                self._end(self._run_frame, self._run_rows, self._run_total, frame)
            self._begin(frame)

    def take_pooled(self, scores: Floats, some: Floats, row: int, happening: float, frame: int) -> None:
        """One row for pooled rules: `some` (rows, classes) are the scores with nothing left out of account, `happening` is what they come to together."""
        if self._open is not None:
            self._count_open(scores.item(row, self._open), happening, frame)
            if self._gone >= self._rules.gap:
                self._end(self._gone_frame, self._gone_rows, self._gone_total, frame)
        elif happening < self._rules.enter:
            self._candidate, self._run, self._run_sum = None, 0, 0.0
        else:
            if not self._run or len(self._run_sums) != len(self._classes):
                self._run, self._run_frame, self._run_sums = 0, frame, np.zeros(len(self._classes))
                self._run_rows, self._run_total = 0, 0.0
            self._run += 1
            self._run_sums += some[row]
            self._candidate = int(self._run_sums.argmax())
            self._run_sum = float(self._run_sums[self._candidate])
            if self._run >= self._rules.least:
                self._begin(frame)

    def _count_open(self, score: float, judged: float, frame: int) -> None:
        """One row of the open event: its class's score, and what `leave` is held against."""
        if judged >= self._rules.leave:
            self._gone = 0
        else:
            if not self._gone:
                self._gone_frame, self._gone_rows, self._gone_total = frame, self._rows, self._total
            self._gone += 1
        self._rows += 1
        self._total += score

    def _begin(self, frame: int) -> None:
        assert self._candidate is not None
        self._open, self._start, self._rows, self._total, self._gone = self._candidate, max(self._run_frame, self._ended), self._run, self._run_sum, 0
        self._candidate, self._run, self._run_sum = None, 0, 0.0
        self.events.append(Event("start", self._classes[self._open], self._total / self._rows, self._start, frame))

    def _end(self, at: int, rows: int, total: float, frame: int) -> None:
        assert self._open is not None
        self.events.append(Event("end", self._classes[self._open], total / rows, at, frame))
        self._open, self._rows, self._total, self._gone, self._ended = None, 0, 0.0, 0, at

    def _index(self, label: str | None, whose: str) -> int | None:
        if label is None:
            return None
        if label not in self._classes:
            raise ValueError(f"{whose} of other classes: {label!r} is none of these")
        return self._classes.index(label)

    def _label(self, index: int | None) -> str | None:
        return None if index is None else self._classes[index]
