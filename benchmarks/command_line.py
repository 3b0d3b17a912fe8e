"""How a benchmark was called, as it can be called again anywhere."""

import shlex
import sys
from pathlib import Path


def command_line() -> str:
    """Without where its result went, and without the commit, which stands beside it."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word in ("--out", "--commit"):
            next(words, None)
        else:
            kept.append(word)
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *kept])
