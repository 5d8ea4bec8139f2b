"""The load generator's inner loop, compiled: an epoll loop over sockets that are open already, calling libc itself and holding no interpreter lock.

It sends messages that were built beforehand, cuts answers out of what arrives, checks each, and notes how long each took. Whatever it
does not expect ends it with a `Status`; `load.py` says what that means. Linux only.
"""

from __future__ import annotations

import functools
import platform
from enum import IntEnum
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
from numba.core import types

from model.kernels.compiled import compiled

Integers = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32]
Octets = npt.NDArray[np.uint8]

RING = 1024  # messages of one stream that may be due and not answered
EVENTS = 256  # sockets looked at between two waits
EVENT_WORDS, EVENT_FD = (3, 1) if platform.machine() in ("x86_64", "AMD64") else (4, 2)  # struct epoll_event is packed on x86-64 alone, in words of 32 bits
SECOND = 1_000_000_000
MONOTONIC, THREAD_CPU = 1, 3
NOSIGNAL, WRITABLE = 0x4000, 4
INTERRUPTED, AGAIN = 4, 11
WEBSOCKET, HTTP = 0, 1  # columns of rules below: KIND
NO_NUMBER, LITTLE_ENDIAN, DECIMAL = 0, 1, 2  # NUMBER
DIGITS = 12  # of a decimal number, spaces before it: JSON allows them
TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA


class Status(IntEnum):
    """How a run ended."""

    DONE = 0
    NO_ANSWER = 1  # for as long as its patience lasts
    CLOSED = 2
    UNEXPECTED = 3  # what arrived is no answer: a close, an error, another length
    WRONG_NUMBER = 4  # an answer for another frame
    TOO_LONG = 5
    NOT_SENT = 6
    NOT_RECEIVED = 7
    BEHIND = 8  # more messages of one stream are due than the ring holds
    INTERRUPTED = 9


class Column(IntEnum):
    """Of the table of rules, one row for each group of streams."""

    KIND = 0
    FIRST_BODY = 1
    BODIES = 2
    PER_MESSAGE = 3  # frames
    NUMBER = 4  # how the number of a message's first frame is written
    ACK_EVERY = 5  # messages; 0: never
    DEPTH = 6  # most messages of one stream under way
    PACE = 7  # nanoseconds between two messages of the group; 0: closed loop
    ANSWER = 8  # bytes of an answer without websocket's or HTTP's header; 0: any
    NUMBERED = 9  # whether answers begin with a header that has the last frame's number


class Plan(NamedTuple):
    """What a run sends, and to whom; nothing here changes. Streams of one group lie side by side."""

    epoll: Numbers  # (1,)
    fds: Numbers  # (streams,)
    by_fd: Numbers  # stream of a file descriptor
    group: Integers  # (streams,) row in rules
    rules: Integers  # (groups, columns)
    heads: Octets  # what each stream's messages begin with, end to end
    head_at: Integers  # (streams + 1,)
    bodies: Octets  # what follows, end to end
    body_at: Integers  # (bodies + 1,)
    number_at: Integers  # (bodies,) where in a body the number goes
    ack: Octets  # a message that acknowledges; its last eight bytes are the number


class Live(NamedTuple):
    """What changes while it runs."""

    due: Integers  # (streams,) messages that were to be sent by now
    sent: Integers
    answered: Integers
    stamps: Integers  # (streams, RING) when a message was due
    arrived: Octets  # (streams, most bytes of one answer)
    filled: Integers  # (streams,)
    last: Integers  # (streams, 2) where the last answer begins and ends in `arrived`
    out: Octets  # a message as it is sent
    events: Numbers
    clock: Integers  # (2,) seconds and nanoseconds, for the system's calls
    wait: Numbers  # (2,) struct pollfd


class Found(NamedTuple):
    """What it measured."""

    latencies: Integers  # nanoseconds, one for each message answered while measuring
    owners: Numbers  # the stream of each
    records: Octets  # (streams, answers, bytes) the first answers
    lengths: Integers  # (streams, answers)
    outcome: Integers  # see `Outcome`


class Outcome(IntEnum):
    """Places in `Found.outcome`."""

    STATUS = 0
    STREAM = 1
    ERRNO = 2
    MESSAGES = 3  # answered while measuring
    ELAPSED = 4  # nanoseconds
    CPU = 5  # nanoseconds of this thread
    PASSED = 6  # text messages that were neither answers nor errors


def _libc(name: str, gives: Any, *takes: Any) -> Any:
    """A function of the C library, for compiled code alone."""
    return types.ExternalFunction(name, gives(*takes))


_int, _size, _address = types.int32, types.intp, types.uintp
_recv = _libc("recv", _size, _int, _address, _size, _int)
_send = _libc("send", _size, _int, _address, _size, _int)
_epoll_wait = _libc("epoll_wait", _int, _int, _address, _int, _int)
_poll = _libc("poll", _int, _address, types.uintp, _int)
_ppoll = _libc("ppoll", _int, _address, types.uintp, _address, _address)
_memcpy = _libc("memcpy", _address, _address, _address, _address)
_clock_gettime = _libc("clock_gettime", _int, _int, _address)
_errno_location = _libc("__errno_location", types.CPointer(types.int32))

# Compiled code sees plain integers.
_DONE, _NO_ANSWER, _CLOSED, _UNEXPECTED, _WRONG, _TOO_LONG, _NOT_SENT, _NOT_RECEIVED, _BEHIND, _INTERRUPTED = (int(one) for one in Status)
_KIND, _FIRST_BODY, _BODIES, _PER_MESSAGE, _NUMBER, _ACK_EVERY, _DEPTH, _PACE, _ANSWER, _NUMBERED = (int(one) for one in Column)
_STATUS, _STREAM, _ERRNO, _MESSAGES, _ELAPSED, _CPU, _PASSED = (int(one) for one in Outcome)
_ERROR_WORD = np.frombuffer(b'"error"', np.uint8)
_LENGTH_WORD = np.frombuffer(b"content-length:", np.uint8)
MORE = -1  # of the functions that cut: more bytes are needed


@compiled
def _errno() -> int:
    return int(numba.carray(_errno_location(), 1)[0])


@compiled
def _now(clock: Integers, which: int) -> int:
    _clock_gettime(which, clock.ctypes.data)
    return int(clock[0] * SECOND + clock[1])


@compiled
def _fail(outcome: Integers, status: int, stream: int, errno: int) -> bool:
    outcome[_STATUS], outcome[_STREAM], outcome[_ERRNO] = status, stream, errno
    return False


@compiled
def _put_number(out: Octets, at: int, number: int, how: int) -> None:
    if how == LITTLE_ENDIAN:
        for place in range(8):
            out[at + place] = (number >> (8 * place)) & 0xFF
    else:
        rest = number
        for place in range(DIGITS - 1, -1, -1):
            out[at + place] = 48 + rest % 10 if rest or place == DIGITS - 1 else 32
            rest //= 10


@compiled
def _put(out: Octets, at: int, source: Octets, begin: int, end: int) -> int:
    _memcpy(out.ctypes.data + at, source.ctypes.data + begin, end - begin)
    return at + end - begin


@compiled
def _write(fd: int, out: Octets, length: int, wait: Numbers) -> int:
    """0, or what went wrong. A socket that is full is waited for: what is under way is bounded, so only very large messages get here."""
    done, tries = 0, 0
    while done < length:
        count = _send(fd, out.ctypes.data + done, length - done, NOSIGNAL)
        if count >= 0:
            done += count
            continue
        errno = _errno()
        if errno == AGAIN and tries < 20:
            wait[0], wait[1], tries = fd, WRITABLE, tries + 1
            _poll(wait.ctypes.data, 1, 1000)
        elif errno != INTERRUPTED:
            return errno
    return 0


@compiled
def _send_next(plan: Plan, live: Live, found: Found, stream: int) -> bool:
    """Sends the stream's next message, an acknowledgement before it where one is due."""
    rule = plan.rules[plan.group[stream]]
    count, per_message, at = live.sent[stream], rule[_PER_MESSAGE], 0
    if rule[_ACK_EVERY] and count % rule[_ACK_EVERY] == rule[_ACK_EVERY] - 1:
        at = _put(live.out, at, plan.ack, 0, len(plan.ack))
        _put_number(live.out, at - 8, live.answered[stream] * per_message, LITTLE_ENDIAN)
    at = _put(live.out, at, plan.heads, plan.head_at[stream], plan.head_at[stream + 1])
    body = rule[_FIRST_BODY] + (stream + count) % rule[_BODIES]
    begin = at
    at = _put(live.out, at, plan.bodies, plan.body_at[body], plan.body_at[body + 1])
    if rule[_NUMBER] != NO_NUMBER:
        _put_number(live.out, begin + plan.number_at[body], count * per_message, rule[_NUMBER])
    live.sent[stream] += 1
    errno = _write(plan.fds[stream], live.out, at, live.wait)
    return _fail(found.outcome, _NOT_SENT, stream, errno) if errno else True


@compiled
def _make_due(plan: Plan, live: Live, found: Found, stream: int, now: int) -> bool:
    """One more message of the stream is to be sent: now, or when those under way are fewer."""
    if live.due[stream] - live.answered[stream] >= RING:
        return _fail(found.outcome, _BEHIND, stream, 0)
    live.stamps[stream, live.due[stream] % RING] = now
    live.due[stream] += 1
    if live.sent[stream] - live.answered[stream] < plan.rules[plan.group[stream], _DEPTH]:
        return _send_next(plan, live, found, stream)
    return True


@compiled
def _holds(data: Octets, begin: int, end: int, word: Octets) -> bool:
    for at in range(begin, end - len(word) + 1):
        place = 0
        while place < len(word) and data[at + place] == word[place]:
            place += 1
        if place == len(word):
            return True
    return False


@compiled
def _cut_websocket(data: Octets, begin: int, end: int) -> tuple[int, int]:
    """Where the payload of the message at `begin` begins and ends, or MORE."""
    if end - begin < 2:
        return MORE, MORE
    length, start = data[begin + 1] & 0x7F, begin + 2
    if length >= 126:
        wide = 2 if length == 126 else 8
        if end - start < wide:
            return MORE, MORE
        length = 0
        for place in range(wide):
            length = length * 256 + data[start + place]
        start += wide
    return (start, start + length) if start + length <= end else (MORE, start + length)


@compiled
def _cut_http(data: Octets, begin: int, end: int) -> tuple[int, int]:
    """Where the body of the response at `begin` begins and ends; MORE where bytes are missing; the end is 0 where no length is said."""
    length, line = -1, begin
    for at in range(begin, end):
        if data[at] != 10:
            continue
        if at - line <= 1:  # an empty line: the head's end
            if length < 0:
                return at + 1, 0
            return (at + 1, at + 1 + length) if at + 1 + length <= end else (MORE, at + 1 + length)
        if at - line > len(_LENGTH_WORD):
            place = 0
            while place < len(_LENGTH_WORD) and (data[line + place] | 32) == (_LENGTH_WORD[place] | 32):
                place += 1
            if place == len(_LENGTH_WORD):
                length = 0
                for place in range(line + len(_LENGTH_WORD), at):
                    if 48 <= data[place] < 58:
                        length = length * 10 + data[place] - 48
        line = at + 1
    return MORE, MORE


@compiled
def _pong(plan: Plan, live: Live, stream: int, begin: int, end: int) -> int:
    """Answers a ping, masked with the key 0; its payload has at most 125 bytes."""
    live.out[0], live.out[1] = 0x80 | PONG, 0x80 | (end - begin)
    for place in range(2, 6):
        live.out[place] = 0
    at = _put(live.out, 6, live.arrived[stream], begin, end)
    return _write(plan.fds[stream], live.out, at, live.wait)


@compiled
def _is_expected(plan: Plan, live: Live, found: Found, stream: int, begin: int, end: int) -> bool:
    """Whether the answer in [begin, end) has the right length and, where it has one, the right frame number."""
    rule = plan.rules[plan.group[stream]]
    if live.answered[stream] >= live.sent[stream] or (rule[_ANSWER] and end - begin != rule[_ANSWER]):
        return _fail(found.outcome, _UNEXPECTED, stream, 0)
    if rule[_NUMBERED]:
        number = 0
        for place in range(15, 7, -1):
            number = number * 256 + live.arrived[stream, begin + place]
        if live.arrived[stream, begin + 1] != 2 or number != (live.answered[stream] + 1) * rule[_PER_MESSAGE] - 1:
            return _fail(found.outcome, _WRONG, stream, 0)
    return True


@compiled
def _cut(plan: Plan, live: Live, found: Found, stream: int, begin: int) -> tuple[int, int]:
    """Takes one message at `begin` out of what arrived: where the next begins and 1 for an answer, 0 for another message; (MORE, status) where it cannot."""
    kind, data, end = plan.rules[plan.group[stream], _KIND], live.arrived[stream], live.filled[stream]
    if kind == HTTP:
        start, stop = _cut_http(data, begin, end)
        if start == MORE:
            return MORE, _TOO_LONG if stop - begin > len(data) else _DONE
        if stop == 0 or data[begin + 9] != 50 or data[begin + 10] != 48 or data[begin + 11] != 48:  # " 200 "
            return MORE, _UNEXPECTED
    else:
        start, stop = _cut_websocket(data, begin, end)
        if start == MORE:
            return MORE, _TOO_LONG if stop - begin > len(data) else _DONE
        code = data[begin]
        if code != 0x80 | BINARY:
            if code == 0x80 | PING and stop - start < 126:
                return (stop, 0) if _pong(plan, live, stream, start, stop) == 0 else (MORE, _NOT_SENT)
            if code != 0x80 | TEXT or _holds(data, start, stop, _ERROR_WORD):
                return MORE, _UNEXPECTED
            found.outcome[_PASSED] += 1
            return stop, 0
    if not _is_expected(plan, live, found, stream, start, stop):
        return MORE, found.outcome[_STATUS]
    count = live.answered[stream]
    if count < found.records.shape[1]:
        length = min(stop - start, found.records.shape[2])
        _put(found.records[stream, count], 0, data, start, start + length)
        found.lengths[stream, count] = length
    live.last[stream, 0], live.last[stream, 1] = start, stop
    return stop, 1


@compiled
def _receive(plan: Plan, live: Live, found: Found, stream: int) -> int:
    """Reads what is there; how many bytes, or 0 after `_fail`, or -1 where nothing is there after all."""
    at = live.filled[stream]
    row = live.arrived[stream]
    count = _recv(plan.fds[stream], row.ctypes.data + at, len(row) - at, 0)
    if count > 0:
        live.filled[stream] = at + count
        return count
    errno = _errno() if count < 0 else 0
    if count < 0 and errno in (AGAIN, INTERRUPTED):
        return -1
    _fail(found.outcome, _NOT_RECEIVED if count < 0 else _CLOSED, stream, errno)
    return 0


@compiled
def _wait(plan: Plan, live: Live, nanoseconds: int) -> int:
    """How many sockets have something to read; waits at most so long. epoll_wait alone knows milliseconds only."""
    if nanoseconds < SECOND // 10:
        live.wait[0], live.wait[1] = plan.epoll[0], 1
        live.clock[0], live.clock[1] = 0, max(0, nanoseconds)
        ready = _ppoll(live.wait.ctypes.data, 1, live.clock.ctypes.data, 0)
        if ready <= 0:
            return ready
        return _epoll_wait(plan.epoll[0], live.events.ctypes.data, EVENTS, 0)
    return _epoll_wait(plan.epoll[0], live.events.ctypes.data, EVENTS, min(1000, nanoseconds // 1_000_000))


@compiled
def drive(plan: Plan, live: Live, found: Found, warmup: int, seconds: int, patience: int) -> None:
    """Keeps messages under way for `warmup` + `seconds`, or until `found` is full; measures after the warm-up; then waits for the last answers.

    Times are nanoseconds. `found.outcome` says how it ended; nothing is raised.
    """
    outcome, streams, groups = found.outcome, len(plan.fds), len(plan.rules)
    start = _now(live.clock, MONOTONIC)
    open_at, until, heard = start + warmup, start + warmup + seconds, start
    measuring = stopping = False
    begun = cpu = messages = 0
    sizes, firsts, paced = np.zeros(groups, np.int64), np.zeros(groups, np.int64), np.zeros(groups, np.int64)
    for stream in range(streams - 1, -1, -1):
        sizes[plan.group[stream]] += 1
        firsts[plan.group[stream]] = stream
    for stream in range(streams):
        rule = plan.rules[plan.group[stream]]
        for _ in range(rule[_DEPTH] if rule[_PACE] == 0 else 0):
            if not _make_due(plan, live, found, stream, _now(live.clock, MONOTONIC)):
                return
    while True:
        now = _now(live.clock, MONOTONIC)
        pause = SECOND
        if not stopping:
            for group in range(groups):
                pace = plan.rules[group, _PACE]
                if pace == 0:
                    continue
                due = start + paced[group] * pace
                while due <= now:
                    if not _make_due(plan, live, found, firsts[group] + paced[group] % sizes[group], due):
                        return
                    paced[group] += 1
                    due = start + paced[group] * pace
                pause = min(pause, due - now)
        else:
            stream = 0
            while stream < streams and live.answered[stream] == live.sent[stream]:
                stream += 1
            if stream == streams:
                return
        if now - heard > patience:
            stream = 0
            while stream < streams - 1 and live.answered[stream] == live.sent[stream]:
                stream += 1
            _fail(outcome, _NO_ANSWER, stream, 0)
            return
        ready = _wait(plan, live, pause)
        if ready < 0:
            _fail(outcome, _INTERRUPTED, 0, _errno())
            return
        for event in range(ready):
            stream = np.int64(plan.by_fd[live.events[event * EVENT_WORDS + EVENT_FD]])
            count = _receive(plan, live, found, stream)
            if count == 0:
                return
            at = 0
            while at < live.filled[stream]:
                following, what = _cut(plan, live, found, stream, at)
                if following == MORE:
                    if what != _DONE:
                        _fail(outcome, what, stream, 0)
                        live.last[stream, 0], live.last[stream, 1] = at, live.filled[stream]
                        return
                    break
                at = following
                if what == 0:
                    continue
                now = heard = _now(live.clock, MONOTONIC)
                stamp = live.stamps[stream, live.answered[stream] % RING]
                live.answered[stream] += 1
                if not measuring:
                    if now >= open_at:
                        measuring, begun, cpu = True, now, _now(live.clock, THREAD_CPU)
                elif not stopping:
                    found.latencies[messages], found.owners[messages] = now - stamp, stream
                    messages += 1
                    if (now >= until and messages >= streams) or messages == len(found.latencies):
                        stopping = True
                        outcome[_MESSAGES], outcome[_ELAPSED] = messages, now - begun
                        outcome[_CPU] = _now(live.clock, THREAD_CPU) - cpu
                if stopping:
                    continue
                if plan.rules[plan.group[stream], _PACE] == 0:
                    if not _make_due(plan, live, found, stream, now):
                        return
                elif live.sent[stream] < live.due[stream] and not _send_next(plan, live, found, stream):
                    return
            if at == live.filled[stream]:
                live.filled[stream] = 0
            elif at > 0:
                rest = live.filled[stream] - at
                for place in range(rest):
                    live.arrived[stream, place] = live.arrived[stream, at + place]
                live.filled[stream] = rest
            elif live.filled[stream] == live.arrived.shape[1]:
                _fail(outcome, _TOO_LONG, stream, 0)
                return


def rows(plan: Plan, answer_bytes: int, record: int, most: int) -> tuple[Live, Found]:
    """Fresh arrays for a run: at most `answer_bytes` of one answer with its header, the first `record` answers of a stream kept, `most` messages measured."""
    streams = len(plan.fds)
    longest = int(np.diff(plan.head_at).max() + np.diff(plan.body_at).max())

    def zeros(*shape: int, kind: Any = np.int64) -> npt.NDArray[Any]:
        return np.zeros(shape, kind)

    live = Live(
        due=zeros(streams),
        sent=zeros(streams),
        answered=zeros(streams),
        stamps=zeros(streams, RING),
        arrived=zeros(streams, answer_bytes, kind=np.uint8),
        filled=zeros(streams),
        last=zeros(streams, 2),
        out=zeros(len(plan.ack) + max(longest, 256), kind=np.uint8),
        events=zeros(EVENTS * EVENT_WORDS, kind=np.int32),
        clock=zeros(2),
        wait=zeros(2, kind=np.int32),
    )
    found = Found(
        latencies=zeros(most),
        owners=zeros(most, kind=np.int32),
        records=zeros(streams, record, answer_bytes if record else 0, kind=np.uint8),
        lengths=zeros(streams, record),
        outcome=zeros(len(Outcome)),
    )
    return live, found


@functools.cache
def prepare() -> None:
    """Compiles everything, which takes seconds where it was never done: connections that are open already would be given up meanwhile."""

    def zeros(*shape: int, kind: Any = np.int64) -> npt.NDArray[Any]:
        return np.zeros(shape, kind)

    plan = Plan(
        epoll=zeros(1, kind=np.int32),
        fds=zeros(0, kind=np.int32),
        by_fd=zeros(1, kind=np.int32),
        group=zeros(0),
        rules=zeros(1, len(Column)),
        heads=zeros(1, kind=np.uint8),
        head_at=zeros(2),
        bodies=zeros(1, kind=np.uint8),
        body_at=zeros(2),
        number_at=zeros(1),
        ack=zeros(1, kind=np.uint8),
    )
    live, found = rows(plan, 1, 0, 1)
    drive(plan, live, found, 0, 0, -1)  # without streams and patience it ends at once
