"""Scores of benchmarks side by side: which differences are more than noise.

Two models answer the same items, so a difference is taken item by item, where a score is a mean over items or a
weighted mean of such means (a group of tasks). For right or wrong the exact sign test decides, for other values
Student's t of the mean difference. A score of another kind (a perplexity, a corpus score) has only its own standard
error; the two then add up as if the models had seen different items, which overstates the noise.

source  arXiv:2411.00640, section 4 (paired differences); noise.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import hypot, isclose, isfinite
from typing import Any

from rich.console import Console
from rich.table import Table

from .evaluate import COLOURS
from .noise import WITHIN, WORDS, beyond, influences, satterthwaite, share_verdict, spread, verdict
from .wording import number, plural, signed

DIFFERS = "differs"  # beyond noise, in a score of which lm-eval does not say which way is better
Stratum = tuple[float, dict[int, float]]


@dataclass(frozen=True)
class Score:
    """One score of one task.

    higher  whether higher is better; None if lm-eval does not say
    strata  weight, and values by item, of each task that the score is the weighted mean of; None for other scores
    items   how many were asked
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher: bool | None
    strata: list[Stratum] | None
    items: int

    @property
    def is_share(self) -> bool:
        values = [value for _, held in self.strata or [] for value in held.values()]
        return bool(values) and all(0 <= value <= 1 for value in values)

    def to_cell(self) -> dict[str, Any]:
        return {"value": self.value, "stderr": self.stderr}


def read_scores(results: Mapping[str, Any]) -> dict[tuple[str, str], Score]:
    """Every score in lm-eval's results, by task and metric; a group stands before its tasks."""
    groups = results.get("groups") or {}
    scores = {}
    for task, held in {**groups, **results["results"]}.items():
        leaves = leaves_of(task, results.get("group_subtasks") or {})
        for key, value in held.items():
            metric, _, name = key.partition(",")
            if not name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = held.get(f"{metric}_stderr,{name}")
            label = metric if name == "none" else f"{metric}, {name}"
            scores[task, label] = Score(
                task,
                label,
                float(value),
                float(error) if isinstance(error, int | float) and isfinite(error) else None,
                (results.get("higher_is_better", {}).get(task) or {}).get(metric),
                strata_of(results.get("samples") or {}, leaves, metric, name, float(value)),
                sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
            )
    return scores


def leaves_of(task: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks in a group, or the task itself."""
    inside = subtasks.get(task) or []
    return [leaf for name in inside for leaf in leaves_of(name, subtasks)] or [task]


def strata_of(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    leaves: Sequence[str],
    metric: str,
    name: str,
    value: float,
) -> list[Stratum] | None:
    """The items' own values and each task's weight, if their weighted mean is the score; else None."""
    held = []
    for leaf in leaves:
        values = {
            int(sample["doc_id"]): sample[metric]
            for sample in samples.get(leaf, ())
            if sample["filter"] == name and metric in sample
        }
        if not values or not all(isinstance(one, int | float) for one in values.values()):
            return None
        held.append({item: float(one) for item, one in values.items()})
    total = sum(map(len, held))
    for weights in ([len(values) / total for values in held], [1 / len(held)] * len(held)):
        mean = sum(
            weight * sum(values.values()) / len(values) for weight, values in zip(weights, held, strict=True)
        )
        if isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9):
            return list(zip(weights, held, strict=True))
    return None


@dataclass(frozen=True)
class Change:
    """How a score moved. paired: taken item by item."""

    value: float
    stderr: float | None
    paired: bool
    verdict: str


def change_of(before: Score, after: Score) -> Change:
    """From one model's score to another's.

    raises  ValueError if they were asked other items
    """
    change = after.value - before.value
    if before.strata is None or after.strata is None:
        return moved(change, [before.stderr, after.stderr], [before.items, after.items], before.higher)
    errors: list[float | None] = []
    for (weight, old), (_, new) in zip(before.strata, after.strata, strict=True):
        if old.keys() != new.keys():
            raise ValueError(f"{before.task}: the two models were asked other items")
        error = spread(influences([new[item] - old[item] for item in old], [1] * len(old)))
        errors.append(None if error is None else weight * error)
    found = moved(change, errors, [len(old) for _, old in before.strata], before.higher, paired=True)
    values = [*before.strata[0][1].values(), *after.strata[0][1].values()]
    if len(before.strata) > 1 or not set(values) <= {0.0, 1.0} or before.higher is None:
        return found
    old, new = before.strata[0][1], after.strata[0][1]
    yes = 1.0 if before.higher else 0.0
    said = share_verdict([old[i] == yes for i in old], [new[i] == yes for i in old])
    return replace(found, verdict=said)


def moved(
    change: float,
    errors: Sequence[float | None],
    counts: Sequence[int],
    higher: bool | None,
    *,
    paired: bool = False,
) -> Change:
    """A change with its standard error, from those of its parts with the items of each; None if one is not known."""
    known = [error for error in errors if error is not None]
    if len(known) < len(errors) or min(counts) < 2:
        return Change(change, None, paired, WITHIN)
    error, freedom = hypot(*known), satterthwaite(known, counts)
    if higher is None:
        return Change(change, error, paired, DIFFERS if beyond(change, error, freedom) else WITHIN)
    return Change(change, error, paired, verdict(change, error, freedom, lower_is_better=not higher))


def paired_rows(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Two results of lm-eval as the rows of eval/NAME.json: the base beside the tuned model."""
    before, after = read_scores(base), read_scores(tuned)
    rows = []
    for key, score in before.items():
        change = change_of(score, after[key])
        rows.append(
            {
                "metric": f"{score.task} {score.metric}",
                "task": score.task,
                "score": score.metric,
                "unit": "share" if score.is_share else "",
                "items": score.items,
                "lower_is_better": None if score.higher is None else not score.higher,
                "base": score.to_cell(),
                "tuned": after[key].to_cell(),
                "change": change.value,
                "change_stderr": change.stderr,
                "paired": change.paired,
                "verdict": change.verdict,
            }
        )
    return rows


def column_rows(columns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Several models' results as rows with a cell each; a cell says how it compares with the best of its row.

    Of many models the best has also been the luckiest: what lies close behind it is as good.
    """
    scores = [read_scores(results) for results in columns]
    rows = []
    for key, first in scores[0].items():
        line = [one[key] for one in scores]
        cells: list[dict[str, Any]] = [score.to_cell() for score in line]
        if first.higher is not None and len(line) > 1:
            best = max(line, key=lambda score: score.value if score.higher else -score.value)
            for held, score in zip(cells, line, strict=True):
                held["verdict"] = "best" if score is best else change_of(best, score).verdict
        unit = "share" if all(score.is_share for score in line) else ""
        name = {"metric": f"{first.task} {first.metric}", "task": first.task, "score": first.metric}
        rows.append({**name, "unit": unit, "items": first.items, "cells": cells})
    return rows


def per_item(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each item's number, answers' scores and metrics, without the item: benchmarks do not belong into files."""
    return [
        {
            "task": task,
            "item": sample["doc_id"],
            "filter": sample["filter"],
            "answers": sample["filtered_resps"],
        }
        | {metric: sample[metric] for metric in sample["metrics"]}
        for task, samples in (results.get("samples") or {}).items()
        for sample in samples
    ]


# ==== on the terminal ========================================================================================


def render(result: Mapping[str, Any], console: Console) -> None:
    """Print the table of a benchmark, and below it how it was measured."""
    console.print(columns_table(result) if "models" in result else paired_table(result))
    settings = result["settings"]
    tasks = settings["tasks"].values()
    shots = sorted({task["shots"] for task in tasks})
    facts = [f"lm-eval {settings['lm_eval']}", settings["dtype"], " and ".join(map(str, shots)) + " shots"]
    facts.append("chat template" if settings["chat_template"] else "no chat template")
    if settings["limit"]:
        facts.append(f"the first {plural(settings['limit'], 'item')} of each task")
    lines = [" \N{MIDDLE DOT} ".join(facts), "\N{PLUS-MINUS SIGN} one standard error over items"]
    if "models" in result:
        lines[-1] += "; \N{ALMOST EQUAL TO} within noise of the best of its row"
    else:
        lines[-1] += f"; {WORDS}"
    console.print(*lines, *settings["notes"], sep="\n", style="dim", highlight=False)


def heading(rows: Sequence[Mapping[str, Any]]) -> str:
    """The metric of all rows, if it is one; then no row names it. Shares are in per cent."""
    found = {row["score"] for row in rows}
    return f"{found.pop()}{', %' if rows[0]['unit'] == 'share' else ''}" if len(found) == 1 else ""


def cell(value: Mapping[str, Any], row: Mapping[str, Any], *, percent: bool) -> str:
    """A value with its standard error; percent: say so, where it is a share."""
    scale, digits = (100.0, 3) if row["unit"] == "share" else (1.0, 4)
    error = value["stderr"]
    text = number(value["value"] * scale, digits)
    text += f" \N{PLUS-MINUS SIGN}{number(error * scale, 2)}" if error is not None else ""
    return text + (" %" if percent and row["unit"] == "share" else "")


def table_of(title: str, columns: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(title, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def paired_table(result: Mapping[str, Any]) -> Table:
    title = heading(result["rows"])
    table = table_of(title, ("items", "base", "tuned", "change"))
    table.add_column("", no_wrap=True)
    for row in result["rows"]:
        colour = COLOURS.get(row["verdict"], "dim")
        sides = [cell(row[side], row, percent=not title) for side in ("base", "tuned")]
        change = signed(row["change"] * (100.0 if row["unit"] == "share" else 1.0))
        verdict = f"[{colour}]{row['verdict']}[/{colour}]"
        table.add_row(row["task"] if title else row["metric"], number(row["items"]), *sides, change, verdict)
    return table


def columns_table(result: Mapping[str, Any]) -> Table:
    title = heading(result["rows"])
    table = table_of(title, ("items", *(model["target"] for model in result["models"])))
    signs = {WITHIN: ("\N{ALMOST EQUAL TO} ", ""), "best": ("[bold]", "[/bold]")}
    for row in result["rows"]:
        cells = []
        for held in row["cells"]:
            before, after = signs.get(held.get("verdict", ""), ("", ""))
            cells.append(before + cell(held, row, percent=not title) + after)
        table.add_row(row["task"] if title else row["metric"], number(row["items"]), *cells)
    return table
