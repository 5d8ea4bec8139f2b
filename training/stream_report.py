"""A network for streams beside a network for clips on the same streams, of data neither was trained on: one table, one command."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.contract import EventRules
from model.network import Network
from training.event_rules import choose_rules
from training.stream_figures import Scores, StreamFigures, early, measure
from training.stream_scores import Watch, left_running, multiplications, oracle, sliding
from training.streams import Form, Stream, Streams

CLIPS_RUNNING = "clips, left running"
CLIPS_ORACLE = "clips, reset at every true start and end"
CLIPS_WINDOW = "clips, sliding window"
STREAMS = "streams, left running"


@dataclass(frozen=True)
class Row:
    """One way of using one network: figures, share right after each tenth of an action, multiplications for a frame."""

    name: str
    figures: StreamFigures
    early: tuple[float, ...]
    multiplications: int
    rules: EventRules | None  # by which events were found; None for the oracle, which is told them

    def to_dict(self) -> dict[str, Any]:
        value = dataclasses.asdict(self)
        value["figures"]["by_position"] = self.figures.by_position.tolist()
        return value


def finite_streams(streams: Streams, form: Form, count: int, actions: int, seed: int) -> list[Stream]:
    """So many streams of one form; of recordings as they are, and of repetitions, each once."""
    number = {"whole": len(streams.recordings or ()), "repeats": len(streams.repeats)}.get(form, count)
    return [streams.stream(form, i, seed=seed, actions=actions) for i in range(max(1, number))]  # where there are none, it says why


def stream_row(network: Network, streams: Sequence[Stream], classes: Sequence[str], rules: EventRules) -> Row:
    """The network left running, as the service runs it."""
    return _row(STREAMS, left_running(network, [one.frames for one in streams]), streams, classes, rules, multiplications(network))


def clip_rows(
    network: Network, streams: Sequence[Stream], classes: Sequence[str], running: EventRules, windowed: EventRules, window: int, watch: Watch
) -> list[Row]:
    """A network for clips, which knows no class for nothing, in the three ways in which it may be used on streams."""
    frames, segments, cost = [one.frames for one in streams], [one.segments for one in streams], multiplications(network)
    rows = [_row(CLIPS_RUNNING, left_running(network, frames), streams, classes, running, cost)]
    free = _row(CLIPS_ORACLE, oracle(network, frames, segments), streams, classes, running, cost)
    unknown = float("nan")
    rows.append(dataclasses.replace(free, rules=None, figures=dataclasses.replace(free.figures, f1=unknown, delay=unknown, boundary=unknown, counted=unknown)))
    rows.append(_row(CLIPS_WINDOW, sliding(network, frames, window, watch), streams, classes, windowed, window * cost))
    return rows


def rules_for(scores: Sequence[Scores], streams: Sequence[Stream], classes: Sequence[str], nothing: str | None, watch: Watch) -> EventRules:
    """The rules that find most on these streams, which must not be those that are reported on."""
    return choose_rules(scores, [one.segments for one in streams], classes, nothing, watch)[0]


def clip_rules(network: Network, streams: Sequence[Stream], classes: Sequence[str], window: int, watch: Watch) -> tuple[EventRules, EventRules]:
    """The best rules for a network for clips left running, and over a window: each way is given its own."""
    frames = [one.frames for one in streams]
    ways = left_running(network, frames), sliding(network, frames, window)
    running, windowed = (rules_for(scores, streams, classes, None, watch) for scores in ways)
    return running, windowed


def _row(name: str, scores: list[Scores], streams: Sequence[Stream], classes: Sequence[str], rules: EventRules, cost: int) -> Row:
    segments = [one.segments for one in streams]
    return Row(name, measure(scores, segments, classes, rules, [one.copied for one in streams]), tuple(early(scores, segments).tolist()), cost, rules)


def mean_row(rows: Sequence[Row]) -> dict[str, float]:
    """The figures of the same row over several seeds, averaged, and the deviation of the accuracy per action."""
    names = [field.name for field in dataclasses.fields(StreamFigures) if field.name != "by_position"]
    values = {name: [float(getattr(row.figures, name)) for row in rows] for name in names}
    means = {name: float(np.mean(of)) for name, of in values.items()}
    deviation = float(np.std(values["actions"], ddof=1)) if len(rows) > 1 else float("nan")
    if len(rows) > 1 and np.isnan(values["slope_ci95"]).any():  # one stream each: the interval is that over runs
        means["slope_ci95"] = float(1.96 * np.std(values["slope"], ddof=1) / np.sqrt(len(rows)))
    return means | {"deviation": deviation, "multiplications": float(rows[0].multiplications)}
