"""How much of everything so many live streams take: the measured costs, the assumptions beside them, and the arithmetic. Pure."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from tests.simulation.costs import Costs
from tests.simulation.failover import Cell

MEASURED = Path(__file__).parent / "costs.json"
MANY = (10_000, 1_000_000, 100_000_000)


@dataclass(frozen=True)
class Assumptions:
    """What was not measured, or is chosen."""

    saves: float = 30 / 8  # of a stream in a second: INDRNN_CHECKPOINT_FRAMES is 8
    replica_busy: float = 0.6  # of its core: when one zone of three is gone, the others have half as much again, 0.9
    store_busy: float = 0.4  # of its core, which Valkey uses one of; the rest is for takeovers, the file and its rewriting
    store_memory: float = 8 * 2**30  # of a node
    balancer_busy: float = 0.5  # of its cores
    balancer_cores: int = 4
    balancer_streams: int = 25_000  # two files each of the 50 000 in docker/scale/haproxy.cfg
    cell_streams: int = 50_000  # beyond that a second cell with balancers, replicas and store of its own
    packet_bytes: float = 95.0  # of Ethernet, IP, TCP and TLS around each message, in each direction
    messages: float = 30.0  # a second, and as many answers


@dataclass(frozen=True)
class Plan:
    """For so many live streams. Bytes are a second, in all cells together."""

    streams: int
    cells: int
    cell: Cell
    replicas: int
    replica_streams: int  # of one
    replica_memory: float  # of one
    stores: int  # primaries; each has a replica beside it
    store_memory: float  # of one
    saves: float  # of one, a second
    balancers: int
    from_clients: float
    to_clients: float
    to_stores: float


def measured() -> Costs:
    return Costs(**json.loads(MEASURED.read_text())["costs"])


def stream_cpu(costs: Costs, assumed: Assumptions) -> float:
    """Of a replica's core, saves included."""
    return costs.stream_cpu + assumed.saves * costs.save_cpu_s


def replica_streams(costs: Costs, assumed: Assumptions) -> int:
    """Streams that one replica has when all is well; tens, for a figure that differs from machine to machine."""
    return math.floor(assumed.replica_busy / stream_cpu(costs, assumed) / 10) * 10


def plan(streams: int, costs: Costs, assumed: Assumptions) -> Plan:
    cells = math.ceil(streams / assumed.cell_streams)
    in_cell = math.ceil(streams / cells)
    each = replica_streams(costs, assumed)
    replicas = max(3, math.ceil(in_cell / each))  # one in each zone
    store_cpu = assumed.saves * costs.store_save_cpu_s
    stores = max(1, math.ceil(in_cell * store_cpu / assumed.store_busy), math.ceil(in_cell * costs.store_memory_bytes / assumed.store_memory))
    by_processor = in_cell * costs.balancer_cpu / (assumed.balancer_busy * assumed.balancer_cores)
    balancers = max(2, math.ceil(by_processor) + 1, math.ceil(in_cell / assumed.balancer_streams) + 1)  # one may go
    cell = Cell(
        replicas=replicas,
        streams=in_cell,
        balancers=balancers,
        stores=stores,
        stream_s=stream_cpu(costs, assumed),
        takeover_s=costs.takeover_cpu_s,
        store_stream_s=store_cpu,
        store_takeover_s=costs.takeover_store_cpu_s,
        balancer_stream_s=costs.balancer_cpu / assumed.balancer_cores,
    )
    wire = assumed.messages * assumed.packet_bytes
    return Plan(
        streams=streams,
        cells=cells,
        cell=cell,
        replicas=replicas * cells,
        replica_streams=each,
        replica_memory=costs.replica_bytes + each * costs.memory_bytes,
        stores=stores * cells,
        store_memory=in_cell * costs.store_memory_bytes / stores,
        saves=in_cell * assumed.saves / stores,
        balancers=balancers * cells,
        from_clients=streams * (costs.client_in_bytes + wire),
        to_clients=streams * (costs.client_out_bytes + wire),
        to_stores=streams * assumed.saves * costs.store_save_bytes,
    )
