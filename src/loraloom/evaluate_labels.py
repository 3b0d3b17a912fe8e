"""What training changed of a classifier, on held-out rows: the tuned model beside two that know less.

  constant   always the commonest class of the training set (for numbers: its mean), with training's shares as its
             probabilities: what a model reaches without reading the text
  untrained  the base with its new head as it was drawn
  tuned      the base with the adapter and the trained head

The change is taken against the constant answer, example by example, where most of the noise cancels.

shapes  n examples, C outputs
source  tests/test_classify.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .adapt import Adapters
from .classifier import predict, row_losses
from .data import Labels
from .files import rows_digest
from .metrics import CLASS_METRICS, NUMBER_METRICS, confusion, of_classes, of_numbers
from .noise import BETTER, WORDS, WORSE, share_verdict, spread, verdict
from .wording import number, plural, signed

SHOWN = 20  # examples kept with their answers
MOST = 12  # classes whose confusion table is printed
COLOURS = {BETTER: "green", WORSE: "red"}
NATS = "nats/row"


@dataclass(frozen=True)
class Answers:
    """What one model says to every example.

    losses  of each row
    given   the number of the class, or the number
    """

    losses: list[float]
    given: list[float]

    @classmethod
    def of(cls, logits_nC: Tensor, label_n: Tensor) -> Answers:
        given = logits_nC[:, 0] if logits_nC.shape[-1] == 1 else logits_nC.argmax(-1)
        return cls(row_losses(logits_nC, label_n).tolist(), given.double().tolist())


@dataclass(frozen=True)
class Measured:
    """A metric of one model: its value, and what each example moves it by."""

    value: float
    influence: list[float]

    def to_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "stderr": spread(self.influence)}


def evaluate_labels(
    model: Any,
    tokenizer: Any,
    adapters: Adapters,
    examples: Any,
    labels: Labels,
    train: dict[str, Any],
    *,
    pad_id: int,
    main: str,
    micro_tokens: int = 4096,
    name: str = "held-out",
    left_out: int = 0,
) -> dict[str, Any]:
    """The three models side by side, as the JSON of eval/NAME.json.

    train     rows of each class in training, or the mean of its numbers
    main      the metric that comes first
    left_out  rows that were too long or empty
    """
    adapters.eval()
    told: dict[str, Any] = {"pad_id": pad_id, "micro_tokens": micro_tokens}
    with adapters.disabled():
        untrained = Answers.of(predict(model, examples, **told), examples.labels)
    tuned = Answers.of(predict(model, examples, **told), examples.labels)
    fixed = constant(labels, train)
    always = Answers.of(fixed.expand(len(examples), -1), examples.labels)
    parameter = next(model.parameters())
    told_n = examples.labels.tolist()
    answer = number(float(fixed[0])) if labels.numbers else labels.names[int(fixed.argmax())]
    found = {
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "task": "classification",
        "settings": {
            "examples": len(examples),
            "rows": rows_digest([labels.names, *([one.ids, one.types, one.label] for one in examples)]),
            "left out, too long or empty": left_out,
            "constant answer": answer,
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "device": parameter.device.type,
        },
        "rows": rows(labels, told_n, always, untrained, tuned, main),
        "labels": list(labels.names),
        "examples": shown_examples(tokenizer, examples, labels, always, tuned),
    }
    if not labels.numbers:
        table_CC = confusion([int(x) for x in told_n], [int(x) for x in tuned.given], len(labels.names))
        found["confusion"] = table_CC.long().tolist()
    return found


def constant(labels: Labels, train: dict[str, Any]) -> Tensor:
    """The logits (C,) of the answer that does not read the text; a class without a training row counts as half."""
    if labels.numbers:
        return torch.tensor([train["mean"]], dtype=torch.float64)
    count_C = torch.tensor([max(train.get(name, 0), 0.5) for name in labels.names], dtype=torch.float64)
    return (count_C / count_C.sum()).log()


def rows(
    labels: Labels, told: Sequence[float], always: Answers, untrained: Answers, tuned: Answers, main: str
) -> list[dict[str, Any]]:
    """The table: a metric a row, the main one first, the loss last."""
    known = NUMBER_METRICS if labels.numbers else CLASS_METRICS
    names = sorted(known, key=lambda name: name != main)
    table = []
    for name in (*names, "loss"):
        fixed, before, after = (measure(name, labels, told, side) for side in (always, untrained, tuned))
        change = after.value - fixed.value
        change_stderr = spread([b - a for a, b in zip(fixed.influence, after.influence)])
        said = verdict(change, change_stderr, len(told) - 1, lower_is_better=name == "loss")
        if name == "accuracy":
            said = share_verdict(right(told, always), right(told, tuned))
        table.append(
            {
                "metric": name,
                "unit": {"accuracy": "share", "loss": "squared" if labels.numbers else NATS}.get(name, ""),
                "items": len(told),
                "lower_is_better": name == "loss",
                "constant": fixed.to_dict(),
                "base": before.to_dict(),
                "tuned": after.to_dict(),
                "change": change,
                "change_stderr": change_stderr,
                "verdict": said,
            }
        )
    return table


def right(told: Sequence[float], side: Answers) -> list[bool]:
    return [a == b for a, b in zip(told, side.given)]


def measure(name: str, labels: Labels, told: Sequence[float], side: Answers) -> Measured:
    """One metric of one model."""
    if name == "loss":
        n = len(side.losses)
        mean = sum(side.losses) / n
        return Measured(mean, [(loss - mean) / n for loss in side.losses])
    if labels.numbers:
        return Measured(*of_numbers(name, told, side.given))
    return Measured(
        *of_classes(name, [int(x) for x in told], [int(x) for x in side.given], len(labels.names))
    )


def shown_examples(
    tokenizer: Any, examples: Any, labels: Labels, always: Answers, tuned: Answers
) -> list[dict[str, Any]]:
    """Up to 20 examples with their answers, in turn one of each outcome; none of numbers, which are never right."""
    if labels.numbers:
        return []
    told = examples.labels.tolist()
    outcomes = list(zip(right(told, always), right(told, tuned)))
    by_outcome: dict[tuple[bool, bool], list[int]] = {}
    for place, outcome in enumerate(outcomes):
        by_outcome.setdefault(outcome, []).append(place)
    mixed = [place for places in zip_longest(*by_outcome.values()) for place in places if place is not None]
    return [
        {
            "row": examples[place].row,
            "prompt": str(tokenizer.decode(examples[place].ids, skip_special_tokens=True)),
            "reference": labels.names[int(told[place])],
            "base": labels.names[int(always.given[place])],
            "tuned": labels.names[int(tuned.given[place])],
            "base_ok": outcomes[place][0],
            "tuned_ok": outcomes[place][1],
        }
        for place in mixed[:SHOWN]
    ]


def render(result: dict[str, Any], console: Console) -> None:
    """Print the table of an evaluation, and below it which class was taken for which."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for at, title in enumerate(("", "constant", "untrained", "tuned", "change", "")):
        table.add_column(title, justify="left" if at in (0, 5) else "right", no_wrap=True)
    for row in result["rows"]:
        colour = COLOURS.get(row["verdict"], "dim")
        cells = [cell(row[side]) for side in ("constant", "base", "tuned")]
        table.add_row(row["metric"], *cells, signed(row["change"]), f"[{colour}]{row['verdict']}[/{colour}]")
    console.print(table)
    settings = result["settings"]
    facts = [plural(settings["examples"], "example"), f"constant: always {settings['constant answer']}"]
    left = settings["left out, too long or empty"]
    facts += [f"{plural(left, 'row')} left out, too long or empty"] if left else []
    console.print(
        " \N{MIDDLE DOT} ".join([*facts, settings["dtype"]]), style="dim", highlight=False, markup=False
    )
    console.print(
        "\N{PLUS-MINUS SIGN} one standard error over examples; the change is against the constant answer; "
        f"{WORDS}",
        style="dim",
        highlight=False,
    )
    if result.get("confusion") and len(result["labels"]) <= MOST:
        console.print()
        console.print(confusion_table(result))


def confusion_table(result: dict[str, Any]) -> Table:
    """Labels down, answers across."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("label \\ answer", style="dim")
    for name in result["labels"]:
        table.add_column(name, justify="right")
    for name, counts in zip(result["labels"], result["confusion"]):
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def cell(side: dict[str, Any]) -> str:
    """A value with its standard error."""
    error = side["stderr"]
    return number(side["value"]) + (f" \N{PLUS-MINUS SIGN}{number(error, 2)}" if error else "")
