"""What a run leaves for people: curves and confusion matrix as pictures, a table of recall per class."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np
from rich.markup import escape
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from training.evaluate import Evaluation


def draw_curves(metrics: Path, picture: Path) -> None:
    """Loss and accuracy over epochs, from a run's metrics.jsonl."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, name in ((left, "loss"), (right, "accuracy")):
        for key, label in ((name, "training"), (f"validation_{name}", "validation")):
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            if points:
                axis.plot(*zip(*points, strict=True), label=label)
        axis.set(xlabel="epoch", ylabel=name)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def draw_confusion(result: Evaluation, classes: tuple[str, ...], picture: Path) -> None:
    """The confusion matrix, rows true, columns predicted, each row in percent of its class."""
    counts = result.confusion
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = max(5.0, 0.55 * len(classes) + 2.5)
    figure, axis = plt.subplots(figsize=(size, size), layout="constrained")
    axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axis.set(xlabel="predicted", ylabel="true", title=f"accuracy {100 * result.accuracy:.1f} %, {len(result.labels)} clips")
    axis.set_xticks(range(len(classes)), classes, rotation=45, ha="right", parse_math=False)  # a class may have a dollar in its name
    axis.set_yticks(range(len(classes)), classes, parse_math=False)
    for i, j in np.argwhere(counts):
        axis.text(j, i, f"{share[i, j]:.0f}", ha="center", va="center", color="white" if share[i, j] > 55 else "black", fontsize=8)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def recall_table(result: Evaluation, classes: tuple[str, ...], title: str) -> Table:
    """Clips and share recognised, class by class, and what each is most often taken for."""
    table = Table(title=escape(title))
    for column in ("class", "clips", "right %", "most often taken for"):
        table.add_column(column, justify="left" if column in ("class", "most often taken for") else "right")
    counts = result.confusion
    for i, name in enumerate(classes):
        wrong = counts[i].copy()
        wrong[i] = 0
        mistaken = f"{classes[int(wrong.argmax())]} ({wrong.max()})" if wrong.any() else ""
        table.add_row(escape(name), str(counts[i].sum()), f"{100 * counts[i, i] / max(1, counts[i].sum()):.1f}", escape(mistaken))
    table.add_section()
    table.add_row("all", str(counts.sum()), f"{100 * result.accuracy:.1f}", "")
    return table


def runs_table(runs: list[str], columns: dict[str, list[float]], title: str, ensemble: list[float] | None = None) -> Table:
    """Shares of each run, column by column, their mean and standard deviation, and those of the runs' averaged scores."""
    table = Table(title=escape(title))
    table.add_column("run", overflow="fold")
    for name in columns:
        table.add_column(escape(name), justify="right")
    for run, values in zip(runs, zip(*columns.values(), strict=True), strict=True):
        table.add_row(escape(run), *(_percent(value) for value in values))
    table.add_section()
    figures = [mean_and_deviation(values) for values in columns.values()]
    table.add_row("mean", *(_percent(mean) for mean, _ in figures))
    table.add_row("standard deviation", *(_percent(deviation) for _, deviation in figures))
    if ensemble is not None:
        table.add_row("scores averaged", *(_percent(value) for value in ensemble))
    return table


def streams_table(rows: dict[str, dict[str, float]], title: str) -> Table:
    """One line for each way of using a network on streams: figures as `stream_report.mean_row` has them, and its multiplications a frame."""
    table = Table(title=escape(title))
    copies = any(not np.isnan(of["actions_without_copies"]) for of in rows.values())
    shares = ("frames %", "nothing %", "actions %", *["without copies %"] * copies, "strictly %", "slope, points", "events F1 %", "counted %")
    columns = ("", *shares, "delay, frames", "off by, frames", "million products")
    for name in columns:
        table.add_column(name, justify="right" if name else "left")
    for name, of in rows.items():
        actions = f"{_percent(of['actions'])}" + ("" if np.isnan(of["deviation"]) else f" ({_percent(of['deviation'])})")
        slope = f"{100 * of['slope']:+.1f} ± {100 * of['slope_ci95']:.1f}"
        new = [_percent(of["actions_without_copies"])] * copies
        values = [_percent(of["frames"]), _percent(of["nothing"]), actions, *new, _percent(of["actions_strict"]), slope, _percent(of["f1"])]
        lengths = ("" if np.isnan(of[key]) else f"{of[key]:.1f}" for key in ("delay", "boundary"))
        table.add_row(escape(name), *values, _percent(of["counted"]), *lengths, f"{of['multiplications'] / 1e6:.2f}")
    return table


def early_table(curves: dict[str, list[float]], title: str) -> Table:
    """Share of actions that are right after each tenth of their frames."""
    table = Table(title=escape(title))
    table.add_column("of an action's frames, %")
    for part in range(10, 101, 10):
        table.add_column(str(part), justify="right")
    for name, curve in curves.items():
        table.add_row(escape(name), *(_percent(share) for share in curve))
    return table


def _percent(share: float) -> str:
    return "" if np.isnan(share) else f"{100 * share:.1f}"


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (by one less than there are); NaN of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
