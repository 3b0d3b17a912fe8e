"""Rows with a text, or two, and a label: which column is which, and what the labels are.

A label is the name of a class, or a number to come close to. Whole numbers and words are classes, numbers with a
fraction are numbers; `data.labels` settles it. Classes are sorted, numbers by their size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, did_you_mean
from .problems import Problems
from .read import Table

FIELDS = ("text", "pair", "label")
PAIRS = (
    *(("text", "pair"), ("text", "text_pair"), ("text1", "text2"), ("sentence1", "sentence2")),
    *(("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence")),
)
SINGLES = ("text", "sentence", "question", "content", "review", "tweet", "document", "sentence1")
LABELS = ("label", "labels", "class", "category", "sentiment", "target", "score", "gold_label")
MOST = 1000  # classes; more is a column of another kind


@dataclass(frozen=True)
class Columns:
    """The column of each field; pair is None where there is one text."""

    text: str
    pair: str | None
    label: str

    def to_dict(self) -> dict[str, str]:
        found = {"text": self.text, "pair": self.pair, "label": self.label}
        return {field: column for field, column in found.items() if column is not None}


@dataclass(frozen=True)
class Labels:
    """What a model answers.

    names   of the classes, in the order of its outputs; none for a number
    """

    names: tuple[str, ...]

    @property
    def numbers(self) -> bool:
        return not self.names

    @property
    def outputs(self) -> int:
        """Of the model's head."""
        return len(self.names) or 1

    def value(self, label: Any) -> float | None:
        """A class's number, or the label as a number; None if it is no label of these."""
        if self.numbers:
            return as_number(label)
        name = as_name(label)
        return float(self.names.index(name)) if name in self.names else None

    def settings(self) -> dict[str, Any]:
        """What transformers' config says of them."""
        if self.numbers:
            return {"num_labels": 1, "problem_type": "regression"}
        ids = dict(enumerate(self.names))
        return {
            "num_labels": len(ids),
            "id2label": ids,
            "label2id": {name: number for number, name in ids.items()},
            "problem_type": "single_label_classification",
        }


def find_columns(table: Table, given: Mapping[str, str]) -> Columns:
    """The columns of a table's texts and labels.

    given  our field: the user's column

    raises  DataError if a name in `given` is unknown, or there is no text or no label
    """
    for field, column in given.items():
        if field not in FIELDS:
            raise DataError(
                f"data.map: {field} is not a field of rows with labels",
                details=[f"the fields: {', '.join(FIELDS)}"],
                hint=did_you_mean(field, FIELDS),
            )
        if column not in table.columns:
            raise DataError(
                f"data.map: {table.name} has no column {column!r}",
                details=[f"its columns: {', '.join(table.columns[:20])}"],
                hint=did_you_mean(column, table.columns),
            )
    text, pair = given.get("text"), given.get("pair")
    here = [name for name in table.columns if name != given.get("label")]
    if text is None:
        both = next((names for names in PAIRS if all(name in here for name in names)), None)
        text, guess = both or (next((name for name in SINGLES if name in here), None), None)
        pair = pair or guess
    label = given.get("label") or next((name for name in LABELS if name in table.columns), None)
    missing = [field for field, column in (("text", text), ("label", label)) if column is None]
    if text is None or label is None:
        raise DataError(
            f"{table.name} has no column for the {' and the '.join(missing)}",
            details=[f"its columns: {', '.join(table.columns[:20])}"],
            hint=" ".join(f"--set data.map.{field}=COLUMN" for field in missing),
        )
    return Columns(text, pair, label)


def as_number(label: Any) -> float | None:
    """A label as a finite number, or None."""
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        return None
    try:
        number = float(label)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def as_name(label: Any) -> str | None:
    """A label as the name of a class, a whole number without a point; None if there is no label."""
    if isinstance(label, bool):
        return str(label).lower()
    number = as_number(label)
    if number is not None and number.is_integer() and abs(number) < 2**53:
        return str(int(number))
    if isinstance(label, str):
        return label.strip() or None
    return None if number is None else str(label)


def is_missing(label: Any) -> bool:
    return label is None or (isinstance(label, str) and not label.strip())


def labels_of(values: Sequence[tuple[str, Any]], wanted: str) -> Labels:
    """The labels that stand in training rows.

    values  (row, label), without those that are missing
    wanted  data.labels

    raises  DataError for labels that are neither, only one class, or far too many
    """
    found = [as_number(label) for _, label in values]
    fractions = any(number is not None and not number.is_integer() for number in found)
    if wanted == "numbers" or (wanted == "auto" and fractions and None not in found):
        check(values, as_number, "a label that is no number")
        return Labels(())
    check(values, as_name, "a label that is no class")
    names = {str(as_name(label)) for _, label in values}
    if len(names) < 2:
        raise DataError(
            f"every row has the label {next(iter(names))!r}" if names else "no row has a label",
            hint="there is nothing to tell apart; is it the right column? --set data.map.label=COLUMN",
        )
    if len(names) > MOST:
        raise DataError(
            f"{len(names):,} different labels are no classes",
            details=[f"such as {', '.join(sorted(names)[:5])}"],
            hint="for numbers: --set data.labels=numbers; or name the right column: --set data.map.label=COLUMN",
        )
    whole = all(as_number(name) is not None for name in names)
    return Labels(tuple(sorted(names, key=(lambda name: (float(name), name)) if whole else None)))


def check(values: Sequence[tuple[str, Any]], read: Any, kind: str) -> None:
    """raises  DataError with the rows whose label cannot be read"""
    problems = Problems()
    for row, label in values:
        if read(label) is None:
            problems.add(kind, f"{row}: {label!r}")
    problems.stop("labels", "put these rows right, or say what the labels are: --set data.labels=classes")
