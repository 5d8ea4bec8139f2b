"""What the commands tell a person while they work: lines and progress bars, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

console = Console(stderr=True)


def say(*lines: str) -> None:
    """Lines as they are, whatever brackets are in them and however narrow the terminal is."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar that goes when the work is done; call what is given with how much is done and how much there is."""
    with Progress(SpinnerColumn(), TextColumn(title), BarColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield advance
