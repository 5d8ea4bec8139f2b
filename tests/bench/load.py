"""The load generator: streams in closed loops or at a fixed pace, from one thread, cheap enough to share two cores with what it measures.

Streams are opened and messages built in Python (`dialects.py`), the rest is compiled (`native.py`). Everything is bounded in time and count,
and goes to loopback only. For experiments with one websocket address:

    python tests/bench/load.py URL --frames FILE --frame-bytes 600 --answer-bytes 240 --streams 64 --per-message 1 --seconds 2

prints one JSON object, see `Result`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import select
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):  # run as `python tests/bench/load.py`
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import numpy.typing as npt

from tests.bench.dialects import ACK_MESSAGE, Body, Dialect, Floats, Stream, Streaming
from tests.bench.native import Column, Found, Live, Outcome, Plan, Status, drive, prepare, rows
from tests.bench.wire import PATIENCE_S, LoadError

ANSWER_BYTES = 16384  # most of one answer, its header included
MESSAGES = 64  # different ones; streams begin at different places in them
FASTEST = 500_000  # messages a second that nothing exceeds
SPARE_FILES = 256


@dataclass(frozen=True)
class Group:
    """Streams that do the same: `per_message` frames in each message, at most `depth` messages under way.

    `pace` is how many messages they send a second, all together, answered or not; None: the next is sent when one is answered.
    """

    dialect: Dialect
    streams: int
    per_message: int = 1
    depth: int = 1
    pace: float | None = None


@dataclass(frozen=True)
class Result:
    """What one run measured of one group."""

    streams: int
    per_message: int
    messages: int
    seconds: float
    frames_per_s: float
    p50_ms: float
    p99_ms: float
    client_us: float  # processor time of the load generator for one message of any group
    least_share: float  # messages of the stream that had fewest, over what each would have if all had as many
    recorded: list[list[bytes]] = field(default_factory=list, repr=False)  # [stream][message]


def run(groups: Sequence[Group], frames: Floats, seconds: float, *, warmup: float = 0.3, record: int = 0) -> list[Result]:
    """Loads all groups at once and measures each; `frames` (count, ...) are gone round in. `record` answers of each stream are kept.

    Raises `LoadError` where anything but the right answers comes back, `KeyboardInterrupt` when it is interrupted.
    """
    prepare()
    _allow_files(sum(group.streams for group in groups) + SPARE_FILES)
    with contextlib.ExitStack() as stack:
        made = [group.dialect.bodies(messages(frames, group.per_message)) for group in groups]
        opened = [stack.enter_context(_open(group, frames[:1], bodies)) for group, bodies in zip(groups, made, strict=True)]
        poll = stack.enter_context(select.epoll())
        plan = _plan(groups, opened, made, poll)
        most = int(FASTEST * (seconds + 0.1)) + len(plan.fds)
        live, found = rows(plan, max(ANSWER_BYTES, *(2 * group.dialect.answer_bytes for group in groups)), record, most)
        drive(plan, live, found, int(warmup * 1e9), int(seconds * 1e9), int(PATIENCE_S * 1e9))
        _check_outcome(plan, live, found)
        for wire in (stream.wire for streams in opened for stream in streams):
            wire.socket.settimeout(PATIENCE_S)
        return [_result(group, number, plan, live, found) for number, group in enumerate(groups)]


def messages(frames: Floats, per_message: int) -> list[Floats]:
    """(per_message, ...) each, going round in `frames`."""
    picked = np.take(frames, range(MESSAGES * per_message), axis=0, mode="wrap")
    return list(picked.reshape(MESSAGES, per_message, *frames.shape[1:]))


def _allow_files(count: int) -> None:
    """Raises this process's soft limit of open files where it is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise LoadError(f"{count} open files are needed and {hard} allowed: raise the limit (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


@contextlib.contextmanager
def _open(group: Group, first: Floats, bodies: Sequence[Body]) -> Iterator[list[Stream]]:
    """The group's streams, closed as they should be after a good run and somehow after another."""
    with contextlib.ExitStack() as stack:
        streams = group.dialect.open(group.streams, first, bodies, stack)
        for stream in streams:
            stream.wire.socket.setblocking(False)
        yield streams
        group.dialect.close(streams, first)


def _plan(groups: Sequence[Group], opened: Sequence[Sequence[Stream]], made: Sequence[Sequence[Body]], poll: select.epoll) -> Plan:
    streams = [stream for some in opened for stream in some]
    fds = np.array([stream.wire.socket.fileno() for stream in streams], np.int32)
    by_fd = np.zeros(fds.max() + 1, np.int32)
    by_fd[fds] = range(len(fds))
    for fd in fds:
        poll.register(int(fd), select.EPOLLIN)
    rules = np.zeros((len(groups), len(Column)), np.int64)
    for number, group in enumerate(groups):
        dialect = group.dialect
        rules[number, Column.KIND] = dialect.kind
        rules[number, Column.FIRST_BODY] = sum(map(len, made[:number]))
        rules[number, Column.BODIES] = len(made[number])
        rules[number, Column.PER_MESSAGE] = group.per_message
        rules[number, Column.NUMBER] = dialect.number
        rules[number, Column.ACK_EVERY] = dialect.ack_every(group.per_message)
        rules[number, Column.DEPTH] = group.depth
        rules[number, Column.PACE] = 0 if group.pace is None else int(1e9 / group.pace)
        rules[number, Column.ANSWER] = dialect.answer_bytes
        rules[number, Column.NUMBERED] = dialect.numbered
    heads, head_at = _joined([stream.head for stream in streams])
    bodies, body_at = _joined([body.data for some in made for body in some])
    return Plan(
        epoll=np.array([poll.fileno()], np.int32),
        fds=fds,
        by_fd=by_fd,
        group=np.repeat(np.arange(len(groups)), [len(some) for some in opened]),
        rules=rules,
        heads=heads,
        head_at=head_at,
        bodies=bodies,
        body_at=body_at,
        number_at=np.array([body.number_at for some in made for body in some], np.int64),
        ack=_octets(ACK_MESSAGE),
    )


def _octets(data: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8).copy()  # compiled code is made for arrays that may be written


def _joined(parts: Sequence[bytes]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """All parts end to end, and where each begins."""
    return _octets(b"".join(parts)), np.cumsum([0, *map(len, parts)])


def _check_outcome(plan: Plan, live: Live, found: Found) -> None:
    """Raises `LoadError` with what the server said, or `KeyboardInterrupt`."""
    status, stream, errno = Status(found.outcome[Outcome.STATUS]), int(found.outcome[Outcome.STREAM]), int(found.outcome[Outcome.ERRNO])
    if status == Status.DONE:
        return
    if status == Status.INTERRUPTED:
        raise KeyboardInterrupt
    answered, missing = int(live.answered[stream]), int((live.sent - live.answered).astype(bool).sum())
    begin, end = live.last[stream]
    said = bytes(live.arrived[stream, begin : max(end, live.filled[stream])])[:300]
    raise LoadError(
        {
            Status.NO_ANSWER: f"{missing} streams had no answer within {PATIENCE_S} s, among them stream {stream} after {answered} answers",
            Status.CLOSED: f"stream {stream}: connection closed by the server after {answered} answers",
            Status.UNEXPECTED: f"stream {stream}: after {answered} answers came {said!r}",
            Status.WRONG_NUMBER: f"stream {stream}: answer {answered} is for another frame: {said!r}",
            Status.TOO_LONG: f"stream {stream}: an answer is longer than {live.arrived.shape[1]} bytes: {said!r}",
            Status.NOT_SENT: f"stream {stream}: cannot send after {answered} answers: {os.strerror(errno)}",
            Status.NOT_RECEIVED: f"stream {stream}: cannot receive after {answered} answers: {os.strerror(errno)}",
            Status.BEHIND: f"stream {stream}: {live.due[stream] - answered} of its messages are late: the server does not keep this pace",
        }[status]
    )


def _result(group: Group, number: int, plan: Plan, live: Live, found: Found) -> Result:
    count, elapsed = int(found.outcome[Outcome.MESSAGES]), int(found.outcome[Outcome.ELAPSED]) / 1e9
    owners = found.owners[:count]
    first = int(np.searchsorted(plan.group, number))
    own = (owners >= first) & (owners < first + group.streams)
    taken = found.latencies[:count][own]
    if not len(taken):
        raise LoadError(f"not one of {group.streams} streams was answered within {elapsed:.1f} s")
    p50, p99 = np.percentile(taken, [50, 99]) / 1e6
    shares = np.bincount(owners[own] - first, minlength=group.streams) * group.streams / len(taken)
    recorded = [_recorded(group, stream, live, found) for stream in range(first, first + group.streams)]
    return Result(
        streams=group.streams,
        per_message=group.per_message,
        messages=len(taken),
        seconds=elapsed,
        frames_per_s=len(taken) * group.per_message / elapsed,
        p50_ms=float(p50),
        p99_ms=float(p99),
        client_us=int(found.outcome[Outcome.CPU]) / 1e3 / count,
        least_share=float(shares.min()),
        recorded=recorded,
    )


def _recorded(group: Group, stream: int, live: Live, found: Found) -> list[bytes]:
    """The stream's first answers; these and its last one are checked."""
    answers = [bytes(row[:length]) for row, length in zip(found.records[stream], found.lengths[stream], strict=True) if length]
    dialect = group.dialect
    if dialect.classes and not dialect.bare:
        begin, end = live.last[stream]
        for number, answer in (*enumerate(answers, 1), (int(live.answered[stream]), bytes(live.arrived[stream, begin:end]))):
            dialect.scores(answer, dialect.opening + number * group.per_message)
    return answers


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url", help="ws://127.0.0.1:PORT/v1/models/NAME/stream")
    parser.add_argument("--frames", required=True, type=Path, help="file of raw float32 frames; streams go round in it")
    parser.add_argument("--frame-bytes", type=int, required=True)
    parser.add_argument("--answer-bytes", type=int, required=True, help="scores of one answer, without its header")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--per-message", type=int, default=1, help="frames in a message")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--warmup", type=float, default=0.3, help="seconds before measuring")
    parser.add_argument("--depth", type=int, default=1, help="most messages of one stream under way")
    parser.add_argument("--pace", type=float, help="messages a second of all streams together, answered or not")
    parser.add_argument("--bare", action="store_true", help="the server is an echo: its answers have no frame numbers")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    frames = np.fromfile(args.frames, "<f4").reshape(-1, args.frame_bytes // 4)
    address, _, rest = args.url.partition("/v1/models/")
    dialect = Streaming(address.replace("ws", "http", 1), args.answer_bytes // 4, rest.partition("/")[0], args.bare)
    group = Group(dialect, args.streams, args.per_message, args.depth, args.pace)
    found = dataclasses.asdict(run([group], frames, args.seconds, warmup=args.warmup)[0])
    print(json.dumps({name: value for name, value in found.items() if name != "recorded"}))


if __name__ == "__main__":
    try:
        main()
    except (LoadError, OSError) as error:
        sys.exit(f"load: {error}")
