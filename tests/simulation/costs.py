"""What a live stream costs: processor, memory and bytes of a replica and of the store, measured on real processes with paced streams.

Streams are binary websockets of one frame a message, as a camera sends them, acknowledged every eight frames. First without, then with a store; then the
replica is killed and all its streams are taken up by another at once, which gives the cost of a takeover.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

from service import protocol
from tests import server_process, valkey_process

FPS = 30.0
ACK_EVERY = 8
ROOT = Path(__file__).resolve().parents[2]
SETTLE_S = 3.0
MODEL = "rehab-exercises"


@dataclass(frozen=True)
class Usage:
    """What a process has used so far, and has now."""

    cpu_s: float
    memory: float
    figures: dict[str, float]


@dataclass(frozen=True)
class Costs:
    """Of one stream of 30 frames a second, and of one save of it. Seconds are of one core."""

    streams: float  # measured at once
    stream_cpu: float  # of a core of the replica, without a store
    save_cpu_s: float  # of the replica
    memory_bytes: float  # of the replica, beyond what it has without streams
    replica_bytes: float  # memory of a replica without streams
    record_bytes: float
    store_save_cpu_s: float
    store_save_bytes: float  # that the store receives, with the protocol around the record
    store_memory_bytes: float
    client_in_bytes: float  # a second, from the client, with the headers of the websocket
    client_out_bytes: float  # a second, to the client
    takeover_cpu_s: float  # of the replica that takes a stream up
    takeover_store_cpu_s: float
    takeovers_s: float  # streams a second that one replica took up, all coming at once
    balancer_cpu: float  # of a core of HAProxy
    saves: float  # a second, as it was while measured; where the machine is busy they are fewer than frames / INDRNN_CHECKPOINT_FRAMES
    sent_late: float  # part of the frames that were sent more than a frame late, because the machine was busy: with many, all above is rough


class Camera(WSListener):
    """One stream, as bare as it can be."""

    def __init__(self, payload: bytes, frames: int) -> None:
        self.payload, self.frames = payload, frames
        self.session = ""
        self.sent = self.answered = self.acked = 0
        self.received_bytes = 0
        self.opened = asyncio.get_running_loop().create_future()
        self.failure = ""

    def on_ws_connected(self, transport: WSTransport) -> None:
        self.transport = transport

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.BINARY:
            data = frame.get_payload_as_bytes()
            self.received_bytes += len(data)
            _, _, _, count, first = protocol.HEADER.unpack_from(data)
            self.answered = first + count
            if self.answered - self.acked >= ACK_EVERY:
                self.acked = self.answered
                transport.send(WSMsgType.BINARY, protocol.HEADER.pack(1, 3, 0, 0, self.acked))
        elif frame.msg_type == WSMsgType.TEXT:
            self.received_bytes += len(frame.get_payload_as_bytes())
            message = json.loads(frame.get_payload_as_utf8_text())
            if message["type"] == "opened":
                self.session, self.sent = message["session"], message["next_frame"]
                self.answered = self.acked = self.sent
                self.opened.set_result(None)
            elif message["type"] in ("error", "draining"):
                self.failure = str(message)
        elif frame.msg_type == WSMsgType.PING:
            transport.send_pong(frame.get_payload_as_bytes())

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        if not self.opened.done():
            self.opened.set_exception(ConnectionError(self.failure or "the stream was not opened"))
            self.opened.exception()  # whoever waits hears it; whoever does not need not

    def send(self) -> None:
        index = self.sent % self.frames
        size = len(self.payload) // self.frames
        self.transport.send(WSMsgType.BINARY, protocol.HEADER.pack(1, 1, 0, 1, self.sent) + self.payload[index * size : (index + 1) * size])
        self.sent += 1


async def connect(url: str, model: str, payload: bytes, frames: int, session: str = "", ack: int = 0) -> Camera:
    query = f"answers=binary&scores=all{f'&session={session}&ack={ack}' if session else ''}"
    address = f"{url.replace('http', 'ws', 1)}/v1/models/{model}/stream?{query}"
    _, camera = await ws_connect(lambda: Camera(payload, frames), address, enable_auto_ping=False)
    await asyncio.wait_for(camera.opened, 30)
    return camera


async def pace(cameras: list[Camera], seconds: float) -> float:
    """Each camera sends at its own rate; they take turns evenly. Returns the part of the frames that were sent more than a frame late."""
    began, done, tardy = time.monotonic(), 0, 0
    while (passed := time.monotonic() - began) < seconds:
        due = int(passed * FPS * len(cameras))
        tardy += max(0, due - done - len(cameras))
        while done < due:
            cameras[done % len(cameras)].send()
            done += 1
        await asyncio.sleep(0.002)
    late = max(camera.sent - camera.answered for camera in cameras)
    if late > 2 * FPS or any(camera.failure for camera in cameras):
        raise RuntimeError(
            f"the replica does not keep this pace ({late} frames late): fewer streams (--streams); {[c.failure for c in cameras if c.failure][:1]}"
        )
    return tardy / done


def usage(url: str) -> Usage:
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    figures = {line.split()[0]: float(line.split()[1]) for line in lines if line and line[0] != "#" and "{" not in line}
    return Usage(figures["process_cpu_seconds_total"], figures["process_resident_memory_bytes"], figures)


def store_usage(store: valkey_process.Valkey) -> Usage:
    told = "".join(store.cli("INFO", section) for section in ("cpu", "memory", "stats"))
    figures = {name: float(value) for name, _, value in (line.partition(":") for line in told.split()) if value.replace(".", "", 1).isdigit()}
    return Usage(figures["used_cpu_sys"] + figures["used_cpu_user"], figures["used_memory"], figures)


@contextmanager
def replica(folder: Path, name: str, streams: int, store: valkey_process.Valkey | None = None) -> Iterator[server_process.Server]:
    settings = {"INDRNN_THREADS": "1", "INDRNN_SESSIONS": str(3 * streams), "INDRNN_CONNECTIONS": str(2 * streams)}
    if store is not None:
        settings["INDRNN_STORE"] = f"redis://127.0.0.1:{store.port}/0"
    (folder / "models").mkdir(exist_ok=True)
    with server_process.running(folder / "models", folder / f"log-{name}", **settings) as server:
        yield server


@dataclass(frozen=True)
class _Load:
    """What streams have used while they ran."""

    empty: Usage  # before there were streams
    begun: Usage
    ended: Usage
    cameras: list[Camera]
    late: float
    beside: float  # of a core, of what the streams went through or were kept in


async def measure(streams: int, seconds: float) -> Costs:
    clip = np.random.default_rng(0).normal(size=(64, 13, 3)).astype("<f4")
    payload, frames = clip.tobytes(), len(clip)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with replica(folder, "plain", streams) as server:
            plain = await _load(server.url, server.url, payload, frames, streams, seconds, lambda: 0.0)
            for camera in plain.cameras:
                camera.transport.disconnect()
            with balancer(folder, server.url) as (url, cpu_s):
                balanced = await _load(url, server.url, payload, frames, streams, seconds, cpu_s)
        with valkey_process.running(folder / "store") as store, replica(folder, "other", streams, store) as other:
            if valkey_process.need_program().path is None:
                _as_urgent_as_we_are(store.container)
            with replica(folder, "kept", streams, store) as server:
                empty = store_usage(store)
                kept = await _load(server.url, server.url, payload, frames, streams, seconds, lambda: store_usage(store).cpu_s)
                await asyncio.sleep(1.0)  # what is not saved yet
                full = store_usage(store)
                server.process.kill()
                server.process.wait(30)
            taker, taker_store = usage(other.url), store_usage(store)
            began = time.monotonic()
            back = await asyncio.gather(*(connect(other.url, MODEL, payload, frames, camera.session, camera.acked) for camera in kept.cameras))
            took_s = time.monotonic() - began
            taken, taken_store = usage(other.url), store_usage(store)
            await pace(list(back), 1.0)  # they really go on
    if taken.figures["indrnn_sessions_taken_up_total"] != streams:
        raise RuntimeError(f"{taken.figures['indrnn_sessions_taken_up_total']:.0f} of {streams} streams were taken up")
    header, text = protocol.HEADER.size, 6  # bytes of our header, and of the websocket's with its mask
    every = plain.cameras
    saves_seen, saves, sent = (
        kept.ended.figures[name] - before.figures[name]
        for name, before in (("indrnn_store_saves_total", kept.begun), ("indrnn_store_saves_total", kept.empty), ("indrnn_store_bytes_total", kept.empty))
    )
    stream_cpu, kept_cpu = ((load.ended.cpu_s - load.begun.cpu_s) / seconds / streams for load in (plain, kept))
    return Costs(
        streams=streams,
        stream_cpu=stream_cpu,
        save_cpu_s=max(0.0, kept_cpu - stream_cpu) * seconds * streams / saves_seen,
        memory_bytes=(plain.ended.memory - plain.empty.memory) / streams,
        replica_bytes=plain.empty.memory,
        record_bytes=sent / saves,
        store_save_cpu_s=kept.beside * seconds / saves_seen,
        store_save_bytes=(full.figures["total_net_input_bytes"] - empty.figures["total_net_input_bytes"]) / saves,
        store_memory_bytes=(full.memory - empty.memory) / streams,
        client_in_bytes=FPS * (len(payload) / frames + header + text) + FPS / ACK_EVERY * (header + text),
        client_out_bytes=sum(camera.received_bytes for camera in every) / sum(camera.answered for camera in every) * FPS,
        takeover_cpu_s=(taken.cpu_s - taker.cpu_s) / streams,
        takeover_store_cpu_s=(taken_store.cpu_s - taker_store.cpu_s) / streams,
        takeovers_s=streams / took_s,
        balancer_cpu=balanced.beside / streams,
        saves=saves_seen / seconds / streams,
        sent_late=max(plain.late, balanced.late, kept.late),
    )


async def _load(url: str, watched: str, payload: bytes, frames: int, streams: int, seconds: float, beside: Callable[[], float]) -> _Load:
    empty = usage(watched)
    cameras = [await connect(url, MODEL, payload, frames) for _ in range(streams)]
    await pace(cameras, SETTLE_S)
    begun, beside_begun = usage(watched), beside()
    late = await pace(cameras, seconds)
    return _Load(empty, begun, usage(watched), cameras, late, (beside() - beside_begun) / seconds)


def _as_urgent_as_we_are(container: str) -> int:
    """Run under `nice`, all that is measured has the same claim to the processor: a store that waits for it saves less often. Returns the process."""
    told = subprocess.run(["docker", "inspect", "--format", "{{.State.Pid}}", container], check=True, capture_output=True, text=True).stdout
    process = int(told)
    os.setpriority(os.PRIO_PROCESS, process, os.getpriority(os.PRIO_PROCESS, 0))
    return process


@contextmanager
def balancer(folder: Path, url: str) -> Iterator[tuple[str, Callable[[], float]]]:
    """HAProxy as docker/scale has it, before one replica of this machine: where it listens, and the seconds of processor it has used."""
    port = valkey_process.free_port()
    text = (ROOT / "docker" / "scale" / "haproxy.cfg").read_text()
    text = re.sub(r"server-template \S+ \d+ indrnn:8000", f"server replica {url.removeprefix('http://')} init-addr last,libc", text)
    text = text.replace(" resolvers docker init-addr none", "").replace("bind :8000", f"bind 127.0.0.1:{port}")
    (folder / "haproxy.cfg").write_text(text.replace("bind :8404", f"bind 127.0.0.1:{valkey_process.free_port()}"))
    image, name = os.environ.get("HAPROXY_IMAGE", "haproxy:3.2"), f"costs-{port}"
    command = ["docker", "run", "--detach", "--rm", "--name", name, "--network", "host", "--volume", f"{folder}:/c:ro", image]
    subprocess.run([*command, "haproxy", "-db", "-f", "/c/haproxy.cfg"], check=True, capture_output=True)
    try:
        process = Path("/proc") / str(_as_urgent_as_we_are(name)) / "stat"

        def cpu_s() -> float:
            ticks = process.read_text().rpartition(")")[2].split()[11:13]
            return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

        time.sleep(2.5)  # until it has seen the replica
        yield f"http://127.0.0.1:{port}", cpu_s
    finally:
        subprocess.run(["docker", "rm", "--force", name], check=False, capture_output=True)


def run(streams: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Medians over the rounds, with where they were measured."""
    load = os.getloadavg()[0]
    found = [asdict(asyncio.run(measure(streams, seconds))) for _ in range(rounds)]
    costs = {name: float(f"{statistics.median(each[name] for each in found):.4g}") for name in found[0]}
    where = {"date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(), "rounds": rounds, "seconds": seconds, "load before": round(load, 1)}
    return {"where": where, "costs": costs}
