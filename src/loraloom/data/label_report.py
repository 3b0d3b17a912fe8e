"""What was found in a data set with labels and what became of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .report import Issue, Problem, SourceReport, issues_table


@dataclass
class LabelReport:
    """Everything that the run folder keeps; the fields it shares with DataReport mean the same."""

    sources: list[SourceReport]
    problems: list[Problem]
    read: int
    labels: list[str]  # the classes, in the order of the model's outputs; none for numbers
    counts: dict[str, dict[str, Any]]  # by side: rows of each class; of numbers mean, min and max
    columns: dict[str, str]  # our field: the column
    lengths: dict[str, float]
    max_length: int
    max_length_origin: str
    too_long: str
    train: int
    eval: int
    tokens: int
    notes: list[str] = field(default_factory=list)
    issues: list[Issue] = field(default_factory=list)

    @property
    def kept(self) -> int:
        return sum(source.kept for source in self.sources)

    @property
    def summary(self) -> str:
        """The set in a few words."""
        what = f"{len(self.labels)} classes" if self.labels else "labels are numbers"
        return f"{self.train:,} examples, {self.eval:,} held out; {what}"

    @property
    def beside(self) -> dict[str, Any]:
        """What must stand beside an adapter for its use, by file name."""
        train = self.counts["train"]
        return {"labels.json": {"labels": self.labels, "columns": self.columns, "train": train}}

    def to_dict(self) -> dict[str, Any]:
        value = asdict(self)
        del value["issues"]
        return {**value, "kept": self.kept}

    def issues_csv(self) -> str:
        """The text of issues.csv."""
        return issues_table(self.issues)
