"""One session of the running service that never ends: finite scores, a state that stays bounded, flat memory, and as right at the end as at the start.

python -m tests.bench.endless --data ui-prmd-kinect-xyz.npz [--frames 1000000] [--model rehab-exercises] [--models DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as `python tests/bench/endless.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import numpy.typing as npt
import onnxruntime
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from model.contract import ManifestError
from service.client import AsyncClient, ClientError, Event
from service.errors import ServiceError
from tests.bench.figures import conditions
from tests.bench.held_out import BenchError, Frames, HeldOut, Served, chunks, described, figures, found, options, prepare
from tests.server_process import running
from training.config import ConfigError
from training.datasets.clips import DataError
from training.datasets.recordings import Segments
from training.stream_figures import Scores, f1, match

MESSAGE = 64  # frames
ENDS = 50  # actions at each end that are held against each other
SAMPLES = 200  # of memory
WARM_UP = 0.1  # share of the frames after which memory may grow no more
MOST_GROWTH_MB = 4.0
CHANCE = 0.01  # how seldom luck alone may make the last actions look that much worse; low, as wrong actions come in series
MOST_STATE = 2.0  # times the largest state of the first tenth

Watch = Callable[[int], None]


@dataclass
class Memory:
    """Resident memory of a process, sampled as frames go by."""

    process: int
    frames: list[int] = field(default_factory=list)
    mb: list[float] = field(default_factory=list)

    def sample(self, frame: int) -> None:
        self.frames.append(frame)
        self.mb.append(resident_mb(self.process))

    def slope(self) -> float:
        """MB for 100 000 frames after the warm-up, a straight line through the samples; NaN where there are too few."""
        frames, mb = self._after_warm_up()
        return float(np.polyfit(frames, mb, 1)[0] * 1e5) if len(frames) >= 3 else math.nan

    def growth(self) -> float:
        """MB from the end of the warm-up to the last sample, along that line."""
        frames, _ = self._after_warm_up()
        return self.slope() * (frames[-1] - frames[0]) / 1e5 if len(frames) >= 3 else math.nan

    def _after_warm_up(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        frames, mb = np.array(self.frames, np.float64), np.array(self.mb)
        late = frames >= WARM_UP * frames[-1] if len(frames) else np.zeros(0, bool)
        return frames[late], mb[late]


def resident_mb(process: int) -> float:
    """What the kernel says; raises `BenchError` where there is no such table."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 1024
    except (OSError, StopIteration):
        raise BenchError(f"the memory of process {process} cannot be read: it has ended, or this system has no /proc (Linux has)") from None


class Source:
    """The stream, made as it is sent, and made again for whoever wants it a second time."""

    def __init__(self, held: HeldOut, frames: int, seed: int) -> None:
        self.held, self.frames, self.seed = held, frames, seed

    def messages(self) -> Iterator[Frames]:
        return chunks((piece.frames for piece in self.held.endless(self.frames, self.seed)), MESSAGE)

    def actions(self) -> Iterator[Segments]:
        """Those that are whole, one after another, each (1, 3): first frame, end, label."""
        start = 0
        for piece in self.held.endless(self.frames, self.seed):
            if len(piece.segments):
                yield piece.segments + np.array([start, start, 0])
            start += len(piece.frames)


@dataclass
class Streamed:
    """What the service said to the stream, and how it fared."""

    scores: Scores  # (frames, classes)
    memory: Memory
    events: list[Event] = field(default_factory=list)
    seconds: float = 0.0
    reconnects: int = 0


@dataclass(frozen=True)
class Beside:
    """The same file in onnxruntime on the same frames: largest magnitude of its state in each message, and how far its scores were from the service's."""

    state: npt.NDArray[np.float64]
    difference: float

    def first(self) -> float:
        return float(self.state[: _tenth(len(self.state))].max())

    def last(self) -> float:
        return float(self.state[-_tenth(len(self.state)) :].max())


async def stream(url: str, process: int, served: Served, source: Source, watch: Watch) -> Streamed:
    """Sends everything through one session, in messages of 64 frames; answers are binary and for every frame."""
    result = Streamed(np.full((source.frames, len(served.manifest.classes)), np.nan, np.float32), Memory(process))
    every = max(1, source.frames // SAMPLES)
    async with AsyncClient(url) as client, client.stream(served.name, version=served.version, fps=source.held.fps) as session:
        began = time.perf_counter()
        async for answer in session.play(source.messages()):
            assert answer.scores is not None  # asked for
            result.scores[answer.frame] = answer.scores
            result.events.extend(answer.events)
            if answer.frame % every == 0:
                result.memory.sample(answer.frame)
            if answer.frame % MESSAGE == MESSAGE - 1:
                watch(answer.frame + 1)
        result.seconds = time.perf_counter() - began
        result.memory.sample(source.frames)
        result.reconnects = session.reconnects
    return result


def run_beside(served: Served, source: Source, scores: Scores, watch: Watch) -> Beside:
    """The file without a service, from the zero state on: no call tells the state of a session, and it is the same file."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(served.path), settings, providers=["CPUExecutionProvider"])
    state = np.zeros((1, served.manifest.state_width), np.float32)
    largest, difference, frame = [], 0.0, 0
    for message in source.messages():
        feed = {"frames": message[None], "lengths": np.array([len(message)]), "state": state}
        own, state = session.run(["scores", "next_state"], feed)
        largest.append(float(np.abs(state).max()))
        difference = max(difference, float(np.abs(own[0] - scores[frame : frame + len(message)]).max()))
        frame += len(message)
        watch(frame)
    return Beside(np.array(largest), difference)


@dataclass(frozen=True)
class Report:
    """Everything that was measured. `right` (actions,) is whether each was recognised, in their order."""

    conditions: dict[str, Any]
    streamed: Streamed
    beside: Beside
    right: npt.NDArray[np.bool_]
    right_frames: float
    detected: dict[str, float]  # of models with rules for events

    @property
    def ends(self) -> int:
        return min(ENDS, len(self.right) // 2)

    def first_right(self) -> int:
        return int(self.right[: self.ends].sum())

    def last_right(self) -> int:
        return int(self.right[len(self.right) - self.ends :].sum())

    def tenths(self) -> list[float]:
        return [float(part.mean()) for part in np.array_split(self.right, 10) if len(part)]

    def finite(self) -> bool:
        return bool(np.isfinite(self.streamed.scores).all())

    def missed(self) -> list[str]:
        """A sentence for each bar that is not met."""
        return [sentence for holds, sentence in self._bars() if not holds]

    def _bars(self) -> list[tuple[bool, str]]:
        memory, beside, luck = self.streamed.memory, self.beside, chance(self.first_right(), self.last_right(), self.ends)
        yet_finite = np.isfinite(self.streamed.scores).all(1)
        return [
            (self.finite(), f"scores are not finite from frame {int(np.argmin(yet_finite))} on"),
            (
                bool(np.isfinite(beside.state).all()) and beside.last() <= MOST_STATE * beside.first(),
                f"the state is not bounded: at most {beside.first():.3g} in the first tenth of the frames, {beside.last():.3g} in the last",
            ),
            (
                math.isnan(memory.growth()) or memory.growth() <= MOST_GROWTH_MB,
                f"memory of the service grows by {memory.growth():.1f} MB after the first tenth of the frames, at most {MOST_GROWTH_MB:g} are allowed",
            ),
            (
                luck >= CHANCE,
                f"the last {self.ends} actions are recognised less often than the first: {self.last_right()} against {self.first_right()}, "
                f"which luck explains in {100 * luck:.2g} % of cases",
            ),
        ]

    def to_dict(self) -> dict[str, Any]:
        memory = self.streamed.memory
        return {
            "conditions": self.conditions,
            "frames": len(self.streamed.scores),
            "frames_per_s": len(self.streamed.scores) / self.streamed.seconds,
            "finite": self.finite(),
            "state": {"first_tenth": self.beside.first(), "last_tenth": self.beside.last(), "largest": float(self.beside.state.max())},
            "difference": self.beside.difference,
            "memory": {"frames": memory.frames, "mb": memory.mb, "mb_per_100000_frames": memory.slope()},
            "actions": {"count": len(self.right), "ends": self.ends, "first": self.first_right(), "last": self.last_right(), "all": float(self.right.mean())},
            "tenths": self.tenths(),
            "right_frames": self.right_frames,
            "events": self.detected,
            "reconnects": self.streamed.reconnects,
            "missed": self.missed(),
        }


def chance(first: int, last: int, count: int) -> float:
    """How probable it is that the last `count` actions have at most `last` right ones, if all right ones were spread by luck (Fisher's exact test)."""
    right = first + last
    ways = math.comb(2 * count, right)
    return sum(math.comb(count, k) * math.comb(count, right - k) for k in range(max(0, right - count), last + 1)) / ways


def run(args: argparse.Namespace, console: Console) -> Report:
    served, held = prepare(args)
    source = Source(held, args.frames, args.seed)
    if len(list(itertools.islice(source.actions(), 2))) < 2:
        raise BenchError(f"{args.frames} frames hold no two whole actions: ask for more, a first and a last one are needed")
    known = conditions(list(range(os.cpu_count() or 1)), **described(served, held, frames=args.frames, seed=args.seed))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        task = progress.add_task("the running service", total=args.frames)
        with running(args.models.resolve(), Path(folder) / "log") as server:
            streamed = asyncio.run(stream(server.url, server.process.pid, served, source, lambda frame: progress.update(task, completed=frame)))
        progress.update(task, completed=args.frames)
        task = progress.add_task("onnxruntime alone  ", total=args.frames)
        beside = run_beside(served, source, streamed.scores, lambda frame: progress.update(task, completed=frame))
    segments = np.concatenate(list(source.actions()))
    measured = figures(served.manifest, [streamed.scores], [segments])
    detected: dict[str, float] = {}
    if served.manifest.events is not None:
        pairs = match(segments, found(streamed.events, served.manifest.classes, args.frames))
        detected = {"found": pairs.found, "f1": f1([pairs]), "delay": float(pairs.delays.mean()) if len(pairs.delays) else math.nan}
    return Report(known, streamed, beside, measured.by_position.astype(bool), measured.frames, detected)


def table(report: Report) -> Table:
    """Measure and figure, as Markdown."""
    memory, ends = report.streamed.memory, report.ends
    rows = [
        ("frames, without a reset", f"{len(report.streamed.scores):,}".replace(",", " ")),
        ("actions in them", f"{len(report.right):,}".replace(",", " ")),
        ("all scores finite", "yes" if report.finite() else "NO"),
        ("largest state, first and last tenth", f"{report.beside.first():.3f}, {report.beside.last():.3f}"),
        ("scores beside onnxruntime alone", "same bits" if report.beside.difference == 0 else f"differ by at most {report.beside.difference:.2g}"),
        ("memory of the service, first and last", f"{memory.mb[0]:.1f}, {memory.mb[-1]:.1f} MB"),
        ("memory, slope after the first tenth", f"{memory.slope():+.3f} MB for 100 000 frames"),
        (f"right actions of the first and last {ends}", f"{100 * report.first_right() / ends:.0f} %, {100 * report.last_right() / ends:.0f} %"),
        ("right actions, all", f"{100 * report.right.mean():.2f} %"),
        ("right actions, tenth by tenth", ", ".join(f"{100 * share:.1f}" for share in report.tenths()) + " %"),
        ("right frames inside actions", f"{100 * report.right_frames:.2f} %"),
        ("frames a second, this program's work included", f"{len(report.streamed.scores) / report.streamed.seconds:,.0f}".replace(",", " ")),
        ("connections that were lost", str(report.streamed.reconnects)),
    ]
    if report.detected:
        events = f"{report.detected['found']:,.0f}, F1 {report.detected['f1']:.3f}, known after {report.detected['delay']:.1f} frames".replace(",", " ", 1)
        rows.append(("events that started", events))
    shown = Table("measure", "", box=box.MARKDOWN)
    for row in rows:
        shown.add_row(*row)
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.endless", description=(__doc__ or "").splitlines()[0])
    options(parser)
    parser.add_argument("--frames", type=int, default=1_000_000, help="in one session (default 1000000)")
    args = parser.parse_args()
    if args.frames < 1:
        parser.error("--frames must be at least 1")
    return args


def main() -> int:
    args, console = arguments(), Console(width=max(Console().width, 120))
    try:
        report = run(args, Console(stderr=True))
    except (BenchError, ConfigError, DataError, ManifestError, ClientError, ServiceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: nothing is concluded from part of a stream", file=sys.stderr)
        return 130
    console.print(table(report), end="")
    console.print(", ".join(f"{name} {value}" for name, value in report.conditions.items()))
    if args.json:
        args.json.write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    for sentence in report.missed():
        print(f"MISSED: {sentence}", file=sys.stderr)
    return 1 if report.missed() else 0


def _tenth(count: int) -> int:
    return max(1, count // 10)


if __name__ == "__main__":
    sys.exit(main())
