"""The errors that a user can put right: what went wrong, where, and how to fix it.

The command line prints these bare, without a traceback, and exits with their `exit_code`.
Anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """A mistake of usage or configuration (exit code 2).

    message  one line: what is wrong, and where
    details  every instance, one a line
    hint     how to fix it, when we know
    """

    exit_code = 2

    def __init__(self, message: str, *, details: Sequence[str] = (), hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.details = list(details)
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message, *(f"  {line}" for line in self.details)]
        if self.hint:
            lines += ["", f"hint: {self.hint}"]
        return "\n".join(lines)


class Failure(UserError):
    """The work was asked for correctly and did not succeed: a failed check, a full disk (exit code 1)."""

    exit_code = 1


class DataError(UserError):
    """The data set cannot be used as it is: a broken line, a missing column, nothing to train on (exit code 3)."""

    exit_code = 3


class OutOfMemory(UserError):
    """The device has too little memory for what was asked (exit code 4)."""

    exit_code = 4


class NonFinite(UserError):
    """A loss, a gradient or a weight stopped being a finite number (exit code 5).

    weights_good  whether the adapter still computes: some rows had a finite loss, so a row is to blame
    """

    exit_code = 5
    weights_good = False


INTERRUPTED = 130  # the exit code after Ctrl-C, with the state saved


def nearest(word: str, options: Iterable[str], *, count: int = 3) -> list[str]:
    """The names most like `word`, best first; a name that contains it counts as like it."""
    names = list(dict.fromkeys(options))
    close = difflib.get_close_matches(word, names, n=count, cutoff=0.5)
    inside = [name for name in names if word and word.lower() in name.lower() and name not in close]
    return (close + inside)[:count]


def did_you_mean(word: str, options: Iterable[str]) -> str | None:
    """A hint that names the options most like `word`, or lists a few of them; None if there are none."""
    names = list(dict.fromkeys(options))
    close = nearest(word, names)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "it can be " + ", ".join(names[:20]) if names else None
