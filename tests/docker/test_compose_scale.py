"""What people get from compose.scale.yaml: streams go on, with the same bits, whatever happens to the replica that serves them or to the store."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import secrets
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from service.client import Answer, Client
from tests import toy_models
from tests.docker.compose_stack import ROOT, Stack, bare_environment, free_port, need, need_image, run
from tests.docker.test_balancers import HAPROXY, NGINX, PROMETHEUS, SCALED, VALKEY
from tests.survival import streams
from tests.survival.streams import Streaming, percentiles
from tests.toy_models import CHANNELS

MODEL, OWN = "rehab-exercises", "own-model"
FRAMES, AT, RATE = 240, 80, 60.0  # of a stream, before what happens to it, a second
SECONDS = float(os.environ.get("SURVIVAL_SECONDS", "20"))  # of fire; 60 where there is time for it
STREAMS, FPS = 200, 10.0  # under fire
ROLL_S = 40.0  # longer than a rolling update takes
STALL_S = 10.0  # on a machine with other work; the report says what it was

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]

Frames = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of models as they are before and after a rolling update: the version of the first is gone from the second."""
    folders = {version: tmp_path_factory.mktemp(f"version-{version}") for version in ("1", "2")}
    for extra, (version, folder) in enumerate(folders.items()):
        toy_models.write_toy(folder, OWN, dataclasses.replace(CHANNELS, units=CHANNELS.units + 8 * extra), version=version)
        folder.chmod(0o755)  # for the container's user
    return folders


@pytest.fixture(scope="module")
def stack(versions: dict[str, Path]) -> Iterator[Stack]:
    need("docker", "compose", "version")
    images = {
        "VALKEY_IMAGE": need_image("VALKEY_IMAGE", *VALKEY),
        "HAPROXY_IMAGE": need_image("HAPROXY_IMAGE", *HAPROXY),
        "PROMETHEUS_IMAGE": need_image("PROMETHEUS_IMAGE", *PROMETHEUS),
    }
    port, watch = free_port(), free_port()
    environment = {
        **bare_environment(),
        **images,
        "INDRNN_PORT": str(port),
        "PROMETHEUS_PORT": str(watch),
        "REPLICAS": "3",
        "INDRNN_DRAIN_S": "3",
        "INDRNN_MODELS": str(versions["1"]),
    }
    started = Stack(f"indrnn-scale-{secrets.token_hex(4)}", environment, f"http://127.0.0.1:{port}", "", SCALED)
    try:
        started.compose("--profile", "watch", "up", "--build", "--detach", "indrnn", "valkey", "haproxy", "prometheus", timeout_s=500)
        whole_again(started)
        yield started
    finally:
        started.compose("--profile", "watch", "down", "--volumes", "--remove-orphans", "--timeout", "3", timeout_s=120)


def wait_for(true: Callable[[], bool], what: str, within_s: float = 30) -> None:
    end = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end, f"not within {within_s:.0f} s: {what}"
        time.sleep(0.2)


def address(container: dict[str, Any]) -> str:
    [found] = [network["IPAddress"] for name, network in container["NetworkSettings"]["Networks"].items() if name.endswith("_front")]
    return str(found)


def ready_servers(stack: Stack) -> int:
    """As HAProxy counts them."""
    [container] = stack.containers("haproxy")
    lines = httpx.get(f"http://{address(container)}:8404/metrics").text.splitlines()
    return sum(line.startswith('haproxy_server_status{proxy="streams"') and 'state="UP"' in line and line.endswith(" 1") for line in lines)


def whole_again(stack: Stack) -> None:
    """Replicas that are up, by their own word: HAProxy takes one that it has just found for ready until a check fails."""
    stack.compose("start", "indrnn")
    wait_for(lambda: sum(figure(container, "indrnn_sockets_live", -1) >= 0 for container in running(stack)) == 3, "three replicas answer", 60)
    wait_for(lambda: ready_servers(stack) == 3, "HAProxy sees three replicas", 60)


def figure(container: dict[str, Any], name: str, silent: int = 0) -> int:
    """`silent` where the container does not answer."""
    try:
        lines = httpx.get(f"http://{address(container)}:8000/metrics", timeout=2).text.splitlines()
    except httpx.TransportError:
        return silent
    [value] = [line.split()[1] for line in lines if line.startswith(f"{name} ")]
    return int(float(value))


def running(stack: Stack) -> list[dict[str, Any]]:
    return [container for container in stack.containers() if container["State"]["Status"] == "running"]


def serving(stack: Stack) -> str:
    """The container that has the only stream."""
    [found] = [container["Id"] for container in running(stack) if figure(container, "indrnn_sockets_live")]
    return str(found)


def taken_up(stack: Stack, but: Sequence[str] = ()) -> int:
    """Sessions that went on at a replica which had not begun them."""
    return sum(figure(container, "indrnn_sessions_taken_up_total") for container in running(stack) if container["Id"] not in but)


@dataclass
class Told:
    """What a client of a stream heard."""

    frames: list[int]
    scores: Frames
    stall_s: float


def play(stack: Stack, clip: Frames, happens: Callable[[], None] | None = None) -> Told:
    """Streams the clip at its rate; `happens` in the middle, beside it."""
    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            assert happens is not None
            happens()
        except BaseException as error:  # pytest.fail's is none of Exception
            failures.append(error)

    beside = threading.Thread(target=guarded)

    def camera() -> Iterator[Frames]:
        for number in range(len(clip)):
            if number == AT and happens is not None:
                beside.start()
            time.sleep(1 / RATE)
            yield clip[number : number + 1]

    frames, scores, stall_s = [], [], 0.0
    with Client(stack.url) as client, client.stream(MODEL) as stream:
        last = time.monotonic()
        for answer in stream.play(camera()):
            now = time.monotonic()
            stall_s, last = max(stall_s, now - last), now
            frames.append(answer.frame)
            assert answer.scores is not None
            scores.append(answer.scores)
        if happens is not None:
            beside.join(60)
    assert not failures, failures
    return Told(frames, np.stack(scores), stall_s)


@pytest.fixture(scope="module")
def clip() -> Frames:
    recorded = json.loads((ROOT / "service" / "samples" / MODEL / "deep-squat.json").read_text())["frames"]
    frames = np.asarray(recorded, np.float32)
    return np.tile(frames, (FRAMES // len(frames) + 1, *[1] * (frames.ndim - 1)))[:FRAMES]


@pytest.fixture(scope="module")
def undisturbed(stack: Stack, clip: Frames) -> Told:
    return play(stack, clip)


def check(told: Told, undisturbed: Told, what: str) -> None:
    print(f"{what}: stall {told.stall_s:.2f} s, undisturbed {undisturbed.stall_s:.2f} s")
    assert told.frames == list(range(FRAMES))  # each once, none lost
    np.testing.assert_array_equal(told.scores, undisturbed.scores)
    assert told.stall_s < STALL_S


def test_a_stream_through_the_balancer_says_what_a_clip_says(stack: Stack, clip: Frames, undisturbed: Told) -> None:
    with Client(stack.url) as client:
        whole = client.predict(MODEL, clip)
    assert undisturbed.frames == list(range(FRAMES))
    np.testing.assert_array_equal(undisturbed.scores[-1], whole.scores)


def test_steps_of_a_session_may_go_to_any_replica(stack: Stack, clip: Frames, undisturbed: Told) -> None:
    """Round the balancer, each step to the next replica: none has seen the step before."""
    replicas = [f"http://{address(container)}:8000" for container in stack.containers()]
    assert len(replicas) == 3
    with httpx.Client(timeout=30) as http:
        session = http.post(f"{stack.url}/v1/models/{MODEL}/sessions").json()["session"]
        for number, first in enumerate(range(0, 90, 10)):
            body = clip[first : first + 10].tobytes()
            url = f"{replicas[number % 3]}/v1/sessions/{session}/frames?first={first}&scores=all"
            answer = http.post(url, content=body, headers={"content-type": "application/octet-stream"})
            assert answer.status_code == 200, answer.text
            np.testing.assert_array_equal(np.asarray(answer.json()["scores"], np.float32), undisturbed.scores[first : first + 10])


def test_the_replica_that_serves_a_stream_is_killed(stack: Stack, clip: Frames, undisturbed: Told) -> None:
    killed: list[str] = []

    def kill() -> None:
        killed.append(serving(stack))
        run(["docker", "kill", "--signal", "KILL", killed[0]])

    try:
        check(play(stack, clip, kill), undisturbed, "killed")
        assert taken_up(stack, but=killed) > 0
    finally:
        whole_again(stack)


def test_the_replica_that_serves_a_stream_is_stopped(stack: Stack, clip: Frames, undisturbed: Told) -> None:
    stopped: list[str] = []

    def stop() -> None:
        stopped.append(serving(stack))
        run(["docker", "stop", "--time", "15", stopped[0]])

    try:
        check(play(stack, clip, stop), undisturbed, "stopped")
        assert taken_up(stack, but=stopped) > 0
        [state] = [container["State"] for container in stack.containers() if container["Id"] == stopped[0]]
        assert state["ExitCode"] == 0
    finally:
        whole_again(stack)


def test_the_store_is_killed_and_comes_back(stack: Stack, clip: Frames, undisturbed: Told) -> None:
    [store] = [container["Id"] for container in stack.containers("valkey")]

    def restart() -> None:
        run(["docker", "kill", "--signal", "KILL", store])
        time.sleep(0.5)
        run(["docker", "start", store])

    check(play(stack, clip, restart), undisturbed, "store restarted")


def test_a_replica_that_hangs_is_found_out(stack: Stack, clip: Frames, undisturbed: Told) -> None:
    """Nothing is refused, nothing answers, as where a machine has vanished: HAProxy notices, closes the connection, and the client goes elsewhere."""
    paused: list[str] = []

    def pause() -> None:
        paused.append(serving(stack))
        run(["docker", "pause", paused[0]])

    try:
        check(play(stack, clip, pause), undisturbed, "hung")
        [state] = [container["State"]["Status"] for container in stack.containers() if container["Id"] == paused[0]]
        assert state == "paused"  # it was never asked again
    finally:
        for container in paused:
            subprocess.run(["docker", "unpause", container], check=False, capture_output=True, timeout=30)
        whole_again(stack)


def test_prometheus_has_every_replica(stack: Stack) -> None:
    url = f"http://127.0.0.1:{stack.environment['PROMETHEUS_PORT']}/api/v1/query"

    def up() -> dict[str, int]:
        try:
            found = httpx.get(url, params={"query": "sum by (job) (up)"}).json()["data"]["result"]
        except httpx.TransportError:
            return {}
        return {each["metric"]["job"]: int(each["value"][1]) for each in found}

    wait_for(lambda: up() == {"indrnn": 3, "haproxy": 1}, "Prometheus reaches three replicas and HAProxy")


def test_nginx_does_in_its_place(stack: Stack, clip: Frames, undisturbed: Told) -> None:
    image, name, port = need_image("NGINX_IMAGE", *NGINX), f"{stack.project}-nginx", free_port()
    configuration: Path = ROOT / "docker" / "scale" / "nginx.conf"
    command = ["docker", "run", "--detach", "--rm", "--name", name, "--network", f"{stack.project}_front", "--publish", f"127.0.0.1:{port}:8000"]
    run([*command, "--volume", f"{configuration}:/etc/nginx/nginx.conf:ro", image])
    behind = replace(stack, url=f"http://127.0.0.1:{port}")

    def answers() -> bool:
        try:
            return httpx.get(f"{behind.url}/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    killed: list[str] = []

    def kill() -> None:
        killed.append(serving(stack))
        run(["docker", "kill", "--signal", "KILL", killed[0]])

    try:
        wait_for(answers, "nginx answers")
        check(play(behind, clip, kill), undisturbed, "killed behind nginx")
    finally:
        run(["docker", "rm", "--force", name])
        whole_again(stack)


def test_a_replica_is_cut_off_from_the_store(stack: Stack, clip: Frames, undisturbed: Told) -> None:
    """It goes on from memory, and saves what it missed when the network is back."""
    network, cut = f"{stack.project}_store", []

    def cut_off() -> None:
        cut.append(serving(stack))
        run(["docker", "network", "disconnect", network, cut[0]])

    def unsaved() -> int:
        [container] = [container for container in stack.containers() if container["Id"] == cut[0]]
        return figure(container, "indrnn_store_degraded")

    try:
        check(play(stack, clip, cut_off), undisturbed, "cut off")
        wait_for(lambda: unsaved() == 1, "the replica says that it has no store")
    finally:
        for container in cut:
            run(["docker", "network", "connect", network, container])
    wait_for(lambda: unsaved() == 0, "the replica has its store again")


def streaming(stack: Stack, seconds: float) -> tuple[list[Streaming], list[Frames]]:
    """Clients that hold every answer against what the protocol promises, and their frames."""
    frames = streams.clips(CHANNELS, STREAMS, int(FPS * seconds))
    return [Streaming(lambda: stack.url, OWN, clip, len(CHANNELS.classes), FPS, random.Random(number)) for number, clip in enumerate(frames)], frames


def told(what: str, clients: Sequence[Streaming]) -> float:
    """Says how long the streams waited; returns the 99th percentile."""
    waits = [client.stall for client in clients]
    refusals = sum((client.refusals for client in clients), Counter())
    print(f"\n{what}: {STREAMS} streams moved {sum(client.moves for client in clients)} times; longest wait {percentiles(waits)}; refused {dict(refusals)}")
    return float(np.quantile(waits, 0.99))


def test_replicas_are_killed_again_and_again_under_many_streams(stack: Stack) -> None:
    """Random ones, and once the store. SURVIVAL_SECONDS says for how long; no frame is lost, none counts twice, and all have the bits of an undisturbed run."""
    chance = random.Random(0)

    def fire() -> int:
        [store] = [container["Id"] for container in stack.containers("valkey")]
        begun, killed, store_at = time.monotonic(), 0, SECONDS / 2
        while (now := time.monotonic() - begun) < SECONDS:
            if now > store_at:
                victim, store_at = store, np.inf
            else:
                victim, killed = chance.choice(running(stack))["Id"], killed + 1
            run(["docker", "kill", "--signal", "KILL", victim])
            time.sleep(chance.uniform(0.5, 1.0))
            run(["docker", "start", victim])
            time.sleep(chance.uniform(0.5, 2.5))
        return killed

    async def scenario() -> int:
        beside = asyncio.create_task(asyncio.to_thread(fire))
        await asyncio.gather(*(client.run() for client in clients))
        killed = await beside
        assert await streams.differing(list(clients), frames, stack.url, OWN) == []
        return killed

    clients, frames = streaming(stack, SECONDS + 3)
    try:
        killed = asyncio.run(scenario())
        p99 = told(f"{killed} replicas killed, the store once", clients)
        assert killed >= SECONDS / 5
        assert sum(client.moves for client in clients) >= STREAMS / 4, "next to nothing was disturbed"
        assert p99 < STALL_S
    finally:
        whole_again(stack)


def test_a_rolling_update_to_another_version_of_a_model(stack: Stack, versions: dict[str, Path]) -> None:
    """All replicas are replaced by ones that have another version of one model and the same one of another. Streams of both go on."""
    old = {container["Id"] for container in stack.containers()}
    updated = replace(stack, environment={**stack.environment, "INDRNN_MODELS": str(versions["2"])})
    compose = {**updated.environment, "COMPOSE_FILE": ":".join(SCALED), "COMPOSE_PROJECT_NAME": stack.project}
    with Client(stack.url) as client, ThreadPoolExecutor() as threads:
        rng = np.random.default_rng(5)
        clips = {name: rng.normal(size=(6000, *client.model(name).frame_shape)).astype(np.float32) for name in (MODEL, OWN)}
        before = fast(client, OWN, clips[OWN])
        rolled = threads.submit(run, ["docker/roll.sh"], compose, 180)
        found: list[int] = []

        def watch() -> None:
            while not rolled.done():
                found.append(ready_servers(stack))
                time.sleep(0.2)

        watched = threads.submit(watch)
        played = {name: threads.submit(until, stack, name, clips[name], rolled) for name in clips}
        answers = {name: one.result() for name, one in played.items()}
        rolled.result()
        watched.result()
        new = {container["Id"] for container in stack.containers()}
        assert len(new) == 3
        assert not new & old
        assert max(found) == 6  # HAProxy had found the new ones before the old ones went
        for name, heard in answers.items():
            assert [answer.frame for answer in heard] == list(range(len(heard))), name
        same = fast(client, MODEL, clips[MODEL][: len(answers[MODEL])])
        np.testing.assert_array_equal([answer.scores for answer in answers[MODEL]], same)
        [changed] = [answer.changed for answer in answers[OWN] if answer.changed is not None]
        assert changed.version == "2"
        scores = np.stack([answer.scores for answer in answers[OWN] if answer.scores is not None])
        np.testing.assert_array_equal(scores[: changed.frame], before[: changed.frame])
        warmed_up = fast(client, OWN, clips[OWN][changed.warm_from : len(scores)])
        np.testing.assert_array_equal(scores[changed.frame :], warmed_up[changed.frame - changed.warm_from :])
    wait_for(lambda: ready_servers(stack) == 3, "HAProxy forgets the old ones")


def test_a_rolling_update_to_another_version_under_many_streams(stack: Stack, versions: dict[str, Path]) -> None:
    """Back to the first version, while streams play: each is told once from where on another model answers, and has that one's bits, warmed up."""
    old = {container["Id"] for container in stack.containers()}
    compose = {**stack.environment, "COMPOSE_FILE": ":".join(SCALED), "COMPOSE_PROJECT_NAME": stack.project}
    clients, frames = streaming(stack, ROLL_S)

    async def scenario() -> None:
        before = [await streams.undisturbed(stack.url, OWN, clip) for clip in frames]
        playing = asyncio.gather(*(client.run() for client in clients))
        await asyncio.sleep(2)
        await asyncio.to_thread(run, ["docker/roll.sh"], compose, 180)
        await playing
        for client, clip, first in zip(clients, frames, before, strict=True):
            [change] = client.changes
            place, warm_from = change["frame"], change["warm_from"]
            after = await streams.undisturbed(stack.url, OWN, clip[warm_from:])
            assert change["version"] == "1"
            assert np.array_equal(client.scores[:place], first[:place])
            assert np.array_equal(client.scores[place:], after[place - warm_from :])

    asyncio.run(scenario())
    p99 = told("rolling update", clients)
    assert not {container["Id"] for container in stack.containers()} & old
    assert p99 < STALL_S
    wait_for(lambda: ready_servers(stack) == 3, "HAProxy forgets the old ones")


def fast(client: Client, name: str, clip: Frames) -> Frames:
    with client.stream(name) as stream:
        return np.stack([answer.scores for answer in stream.play(clip, chunk=50) if answer.scores is not None])


def until(stack: Stack, name: str, clip: Frames, rolled: Future[str]) -> list[Answer]:
    """What a stream hears that goes on for a second after that."""

    def camera() -> Iterator[Frames]:
        left = RATE
        for number in range(len(clip)):
            time.sleep(1 / RATE)
            yield clip[number : number + 1]
            left -= rolled.done()
            if left <= 0:
                return

    with Client(stack.url) as client, client.stream(name) as stream:
        return list(stream.play(camera()))
