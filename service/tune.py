"""`python -m service tune`: which threads and batches suit a model on this machine, measured; a table, and the settings."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from model.contract import MODEL_FILE
from service.catalog import Catalog
from service.engine import DeviceChoice, Engine, default_threads, usable_cores
from service.errors import ModelNotFound, StartupError
from service.model_files import Entry, Failure, ModelFiles
from service.settings import PREFIX, Settings

LEAST_S = 0.01  # of runs that are timed together: one short run is as long as the clock's and the scheduler's whims
REAL = 0.05  # share by which something must be better to be worth a setting

Cell = tuple[int, int]  # threads, streams in a run


@dataclass
class Timings:
    """Seconds of one run, by threads and streams, as often as they were measured; rounds over all cells, one after another."""

    seconds: dict[Cell, list[float]] = field(default_factory=dict)

    def add(self, cell: Cell, seconds: float) -> None:
        self.seconds.setdefault(cell, []).append(seconds)

    def __contains__(self, cell: Cell) -> bool:
        return cell in self.seconds

    def run_s(self, cell: Cell) -> float:
        return statistics.median(self.seconds[cell])

    def frames_per_s(self, cell: Cell) -> float:
        return cell[1] / self.run_s(cell)

    def doubt(self, cell: Cell) -> float:
        """By what share the median may be off: two standard errors of a median, from how far the middle half of the measurements lies apart."""
        values = self.seconds[cell]
        if len(values) < 3:
            return 1.0
        low, _, high = statistics.quantiles(values, n=4)
        return 2 * 0.93 * (high - low) / math.sqrt(len(values)) / self.run_s(cell)

    @property
    def threads(self) -> list[int]:
        return sorted({threads for threads, _ in self.seconds})

    @property
    def batches(self) -> list[int]:
        return sorted({batch for _, batch in self.seconds})


@dataclass(frozen=True)
class Choice:
    """The settings, and why these."""

    threads: int
    max_batch: int
    reason: str

    def settings(self) -> dict[str, str]:
        return {PREFIX + "THREADS": str(self.threads), PREFIX + "MAX_BATCH": str(self.max_batch)}


def choose(timings: Timings, cores: int, default: Cell) -> Choice:
    """The defaults, unless something measured is better by more than `REAL` and than the measurements leave in doubt.

    Among what is about as fast the fewest threads and the smallest batch are taken. One core is left to the event loop where there are
    several: it works at the same time. Raises `ValueError` where the defaults were not measured.
    """
    if default not in timings:
        raise ValueError(f"{default[0]} threads with {default[1]} streams were not measured")
    fit = [cell for cell in timings.seconds if cell[0] <= max(1, cores - 1, default[0])]
    most = max(map(timings.frames_per_s, fit))
    best = min(cell for cell in fit if timings.frames_per_s(cell) >= (1 - REAL) * most)
    usual = timings.frames_per_s(default)
    gain, doubt = timings.frames_per_s(best) / usual - 1, math.hypot(timings.doubt(best), timings.doubt(default))
    spoken = f"{_threads(default[0])} and at most {default[1]} streams in a run"
    if gain <= max(REAL, doubt):
        said = f"no real difference: the defaults, {spoken}, give {usual:,.0f} frames/s; the most that was measured is {most:,.0f}"
        return Choice(*default, f"{said}, with a doubt of {doubt:.0%}{_left_out(timings, fit, most)}")
    given = f"{_threads(best[0])} and at most {best[1]} streams in a run give {timings.frames_per_s(best):,.0f} frames/s"
    return Choice(*best, f"{given}, {gain:.0%} more than the defaults, {spoken}, with a doubt of {doubt:.0%}{_left_out(timings, fit, most)}")


def _left_out(timings: Timings, fit: Sequence[Cell], most: float) -> str:
    others = [cell for cell in timings.seconds if cell not in fit]
    if not others:
        return ""
    fastest = max(others, key=timings.frames_per_s)
    if timings.frames_per_s(fastest) <= (1 + REAL) * most:
        return ""
    return f". With {_threads(fastest[0])} it is {timings.frames_per_s(fastest) / most - 1:.0%} faster alone, but they leave no core to the event loop"


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def thread_counts(cores: int) -> list[int]:
    """Powers of two up to the cores, the cores themselves, and what the service takes unless it is told."""
    return sorted({count for count in (1, 2, 4, 8, 16, 32, cores, default_threads()) if count <= cores})


class Bench:
    """One model, loaded once for each number of threads."""

    def __init__(self, engines: dict[int, Engine]) -> None:
        self._engines = engines
        manifest = next(iter(engines.values())).manifest
        self._shape = manifest.frame_shape
        self._width = manifest.state_width
        self._random = np.random.default_rng(0)

    @classmethod
    def load(cls, entry: Entry, device: DeviceChoice, counts: Sequence[int]) -> Bench:
        """`entry` gives the file; its own engine is not used. On a GPU threads make no difference, one count is enough."""
        return cls({count: Engine.load(entry.place.folder / MODEL_FILE, device, count) for count in counts})

    def measure(self, timings: Timings, batches: Sequence[int], rounds: int, progress: Callable[[int, int], None]) -> None:
        """Every cell once a round, in ever another order, so that what else the machine does falls on all alike; first all once, to warm up."""
        cells = [(threads, batch) for threads in self._engines for batch in batches]
        order = random.Random(0)
        for cell in cells:
            self._timed(cell, 0.0)
        for number in range(rounds):
            order.shuffle(cells)
            for cell in cells:
                timings.add(cell, self._timed(cell, LEAST_S))
            progress(number + 1, rounds)

    def _timed(self, cell: Cell, least_s: float) -> float:
        """Seconds of one run: one frame of each stream, states going on from run to run as they do at work."""
        threads, batch = cell
        run = self._engines[threads].run_batch
        frames = self._random.normal(0, 0.5, (batch, 1, *self._shape)).astype(np.float32)
        lengths, state = np.ones(batch, np.int64), np.zeros((batch, self._width), np.float32)
        _, state = run(frames, lengths, state)
        runs, began = 0, time.perf_counter()
        while True:
            _, state = run(frames, lengths, state)
            runs += 1
            spent = time.perf_counter() - began
            if spent >= least_s and (runs > 1 or not least_s):
                return spent / runs


def find(directories: Sequence[Path], name: str, version: str | None, device: DeviceChoice) -> Entry:
    """The model as the service would serve it; raises `StartupError` where there is none."""
    files = ModelFiles(tuple(directories), device, None)
    look = files.look()
    loaded = [files.read(key, place) for key, place in look.of(name).items()]
    entries = [one for one in loaded if isinstance(one, Entry)]
    failures = [*(failure for failure in look.wrong() if failure.name == name), *(one for one in loaded if isinstance(one, Failure))]
    try:
        return Catalog(files, look, entries, failures).find(name, version)
    except ModelNotFound as error:
        there = sorted({known for known, _ in look.places})
        raise StartupError(f"{error.message}; there {'are' if len(there) != 1 else 'is'} {', '.join(there) or 'none'}") from None


def table(timings: Timings) -> str:
    """A row for each number of streams: milliseconds of a run and frames a second, for each number of threads."""
    titles = "".join(f"{_threads(threads):>26}" for threads in timings.threads)
    lines = [f"{'':>7}{titles}", f"{'streams':>7}" + f"{'ms a run':>13}{'frames/s':>13}" * len(timings.threads)]
    for batch in timings.batches:
        cells = [(threads, batch) for threads in timings.threads]
        shown = [f"{1000 * timings.run_s(cell):>13.3f}{timings.frames_per_s(cell):>13,.0f}" if cell in timings else f"{'-':>13}{'-':>13}" for cell in cells]
        lines.append(f"{batch:>7}" + "".join(shown))
    return "\n".join(lines)


def write(path: Path, settings: dict[str, str]) -> None:
    """Puts settings into a file of variables; what else it holds stays. Raises `StartupError` where it cannot be written."""
    try:
        before = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in before if line.partition("=")[0].strip().removeprefix("export ") not in settings]
        path.write_text("\n".join([*kept, *(f"{name}={value}" for name, value in settings.items())]) + "\n")
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error.strerror}") from None


def run(directories: Sequence[Path], settings: Settings, name: str, version: str | None, *, batches: Sequence[int], rounds: int, to: Path | None) -> int:
    """Measures, prints and writes; Ctrl-C prints what is known. Returns the exit status; raises `StartupError`."""
    entry = find(directories, name, version, settings.device)
    device, cores = entry.engine.device, usable_cores()
    default = (default_threads(), Settings.model_fields["max_batch"].default)
    counts = thread_counts(cores) if device.name == "cpu" else [default[0]]
    batches = sorted({*batches, default[1]})
    print(
        f"{entry.name} {entry.version} on {device.name}, {cores} cores for this process: {rounds} rounds of {len(counts) * len(batches)} measurements",
        flush=True,
    )
    bench, timings, whole = Bench.load(entry, settings.device, counts), Timings(), False
    with _progress() as progress, contextlib.suppress(KeyboardInterrupt):
        bench.measure(timings, batches, rounds, progress)
        whole = True
    if not timings.seconds:
        print("stopped before anything was measured", file=sys.stderr)
        return 130
    print(f"\n{table(timings)}\n")
    if default not in timings:
        print("stopped before the defaults were measured: nothing can be said of settings", file=sys.stderr)
        return 130
    choice = choose(timings, cores, default)
    print(f"{choice.reason[0].upper()}{choice.reason[1:]}.\n")
    for variable, value in choice.settings().items():
        print(f"{variable}={value}")
    if to is not None and whole:
        write(to, choice.settings())
        print(f"\nwritten to {to}")
    elif to is not None:
        print(f"stopped early: nothing was written to {to}", file=sys.stderr)
    return 0 if whole else 130


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Shows how far it is: on a terminal in one line, else a line for each quarter."""
    terminal = sys.stderr.isatty()

    def show(done: int, of: int) -> None:
        if terminal:
            print(f"\r  round {done} of {of}", end="", file=sys.stderr, flush=True)
        elif 4 * done // of > 4 * (done - 1) // of:
            print(f"  round {done} of {of}", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        if terminal:
            print(file=sys.stderr)
