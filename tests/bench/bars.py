"""The bars: what each asks for, which variants it is computed from, and whether a run met it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich import box
from rich.table import Table

from tests.bench.figures import Report, Variant

Value = Callable[[Report], float | None]

CLIP = 64  # frames
WITH_LONG, HALF_LOAD, CAMERAS = "beside 1 x 64", "at half load", "at 30 a second beside a fast one"
START, FIRST_START, IDLE_MB, SESSION_KB, SESSION_LIMIT_KB, DIFFERENCE = (
    "start to ready, s",
    "the first of these starts, s",
    "idle memory, MB",
    "memory of an idle session, KB",
    "2 x its state row + 1 KB",
    "largest difference of scores",
)  # names of facts


@dataclass(frozen=True)
class Bar:
    """One line of the result. `limit` is None for what is told without one, or the name of a fact; `facts` are measured once, not in rounds."""

    name: str
    value: Value
    limit: float | str | None = None
    at_most: bool = False
    variants: tuple[Variant, ...] = ()
    facts: tuple[str, ...] = ()

    def judge(self, report: Report) -> tuple[float | None, float | None, str]:
        """Value, limit and "met", "missed", "not measured" or, where there is no limit, ""."""
        value = self.value(report)
        limit = report.facts.get(self.limit) if isinstance(self.limit, str) else self.limit
        if value is None or math.isnan(value):
            return None, limit, "not measured"
        if limit is None:
            return value, None, ""
        return value, limit, "met" if (value <= limit if self.at_most else value >= limit) else "missed"


def ratio(above: Variant, below: Variant, limit: float | None = None, name: str = "") -> Bar:
    return Bar(name or f"{above.name} over {below.name}", lambda report: report.ratio(above, below), limit, variants=(above, below))


def in_turns(above: Variant, echo: Variant, alone: Variant) -> Bar:
    """Over what a machine does that first makes the echo and then runs the model, on as many cores as each has alone."""

    def value(report: Report) -> float | None:
        return report.within([above, echo, alone], lambda ours, bare, step: ours.frames_per_s * (1 / bare.frames_per_s + 1 / step.frames_per_s))

    return Bar(f"{above.name} over ({echo.name}, onnxruntime in turns)", value, variants=(above, echo, alone))


def fact(name: str, limit: float | str | None = None, *others: str) -> Bar:
    return Bar(name, lambda report: report.facts.get(name), limit, True, facts=(name, *others))


def _services() -> list[Bar]:
    """Websocket streams over the echo, and beside onnxruntime alone."""
    service, alone, echo, picows = (partial(Variant, who) for who in ("service", "alone", "echo", "picows echo"))

    def trip(report: Report) -> float | None:
        return report.within([service(1), echo(1), alone(1)], lambda ours, bare, step: ours.p50_ms / (bare.p50_ms + step.p50_ms))

    return [
        ratio(service(64), echo(64), 0.40),
        ratio(service(256), echo(256), 0.40),
        ratio(service(1), echo(1)),
        ratio(service(16), echo(16)),
        ratio(service(1024), echo(1024)),
        ratio(Variant("service", 64, 8), Variant("echo", 64, 8)),
        Bar("service 1: round trip over (echo + onnxruntime)", trip, 1.5, True, (service(1), echo(1), alone(1))),
        ratio(Variant("service", 64, 8), alone(64), 0.60),
        *(ratio(service(streams), alone(streams)) for streams in (16, 64, 256)),
        *(in_turns(service(streams), echo(streams), alone(streams)) for streams in (16, 64, 256)),
        *(ratio(picows(streams), echo(streams)) for streams in (1, 64, 256)),
    ]


def _requests() -> list[Bar]:
    return [
        ratio(Variant("infer", 64), Variant("http echo", 64), 0.38),
        in_turns(Variant("infer", 64), Variant("http echo", 64), Variant("alone", 64)),
        ratio(Variant("steps", 64), Variant("json echo", 64), 1.4),
        ratio(Variant("clips", 16, CLIP), Variant("alone clips", 1, CLIP), 0.85),
    ]


def _many() -> list[Bar]:
    few, many, half, alone = Variant("service", 64), Variant("service", 1024), Variant("service", 64, 1, HALF_LOAD), Variant("alone", 64)
    crowded = Variant("crowded", 64)

    def growth(report: Report) -> float | None:
        return report.within([many, few], lambda one, other: one.p99_ms / other.p99_ms / (many.streams / few.streams))

    def waiting(report: Report) -> float | None:
        return report.within([half, alone], lambda ours, step: ours.p99_ms - step.p50_ms)

    return [
        ratio(many, few, 0.95),
        Bar("service 1024: p99 over 16 x that of 64", growth, 1.0, True, (many, few)),
        Bar("service 64 at half load: p99 less onnxruntime's step, ms", waiting, 5.0, True, (few, half, alone)),
        ratio(crowded, few, 0.90, "64 of 10 000 open sessions active, over 64 of 64"),
        fact(SESSION_KB, SESSION_LIMIT_KB, SESSION_LIMIT_KB),
    ]


def _fairness() -> list[Bar]:
    plain, beside, cameras = Variant("service", 63), Variant("service", 63, 1, WITH_LONG), Variant("service", 63, 1, CAMERAS)

    def slower(report: Report) -> float | None:
        return report.within([beside, plain], lambda one, other: one.p99_ms / other.p99_ms)

    return [
        Bar("service 63: p99 beside a 64th of 64-frame messages, over without", slower, 2.0, True, (plain, beside)),
        Bar("the same: frames computed over frames taken", lambda report: report.within([beside], lambda one: one.padding), 1.5, True, (beside,)),
        Bar(
            "63 slow streams beside a fast one: frames answered in time, of the worst",
            lambda report: report.within([cameras], lambda one: one.share),
            0.9,
            False,
            (cameras,),
        ),
    ]


BARS = (*_services(), *_requests(), *_many(), *_fairness(), fact(START, 1.5, FIRST_START), fact(FIRST_START), fact(IDLE_MB, 120.0), fact(DIFFERENCE, 1e-5))

HAND_WRITTEN = ("hand-written JSON", "hand-written websocket")
BESIDE = (  # what is shown and no bar: a service as it is written by hand
    *(Variant(who, streams) for who in HAND_WRITTEN for streams in (1, 16, 64, 256)),
    Variant("hand-written websocket", 64, 8),
)


def chosen(pattern: str | None, bars: Sequence[Bar] = BARS, beside: Sequence[Variant] = BESIDE) -> tuple[list[Bar], list[Variant], set[str]]:
    """Bars, variants and facts that `pattern` (a regular expression, found anywhere in a name) asks for; None: all."""
    wanted = re.compile(pattern or "", re.IGNORECASE)
    some = [bar for bar in bars if wanted.search(bar.name)]
    named = [variant for bar in bars for variant in bar.variants] + list(beside)
    variants = [variant for variant in named if wanted.search(variant.name)] if pattern else named
    variants += [variant for bar in some for variant in bar.variants]
    return some, list(dict.fromkeys(variants)), {name for bar in some for name in bar.facts}


def bar_table(bars: Sequence[Bar], report: Report) -> Table:
    table = Table("measure", title="the result", box=box.MARKDOWN)
    for column in ("value", "bar", ""):
        table.add_column(column, justify="right")
    for bar in bars:
        value, limit, verdict = bar.judge(report)
        asked = "" if limit is None else f"{'<=' if bar.at_most else '>='} {_short(limit)}"
        table.add_row(bar.name, "" if value is None else _short(value), asked, verdict, style="bold red" if verdict == "missed" else None)
    return table


def bars_dict(bars: Sequence[Bar], report: Report) -> list[dict[str, Any]]:
    judged = [(bar, bar.judge(report)) for bar in bars]
    return [{"name": bar.name, "value": value, "limit": limit, "at_most": bar.at_most, "verdict": verdict} for bar, (value, limit, verdict) in judged]


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value == 0 or abs(value) < 0.01 else f"{value:.2f}"
