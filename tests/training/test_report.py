"""Pictures and tables, whatever the classes are called."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from training.evaluate import Evaluation
from training.report import draw_confusion, draw_curves, recall_table

CLASSES = ("[bold]sit[/]", "cost $5 or $x_", "[/red] up")
RESULT = Evaluation(np.eye(3, dtype=np.float32)[[0, 0, 1, 1]], np.array([0, 1, 1, 1]), 0.1, 0.5)


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 2000


@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("epochs", [0, 1, 5])
def test_draws_curves(tmp_path: Path, epochs: int, validation: bool) -> None:
    rows = [{"epoch": i, "loss": 1.0, "accuracy": 0.5} | ({"validation_loss": 1.0, "validation_accuracy": 0.4} if validation else {}) for i in range(epochs)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert is_picture(tmp_path / "curves.png")


def test_draws_the_confusion_matrix_with_strange_names_and_an_absent_class(tmp_path: Path) -> None:
    draw_confusion(RESULT, CLASSES, tmp_path / "c.png")
    assert is_picture(tmp_path / "c.png")


def test_table_shows_names_as_they_are_and_what_classes_are_taken_for() -> None:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(recall_table(RESULT, CLASSES, "a [title]"))
    text = console.export_text()
    assert "a [title]" in text
    lines = {name: next(line for line in text.splitlines() if name in line) for name in CLASSES}
    assert "100.0" in lines[CLASSES[0]]
    assert "66.7" in lines[CLASSES[1]]
    assert "[bold]sit[/] (1)" in lines[CLASSES[1]]
    assert "75.0" in next(line for line in text.splitlines() if " all " in line)
