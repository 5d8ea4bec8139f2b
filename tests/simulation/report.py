"""The tables of docker/README.md."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tests.simulation.costs import Costs
from tests.simulation.failover import Failover
from tests.simulation.plan import MANY, MEASURED, Assumptions, Plan, measured, plan, stream_cpu

README = Path(__file__).resolve().parents[2] / "docker" / "README.md"
BEGIN, END = "<!-- written by `make plan` -->", "<!-- until here -->"
SEED = 1


def text() -> str:
    costs, assumed, where = measured(), Assumptions(), json.loads(MEASURED.read_text())["where"]
    plans = [plan(streams, costs, assumed) for streams in MANY]
    return "\n\n".join([_costs(costs, assumed, where), _plans(plans), _stalls(plans)]) + "\n"


def write(text: str) -> None:
    page = README.read_text()
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise RuntimeError(f"{README} has no marks {BEGIN} and {END}")
    README.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")


def _costs(costs: Costs, assumed: Assumptions, where: dict[str, Any]) -> str:
    rows = [
        ("processor of the replica, without a store", f"{1e3 * costs.stream_cpu:.2f} ms a second"),
        ("the same, saved every 8 frames", f"{1e3 * stream_cpu(costs, assumed):.2f} ms a second"),
        ("memory of the replica", f"{costs.memory_bytes / 2**10:.0f} KiB, beside {costs.replica_bytes / 2**20:.0f} MiB without streams"),
        ("from and to its client, headers of TCP and TLS not counted", f"{costs.client_in_bytes / 1e3:.1f} and {costs.client_out_bytes / 1e3:.1f} kB a second"),
        ("a save: record, and bytes to the store", f"{costs.record_bytes / 1e3:.1f} and {costs.store_save_bytes / 1e3:.1f} kB"),
        (
            "to the store, 3.75 saves a second",
            f"{assumed.saves * costs.store_save_bytes / 1e3:.1f} kB a second, {assumed.saves * costs.store_save_bytes / 30:.0f} bytes a frame",
        ),
        ("processor of Valkey", f"{1e6 * costs.store_save_cpu_s:.0f} us a save, {1e3 * assumed.saves * costs.store_save_cpu_s:.2f} ms a second"),
        ("memory of Valkey", f"{costs.store_memory_bytes / 2**10:.1f} KiB"),
        ("processor of HAProxy, without TLS", f"{1e3 * costs.balancer_cpu:.2f} ms a second"),
        (
            "a takeover: processor of the replica, and of Valkey",
            f"{1e3 * costs.takeover_cpu_s:.1f} and {1e3 * costs.takeover_store_cpu_s:.2f} ms",
        ),
    ]
    conditions = (
        f"Medians of {where['rounds']} rounds of {where['seconds']:g} s, {costs.streams:.0f} streams, {where['date']}, {where['cores']} cores"
        f" (load average before: {where['load before']}; {100 * costs.sent_late:.0f} % of the frames were sent late)."
    )
    return f"{conditions}\n\n" + _table(("for one stream of 30 frames a second", "measured"), rows)


def _plans(plans: list[Plan]) -> str:
    rows: list[tuple[str, ...]] = [
        ("cells", *(f"{each.cells:,}" for each in plans)),
        ("replicas, of one core each", *(f"{each.replicas:,}" for each in plans)),
        ("streams of a replica", *(f"{each.streams / each.replicas:.0f}" for each in plans)),
        ("memory of a replica", *(f"{each.replica_memory / 2**20:.0f} MiB" for each in plans)),
        ("store: primaries, each with one replica", *(f"{each.stores:,}" for each in plans)),
        ("saves a second of a primary", *(f"{each.saves:,.0f}" for each in plans)),
        ("memory of a primary", *(f"{each.store_memory / 2**20:.0f} MiB" for each in plans)),
        ("balancers of four cores, one spare in each cell", *(f"{each.balancers:,}" for each in plans)),
        ("from clients", *(_bits(each.from_clients) for each in plans)),
        ("to clients", *(_bits(each.to_clients) for each in plans)),
        ("to the stores", *(_bits(each.to_stores) for each in plans)),
    ]
    return _table(("live streams", *(f"{each.streams:,}" for each in plans)), rows)


def _stalls(plans: list[Plan]) -> str:
    """Of one cell: a million and a hundred million differ in how many cells they are."""
    rows = []
    for each in plans[:2]:
        for what, dead, end in (
            ("a replica is killed", 1, "killed"),
            ("a replica hangs", 1, "vanished"),
            ("a machine of 8 vanishes", min(8, each.cell.replicas // 3), "vanished"),
            ("a zone of three vanishes", each.cell.replicas // 3, "vanished"),
        ):
            told = Failover(each.cell, dead, end, seed=SEED).run()  # type: ignore[arg-type]
            stalls = " / ".join(f"{told.quantile(part):.2f}" for part in (0.5, 0.99, 1.0))
            rows.append((f"{each.cell.streams:,}", what, f"{len(told.stalls):,}", f"{stalls} s", f"{told.peak:,}", f"{100 * told.busiest:.0f} %"))
    return _table(("streams in the cell", "what happens", "streams moved", "stall p50 / p99 / max", "most takeovers in a second", "busiest replica then"), rows)


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _bits(bytes_s: float) -> str:
    power = max(2, int(math.log10(8 * bytes_s) // 3))
    return f"{8 * bytes_s / 1000**power:.3g} {'.kMGTP'[power]}bit/s"
