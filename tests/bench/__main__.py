"""The benchmark: our service beside onnxruntime alone, echoes on the same uvicorn and a service written by hand, interleaved in one run on two cores.

python -m tests.bench [--only PATTERN] [--rounds 5] [--seconds 1.5] [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

if __package__ in (None, ""):  # run as `python tests/bench`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rich.console import Console

from tests.bench import bars, programs
from tests.bench.bars import BARS, Bar
from tests.bench.bench import TOY, Bench
from tests.bench.figures import CALM, Report, conditions

CORES = 2


def run(args: argparse.Namespace, console: Console, report: Report) -> None:
    """Fills the report; what is in it when this is interrupted holds."""
    _, variants, facts = bars.chosen(args.only)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(folder, args, stack)
        console.print("starts, memory, equality of scores ...", highlight=False)
        bench.once(facts, report)
        bench.crowd(facts, report)
        bench.rounds(variants, report, console)


def show(some: Sequence[Bar], report: Report, console: Console) -> None:
    if report.figures:
        console.print(report.table())
    if some:
        console.print(bars.bar_table(some, report))
    for name, reason in report.failures.items():
        console.print(f"{name} failed: {reason}", style="bold red", markup=False)
    if "answers compared" in report.facts:
        same = "the same bits" if report.facts["same bits"] else "not the same bits"
        console.print(f"scores of {report.facts['answers compared']:.0f} answers against onnxruntime alone: {same}")
    if report.figures and report.others() > CALM:
        console.print(f"other programs had {report.others():.1f} of the cores meanwhile: these figures are rough", style="bold red")
    console.print(", ".join(f"{name} {value}" for name, value in report.conditions.items()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="PATTERN", help="measures and variants in whose name this regular expression is found")
    parser.add_argument("--rounds", type=int, default=5, help="medians are over these (default 5)")
    parser.add_argument("--seconds", type=float, default=1.5, help="for one variant in one round (default 1.5)")
    parser.add_argument("--warmup", type=float, default=0.3, help="seconds before each (default 0.3)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    parser.add_argument("--quick", action="store_true", help="one round of moments: shows that it works, its figures mean nothing")
    args = parser.parse_args()
    args.starts, args.open_sessions = 5, 10_000
    if args.quick:
        args.rounds, args.seconds, args.warmup, args.starts, args.open_sessions = 1, 0.1, 0.05, 1, 264
    if not any(bars.chosen(args.only)):
        parser.error(f"--only {args.only}: no measure and no variant has that in its name; measures: {'; '.join(bar.name for bar in BARS)}")
    return args


def main() -> int:
    args, console = arguments(), Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers are in sessions of their own: nobody else ends them
    console = Console(width=max(console.width, 140))  # names are long; a file has no width
    model = f"{TOY.layers} x {TOY.units}, {TOY.shape[0]} inputs, {len(TOY.classes)} classes"
    report = Report(conditions(programs.pin(CORES), model=model, rounds=args.rounds, seconds=args.seconds))
    some, _, _ = bars.chosen(args.only)
    stopped = False
    try:
        run(args, console, report)
    except KeyboardInterrupt:
        stopped = True
    show(some, report, console)
    if args.json:
        args.json.write_text(json.dumps({**report.to_dict(), "bars": bars.bars_dict(some, report), "stopped": stopped}, indent=1) + "\n")
    if stopped:
        console.print("stopped: figures are of what was measured until then")
    return 130 if stopped else 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
