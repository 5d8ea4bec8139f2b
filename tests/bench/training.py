"""The training benchmark: one IndRNN layer, forward and backward, beside its matrix product alone and torch's RNN, GRU and LSTM.

python -m tests.bench.training [--rounds 7] [--threads 2] [--device cpu|cuda] [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

if __package__ in (None, ""):  # run as `python tests/bench/training.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from model.indrnn import IndRNN
from model.recurrence import recur, recur_loop
from tests.bench.figures import cpu_model

Shape = tuple[int, int, int]  # time steps, batch, units; as many inputs as units

SHAPES: tuple[Shape, ...] = ((20, 128, 512), (784, 32, 128), (1000, 50, 128), (5000, 50, 128))
GPU_SHAPES: tuple[Shape, ...] = (*SHAPES, (1024, 32, 128), (1024, 128, 512))
LONG: tuple[Shape, ...] = tuple((steps, 16, 128) for steps in (5_000, 10_000, 25_000, 50_000))
QUICK_SHAPES: tuple[Shape, ...] = ((20, 4, 32), (60, 3, 16))
QUICK_LONG: tuple[Shape, ...] = ((100, 2, 16), (200, 2, 16))

PEERS = ("RNN", "GRU", "LSTM")
VARIANTS = ("Linear", "IndRNN", "recur", "copy", *PEERS, "plain loop")
PASSES = 5  # times that the recurrence must touch memory of the size of z: z and y forward; gy, y and gz backward
LOOP_ELEMENTS = 10_000_000  # above, the plain loop takes minutes with its warm-up and rounds


@dataclass
class Timings:
    """Seconds of one step (forward and backward) by shape and variant, one figure a round; what was left out, and why."""

    conditions: dict[str, Any]
    seconds: dict[Shape, dict[str, list[float]]] = field(default_factory=dict)
    skipped: dict[Shape, dict[str, str]] = field(default_factory=dict)

    def add(self, shape: Shape, variant: str, seconds: float) -> None:
        self.seconds.setdefault(shape, {}).setdefault(variant, []).append(seconds)

    def median_ms(self, shape: Shape, variant: str) -> float:
        found = self.seconds.get(shape, {}).get(variant)
        return 1e3 * median(found) if found else math.nan

    def ratio(self, shape: Shape, above: str, below: str) -> float:
        """Median of the ratios within each round, in which both were measured shortly after each other; NaN where one is missing."""
        found = self.seconds.get(shape, {})
        pairs = list(zip(found.get(above, []), found.get(below, []), strict=False))  # a last round may have been cut short
        return median(a / b for a, b in pairs) if pairs else math.nan

    def over_memory(self, shape: Shape) -> float:
        """The recurrence alone over the time that a copy takes to move as many bytes (a copy touches memory twice)."""
        return self.ratio(shape, "recur", "copy") * 2 / PASSES

    def growth(self) -> float:
        """Largest time per step of the long sequences over the smallest."""
        each = [self.median_ms(shape, "IndRNN") / shape[0] for shape in self.long]
        return max(each) / min(each) if each else math.nan

    @property
    def shapes(self) -> list[Shape]:
        return [shape for shape, found in self.seconds.items() if set(found) != {"IndRNN"}]

    @property
    def long(self) -> list[Shape]:
        return [shape for shape, found in self.seconds.items() if set(found) == {"IndRNN"}]

    def bars(self) -> dict[str, tuple[float, float, bool]]:
        """What was asked for: name to value, bar, and whether the value is to be at most (True) or at least (False) the bar."""
        found: dict[str, tuple[float, float, bool]] = {}
        cuda = self.conditions["device"] == "cuda"
        for shape in self.shapes:
            if cuda:
                found[f"{_name(shape)}: recur over its memory traffic"] = (self.over_memory(shape), 1.5, True)
                if shape[0] == 1024:
                    found[f"{_name(shape)}: LSTM over IndRNN"] = (self.ratio(shape, "LSTM", "IndRNN"), 13.0, False)
                continue
            found[f"{_name(shape)}: IndRNN over Linear"] = (self.ratio(shape, "IndRNN", "Linear"), 1.3 if shape[0] <= 784 else 1.5, True)
            if shape[0] >= 784:
                found[f"{_name(shape)}: LSTM over IndRNN"] = (self.ratio(shape, "LSTM", "IndRNN"), 5.0, False)
        return found

    def to_dict(self) -> dict[str, Any]:
        seconds = {_name(shape): found for shape, found in self.seconds.items()}
        bars = {name: {"value": value, "bar": bar, "at_most": most} for name, (value, bar, most) in self.bars().items()}
        growth = None if math.isnan(self.growth()) else self.growth()
        return {"conditions": self.conditions, "bars": bars, "growth": growth, "seconds": seconds, "skipped": _named(self.skipped)}


def _name(shape: Shape) -> str:
    return ", ".join(map(str, shape))


def _named(by_shape: dict[Shape, Any]) -> dict[str, Any]:
    return {_name(shape): value for shape, value in by_shape.items()}


class Bench:
    """Makes the tensors of a shape, and the steps that are timed on them."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def steps(self, shape: Shape, long: bool) -> dict[str, Callable[[], object]]:
        """One callable for each variant. All layers read the same x and get the same gradient."""
        steps, batch, units = shape
        made = torch.Generator().manual_seed(steps)
        x, gy, z = (torch.randn(shape, generator=made).to(self.device) for _ in range(3))
        x.requires_grad_()
        layer = IndRNN(units, units).to(self.device)
        h, mask = torch.zeros(batch, units, device=self.device), torch.ones(steps, batch, dtype=torch.bool, device=self.device)
        u = layer.recurrence.u

        def step(module: nn.Module, output: Callable[[], Tensor]) -> Callable[[], object]:
            def run() -> None:
                x.grad = None
                module.zero_grad()  # sets to None: nothing is added up
                output().backward(gy)

            return run

        found: dict[str, Callable[[], object]] = {"IndRNN": step(layer, lambda: layer(x, h, mask)[0])}
        if long:
            return found
        z.requires_grad_()
        out = torch.empty_like(x)
        found = {"Linear": step(layer, lambda: layer.linear(x))} | found
        found["recur"] = lambda: torch.autograd.grad(recur(z, u, h, mask), (z, u), gy)
        found["copy"] = lambda: out.copy_(gy)
        for name in PEERS:
            peer = getattr(nn, name)(units, units).to(self.device)
            found[name] = step(peer, lambda peer=peer: peer(x)[0])  # type: ignore[misc]
        if steps * batch * units <= LOOP_ELEMENTS:
            found["plain loop"] = step(layer, lambda: recur_loop(layer.linear(x), u, h, mask))
        return found

    def measure(self, step: Callable[[], object]) -> float:
        """Median seconds of the step, run again until `seconds` have passed."""
        taken: list[float] = []
        while not taken or sum(taken) < self.seconds:
            self._settle()
            start = time.perf_counter()
            step()
            self._settle()
            taken.append(time.perf_counter() - start)
        return median(taken)

    def _settle(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def check(self) -> None:
        """What is timed computes what it should: the layer against the plain loop."""
        torch.manual_seed(0)
        layer, x = IndRNN(24, 40).to(self.device), torch.randn(30, 5, 24, device=self.device)
        h, mask = torch.rand(5, 40, device=self.device), torch.arange(30, device=self.device)[:, None] < torch.tensor([30, 3, 0, 17, 29], device=self.device)
        torch.testing.assert_close(layer(x, h, mask)[0], recur_loop(layer.linear(x), layer.recurrence.u, h, mask), rtol=1e-4, atol=1e-4)


def run(args: argparse.Namespace, console: Console) -> tuple[Timings, bool]:
    """Everything that was measured, and whether the run came to its end (Ctrl-C keeps what is there)."""
    bench = Bench(args.device, args.seconds)
    bench.check()
    timings = Timings(conditions(args))
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, auto_refresh=False) as progress:  # no thread that draws while something is measured
            task = progress.add_task("", total=(len(args.shapes) + len(args.long)) * args.rounds)
            for shape, long in [*((shape, False) for shape in args.shapes), *((shape, True) for shape in args.long)]:
                steps = {variant: step for variant, step in bench.steps(shape, long).items() if variant in args.only}
                if not long and "plain loop" in args.only and "plain loop" not in steps:
                    timings.skipped[shape] = {"plain loop": f"minutes long: more than {LOOP_ELEMENTS:,} elements".replace(",", " ")}
                progress.update(task, description=f"{_name(shape)}: warm-up", refresh=True)
                for step in steps.values():
                    bench.measure(step)
                if not console.is_terminal:  # a log, in which no bar can move
                    print(f"{_name(shape)}: measuring", flush=True)
                for number in range(args.rounds):
                    # Every variant once a round, each second round backwards: a machine that gets faster or slower favours none.
                    for variant in steps if number % 2 == 0 else reversed(steps):
                        progress.update(task, description=f"{_name(shape)}: {variant}", refresh=True)
                        timings.add(shape, variant, bench.measure(steps[variant]))
                    progress.advance(task)
            progress.update(task, description="done", refresh=True)
    except KeyboardInterrupt:
        return timings, False
    return timings, True


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """Date, machine and versions: what figures mean nothing without."""
    import numba

    found: dict[str, Any] = {"date": date.today().isoformat(), "device": args.device, "cpu": cpu_model(), "threads": torch.get_num_threads()}
    if args.device == "cuda":
        import triton

        found |= {"gpu": torch.cuda.get_device_name(), "CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version(), "triton": triton.__version__}
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return found | {
        "load before": load,
        "system": platform.system(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numba": numba.__version__,
        "rounds": args.rounds,
    }


def main_table(timings: Timings) -> Table:
    found = Table("T, batch, units", box=box.MARKDOWN)
    columns = ("Linear", "IndRNN", *PEERS, "plain loop")
    for column in columns:
        found.add_column(f"{column} ms", justify="right", no_wrap=True)
    for column in ("IndRNN / Linear", "LSTM / IndRNN", "recur / memory"):
        found.add_column(column, justify="right")
    for shape in timings.shapes:
        cells = [_figure(timings.median_ms(shape, column), 1) for column in columns]
        ratios = timings.ratio(shape, "IndRNN", "Linear"), timings.ratio(shape, "LSTM", "IndRNN"), timings.over_memory(shape)
        found.add_row(_name(shape), *cells, *(_figure(ratio, 2) for ratio in ratios))
    return found


def long_table(timings: Timings) -> Table:
    found = Table("T, batch, units", box=box.MARKDOWN)
    found.add_column("IndRNN ms", justify="right")
    found.add_column("us per time step", justify="right")
    for shape in timings.long:
        each = timings.median_ms(shape, "IndRNN")
        found.add_row(_name(shape), _figure(each, 1), _figure(1e3 * each / shape[0], 2))
    return found


def bar_table(timings: Timings) -> Table:
    found = Table("measure", box=box.MARKDOWN)
    for column in ("value", "bar", ""):
        found.add_column(column, justify="right")
    for name, (value, bar, most) in timings.bars().items():
        met = value <= bar if most else value >= bar
        verdict = "not measured" if math.isnan(value) else "met" if met else "NOT MET"
        found.add_row(name, _figure(value, 2), f"{'at most' if most else 'at least'} {bar}", verdict)
    return found


def _figure(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:,.{digits}f}".replace(",", " ")


def show(timings: Timings, console: Console, quick: bool) -> None:
    console.print(main_table(timings), end="")
    for shape, left_out in timings.skipped.items():
        for variant, reason in left_out.items():
            console.print(f"{_name(shape)}: {variant} not run, {reason}")
    if timings.long:
        console.print(long_table(timings), end="")
        console.print(f"time per step, largest over smallest: {timings.growth():.2f}")
    if not quick:
        console.print(bar_table(timings), end="")
    if timings.conditions["device"] != "cuda":
        console.print("CUDA (cuDNN's LSTM, memory bandwidth): not measured, torch sees no GPU" if not torch.cuda.is_available() else "CUDA: see --device cuda")
    console.print(", ".join(f"{name} {value}" for name, value in timings.conditions.items()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, help="all variants take turns in each; medians are over these (default 7)")
    parser.add_argument("--seconds", type=float, default=0.3, help="for one variant in one round, or one step if that takes longer (default 0.3)")
    parser.add_argument("--threads", type=int, default=2, help="of torch and of the recurrence, each on a core of its own (default 2)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the layers run (default: a GPU if there is one)",
    )
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="VARIANT", help=f"some of: {', '.join(VARIANTS)}")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    parser.add_argument("--quick", action="store_true", help="small shapes, one round: shows that it works, its figures mean nothing")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here (a CPU build of torch, or no driver)")
    args.rounds = args.rounds if args.rounds is not None else 1 if args.quick else 7
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    args.shapes, args.long = GPU_SHAPES if args.device == "cuda" else SHAPES, LONG
    if args.quick:
        args.seconds, args.shapes, args.long = 0.01, QUICK_SHAPES, QUICK_LONG
    return args


def main() -> int:
    args, console = arguments(), Console(width=max(Console().width, 150))
    if hasattr(os, "sched_setaffinity"):  # all variants share the same cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for the Linear too: cuDNN's layers use it by default
    timings, whole = run(args, console)
    if timings.seconds:
        show(timings, console, args.quick)
    if not whole:
        console.print("stopped: figures are of the rounds until then")
        return 130
    if args.json:
        args.json.write_text(json.dumps(timings.to_dict(), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
