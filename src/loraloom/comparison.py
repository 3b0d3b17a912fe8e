"""Several runs side by side: what each was measured at, what it cost, and the settings that differ.

A measurement is a row of the runs' eval/*.json, or of training's own evaluation at the best step, which has no standard
errors. Runs are judged only where they were asked the same; where they were not, or it is not known, the row says so.
Of the others the best is marked if every other run is further off than noise: shares by Fisher's exact test, the rest
by Student's t with the two standard errors. Both take the runs for ones that saw different examples: on the same ones
that overstates the noise.

source  noise.py
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from math import hypot, isclose
from pathlib import Path
from typing import Any

from . import sections
from .config import flatten
from .curves import is_number
from .files import file_digest
from .noise import RARE, WITHIN, beyond, fisher, satterthwaite
from .results import Result, evaluations, result, value_of
from .rundir import Run
from .wording import MISSING, amount, duration, number, size

TRAINING = "best step of training"
HELD_OUT = "held-out"
BEST, BEHIND = "best", "behind"
SAME_WHATEVER = ("output",)  # settings that differ between any two runs and say nothing
ASKED = ("examples", "targets", "answers", "max_new_tokens", "left out, too long or empty")
OF_A_TASK = ("version", "shots", "items", "sha256")
ROWS = "rows or their tokens"
CONSTANT = "constant answer"


def comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """All of it as plain values: names, summary, measurements, costs, differences."""
    names = labels([run.path for run in runs])
    outcomes = [result(run) for run in runs]
    rows = measurements(runs)
    return {
        "names": names,
        "summary": summary(names, rows),
        "measurements": rows,
        "costs": costs(outcomes),
        "differences": differences(runs),
    }


# ==== measurements ===========================================================================================


def measurements(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each metric of each table that some run has: training's own, the held-out rows, the others as met."""
    tables = [[training_table(run), *evaluations(run)] for run in runs]
    order = dict.fromkeys([TRAINING, HELD_OUT, *(table["name"] for own in tables for table in own)])
    rows = []
    for name in order:
        held = [next((table for table in own if table["name"] == name), None) for own in tables]
        rows_of = [{row_key(row): row for row in table_rows(table)} for table in held]
        for key in dict.fromkeys(key for own in rows_of for key in own):
            found = [own.get(key) for own in rows_of]
            how = [asked(run, table, row) for run, table, row in zip(runs, held, found)]
            rows.append(measurement(name, key[0], found, how))
    return rows


def training_table(run: Run) -> dict[str, Any]:
    """What training measured on the held-out rows at its best step, as a table of eval/ has it."""
    outcome, labelled = result(run), run.config.task == "classification"
    held = run.metrics("eval")
    record: dict[str, Any] = next((one for one in reversed(held) if one.get("step") == outcome.best_step), {})
    unit = "nats/token" if not labelled else "nats/row" if sections.labels(run) else "squared"
    rows = [
        {"metric": name, "unit": "share" if name == "accuracy" else "", "lower_is_better": False}
        | {"tuned": record[name]}
        for name in sections.METRICS
        if is_number(record.get(name))
    ]
    rows.sort(key=lambda row: row["metric"] != record.get("metric"))
    if outcome.best_loss is not None:
        base = None if labelled else outcome.base_loss
        rows.append({"metric": "loss", "unit": unit, "lower_is_better": True, "base": base})
        rows[-1]["tuned"] = outcome.best_loss
    return {"name": TRAINING, "rows": rows}


def table_rows(table: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The rows that hold a number for the tuned model."""
    rows = table["rows"] if table is not None else []
    return [row for row in rows if isinstance(row, dict) and is_number(value_of(row.get("tuned")))]


def row_key(row: Mapping[str, Any]) -> tuple[str, str]:
    """A metric in another unit is another measurement."""
    return str(row.get("metric", MISSING)), str(row.get("unit") or "")


def asked(run: Run, table: Mapping[str, Any] | None, row: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What decides whether two runs were asked the same; None where this one was not measured."""
    if table is None or row is None:
        return None
    given = table.get("settings") or {}
    found: dict[str, Any] = {key: given[key] for key in ASKED if given.get(key) is not None}
    if "tasks" in given:
        tasks = given["tasks"]
        own = row.get("task")
        about = {own: tasks[own]} if own in tasks else tasks  # a group's are all
        found |= {key: {name: one.get(key) for name, one in about.items()} for key in OF_A_TASK}
        return found | {"chat template": given.get("chat_template"), "items": row.get("items")}
    tokens = run.path / "data" / "held-out" / "tokens.safetensors"
    if table["name"] == TRAINING:
        return found | {ROWS: file_digest(tokens) if tokens.is_file() else None}
    return found | {ROWS: given.get("rows")}


def measurement(
    table: str, metric: str, rows: Sequence[Mapping[str, Any] | None], how: Sequence[dict[str, Any] | None]
) -> dict[str, Any]:
    """One metric of all runs; those that were not measured have None."""
    first = next(row for row in rows if row is not None)
    side = "constant" if "constant" in first else "base"
    lower = first.get("lower_is_better")
    cells = [
        cell(row["tuned"]) | {"items": row.get("items"), "base": cell(row.get(side))} if row else None
        for row in rows
    ]
    bases = [one["base"] for one in cells if one and one["base"]["value"] is not None]
    held = [one for one in cells if one]
    note = unlike([one for one in how if one is not None])
    if not note and lower is not None:
        judge(held, lower=lower, share=first.get("unit") == "share")
    return {
        "table": table,
        "metric": f"{first['task']}, {first['score']}" if "task" in first else metric.replace("_", " "),
        "unit": str(first.get("unit") or ""),
        "lower_is_better": lower,
        "base": bases[0] if len(bases) == len(held) and all(alike(bases[0], one) for one in bases) else None,
        "base_is": CONSTANT if side == "constant" else "base",
        "runs": cells,
        "note": note,
    }


def cell(value: Any) -> dict[str, Any]:
    """{value, stderr} of a table's cell, which may be a bare number."""
    error = value.get("stderr") if isinstance(value, dict) else None
    return {"value": value_of(value), "stderr": error}


def alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two bases are one number, measured twice."""
    return isclose(one["value"], other["value"], rel_tol=1e-6, abs_tol=1e-9)


def unlike(how: Sequence[Mapping[str, Any]]) -> str:
    """Why several runs are not judged beside each other; empty where all were asked the same."""
    if len(how) < 2:
        return ""
    names = dict.fromkeys(name for one in how for name in one)
    differ = [name for name in names if len({str(one.get(name)) for one in how}) > 1]
    if differ:
        return f"not the same: {', '.join(differ)}"
    return f"not known to be the same: {ROWS}" if ROWS in names and how[0][ROWS] is None else ""


def judge(cells: Sequence[dict[str, Any]], *, lower: bool, share: bool) -> None:
    """Give each cell its verdict beside the best of its row; none to any where one cannot be told."""
    if len(cells) < 2:
        return
    top = (min if lower else max)(cells, key=lambda one: one["value"])
    told = [further_off(one, top, share=share) for one in cells if one is not top]
    if None in told:
        return
    for one, further in zip([one for one in cells if one is not top], told):
        one["verdict"] = BEHIND if further else WITHIN
    top["verdict"] = BEST if all(told) else WITHIN


def further_off(one: Mapping[str, Any], top: Mapping[str, Any], *, share: bool) -> bool | None:
    """Whether a run is off the best by more than noise; None where that cannot be told.

    Two errors of 0 say nothing: they are those of scores that leave the examples no room to differ.
    """
    pair = (one, top)
    counts = [side["items"] or 0 for side in pair]
    yes = [side["value"] * count for side, count in zip(pair, counts)]
    if share and all(counts) and all(isclose(count, round(count), abs_tol=1e-6) for count in yes):
        return fisher((round(yes[0]), round(yes[1])), (counts[0], counts[1])) < RARE
    errors = [side["stderr"] for side in pair]
    if None in errors or min(counts) < 2 or (not any(errors) and one["value"] != top["value"]):
        return None
    return beyond(one["value"] - top["value"], hypot(*errors), satterthwaite(errors, counts))


def summary(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """What the first row with a verdict says; without one, who has the better number in the first row."""
    many = [row for row in rows if sum(one is not None for one in row["runs"]) > 1 and not row["note"]]
    judged = [row for row in many if any(one and one.get("verdict") for one in row["runs"])]
    if judged:
        return judged_words(names, judged[0])
    many = [row for row in many if row["lower_is_better"] is not None]
    if not many:
        return (
            "No score is known to be of the same examples in two of these runs, so none is called the best."
        )
    row = many[0]
    held = [(one["value"], name) for one, name in zip(row["runs"], names) if one]
    held.sort(key=lambda one: one[0], reverse=not row["lower_is_better"])
    (best, other), words = held[:2], partial(sections.with_error, is_share=is_share(row))
    training = row["table"] == TRAINING
    what = f"held-out {row['metric']}" if training else f"{row['metric']} ({row['table']})"
    if best[0] == other[0]:
        return f"{best[1]} and {other[1]} have the same {what}, {words(best[0])}."
    most = "lowest" if row["lower_is_better"] else "highest"
    had = f"{best[1]} had the {most} {what}, {words(best[0])}; {other[1]} had {words(other[0])}."
    unknown = "Whether that is more than noise is not known"
    if training:
        return f"In training {had} {unknown}: loraloom eval RUN measures each with standard errors."
    return f"{had} {unknown}."


def judged_words(names: Sequence[str], row: Mapping[str, Any]) -> str:
    held = [(name, one) for name, one in zip(names, row["runs"]) if one]
    texts = {name: f"{name} ({sections.with_error(one, is_share(row))})" for name, one in held}
    what = f"{row['metric']} ({row['table']})"
    best = [texts[name] for name, one in held if one["verdict"] == BEST]
    if best:
        of = f" of the {len(held)} runs measured at it" if len(held) < len(names) else ""
        return f"{best[0]} has the best {what}{of}: every other is further off than noise."
    tied = [texts[name] for name, one in held if one["verdict"] == WITHIN]
    behind = ", and the others are behind" if len(tied) < len(held) else ""
    return (
        f"The best {what} is within noise: {', '.join(tied[:-1])} and {tied[-1]} are not told apart{behind}."
    )


def is_share(row: Mapping[str, Any]) -> bool:
    return bool(row["unit"] == "share")


# ==== costs and settings =====================================================================================


def costs(outcomes: Sequence[Result]) -> list[dict[str, Any]]:
    """Rows of a label, each run's value and its text; what no run has is left out."""
    wanted: list[tuple[str, str, Any]] = [
        ("steps", "steps", number),
        ("best_step", "best step", number),
        ("seconds", "time", duration),
        ("speed", "tokens per second", lambda value: number(value, 3)),
        ("memory", "peak memory", size),
        ("trainable", "trained weights", amount),
    ]
    rows = []
    for field, label, wording in wanted:
        values = [getattr(outcome, field) for outcome in outcomes]
        if any(is_number(value) for value in values):
            texts = [wording(value) if value is not None else MISSING for value in values]
            rows.append({"name": field, "label": label, "values": values, "texts": texts})
    return rows


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings that are not the same in all runs: name, and the value in each."""
    trees = [flatten(run.config.model_dump(mode="json")) for run in runs]
    names = [
        name for name in dict.fromkeys(name for tree in trees for name in tree) if name not in SAME_WHATEVER
    ]
    rows = [
        (name, [sections.yaml_text(tree[name]) if name in tree else MISSING for tree in trees])
        for name in names
    ]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def labels(paths: Sequence[Path]) -> list[str]:
    """Each folder's name, with as many parents as tell them apart; the same folder twice is numbered."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return [
        f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


# ==== for the page ===========================================================================================


def groups(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The measurements by table, as text."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["table"], []).append(row_view(row))
    sides = {name: {row["base_is"] for row in rows if row["table"] == name} for name in found}
    about = {name: f"base: the {CONSTANT}" if CONSTANT in kinds else "" for name, kinds in sides.items()}
    about |= {name: f"{about[name]}, of a classifier" for name, kinds in sides.items() if len(kinds) > 1}
    return [{"name": name, "rows": own, "about": about[name]} for name, own in found.items()]


def row_view(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as text: the base in a cell of its own where it is the same for all, else below each run's value."""
    share = is_share(row)
    cells = []
    for one in row["runs"]:
        own = one["base"] if one and row["base"] is None and one["base"]["value"] is not None else None
        cells.append(
            {
                "text": sections.with_error(one, share) if one else MISSING,
                "verdict": one.get("verdict", "") if one else "",
                "base": f"{row['base_is']} {sections.with_error(own, share)}" if own else "",
            }
        )
    return {
        "metric": row["metric"],
        "unit": "" if share else row["unit"],
        "base": sections.with_error(row["base"], share) if row["base"] else "",
        "cells": cells,
        "note": row["note"],
    }
