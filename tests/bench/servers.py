"""Who answers in a run: their programs, started when they are first asked for, and what is said to each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from model.contract import Manifest
from tests.bench import programs
from tests.bench.dialects import JSON, OCTETS, Clips, Dialect, Floats, RestSteps, SequenceSteps, Streaming
from tests.bench.load import Group, run
from tests.bench.programs import Program
from tests.bench.rivals.dialects import HandWritten, HandWrittenClips, HandWrittenWebsocket
from tests.bench.rivals.rival import Rival
from tests.bench.wire import Http

ACTIVE = 64  # of the sessions of a crowded service
TOGETHER = 50  # requests sent before the first answer is read
DIALECTS: dict[str, tuple[str, type[Dialect], bool]] = {  # program, dialect, whether it keeps no streams
    "service": ("service", Streaming, False),
    "crowded": ("crowded", Streaming, False),
    "infer": ("service", SequenceSteps, False),
    "steps": ("service", RestSteps, False),
    "clips": ("service", Clips, False),
    "echo": ("echo", Streaming, True),
    "http echo": ("echo", SequenceSteps, True),
    "picows echo": ("picows echo", Streaming, True),
    "json echo": ("json echo", RestSteps, True),
    "hand-written JSON": ("hand-written", HandWritten, False),
    "hand-written clips": ("hand-written", HandWrittenClips, False),
    "hand-written websocket": ("hand-written", HandWrittenWebsocket, False),
}


class Servers:
    """The programs of one run; `open_sessions` are held by the crowded service, those that are active among them."""

    def __init__(self, folder: Path, model: Path, manifest: Manifest, frames: Floats, open_sessions: int, rivals: Sequence[Rival] = ()) -> None:
        self.folder = folder
        self._rivals = {rival.name: rival for rival in rivals}
        self._dialects = DIALECTS | {rival.name: (rival.name, rival.dialect, False) for rival in rivals}
        self._dialects |= {rival.whole: (rival.name, rival.clips, False) for rival in rivals}
        self.frames = frames
        self._models, self._model, self._manifest = folder / "models", model, manifest
        self._idle = open_sessions - ACTIVE
        self._stack = ExitStack()
        self._running: dict[str, Program] = {}
        self.session_bytes = float("nan")  # of an idle session, once the crowded service runs

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def dialect(self, who: str) -> Dialect:
        program, dialect, bare = self._dialects[who]
        return dialect(self.program(program).url, self.classes, bare=bare)

    @property
    def classes(self) -> int:
        return len(self._manifest.classes)

    @property
    def known(self) -> set[str]:
        """Who can be asked."""
        return set(self._dialects)

    @property
    def process_ids(self) -> list[int]:
        """Of the programs that run, without those that they started."""
        return [program.process_id for program in self._running.values()]

    def program(self, name: str) -> Program:
        if name not in self._running:
            self._running[name] = self._start(name)
        return self._running[name]

    def _start(self, name: str) -> Program:
        enter = self._stack.enter_context
        if name in self._rivals:
            return enter(self._rivals[name].run(self._model, self.folder))
        if name == "service":
            return enter(programs.service(self._models))
        if name == "crowded":
            return self._crowd(enter(programs.service(self._models, sessions=2 * (self._idle + ACTIVE), idle_s=3600)))
        if name == "json echo":
            return enter(programs.script("json_echo.py", self._sample()))
        if name == "hand-written":
            return enter(programs.script("handwritten.py", self._model))
        infer = SequenceSteps(self.program("service").url, self.classes).sample(self.frames[:1])
        return enter(programs.script("echo.py", 4 * self.classes, len(infer), *(["picows"] if name == "picows echo" else [])))

    def _sample(self) -> Path:
        """A file with an answer to a session's step, which the JSON echo gives every time."""
        body, file = json.dumps({"first": 0, "frames": self.frames[:1].tolist()}).encode(), self.folder / "answer.json"
        with Http(self.program("service").url, "sample") as wire:
            session = json.loads(wire.ask("POST", "/v1/models/bench/sessions"))["session"]
            file.write_bytes(wire.ask("POST", f"/v1/sessions/{session}/frames", body, Content_Type=JSON))
            wire.ask("DELETE", f"/v1/sessions/{session}")
        return file

    def _crowd(self, program: Program) -> Program:
        """Opens the idle sessions, each of which has taken a frame, and notes what memory they take. Loaded before, so that nothing else grows then."""
        run([Group(Streaming(program.url, self.classes), ACTIVE)], self.frames, 0.3)
        before = program.memory()
        frame = self.frames[:1].tobytes()
        with Http(program.url, "idle sessions") as wire:
            for start in range(0, self._idle, TOGETHER):
                opened = wire.ask_many([("POST", "/v1/models/bench/sessions", b"")] * min(TOGETHER, self._idle - start))
                paths = [f"/v1/sessions/{json.loads(answer)['session']}/frames?first=0&ack=1&answers=binary" for answer in opened]
                wire.ask_many([("POST", path, frame) for path in paths], Content_Type=OCTETS)
        self.session_bytes = (program.memory() - before) / self._idle
        return program
