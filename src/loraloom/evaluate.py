"""What training changed, on held-out examples: the base beside the tuned model, each number with its noise.

  loss, perplexity  over all labelled tokens
  exact match       the greedy answer is the reference, up to white space at the ends
  stopped           the answer ended by itself
  bleu ...          as asked for: text_metrics.py

source  tests/test_evaluate.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import zip_longest
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import evaluate_labels
from .data.examples import Example
from .errors import DataError
from .files import rows_digest
from .generate import Answer, context_length, generate
from .heldout import Loss, held_out
from .noise import BETTER, WORDS, WORSE, influences, share_stderr, share_verdict, spread, verdict
from .text_metrics import check_metrics, check_references, metric_rows
from .wording import number, percent, plural, signed

SHOWN = 20  # examples kept with their answers
LONGEST = 256  # new tokens, where the references do not say less
COLOURS = {BETTER: "green", WORSE: "red"}


class Adapters(Protocol):
    """What we need of adapt.Adapters."""

    def disabled(self) -> AbstractContextManager[Any]: ...
    def eval(self) -> None: ...


@dataclass(frozen=True)
class Task:
    """One example to answer: its number, its prompt, and the answer it should get, as tokens and as text."""

    example: int
    prompt: list[int]
    answer: list[int]
    reference: str
    others: tuple[str, ...] = ()  # references of further examples with the same prompt


@dataclass(frozen=True)
class Side:
    """What one of the two models did: its loss, and its answer to each task with the text."""

    loss: Loss
    answers: list[Answer]
    texts: list[str]


def evaluate_run(
    model: Any,
    tokenizer: Any,
    adapters: Adapters,
    examples: Sequence[Example],
    *,
    pad_id: int,
    stop_ids: Sequence[int],
    style: str = "",
    num_answers: int = 200,
    max_new_tokens: int | None = None,
    micro_tokens: int = 4096,
    batch_tokens: int = 8192,
    packing: bool = True,
    name: str = "held-out",
    metrics: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """The base beside what is active in `adapters`, as the JSON of eval/NAME.json.

    num_answers     examples to answer for exact match, evenly over the set; 0 for none
    metrics         of the answers, from text_metrics; examples with the same prompt are then answered once, and the
                    answers of all of them are its references
    max_new_tokens  length of an answer; None for a little more than the longest reference, at most 256

    raises  DataError without examples or labelled tokens, NonFinite if a loss is not a number
    """
    if not len(examples):
        raise DataError("there are no held-out examples", hint="set data.eval, or give a file of them")
    adapters.eval()
    packages = check_metrics(metrics)
    tasks = choose_tasks(tokenizer, examples, num_answers, context_length(model), once=bool(metrics))
    if metrics:
        check_references(metrics, references_of(tasks))
    longest = max((len(task.answer) for task in tasks), default=0)
    new_tokens = max_new_tokens or min(LONGEST, longest + 8)  # what runs on beyond its reference cannot match
    for_loss = {"pad_id": pad_id, "micro_tokens": micro_tokens, "packing": packing}
    for_answers = {"pad_id": pad_id, "stop_ids": stop_ids, "max_new_tokens": new_tokens}
    for_answers |= {"batch_tokens": batch_tokens}
    with progress_bar("evaluating", 2 * (len(examples) + len(tasks)), shown=progress) as advance:
        with adapters.disabled():
            base = measure(model, tokenizer, examples, tasks, for_loss, for_answers, advance)
        tuned = measure(model, tokenizer, examples, tasks, for_loss, for_answers, advance)
    parameter = next(model.parameters())
    settings = {
        "examples": len(examples),
        "rows": rows_digest([one.ids, one.labels, one.answer_span] for one in examples),
        "targets": base.loss.targets,
        "answers": len(tasks),
        "max_new_tokens": new_tokens if tasks else None,
        "decoding": "greedy",
        "prompt": style,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "packing": packing,
    }
    more = metric_rows(metrics, base.texts, tuned.texts, references_of(tasks)) if metrics else []
    return {
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings | ({"metrics": packages} if metrics else {}),
        "rows": rows(base, tuned, tasks) + more,
        "examples": shown_examples(tokenizer, examples, tasks, base, tuned),
    }


def measure(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    tasks: Sequence[Task],
    for_loss: dict[str, Any],
    for_answers: dict[str, Any],
    advance: Callable[[int], None],
) -> Side:
    """The model as it is now: its loss on the examples and its answers to the tasks."""
    loss = held_out(model, examples, **for_loss, on_batch=advance)
    answers = generate(model, [task.prompt for task in tasks], **for_answers, on_batch=advance)
    return Side(loss, answers, [text_of(tokenizer, answer.ids) for answer in answers])


def choose_tasks(
    tokenizer: Any, examples: Sequence[Example], count: int, context: int | None, *, once: bool = False
) -> list[Task]:
    """Examples with a prompt and an answer, evenly over the set; plain text has no prompt to answer.

    once  a prompt that several examples have is one task with their answers
    """
    usable: dict[Any, Task] = {}
    for i in range(len(examples)):
        prompt, answer = examples[i].prompt_ids, examples[i].answer_ids
        if not (len(prompt) > 1 and answer and (context is None or len(prompt) < context)):
            continue
        key, reference = tuple(prompt) if once else i, text_of(tokenizer, answer)
        if key in usable:
            usable[key] = replace(usable[key], others=(*usable[key].others, reference))
        else:
            usable[key] = Task(i, list(prompt), list(answer), reference)
    found = list(usable.values())
    count = min(count, len(found))
    return [found[place * len(found) // count] for place in range(count)]


def references_of(tasks: Sequence[Task]) -> list[list[str]]:
    return [[task.reference, *task.others] for task in tasks]


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """Token ids as text without special tokens and white space at the ends."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def rows(base: Side, tuned: Side, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """The table: a metric a row, with its change and what to make of it."""
    table = [
        loss_row(
            "loss",
            "nats/token",
            base.loss,
            tuned.loss,
            values=(base.loss.mean, tuned.loss.mean),
            slopes=(1, 1),
        ),
        loss_row(
            "perplexity",
            "e^(nats/token)",
            base.loss,
            tuned.loss,
            values=(base.loss.perplexity, tuned.loss.perplexity),
            slopes=(base.loss.perplexity, tuned.loss.perplexity),
        ),
    ]
    if tasks:
        table += [
            share_row("exact match", matches(tasks, base), matches(tasks, tuned)),
            share_row("stopped", [a.stopped for a in base.answers], [a.stopped for a in tuned.answers]),
        ]
    return table


def matches(tasks: Sequence[Task], side: Side) -> list[bool]:
    """Which answers are their references."""
    return [text in (task.reference, *task.others) for text, task in zip(side.texts, tasks, strict=True)]


def loss_row(
    metric: str,
    unit: str,
    base: Loss,
    tuned: Loss,
    *,
    values: tuple[float, float],
    slopes: tuple[float, float],
) -> dict[str, Any]:
    """A metric that is a function of the loss; `slopes` are its derivatives by the loss at base and tuned."""
    moved = [
        [slope * share for share in influences(*zip(*loss.per_example, strict=True))]
        for loss, slope in zip((base, tuned), slopes, strict=True)
    ]
    change = values[1] - values[0]
    change_stderr = spread([after - before for before, after in zip(*moved, strict=True)])
    return {
        "metric": metric,
        "unit": unit,
        "items": len(moved[0]),
        "lower_is_better": True,
        "base": {"value": values[0], "stderr": spread(moved[0])},
        "tuned": {"value": values[1], "stderr": spread(moved[1])},
        "change": change,
        "change_stderr": change_stderr,
        "verdict": verdict(change, change_stderr, len(moved[0]) - 1, lower_is_better=True),
    }


def share_row(metric: str, base: Sequence[bool], tuned: Sequence[bool]) -> dict[str, Any]:
    """A share of yes among the answers."""
    count = len(base)
    before, after = sum(base) / count, sum(tuned) / count
    differences = [int(b) - int(a) for a, b in zip(base, tuned, strict=True)]
    return {
        "metric": metric,
        "unit": "share",
        "items": count,
        "lower_is_better": False,
        "base": {"value": before, "stderr": share_stderr(before, count)},
        "tuned": {"value": after, "stderr": share_stderr(after, count)},
        "change": after - before,
        "change_stderr": spread(influences(differences, [1] * count)),
        "verdict": share_verdict(base, tuned),
    }


def shown_examples(
    tokenizer: Any, examples: Sequence[Example], tasks: Sequence[Task], base: Side, tuned: Side
) -> list[dict[str, Any]]:
    """Up to 20 examples with both answers: in turn one of each outcome, so that none crowds out the others."""
    by_outcome: dict[tuple[bool, bool], list[int]] = {}
    outcomes = list(zip(matches(tasks, base), matches(tasks, tuned), strict=True))
    for place, outcome in enumerate(outcomes):
        by_outcome.setdefault(outcome, []).append(place)
    mixed = [place for places in zip_longest(*by_outcome.values()) for place in places if place is not None]
    return [
        {
            "row": examples[tasks[place].example].row,
            "prompt": str(tokenizer.decode(tasks[place].prompt)),
            "reference": tasks[place].reference,
            "base": base.texts[place],
            "tuned": tuned.texts[place],
            "base_ok": outcomes[place][0],
            "tuned_ok": outcomes[place][1],
        }
        for place in mixed[:SHOWN]
    ]


def render(result: dict[str, Any], console: Console) -> None:
    """Print the table of an evaluation, and below it what was measured how."""
    if result.get("task") == "classification":
        evaluate_labels.render(result, console)
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title, side in (
        ("", "left"),
        ("base", "right"),
        ("tuned", "right"),
        ("change", "right"),
        ("", "left"),
    ):
        table.add_column(title, justify="left" if side == "left" else "right", no_wrap=True)
    for row in result["rows"]:
        colour = COLOURS.get(row["verdict"], "dim")
        table.add_row(
            row["metric"],
            cell(row["base"]),
            cell(row["tuned"]),
            change_of(row),
            f"[{colour}]{row['verdict']}[/{colour}]",
        )
    console.print(table)
    settings = result["settings"]
    facts = [
        plural(settings["examples"], "example"),
        plural(settings["targets"], "target"),
        settings["dtype"],
    ]
    if settings["answers"]:
        facts.append(
            f"{plural(settings['answers'], 'greedy answer')} of at most {settings['max_new_tokens']} tokens"
        )
    else:
        facts.append("no example has a prompt to answer, so exact match was not measured")
    console.print(" \N{MIDDLE DOT} ".join(fact for fact in facts if fact), style="dim", highlight=False)
    console.print(
        f"\N{PLUS-MINUS SIGN} one standard error over examples; {WORDS}",
        style="dim",
        highlight=False,
    )


def cell(side: dict[str, Any]) -> str:
    """A value with its standard error."""
    error = side["stderr"]
    return number(side["value"]) + (f" \N{PLUS-MINUS SIGN}{number(error, 2)}" if error is not None else "")


def change_of(row: dict[str, Any]) -> str:
    """The change as a number; a perplexity's in percent, since its size means little by itself."""
    if row["metric"] == "perplexity":
        share = row["change"] / row["base"]["value"]
        return ("+" if share > 0 else "") + percent(share, 2)
    return signed(row["change"])


@contextmanager
def progress_bar(title: str, total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on stderr as long as this lasts, if stderr is a terminal; yields what advances it."""
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = shown and sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=not shown, transient=True) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda count: progress.advance(bar, count)
