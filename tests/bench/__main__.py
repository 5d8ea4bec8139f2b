"""The benchmark: our service beside onnxruntime alone and a websocket echo on the same uvicorn, interleaved in one run on two cores.

python -m tests.bench [--rounds 3] [--seconds 3] [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as `python tests/bench`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import onnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from model.contract import MANIFEST_KEY, Manifest
from tests import toy_models
from tests.bench import programs
from tests.bench.alone import Alone
from tests.bench.dialects import Streaming
from tests.bench.figures import Figure, Report, Variant, conditions
from tests.bench.load import Group, LoadError, Result, messages
from tests.bench.load import run as run_load

STREAMS = (1, 16, 64)
CORES = 2
CHECKED = 8  # messages of each stream whose scores are compared with onnxruntime's
VARIANTS = (
    *(Variant(who, streams) for streams in STREAMS for who in ("alone", "echo", "service")),
    Variant("echo", 64, 8),
    Variant("service", 64, 8),
)


class Bench:
    """One run: a model, its frames, onnxruntime, and the addresses of what serves."""

    def __init__(self, folder: Path, toy: toy_models.Toy, args: argparse.Namespace) -> None:
        self.args = args
        self.models = folder / "models"
        path = toy_models.write_toy(self.models, "bench", toy)
        self.manifest = _manifest(path)
        self.frames = toy_models.example_frames(toy, 512)
        self.alone = Alone(path, self.manifest)
        self.urls: dict[str, str] = {}

    def measure(self, variant: Variant) -> Figure:
        if variant.who == "alone":
            steps = self.alone.measure(self.frames, variant.streams, self.args.seconds, self.args.warmup)
            return Figure(steps.frames_per_s, steps.p50_ms, steps.p99_ms)
        result = self._load(variant, self.args.seconds)
        return Figure(result.frames_per_s, result.p50_ms, result.p99_ms, result.client_us)

    def _load(self, variant: Variant, seconds: float, record: int = 0) -> Result:
        group = Group(self._dialect(variant.who), variant.streams, variant.per_message)
        return run_load([group], self.frames, seconds, warmup=self.args.warmup, record=record)[0]

    def _dialect(self, who: str) -> Streaming:
        return Streaming(self.urls[who], len(self.manifest.classes), bare=who == "echo")

    def equality(self) -> dict[str, Any]:
        """How far the scores of streams served together are from onnxruntime's for each alone, frame by frame."""
        largest, same, answers = 0.0, True, 0
        for variant in (Variant("service", 64), Variant("service", 64, 8)):
            chunks, dialect = messages(self.frames, variant.per_message), self._dialect("service")
            for index, recorded in enumerate(self._load(variant, 0.1, CHECKED).recorded):
                expected = self.alone.stream([chunks[(index + i) % len(chunks)] for i in range(len(recorded))])
                for number, (want, answer) in enumerate(zip(expected, recorded, strict=True), 1):
                    got = dialect.scores(answer, number * variant.per_message)
                    largest, same, answers = max(largest, float(np.abs(want - got).max())), same and np.array_equal(want, got), answers + 1
        return {"answers": answers, "largest_difference": largest, "same_bits": same}


def run(args: argparse.Namespace, console: Console) -> Report:
    cores = programs.pin(CORES)
    with ExitStack() as stack:
        bench = Bench(Path(stack.enter_context(tempfile.TemporaryDirectory())), toy_models.WIDE, args)
        bench.urls["service"] = stack.enter_context(programs.service(bench.models))
        bench.urls["echo"] = stack.enter_context(programs.echo(4 * len(bench.manifest.classes)))
        model = f"{toy_models.WIDE.layers} x {toy_models.WIDE.units}, {toy_models.WIDE.shape[0]} inputs, {len(toy_models.WIDE.classes)} classes"
        report = Report(conditions(cores, model=model, rounds=args.rounds, seconds=args.seconds))
        report.equality = bench.equality()
        for variant in _interleaved(args.rounds, console):
            report.add(variant, bench.measure(variant))
    return report


def _interleaved(rounds: int, console: Console) -> Iterator[Variant]:
    """Every variant once a round, each second round backwards, so that a machine that gets faster or slower favours none; with progress."""
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False) as progress:  # no thread that draws while something is measured
        task = progress.add_task("", total=rounds * len(VARIANTS))
        for number in range(rounds):
            for variant in VARIANTS if number % 2 == 0 else reversed(VARIANTS):
                progress.update(task, description=variant.name, refresh=True)
                yield variant
                progress.advance(task)
        progress.update(task, description="done", refresh=True)


def _manifest(path: Path) -> Manifest:
    properties = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    return Manifest.from_json(properties[MANIFEST_KEY])


def show(report: Report, console: Console) -> None:
    console.print(report.absolute_table(), report.ratio_table())
    same = "same bits" if report.equality["same_bits"] else f"largest difference {report.equality['largest_difference']:.2g}"
    console.print(f"scores of {report.equality['answers']} answers against onnxruntime alone: {same}")
    console.print(", ".join(f"{name} {value}" for name, value in report.conditions.items()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="medians are over these (default 3)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for one variant in one round (default 3)")
    parser.add_argument("--warmup", type=float, default=0.5, help="seconds before each")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    parser.add_argument("--quick", action="store_true", help="one round of moments: shows that it works, its figures mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds, args.warmup = 1, 0.1, 0.05
    return args


def main() -> None:
    args, console = arguments(), Console()
    try:
        report = run(args, console)
    except LoadError as error:
        sys.exit(f"bench: {error}")
    show(report, console)
    if args.json:
        args.json.write_text(json.dumps(report.to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    main()
