"""What was found in a data set and what became of it: numbers for people, JSON for the run folder."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from .problems import SHOWN

# What became of the rows of each kind of issue. "lost" kinds count against data.max_lost.
EFFECTS = {
    "empty answer": "dropped",
    "empty prompt": "dropped",
    "empty text": "dropped",
    "nothing to train on": "dropped",
    "too long": "dropped",
    "cut": "cut",
    "duplicate": "dropped",
    "duplicate, kept": "kept",
    "another label for the same text": "kept",
    "also in the validation set": "dropped",
    "split": "split",
    "turns after the last answer": "left out",
    "control token in the text": "kept",
}
LOST = (*list(EFFECTS)[:5], "cut")
EIGHTHS = " ▏▎▍▌▋▊▉"


class Issue(NamedTuple):
    """A row of issues.csv."""

    row: str
    kind: str
    detail: str


@dataclass
class SourceReport:
    """One file or Hugging Face set."""

    path: str
    split: str | None  # of a Hugging Face set
    use: str  # train or eval
    format: str
    columns: dict[str, str]  # our field: the user's column
    guessed: bool  # some column was recognised by a name that is not ours
    unused: list[str]  # columns that are not read
    repeat: int
    read: int
    kept: int = 0


@dataclass
class Problem:
    """The issues of one kind."""

    kind: str
    effect: str  # dropped, cut, split, left out or kept
    count: int
    rows: list[str]  # the first few


@dataclass
class DataReport:
    """Everything that `loraloom data` says and the run folder keeps."""

    sources: list[SourceReport]
    problems: list[Problem]
    read: int  # rows of all sources
    lengths: dict[str, float]  # tokens per row before any is cut or dropped: min, median, mean, p99, max
    max_length: int
    max_length_origin: str
    too_long: str
    loss_on: str
    style: dict[str, Any]
    end_token: str  # what an answer ends with, as text; several are parted by a blank
    all_ended: bool  # every training example ends in a trained end token
    train: int  # examples, repeats included
    eval: int
    tokens: int  # of the training set
    targets: int  # of them, those that carry loss
    notes: list[str] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)
    cached: bool = False  # read from the cache

    @property
    def target_share(self) -> float:
        return self.targets / self.tokens if self.tokens else 0.0

    @property
    def summary(self) -> str:
        """The set in a few words."""
        return f"{self.train:,} examples, {self.eval:,} held out; {self.target_share:.1%} of tokens trained"

    @property
    def beside(self) -> dict[str, Any]:
        """What must stand beside an adapter for its use, by file name."""
        return {"style.json": self.style}

    @property
    def kept(self) -> int:
        return sum(source.kept for source in self.sources)

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without the single issues, which are in issues.csv."""
        value = asdict(self)
        del value["issues"], value["cached"]
        return {**value, "kept": self.kept, "target_share": self.target_share}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], issues: Iterable[Sequence[str]] = ()) -> DataReport:
        names = set(cls.__dataclass_fields__)
        fields = {name: item for name, item in value.items() if name in names}
        fields["sources"] = [SourceReport(**item) for item in value["sources"]]
        fields["problems"] = [Problem(**item) for item in value["problems"]]
        return cls(**fields, issues=[Issue(*issue) for issue in issues])

    def issues_csv(self) -> str:
        """The text of issues.csv."""
        return issues_table(self.issues)


def issues_table(issues: Iterable[Issue]) -> str:
    """Issues as CSV."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(Issue._fields)
    table.writerows(issues)
    return text.getvalue()


def gather(issues: Iterable[Issue]) -> list[Problem]:
    """The issues by kind, in the order of `EFFECTS`."""
    by_kind: dict[str, list[Issue]] = {}
    for issue in issues:
        by_kind.setdefault(issue.kind, []).append(issue)
    return [
        Problem(kind, effect, len(by_kind[kind]), [issue.row for issue in by_kind[kind][:SHOWN]])
        for kind, effect in EFFECTS.items()
        if kind in by_kind
    ]


def percentile(ordered: Sequence[int], share: float) -> int:
    """The smallest value that at least `share` of the sorted values do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]


def statistics(lengths: Iterable[int]) -> dict[str, float]:
    """min, median, mean, p99 and max; all 0 of nothing."""
    ordered = sorted(lengths)
    if not ordered:
        return dict.fromkeys(("min", "median", "mean", "p99", "max"), 0)
    return {
        "min": ordered[0],
        "median": percentile(ordered, 0.5),
        "mean": round(sum(ordered) / len(ordered), 1),
        "p99": percentile(ordered, 0.99),
        "max": ordered[-1],
    }


def length_histogram(lengths: Iterable[int], *, bins: int = 12, width: int = 40) -> str:
    """A text histogram of lengths, one bin a line; all above the 99th percentile share the last line.

    units  tokens; the bins' width is 1, 2 or 5 times a power of ten
    """
    ordered = sorted(lengths)
    if not ordered:
        return "no examples"
    top = percentile(ordered, 0.99)
    step = nice((top - ordered[0] + 1) / bins)
    low = ordered[0] // step * step
    counts = [0] * ((top - low) // step + 1)
    for length in ordered:
        counts[min((length - low) // step, len(counts) - 1)] += 1
    left = [f"{low + at * step:,}" for at in range(len(counts))]
    right = [f"{low + (at + 1) * step - 1:,}" for at in range(len(counts))]
    right[-1] = f"{max(ordered[-1], low + len(counts) * step - 1):,}"
    pad, end = max(map(len, left)), max(map(len, right))
    most = max(counts)
    return "\n".join(
        f"{a:>{pad}} - {b:>{end}} {bar(count / most * width):<{width}} {count:,}"
        for a, b, count in zip(left, right, counts)
    )


def nice(step: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50 ..."""
    power = 10 ** max(0, math.floor(math.log10(max(step, 1))))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step)


def bar(length: float) -> str:
    """A bar of so many cells, drawn to an eighth; something above zero is always seen."""
    eighths = round(length * 8) or (1 if length > 0 else 0)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()
