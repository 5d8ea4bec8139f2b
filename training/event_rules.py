"""Chooses the rules by which the service reads events from scores: those that find most on validation streams."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from model.contract import EventRules
from training.datasets.recordings import Segments
from training.stream_figures import Scores, detect, f1, match

ENTER = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LEAVE = (0.25, 0.5, 0.75, 1.0)  # shares of `enter`
LENGTHS = ((2, 2), (3, 3), (5, 3), (5, 5), (8, 5), (8, 8), (12, 8))  # rows: least, gap


def choose_rules(
    scores: Sequence[Scores],
    streams: Sequence[Segments],
    classes: Sequence[str],
    nothing: str | None,
    watch: Callable[[int, int], None] | None = None,
) -> tuple[EventRules, float]:
    """The rules with the highest F1 on these streams, and that F1; among equals the quickest to decide, so the one that waits for fewer rows.

    Where there is a class for nothing, rules by which every class starts and ends by itself and pooled ones are tried.
    """
    grid = list(itertools.product(sorted(LENGTHS, key=sum), ENTER, LEAVE, (False, True) if nothing is not None else (False,)))
    best: tuple[float, EventRules] | None = None
    for i, ((least, gap), enter, leave, pooled) in enumerate(grid):
        rules = EventRules(nothing=nothing, enter=enter, leave=round(enter * leave, 3), least=least, gap=gap, pooled=pooled)
        value = f1([match(segments, detect(rules, classes, one)) for one, segments in zip(scores, streams, strict=True)])
        if best is None or value > best[0] + 1e-9:
            best = value, rules
        if watch:
            watch(i + 1, len(grid))
    assert best is not None
    return best[1], best[0]
