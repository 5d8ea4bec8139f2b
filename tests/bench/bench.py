"""One run of the benchmark: its model and frames, onnxruntime, the servers; measures variants in rounds and what is measured once."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import onnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from model.contract import MANIFEST_KEY, Manifest
from tests import toy_models
from tests.bench import bars, programs
from tests.bench.alone import Alone
from tests.bench.figures import Figure, Report, Variant
from tests.bench.load import Group, Result, messages, run
from tests.bench.machine import Usage
from tests.bench.rivals.rival import Rival
from tests.bench.servers import Servers
from tests.bench.wire import Http, LoadError

TOY = toy_models.WIDE
CHECKED = 8  # messages of each stream whose scores are compared with onnxruntime's
LOADS = (("service", 64, 1), ("service", 64, 8), ("infer", 16, 1), ("steps", 16, 1), ("clips", 4, bars.CLIP))  # whose scores are compared
FAILED = "scores of "
SLOW_FPS = 30.0
FAST_DEPTH = 16  # messages of the fast stream that are under way


class Bench:
    """`args`: seconds, warmup, rounds, starts, open_sessions."""

    def __init__(self, folder: Path, args: argparse.Namespace, stack: ExitStack, rivals: Sequence[Rival] = ()) -> None:
        self.args = args
        self._models = folder / "models"
        path = toy_models.write_toy(self._models, "bench", TOY)
        self.manifest = _manifest(path)
        self.frames = toy_models.example_frames(TOY, 512)
        self.alone = Alone(path, self.manifest)
        self.servers = stack.enter_context(Servers(folder, path, self.manifest, self.frames, args.open_sessions, rivals))

    # In rounds

    def rounds(self, variants: Sequence[Variant], report: Report, console: Console) -> None:
        """Every variant once a round, each second round backwards, so that a machine that gets faster or slower favours none; with progress."""
        for number, variant in self._interleaved(sorted(variants, key=lambda one: (one.streams, one.per_message)), console):
            if variant.who in self.servers.known:
                self.servers.dialect(variant.who)  # started now, it does not disturb
            before, began = self._usage(), perf_counter()
            try:
                figure = self.measure(variant, report)
            except LoadError as error:  # the others may do better
                report.failures[variant.name] = str(error)
                continue
            report.add(variant, number, replace(figure, others=self._usage().others_since(before, perf_counter() - began)))

    def _usage(self) -> Usage:
        return Usage.now(os.sched_getaffinity(0), self.servers.process_ids)

    def _interleaved(self, variants: Sequence[Variant], console: Console) -> Iterator[tuple[int, Variant]]:
        columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, auto_refresh=False) as progress:  # no thread that draws while something is measured
            task = progress.add_task("", total=self.args.rounds * len(variants))
            for number in range(self.args.rounds):
                for variant in variants if number % 2 == 0 else reversed(variants):
                    progress.update(task, description=variant.name, refresh=True)
                    yield number, variant
                    progress.advance(task)
            progress.update(task, description="done", refresh=True)

    def measure(self, variant: Variant, report: Report) -> Figure:
        if variant.who == "alone":
            steps = self.alone.measure(self.frames, variant.streams, self.args.seconds, self.args.warmup)
            return Figure(steps.frames_per_s, steps.p50_ms, steps.p99_ms)
        if variant.who == "alone clips":
            steps = self.alone.clips(self.frames, variant.per_message, self.args.seconds, self.args.warmup)
            return Figure(steps.frames_per_s, steps.p50_ms, steps.p99_ms, note=f"batch {steps.batch}")
        group = Group(self.servers.dialect(variant.who), variant.streams, variant.per_message)
        if variant.circumstance == bars.HALF_LOAD:
            return self._at_half_load(group, report)
        if variant.circumstance == bars.CAMERAS:
            return self._beside_a_fast_one(group)
        if variant.circumstance == bars.WITH_LONG:
            return self._beside_long_messages(group)
        return _figure(self._load([group])[0])

    def _load(self, groups: Sequence[Group]) -> list[Result]:
        return run(groups, self.frames, self.args.seconds, warmup=self.args.warmup)

    def _at_half_load(self, group: Group, report: Report) -> Figure:
        """At a fixed pace, half of what the same streams had last time in a closed loop."""
        whole = report.last(Variant("service", group.streams)) or _figure(self._load([group])[0])
        paced = Group(group.dialect, group.streams, depth=32, pace=whole.frames_per_s / 2)
        return _figure(self._load([paced])[0])

    def _beside_a_fast_one(self, group: Group) -> Figure:
        """`share`: what the worst of the slow streams had answered of the frames it sent."""
        pace = SLOW_FPS * group.streams
        slow = Group(group.dialect, group.streams, depth=32, pace=pace)
        found = self._load([slow, Group(group.dialect, 1, depth=FAST_DEPTH)])[0]
        return _figure(found, share=found.least_share * found.frames_per_s / pace)

    def _beside_long_messages(self, group: Group) -> Figure:
        before = self._computed()
        found = self._load([group, Group(group.dialect, 1, bars.CLIP)])[0]
        taken, computed = (now - then for now, then in zip(self._computed(), before, strict=True))
        return _figure(found, padding=computed / taken if computed else None)

    def _computed(self) -> tuple[float, float]:
        """Frames that the service's model has taken so far, and frames it computed with padding, as /metrics has them."""
        with Http(self.servers.program("service").url, "metrics") as wire:
            text = wire.ask("GET", "/metrics").decode()
        labels = 'model="bench"'
        found = {line.partition("{")[0]: float(line.split()[-1]) for line in text.splitlines() if labels in line}
        return found.get("indrnn_frames_total", 0.0), found.get("indrnn_padded_frames_total", 0.0)

    # Once

    def once(self, wanted: Set[str], report: Report) -> None:
        """What is no matter of rounds: starts, memory, equality. Before anything else is started, so that starts have the machine to themselves."""
        if {bars.START, bars.FIRST_START, bars.IDLE_MB} & wanted:
            self._starts(report)
        if bars.DIFFERENCE in wanted:
            self.compare(LOADS, report)

    def crowd(self, wanted: Set[str], report: Report) -> None:
        if bars.SESSION_KB in wanted:
            self.servers.program("crowded")
            report.facts[bars.SESSION_KB] = self.servers.session_bytes / 1024
            report.facts[bars.SESSION_LIMIT_KB] = 2 * 4 * self.manifest.state_width / 1024 + 1

    def _starts(self, report: Report) -> None:
        """From the start of the process until `/health/ready` says 200: the first time, and the median of those after."""
        took, memory = [], []
        for _ in range(1 + self.args.starts):
            began = perf_counter()
            with programs.service(self._models) as program:
                with Http(program.url, "start") as wire:
                    wire.ask("GET", "/health/ready")
                took.append(perf_counter() - began)
                memory.append(program.memory() / 2**20)
        report.facts |= {bars.FIRST_START: took[0], bars.START: median(took[1:]), bars.IDLE_MB: median(memory)}

    def compare(self, loads: Sequence[tuple[str, int, int]], report: Report) -> None:
        """How far scores of streams served together are from onnxruntime's for each alone, frame by frame, for (who, streams, frames in a message)."""
        found = report.facts
        found |= {bars.DIFFERENCE: 0.0, "same bits": 1.0, "answers compared": 0}
        for who, streams, per_message in loads:
            try:
                pairs = self._pairs(Group(self.servers.dialect(who), streams, per_message))
            except LoadError as error:
                report.failures[f"{FAILED}{who}"] = str(error)
                continue
            for want, got in pairs:
                found[bars.DIFFERENCE] = max(found[bars.DIFFERENCE], float(np.abs(want - got).max()))
                found["same bits"] *= np.array_equal(want, got)
                found["answers compared"] += 1
        if any(name.startswith(FAILED) for name in report.failures):
            del found[bars.DIFFERENCE]  # it is not known for all

    def _pairs(self, group: Group) -> list[tuple[toy_models.Floats, toy_models.Floats]]:
        """Scores as they should be and as they came, of the first messages of each stream."""
        dialect, pairs = group.dialect, list[tuple[toy_models.Floats, toy_models.Floats]]()
        chunks = messages(self.frames, group.per_message)
        for index, recorded in enumerate(run([group], self.frames, 0.1, warmup=0.05, record=CHECKED)[0].recorded):
            sent = [chunks[(index + place) % len(chunks)] for place in range(len(recorded))]
            got = [dialect.scores(answer, dialect.opening + number * group.per_message) for number, answer in enumerate(recorded, 1)]
            pairs += zip(self._expected(dialect.opening, dialect.stateless, sent), got, strict=True)
        return pairs

    def _expected(self, opening: int, stateless: bool, sent: Sequence[toy_models.Floats]) -> list[toy_models.Floats]:
        if stateless:
            return [self.alone.stream([clip])[0] for clip in sent]
        return self.alone.stream([*[self.frames[:1]] * opening, *sent])[opening:]


def _figure(found: Result, *, share: float | None = None, padding: float | None = None) -> Figure:
    return Figure(found.frames_per_s, found.p50_ms, found.p99_ms, found.client_us, share, padding)


def _manifest(path: Path) -> Manifest:
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    return Manifest.from_json(properties[MANIFEST_KEY])
