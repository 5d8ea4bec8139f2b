"""The plan: nothing in it is busier or fuller than it says, it says the same as the page and the manifests, and follows from costs that were measured."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import yaml

from service.settings import Settings
from tests.simulation import report
from tests.simulation.failover import Failover
from tests.simulation.plan import MANY, Assumptions, measured, plan, replica_streams, stream_cpu

BASE = Path(__file__).resolve().parents[2] / "docker" / "kubernetes" / "base"
COSTS, ASSUMED = measured(), Assumptions()


@pytest.mark.parametrize("streams", [1, 500, *MANY])
def test_nothing_is_fuller_than_was_assumed(streams: int) -> None:
    planned = plan(streams, COSTS, ASSUMED)
    cell = planned.cell
    assert planned.cells * cell.streams >= streams
    assert cell.streams <= ASSUMED.cell_streams
    assert cell.streams / cell.replicas * stream_cpu(COSTS, ASSUMED) <= ASSUMED.replica_busy
    assert cell.streams / cell.stores * ASSUMED.saves * COSTS.store_save_cpu_s <= ASSUMED.store_busy
    assert planned.store_memory <= ASSUMED.store_memory
    without_one = cell.balancers - 1
    assert cell.streams / without_one <= ASSUMED.balancer_streams
    assert cell.streams * COSTS.balancer_cpu / without_one <= ASSUMED.balancer_cores * ASSUMED.balancer_busy
    assert planned.replicas == planned.cells * cell.replicas


def test_it_grows_with_the_streams_and_with_what_they_cost() -> None:
    plans = [plan(streams, COSTS, ASSUMED) for streams in (10_000, 20_000, *MANY[1:])]
    for less, more in itertools.pairwise(plans):
        assert (less.replicas, less.stores, less.from_clients) < (more.replicas, more.stores, more.from_clients)
    million, hundred = plans[2:]
    assert hundred.cell == million.cell  # more of the same
    assert hundred.cells == 100 * million.cells
    dear = dataclasses.replace(COSTS, save_cpu_s=10 * COSTS.save_cpu_s)
    assert plan(1_000_000, dear, ASSUMED).replicas > million.replicas
    seldom = dataclasses.replace(ASSUMED, saves=1.0)
    assert plan(1_000_000, COSTS, seldom).stores < million.stores


@pytest.mark.parametrize("streams", MANY)
def test_a_zone_may_go(streams: int) -> None:
    cell = plan(streams, COSTS, ASSUMED).cell
    told = Failover(cell, cell.replicas // 3, "vanished", seed=3).run()  # would raise where the rest has no room
    assert told.busiest < 0.95


@pytest.mark.parametrize("streams", MANY)
def test_a_killed_replica_is_not_noticed_for_two_seconds(streams: int) -> None:
    for seed in range(5):
        assert Failover(plan(streams, COSTS, ASSUMED).cell, 1, "killed", seed=seed).run().quantile(0.99) < 2.0


def test_the_page_says_what_comes_out() -> None:
    page = report.README.read_text()
    told = page.partition(report.BEGIN)[2].partition(report.END)[0].strip()
    assert told == report.text().strip(), "docker/README.md is not what the simulation says: make plan"


def test_the_costs_are_of_real_streams() -> None:
    for name, value in dataclasses.asdict(COSTS).items():
        assert value > 0 or name in ("sent_late", "save_cpu_s"), name
    assert COSTS.record_bytes < COSTS.store_save_bytes
    assert COSTS.client_in_bytes > 30 * 13 * 3 * 4


def test_settings_and_manifests_are_those_that_are_planned_with() -> None:
    assert ASSUMED.saves == 30 / Settings.model_fields["checkpoint_frames"].default
    [scaler] = yaml.safe_load_all((BASE / "autoscaler.yaml").read_text())
    [streams] = [each["pods"]["target"]["averageValue"] for each in scaler["spec"]["metrics"] if each["type"] == "Pods"]
    assert streams == str(replica_streams(COSTS, ASSUMED))
    [deployment] = yaml.safe_load_all((BASE / "deployment.yaml").read_text())
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["requests"]["cpu"] == "1"
    assert plan(MANY[0], COSTS, ASSUMED).replica_memory < 384 * 2**20
    assert container["resources"]["requests"]["memory"] == "384Mi"
    [settings] = yaml.safe_load_all((BASE / "settings.yaml").read_text())
    assert int(settings["data"]["INDRNN_SESSIONS"]) > 1.5 * replica_streams(COSTS, ASSUMED)
    assert settings["data"]["INDRNN_THREADS"] == "1"
