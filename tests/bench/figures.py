"""What a run of the benchmark found: per round and variant, medians, and ratios within the rounds. Tables and JSON of it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.table import Table

CALM = 0.1  # cores that others may have had
PACKAGES = ("onnxruntime", "uvicorn", "uvloop", "websockets", "picows", "fastapi", "numpy")


@dataclass(frozen=True)
class Variant:
    """One thing that is measured: `who` answers, `streams` of them ask, with `per_message` frames in each message, under some `circumstance`."""

    who: str
    streams: int
    per_message: int = 1
    circumstance: str = ""

    @property
    def name(self) -> str:
        return (
            f"{self.who} {self.streams}" + (f" x {self.per_message}" if self.per_message > 1 else "") + (f", {self.circumstance}" if self.circumstance else "")
        )


@dataclass(frozen=True)
class Figure:
    """What one variant did in one round.

    `client_us` is the load generator's processor time for one message; `share` the frames that the worst stream had answered of those it was
    due; `padding` frames computed over frames taken. None where there is none. `others` is how many cores programs that do not belong to
    the benchmark had meanwhile; `note` says what a figure alone does not.
    """

    frames_per_s: float
    p50_ms: float
    p99_ms: float
    client_us: float | None = None
    share: float | None = None
    padding: float | None = None
    others: float = 0.0
    note: str = ""


@dataclass
class Report:
    """All figures of a run by variant and round, and what was measured once, by name."""

    conditions: dict[str, Any]
    figures: dict[Variant, dict[int, Figure]] = field(default_factory=dict)
    facts: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)  # what could not be measured, and why

    def add(self, variant: Variant, number: int, figure: Figure) -> None:
        self.figures.setdefault(variant, {})[number] = figure

    def median(self, variant: Variant, what: str) -> float:
        return float(median(getattr(figure, what) for figure in self.figures[variant].values()))

    def within(self, variants: Sequence[Variant], value: Callable[..., float | None]) -> float | None:
        """Median over calm rounds of `value` of these variants' figures, which were measured shortly after each other. None where no round has them all.

        A round is calm if others had next to nothing of the cores while these were measured; of many that are not, the calmer half counts.
        """
        rounds = set.intersection(*(set(self.figures.get(variant, {})) for variant in variants))
        found = sorted(([self.figures[variant][number] for variant in variants] for number in rounds), key=_others)
        calm = [figures for index, figures in enumerate(found) if _others(figures) <= CALM or 2 * index < len(found)]
        known = [one for one in (value(*figures) for figures in calm) if one is not None]
        return float(median(known)) if known else None

    def ratio(self, above: Variant, below: Variant) -> float | None:
        """Of frames per second."""
        return self.within([above, below], lambda one, other: one.frames_per_s / other.frames_per_s)

    def others(self) -> float:
        """Median over all that was measured of the cores that others had."""
        return float(median(figure.others for found in self.figures.values() for figure in found.values()))

    def last(self, variant: Variant) -> Figure | None:
        """The latest figure."""
        found = self.figures.get(variant)
        return found[next(reversed(found))] if found else None

    def to_dict(self) -> dict[str, Any]:
        rounds = {variant.name: [{"round": number, **vars(figure)} for number, figure in found.items()] for variant, found in self.figures.items()}
        medians = {variant.name: {what: self.median(variant, what) for what in ("frames_per_s", "p50_ms", "p99_ms")} for variant in self.figures}
        return {"conditions": self.conditions, "medians": medians, "facts": self.facts, "failures": self.failures, "rounds": rounds}

    def table(self) -> Table:
        table = Table("variant", title="medians over rounds", box=box.MARKDOWN)
        for column in ("frames/s", "p50 ms", "p99 ms", "client us/message", "others' cores"):
            table.add_column(column, justify="right")
        for variant, found in self.figures.items():
            figure = next(iter(found.values()))
            cost = "" if figure.client_us is None else f"{self.median(variant, 'client_us'):.1f}"
            row = [spaced(self.median(variant, "frames_per_s")), *(f"{self.median(variant, what):.3f}" for what in ("p50_ms", "p99_ms"))]
            table.add_row(variant.name + (f" ({figure.note})" if figure.note else ""), *row, cost, f"{self.median(variant, 'others'):.2f}")
        return table


def _others(figures: Sequence[Figure]) -> float:
    return max(figure.others for figure in figures)


def spaced(value: float) -> str:
    """A whole number with a space between thousands."""
    return f"{value:,.0f}".replace(",", " ")


def conditions(cores: list[int], **more: Any) -> dict[str, Any]:
    """Date, machine and versions: what figures mean nothing without."""
    versions = {name: _version(name) for name in PACKAGES}
    load = round(os.getloadavg()[0], 1)  # above 0.5 or so others were at work too: then only ratios mean something
    machine = {"date": date.today().isoformat(), "cpu": cpu_model(), "cores": len(cores), "load before": load, "system": platform.system()}
    return {**machine, "python": sys.version.split()[0], **versions, **more}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def cpu_model() -> str:
    """As lscpu names it."""
    known = Path("/proc/cpuinfo")
    for line in known.read_text().splitlines() if known.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or f"unknown, {os.cpu_count()} cores"
