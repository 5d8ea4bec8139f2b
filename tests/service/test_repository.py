"""Models that come, go and are replaced while streams run on them."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import shutil
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from structlog.testing import capture_logs

from model.contract import MODEL_FILE
from service.catalog import Catalog
from service.client import Client
from service.errors import ModelLoading, ModelNotFound, ModelNotReady, ModelRefused, SessionNotFound
from service.frames import Payload
from service.metrics import Metrics
from service.model_files import Entry, Failure, Key, ModelFiles, Place
from service.options import Options
from service.predictor import Predictor
from service.roles import ROLES_FILE
from service.sessions import Session
from service.settings import Settings
from tests import toy_models
from tests.server_process import Server
from tests.toy_models import CHANNELS, WIDE, Toy, example_frames

ALL = Options(scores="all")
OTHER = Toy(seed=8)  # as CHANNELS, but answers otherwise
CLIP = example_frames(CHANNELS, 24)
MANAGER = "one who manages"
BEARER = {"authorization": f"Bearer {MANAGER}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    toy_models.write_toy(tmp_path / "models", "toy", CHANNELS)
    return tmp_path / "models"


def serve(folder: Path, scenario: Callable[[Predictor], Awaitable[None]], **changes: Any) -> None:
    """Without a watcher, unless the settings say how often it looks."""

    async def run() -> None:
        async with Predictor(Catalog.load([folder], "cpu", 1), Settings(**{"watch_s": 0, **changes}), Metrics()) as predictor:
            await scenario(predictor)

    asyncio.run(run())


async def scores_of(predictor: Predictor, version: str | None = None) -> bytes:
    answer = await predictor.predict("toy", version, Payload("array", CLIP, CLIP.nbytes), ALL)
    return answer.scores.tobytes()


async def step(predictor: Predictor, session: Session, count: int) -> bytes:
    first = session.next_frame
    answer = await predictor.advance(session, first, count, Payload("array", CLIP[first : first + count], 100), ALL)
    return answer.scores.tobytes()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  nothing tells
            await asyncio.sleep(0.01)


def test_a_new_version_takes_what_is_new_and_a_session_finishes_on_its_own(folder: Path) -> None:
    async def scenario(predictor: Predictor) -> None:
        alone = await scores_of(predictor)
        session = predictor.open("toy", None, ALL)
        heard = await step(predictor, session, 10)
        toy_models.write_toy(folder, "toy", OTHER, version="2")
        assert await predictor.models.load("toy") == ["2"]
        assert predictor.catalog.versions("toy") == ["1", "2"]
        assert predictor.open("toy", None, ALL).version == "2"
        assert await scores_of(predictor) != alone
        assert await scores_of(predictor, "1") == alone
        await predictor.models.unload("toy", "1")
        with pytest.raises(ModelNotReady, match="being unloaded"):
            predictor.open("toy", "1", ALL)
        heard += await step(predictor, session, 14)
        assert heard == alone
        assert session.version == "1"

    serve(folder, scenario)


def test_a_version_that_is_replaced_under_its_name_keeps_its_sessions(folder: Path) -> None:
    async def scenario(predictor: Predictor) -> None:
        alone, session = await scores_of(predictor), predictor.open("toy", None, ALL)
        heard = await step(predictor, session, 3)
        toy_models.write_toy(folder, "toy", OTHER)
        assert await predictor.models.load("toy", "1") == ["1"]
        assert await predictor.models.load("toy", "1") == []  # the file is as it was
        replaced = await scores_of(predictor)
        assert replaced != alone
        fresh = predictor.open("toy", None, ALL)
        heard += await step(predictor, session, 21)
        assert (heard, await step(predictor, fresh, 24)) == (alone, replaced)
        assert predictor.runner("toy").rows.taken == 1
        await predictor.close(session, "closed")
        await until(lambda: len(list(predictor.models)) == 1)
        assert "indrnn_device_info{" in predictor.metrics.text().decode()  # the one that took its place is still there

    serve(folder, scenario)


def test_what_is_unloaded_is_freed_when_its_last_session_has_ended(folder: Path) -> None:
    toy_models.write_toy(folder, "other", OTHER)

    async def scenario(predictor: Predictor) -> None:
        session, engine = predictor.open("toy", None, ALL), weakref.ref(predictor.runner("toy").engine)
        held = weakref.ref(predictor.runner("toy").engine._run.__self__)  # type: ignore[attr-defined]  # onnxruntime's session, the bulk of it
        assert await predictor.models.unload("toy") == ["1"]
        assert {one["name"]: one["state"] for one in predictor.models.states()} == {"other": "READY", "toy": "UNLOADING"}
        await asyncio.sleep(0.3)
        assert engine() is not None
        await step(predictor, session, 1)
        await predictor.close(session, "closed")
        await until(lambda: held() is None)  # at once, not when the garbage collector comes by
        await until(lambda: gc.collect() >= 0 and engine() is None)
        assert 'model="toy"' not in "".join(line for line in predictor.metrics.text().decode().splitlines() if line.startswith("indrnn_waiting"))
        with pytest.raises(ModelNotFound):
            predictor.open("toy", None, ALL)
        assert await predictor.models.load("toy") == ["1"]
        predictor.open("toy", None, ALL)

    serve(folder, scenario)


def test_sessions_get_so_much_time_and_are_told(folder: Path) -> None:
    class Owner:
        error: Exception | None = None

        def stop(self, error: Exception) -> None:
            self.error = error

    async def scenario(predictor: Predictor) -> None:
        session, owner = predictor.open("toy", None, ALL), Owner()
        predictor.attach(session, owner)
        await predictor.models.unload("toy")
        await until(lambda: session.ended)
        assert session.ended == "drained"
        assert isinstance(owner.error, ModelNotFound)
        with pytest.raises(SessionNotFound):
            await step(predictor, session, 1)
        await until(lambda: not list(predictor.models))

    serve(folder, scenario, unload_s=0.2)


def test_a_clip_under_way_finishes_on_what_it_began_with(folder: Path) -> None:
    frames = example_frames(CHANNELS, 60_000)

    async def scenario(predictor: Predictor) -> None:
        clip = asyncio.create_task(predictor.predict("toy", None, Payload("array", frames, frames.nbytes), Options()))
        await until(lambda: predictor.runner("toy").frames_run)
        await predictor.models.unload("toy")
        assert (await clip).count == len(frames)
        await until(lambda: not list(predictor.models))

    serve(folder, scenario)


def test_a_file_that_is_refused_leaves_what_is_served(folder: Path) -> None:
    async def scenario(predictor: Predictor) -> None:
        alone = await scores_of(predictor)
        path = toy_models.write_failing_self_test(folder, "toy")
        with pytest.raises(ModelRefused, match="self-test: scores differ"):
            await predictor.models.load("toy")
        assert await scores_of(predictor) == alone
        [state] = predictor.models.states()
        assert (state["state"], "a newer file was refused: self-test" in state["reason"]) == ("READY", True)
        path.write_bytes(b"half of a file")
        with pytest.raises(ModelRefused, match="onnxruntime cannot load it"):
            await predictor.models.load("toy", "1")
        assert [failure.version for failure in predictor.catalog.failures] == ["1"]
        toy_models.write_toy(folder, "toy", OTHER)
        assert await predictor.models.load("toy") == ["1"]
        assert not predictor.catalog.failures
        assert await scores_of(predictor) != alone

    serve(folder, scenario)


def test_what_is_not_there(folder: Path) -> None:
    async def scenario(predictor: Predictor) -> None:
        for call in (predictor.models.load, predictor.models.unload):
            with pytest.raises(ModelNotFound, match="boy"):
                await call("boy")
            with pytest.raises(ModelNotFound, match="'7'"):
                await call("toy", "7")
        shutil.rmtree(folder / "toy")
        with pytest.raises(ModelNotFound, match="no folder of model 'toy'"):
            await predictor.models.load("toy")
        assert await scores_of(predictor)

    serve(folder, scenario)


def test_a_directory_that_cannot_be_read_refuses_and_the_watcher_says_so_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing, looks = Path.iterdir, 0

    def refusing(path: Path) -> Iterator[Path]:
        nonlocal looks
        if path == folder:
            looks += 1
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listing(path)

    async def scenario(predictor: Predictor) -> None:
        monkeypatch.setattr(Path, "iterdir", refusing)
        with pytest.raises(ModelRefused, match="cannot be read: Permission denied"):
            await predictor.models.load("toy")
        with capture_logs() as lines:
            await until(lambda: looks > 5)
        assert [line["event"] for line in lines if line["log_level"] == "error"] == ["the models' folders cannot be watched"]
        assert await scores_of(predictor)
        monkeypatch.undo()
        toy_models.write_toy(folder, "new", OTHER)
        await until(lambda: predictor.catalog.serves("new"))

    serve(folder, scenario, watch_s=0.03)


def test_while_a_model_is_loaded_others_are_served_and_it_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go, read = threading.Event(), threading.Event(), ModelFiles.read

    def slowly(files: ModelFiles, key: Key, place: Place) -> Entry | Failure:
        began.set()
        go.wait(20)
        return read(files, key, place)

    async def scenario(predictor: Predictor) -> None:
        monkeypatch.setattr(ModelFiles, "read", slowly)
        toy_models.write_toy(folder, "new", OTHER)
        loading = asyncio.create_task(predictor.models.load("new"))
        await until(began.is_set)
        with pytest.raises(ModelLoading) as caught:
            predictor.open("new", None, ALL)
        assert caught.value.facts["retry_after"] == 1
        assert await scores_of(predictor)
        assert {one["name"]: one["state"] for one in predictor.models.states()} == {"new": "LOADING", "toy": "READY"}
        go.set()
        await loading
        predictor.open("new", None, ALL)

    serve(folder, scenario)


def test_a_file_that_breaks_its_reader_breaks_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(files: ModelFiles, key: Key, place: Place) -> Entry | Failure:
        raise MemoryError

    async def scenario(predictor: Predictor) -> None:
        monkeypatch.setattr(ModelFiles, "read", breaking)
        toy_models.write_toy(folder, "new", OTHER)
        await until(lambda: predictor.catalog.failures)
        assert predictor.catalog.failures == (Failure("new", "1", "loading failed: MemoryError"),)
        assert await scores_of(predictor)
        monkeypatch.undo()
        assert await predictor.models.load("new") == ["1"]

    serve(folder, scenario, watch_s=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_and_goes_a_session_hears_what_its_file_says(folder: Path, seed: int) -> None:
    """Sessions and clips while versions are replaced, unloaded and loaded at random: each gets the bits of one file, and nothing is left behind."""
    random = np.random.default_rng(seed)
    toys = [Toy(seed=one) for one in (7, 8, 9)]

    async def scenario(predictor: Predictor) -> None:
        known: set[bytes] = set()
        for number, toy in enumerate(toys):
            toy_models.write_toy(folder, f"reference{number}", toy)
            await predictor.models.load(f"reference{number}")
            answer = await predictor.predict(f"reference{number}", None, Payload("array", CLIP, CLIP.nbytes), ALL)
            known.add(answer.scores.tobytes())
        heard: list[bytes] = []
        refused = 0
        over = False

        async def change() -> None:
            nonlocal over
            for _ in range(30):
                version = str(random.integers(1, 3))
                if random.random() < 0.7:
                    toy_models.write_toy(folder, "toy", toys[random.integers(len(toys))], version=version)
                    await predictor.models.load("toy")
                elif version in (predictor.catalog.versions("toy") if predictor.catalog.serves("toy") else ()):
                    await predictor.models.unload("toy", version)
                await asyncio.sleep(0.005)
            over = True

        async def stream() -> None:
            nonlocal refused
            while not over:
                await asyncio.sleep(0.002)
                try:
                    session = predictor.open("toy", None, ALL)
                except (ModelNotFound, ModelLoading, ModelNotReady):
                    refused += 1
                    continue
                parts = []
                while session.next_frame < len(CLIP):
                    parts.append(await step(predictor, session, min(5, len(CLIP) - session.next_frame)))
                    await asyncio.sleep(0.003)
                heard.append(b"".join(parts))
                await predictor.close(session, "closed")

        async def clips() -> None:
            nonlocal refused
            while not over:
                try:
                    heard.append(await scores_of(predictor))
                except (ModelNotFound, ModelLoading, ModelNotReady):
                    refused += 1
                await asyncio.sleep(0.003)

        async with asyncio.TaskGroup() as group:
            for one in (change, stream, stream, stream, clips):
                group.create_task(one())
        assert set(heard) <= known
        assert len(heard) > 5
        assert len(set(heard)) > 1
        await until(lambda: len(list(predictor.models)) == len(list(predictor.catalog)))

    serve(folder, scenario)


# The watcher


def test_folders_are_followed(folder: Path) -> None:
    async def scenario(predictor: Predictor) -> None:
        catalog = predictor.catalog
        toy_models.write_toy(folder, "toy", OTHER, version="2")
        await until(lambda: catalog.versions("toy") == ["1", "2"])
        before = catalog.find("toy", "2")
        path = toy_models.write_failing_self_test(folder, "toy")  # version 1
        await until(lambda: catalog.failures)
        assert catalog.versions("toy") == ["1", "2"]
        path.unlink()
        await until(lambda: catalog.versions("toy") == ["2"])
        assert "not there" in catalog.failures[0].reason
        shutil.rmtree(path.parent)
        await until(lambda: not catalog.failures)
        toy_models.write_toy(folder, "toy", CHANNELS, version="2")
        await until(lambda: catalog.find("toy", "2") is not before)
        await predictor.models.unload("toy", "2")
        await asyncio.sleep(0.2)
        assert not catalog.names()  # it stays away
        toy_models.write_toy(folder, "toy", OTHER, version="2")
        await until(catalog.names)

    serve(folder, scenario, watch_s=0.03)


def test_a_file_on_its_way_is_left_alone(folder: Path) -> None:
    """It is read when it has stayed as it is for a while; half of it would be refused."""
    whole = (folder / "toy" / "1" / MODEL_FILE).read_bytes()

    async def scenario(predictor: Predictor) -> None:
        (folder / "slow" / "1").mkdir(parents=True)
        with (folder / "slow" / "1" / MODEL_FILE).open("wb") as file:
            for part in range(10):
                file.write(whole[part * len(whole) // 10 : (part + 1) * len(whole) // 10])
                file.flush()
                await asyncio.sleep(0.1)
        await until(lambda: "slow" in predictor.catalog.names())
        assert 'indrnn_models_refused_total{model="slow"' not in predictor.metrics.text().decode()

    serve(folder, scenario, watch_s=0.3)


def test_a_directory_that_is_gone_takes_nothing_with_it(folder: Path) -> None:
    """As where a disk is away for a moment."""

    async def scenario(predictor: Predictor) -> None:
        shutil.move(folder, folder.with_name("away"))
        await asyncio.sleep(0.3)
        assert predictor.catalog.names() == ["toy"]
        shutil.move(folder.with_name("away"), folder)
        toy_models.write_toy(folder, "new", OTHER)
        await until(lambda: predictor.catalog.names() == ["new", "toy"])

    serve(folder, scenario, watch_s=0.03)


# Roles


def assign(folder: Path, **roles: Any) -> None:
    (folder / "toy" / ROLES_FILE).write_text(json.dumps(roles))


def test_aliases(folder: Path) -> None:
    for version in ("2", "10"):
        toy_models.write_toy(folder, "toy", OTHER, version=version)
    assign(folder, stable="2")

    async def scenario(predictor: Predictor) -> None:
        def meant(*versions: str | None) -> list[str]:
            return [predictor.runner("toy", version).version for version in versions]

        assert meant(None, "stable", "latest") == ["2", "2", "10"]
        with pytest.raises(ModelNotFound, match="no version 'candidate'"):
            predictor.runner("toy", "candidate")
        assign(folder, candidate="10")
        assert await predictor.models.load("toy") == []
        assert meant(None, "stable", "latest", "candidate") == ["2", "2", "10", "10"]
        assert predictor.describe("toy")["roles"] == {"latest": "10", "stable": "2", "candidate": "10", "share": 0.0}
        assign(folder, stable="7")  # it is not there
        await predictor.models.load("toy")
        assert meant(None, "stable", "latest") == ["10", "10", "10"]
        (folder / "toy" / ROLES_FILE).write_text("{")
        await predictor.models.load("toy")
        assert [failure.reason[:25] for failure in predictor.catalog.failures] == ["versions.json is not JSON"]
        await predictor.models.unload("toy", "latest")
        assert predictor.catalog.versions("toy") == ["1", "2"]

    serve(folder, scenario)


def test_a_candidate_gets_its_share_of_new_sessions_and_nothing_else(folder: Path) -> None:
    toy_models.write_toy(folder, "toy", OTHER, version="2")
    assign(folder, stable="1", candidate="2", share=0.2)

    async def scenario(predictor: Predictor) -> None:
        alone = await scores_of(predictor, "1")
        opened = [predictor.open("toy", None, ALL).version for _ in range(100)]
        assert opened.count("2") == 20
        assert {opened[i : i + 5].count("2") for i in range(0, 100, 5)} == {1}  # evenly
        assert {predictor.open("toy", "stable", ALL).version for _ in range(10)} == {"1"}
        assert [await scores_of(predictor) for _ in range(10)] == [alone] * 10
        text = predictor.metrics.text().decode()
        assert 'indrnn_sessions_opened_total{model="toy",version="2"} 20.0' in text
        await predictor.models.unload("toy", "2")
        assert {predictor.open("toy", None, ALL).version for _ in range(10)} == {"1"}

    serve(folder, scenario)


def test_a_candidate_that_takes_other_frames_gets_none(folder: Path) -> None:
    toy_models.write_toy(folder, "toy", Toy(shape=(4,)), version="2")
    assign(folder, candidate="2", share=1)

    async def scenario(predictor: Predictor) -> None:
        assert predictor.open("toy", None, ALL).version == "1"
        assert predictor.open("toy", "candidate", ALL).version == "2"
        assert predictor.describe("toy")["roles"]["share"] == 0

    serve(folder, scenario)


def test_roles_are_followed(folder: Path) -> None:
    toy_models.write_toy(folder, "toy", OTHER, version="2")

    async def scenario(predictor: Predictor) -> None:
        assert predictor.runner("toy").version == "2"
        assign(folder, stable="1")
        await until(lambda: predictor.runner("toy").version == "1")
        (folder / "toy" / ROLES_FILE).write_text("[]")
        await until(lambda: predictor.catalog.failures)
        assert predictor.runner("toy").version == "1"
        (folder / "toy" / ROLES_FILE).unlink()
        await until(lambda: predictor.runner("toy").version == "2")
        assert not predictor.catalog.failures

    serve(folder, scenario, watch_s=0.03)


def test_a_version_may_not_be_called_like_an_alias(folder: Path) -> None:
    toy_models.write_toy(folder, "toy", OTHER, version="latest")
    catalog = Catalog.load([folder], "cpu", 1)
    assert catalog.versions("toy") == ["1"]
    assert "is no version" in catalog.failures[0].reason


# Over the API, against a process


def test_over_the_api(start: Callable[..., Any], folder: Path) -> None:
    with start("--models", str(folder), INDRNN_MANAGEMENT_TOKEN=MANAGER, INDRNN_WATCH_S="0") as server:
        assert isinstance(server, Server)
        with httpx.Client(base_url=server.url, timeout=60) as http:
            for call in ("load", "unload"):
                assert http.post(f"/v1/models/toy/{call}").json()["code"] == "forbidden"
            http.headers.update(BEARER)
            session = http.post("/v1/models/toy/sessions").json()["session"]
            toy_models.write_toy(folder, "toy", OTHER, version="2")
            assert http.post("/v1/models/toy/load").json() == {"name": "toy", "loaded": ["2"]}
            toy_models.write_failing_self_test(folder, "toy")
            refused = http.post("/v1/models/toy/load", json={"version": "1"})
            assert (refused.status_code, refused.json()["code"]) == (400, "model_refused")
            refused = http.post("/v2/repository/models/toy/load")
            assert (refused.status_code, "self-test" in refused.json()["error"]) == (400, True)
            for path in ("/v1/models", "/health/ready"):
                assert "self-test" in next(one for one in http.get(path).json()["failed"] if one["name"] == "toy")["reason"]
            assert "self-test" in server.errors()
            memory = next(one["memory"] for one in http.get("/v1/models").json()["models"] if one["name"] == "toy")
            assert {version: figures["state_bytes"] > 0 for version, figures in memory.items()} == {"1": True, "2": False}
            assert http.post("/v1/models/toy/unload", json={"version": "1"}).json() == {"name": "toy", "unloaded": ["1"]}
            sent = http.post(f"/v1/sessions/{session}/frames", json={"first": 0, "frames": CLIP[:2].tolist()})
            assert (sent.status_code, sent.json()["count"]) == (200, 2)
            assert http.get("/v1/models/toy?version=1").json()["code"] == "model_not_ready"
            described = http.get("/v1/models/toy").json()
            assert (described["version"], described["versions"]) == ("2", ["2"])
            assert described["memory"]["memory_bytes"] >= (folder / "toy" / "2" / MODEL_FILE).stat().st_size
            assert http.post("/v1/models/toy/load", json={"version": 1}).status_code == 400
            assert http.post("/v1/models/toy/load", json={"versoin": "1"}).status_code == 400
            index = http.post("/v2/repository/index").json()
            assert {one["version"]: one["state"] for one in index if one["name"] == "toy"} == {"1": "UNLOADING", "2": "READY"}


def test_a_websocket_finishes_on_its_file_while_the_next_takes_another(start: Callable[..., Any], folder: Path) -> None:
    with start("--models", str(folder), INDRNN_WATCH_S="0.1") as server, Client(server.url) as client:
        alone = client.predict("toy", CLIP, scores="all").scores
        with client.stream("toy") as stream:
            heard = [answer.scores for answer in stream.play(CLIP[:10])]
            toy_models.write_toy(folder, "toy", OTHER, version="2")
            within = time.monotonic() + 20
            while client.model("toy").version != "2":
                assert time.monotonic() < within
                time.sleep(0.05)
            shutil.rmtree(folder / "toy" / "1")
            while client.model("toy").info["versions"] != ["2"]:
                assert time.monotonic() < within
                time.sleep(0.05)
            heard += [answer.scores for answer in stream.play(CLIP[10:])]
            with client.stream("toy") as fresh:
                other = [answer.scores for answer in fresh.play(CLIP)]
        np.testing.assert_array_equal(heard, alone)
        assert not np.array_equal(other, alone)


def test_a_stream_goes_on_while_a_large_model_is_loaded(start: Callable[..., Any], folder: Path) -> None:
    """One frame after another; none waits for anything like as long as the load takes. The bound is generous: the machine does both."""
    with start("--models", str(folder), INDRNN_MANAGEMENT_TOKEN=MANAGER, INDRNN_WATCH_S="0") as server:
        toy_models.write_toy(folder, "wide", WIDE)
        with httpx.Client(base_url=server.url, timeout=60, headers=BEARER) as http:
            session = http.post("/v1/models/toy/sessions").json()["session"]
            answer: dict[str, Any] = {}

            def load() -> None:
                answer.update(httpx.post(f"{server.url}/v1/models/wide/load", headers=BEARER, timeout=60).json())

            loading = threading.Thread(target=load)
            waits, frame = [], json.loads(json.dumps(CLIP[:1].tolist()))
            loading.start()
            while loading.is_alive() or len(waits) < 50:
                began = time.perf_counter()
                http.post(f"/v1/sessions/{session}/frames", json={"first": len(waits), "frames": frame}).raise_for_status()
                waits.append(time.perf_counter() - began)
            loading.join()
            assert answer["loaded"] == ["1"]
            took = http.get("/v1/models/wide").json()["memory"]["load_s"]
            print(f"loaded in {took} s; a frame took {1000 * float(np.median(waits)):.1f} ms, p99 {1000 * float(np.quantile(waits, 0.99)):.1f} ms")
            assert np.quantile(waits, 0.99) < 0.25
