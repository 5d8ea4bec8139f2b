"""How long streams stand still when replicas die: a discrete-event simulation of one cell, with the measured costs and the configured timings.

One cell is some balancers, replicas and store nodes. At time 0 some replicas are killed (their connections are reset) or vanish (nothing answers any more,
and balancers find out by their checks). Every stream of theirs comes back by the client's rule, at once and then after pauses that double, is sent to the
replica with the fewest streams, waits there for the processor, then for its store node, and goes on. What is simulated is waiting: each balancer, replica
and store node does one thing after another, slowed down by what it does for the streams that are well.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from service.client_values import Retry

End = Literal["killed", "vanished"]


@dataclass(frozen=True)
class Cell:
    """What there is, and how busy it is with streams that are well. Times in seconds, of one core."""

    replicas: int
    streams: int
    balancers: int
    stores: int
    stream_s: float  # of a replica, for a stream in a second
    takeover_s: float  # of a replica, for a stream taken up
    store_stream_s: float
    store_takeover_s: float
    balancer_stream_s: float
    handshake_s: float = 0.002  # of a balancer, TLS included: assumed
    round_trip_s: float = 0.05  # client to balancer: assumed
    inside_s: float = 0.0005  # between machines of a cell: assumed
    room: int | None = None  # sessions of a replica (INDRNN_SESSIONS)
    store_limit_s: float = 2.0  # after which a replica takes the store for down, and the client is to come again: StoreSettings.timeout_s
    most_busy: float = 0.95  # beyond that a queue would never empty: the simulation stops


@dataclass(frozen=True)
class Checks:
    """How a balancer finds out, as in docker/scale/haproxy.cfg."""

    every_s: float = 1.0
    in_doubt_s: float = 0.25
    timeout_s: float = 1.0
    fall: int = 2
    connect_s: float = 0.3  # until an attempt on a replica that has vanished is given up, and made on another


@dataclass
class Told:
    """What the streams of the dead replicas went through."""

    stalls: list[float] = field(default_factory=list)  # seconds from the end of the replica to going on, in order of going on
    where: list[int] = field(default_factory=list)  # the replica that took it up
    attempts: int = 0
    refused: int = 0  # attempts that ended because the store took too long
    busiest: float = 0.0  # of a replica, afterwards, as a part of its core
    store_busy_s: float = 0.0  # of all store nodes, for takeovers
    peak: int = 0  # takeovers begun within any second

    def quantile(self, part: float) -> float:
        ordered = sorted(self.stalls)
        return ordered[min(len(ordered) - 1, math.ceil(part * len(ordered)) - 1)] if ordered else 0.0


class TooBusy(RuntimeError):
    """The cell has no room for what it is to take up."""


class _Line:
    """Does one thing after another, in what other work leaves of its time."""

    def __init__(self, busy: float) -> None:
        self.busy = busy
        self._free_at = 0.0

    def wait_s(self, now: float) -> float:
        return max(0.0, self._free_at - now)

    def take(self, now: float, work_s: float, most_busy: float) -> float:
        """When the work that comes now is done."""
        if self.busy > most_busy:
            raise TooBusy(f"{self.busy:.0%} of a core is taken by streams alone: more replicas or store nodes are needed")
        self._free_at = max(now, self._free_at) + work_s / (1 - self.busy)
        return self._free_at


class Failover:
    """One run; the same seed gives the same run."""

    def __init__(self, cell: Cell, dead: int, end: End, *, checks: Checks | None = None, retry: Retry | None = None, seed: int = 0) -> None:
        if not 0 <= dead < cell.replicas:
            raise ValueError(f"{dead} of {cell.replicas} replicas cannot end: at least one is left")
        self.cell, self.dead, self.end = cell, dead, end
        self.checks, self.retry = checks or Checks(), retry or Retry()
        self.random = random.Random(seed)
        self.told = Told()
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._number = 0
        share, rest = divmod(cell.streams, cell.replicas)
        self._load = [share + (replica < rest) for replica in range(cell.replicas)]  # streams of each; the first `dead` are the dead ones
        if cell.room is not None and cell.streams > cell.room * (cell.replicas - dead):
            raise TooBusy(f"{cell.replicas - dead} replicas have room for {cell.room * (cell.replicas - dead)} of {cell.streams} streams")
        self._replicas = [_Line(load * cell.stream_s) for load in self._load]
        store_busy = cell.streams * cell.store_stream_s / cell.stores
        self._stores = [_Line(store_busy) for _ in range(cell.stores)]
        self._balancers = [_Line(cell.streams * cell.balancer_stream_s / cell.balancers) for _ in range(cell.balancers)]
        self._emptiest = [(load, replica) for replica, load in enumerate(self._load) if replica >= dead]
        heapq.heapify(self._emptiest)
        self._begun: list[float] = []
        # Each balancer has a rhythm of its own. A check that finds nothing is given up after its time limit; so many in a row mean that the replica is gone.
        doubt_s = self.checks.timeout_s + (self.checks.fall - 1) * (self.checks.in_doubt_s + self.checks.timeout_s)
        self._found_out = [[self.random.uniform(0, self.checks.every_s) + doubt_s for _ in range(dead)] for _ in range(cell.balancers)]

    def run(self) -> Told:
        stream = 0
        for replica in range(self.dead):
            for _ in range(self._load[replica]):
                balancer = stream % self.cell.balancers
                learns = 0.0 if self.end == "killed" else self._found_out[balancer][replica]
                self._at(learns + self.cell.round_trip_s / 2, self._coming_back(balancer, 0))
                stream += 1
        while self._events:
            now, _, event = heapq.heappop(self._events)
            event(now)
        self.told.busiest = max((line.busy for line in self._replicas[self.dead :]), default=0.0)
        self.told.peak = _peak(self._begun)
        return self.told

    def _at(self, when: float, event: Callable[[float], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, event))

    def _coming_back(self, balancer: int, attempt: int) -> Callable[[float], None]:
        """The client dials; the balancer shakes hands, and chooses."""

        def dial(now: float) -> None:
            self.told.attempts += 1
            shaken = self._balancers[balancer].take(now + 1.5 * self.cell.round_trip_s, self.cell.handshake_s, self.cell.most_busy)
            self._at(shaken, self._choosing(balancer, attempt))

        return dial

    def _choosing(self, balancer: int, attempt: int) -> Callable[[float], None]:
        def choose(now: float) -> None:
            # A replica that has vanished, and is not yet known to, looks emptier than any: it is tried, in vain, first.
            if self.end == "vanished" and any(now < found for found in self._found_out[balancer]):
                now += self.checks.connect_s
            self._at(now + self.cell.inside_s, self._taking_up(self._emptiest_now(), balancer, attempt))

        return choose

    def _emptiest_now(self) -> int:
        while (top := self._emptiest[0])[0] != self._load[top[1]]:  # entries of loads that have changed since
            heapq.heappop(self._emptiest)
        replica = top[1]
        self._change(replica, 1)
        return replica

    def _change(self, replica: int, by: int) -> None:
        self._load[replica] += by
        heapq.heappush(self._emptiest, (self._load[replica], replica))

    def _taking_up(self, replica: int, balancer: int, attempt: int) -> Callable[[float], None]:
        def take_up(now: float) -> None:
            self._begun.append(now)
            line = self._replicas[replica]
            done = line.take(now, self.cell.takeover_s, self.cell.most_busy)
            line.busy += self.cell.stream_s
            self._at(done + self.cell.inside_s, self._attaching(replica, balancer, attempt))

        return take_up

    def _attaching(self, replica: int, balancer: int, attempt: int) -> Callable[[float], None]:
        def attach(now: float) -> None:
            store = self.random.randrange(self.cell.stores)
            if self._stores[store].wait_s(now) <= self.cell.store_limit_s:
                done = self._stores[store].take(now, self.cell.store_takeover_s, self.cell.most_busy)
                self.told.store_busy_s += self.cell.store_takeover_s
                self._at(done + self.cell.inside_s + self.cell.round_trip_s / 2, self._going_on(replica))
                return
            # A replica has few calls under way at once, so this one waited there, and costs the store nothing when it is given up.
            self.told.refused += 1
            self._change(replica, -1)
            self._replicas[replica].busy -= self.cell.stream_s
            again = now + self.cell.store_limit_s + self.cell.round_trip_s / 2 + self._pause_s(attempt)
            self._at(again, self._coming_back(balancer, attempt + 1))

        return attach

    def _pause_s(self, attempt: int) -> float:
        longest = min(self.retry.longest_s, self.retry.first_s * 2.0 ** min(attempt, 60))
        return longest * self.random.uniform(0.5, 1.0)

    def _going_on(self, replica: int) -> Callable[[float], None]:
        def go_on(now: float) -> None:  # in order of time, as all events are
            self.told.stalls.append(now)
            self.told.where.append(replica)

        return go_on


def _peak(moments: list[float]) -> int:
    """The most within one second."""
    ordered, begin, most = sorted(moments), 0, 0
    for index, moment in enumerate(ordered):
        while moment - ordered[begin] > 1.0:
            begin += 1
        most = max(most, index - begin + 1)
    return most
