"""Our service beside servers of others that keep the same model's state: Triton, LitServe, MLServer, BentoML, one written by hand. In one run, on two cores.

python -m tests.bench.rivals [--only PATTERN] [--rounds 3] [--seconds 1.5] [--json FILE] [--quick]

Each is installed from PyPI into an environment of its own under build/rivals, once; one that cannot be installed is named and left out.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from tests.bench import programs
from tests.bench.bars import CLIP, HAND_WRITTEN
from tests.bench.bench import TOY, Bench
from tests.bench.figures import CALM, Report, Variant, conditions, spaced
from tests.bench.rivals.rival import RIVALS, Rival

CORES = 2
STREAMS = (1, 16, 64, 256)
CLIENTS = (1, 16, 64)  # that send clips
OURS = ("service", "infer", "steps")
NOT_COMPARED = "Triton here is its core with the python backend over HTTP; its onnxruntime backend, in C++, and gRPC are not in the wheel that has it"


def variants(rivals: list[Rival], pattern: str | None) -> list[Variant]:
    whole = [Variant(who, streams) for streams in STREAMS for who in (*OURS, *HAND_WRITTEN, *(rival.name for rival in rivals))]
    whole += [Variant(who, 64, 8) for who in ("service", "hand-written websocket")]
    whole += [Variant(who, streams, CLIP) for streams in CLIENTS for who in ("clips", "hand-written clips", *(rival.whole for rival in rivals))]
    return [variant for variant in whole if re.search(pattern or "", variant.name, re.IGNORECASE)]


def table(report: Report, clips: bool) -> Table:
    """Frames a second, and p99 in brackets: a row for each who, a column for each number of streams. For clips alone, or for all else."""
    some = [variant for variant in report.figures if (variant.per_message == CLIP) == clips]
    columns = sorted({(variant.streams, variant.per_message) for variant in some}, key=lambda one: (one[1], one[0]))
    made = Table(f"{'clips of 64 frames' if clips else 'streams'}: frames/s (p99 ms)", title="medians over rounds", box=box.MARKDOWN)
    for streams, per_message in columns:
        made.add_column(f"{streams}" + (f" x {per_message}" if per_message > 1 else ""), justify="right", no_wrap=True)
    for who in dict.fromkeys(variant.who for variant in some):
        cells = []
        for streams, per_message in columns:
            variant = Variant(who, streams, per_message)
            known = variant in report.figures
            cells.append(f"{spaced(report.median(variant, 'frames_per_s'))} ({report.median(variant, 'p99_ms'):.1f})" if known else "-")
        made.add_row(who, *cells)
    return made


def installed(console: Console, pattern: str | None) -> list[Rival]:
    """Those that can be had, of those that `pattern` asks for."""
    have = []
    for rival in RIVALS:
        if not any(variant.who in (rival.name, rival.whole) for variant in variants([rival], pattern)):
            continue
        console.print(f"{rival.name}: {', '.join(rival.requirements)} ...", highlight=False)
        if reason := rival.install():
            console.print(f"{rival.name} is left out: {reason}", highlight=False)
        else:
            have.append(rival)
    return have


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.rivals", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="PATTERN", help="variants in whose name, like `Triton 64`, this regular expression is found")
    parser.add_argument("--rounds", type=int, default=3, help="medians are over these (default 3)")
    parser.add_argument("--seconds", type=float, default=1.5, help="for one variant in one round (default 1.5)")
    parser.add_argument("--warmup", type=float, default=0.3, help="seconds before each (default 0.3)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    parser.add_argument("--quick", action="store_true", help="one round of moments: shows that it works, its figures mean nothing")
    args = parser.parse_args()
    args.open_sessions = 0
    if args.quick:
        args.rounds, args.seconds, args.warmup = 1, 0.1, 0.05
    return args


def main() -> int:
    args, console = arguments(), Console()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers are in sessions of their own: nobody else ends them
    console = Console(width=max(console.width, 140))
    rivals = installed(console, args.only)
    wanted = variants(rivals, args.only)
    report, stopped = Report(conditions(programs.pin(CORES), rounds=args.rounds, seconds=args.seconds)), False
    report.conditions |= {rival.name: rival.requirements[0] for rival in rivals}
    try:
        with ExitStack() as stack:
            bench = Bench(Path(stack.enter_context(tempfile.TemporaryDirectory())), args, stack, rivals)
            bench.compare(list(dict.fromkeys((one.who, 16, one.per_message) for one in wanted if one.per_message in (1, CLIP))), report)
            bench.rounds(wanted, report, console)
    except KeyboardInterrupt:
        stopped = True
    if report.figures:
        console.print(table(report, clips=False), table(report, clips=True))
    for name, reason in report.failures.items():
        console.print(f"{name} failed: {reason}", style="bold red", markup=False)
    for name, value in report.facts.items():
        console.print(f"{name}: {value:.3g}")
    console.print(f"{NOT_COMPARED}.\nModel: {TOY.layers} x {TOY.units}, one onnxruntime thread everywhere.")
    if report.figures and report.others() > CALM:
        console.print(f"other programs had {report.others():.1f} of the cores meanwhile: these figures are rough", style="bold red")
    console.print(", ".join(f"{name} {value}" for name, value in report.conditions.items()))
    if args.json:
        args.json.write_text(json.dumps({**report.to_dict(), "stopped": stopped}, indent=1) + "\n")
    return 130 if stopped else 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
