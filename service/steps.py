"""Steps of sessions that no connection streams: one request, one answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from service import notes
from service.errors import ServiceError
from service.frames import Payload
from service.options import Options
from service.predictor import Flight, Landed, Predictor
from service.protocol import Answer
from service.runner import Suspect
from service.sessions import Session

_LARGE = 2**16  # bytes; what is longer is read and run the other way, where it may be left to a thread


async def advance(predictor: Predictor, session: Session, first: int, payload: Payload, options: Options) -> Answer:
    """As `Predictor.advance`, with the same answers and errors. Where frames are next in turn, as nearly all are, in half the time."""
    flight = await fly(predictor, session, first, payload, options)
    if flight is not None:
        return flight.answer(options, first, flight.count)
    count = len(payload.value) if isinstance(payload.value, list) else None
    return await predictor.advance(session, first, count, payload, options)


async def fly(predictor: Predictor, session: Session, first: int, payload: Payload, options: Options) -> Flight | None:
    """Runs frames that are next in turn. None where there is more to it than that, and `Predictor.advance` is to be asked: nothing has happened then."""
    departure = prepare(predictor, session, first, payload, options)
    if departure is None:
        return None
    future: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
    flights: list[Flight] = []

    def landed(error: BaseException | None, flight: Flight) -> None:
        flights.append(flight)
        if not future.done():  # else the caller has left
            future.set_result(error)

    if not departure.launch(landed):
        return None
    error = await future
    if error is None:
        return flights[0]
    if isinstance(error, Suspect):
        return None
    raise error


@dataclass(slots=True)
class Departure:
    """Frames that are ready to go to the model."""

    predictor: Predictor
    session: Session
    first: int
    count: int
    frames: memoryview
    read: bool
    options: Options

    def launch(self, landed: Landed) -> bool:
        """What `Predictor.launch` says."""
        notes.note(session=self.session)
        return self.predictor.launch(self.session, self.first, self.count, self.frames, self.options, None, landed, read=self.read)


def prepare(predictor: Predictor, session: Session, first: int, payload: Payload, options: Options) -> Departure | None:
    """Reads frames that are next in turn, if that is all there is to it."""
    if session.ended is not None or session.queued or first != session.next_frame or payload.t is not None or payload.size > _LARGE:
        return None
    reader = predictor.reader(session)
    if payload.form in ("raw", "json") and reader.raw_bytes > 0:  # the numbers are looked at together with those of the batch
        packed = payload.value if payload.form == "raw" else reader.pack(payload.value, payload.literals)
        if not packed:
            return None
        return Departure(predictor, session, first, len(packed) // reader.raw_bytes, memoryview(packed), False, options)
    try:
        frames = payload.read(reader, first)
    except ServiceError:  # perhaps not the first thing that is wrong
        return None
    return Departure(predictor, session, first, len(frames), frames.data.cast("B"), True, options)
