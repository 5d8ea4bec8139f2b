"""Streams of people whom a served model has never seen: the model's file, its configuration's test clips, and the body moving from one to the next.

Nothing jumps: between two clips the body goes over from one pose to the other, be it another person's.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from model.contract import MANIFEST_KEY, MODEL_FILE, EventRules, Manifest
from service.client import Event
from tests.server_process import ROOT
from training import config as configs
from training import splits
from training.config import StreamConfig
from training.datasets.recordings import Segments
from training.stream_figures import Scores, StreamFigures, measure
from training.streams import Stream, Streams

Frames = npt.NDArray[np.float32]

SHIPPED = ROOT / "service" / "models"
CONFIGS = ROOT / "training" / "configs"
REPEATED = 0.5  # share of actions done again next, where the configuration says nothing of streams: exercises come in series
WITHOUT_END = 10**9
NO_RULES = EventRules(nothing=None, enter=1.0, leave=1.0, least=1, gap=1)  # figures of events are not looked at where a model has no rules


class BenchError(Exception):
    """What keeps a benchmark from running, in a sentence."""


@dataclass(frozen=True)
class Served:
    """A model as the service will serve it."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        return self.path.parents[1].name

    @property
    def version(self) -> str:
        return self.path.parent.name


def find(models: Path, name: str) -> Served:
    """The highest version of a model in a folder of models; raises `BenchError`."""
    paths = list((models / name).glob(f"*/{MODEL_FILE}"))
    if not paths:
        raise BenchError(f"{models / name}: no model there (wanted: VERSION/{MODEL_FILE}); name the folder that holds it with --models")
    path = max(paths, key=lambda one: (one.parent.name.isdecimal(), int(one.parent.name) if one.parent.name.isdecimal() else 0, one.parent.name))
    properties = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_modelmeta().custom_metadata_map
    if MANIFEST_KEY not in properties:
        raise BenchError(f"{path}: has no manifest, so it is none of this project's models")
    return Served(path, Manifest.from_json(properties[MANIFEST_KEY]))


class HeldOut:
    """Streams of a model's test people; `segments` are told in the model's own classes.

    Raises `BenchError`, or what reading raises (`training.config.ConfigError`, `training.datasets.clips.DataError`), naming what to mend.
    """

    def __init__(self, served: Served, config: Path, data: Path) -> None:
        read = configs.load(config)
        read = dataclasses.replace(read, data=dataclasses.replace(read.data, path=str(data)))
        manifest = served.manifest
        nothing = manifest.events.nothing if manifest.events is not None else None
        settings = read.streams or StreamConfig(repeat=REPEATED)
        settings = dataclasses.replace(settings, nothing=nothing or "")
        unseen = splits.load(read).whole("test")
        self.streams = Streams(unseen, settings)
        without_end = dataclasses.replace(settings, together=(), cuts=0.0, whole=0.0, stay=(WITHOUT_END, WITHOUT_END))
        self._without_end = Streams(unseen, without_end)
        clips = self.streams.clips
        if clips.frame_shape != manifest.frame_shape:
            raise BenchError(f"{config}: frames of its data are {clips.frame_shape}, the model {served.name} takes {manifest.frame_shape}")
        if unknown := [name for name in clips.classes if name not in manifest.classes]:
            raise BenchError(f"{config}: its data has the action {unknown[0]!r}, which the model {served.name} does not know")
        self.fps = clips.fps
        self._labels = np.array([manifest.classes.index(name) for name in clips.classes])

    def endless(self, frames: int, seed: int) -> Iterator[Stream]:
        """One stream of so many frames, in which anybody follows anybody, piece by piece; of equal arguments the same.

        An action that does not fit any more is none of its segments.
        """
        left = frames
        for piece in self._without_end.pieces(np.random.default_rng(seed)):
            yield self._named(piece.frames[:left], piece.segments[piece.segments[:, 1] <= left])
            left -= len(piece.frames)
            if left <= 0:
                return

    def finite(self, number: int, actions: int, seed: int) -> Stream:
        """A stream of so many actions, of one person where the configuration says so: one that `python -m training streams` reports on, if of its seed."""
        stream = self.streams.stream("smooth", number, seed=seed, actions=actions)
        return self._named(stream.frames, stream.segments)

    def _named(self, frames: Frames, segments: Segments) -> Stream:
        named = segments.copy()
        named[:, 2] = self._labels[segments[:, 2]]
        return Stream(frames, np.zeros(0, np.int64), named, np.zeros(len(named), bool))


def chunks(pieces: Iterable[Frames], size: int) -> Iterator[Frames]:
    """The same frames, `size` at a time; the last may be fewer."""
    rest: Frames | None = None
    for piece in pieces:
        rest = piece if rest is None else np.concatenate([rest, piece])
        whole = len(rest) - len(rest) % size
        yield from (rest[start : start + size] for start in range(0, whole, size))
        rest = rest[whole:]
    if rest is not None and len(rest):
        yield rest


def figures(manifest: Manifest, scores: Sequence[Scores], streams: Sequence[Segments]) -> StreamFigures:
    """Per frame and per action; events are counted by `found` instead, as the service told them."""
    return measure(scores, streams, manifest.classes, manifest.events or NO_RULES)


def found(events: Iterable[Event], classes: Sequence[str], end: int) -> npt.NDArray[np.int64]:
    """What the service told as events (n, 4): first frame, end, label, frame in which the start was decided. One still open ends at `end`."""
    rows: list[list[int]] = []
    for event in events:
        if event.event == "start":
            rows.append([event.frame, end, classes.index(event.label), event.decided])
        else:
            rows[-1][1] = event.frame
    return np.array(rows, np.int64).reshape(-1, 4)


def options(parser: argparse.ArgumentParser) -> None:
    """Which model, and of what data."""
    parser.add_argument("--data", type=Path, required=True, help="what the configuration's reader reads, e.g. ui-prmd-kinect-xyz.npz")
    parser.add_argument("--model", default="rehab-exercises", help="name of the served model (default rehab-exercises)")
    parser.add_argument("--models", type=Path, default=SHIPPED, help="folder of models it is in (default: the shipped ones)")
    parser.add_argument("--config", type=Path, help="its configuration, which names reader and test people (default: training/configs/MODEL.toml)")
    parser.add_argument("--seed", type=int, default=20261122, help="of the streams")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")


def prepare(args: argparse.Namespace) -> tuple[Served, HeldOut]:
    """The model and its streams, of the arguments that `options` has added."""
    served = find(args.models.resolve(), args.model)
    return served, HeldOut(served, args.config or CONFIGS / f"{args.model}.toml", args.data)


def described(served: Served, held: HeldOut, **more: Any) -> dict[str, Any]:
    """What figures are of."""
    source = held.streams.clips
    people = {"model": served.name, "version": served.version, "fingerprint": served.manifest.fingerprint[:12]}
    return {**people, "data": f"{source.source.name}, {len(source)} clips of the test part", **more}
