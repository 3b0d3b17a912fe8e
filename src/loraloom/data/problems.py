"""Bad rows, collected so that the user sees all of them at once rather than the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import DataError

SHOWN = 10  # instances listed of one kind


@dataclass
class Problems:
    """What is wrong with the rows of a data set, by kind, in the order met."""

    kinds: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, instance: str) -> None:
        self.kinds.setdefault(kind, []).append(instance)

    def stop(self, name: str, hint: str | None = None) -> None:
        """Raise DataError with the first instances of every kind, if there is any."""
        if not self.kinds:
            return
        if len(self.kinds) == 1:
            [(kind, instances)] = self.kinds.items()
            raise DataError(f"{name}: {kind} ({rows(len(instances))})", details=first(instances), hint=hint)
        details = []
        for kind, instances in self.kinds.items():
            details += [f"{kind} ({rows(len(instances))})", *(f"  {line}" for line in first(instances))]
        total = sum(len(instances) for instances in self.kinds.values())
        raise DataError(f"{name}: {total:,} problems", details=details, hint=hint)


def first(instances: Sequence[str]) -> list[str]:
    """The first few instances and how many more there are."""
    more = len(instances) - SHOWN
    return [*instances[:SHOWN], *([f"... and {more:,} more"] if more > 0 else [])]


def rows(count: int) -> str:
    """ "1 row", "12 rows"."""
    return f"{count:,} row" + ("" if count == 1 else "s")


def around(text: str, place: int, *, width: int = 30) -> str:
    """The text about a place, on one line, for an error message."""
    start, stop = max(0, place - width), min(len(text), place + width)
    shown = text[start:stop].replace("\n", "␤").replace("\r", "").replace("\t", " ")
    return ("…" if start else "") + shown + ("…" if stop < len(text) else "")
