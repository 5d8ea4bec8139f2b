"""`python -m training`: train, crossvalidate, evaluate, streams, export, verify, samples."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import onnx
import tomli_w
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from model.contract import ManifestError
from model.skeletons import UnknownLayout
from training import checkpoint as checkpoints
from training import scores
from training.config import Config, ConfigError, load, override
from training.console import bar, console, say
from training.datasets import clip_folder
from training.datasets.clips import DataError
from training.distributed import Group, ProcessLost, choose_device, joined, leave
from training.evaluate import evaluate as run_clips
from training.loop import METRICS, TrainingDiverged
from training.loop import Progress as Standing
from training.loop import train as fit
from training.onnx_file import read_manifest
from training.preflight import check, check_values
from training.publish import metrics_of, next_version, publish
from training.report import draw_confusion, draw_curves, mean_and_deviation, recall_table, runs_table
from training.samples import repetitions, write_samples
from training.scores import ScoresError, average
from training.splits import Splits, describe, read_data, split
from training.splits import load as load_splits
from training.stream_command import accuracy_along, stream_metrics, stream_rules, streams
from training.streams import Streams
from training.verify import VerificationError, verify_file

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
PARTS = ("test", "validation", "training")
DATA_FAULTS = (ConfigError, DataError, UnknownLayout, ManifestError)
EXPECTED = (*DATA_FAULTS, VerificationError, TrainingDiverged, checkpoints.CheckpointError, ScoresError, ProcessLost, OSError)

app.command()(streams)

ConfigFile = Annotated[Path, typer.Argument(help="TOML file of the experiment, see training/configs/")]
Out = Annotated[Path, typer.Option(help="folder that run folders go into")]
Resume = Annotated[bool, typer.Option("--resume", help="go on after the last checkpoint")]
Run = Annotated[Path, typer.Argument(help="run folder, as `train` made it")]
Data = Annotated[str, typer.Option("--data", help="where the data lies (data.path of the configuration)")]
Override = Annotated[list[str] | None, typer.Option("--set", help="override one value: section.key=value; may be repeated")]


@app.command()
def train(
    config: ConfigFile,
    overrides: Override = None,
    data: Data = "",
    out: Out = Path("runs"),
    resume: Resume = False,
    seeds: Annotated[str, typer.Option(help="several runs one after another: a list, 0,1,2, or how many, 5 (from 0); mean and deviation are shown")] = "",
) -> None:
    """Train a network; leaves checkpoints, metrics, curves and a confusion matrix in OUT/NAME/seed-SEED. Under torchrun, over all its processes."""
    settings = _with_path(load(config, overrides), data)
    runs = [replace(settings, seed=seed) for seed in _seeds(seeds)] or [settings]
    folders = [out / settings.name / (f"seed-{run.seed}" + ("-final" if run.final else "")) for run in runs]
    with _joined(settings, folders, resume) as group:
        splits = load_splits(settings)
        results = [_fit(run, splits, folder, resume, group) for run, folder in zip(runs, folders, strict=True)]
    if not group.first:
        return
    if len(runs) > 1 and splits.validation is not None:
        accuracies = {str(folder): result for folder, result in zip(folders, results, strict=True) if result is not None}
        Console().print(runs_table(list(accuracies), {"right %": list(accuracies.values())}, f"{settings.name}, validation"))
    say(f"next: {_python()} -m training evaluate {' '.join(map(str, folders))}   or   {_python()} -m training export {folders[0]}")


@app.command()
def crossvalidate(
    config: ConfigFile,
    folds: Annotated[int, typer.Option(min=2, help="parts of the training data, each held out once")] = 5,
    by: Annotated[str, typer.Option(help="group that is never divided, e.g. subject; with as many folds as groups each is left out in turn")] = "",
    overrides: Override = None,
    data: Data = "",
    out: Out = Path("runs"),
    resume: Resume = False,
) -> None:
    """Train once for each part of the training data, held out; the test clips are not touched. Runs and table go into OUT/NAME/folds-FOLDS."""
    parts = ["data.validation={}", "data.validation_share=0.0", f"data.folds={folds}", f'data.fold_by="{by}"', "final=false"]
    runs = [_with_path(load(config, [*(overrides or []), *parts, f"data.fold={fold}"]), data) for fold in range(folds)]
    whole = out / runs[0].name / (f"folds-{folds}" + (f"-by-{by}" if by else ""))
    folders = [whole / f"fold-{run.data.fold}-seed-{run.seed}" for run in runs]
    with _joined(runs[0], folders, resume) as group:
        divided = [load_splits(run) for run in runs]  # all of them first: a part that cannot be is said before anything is trained
        results = [_fit(run, splits, folder, resume, group) for run, splits, folder in zip(runs, divided, folders, strict=True)]
    if not group.first:
        return
    best = {str(folder): result for folder, result in zip(folders, results, strict=True) if result is not None}
    last = [json.loads((folder / METRICS).read_text().splitlines()[-1])["validation_accuracy"] for folder in folders]
    mean, deviation = mean_and_deviation(last)
    value = {"folds": folds, "by": by, "clips": [len(one.named("validation")) for one in divided]}
    for name, figures in (("best_epoch", list(best.values())), ("last_epoch", last)):
        value[name] = dict(zip(("mean", "deviation"), mean_and_deviation(figures), strict=True)) | {"accuracy": figures}
    (whole / "crossvalidation.json").write_text(json.dumps(value, indent=1) + "\n")
    Console().print(runs_table(list(best), {"right %": list(best.values())}, f"{runs[0].name}, {folds} folds{f' by {by}' if by else ''}, best epoch of each"))
    say(f"at the last epoch, which no fold has chosen: {100 * mean:.1f} % on average, deviation {100 * deviation:.1f}; kept in {whole}")


@app.command()
def evaluate(
    runs: Annotated[list[Path], typer.Argument(help="run folders, as `train` made them")],
    part: Annotated[str, typer.Option("--split", help="test or validation")] = "test",
    data: Data = "",
    ensemble: Annotated[bool, typer.Option("--ensemble", help="also average the scores of all these runs, clip by clip")] = False,
) -> None:
    """Run trained networks over the test clips, once each: results are kept and shown again after that. Of several runs, mean and deviation."""
    found = {run: checkpoints.load(run / checkpoints.BEST) for run in runs}
    if ensemble:
        scores.check_same_clips(found, part)
    for run in found:
        _evaluate(run, found[run], part, data, alone=len(runs) == 1)
    if len(runs) == 1 and not ensemble:
        return
    kept = [scores.load(run / f"{part}.npz") for run in runs]
    together = average(kept) if ensemble else None
    columns = {"right %": [result.accuracy for result in kept]}
    if any(result.copies for result in kept):
        columns["without copies %"] = [result.accuracy_without_copies for result in kept]
    figures = None if together is None else [together.accuracy, together.accuracy_without_copies][: len(columns)]
    Console().print(runs_table([str(run) for run in runs], columns, part, figures))


@app.command()
def export(
    run: Run,
    to: Annotated[Path | None, typer.Option(help="folder of the version, by default models/NAME/N, the next free N")] = None,
    data: Data = "",
    overrides: Override = None,
    replace_file: Annotated[bool, typer.Option("--replace", help="replace a model.onnx that is there")] = False,
) -> None:
    """Export a run to one model.onnx, proved on held-out clips before it gets its name."""
    found = checkpoints.load(run / checkpoints.BEST)
    found.config = override(found.config, overrides)
    target = to or next_version(Path("models") / found.config.name)
    if (target / "model.onnx").exists() and not replace_file:
        raise FileExistsError(f"{target / 'model.onnx'} exists: choose another --to, or pass --replace")
    splits = load_splits(_with_path(found.config, data))
    part = "test" if splits.test is not None else "validation" if splits.validation is not None else "training"
    clips = splits.named(part)
    check_values(found.config, clips, part)
    protocol = found.config.export.protocol or ("streams never reset" if found.config.streams else f"{part} clips, score at the last frame")
    rules = found.config.export.events
    if rules is None and found.config.streams is not None:
        chosen_on = "validation" if splits.validation is not None else "training"
        say(f"  rules for events, on {chosen_on} streams")
        rules = stream_rules(found.network(), Streams(splits.whole(chosen_on), found.config.streams), "smooth")
    along = None
    if found.config.streams is None:
        result = run_clips(found.network(), clips)
        values = {"accuracy": result.accuracy, "frame_accuracy": result.frame_accuracy}
    else:
        assert rules is not None
        made = Streams(splits.whole(part), found.config.streams)
        values, along = stream_metrics(found.network(), made, rules), accuracy_along(found.network(), made, rules)
    metrics = metrics_of(protocol, **values)
    with bar("streaming") as advance:
        manifest = publish(found, clips, metrics, target, say=lambda text: say(f"  {text}"), watch=advance, events=rules, along=along)
    stream = manifest.stream
    assert stream is not None
    console.print(f"[bold]{escape(str(target / 'model.onnx'))}[/bold]  accuracy {100 * values['accuracy']:.1f} % ({escape(protocol)})", soft_wrap=True)
    console.print(f"  parity {manifest.parity.scores_abs:.1e}; on streams: {100 * stream.accuracy_first:.1f} % at the first action, ", end="")
    console.print(f"{100 * stream.accuracy_last:.1f} % at the last five of twenty" + (" [yellow](declines)[/yellow]" if stream.declines else ""))
    say(f"next: {_python()} -m service --models {target.parent.parent}")


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
    with bar("streaming") as advance:
        report = verify_file(model, recordings.frames, network, advance)
    against = "torch and itself" if network else "itself"
    found = f"against {against}, scores differ by at most {report.parity.scores_abs:.1e}; {report.verified_frames} frames streamed"
    console.print(f"[green]verified[/green] {escape(str(file))}: {found}", soft_wrap=True)


@app.command()
def samples(
    config: ConfigFile,
    to: Annotated[Path, typer.Option(help="folder to write to")],
    data: Data = "",
    longest: Annotated[int, typer.Option(help="frames kept of a longer recording")] = 400,
    decimals: Annotated[int, typer.Option(help="digits kept behind the point")] = 3,
) -> None:
    """Write one held-out recording of every class as JSON, to post to a service or play into it, and to verify a file with.

    With streams in the configuration somebody repeats it in each.
    """
    settings = _with_path(load(config, []), data)
    parts = split(settings, read_data(settings, settings.data.options))
    clips = repetitions(Streams(parts.whole("test"), settings.streams)) if settings.streams else parts.named("test")
    paths = write_samples(clips, to, longest, decimals)
    console.print(f"{len(paths)} recordings in {to}: {', '.join(path.name for path in paths)}")


@contextmanager
def _joined(settings: Config, folders: list[Path], resume: bool) -> Iterator[Group]:
    """The processes of this run, once it is sure that no run is in the way; all but the first are silent."""
    with joined(settings.train) as group:
        console.quiet = not group.first
        if group.first:
            _look_for_runs(folders, resume)
        yield group


def _look_for_runs(folders: list[Path], resume: bool) -> None:
    if resume and not any((folder / checkpoints.LAST).exists() for folder in folders):
        raise checkpoints.CheckpointError(f"{folders[0]}: nothing to resume; leave --resume out")
    for folder in folders:
        if not resume and any((folder / name).exists() for name in (checkpoints.LAST, checkpoints.BEST)):
            raise FileExistsError(f"{folder} holds a run: go on with --resume, or choose another --out, or delete it")


def _fit(settings: Config, splits: Splits, folder: Path, resume: bool, group: Group) -> float | None:
    """One run; the best validation accuracy, by which its epoch was chosen, for the first process, where there is a validation part."""
    on_streams = settings.streams is not None
    training = splits.whole("training") if on_streams else splits.training
    validation = splits.whole("validation") if on_streams and splits.validation is not None else splits.validation
    check(settings, training, validation, group.device, group.size)
    if splits.test is not None:  # it is not run, but would not be found faulty before training is done
        check_values(settings, splits.test, "test")
    if group.first:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(tomli_w.dumps(settings.to_dict()))
    on = f", {group.size} processes" if group.size > 1 else ""
    say(f"{settings.name}, seed {settings.seed}: {_sizes(splits)}, on {group.device}{on}", describe(settings), f"run folder: {folder}")
    started = group.from_first(resume and (folder / checkpoints.LAST).exists())
    try:
        with _watching(folder) if group.first else nullcontext(lambda _: None) as watch:
            chosen = fit(settings, training, validation, folder, resume=started, watch=watch, group=group)
    except KeyboardInterrupt:
        if (folder / checkpoints.LAST).exists():
            command = "the same torchrun command" if group.size > 1 else f"{_python()} -m training {' '.join(sys.argv[1:3])}"
            say(f"stopped; the last whole epoch is kept. Go on with: {command} --resume (and the same options)")
        else:
            say("stopped before the first epoch was done: nothing is kept")
        raise typer.Exit(130) from None
    finally:
        if group.first and (folder / METRICS).exists():
            draw_curves(folder / METRICS, folder / "curves.png")
    if splits.validation is None or not group.first:
        return None
    found = checkpoints.load(chosen)
    result = run_clips(found.network(), splits.validation)
    draw_confusion(result, found.subject.classes, folder / "confusion.png")
    Console().print(recall_table(result, found.subject.classes, f"{settings.name}, validation" + (", clip by clip" if on_streams else "")))
    if on_streams:
        say(f"validation streams, left running: {100 * found.best:.1f} % of the actions are right; epoch {found.epoch} is the best")
    return found.best


def _evaluate(run: Path, found: checkpoints.Checkpoint, part: str, data: str, alone: bool) -> None:
    """Runs the clips unless that was done, and keeps figures and scores beside the checkpoint."""
    kept = run / f"{part}.json"
    say(describe(found.config))
    if part in PARTS and kept.exists():
        say(f"already run; the result was kept in {kept}")
        if alone:
            Console().print_json(kept.read_text())
        return
    splits = load_splits(_with_path(found.config, data))
    clips = splits.named(part)
    check_values(found.config, clips, part)
    device = choose_device(replace(found.config.train, device="cpu" if found.config.train.device == "cpu" else "auto"))
    result = replace(run_clips(found.network().to(device), clips), copied=splits.copies(part) if part != "training" else None)
    draw_confusion(result, found.subject.classes, run / f"confusion-{part}.png")
    scores.save(result, run / f"{part}.npz")
    value = {"split": part, "clips": len(clips), "accuracy": result.accuracy, "frame_accuracy": result.frame_accuracy, "loss": result.loss}
    if result.copies:
        value |= {"copies": result.copies, "accuracy_without_copies": result.accuracy_without_copies}
        others = f"of the other {len(clips) - result.copies}, {100 * result.accuracy_without_copies:.1f} % are right"
        say(f"{result.copies} of the {part} clips are training clips as well, number for number; {others}")
    kept.write_text(json.dumps(value | {"seed": found.config.seed, "epoch": found.epoch, "chosen": describe(found.config)}, indent=1) + "\n")
    Console().print(recall_table(result, found.subject.classes, f"{found.config.name}, {part}, seed {found.config.seed}"))


def _seeds(text: str) -> list[int]:
    """ "0,1,2" as it says; "5" is five of them from 0; nothing is none."""
    numbers = [one.strip() for one in text.split(",")] if text.strip() else []
    if not all(one.isdecimal() for one in numbers) or len(set(numbers)) < len(numbers) or numbers == ["0"]:
        raise ConfigError(f"--seeds {text}: expected different numbers, such as 0,1,2, or how many")
    return list(range(int(numbers[0]))) if len(numbers) == 1 else [int(one) for one in numbers]


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
            validation = f"validation {100 * p.row['validation_accuracy']:.1f} %  " if "validation_accuracy" in p.row else ""
            progress.update(whole, note=f"{validation}waiting for data {100 * p.row['waiting']:.1f} %")

        yield watch


def main() -> None:
    """Runs the command; faults that are the user's to mend are one line, without a traceback."""
    try:
        app(standalone_mode=True)
    except EXPECTED as error:
        console.quiet = False  # it may be the fault of one process alone
        console.print(f"[red]error:[/red] {escape(' '.join(str(error).split()))}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    try:
        main()
    except SystemExit as end:
        if end.code in (None, 0):
            leave()
        raise
