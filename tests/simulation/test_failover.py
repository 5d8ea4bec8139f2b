"""What the simulation of a failover must keep to, whatever its figures are."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.store import StoreSettings
from tests.simulation.failover import Cell, Checks, End, Failover, TooBusy

HAPROXY = Path(__file__).resolve().parents[2] / "docker" / "scale" / "haproxy.cfg"
CELL = Cell(
    replicas=12,
    streams=1200,
    balancers=2,
    stores=2,
    stream_s=0.005,
    takeover_s=0.003,
    store_stream_s=0.0001,
    store_takeover_s=0.0002,
    balancer_stream_s=0.0003,
)
ENDS: tuple[End, ...] = ("killed", "vanished")


@settings(max_examples=60, deadline=None)
@given(
    replicas=st.integers(2, 20),
    dead=st.integers(0, 19),
    each=st.integers(0, 40),
    stores=st.integers(1, 4),
    balancers=st.integers(1, 4),
    store_s=st.sampled_from([0.0002, 0.05, 0.5]),
    end=st.sampled_from(ENDS),
    seed=st.integers(0, 1000),
)
def test_every_stream_of_the_dead_goes_on_once_at_one_that_lives(
    replicas: int, dead: int, each: int, stores: int, balancers: int, store_s: float, end: End, seed: int
) -> None:
    dead = min(dead, replicas - 1)
    cell = dataclasses.replace(
        CELL, replicas=replicas, streams=replicas * each, stores=stores, balancers=balancers, stream_s=0.0005, store_stream_s=0.0, store_takeover_s=store_s
    )
    told = Failover(cell, dead, end, seed=seed).run()
    assert len(told.stalls) == len(told.where) == dead * each
    assert told.stalls == sorted(told.stalls)
    assert all(dead <= replica < replicas for replica in told.where)
    assert told.attempts == dead * each + told.refused  # each attempt goes on, or is refused and comes again
    assert told.store_busy_s == pytest.approx(dead * each * store_s)
    loads = Counter(told.where)
    assert max(loads.values(), default=0) - min((loads[replica] for replica in range(dead, replicas)), default=0) <= 1 + told.refused


@pytest.mark.parametrize("end", ENDS)
def test_the_same_seed_is_the_same_run(end: End) -> None:
    runs = [Failover(CELL, 3, end, seed=seed).run().stalls for seed in (7, 7, 8)]
    assert runs[0] == runs[1] != runs[2]


def test_without_waiting_a_stall_is_the_way_there_and_the_work() -> None:
    cell = dataclasses.replace(CELL, replicas=2, streams=2, stores=1, stream_s=0.0, store_stream_s=0.0, balancer_stream_s=0.0)
    [stall] = Failover(cell, 1, "killed").run().stalls
    work_s = cell.handshake_s + cell.takeover_s + cell.store_takeover_s
    assert stall == pytest.approx(2.5 * cell.round_trip_s + 3 * cell.inside_s + work_s)


def test_a_queue_lasts_as_long_as_its_work_in_the_time_that_is_left() -> None:
    """The last of many at one replica that is half busy: twice the work of all."""
    idle = dataclasses.replace(CELL, replicas=2, streams=2000, stores=1, stream_s=0.0, handshake_s=0.0, store_takeover_s=0.0, store_stream_s=0.0)
    cell = dataclasses.replace(idle, takeover_s=0.01)
    run = Failover(cell, 1, "killed")
    run._replicas[1].busy = 0.5
    last = run.run().stalls[-1]
    assert last == pytest.approx(2.5 * cell.round_trip_s + 3 * cell.inside_s + 1000 * 0.01 / 0.5, rel=1e-6)


def test_what_vanished_is_found_out_within_the_checks() -> None:
    checks = Checks()
    killed, vanished = (Failover(CELL, 1, end, checks=checks).run().stalls for end in ENDS)
    least = 2 * checks.timeout_s + checks.in_doubt_s
    assert least < vanished[0] - killed[0] + 0.1
    assert vanished[-1] < killed[-1] + least + checks.every_s + checks.connect_s


def test_more_of_what_is_short_makes_stalls_shorter() -> None:
    slow_store = dataclasses.replace(CELL, store_takeover_s=0.01)
    for cell, name, more in ((CELL, "replicas", 24), (slow_store, "stores", 8)):
        less = Failover(cell, 3, "killed").run()
        enough = Failover(dataclasses.replace(cell, **{name: more}), 3, "killed").run()
        assert enough.quantile(0.99) < less.quantile(0.99), name


def test_a_store_that_is_too_slow_for_all_at_once_takes_them_up_in_the_end() -> None:
    """They are refused after the store's time limit and come again after pauses, which spread them."""
    cell = dataclasses.replace(CELL, stores=1, store_takeover_s=0.02, store_stream_s=0.0)
    told = Failover(cell, 3, "killed").run()
    assert told.refused > 0
    assert len(told.stalls) == 300
    assert told.stalls[-1] < 60  # as long as the client tries (Retry.give_up_s)


def test_no_room_is_said() -> None:
    with pytest.raises(TooBusy, match="11 replicas have room for 1100 of 1200"):
        Failover(dataclasses.replace(CELL, room=100), 1, "killed")
    with pytest.raises(TooBusy, match="more replicas or store nodes"):
        Failover(dataclasses.replace(CELL, stream_s=0.0098), 1, "killed").run()
    with pytest.raises(ValueError, match="at least one is left"):
        Failover(CELL, 12, "killed")


def test_its_timings_are_those_that_are_configured() -> None:
    text, checks = HAPROXY.read_text(), Checks()

    def configured(pattern: str) -> float:
        number, unit = re.findall(rf"{pattern} (\d+)(ms|s)\b", text)[0]
        return float(number) * {"ms": 0.001, "s": 1.0}[unit]

    assert configured(r"\binter") == checks.every_s
    assert configured("fastinter") == checks.in_doubt_s
    assert configured("timeout check") == checks.timeout_s
    assert configured("timeout connect") == checks.connect_s
    assert re.findall(r"\bfall (\d+)", text) == [str(checks.fall)]
    assert StoreSettings().timeout_s == CELL.store_limit_s
