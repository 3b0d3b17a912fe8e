"""A piece of work in a thread of its own, beside another.

with Beside(lambda pause: read(each=pause)) as reading:
    model = load(each=reading.check)          # what went wrong there ends the loading here
    data = reading.result()
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
PATIENCE = 5.0  # seconds


class Left(Exception):
    """Nobody waits for this work any more."""


class Beside(Generic[T]):
    """Runs `work` inside `with`; it is handed a function to call now and then, which ends it once nobody waits.

    The thread does not outlive the block, since one that is inside a library when the interpreter ends can bring it
    down. Only a library that cannot be stopped, such as a download, is left behind, after `PATIENCE` seconds and where
    the block is left by an error.
    """

    def __init__(self, work: Callable[[Callable[[], None]], T]) -> None:
        self._work = work
        self._left, self._done = threading.Event(), threading.Event()
        self._found: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="loraloom-beside", daemon=True)

    def _run(self) -> None:
        try:
            self._found.append(self._work(self._pause))
        except BaseException as error:  # it is told where the work is waited for
            self._error = error
        finally:
            self._done.set()

    def _pause(self) -> None:
        if self._left.is_set():
            raise Left

    def __enter__(self) -> Beside[T]:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._left.set()
        # not join(): interrupted once, it takes a thread that runs for one that has ended, in Python 3.11 and 3.12
        if self._done.wait(None if kind is None else PATIENCE):
            self._thread.join()

    def check(self) -> None:
        """raises  what the work has raised, if it has"""
        if self._error is not None:
            raise self._error

    def result(self) -> T:
        """What the work gave, waited for.

        raises  what it raised
        """
        self._done.wait()
        self.check()
        return self._found[0]
