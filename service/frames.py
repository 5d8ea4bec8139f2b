"""From what a client sends to what the model takes: nested lists, raw float32 or `.npy` become checked frames (count, *frame_shape).

Checks happen in the client's own joint layout; the map onto the model's layout comes after them.
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from model import skeletons
from model.contract import Manifest
from service.errors import Empty, LayoutUnknown, Malformed, NotFinite, WrongShape

Frames = npt.NDArray[np.float32]

LARGEST = 1e6  # magnitudes beyond it are no measurement in any unit a model was trained in
NPY_MAGIC = b"\x93NUMPY"
_F4, _BITS = np.dtype("<f4"), np.dtype("<u4")
_WITHOUT_SIGN, _LARGEST_BITS = np.uint32(0x7FFFFFFF), np.float32(LARGEST).view(np.uint32)
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class FrameReader:
    """Reads the frames of one model in one client layout (None: the model's own).

    Every `from_...` returns float32 (count, *model's frame shape) and raises `Malformed`, `WrongShape`, `NotFinite` or `Empty`;
    `first` is the number of the first frame, so that errors name frames as the client counts them.
    """

    def __init__(self, manifest: Manifest, layout: str | None = None) -> None:
        self._missing = manifest.missing
        self._whole_joints = manifest.layout is not None
        self._map = None if layout in (None, manifest.layout) else LayoutMap(layout, manifest)
        self.shape = manifest.frame_shape if self._map is None else self._map.client_shape
        self._size = math.prod(self.shape)
        self.raw_bytes = 0 if self._missing or self._map else 4 * self._size  # of a frame that may go to the model unread, to be checked there; 0: none may
        self._pack = struct.Struct(f"{self._size}f").pack

    def from_json(self, value: Any, first: int = 0, literals: bool = True) -> Frames:
        """Nested lists of numbers, (count, *shape); `None` stands for a missing value, joint or body.

        `literals`: whether any true, false or null may be among them, as far as the caller knows.
        """
        if not isinstance(value, list):
            raise WrongShape(f"frames: expected a list of frames, got {_kind(value)}")
        if not value:
            raise Empty("frames is empty: send at least one frame")
        frames = self._packed(value, literals)
        if frames is not None:
            return frames if self._map is None else self._map(frames)
        return self._checked(np.array(list(_flatten(value, (len(value), *self.shape), "frames")), np.float64).reshape(-1, *self.shape), first)

    def from_bytes(self, payload: bytes | memoryview, first: int = 0, count: int | None = None) -> Frames:
        """Little-endian float32 values, frame after frame; `count` is how many frames a header announced."""
        step = 4 * self._size
        if len(payload) % step:
            raise WrongShape(f"{len(payload)} bytes are not whole frames of {self._spoken()} float32 values, {step} bytes each")
        if count is not None and len(payload) != count * step:
            raise Malformed(f"the header announces {count} frames, the payload holds {len(payload) // step}")
        if not len(payload):
            raise Empty("no frames: send at least one")
        return self._checked(np.frombuffer(payload, _F4).reshape(-1, *self.shape), first)

    def from_array(self, frames: npt.NDArray[Any], first: int = 0) -> Frames:
        """Real numbers (count, *shape), NaN for what is missing."""
        if frames.shape[1:] != self.shape:
            raise WrongShape(f"expected (frames, {self._spoken(', ')}), got {frames.shape}")
        if not len(frames):
            raise Empty("no frames: send at least one")
        return self._checked(frames, first)

    def from_npy(self, body: bytes, first: int = 0) -> Frames:
        """A NumPy file of real numbers, (count, *shape), any byte order and memory order; pickled objects are refused."""
        stream = io.BytesIO(body)
        try:
            shape, fortran, dtype = _NPY_HEADERS[np.lib.format.read_magic(stream)](stream)
        except Exception:  # NumPy reads the header as Python source, which fails in many ways
            raise Malformed("the header of the .npy file cannot be read") from None
        if dtype.hasobject or dtype.kind not in "fiu":
            raise Malformed(f".npy of {dtype}: expected real numbers, best float32")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise Malformed(f".npy announces the shape {shape}: expected whole numbers")
        data = memoryview(body)[stream.tell() :]
        if math.prod(shape) * dtype.itemsize != len(data):
            raise Malformed(f".npy announces {shape} {dtype}, {math.prod(shape) * dtype.itemsize} bytes, but holds {len(data)}")
        if len(shape) != 1 + len(self.shape) or shape[1:] != self.shape:
            raise WrongShape(f"expected (frames, {self._spoken(', ')}), got {shape}")
        if shape[0] == 0:
            raise Empty("no frames: send at least one")
        return self._checked(np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C"), first)

    def pack(self, value: Any, literals: bool) -> bytes | None:
        """Lists of plain numbers in the right shape as float32, whose size is yet to be checked (`all_fine`); None says nothing.

        `struct` takes numbers and nothing else, as many as it was told, but for true and false, which it takes for 1 and 0.
        """
        try:
            return b"".join([self._pack(*self._flat(frame, literals)) for frame in value])
        except (TypeError, ValueError, OverflowError, struct.error):
            return None

    def _packed(self, value: list[Any], literals: bool) -> Frames | None:
        """The fast path; None says nothing, the slow path then names the fault, if any."""
        packed = self.pack(value, literals)
        if not packed:
            return None
        frames = np.frombuffer(packed, np.float32).reshape(-1, *self.shape)
        return frames if all_fine(frames) else None

    def _flat(self, frame: Any, literals: bool) -> Any:
        """The values of one frame; raises `TypeError` or `ValueError` where lists inside have wrong lengths, and for true and false."""
        if len(self.shape) > 1:
            values: list[Any] = [frame]
            for size in self.shape:
                if set(map(len, values)) != {size}:
                    raise ValueError(size)
                values = list(chain.from_iterable(values))
            frame = values
        if literals and bool in set(map(type, frame)):
            raise TypeError(bool)
        return frame

    def _checked(self, frames: npt.NDArray[Any], first: int) -> Frames:
        if all_fine(frames):
            return frames if self._map is None else self._map(frames)
        if frames.dtype.kind != "f":
            frames = frames.astype(np.float64)  # the magnitude of the least integer is no integer
        with np.errstate(all="ignore"):
            fine = np.abs(frames) <= LARGEST  # false for NaN and infinities too
            if not fine.all():
                frames = self._with_missing(frames, fine, first)
            frames = np.ascontiguousarray(frames, np.float32)
            return frames if self._map is None else self._map(frames)

    def _with_missing(self, frames: npt.NDArray[Any], fine: npt.NDArray[np.bool_], first: int) -> npt.NDArray[Any]:
        missing = np.isnan(frames)
        beyond = ~fine & ~missing
        if beyond.any():
            place = tuple(int(i) for i in np.argwhere(beyond)[0])
            raise _not_finite(first, place, f"{frames[place]} is not a finite number of magnitude at most {LARGEST:.0f}")
        if not self._missing:
            raise _not_finite(first, tuple(int(i) for i in np.argwhere(missing)[0]), "is missing, and this model takes no missing values")
        if self._whole_joints:
            partly = missing.any(-1) & ~missing.all(-1)
            if partly.any():
                raise _not_finite(first, tuple(int(i) for i in np.argwhere(partly)[0]), "only some coordinates are missing; a joint is missing as a whole")
        return np.where(missing, np.nan, frames)  # one and the same NaN, whatever bits the client sent

    def _spoken(self, between: str = " x ") -> str:
        return between.join(map(str, self.shape))


@dataclass(slots=True)  # not frozen: made for each message, and frozen ones take four times as long
class Payload:
    """Frames as they came: parsed JSON, raw bytes, a NumPy file or an array of it; `size` in bytes, `count` as a header announced it, `t` the time of each.

    `literals`: whether the JSON may have true, false or null in it; without them lists need not be looked through.
    """

    form: Literal["json", "raw", "npy", "array"]
    value: Any
    size: int
    count: int | None = None
    t: Any = None
    literals: bool = True

    def read(self, reader: FrameReader, first: int = 0) -> Frames:
        """Raises what `FrameReader` raises."""
        if self.form == "json":
            return reader.from_json(self.value, first, self.literals)
        if self.form == "array":
            return reader.from_array(self.value, first)
        return reader.from_npy(self.value, first) if self.form == "npy" else reader.from_bytes(self.value, first, self.count)


class LayoutMap:
    """Turns frames (count, ..., joints of the client, coordinates) into the model's joints: means of source joints times signs."""

    def __init__(self, layout: str | None, manifest: Manifest) -> None:
        if manifest.layout is None:
            raise LayoutUnknown("this model's frames are no skeletons: it has no layout")
        try:
            found = skeletons.mapping(layout or "", manifest.layout)
        except skeletons.UnknownLayout as error:
            raise LayoutUnknown(str(error), layouts=list(skeletons.reachable(manifest.layout))) from None
        self.client_shape = (*manifest.frame_shape[:-2], len(found.source.joints), manifest.frame_shape[-1])
        self._first = np.array([sources[0] for sources in found.sources])
        self._further = _further_sources(found.sources)
        counts = np.array([len(sources) for sources in found.sources], np.float32)
        self._factor = np.array(found.signs, np.float32) / counts[:, None]

    def __call__(self, frames: Frames) -> Frames:
        mapped = frames[..., self._first, :]
        for targets, sources in self._further:  # one addition per rank of source keeps a frame's bits independent of its neighbours
            mapped[..., targets, :] += frames[..., sources, :]
        mapped *= self._factor
        return np.ascontiguousarray(mapped)


def all_fine(frames: npt.NDArray[Any]) -> bool:
    """Whether these are float32 in C order, each finite and below `LARGEST`; False says nothing: at `LARGEST` the double from which it was rounded decides.

    Without their sign the bits of floats are ordered as the floats are, with infinities and NaN above: less than half the time of comparing floats,
    which matters for live frames that come one by one.
    """
    if frames.dtype != _F4 or not frames.flags.c_contiguous:
        return False
    return bool(np.maximum.reduce(frames.view(_BITS) & _WITHOUT_SIGN, axis=None) < _LARGEST_BITS)


def _further_sources(sources: tuple[tuple[int, ...], ...]) -> list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
    """For the second, third, ... source: which target joints have one, and which it is."""
    ranks = []
    for rank in range(1, max(map(len, sources))):
        targets = [j for j, of_joint in enumerate(sources) if len(of_joint) > rank]
        ranks.append((np.array(targets, np.intp), np.array([sources[j][rank] for j in targets], np.intp)))
    return ranks


def _flatten(value: Any, shape: tuple[int, ...], where: str) -> Any:
    """Yields the numbers of nested lists, NaN for null; raises `WrongShape` naming the first place that is not as it should be."""
    if value is None and where != "frames":
        yield from [math.nan] * math.prod(shape)
    elif not shape:
        if type(value) not in (int, float):
            raise WrongShape(f"{where}: expected a number, got {_kind(value)}")
        yield float(value)
    else:
        what = "numbers" if len(shape) == 1 else "lists"
        if not isinstance(value, list):
            raise WrongShape(f"{where}: expected {shape[0]} {what}, got {_kind(value)}")
        if len(value) != shape[0]:
            raise WrongShape(f"{where}: expected {shape[0]} {what}, got {len(value)}")
        for i, item in enumerate(value):
            yield from _flatten(item, shape[1:], f"{where}[{i}]")


def _kind(value: Any) -> str:
    names = {str: "a string", bool: "true or false", dict: "an object", list: "a list", type(None): "null"}
    return names.get(type(value), "a number")


def _not_finite(first: int, place: tuple[int, ...], why: str) -> NotFinite:
    frame, *rest = place
    inside = "".join(f"[{i}]" for i in rest)
    return NotFinite(f"frame {first + frame}: value{inside and ' ' + inside} {why}", frame=first + frame)
