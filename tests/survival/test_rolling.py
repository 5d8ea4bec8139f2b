"""Replicas are stopped one after another, as an orchestrator does it, and replaced: by the same version, or by one with a new model."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from pathlib import Path

import numpy as np

from tests import toy_models
from tests.survival.fleet import Fleet
from tests.survival.streams import Client, Sequence, Steps, Streaming, clips, differing, percentiles, undisturbed
from tests.toy_models import CHANNELS
from tests.valkey_process import Valkey

STREAMS, STEPS, SEQUENCES = 60, 4, 4
FPS = 10.0
SECONDS, UPDATE_SECONDS = 8.0, 12.0
NEXT = dataclasses.replace(CHANNELS, units=CHANNELS.units + 8, stream=dataclasses.replace(CHANNELS.stream, horizon=20) if CHANNELS.stream else None)


async def roll(fleet: Fleet, models: Path | None = None) -> None:
    """Each replica is told to stop, which the balancer sees at once, and another is started in its place."""
    for replica in fleet.replicas:
        assert await replica.stop() == 0
        replica.models = models or replica.models
        await replica.start()


def test_a_rolling_restart_under_load_loses_nothing(models: Path, valkey: Valkey, tmp_path: Path) -> None:
    kinds: list[type[Client]] = [Streaming] * STREAMS + [Steps] * STEPS + [Sequence] * SEQUENCES
    frames = clips(CHANNELS, len(kinds), int(FPS * SECONDS))

    async def scenario() -> None:
        async with Fleet(2, models, tmp_path, INDRNN_STORE=f"redis://127.0.0.1:{valkey.port}") as fleet:
            clients = [
                kind(lambda: fleet.next().url, "channels", clip, len(CHANNELS.classes), FPS, random.Random(number))
                for number, (kind, clip) in enumerate(zip(kinds, frames, strict=True))
            ]
            running = asyncio.gather(*(client.run() for client in clients))
            await asyncio.sleep(1)
            await roll(fleet)
            await running
            assert await differing(clients, frames, fleet.next().url) == []
            streams = clients[:STREAMS]
            print(f"\n{STREAMS} streams over a rolling restart: longest wait {percentiles([client.stall for client in streams])}")
            assert sum(client.moves for client in streams) >= STREAMS
            assert sum(client.repeated for client in clients) == 0, "what was saved at the stop is not run again"
            assert fleet.errors() == []

    asyncio.run(scenario())


def test_a_rolling_update_to_a_new_version_is_told_and_warmed_up(valkey: Valkey, tmp_path: Path) -> None:
    """Until a stream is moved its scores are the old model's; from then on those of the new one, begun with the frames that warm it up."""
    old, new = tmp_path / "old", tmp_path / "new"
    toy_models.write_toy(old, "channels", CHANNELS, version="1")
    toy_models.write_toy(new, "channels", NEXT, version="2")
    frames = clips(CHANNELS, STREAMS, int(FPS * UPDATE_SECONDS))

    async def scenario() -> None:
        settings = {"INDRNN_STORE": f"redis://127.0.0.1:{valkey.port}", "INDRNN_STORE_DURABILITY": "memory"}
        async with Fleet(2, old, tmp_path / "logs", **settings) as fleet:
            streams = [
                Streaming(lambda: fleet.next().url, "channels", clip, len(CHANNELS.classes), FPS, random.Random(number)) for number, clip in enumerate(frames)
            ]
            running = asyncio.gather(*(stream.run() for stream in streams))
            before = [await undisturbed(fleet[0].url, "channels", clip) for clip in frames]
            await roll(fleet, new)
            await running
            for stream, clip, first in zip(streams, frames, before, strict=True):
                [change] = stream.changes
                place, warm_from = change["frame"], change["warm_from"]
                assert (change["version"], warm_from) == ("2", max(0, place - 20))
                after = await undisturbed(fleet[0].url, "channels", clip[warm_from:])
                assert np.array_equal(stream.scores[:place], first[:place])
                assert np.array_equal(stream.scores[place:], after[place - warm_from :])
            print(f"\n{STREAMS} streams over a rolling update: longest wait {percentiles([stream.stall for stream in streams])}")
            assert fleet.errors() == []

    asyncio.run(scenario())
