"""The terminal player: `python -m service stream FILE --model NAME` plays a recording into a running service and shows what it recognises.

On a terminal the current label, the top classes, the round trip and the delay are drawn in place; elsewhere one plain line is printed
for each change of label. Events, of models that have rules for them, are lines as they come; both end with one line of summary.
"""

from __future__ import annotations

import asyncio
import csv
import json
import math
import os
import sys
import time
import zipfile
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from model import skeletons
from service.client import TOP, Answer, AsyncClient, AsyncStream, ClientError, Event, Model, ModelChanged, Notice
from service.errors import ModelNotFound, ServiceError

Frames = npt.NDArray[np.float32]

SAMPLES = Path(__file__).parent / "samples"
SUFFIXES = (".npy", ".npz", ".json", ".csv")
LATE_S = 0.1  # behind the recording's own clock by more than this is worth saying
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


class PlayerError(Exception):
    """The recording or the options cannot be played; the message says what to do."""


@dataclass(frozen=True)
class Recording:
    """Frames (T, ...) float32, NaN where missing, with the frame rate and joint layout where the file states them."""

    name: str
    frames: Frames
    fps: float | None = None
    layout: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.frames.shape[1:]


# ---- reading recordings


def find_recording(name: str) -> Path:
    """The file of this name, or the shipped sample of it; raises `PlayerError` saying which samples there are."""
    path = Path(name)
    if path.is_file():
        return path
    if path.name == name:
        for sample in _samples():
            if name in (sample.name, sample.stem):
                return sample
    what = "is a folder, not a recording" if path.is_dir() else "is no file"
    names = sorted({sample.stem for sample in _samples()})
    raise PlayerError(f"{name} {what}" + (f"; shipped samples: {', '.join(names)}" if names else ""))


def _samples() -> list[Path]:
    return sorted(path for path in SAMPLES.rglob("*") if path.suffix in SUFFIXES and path.name != "index.csv")


def read_recording(path: Path) -> Recording:
    """Reads a .npy, .npz, .json or .csv file; raises `PlayerError` naming the file and what was expected."""
    readers = {".npy": _read_npy, ".npz": _read_npz, ".json": _read_json, ".csv": _read_csv}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise PlayerError(f"{path}: a recording ends in {', '.join(SUFFIXES)}")
    try:
        recording = reader(path)
    except (OSError, ValueError, TypeError, EOFError, KeyError, OverflowError, RecursionError, zipfile.BadZipFile, csv.Error) as error:
        raise PlayerError(f"{path}: cannot be read: {error}") from None
    if recording.fps is not None and not 0 < recording.fps < math.inf:
        raise PlayerError(f"{path}: expected frames a second above 0, got fps {recording.fps:g}")
    if recording.frames.ndim < 2 or recording.frames.size == 0:
        raise PlayerError(f"{path}: expected frames of shape (time, ...), got {recording.frames.shape}")
    return recording


def _read_npy(path: Path) -> Recording:
    return Recording(path.stem, _floats(np.load(path, allow_pickle=False)))


def _read_npz(path: Path) -> Recording:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:  # NumPy leaves a file open that is no archive
        names = [name for name in archive.files if name not in ("fps", "layout")]
        key = "frames" if "frames" in names else names[0] if len(names) == 1 else None
        if key is None:
            raise ValueError(f"expected one array or one called 'frames', got {', '.join(archive.files) or 'none'}")
        fps = float(archive["fps"]) if "fps" in archive.files else None
        layout = str(archive["layout"]) if "layout" in archive.files else None
        return Recording(path.stem, _floats(archive[key]), fps, layout)


def _read_json(path: Path) -> Recording:
    value = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(value, list):
        value = {"frames": value}
    if not isinstance(value, dict) or "frames" not in value:
        raise ValueError('expected {"frames": [...]} or a list of frames')
    fps, layout = value.get("fps"), value.get("layout")
    return Recording(path.stem, _floats(np.array(_filled(value["frames"], _depth(value["frames"])), np.float64)), None if fps is None else float(fps), layout)


def _depth(value: Any) -> tuple[int, ...]:
    """The shape of nested lists, as far as it can be told where `null` stands for whole joints."""
    if not isinstance(value, list):
        return ()
    return (len(value), *max((_depth(item) for item in value), key=len, default=()))


def _filled(value: Any, shape: tuple[int, ...]) -> Any:
    """Nested lists in which every `null` is as many NaN as belong there."""
    if value is None:
        return np.full(shape, np.nan).tolist()
    return [_filled(item, shape[1:]) for item in value] if isinstance(value, list) else value


def _read_csv(path: Path) -> Recording:
    """One frame a line; an empty cell is a missing value; a first line that holds no number is a header."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    if lines and not any(_is_number(cell) for cell in lines[0][1]):
        lines = lines[1:]
    width = len(lines[0][1]) if lines else 0
    for number, row in lines:
        if len(row) != width:
            raise ValueError(f"line {number}: expected {width} values, got {len(row)}")
        if wrong := next((cell for cell in row if cell.strip() and not _is_number(cell)), None):
            raise ValueError(f"line {number}: {wrong!r} is no number")
    return Recording(path.stem, _floats(np.array([[float(cell) if cell.strip() else math.nan for cell in row] for _, row in lines])))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _floats(array: npt.NDArray[Any]) -> Frames:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"expected numbers, got an array of {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.float32)


def fit(recording: Recording, model: Model, layout: str | None) -> Frames:
    """The frames in the shape the service expects of `layout` (the model's own where None): flat frames are folded.

    Raises `PlayerError` with both shapes and the layouts that could be meant.
    """
    want = expected_shape(model, layout)
    if recording.shape == want:
        return recording.frames
    if math.prod(recording.shape) == math.prod(want) and (len(recording.shape) == 1 or 1 in recording.shape + want):
        return recording.frames.reshape(-1, *want)
    raise PlayerError(f"{recording.name} has frames of shape {recording.shape}, {model.name} takes {want}{_layout_advice(recording, model, layout)}")


def expected_shape(model: Model, layout: str | None) -> tuple[int, ...]:
    """The shape of one frame in `layout`; raises `PlayerError` where the model cannot take that layout."""
    if layout is None or layout == model.layout:
        return model.frame_shape
    if model.layout is None:
        raise PlayerError(f"{model.name} takes no joint layouts; leave --layout out")
    if layout not in (known := skeletons.reachable(model.layout)):
        raise PlayerError(f"{model.name} cannot take layout {layout!r}; --layout may be one of: {', '.join(known)}")
    return (*model.frame_shape[:-2], len(skeletons.layout(layout).joints), model.frame_shape[-1])


def _layout_advice(recording: Recording, model: Model, layout: str | None) -> str:
    if model.layout is None:
        return ""
    fitting = [name for name in skeletons.reachable(model.layout) if name != layout and expected_shape(model, name) == recording.shape]
    return f" (layout {layout or model.layout})" + (f"; try --layout {' or '.join(fitting)}" if fitting else "")


# ---- playing


class Playback:
    """What has been played and answered so far: the figures behind the display and the summary."""

    def __init__(self, frames: int | None, fps: float) -> None:
        self.frames, self.fps = frames, fps  # frames of the whole recording, None where it goes round for ever
        self.started = time.monotonic()
        self.sent: deque[tuple[int, float]] = deque()  # (end of message, when it was handed over)
        self.round_trips: deque[float] = deque(maxlen=4096)  # seconds
        self.answer: Answer | None = None
        self.answers = self.changes = self.events = 0
        self.on_event: Callable[[Event], None] = lambda _: None
        self.on_notice: Callable[[str], None] = say
        self.late_s = self.worst_late_s = 0.0

    def note_sent(self, end: int, late_s: float) -> None:
        self.sent.append((end, time.monotonic()))
        self.late_s, self.worst_late_s = late_s, max(self.worst_late_s, late_s)

    def note_answer(self, answer: Answer) -> bool:
        """Whether the label is another than before."""
        while self.sent and self.sent[0][0] <= answer.frame + 1:
            self.round_trips.append(time.monotonic() - self.sent.popleft()[1])
        changed = self.answer is None or self.answer.label != answer.label or answer.label is None
        self.answer, self.answers, self.changes = answer, self.answers + 1, self.changes + changed
        return changed

    def note_event(self, event: Event) -> None:
        self.events += 1
        self.on_event(event)

    def note_notice(self, notice: Notice) -> None:
        self.on_notice(describe_notice(notice))

    def round_trip_ms(self) -> tuple[float, float]:
        """Median and 99th percentile of the latest round trips, NaN before the first."""
        if not self.round_trips:
            return math.nan, math.nan
        p50, p99 = np.percentile(np.array(self.round_trips), [50, 99]) * 1e3
        return float(p50), float(p99)

    def summary(self) -> str:
        seconds = time.monotonic() - self.started
        frame = self.answer.frame + 1 if self.answer else 0
        p50, p99 = self.round_trip_ms()
        last = f", last {describe(self.answer)}" if self.answer else ""
        events = f", {self.events} events" if self.events else ""
        late = f", up to {self.worst_late_s:.1f} s late" if self.worst_late_s > LATE_S else ""
        told = f"{self.answers} answers to frame {frame} in {seconds:.1f} s, {self.changes} changes{events}{last}"
        return f"{told}, round trip p50 {p50:.1f} ms p99 {p99:.1f} ms{late}"


def describe(answer: Answer) -> str:
    """The label and its score, or the values themselves where a model has no labels."""
    if answer.label is not None:
        return f"{answer.label} {answer.score:.3f}"
    return " ".join(f"{value:.3f}" for value in (answer.scores[:TOP] if answer.scores is not None else ()))


def describe_event(event: Event) -> str:
    """`frame time start|end label score`, and when it was known."""
    cause = f" by {event.cause}" if event.cause else ""
    return f"{event.frame} {event.time:.2f} {event.event} {event.label} {event.score:.3f} decided {event.decided}{cause}"


def describe_notice(notice: Notice) -> str:
    """One line for a person."""
    if isinstance(notice, ModelChanged):
        return f"from frame {notice.frame} on version {notice.version} answers, the one before is gone"
    return notice.message


def say(notice: str) -> None:
    print(f"note: {notice}", file=sys.stderr)


async def paced(frames: Frames, fps: float, chunk: int, loop: bool, note: Callable[[int, float], None]) -> AsyncIterator[Frames]:
    """Chunks of the recording, each when its last frame is due; `note(end, late_s)` hears of each.

    Never skips a frame: where the service is slower than the recording, chunks come late and the lateness is told.
    """
    started, end = time.monotonic(), 0
    for piece in _pieces(frames, chunk, loop):
        end += len(piece)
        due = started + end / fps
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        note(end, time.monotonic() - due)
        yield piece


def _pieces(frames: Frames, chunk: int, loop: bool) -> Iterator[Frames]:
    while True:
        for start in range(0, len(frames), chunk):
            yield frames[start : start + chunk]
        if not loop:
            return


# ---- showing


class PlainView:
    """One line `frame time label score` for each change of label: for pipes, files and logs."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def show(self, playback: Playback, changed: bool) -> None:
        if changed and (answer := playback.answer):
            self.console.out(f"{answer.frame} {answer.time:.2f} {describe(answer)}", highlight=False)

    def show_event(self, event: Event) -> None:
        self.console.out(describe_event(event), highlight=False)

    def show_notice(self, notice: str) -> None:
        say(notice)


class LiveView:
    """The same in place on a terminal, redrawn ten times a second."""

    def __init__(self, console: Console, title: str, stream: AsyncStream) -> None:
        self.title, self.stream = title, stream
        self.playback: Playback | None = None
        self.live = Live(console=console, get_renderable=self.render, refresh_per_second=10)

    def __enter__(self) -> LiveView:
        self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.live.stop()

    def show(self, playback: Playback, changed: bool) -> None:
        self.playback = playback

    def show_event(self, event: Event) -> None:
        """Above what is drawn, where it stays."""
        self.live.console.print(Text(describe_event(event)))

    def show_notice(self, notice: str) -> None:
        self.live.console.print(Text(f"note: {notice}"))

    def render(self) -> RenderableType:
        playback = self.playback
        if playback is None or playback.answer is None:
            return Text(f"{self.title}: waiting for the first answer")
        answer = playback.answer
        return Group(Text(self.title, style="dim"), Text(answer.label or "", style="bold"), self._bars(answer), self._status(playback, answer))

    def _bars(self, answer: Answer) -> Table:
        table = Table.grid(padding=(0, 1))
        for label, score in answer.top:
            table.add_row(Text(label), ProgressBar(total=1.0, completed=score, width=40), f"{score:.3f}")
        if answer.label is None and answer.scores is not None:
            for name, value in zip(self.stream.classes[:TOP], answer.scores, strict=False):
                table.add_row(Text(name), f"{value:.3f}")
        return table

    def _status(self, playback: Playback, answer: Answer) -> Text:
        p50, p99 = playback.round_trip_ms()
        of = f" of {playback.frames}" if playback.frames else ""
        text = Text(f"frame {answer.frame + 1}{of}, {answer.time:.1f} s, round trip p50 {p50:.1f} ms p99 {p99:.1f} ms", style="dim")
        if playback.late_s > LATE_S:
            text.append(f", {playback.late_s:.1f} s late", style="yellow")
        if not self.stream.connected:
            text.append(", connection lost, trying again", style="red")
        elif self.stream.reconnects:
            text.append(f", {self.stream.reconnects} times reconnected", style="yellow")
        return text


# ---- the command


@dataclass(frozen=True)
class Options:
    """What the command was asked to do."""

    file: str
    model: str
    url: str
    fps: float | None  # of the recording; None is what the file says, else the model's
    speed: float
    chunk: int  # frames per message
    token: str | None
    layout: str | None  # of the recording; None is what the file says, else the model's
    loop: bool


def run(options: Options) -> int:
    """Plays and shows; returns the exit status: 0, 1 after one line that says what is wrong, 130 after Ctrl-C."""
    console = Console(soft_wrap=True)
    try:
        asyncio.run(play(options, console))
    except KeyboardInterrupt:
        return INTERRUPTED
    except (PlayerError, ClientError, ServiceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our lines has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


async def play(options: Options, console: Console) -> None:
    """Plays the recording to its end and prints the summary, also when it is cancelled half-way."""
    if options.fps is not None and not 0 < options.fps < math.inf:
        raise PlayerError(f"--fps must be a number above 0, got {options.fps:g}")
    recording = read_recording(find_recording(options.file))
    async with AsyncClient(options.url, token=options.token) as client:
        model = await _model(client, options.model)
        layout = options.layout or recording.layout
        frames = fit(recording, model, layout)
        fps = options.fps or recording.fps or model.fps
        playback = Playback(None if options.loop else len(frames), fps)
        source = paced(frames, fps * options.speed, options.chunk, options.loop, playback.note_sent)
        stream = await client.stream(model.name, fps=fps, layout=layout, on_event=playback.note_event, on_notice=playback.note_notice).open()
        try:
            await _show(stream, source, playback, console, recording.name)
        finally:
            playback.on_notice = say
            await stream.close()  # before the summary: the last events may still be on their way
            console.out(playback.summary(), highlight=False)


async def _model(client: AsyncClient, name: str) -> Model:
    try:
        return await client.model(name)
    except ModelNotFound as error:
        known = ", ".join(model["name"] for model in await client.models())
        raise PlayerError(f"{error}; this service has: {known}") from None


async def _show(stream: AsyncStream, source: AsyncIterator[Frames], playback: Playback, console: Console, title: str) -> None:
    view = LiveView(console, f"{title} into {stream.model}", stream) if console.is_terminal else PlainView(console)
    playback.started, playback.on_event = time.monotonic(), view.show_event
    with view:
        playback.on_notice = view.show_notice
        async for answer in stream.play(source):
            view.show(playback, playback.note_answer(answer))
