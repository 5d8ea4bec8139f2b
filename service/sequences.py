"""Sequences of the Open Inference Protocol are sessions whose id the client chose.

A sequence belongs to one model; 7 and "7" are different ones. The string may also be the id of a session that was opened otherwise. The other way
round, `session_id` is what a sequence is called wherever a session is named.
"""

from __future__ import annotations

import dataclasses

import structlog

from service import steps
from service.errors import Gap, SequenceExpired, SequenceLive, SequenceNotFound, SessionExpired, SessionNotFound, StoreUnavailable, TakenOver
from service.frames import Payload
from service.keeper import TRIES, Keeper
from service.options import Options
from service.predictor import Flight, Predictor
from service.protocol import Answer
from service.roles import ALIASES
from service.sessions import Session
from service.tensors import Step

log = structlog.get_logger("sequences")

_OPTIONS = Options(scores="all", events=False)  # this protocol's answers are all scores and nothing else


def session_id(model: str, sequence: int | str) -> str:
    """No other session has such an id: those that the service chooses have no colon."""
    return f"{model}:{'string' if isinstance(sequence, str) else 'uint64'}:{sequence}"


def may_be_guessed(session_id: str) -> bool:
    """Whether a client chose this session's id; whoever knows one that the service chose has been given it."""
    return ":" in session_id


class Sequences:
    """Steps of sequences. `restarts`: whether starting one that is under way begins it anew, as Triton does, or is refused."""

    def __init__(self, predictor: Predictor, restarts: bool) -> None:
        self._predictor = predictor
        self._restarts = restarts

    async def step(self, model: str, version: str | None, step: Step, payload: Payload, count: int, wait_s: float | None) -> tuple[Session, Answer]:
        """Takes `count` frames; a step that fails changes nothing. Steps of one sequence run in the order in which they come here.

        Raises `SequenceNotFound`, `SequenceExpired`, `SequenceLive` or what `Predictor.advance` raises.
        """
        keeper = self._predictor.keeper
        if keeper is None:
            return await self._step(model, version, step, payload, count, wait_s)
        keeper.check_open()
        for _ in range(TRIES):
            await self._take_up(keeper, model, step.sequence)
            try:
                session, answer = await self._step(model, version, dataclasses.replace(step, end=False), payload, count, wait_s)
            except Gap:
                stale = self._live(model, step.sequence)
                if stale is None or not await keeper.is_stale(stale):
                    raise
                continue
            if await self._saved(keeper, session):
                if step.end and session.ended is None:  # not before it is certain that this copy was the latest
                    await self._predictor.close(session, "closed")
                return session, answer
        raise TakenOver("the sequence is used in several places at once")

    async def _step(self, model: str, version: str | None, step: Step, payload: Payload, count: int, wait_s: float | None) -> tuple[Session, Answer]:
        deadline = self._predictor.deadline(wait_s)
        while True:
            session, opened = self._find(model, version, step)
            try:
                if opened and self._predictor.keeper is not None:
                    await self._predictor.keeper.own(session)
                async with self._predictor.turn(session, deadline):
                    return session, await self._run(session, version, step, payload, count, deadline)
            except SessionNotFound:  # it ended while this step waited for its turn; perhaps another has started it again since
                continue
            finally:
                if opened and not session.next_frame and session.ended is None:  # before anyone who waits for its turn can have it
                    self._predictor.end(session, "failed")

    async def fly(self, model: str, version: str | None, step: Step, shape: tuple[int, ...], frames: memoryview) -> tuple[Session, Flight] | None:
        """As `step`, for raw frames (1, count, ...) of a sequence that is under way and does not end. None where there is more to it than that, and `step`
        is to be asked; nothing has happened then.
        """
        session = self._fitting(model, version, step, shape)
        if session is None:
            return None
        flight = await steps.fly(self._predictor, session, _first(session, step), _raw(frames), _OPTIONS)
        if flight is None or (self._predictor.keeper is not None and not await self._saved(self._predictor.keeper, session)):
            return None
        return session, flight

    def prepare(self, model: str, version: str | None, step: Step, shape: tuple[int, ...], frames: memoryview) -> steps.Departure | None:
        """As `fly`, up to where the frames go to the model."""
        session = self._fitting(model, version, step, shape)
        return None if session is None else steps.prepare(self._predictor, session, _first(session, step), _raw(frames), _OPTIONS)

    def _fitting(self, model: str, version: str | None, step: Step, shape: tuple[int, ...]) -> Session | None:
        """The session of a sequence that is under way on this version, if its client's frames have this shape."""
        session = self._live(model, step.sequence)
        if session is None or version not in (None, session.version) or self._predictor.reader(session).shape != shape[2:]:
            return None
        return session

    async def _take_up(self, keeper: Keeper, model: str, sequence: int | str) -> None:
        """Makes a sequence that another process has served live here."""
        known = [session_id(model, sequence), *([sequence] if isinstance(sequence, str) else [])]
        if any(self._predictor.sessions.get(one) is not None for one in known):
            return
        for one in known:
            try:
                await self._predictor.find(one)
                return
            except SessionNotFound:
                continue
            except StoreUnavailable:
                if keeper.refuses:
                    raise

    async def _saved(self, keeper: Keeper, session: Session) -> bool:
        """Waits until the step is in the store; False where it counts for nothing, as the sequence has gone on elsewhere."""
        try:
            await keeper.flush(session)
        except (TakenOver, SessionNotFound) as error:
            if session.ended in (None, "moved"):
                await self._predictor.give_up(session, error)
                return False
        return True

    def _find(self, model: str, version: str | None, step: Step) -> tuple[Session, bool]:
        """The session, and whether it was opened just now."""
        session = self._live(model, step.sequence)
        if session is None:
            if not step.start:
                raise self._absent(model, step.sequence)
            return self._predictor.open(model, version, _OPTIONS, session_id(model, step.sequence)), True
        if not step.start and version not in (None, *ALIASES, session.version):  # what an alias stands for may have changed since
            raise SequenceNotFound(f"{_must_start(model, step.sequence)}; it is under way on version {session.version}", version=session.version)
        return session, False

    def _live(self, model: str, sequence: int | str) -> Session | None:
        session = self._predictor.sessions.get(session_id(model, sequence))
        if session is None and isinstance(sequence, str):
            session = self._predictor.sessions.get(sequence)
            return session if session is not None and session.model == model else None
        return session

    async def _run(self, session: Session, version: str | None, step: Step, payload: Payload, count: int, deadline: float) -> Answer:
        predictor, before, row = self._predictor, session.next_frame, session.row
        answer: Answer | None = None
        try:
            if step.start and before:
                answer = await self._restart(session, version, step, payload, count, deadline)
            else:
                answer = await predictor.take(session, before if step.first is None else step.first, count, payload, _OPTIONS, deadline)
            return answer
        finally:  # a caller who leaves when the frames have run has had this step all the same
            if step.end and (answer is not None or session.next_frame != before or session.row != row):
                predictor.end(session, "closed")

    async def _restart(self, session: Session, version: str | None, step: Step, payload: Payload, count: int, deadline: float) -> Answer:
        if not self._restarts:
            raise SequenceLive(f"sequence {step.sequence} of model {session.model!r} is under way; end it before it is started again")
        options = _OPTIONS
        if session.id != session_id(session.model, step.sequence):  # a session that was opened otherwise keeps what it was opened with
            options, version = session.options, version or session.version
        answer = await self._predictor.restart(session, version, options, step.first or 0, count, payload, _OPTIONS, deadline)
        if self._predictor.keeper is not None:
            await self._predictor.keeper.own(session)
        log.info("sequence restarted", session=session.digest, model=session.model)
        return answer

    def _absent(self, model: str, sequence: int | str) -> SequenceNotFound:
        for name in (session_id(model, sequence), sequence):
            try:
                self._predictor.sessions.find(str(name))
            except SessionExpired:
                return SequenceExpired(f"{_must_start(model, sequence)}; it has expired")
            except SessionNotFound:
                continue
        return SequenceNotFound(_must_start(model, sequence))


def _first(session: Session, step: Step) -> int:
    return session.next_frame if step.first is None else step.first


def _raw(frames: memoryview) -> Payload:
    return Payload("raw", bytes(frames), len(frames))  # a copy: behind JSON of any length they are not where numbers can be read


def _must_start(model: str, sequence: int | str) -> str:
    return f"inference request for sequence {sequence} to model {model!r} must specify the START flag on the first request of the sequence"
