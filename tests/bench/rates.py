"""The same streams at other frame rates, through the running service: at half and twice the model's rate, and from a camera that keeps none.

python -m tests.bench.rates --data ui-prmd-kinect-xyz.npz [--streams 40] [--actions 50] [--model rehab-exercises] [--models DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as `python tests/bench/rates.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from model.contract import ManifestError
from service.client import AsyncClient, ClientError, Event
from service.errors import ServiceError
from tests.bench.figures import conditions
from tests.bench.held_out import BenchError, Frames, HeldOut, Served, described, figures, found, options, prepare
from tests.server_process import running
from training.config import ConfigError
from training.datasets.clips import DataError
from training.datasets.recordings import Segments
from training.stream_figures import Scores, f1, match
from training.streams import Stream

Times = npt.NDArray[np.float64]

MESSAGE = 16  # frames
TOGETHER = 8  # streams at once
JITTER = 0.4  # of a frame, either way: as late or early as a frame may be without overtaking the next
CLOCK = 1.7e9  # the jittery camera's, seconds
MOST_POINTS = 3.0  # below the model's own rate

Progressed = Callable[[float], None]


@dataclass(frozen=True)
class Rate:
    """A way of taking frames: `ratio` times the model's rate, or, with `jitter`, at times that frames must carry."""

    name: str
    ratio: float = 1.0
    jitter: float = 0.0

    def places(self, frames: int, rng: np.random.Generator) -> Times:
        """When its frames are taken (count,), in frames of a stream that has so many."""
        regular = np.arange(math.floor((frames - 1) * self.ratio) + 1) / self.ratio
        if not self.jitter:
            return regular
        return np.clip(regular + rng.uniform(-self.jitter, self.jitter, len(regular)), 0, frames - 1)


OWN = Rate("its own rate")
RATES = (OWN, Rate("half", 0.5), Rate("twice", 2.0), Rate("jittered, with t", 1.0, JITTER))


@dataclass(frozen=True)
class Sampled:
    """A stream as one camera sees it: frames, the place of each in the original stream (count,), and the actions in its own frames."""

    frames: Frames
    places: Times
    segments: Segments


def sample(stream: Stream, rate: Rate, rng: np.random.Generator) -> Sampled:
    """What a camera of this rate sees of a stream: between two frames, the straight line from one to the other."""
    places = rate.places(len(stream.frames), rng)
    segments = stream.segments.copy()
    segments[:, :2] = np.searchsorted(places, segments[:, :2])  # the first frame at or after the action's start, and after its end
    return Sampled(_between(stream.frames, places), places, segments)


def _between(frames: Frames, places: Times) -> Frames:
    before = np.floor(places).astype(np.int64)
    after = np.minimum(before + 1, len(frames) - 1)
    share = (places - before).astype(np.float32).reshape(-1, *[1] * (frames.ndim - 1))
    mixed: Frames = frames[before] + (frames[after] - frames[before]) * share
    nearer = np.where(share < 0.5, frames[before], frames[after])
    return np.where(np.isnan(mixed), nearer, mixed).astype(np.float32)


@dataclass(frozen=True)
class Result:
    """How right the service was at one rate; shares of 1. `f1` and `seconds_late` are of events, NaN for models without."""

    frames: float
    actions: float
    f1: float
    seconds_late: float


@dataclass(frozen=True)
class Report:
    """Everything that was measured."""

    conditions: dict[str, Any]
    results: dict[str, Result]

    def missed(self) -> list[str]:
        """A sentence for each figure that is too far below that at the model's own rate."""
        own, sentences = self.results[OWN.name], []
        for name, result in self.results.items():
            for what in ("frames", "actions"):
                points = 100 * (getattr(own, what) - getattr(result, what))
                if points > MOST_POINTS:
                    sentences.append(f"{name}: right {what} are {points:.1f} points below those at the model's own rate, at most {MOST_POINTS:g} are allowed")
        return sentences

    def to_dict(self) -> dict[str, Any]:
        results = {name: {what: None if value != value else value for what, value in vars(result).items()} for name, result in self.results.items()}
        return {"conditions": self.conditions, "results": results, "missed": self.missed()}


async def play(client: AsyncClient, served: Served, fps: float, rate: Rate, sampled: Sampled, watch: Progressed) -> tuple[Scores, list[Event]]:
    """One stream through one session: scores (count, classes) and events."""
    scores, events = np.full((len(sampled.frames), len(served.manifest.classes)), np.nan, np.float32), list[Event]()
    times = CLOCK + sampled.places / fps if rate.jitter else None
    async with client.stream(served.name, version=served.version, fps=fps * rate.ratio) as session:
        async for answer in session.play(sampled.frames, chunk=MESSAGE, t=times):
            assert answer.scores is not None  # asked for
            scores[answer.frame] = answer.scores
            events.extend(answer.events)
            if answer.frame % MESSAGE == MESSAGE - 1:
                watch(MESSAGE)
    return scores, events


async def measure(url: str, served: Served, held: HeldOut, rate: Rate, streams: Sequence[Sampled], watch: Progressed) -> Result:
    """All streams at one rate, several at once."""
    places = asyncio.Semaphore(TOGETHER)
    async with AsyncClient(url) as client:

        async def one(sampled: Sampled) -> tuple[Scores, list[Event]]:
            async with places:
                return await play(client, served, held.fps, rate, sampled, watch)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(sampled)) for sampled in streams]
    scores, events = zip(*(task.result() for task in tasks), strict=True)
    measured = figures(served.manifest, scores, [sampled.segments for sampled in streams])
    late = score = math.nan
    if served.manifest.events is not None:
        classes = served.manifest.classes
        pairs = [match(one.segments, found(told, classes, len(one.frames))) for one, told in zip(streams, events, strict=True)]
        delays = np.concatenate([pair.delays for pair in pairs])
        score, late = f1(pairs), float(delays.mean() / (held.fps * rate.ratio)) if len(delays) else math.nan
    return Result(measured.frames, measured.actions, score, late)


def run(args: argparse.Namespace, console: Console) -> Report:
    served, held = prepare(args)
    streams = [held.finite(number, args.actions, args.seed) for number in range(args.streams)]
    known = conditions(list(range(os.cpu_count() or 1)), **described(served, held, fps=held.fps, streams=args.streams, actions=args.actions, seed=args.seed))
    results: dict[str, Result] = {}
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(*columns, console=console) as progress,
        running(args.models.resolve(), Path(folder) / "log") as server,
    ):
        for rate in RATES:
            seen = [sample(stream, rate, np.random.default_rng((args.seed, number))) for number, stream in enumerate(streams)]
            total = sum(len(sampled.frames) for sampled in seen)
            task = progress.add_task(rate.name, total=total)
            results[rate.name] = _all(server.url, served, held, rate, seen, partial(progress.advance, task))
            progress.update(task, completed=total)
    return Report(known, results)


def _all(url: str, served: Served, held: HeldOut, rate: Rate, streams: Sequence[Sampled], watch: Progressed) -> Result:
    try:
        return asyncio.run(measure(url, served, held, rate, streams, watch))
    except BaseExceptionGroup as group:  # several at once were refused; what one says is enough
        raise group.exceptions[0] from None


def table(report: Report, fps: float) -> Table:
    """Rates and figures, as Markdown."""
    shown = Table("frames a second", box=box.MARKDOWN)
    for column in ("right frames %", "right actions %", "points below, frames", "points below, actions", "events F1", "start known after s"):
        shown.add_column(column, justify="right")
    own = report.results[OWN.name]
    for rate in RATES:
        result = report.results[rate.name]
        below = [100 * (own.frames - result.frames), 100 * (own.actions - result.actions)]
        name = f"{fps * rate.ratio:g}, {rate.name}"
        cells = [f"{100 * result.frames:.2f}", f"{100 * result.actions:.2f}", *("" if rate is OWN else f"{round(points, 2) + 0.0:+.2f}" for points in below)]
        shown.add_row(name, *cells, *("-" if math.isnan(value) else f"{value:.3f}" for value in (result.f1, result.seconds_late)))
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.rates", description=(__doc__ or "").splitlines()[0])
    options(parser)
    parser.add_argument("--streams", type=int, default=40, help="each is sent at every rate (default 40)")
    parser.add_argument("--actions", type=int, default=50, help="in each of them (default 50)")
    args = parser.parse_args()
    if args.streams < 1 or args.actions < 1:
        parser.error("--streams and --actions must be at least 1")
    return args


def main() -> int:
    args, console = arguments(), Console(width=max(Console().width, 150))
    try:
        report = run(args, Console(stderr=True))
    except (BenchError, ConfigError, DataError, ManifestError, ClientError, ServiceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: nothing is concluded from part of the streams", file=sys.stderr)
        return 130
    console.print(table(report, report.conditions["fps"]), end="")
    console.print(", ".join(f"{name} {value}" for name, value in report.conditions.items()))
    if args.json:
        args.json.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    for sentence in report.missed():
        print(f"MISSED: {sentence}", file=sys.stderr)
    return 1 if report.missed() else 0


if __name__ == "__main__":
    sys.exit(main())
