"""A line that counts what is read, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


@contextmanager
def counted(what: str, *, total: int | None = None, shown: bool = True) -> Iterator[Callable[[str], None]]:
    """Gives a function to call for each item done, with its name."""
    columns = (TextColumn(f" {what}"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[now]}"))
    disable = not shown or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=disable, transient=True) as bar:
        task = bar.add_task(what, total=total, now="")
        yield lambda name: bar.update(task, advance=1, now=name)
