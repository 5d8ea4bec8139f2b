"""What a run of the benchmark found: per round and variant, medians, and the ratios that are the result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

PACKAGES = ("onnxruntime", "uvicorn", "uvloop", "websockets", "fastapi", "numpy")


@dataclass(frozen=True)
class Variant:
    """One thing that is measured: `who` is alone (onnxruntime), echo or service."""

    who: str
    streams: int
    per_message: int = 1

    @property
    def name(self) -> str:
        return f"{self.who} {self.streams}" + (f" x {self.per_message}" if self.per_message > 1 else "")


@dataclass(frozen=True)
class Figure:
    """What one variant did in one round; `client_us` is the load generator's processor time for one message, None where there is none."""

    frames_per_s: float
    p50_ms: float
    p99_ms: float
    client_us: float | None = None


@dataclass
class Report:
    """All figures of a run by variant, one per round, and how far the service's scores were from onnxruntime's."""

    conditions: dict[str, Any]
    figures: dict[Variant, list[Figure]] = field(default_factory=dict)
    equality: dict[str, Any] = field(default_factory=dict)

    def add(self, variant: Variant, figure: Figure) -> None:
        self.figures.setdefault(variant, []).append(figure)

    def median(self, variant: Variant, what: str) -> float:
        return float(median(getattr(figure, what) for figure in self.figures[variant]))

    def ratio(self, above: Variant, below: Variant) -> float:
        """Of frames per second: median of the ratios within each round, in which both were measured shortly after each other."""
        pairs = zip(self.figures[above], self.figures[below], strict=True)
        return median(a.frames_per_s / b.frames_per_s for a, b in pairs)

    def round_trip_ratio(self) -> float:
        """The service's round trip of one stream over that of the echo plus one step of onnxruntime."""
        of = [self.figures[Variant(who, 1)] for who in ("service", "echo", "alone")]
        return float(median(service.p50_ms / (echo.p50_ms + alone.p50_ms) for service, echo, alone in zip(*of, strict=True)))

    def ratios(self) -> dict[str, float]:
        found = {"service 1: round trip over (echo + onnxruntime)": self.round_trip_ratio()}
        for variant in self.figures:
            if variant.who == "service":
                found[f"{variant.name} over echo"] = self.ratio(variant, Variant("echo", variant.streams, variant.per_message))
                found[f"{variant.name} over onnxruntime"] = self.ratio(variant, Variant("alone", variant.streams))
        return found

    def to_dict(self) -> dict[str, Any]:
        rounds = {variant.name: [vars(figure) for figure in figures] for variant, figures in self.figures.items()}
        medians = {variant.name: {what: self.median(variant, what) for what in ("frames_per_s", "p50_ms", "p99_ms")} for variant in self.figures}
        return {"conditions": self.conditions, "ratios": self.ratios(), "medians": medians, "equality": self.equality, "rounds": rounds}

    def absolute_table(self) -> Table:
        table = Table("variant", title="medians")
        for column in ("frames/s", "p50 ms", "p99 ms", "client us/message"):
            table.add_column(column, justify="right")
        for variant, figures in self.figures.items():
            cost = "" if figures[0].client_us is None else f"{self.median(variant, 'client_us'):.1f}"
            row = [f"{self.median(variant, 'frames_per_s'):,.0f}".replace(",", " ")]
            table.add_row(variant.name, *row, f"{self.median(variant, 'p50_ms'):.3f}", f"{self.median(variant, 'p99_ms'):.3f}", cost)
        return table

    def ratio_table(self) -> Table:
        table = Table("measure", title="ratios, the result")
        table.add_column("value", justify="right")
        for name, value in self.ratios().items():
            table.add_row(name, f"{value:.2f}")
        return table


def conditions(cores: list[int], **more: Any) -> dict[str, Any]:
    """Date, machine and versions: what figures mean nothing without."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    load = round(os.getloadavg()[0], 1)  # above 0.5 or so others were at work too: then only ratios mean something
    machine = {"date": date.today().isoformat(), "cpu": cpu_model(), "cores": len(cores), "load before": load, "system": platform.system()}
    return {**machine, "python": sys.version.split()[0], **versions, **more}


def cpu_model() -> str:
    """As lscpu names it."""
    known = Path("/proc/cpuinfo")
    for line in known.read_text().splitlines() if known.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or f"unknown, {os.cpu_count()} cores"
