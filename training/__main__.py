"""`python -m training`: train, evaluate, export, verify."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import onnx
import tomli_w
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from model.contract import ManifestError
from model.skeletons import UnknownLayout
from training import checkpoint as checkpoints
from training.config import Config, ConfigError, load
from training.datasets import clip_folder
from training.datasets.clips import DataError
from training.evaluate import evaluate as run_clips
from training.loop import METRICS, TrainingDiverged
from training.loop import Progress as Standing
from training.loop import train as fit
from training.onnx_file import read_manifest
from training.publish import metrics_of, next_version, publish
from training.report import draw_confusion, draw_curves, recall_table
from training.samples import write_samples
from training.splits import Splits, describe, read, split
from training.splits import load as load_splits
from training.verify import VerificationError, verify_file

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
console = Console(stderr=True)
PARTS = ("test", "validation", "training")
EXPECTED = (ConfigError, DataError, UnknownLayout, ManifestError, VerificationError, TrainingDiverged, checkpoints.CheckpointError, OSError)

ConfigFile = Annotated[Path, typer.Argument(help="TOML file of the experiment, see training/configs/")]
Run = Annotated[Path, typer.Argument(help="run folder, as `train` made it")]
Data = Annotated[str, typer.Option("--data", help="where the data lies (data.path of the configuration)")]
Override = Annotated[list[str] | None, typer.Option("--set", help="override one value: section.key=value; may be repeated")]


@app.command()
def train(
    config: ConfigFile,
    overrides: Override = None,
    data: Data = "",
    out: Annotated[Path, typer.Option(help="folder that run folders go into")] = Path("runs"),
    resume: Annotated[bool, typer.Option("--resume", help="go on after the last checkpoint of this run")] = False,
) -> None:
    """Train a network; leaves checkpoints, metrics, curves and a confusion matrix in OUT/NAME/seed-SEED."""
    settings = _with_path(load(config, overrides), data)
    folder = out / settings.name / (f"seed-{settings.seed}" + ("-final" if settings.final else ""))
    if resume and not (folder / checkpoints.LAST).exists():
        raise checkpoints.CheckpointError(f"{folder}: nothing to resume; leave --resume out")
    if not resume and any((folder / name).exists() for name in (checkpoints.LAST, checkpoints.BEST)):
        raise FileExistsError(f"{folder} holds a run: go on with --resume, or choose another --out, or delete it")
    splits = load_splits(settings)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(tomli_w.dumps(settings.to_dict()))
    _say(f"{settings.name}, seed {settings.seed}: {_sizes(splits)}", describe(settings), f"run folder: {folder}")
    try:
        with _watching(folder) as watch:
            chosen = fit(settings, splits.training, splits.validation, folder, resume=resume, watch=watch)
    except KeyboardInterrupt:
        if (folder / checkpoints.LAST).exists():
            _say(f"stopped; the last whole epoch is kept. Go on with: {_python()} -m training train {config} --resume (and the same options)")
        else:
            _say("stopped before the first epoch was done: nothing is kept")
        raise typer.Exit(130) from None
    finally:
        if (folder / METRICS).exists():
            draw_curves(folder / METRICS, folder / "curves.png")
    if splits.validation is not None:
        result = run_clips(checkpoints.load(chosen).network(), splits.validation)
        draw_confusion(result, splits.validation.classes, folder / "confusion.png")
        Console().print(recall_table(result, splits.validation.classes, f"{settings.name}, validation"))
    _say(f"next: {_python()} -m training evaluate {folder}   or   {_python()} -m training export {folder}")


@app.command()
def evaluate(
    run: Run,
    part: Annotated[str, typer.Option("--split", help="test or validation")] = "test",
    data: Data = "",
) -> None:
    """Run a trained network over the test clips, once: the result is kept and shown again after that."""
    found = checkpoints.load(run / checkpoints.BEST)
    kept = run / f"{part}.json"
    _say(describe(found.config))
    if part in PARTS and kept.exists():
        _say(f"already run; the result was kept in {kept}")
        Console().print_json(kept.read_text())
        return
    clips = load_splits(_with_path(found.config, data)).named(part)
    result = run_clips(found.network(), clips)
    draw_confusion(result, clips.classes, run / f"confusion-{part}.png")
    value = {"split": part, "clips": len(clips), "accuracy": result.accuracy, "frame_accuracy": result.frame_accuracy, "loss": result.loss}
    kept.write_text(json.dumps(value | {"seed": found.config.seed, "epoch": found.epoch, "chosen": describe(found.config)}, indent=1) + "\n")
    Console().print(recall_table(result, clips.classes, f"{found.config.name}, {part}, seed {found.config.seed}"))


@app.command()
def export(
    run: Run,
    to: Annotated[Path | None, typer.Option(help="folder of the version, by default models/NAME/N, the next free N")] = None,
    data: Data = "",
    replace_file: Annotated[bool, typer.Option("--replace", help="replace a model.onnx that is there")] = False,
) -> None:
    """Export a run to one model.onnx, proved on held-out clips before it gets its name."""
    found = checkpoints.load(run / checkpoints.BEST)
    target = to or next_version(Path("models") / found.config.name)
    if (target / "model.onnx").exists() and not replace_file:
        raise FileExistsError(f"{target / 'model.onnx'} exists: choose another --to, or pass --replace")
    splits = load_splits(_with_path(found.config, data))
    part = "test" if splits.test is not None else "validation" if splits.validation is not None else "training"
    clips = splits.named(part)
    result = run_clips(found.network(), clips)
    protocol = found.config.export.protocol or f"{part} clips, score at the last frame"
    metrics = metrics_of(protocol, accuracy=result.accuracy, frame_accuracy=result.frame_accuracy)
    with _bar("streaming") as advance:
        manifest = publish(found, clips, metrics, target, say=lambda text: _say(f"  {text}"), watch=advance)
    stream = manifest.stream
    assert stream is not None
    console.print(f"[bold]{escape(str(target / 'model.onnx'))}[/bold]  accuracy {100 * result.accuracy:.1f} % ({escape(protocol)})", soft_wrap=True)
    console.print(f"  parity {manifest.parity.scores_abs:.1e}; on streams: {100 * stream.accuracy_first:.1f} % at the first clip, ", end="")
    console.print(f"{100 * stream.accuracy_last:.1f} % at the last five of twenty" + (" [yellow](declines)[/yellow]" if stream.declines else ""))
    _say(f"next: {_python()} -m service --models {target.parent.parent}")


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="an exported model.onnx")],
    clips: Annotated[Path, typer.Option("--clips", help="a clip folder (index.csv beside the clips) of the model's own kind of data")],
    run: Annotated[Path | None, typer.Option("--run", help="the run folder it came from, to hold it against torch as well")] = None,
) -> None:
    """Prove a finished file: valid, unchanged since export, the same scores whole, in chunks, in company and on a long stream."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        model = onnx.load(file)
    except Exception as error:  # onnx passes on whatever protobuf raises
        raise ManifestError(f"{file}: not an ONNX file: {error}") from None
    manifest = read_manifest(model)
    recordings = clip_folder.load(
        clips, units=manifest.units, layout=manifest.layout, fps=manifest.fps, frame_shape=manifest.frame_shape, missing=manifest.missing
    )
    network = checkpoints.load(run / checkpoints.BEST).network() if run else None
    with _bar("streaming") as advance:
        report = verify_file(model, recordings.frames, network, advance)
    against = "torch and itself" if network else "itself"
    found = f"against {against}, scores differ by at most {report.parity.scores_abs:.1e}; {report.verified_frames} frames streamed"
    console.print(f"[green]verified[/green] {escape(str(file))}: {found}", soft_wrap=True)


@app.command()
def samples(
    config: ConfigFile,
    to: Annotated[Path, typer.Option(help="folder to write to")],
    data: Data = "",
    longest: Annotated[int, typer.Option(help="frames kept of a longer recording")] = 150,
    decimals: Annotated[int, typer.Option(help="digits kept behind the point")] = 3,
) -> None:
    """Write one held-out recording of every class as JSON, to post to a service or play into it, and to verify a file with."""
    settings = _with_path(load(config, []), data)
    paths = write_samples(split(settings, read(settings, settings.data.options)).named("test"), to, longest, decimals)
    console.print(f"{len(paths)} recordings in {to}: {', '.join(path.name for path in paths)}")


def _say(*lines: str) -> None:
    """Lines as they are, whatever brackets are in them and however narrow the terminal is."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _python() -> str:
    """The Python that runs this, as a person in this folder would type it."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _with_path(config: Config, path: str) -> Config:
    return replace(config, data=replace(config.data, path=path)) if path else config


def _sizes(splits: Splits) -> str:
    parts = (("training", splits.training), ("validation", splits.validation), ("test", splits.test))
    return ", ".join(f"{len(clips)} {name}" for name, clips in parts if clips is not None) + " clips"


@contextmanager
def _watching(folder: Path) -> Iterator[Any]:
    """Progress bars for people, TensorBoard for the curious."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress, SummaryWriter(str(folder / "tensorboard")) as board:
        whole = progress.add_task("epochs", total=None, note="")
        part = progress.add_task("batches", total=None, note="")

        def watch(p: Standing) -> None:
            progress.update(part, total=p.batches, completed=p.batch, note=f"loss {p.loss:.3f}  accuracy {100 * p.accuracy:.1f} %")
            progress.update(whole, total=p.epochs, completed=p.epoch - 1 + p.batch / p.batches)
            if p.row is None:
                return
            for name, value in p.row.items():
                if name != "epoch":
                    board.add_scalar(name, value, p.epoch)
            if "validation_accuracy" in p.row:
                progress.update(whole, note=f"validation {100 * p.row['validation_accuracy']:.1f} %")

        yield watch


@contextmanager
def _bar(title: str) -> Iterator[Any]:
    with Progress(SpinnerColumn(), TextColumn(title), BarColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def main() -> None:
    """Runs the command; faults that are the user's to mend are one line, without a traceback."""
    try:
        app(standalone_mode=True)
    except EXPECTED as error:
        console.print(f"[red]error:[/red] {escape(' '.join(str(error).split()))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    main()
