"""`python -m training streams`: trained networks on streams of the test data, beside networks that were trained on clips."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from model.contract import EventRules
from model.network import Network
from training import checkpoint as checkpoints
from training import splits as data_splits
from training.config import Config, ConfigError, override
from training.console import bar, say
from training.publish import Along
from training.report import early_table, streams_table
from training.splits import Splits
from training.stream_report import Row, clip_rows, clip_rules, finite_streams, mean_row, rules_for, stream_row
from training.stream_scores import left_running
from training.streams import FORMS, Form, Streams

SEED = 20261122  # of the streams that are reported on
CHOICE_SEED = 7  # of those that rules for events are chosen on


@dataclass(frozen=True)
class Pair:
    """A run on streams and, where one is held against it, a run on clips."""

    run: Path
    streams: checkpoints.Checkpoint
    clips: checkpoints.Checkpoint | None


def streams(
    runs: Annotated[list[Path], typer.Argument(help="run folders, trained on streams: one for each seed, or for each fold")],
    clips: Annotated[
        list[Path] | None, typer.Option("--clips", help="run folder of the same data, trained on clips, to hold beside; once for each run")
    ] = None,
    data: Annotated[str, typer.Option("--data", help="where the data lies (data.path of the configuration)")] = "",
    part: Annotated[str, typer.Option("--split", help="test or validation (of folds: what each of them left out)")] = "test",
    count: Annotated[int, typer.Option("--streams", min=1, help="streams of each form; recordings are run once each")] = 40,
    actions: Annotated[int, typer.Option(min=2, help="actions in each of them")] = 50,
    form: Annotated[str, typer.Option(help=f"only this form of streams: {', '.join(FORMS)}; see Streams in training/README.md")] = "",
    window: Annotated[int, typer.Option(min=2, help="frames of the sliding window")] = 31,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="override one value of the configuration, e.g. export.events")] = None,
    last: Annotated[bool, typer.Option("--last", help="the weights of the last epoch, not those that the validation part chose: for folds")] = False,
) -> None:
    """Run networks over long streams and say how right they are: per frame, per action and its place, as events. Kept as streams-SPLIT.json in each run."""
    if clips and len(clips) != len(runs):
        raise ConfigError(f"{len(clips)} --clips for {len(runs)} runs: give one for each, in the same order")
    if part not in ("test", "validation"):
        raise ConfigError(f"--split {part}: there are test and validation")
    if form and form not in FORMS:
        raise ConfigError(f"--form {form}: there are {', '.join(FORMS)}")
    name = checkpoints.LAST if last else checkpoints.BEST
    beside: list[Path | None] = [*clips] if clips else [None] * len(runs)
    pairs = [Pair(run, checkpoints.load(run / name), checkpoints.load(other / name) if other else None) for run, other in zip(runs, beside, strict=True)]
    results: dict[str, dict[str, list[Row]]] = {}
    known: tuple[Config, Splits] | None = None
    for pair in pairs:
        config = override(pair.streams.config, overrides)
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=data)) if data else config
        if known is None or dataclasses.replace(known[0], seed=config.seed) != config:
            known = config, data_splits.load(config)
        found = _measure(pair, config, known[1], part, form, count, actions, window)
        value = {one: [row.to_dict() for row in rows] for one, rows in found.items()}
        target = pair.run / f"streams-{part}.json"
        target.write_text(json.dumps(_plain({"streams": count, "actions": actions, "seed": SEED, "forms": value}), indent=1) + "\n")
        for one, rows in found.items():
            for row in rows:
                results.setdefault(one, {}).setdefault(row.name, []).append(row)
    for one, by_name in results.items():
        title = f"{pairs[0].streams.config.name}, {part}, {one}" + (f", mean of {len(pairs)} runs" if len(pairs) > 1 else "")
        Console(width=160).print(streams_table({row: mean_row(of) for row, of in by_name.items()}, title))
        curves = {row: [sum(values) / len(of) for values in zip(*(each.early for each in of), strict=True)] for row, of in by_name.items()}
        Console(width=160).print(early_table(curves, title + ": right after the first frames of an action, %"))


def _measure(pair: Pair, config: Config, splits: Splits, part: str, only: str, count: int, actions: int, window: int) -> dict[str, list[Row]]:
    """Rows for each form of streams."""
    if config.streams is None:
        raise ConfigError(f"{pair.run} was not trained on streams: its configuration has no [streams]; give it with --clips instead")
    chosen_on = "validation" if part == "test" and splits.validation is not None else "training"
    data = splits.whole(part)
    made = Streams(data, config.streams, copies=splits.copies(part))
    choice = Streams(splits.whole(chosen_on), config.streams)
    network, other = pair.streams.network(), pair.clips.network() if pair.clips else None
    if pair.clips is not None and other is not None and pair.clips.subject.classes != made.clips.classes:
        raise ConfigError("the run given with --clips has other classes than the clips of this one")
    found: dict[str, list[Row]] = {}
    for form in [one for one in FORMS if one == only] or made.forms:
        say(f"{pair.run}: {form}; rules for events {'of the configuration' if config.export.events else f'are chosen on {chosen_on} streams'}")
        own, held = finite_streams(made, form, count, actions, SEED), finite_streams(choice, form, 24, 12, CHOICE_SEED)
        rules = config.export.events or stream_rules(network, choice, form)
        found[form] = [stream_row(network, own, made.classes, rules)]
        if other is not None:
            with bar("rules for the network for clips") as advance:
                running, windowed = clip_rules(other, held, made.clips.classes, window, advance)
            with bar(f"a window of {window} frames at every frame") as advance:
                found[form] += clip_rows(other, own, made.clips.classes, running, windowed, window, advance)
    return found


def stream_rules(network: Network, choice: Streams, form: Form) -> EventRules:
    """The rules for events that find most on streams of this form."""
    held = finite_streams(choice, form, 24, 12, CHOICE_SEED)
    with bar("rules for events") as advance:
        return rules_for(left_running(network, [one.frames for one in held]), held, choice.classes, choice.config.nothing or None, advance)


def stream_metrics(network: Network, made: Streams, rules: EventRules) -> dict[str, float]:
    """What a manifest says of a network for streams: 40 smooth streams of 50 actions, `accuracy` is that per action, those called nothing wrong.

    Of recordings, as they are, how right it is per action as well (`whole_accuracy`), and in which share of them as many events are found as there are
    actions (`whole_counted`).
    """
    own = finite_streams(made, "smooth", 40, 50, SEED)
    found = stream_row(network, own, made.classes, rules).figures
    values = {"accuracy": found.actions_strict, "frame_accuracy": found.frames, "nothing_accuracy": found.nothing, "events_f1": found.f1}
    if made.recordings is not None:
        whole = stream_row(network, finite_streams(made, "whole", 0, 0, SEED), made.classes, rules).figures
        values |= {"whole_accuracy": whole.actions_strict, "whole_events_f1": whole.f1, "whole_counted": whole.counted}
    return {name: value for name, value in values.items() if value == value}


def accuracy_along(network: Network, made: Streams, rules: EventRules) -> Along:
    """On 200 smooth streams of 20 actions, as a manifest has it; the interval takes actions for independent."""
    own = finite_streams(made, "smooth", 200, 20, SEED)
    share = stream_row(network, own, made.classes, rules).figures.by_position
    first, last = float(share[0]), float(share[-5:].mean())
    variance = first * (1 - first) / len(own) + last * (1 - last) / (5 * len(own))
    return Along(first, last, 1.96 * variance**0.5)


def _plain(value: Any) -> Any:
    """JSON has no NaN: it becomes null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and value != value else value
