"""What is being done while the user waits: a line for each thing, on a terminal only."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

err = Console(stderr=True, highlight=False, soft_wrap=True)


class Board:
    """The lines that are shown now. A terminal has room for one live display, and two threads may count at once."""

    def __init__(self) -> None:
        self.lock, self.lines = Lock(), 0
        self.bars: Progress | None = None

    @contextmanager
    def line(self, what: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
        """A line of its own; gives a function that is told how many are done, and the name of the last."""
        with self.lock:
            if self.bars is None:
                columns = (TextColumn(" {task.description}"), BarColumn(), TextColumn("{task.fields[now]}"))
                self.bars = Progress(*columns, console=err, transient=True, redirect_stdout=False)
                self.bars.start()
                atexit.register(self.close)  # a thread may be left behind in the middle of a line
            bars, self.lines = self.bars, self.lines + 1
            task = bars.add_task(what, total=total, now="")
        try:
            yield lambda done, now: bars.update(task, completed=done, now=now)
        finally:
            with self.lock:
                self.lines -= 1
                bars.remove_task(task)
                if not self.lines:
                    self._stop()

    def close(self) -> None:
        """Give the terminal back as it was."""
        with self.lock:
            self._stop()

    def _stop(self) -> None:
        if self.bars is not None:
            self.bars.stop()
            atexit.unregister(self.close)
            self.bars = None


BOARD = Board()


def nothing() -> None:
    """What is called where nobody counts."""


class Step(Protocol):
    """Told of an item that is done, or of several."""

    def __call__(self, name: str, count: int = 1) -> None: ...


@contextmanager
def counted(what: str, *, total: int | None = None, shown: bool = True) -> Iterator[Step]:
    """Gives a function to call for each item done, with its name."""
    if not shown or not sys.stderr.isatty():
        yield lambda name, count=1: None
        return
    done, of = 0, "" if total is None else f" of {total:,}"
    with BOARD.line(what, total) as told:

        def step(name: str, count: int = 1) -> None:
            nonlocal done
            done += count
            told(done, f"{done:,}{of} {name}")

        yield step


@contextmanager
def doing(what: str, *, shown: bool = True) -> Iterator[None]:
    """A line while something is done that cannot be counted."""
    if not shown or not sys.stderr.isatty():
        yield
        return
    with BOARD.line(what, None):
        yield


@contextmanager
def starting(*, shown: bool = True) -> Iterator[None]:
    """Around the imports of a command.

    They take seconds, a quarter of them to look for garbage, of which there is none: it waits until they are done,
    and what they have made is not looked through again.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with doing("loading libraries", shown=shown):
            yield
    finally:
        if not gc.get_freeze_count():  # later commands of a process would freeze what earlier ones left
            gc.freeze()
            atexit.register(
                gc.unfreeze
            )  # else libraries find what is frozen still there at the end, and say so
        if collects:
            gc.enable()
