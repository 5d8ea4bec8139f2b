"""From a run to a file that may be served: export, prove, explain, and only then the name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from model import skeletons
from model.contract import CONTRACT_VERSION, MODEL_FILE, EventRules, Manifest, Metrics, StreamReport, Task
from training.checkpoint import Checkpoint
from training.datasets.clips import ClipSet
from training.export import to_onnx
from training.onnx_file import fingerprint, with_manifest, write_atomically
from training.verify import Runner, check_endless, check_file, check_neighbours, check_parity, measure_stream, self_test

PARITY_CLIPS = 48


@dataclass(frozen=True)
class Along:
    """Accuracy per action at the first place of streams and at the last five; half the 95 % interval of their difference."""

    first: float
    last: float
    ci95: float


def publish(
    checkpoint: Checkpoint,
    clips: ClipSet,
    metrics: Metrics,
    target: Path,
    say: Callable[[str], None],
    watch: Callable[[int, int], None] | None = None,
    events: EventRules | None = None,
    along: Along | None = None,
) -> Manifest:
    """Exports the checkpoint's network to `target`/model.onnx, verified on `clips` (not seen in training, ideally).

    With `events` the service will say when something starts and ends, by these rules. `along` is how right the network is along streams,
    where that is not to be measured on `clips` end to end, at their last frames.

    Raises `VerificationError`, leaving no file and no change, when a promise of the contract does not hold.
    """
    config, subject, network = checkpoint.config, checkpoint.subject, checkpoint.network()
    model = to_onnx(network)
    runner = Runner(model)
    say("checking the file")
    check_file(model)
    chosen = clips.take(np.unique(np.linspace(0, len(clips) - 1, PARITY_CLIPS).astype(int)))
    say(f"torch against ONNX, whole, in chunks and in a ragged batch, on {len(chosen)} clips")
    parity = check_parity(runner, chosen.frames, network)
    say("a poisoned row and its neighbours")
    check_neighbours(runner, chosen.frames)
    say("a stream that does not end")
    verified = check_endless(runner, chosen.frames, watch)
    say("accuracy along streams")
    task: Task = "tokens" if config.model.head == "tokens" else "classification"
    if along is None:
        stream = measure_stream(runner, clips, network.horizon(), verified, task)
    else:
        stream = StreamReport(verified_frames=verified, horizon=network.horizon(), accuracy_first=along.first, accuracy_last=along.last, ci95=along.ci95)
    joints = skeletons.layout(subject.layout).joints if subject.layout else ()
    manifest = Manifest(
        contract=CONTRACT_VERSION,
        model=config.name,
        task=task,
        frame_shape=subject.frame_shape,
        units=subject.units,
        layout=subject.layout,
        joints=joints,
        axes=skeletons.COMMON_AXES if subject.layout else "",
        fps=subject.fps,
        classes=subject.classes,
        missing=config.model.missing,
        state_width=runner.state_width,
        chunk=config.export.chunk,
        stream=stream,
        events=events,
        architecture=network.architecture(),
        data=subject.source,
        metrics=metrics,
        parity=parity,
        self_test=self_test(runner, max(chosen.frames, key=len)),
        fingerprint=fingerprint(model),
        made_by=f"indrnn-service {_version()}",
    )
    write_atomically(with_manifest(model, manifest), target / MODEL_FILE)
    return manifest


def next_version(folder: Path) -> Path:
    """`folder`/N, one above the highest number there."""
    numbers = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    return folder / str(max(numbers, default=0) + 1)


def metrics_of(protocol: str, **values: float) -> Metrics:
    """Metrics with figures rounded to what a few hundred clips can tell."""
    return Metrics(protocol=protocol, values={name: round(value, 4) for name, value in values.items()})


def _version() -> str:
    try:
        return version("indrnn-service")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0.1.0"
