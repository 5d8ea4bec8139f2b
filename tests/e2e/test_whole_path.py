"""From recordings to live streams, with the commands a user types: train, export, prove, serve; then the same clip in every way there is."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import tomli_w
from websockets.sync.client import ClientConnection, connect

from service.client import AsyncClient
from tests.server_process import Server, running
from tests.training.synthetic import clip_set

torch = pytest.importorskip("torch", reason="torch is not installed (extra `train`): the path from training to serving is not tested")

ROOT = Path(__file__).resolve().parents[2]
OTHERS = 32
Scores = npt.NDArray[np.float32]

CONFIG = {
    "name": "movements",
    "data": {
        "reader": "clip_folder",
        "options": {"units": "metres", "layout": "body-13", "fps": 30.0},
        "test": {"split": ["test"]},
        "validation": {"subject": ["c"]},
    },
    "model": {"kind": "residual", "layers": 2, "units": 32, "view": "body", "horizon": 60, "missing": True},
    "train": {"epochs": 6, "batch": 8, "learning_rate": 0.01},
    "augment": {"drop_joints": 0.2, "rotate": 20.0},
}


def python(*arguments: object) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, clips = tmp_path_factory.mktemp("recordings"), clip_set(48, joints=13, shortest=30, longest=90)
    lines = ["file,label,split,subject"]
    for i, frames in enumerate(clips.frames):
        np.save(folder / f"{i}.npy", frames)
        lines.append(f"{i}.npy,{clips.classes[clips.labels[i]]},{clips.groups['split'][i]},{clips.groups['subject'][i]}")
    (folder / "index.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "movements.toml").write_text(tomli_w.dumps(CONFIG))
    python("-m", "training", "train", folder / "movements.toml", "--data", recordings, "--out", folder / "runs")
    return folder / "runs" / "movements" / "seed-0"


@pytest.fixture(scope="module")
def models(run: Path, recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    python("-m", "training", "export", run, "--to", folder / "movements" / "1")
    assert "verified" in python("-m", "training", "verify", folder / "movements" / "1" / "model.onnx", "--clips", recordings, "--run", run)
    return folder


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(models, tmp_path_factory.mktemp("server") / "log", "--deadline-s", "60") as started, company(started):
        yield started


@contextmanager
def company(server: Server) -> Iterator[None]:
    """32 other streams that send chunks of unequal length all the while; each must be answered in full."""
    stop, answered, faults = threading.Event(), [0] * OTHERS, list[BaseException]()

    async def stream(client: AsyncClient, i: int) -> None:
        rng = np.random.default_rng(i)
        async with client.stream("movements") as stream:
            while not stop.is_set():
                chunk = rng.normal(0, 1, (int(rng.integers(1, 20)), 13, 3)).astype(np.float32)
                async for _ in stream.play(chunk, chunk=int(rng.integers(1, 8))):
                    answered[i] += 1

    async def everyone() -> None:
        async with AsyncClient(server.url) as client:
            await asyncio.gather(*(stream(client, i) for i in range(OTHERS)))

    def work() -> None:
        try:
            asyncio.run(everyone())
        except BaseException as error:
            faults.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)
    assert not faults
    assert min(answered) > 0


@pytest.fixture(scope="module")
def clip() -> npt.NDArray[np.float32]:
    frames = max(clip_set(9, seed=5, joints=13, shortest=60, longest=90).frames, key=len).copy()
    frames[20:30, 4:7] = np.nan  # a limb out of sight for a third of a second
    return frames


@pytest.fixture(scope="module")
def whole(server: Server, clip: npt.NDArray[np.float32]) -> Scores:
    """The scores of every frame, from posting the clip at once."""
    answer = httpx.post(f"{server.url}/v1/models/movements/predict?scores=all", json={"frames": plain(clip)}, timeout=60)
    assert answer.status_code == 200, answer.text
    return np.array(answer.json()["scores"], np.float32)


def plain(frames: npt.NDArray[np.float32]) -> object:
    return np.where(np.isnan(frames), None, frames.astype(object)).tolist()


def cuts(length: int, seed: int) -> list[tuple[int, int]]:
    """Chunks of 1 to 13 frames."""
    rng = np.random.default_rng(seed)
    edges = [0]
    while edges[-1] < length:
        edges.append(min(length, edges[-1] + int(rng.integers(1, 14))))
    return list(pairwise(edges))


def test_the_trained_network_says_what_the_service_says(run: Path, clip: npt.NDArray[np.float32], whole: Scores) -> None:
    from training import checkpoint

    network = checkpoint.load(run / checkpoint.BEST).network()
    with torch.no_grad():
        logits, _ = network(torch.from_numpy(clip)[None], torch.tensor([len(clip)]), network.initial_state(1))
    np.testing.assert_allclose(torch.softmax(logits, -1)[0].numpy(), whole, atol=1e-4)


def test_binary_and_npy_bodies_give_the_same_bits_as_json(server: Server, clip: npt.NDArray[np.float32], whole: Scores, tmp_path: Path) -> None:
    np.save(tmp_path / "clip.npy", clip)
    url = f"{server.url}/v1/models/movements/predict?scores=all"
    for body, kind in ((clip.tobytes(), "application/octet-stream"), ((tmp_path / "clip.npy").read_bytes(), "application/x-npy")):
        answer = httpx.post(url, content=body, headers={"content-type": kind}, timeout=60)
        assert np.array_equal(np.array(answer.json()["scores"], np.float32), whole)


def test_rest_in_uneven_chunks(server: Server, clip: npt.NDArray[np.float32], whole: Scores) -> None:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        session = http.post("/v1/models/movements/sessions", json={}).json()["session"]
        for first, end in cuts(len(clip), 1):
            answer = http.post(f"/v1/sessions/{session}/frames?scores=all", json={"first": first, "frames": plain(clip[first:end])})
            assert np.array_equal(np.array(answer.json()["scores"], np.float32), whole[first:end])
        http.delete(f"/v1/sessions/{session}")


def test_websocket_in_uneven_chunks_cut_in_the_middle_and_resumed(server: Server, clip: npt.NDArray[np.float32], whole: Scores) -> None:
    """The socket is dropped without a word, answers on their way are lost; the stream goes on over a new socket, the last part over REST."""
    address = f"{server.ws}/v1/models/movements/stream"
    chunks, scores = cuts(len(clip), 2), np.full_like(whole, np.nan)
    third = len(chunks) // 3
    with connect(address) as socket:
        session = open_stream(socket)
        for first, end in chunks[:third]:
            send(socket, clip, first, end)
        keep(socket, scores)  # one answer read, the others lost
        socket.socket.close()
    have = int(np.isnan(scores).any(1).argmax())
    with connect(address) as socket:
        socket.send(json.dumps({"type": "open", "session": session, "ack": have}))
        opened = json.loads(socket.recv(60))
        next_frame = opened["next_frame"]
        while np.isnan(scores[:next_frame]).any():
            keep(socket, scores)
        rest = [(max(first, next_frame), end) for first, end in chunks if end > next_frame]
        for first, end in rest[: len(rest) // 2]:
            send(socket, clip, first, end)
            keep(socket, scores)
    with httpx.Client(base_url=server.url, timeout=60) as http:
        at = http.get(f"/v1/sessions/{session}").json()["next_frame"]
        answer = http.post(f"/v1/sessions/{session}/frames?scores=all", json={"first": at, "frames": plain(clip[at:])}).json()
        scores[at:] = answer["scores"]
    assert np.array_equal(scores, whole)


def open_stream(socket: ClientConnection) -> str:
    socket.send(json.dumps({"type": "open"}))
    session: str = json.loads(socket.recv(60))["session"]
    return session


def send(socket: ClientConnection, clip: npt.NDArray[np.float32], first: int, end: int) -> None:
    header = np.array([(1, 1, 0, end - first, first)], dtype="<u1,<u1,<u2,<u4,<u8").tobytes()
    socket.send(header + clip[first:end].tobytes())


def keep(socket: ClientConnection, scores: Scores) -> None:
    answer = json.loads(socket.recv(60))
    assert answer["type"] == "scores", answer
    scores[answer["first"] : answer["first"] + answer["count"]] = answer["scores"]
    socket.send(json.dumps({"type": "ack", "first": answer["first"] + answer["count"]}))
