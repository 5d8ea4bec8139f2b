"""Sequences without HTTP: a stream under an id of the client's gives the bits of the clip, whatever happens around it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.catalog import Catalog
from service.errors import (
    AnswersForgotten,
    Deadline,
    Diverged,
    Draining,
    Empty,
    Gap,
    NotFinite,
    SequenceExpired,
    SequenceLive,
    SequenceNotFound,
    ServiceError,
    SessionNotFound,
    TakenOver,
    TooMany,
    WrongShape,
)
from service.frames import Payload
from service.metrics import Metrics
from service.options import Options
from service.predictor import Predictor
from service.runner import Runner
from service.sequences import Sequences, session_id
from service.sessions import Session
from service.settings import Settings
from service.tensors import Step
from tests.toy_models import CHANNELS, EXPLOSIVE, GAPPY_GESTURES, GESTURES, SKELETON, Toy, example_frames, moving_frames

ALL = Options(scores="all")
CLIP = example_frames(CHANNELS, 150, seed=9)
EXTREME = np.array([[1e6, 1e6], [-1e6, 1e6]], np.float32)


@pytest.fixture(scope="module")
def catalog(models: Path) -> Catalog:
    return Catalog.load([models], "cpu", 1)


class Steps:
    """What a client of the protocol does, and the predictor behind it."""

    def __init__(self, predictor: Predictor, restarts: bool) -> None:
        self.predictor = predictor
        self.sequences = Sequences(predictor, restarts)

    async def __call__(
        self, sequence: int | str, frames: np.ndarray, *, start: bool = False, end: bool = False, first: int | None = None, model: str = "channels",
        version: str | None = None, wait_s: float | None = None,
    ) -> np.ndarray:  # fmt: skip
        payload = Payload("array", frames, frames.nbytes)
        _, answer = await self.sequences.step(model, version, Step(sequence, start, end, first), payload, len(frames), wait_s)
        return answer.scores

    async def whole(self, frames: np.ndarray = CLIP, model: str = "channels", version: str | None = None) -> np.ndarray:
        return (await self.predictor.predict(model, version, Payload("array", frames, frames.nbytes), ALL)).scores

    def session(self, sequence: int | str, model: str = "channels") -> Session:
        return self.predictor.sessions.find(session_id(model, sequence))

    def ended(self) -> Counter[str]:
        """How many sessions ended, by cause."""
        ended: Counter[str] = Counter()
        for sample in self.predictor.metrics.sessions_ended.collect()[0].samples:
            if sample.name.endswith("_total"):
                ended[sample.labels["cause"]] += int(sample.value)
        return ended


def serve(catalog: Catalog, scenario: Callable[[Steps], Awaitable[Any]], restarts: bool = True, **changes: Any) -> None:
    async def run() -> None:
        async with Predictor(catalog, Settings(**changes), Metrics()) as predictor:
            steps = Steps(predictor, restarts)
            await scenario(steps)
        assert len(predictor.sessions) == 0
        assert all(runner.rows.taken == 0 for runner in predictor.models)
        opened = sum(sample.value for sample in predictor.metrics.sessions_opened.collect()[0].samples if sample.name.endswith("_total"))
        assert opened == sum(steps.ended().values())  # each that was opened has ended, and under one cause

    asyncio.run(run())


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.sampled_from([1, 2**63 + 5, 2**64 - 1, "a", "größer/Ω"]))
def test_a_sequence_cut_anywhere_gives_the_bits_of_the_clip(catalog: Catalog, sizes: list[int], sequence: int | str) -> None:
    async def scenario(step: Steps) -> None:
        expected, at, last = await step.whole(), 0, len(sizes) - 1
        for i, size in enumerate(sizes):
            some = CLIP[at : at + size]
            if not len(some):
                break
            scores = await step(sequence, some, start=i == 0, end=i == last)
            assert scores.tobytes() == expected[at : at + size].tobytes()
            at += size
        assert (len(step.predictor.sessions) == 0) == (sum(sizes[:-1]) < len(CLIP))

    serve(catalog, scenario)


@pytest.mark.parametrize(("model", "toy"), [("gestures", GESTURES), ("gappy-gestures", GAPPY_GESTURES), ("skeleton", SKELETON)])
def test_of_any_kind_of_model(catalog: Catalog, model: str, toy: Toy) -> None:
    async def scenario(step: Steps) -> None:
        frames = moving_frames(toy, 90, seed=4)
        if toy.missing:
            frames[7:9, 1] = np.nan
        expected = await step.whole(frames, model)
        parts = [await step("a", frames[at : at + 9], start=at == 0, model=model) for at in range(0, 90, 9)]
        assert np.concatenate(parts).tobytes() == expected.tobytes()

    serve(catalog, scenario)


def test_crossed_sequences_do_not_change_a_bit(catalog: Catalog) -> None:
    """7 and "7" of two models are four sequences."""

    async def scenario(step: Steps) -> None:
        async def stream(sequence: int | str, model: str, seed: int) -> None:
            frames = example_frames(CHANNELS, 40, seed)
            expected = await step.whole(frames, model)
            parts = [await step(sequence, frames[i : i + 1], start=i == 0, end=i == 39, model=model) for i in range(40)]
            assert np.concatenate(parts).tobytes() == expected.tobytes()

        ids: list[int | str] = [7, "7", *range(100, 120)]
        await asyncio.gather(*(stream(one, model, seed) for seed, one in enumerate(ids) for model in ("channels", "gestures")))
        assert step.ended() == {"closed": 44}

    serve(catalog, scenario)


def test_steps_run_in_the_order_in_which_they_come(catalog: Catalog) -> None:
    """All at once: two movements one after the other under one id, the second begun while the first is still on its way."""

    async def scenario(step: Steps) -> None:
        expected = await step.whole(CLIP[:20])
        both = [step(5, CLIP[i : i + 1], start=i == 0, end=i == 19) for _ in range(2) for i in range(20)]
        scores = await asyncio.gather(*both)
        assert np.concatenate(scores[:20]).tobytes() == expected.tobytes()
        assert np.concatenate(scores[20:]).tobytes() == expected.tobytes()
        assert step.ended() == {"closed": 2}

    serve(catalog, scenario)


@pytest.mark.parametrize("sequence", [42, "42"])
def test_without_a_start(catalog: Catalog, sequence: int | str) -> None:
    async def scenario(step: Steps) -> None:
        words = "inference request for sequence 42 to model 'channels' must specify the START flag on the first request of the sequence"
        for end in (False, True):
            with pytest.raises(SequenceNotFound, match=words):
                await step(sequence, CLIP[:1], end=end)
        await step(sequence, CLIP[:1], start=True, end=True)
        with pytest.raises(SequenceNotFound, match=words):
            await step(sequence, CLIP[1:2])

    serve(catalog, scenario)


def test_started_while_live_begins_anew_and_is_counted(catalog: Catalog) -> None:
    async def scenario(step: Steps) -> None:
        expected = await step.whole()
        await step(1, CLIP[50:90], start=True)
        row = step.session(1).row
        assert (await step(1, CLIP[:30], start=True)).tobytes() == expected[:30].tobytes()
        assert step.session(1).row != row
        assert (await step(1, CLIP[30:40])).tobytes() == expected[30:40].tobytes()
        assert (await step(1, CLIP[:5], start=True, end=True)).tobytes() == expected[:5].tobytes()
        assert step.ended() == {"restarted": 2, "closed": 1}
        assert step.predictor.metrics.sessions_live.labels("channels", "10")._value.get() == 0

    serve(catalog, scenario, sessions=1)  # there is no room for a second


def test_a_strict_service_refuses_that(catalog: Catalog) -> None:
    async def scenario(step: Steps) -> None:
        expected = await step.whole()
        await step("a", CLIP[:30], start=True)
        with pytest.raises(SequenceLive):
            await step("a", CLIP[:30], start=True, end=True)
        assert (await step("a", CLIP[30:40])).tobytes() == expected[30:40].tobytes()

    serve(catalog, scenario, restarts=False)


FAULTY: list[tuple[type[ServiceError], dict[str, Any]]] = [
    (WrongShape, {"frames": np.zeros((1, 4), np.float32)}),
    (Empty, {"frames": np.zeros((0, 3), np.float32)}),
    (NotFinite, {"frames": np.full((1, 3), np.nan, np.float32)}),
    (Gap, {"frames": CLIP[:1], "first": 31}),
    (Deadline, {"frames": CLIP[:1], "wait_s": 1e-9}),
]


@pytest.mark.parametrize(("error", "fault"), FAULTY, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("start", [False, True])
def test_a_step_that_fails_changes_nothing(catalog: Catalog, error: type[ServiceError], fault: dict[str, Any], start: bool) -> None:
    """Neither a further one, nor one that would have begun it anew, nor one that would have ended it."""

    async def scenario(step: Steps) -> None:
        expected = await step.whole()
        await step(1, CLIP[:30], start=True)
        with pytest.raises(error):
            await step(1, start=start, end=True, **fault)
        assert (await step(1, CLIP[30:40])).tobytes() == expected[30:40].tobytes()
        assert step.ended() == {}

    serve(catalog, scenario)


def test_a_start_that_fails_leaves_nothing(catalog: Catalog) -> None:
    """Not even for the step that waits behind it."""

    async def scenario(step: Steps) -> None:
        results = await asyncio.gather(
            step(1, EXTREME, start=True, model="explosive"),
            step(1, example_frames(EXPLOSIVE, 1), model="explosive"),
            step(1, example_frames(EXPLOSIVE, 1), start=True, model="explosive"),
            step(1, example_frames(EXPLOSIVE, 1), end=True, model="explosive"),
            return_exceptions=True,
        )
        assert [type(result) for result in results] == [Diverged, SequenceNotFound, np.ndarray, np.ndarray]
        for fault in ({"wait_s": 1e-9}, {"first": 1}):
            with pytest.raises((Deadline, Gap)):
                await step(2, CLIP[:1], start=True, **fault)  # type: ignore[arg-type]
        assert len(step.predictor.sessions) == 0
        assert step.ended() == {"failed": 3, "closed": 1}

    serve(catalog, scenario)


def test_an_extreme_restart_leaves_the_stream_as_it_was(catalog: Catalog) -> None:
    async def scenario(step: Steps) -> None:
        frames = example_frames(EXPLOSIVE, 20)
        expected = await step.whole(frames, "explosive")
        await step(1, frames[:10], start=True, model="explosive")
        with pytest.raises(Diverged):
            await step(1, EXTREME, start=True, end=True, model="explosive")
        assert (await step(1, frames[10:], model="explosive")).tobytes() == expected[10:].tobytes()

    serve(catalog, scenario)


def test_a_repeated_step_is_answered_and_not_run(catalog: Catalog) -> None:
    async def scenario(step: Steps) -> None:
        expected = await step.whole()
        await step(1, CLIP[:10], start=True, first=0)
        ran = step.predictor.runner("channels").frames_run
        for first, end in ((0, 10), (4, 10), (9, 10)):
            assert (await step(1, np.ones((end - first, 3), np.float32), first=first)).tobytes() == expected[first:end].tobytes()
        assert step.predictor.runner("channels").frames_run == ran
        assert (await step(1, CLIP[5:20], first=5)).tobytes() == expected[5:20].tobytes()
        for at in range(20, 140, 20):
            await step(1, CLIP[at : at + 20], first=at)
        with pytest.raises(AnswersForgotten):
            await step(1, CLIP[:10], first=0)
        with pytest.raises(Gap):
            await step(1, CLIP[:1], first=141)
        assert (await step(1, CLIP[139:140], first=139, end=True)).tobytes() == expected[139:140].tobytes()
        assert step.ended() == {"closed": 1}

    serve(catalog, scenario)


def test_expiry_is_told_until_it_is_started_again(catalog: Catalog) -> None:
    async def scenario(step: Steps) -> None:
        for sequence in (1, "1"):
            await step(sequence, CLIP[:1], start=True)
        other = step.predictor.open("channels", None, Options())
        for session in step.predictor.sessions:
            session.used = time.monotonic() - 601
        assert len(step.predictor.sessions.expire()) == 3
        for sequence in (1, "1", other.id):
            with pytest.raises(SequenceExpired, match="START flag"):
                await step(sequence, CLIP[:1])
        with pytest.raises(SequenceNotFound) as caught:
            await step(2, CLIP[:1])
        assert caught.value.code == "sequence_not_found"
        await step(1, CLIP[:1], start=True, end=True)
        with pytest.raises(SequenceNotFound) as caught:
            await step(1, CLIP[:1])
        assert caught.value.code == "sequence_not_found"

    serve(catalog, scenario)


def test_a_sequence_with_a_step_under_way_does_not_expire(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(step: Steps) -> None:
        await step(1, CLIP[:1], start=True)
        session = step.session(1)
        task = asyncio.create_task(step(1, CLIP[1:100]))
        await asyncio.sleep(0)
        session.used = time.monotonic() - 601
        assert step.predictor.sessions.expire() == []
        await task

    serve(catalog, scenario)


def test_capacity_is_shared_with_all_sessions(catalog: Catalog) -> None:
    async def scenario(step: Steps) -> None:
        step.predictor.open("channels", None, Options())
        await step(1, CLIP[:1], start=True)
        with pytest.raises(TooMany) as caught:
            await step(2, CLIP[:1], start=True)
        assert caught.value.facts["retry_after"] > 0
        await step(1, CLIP[:1], end=True)
        await step(2, CLIP[:1], start=True)

    serve(catalog, scenario, sessions=2)


def test_sequences_and_sessions_are_the_same(catalog: Catalog) -> None:
    async def scenario(step: Steps) -> None:
        expected, predictor = await step.whole(), step.predictor
        session = predictor.open("channels", None, Options())
        await predictor.advance(session, 0, 10, Payload("raw", CLIP[:10].tobytes(), 120), ALL)
        assert (await step(session.id, CLIP[10:20])).tobytes() == expected[10:20].tobytes()
        with pytest.raises(SequenceNotFound):
            await step(session.id, CLIP[:1], model="gestures")  # another model's
        answer = await predictor.advance(session, 20, 10, Payload("raw", CLIP[20:30].tobytes(), 120), ALL)
        assert answer.scores.tobytes() == expected[20:30].tobytes()
        await step(session.id, CLIP[30:40], end=True)
        with pytest.raises(SessionNotFound):
            predictor.sessions.find(session.id)

        await step("mine", CLIP[:10], start=True)
        session = predictor.sessions.find("channels:string:mine")
        assert session.facts()["next_frame"] == 10
        assert session.digest in [one.digest for one in predictor.sessions]
        answer = await predictor.advance(session, 10, 10, Payload("raw", CLIP[10:20].tobytes(), 120), ALL)
        assert answer.scores.tobytes() == expected[10:20].tobytes()
        assert (await step("mine", CLIP[20:30])).tobytes() == expected[20:30].tobytes()
        await predictor.reset(session, 30)
        assert (await step("mine", CLIP[:10])).tobytes() == expected[:10].tobytes()
        assert session.next_frame == 40

    serve(catalog, scenario)


def test_a_session_begun_anew_keeps_how_it_was_opened_and_its_socket_is_told(catalog: Catalog) -> None:
    class Socket:
        error: ServiceError | None = None

        def stop(self, error: ServiceError) -> None:
            self.error = error

    async def scenario(step: Steps) -> None:
        predictor, socket = step.predictor, Socket()
        session = predictor.open("gestures", None, Options(fps=15.0))
        predictor.attach(session, socket)
        frames = moving_frames(GESTURES, 30)
        slow = (await predictor.predict("gestures", None, Payload("array", frames, frames.nbytes), Options(scores="all", fps=15.0))).scores
        await step(session.id, frames, start=True, model="gestures")
        assert socket.error is None  # it had no frames yet
        assert (await step(session.id, frames, start=True, model="gestures")).tobytes() == slow.tobytes()
        assert isinstance(socket.error, TakenOver)
        assert session.options.fps == 15.0

    serve(catalog, scenario)


def test_a_sequence_stays_on_the_version_that_started_it(catalog: Catalog) -> None:
    async def scenario(step: Steps) -> None:
        await step(1, CLIP[:1], start=True, version="9")
        await step(1, CLIP[1:2])
        await step(1, CLIP[2:3], version="9")
        assert (step.session(1).version, step.session(1).next_frame) == ("9", 3)
        with pytest.raises(SequenceNotFound, match="on version 9"):
            await step(1, CLIP[3:4], version="10")
        await step(1, CLIP[:1], start=True)
        assert (step.session(1).version, step.session(1).next_frame) == ("10", 1)
        assert step.predictor.runner("channels", "9").rows.taken == 0

    serve(catalog, scenario)


@pytest.mark.parametrize("start", [False, True])
def test_the_last_step_counts_even_if_its_caller_has_left(catalog: Catalog, start: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller is cancelled once its frames have begun to run."""
    held, begun = asyncio.Event(), asyncio.Event()
    original = Runner.run

    async def slow(self: Runner, *arguments: Any) -> Any:
        result = await original(self, *arguments)
        begun.set()
        await held.wait()
        return result

    async def scenario(step: Steps) -> None:
        await step(1, CLIP[:10], start=True)
        monkeypatch.setattr(Runner, "run", slow)
        task = asyncio.create_task(step(1, CLIP[10:11], start=start, end=True))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(step.predictor.sessions) == 0
        assert step.ended() == ({"restarted": 1, "closed": 1} if start else {"closed": 1})

    serve(catalog, scenario)


def test_a_caller_who_leaves_while_waiting_costs_nothing(catalog: Catalog) -> None:
    async def scenario(step: Steps) -> None:
        expected = await step.whole()
        await step(1, CLIP[:10], start=True)
        first = asyncio.create_task(step(1, CLIP[10:20]))
        second = asyncio.create_task(step(1, CLIP[50:60], start=True, end=True))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert (await first).tobytes() == expected[10:20].tobytes()
        assert (await step(1, CLIP[20:30])).tobytes() == expected[20:30].tobytes()
        assert step.ended() == {}

    serve(catalog, scenario)


def test_a_service_that_shuts_down_refuses(catalog: Catalog) -> None:
    async def scenario(step: Steps) -> None:
        await step(1, CLIP[:1], start=True)
        step.predictor.draining = True
        for sequence, start in ((1, False), (1, True), (2, True)):
            with pytest.raises(Draining):
                await step(sequence, CLIP[1:2], start=start)

    serve(catalog, scenario)
