"""What the store costs: the same load on a service that keeps its sessions in a real Valkey and on one that keeps them in memory, in turns.

python -m tests.bench.store_cost [--rounds 5] [--seconds 1.5] [--frames 8] [--durability memory] [--json FILE] [--quick]
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tests import toy_models
from tests.bench import programs
from tests.bench.bench import TOY
from tests.bench.dialects import Dialect, RestSteps, SequenceSteps, Streaming
from tests.bench.figures import conditions
from tests.bench.load import Group, Result, run
from tests.bench.programs import Program
from tests.bench.wire import Http, LoadError
from tests.valkey_process import find_program, running

CORES = 2
BAR = 0.85  # of the throughput of websockets without a store
KINDS: tuple[tuple[str, type[Dialect], int, float | None], ...] = (
    ("websockets, 64 streams", Streaming, 64, BAR),
    ("REST steps, 16 sessions, written through", RestSteps, 16, None),
    ("Open Inference Protocol, 16 sequences, written through", SequenceSteps, 16, None),
)


@dataclass(frozen=True)
class Pair:
    """One load in one round, without the store and with it."""

    without: Result
    with_store: Result
    saves: float
    store_bytes: float  # of records, while it was measured and warmed up
    frames: float  # meanwhile

    @property
    def ratio(self) -> float:
        return self.with_store.frames_per_s / self.without.frames_per_s


def counted(program: Program) -> dict[str, float]:
    """Counters of a service, over all their labels."""
    with Http(program.url, "metrics") as wire:
        text = wire.ask("GET", "/metrics").decode()
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name = line.partition("{")[0].partition(" ")[0]
            found[name] = found.get(name, 0.0) + float(line.split()[-1])
    return found


def measure(args: argparse.Namespace, console: Console) -> dict[str, list[Pair]]:
    found: dict[str, list[Pair]] = {name: [] for name, *_ in KINDS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        toy_models.write_toy(folder / "models", "bench", TOY)
        frames = toy_models.example_frames(TOY, 512)
        valkey = stack.enter_context(running(folder / "valkey"))
        store = {"store": f"redis://127.0.0.1:{valkey.port}", "store_durability": args.durability, "checkpoint_frames": args.frames}
        both = (stack.enter_context(programs.service(folder / "models")), stack.enter_context(programs.service(folder / "models", **store)))
        for number in range(args.rounds):
            for name, dialect, streams, _ in KINDS:
                console.print(f"round {number + 1} of {args.rounds}: {name}", highlight=False)
                results: dict[Program, Result] = {}
                before = counted(both[1])
                for program in both if number % 2 == 0 else both[::-1]:
                    group = Group(dialect(program.url, len(TOY.classes)), streams)
                    [results[program]] = run([group], frames, args.seconds, warmup=args.warmup)
                after = counted(both[1])
                more = [after[counter] - before[counter] for counter in ("indrnn_store_saves_total", "indrnn_store_bytes_total", "indrnn_frames_total")]
                found[name].append(Pair(results[both[0]], results[both[1]], *more))
    return found


def table(found: dict[str, list[Pair]]) -> Table:
    shown = Table("load", box=box.MARKDOWN)
    for column in ("frames/s without", "with", "ratio", "bar", "p99 ms without", "with", "saves/s", "frames a save", "bytes a record", "bytes a frame"):
        shown.add_column(column, justify="right")
    for name, _, _, bar in KINDS:
        pairs = found[name]
        values = {
            "off": median(pair.without.frames_per_s for pair in pairs),
            "on": median(pair.with_store.frames_per_s for pair in pairs),
            "ratio": median(pair.ratio for pair in pairs),
        }
        saves, size, frames = (sum(getattr(pair, field) for pair in pairs) for field in ("saves", "store_bytes", "frames"))
        shown.add_row(
            name,
            f"{values['off']:.0f}",
            f"{values['on']:.0f}",
            f"{values['ratio']:.2f}",
            "" if bar is None else f">= {bar}",
            f"{median(pair.without.p99_ms for pair in pairs):.2f}",
            f"{median(pair.with_store.p99_ms for pair in pairs):.2f}",
            f"{values['on'] * saves / max(frames, 1):.0f}",
            f"{frames / max(saves, 1):.1f}",
            f"{size / max(saves, 1):.0f}",
            f"{size / max(frames, 1):.0f}",
        )
    return shown


def missed(found: dict[str, list[Pair]]) -> list[str]:
    ratios = {name: median(pair.ratio for pair in pairs) for name, pairs in found.items()}
    return [f"{name}: {ratios[name]:.2f} of the throughput without a store, {bar} is the bar" for name, _, _, bar in KINDS if bar and ratios[name] < bar]


def to_dict(found: dict[str, list[Pair]]) -> dict[str, Any]:
    return {
        name: [
            {"without": pair.without.frames_per_s, "with": pair.with_store.frames_per_s, "saves": pair.saves, "bytes": pair.store_bytes, "frames": pair.frames}
            for pair in pairs
        ]
        for name, pairs in found.items()
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.store_cost", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="medians are over these (default 5)")
    parser.add_argument("--seconds", type=float, default=1.5, help="for one load on one service in one round (default 1.5)")
    parser.add_argument("--warmup", type=float, default=0.5, help="seconds before each (default 0.5)")
    parser.add_argument("--frames", type=int, default=8, help="of a stream, after which it is saved (default 8)")
    parser.add_argument("--durability", choices=("memory", "fsynced"), default="memory", help="when the store is believed to have a record (default memory)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    parser.add_argument("--quick", action="store_true", help="one round of moments: shows that it works, its figures mean nothing")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.seconds, args.warmup = 1, 0.1, 0.05
    return args


def main() -> int:
    args, console = arguments(), Console(width=max(Console().width, 200))
    if find_program() is None:
        print("error: no Valkey 8 or Redis 7.2 is installed, and no Docker engine has its image", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers are in sessions of their own: nobody else ends them
    cores = programs.pin(CORES)
    try:
        found = measure(args, Console(stderr=True))
    except LoadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    console.print(table(found), end="")
    facts = conditions(cores, rounds=args.rounds, seconds=args.seconds, checkpoint_frames=args.frames, durability=args.durability)
    console.print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if args.json:
        args.json.write_text(json.dumps({"conditions": facts, "found": to_dict(found)}, indent=1) + "\n")
    for sentence in missed(found):
        print(f"MISSED: {sentence}", file=sys.stderr)
    return 1 if missed(found) and not args.quick else 0


if __name__ == "__main__":
    sys.exit(main())
