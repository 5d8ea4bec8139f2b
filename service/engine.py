"""A model file made runnable: loaded, its device chosen and proven, its own self-test passed. The only importer of onnxruntime."""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at import: its builds send usage events to their maker unless told not to
import onnxruntime

from model.contract import FRAMES, INPUTS, LENGTHS, MANIFEST_KEY, NEXT_STATE, OUTPUTS, SCORES, STATE, Manifest, ManifestError
from service.errors import StartupError

Floats = npt.NDArray[np.float32]
Lengths = npt.NDArray[np.int64]
DeviceChoice = Literal["auto", "cuda", "cpu"]

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
_QUIET = 3  # onnxruntime's log severity: errors only
_WARM_UP_SHAPES = ((1, 1), (1, 32), (16, 1))  # (batch, time)


class EngineError(Exception):
    """This file cannot be served; the message says why."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where a model runs: `name` is cuda or cpu, `reason` says why it is not what was hoped for ("" if it is)."""

    name: str
    provider: str
    threads: int
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "provider": self.provider, "threads": self.threads, "reason": self.reason}


class Engine:
    """One loaded model. `run_batch` may be called from one thread at a time and keeps nothing between calls."""

    def __init__(self, session: onnxruntime.InferenceSession, manifest: Manifest, device: Device) -> None:
        self._run: Callable[..., Any] = session.run
        self.manifest = manifest
        self.device = device

    @classmethod
    def load(cls, path: Path, choice: DeviceChoice, threads: int | None = None) -> Engine:
        """Loads, checks, proves and warms up; raises `EngineError` for a bad file, `StartupError` for a device that cannot run."""
        try:
            return cls._load(path, choice, threads)
        finally:
            _give_memory_back()

    @classmethod
    def _load(cls, path: Path, choice: DeviceChoice, threads: int | None) -> Engine:
        _refuse_both_builds()
        model = _read(path)
        threads = threads or default_threads()
        reason = cuda_obstacle() if choice != "cpu" else ""
        if choice != "cpu" and not reason:
            try:
                return cls._on(model, Device("cuda", _CUDA, threads))
            except Exception as error:  # whatever a driver throws: it means that CUDA does not run here
                reason = _first_line(error)
        engine = cls._on(model, Device("cpu", _CPU, threads, reason and f"cuda not used: {reason}"))  # a bad file fails here too, by its own name
        if choice == "cuda":
            raise StartupError(f"device cuda cannot run: {reason}")
        return engine

    @classmethod
    def _on(cls, model: bytes, device: Device) -> Engine:
        session = _open(model, device)
        manifest = _read_manifest(session)
        _check_tensors(session, manifest)
        engine = cls(session, manifest, device)
        engine._self_test()
        for batch, time in _WARM_UP_SHAPES:
            shape = (batch, time, *manifest.frame_shape)
            engine.run_batch(np.zeros(shape, np.float32), np.full(batch, time, np.int64), np.zeros((batch, manifest.state_width), np.float32))
        return engine

    def run_batch(self, frames: Floats, lengths: Lengths, state: Floats) -> tuple[Floats, Floats]:
        """frames (batch, time, *frame_shape), lengths (batch,), state (batch, S) -> scores (batch, time, classes), next_state (batch, S)."""
        scores, next_state = self._run(OUTPUTS, {FRAMES: frames, LENGTHS: lengths, STATE: state})
        return scores, next_state

    def close(self) -> None:
        """Frees the model's memory and gives it back to the system; takes a while where it is large. It must not be run any more."""
        self._run = _closed
        _give_memory_back()

    def _self_test(self) -> None:
        """Runs the manifest's frames from the zero state; a file that gives other scores than it promises is not served."""
        test, manifest = self.manifest.self_test, self.manifest
        frames = np.array(_fill(test.frames, manifest.frame_shape), np.float32)
        expected = np.array(test.scores, np.float32)
        scores, next_state = self.run_batch(frames[None], np.array([len(frames)]), np.zeros((1, manifest.state_width), np.float32))
        if not (np.isfinite(scores).all() and np.isfinite(next_state).all()):
            raise EngineError("self-test: scores or state are not finite")
        off = float(np.abs(scores[0] - expected).max())
        if not off <= test.tolerance:
            frame = int(np.abs(scores[0] - expected).max(axis=1).argmax())
            raise EngineError(f"self-test: scores differ from the manifest's by {off:.3g} at frame {frame}, allowed {test.tolerance:.3g}")


def _give_memory_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc keeps what was freed, for each thread that ever loaded a model
        trim(0)


def _closed(*_: object) -> Any:
    raise EngineError("the model was unloaded")


def default_threads() -> int:
    """Threads inside one run: half the cores, at most 4. Rows are small, and the event loop wants a core to itself:
    on two cores one thread gave more frames a second than two at every batch size (6 layers of 512)."""
    return max(1, min(usable_cores() // 2, 4))


def usable_cores() -> int:
    """Cores this process may use: its affinity, cut by the control group's quota (containers)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))


def resident_bytes() -> int:
    """Memory of this process, 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


@cache
def cuda_obstacle() -> str:
    """Why CUDA cannot be used in this process, "" where nothing speaks against it yet; loads the CUDA libraries once."""
    if _CUDA not in onnxruntime.get_available_providers():
        return "onnxruntime is the CPU build; install the extra `gpu` instead of `cpu`"
    onnxruntime.preload_dlls()
    library = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    for needed in ("libcuda.so.1", str(library)):
        try:
            ctypes.CDLL(needed)
        except OSError as error:
            if "undefined symbol" not in str(error):  # the provider finds onnxruntime's own symbols only when onnxruntime loads it
                return f"{error}; needed are an NVIDIA driver (libcuda.so.1) and the CUDA and cuDNN libraries that the extra `gpu` brings"
    return ""


@cache
def _refuse_both_builds() -> None:
    installed = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        installed.append(name)
    if len(installed) == 2:
        raise StartupError("both onnxruntime and onnxruntime-gpu are installed and break each other: uninstall both, then install one")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot be read: {error.strerror}") from None


def _open(model: bytes, device: Device) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = device.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = _QUIET
    options.enable_mem_pattern = False  # batches come in ever new shapes, a plan for each would only pile up
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = [(_CUDA, {"use_tf32": "0"}), _CPU] if device.provider == _CUDA else [_CPU]
    try:
        session = onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime has a dozen classes of its own for bad files
        raise EngineError(f"onnxruntime cannot load it: {_first_line(error)}") from None
    if getattr(session, "_model_bytes", None) is not None:
        session._model_bytes = None  # the whole file, which it keeps for falling back to another provider; here it does not
    if session.get_providers()[0] != device.provider:
        raise EngineError(f"onnxruntime chose {session.get_providers()[0]} instead of {device.provider}")
    return session


def _read_manifest(session: onnxruntime.InferenceSession) -> Manifest:
    text = session.get_modelmeta().custom_metadata_map.get(MANIFEST_KEY)
    if text is None:
        raise EngineError(f"the file's metadata has no {MANIFEST_KEY!r}; files come from `python -m training export`")
    try:
        return Manifest.from_json(text)
    except ManifestError as error:
        raise EngineError(str(error)) from None


def _check_tensors(session: onnxruntime.InferenceSession, manifest: Manifest) -> None:
    classes, width = len(manifest.classes), manifest.state_width
    shapes: dict[str, tuple[int | None, ...]] = {
        FRAMES: (None, None, *manifest.frame_shape),
        LENGTHS: (None,),
        STATE: (None, width),
        SCORES: (None, None, classes),
        NEXT_STATE: (None, width),
    }
    for spoken, names, found in (("inputs", INPUTS, session.get_inputs()), ("outputs", OUTPUTS, session.get_outputs())):
        if (have := tuple(sorted(tensor.name for tensor in found))) != tuple(sorted(names)):
            raise EngineError(f"{spoken} are {', '.join(have)}; the contract says {', '.join(names)}")
        for tensor in found:
            _check_tensor(tensor, shapes[tensor.name])


def _check_tensor(tensor: Any, shape: tuple[int | None, ...]) -> None:
    kind = "tensor(int64)" if tensor.name == LENGTHS else "tensor(float)"
    if tensor.type != kind:
        raise EngineError(f"{tensor.name} is {tensor.type}, the contract says {kind}")
    fits = len(tensor.shape) == len(shape) and all(_axis_fits(have, want) for have, want in zip(tensor.shape, shape, strict=True))
    if not fits:
        wanted = ", ".join("free" if want is None else str(want) for want in shape)
        raise EngineError(f"{tensor.name} has shape {tensor.shape}, the manifest says ({wanted})")


def _axis_fits(have: int | str | None, want: int | None) -> bool:
    """A free axis must be free in the file; a fixed one must agree where the file says it at all."""
    return not isinstance(have, int) if want is None else have == want or not isinstance(have, int)


def _fill(value: Any, shape: tuple[int, ...]) -> Any:
    """Nested lists with NaN for null, a null above the last axis standing for all below it; `value` is (time, *shape)."""
    return [_filled(frame, shape) for frame in value]


def _filled(value: Any, shape: tuple[int, ...]) -> Any:
    if not shape:
        return math.nan if value is None else value
    return [_filled(item, shape[1:]) for item in (value if value is not None else [None] * shape[0])]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


RunBatch = Callable[[Floats, Lengths, Floats], tuple[Floats, Floats]]
