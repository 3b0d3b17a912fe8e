"""A run folder as one HTML page, and several runs side by side: the only file that imports jinja2.

The page needs no network and nothing beside it: style, drawings and CSV files stand in it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import inspect_page, sections
from .config import flatten
from .curves import is_number, loss_chart, metric_chart, overlay, series, small_charts, smooth
from .environment import now, version
from .errors import UserError
from .files import write_text
from .results import Result, result
from .rundir import Run
from .verdict import light, method, tiles, verdict
from .wording import MISSING, amount, day, duration, number, percent, size

TEMPLATES = Path(__file__).parent / "templates"
SAME_WHATEVER = ("output",)  # settings that differ between any two runs and say nothing


def build_report(run: Run) -> Path:
    """Write report.html into the run folder, whatever the run's state.

    returns  its path
    raises  UserError if matplotlib or jinja2 is missing, or a file of the run is damaged
    """
    path = run.path / "report.html"
    write_text(path, render("report.html.j2", report_content(run)))
    return path


def report_content(run: Run) -> dict[str, Any]:
    """What the report's template shows."""
    outcome, state = result(run), run.state
    colour, words = light(run, outcome)
    train, held = run.metrics("train"), run.metrics("eval")
    checks = [
        {
            "name": str(check.get("name")),
            "ok": bool(check.get("ok")),
            "detail": str(check.get("detail") or ""),
        }
        for check in run.checks()
    ]
    return {
        "title": run.name,
        "subtitle": f"{method(run.config)} on {run.config.model.id}",
        "light": colour,
        "status": words,
        "started": day(state.get("started")),
        "verdict": verdict(run, outcome),
        "tiles": tiles(run, outcome),
        "checks": sorted(checks, key=lambda check: bool(check["ok"])),
        "loss": loss_chart(train, held, outcome, unit(run)),
        "metrics": metric_chart(held, sections.METRICS) if run.config.task == "classification" else None,
        "charts": small_charts(train),
        "evaluations": sections.evaluation_views(run),
        "samples": sections.sample_views(run),
        "data": sections.data_view(run),
        "adapter": sections.adapter_view(run),
        "analysis": inspect_page.analysis_view(run),
        "settings": sections.settings_view(run),
        "environment": sections.pairs(
            {name: value for name, value in run.env.items() if name != "base_is_folder"}
        ),
        "merge": sections.pairs(
            {name: value for name, value in (run.read("merge.json", None) or {}).items() if name != "layers"}
        ),
        "command": run.command,
    }


def unit(run: Run) -> str:
    """Of the run's loss."""
    if run.config.task == "causal":
        return "nats per target token"
    return "nats per row" if sections.labels(run) else "squared error"


def compare(runs: list[Run], out: Path) -> Path:
    """Write a page that lays runs over each other: results, curves, and the settings that differ.

    raises  UserError for fewer than two runs, or if matplotlib or jinja2 is missing
    """
    if len(runs) < 2:
        raise UserError("a comparison needs at least two runs", hint="loraloom report RUN RUN [RUN ...]")
    out = Path(out)
    write_text(out, render("compare.html.j2", compare_content(runs)))
    return out


def compare_content(runs: Sequence[Run]) -> dict[str, Any]:
    """What the comparison's template shows."""
    names = labels([run.path for run in runs])
    outcomes = [result(run) for run in runs]
    held = [(name, *series(run.metrics("eval"), "loss")) for name, run in zip(names, runs)]
    train = []
    for name, run in zip(names, runs):
        x, y = series(run.metrics("train"), "loss")
        train.append((name, x, smooth(y)))
    charts = [
        overlay("held-out", "Held-out loss", unit(runs[0]), held),
        overlay("train", "Train loss, smoothed", unit(runs[0]), train),
    ]
    return {
        "title": f"{len(runs)} runs compared",
        "names": names,
        "summary": ranking(names, outcomes),
        "lights": [light(run, outcome) for run, outcome in zip(runs, outcomes)],
        "results": results_table(outcomes),
        "differences": differences(runs),
        "charts": [chart for chart in charts if chart.count],
    }


def ranking(names: Sequence[str], outcomes: Sequence[Result]) -> str:
    """One sentence: which run is best, and by how much."""
    measured = [(o.best_loss, name) for name, o in zip(names, outcomes) if o.best_loss is not None]
    if len(measured) < 2:
        return "Fewer than two of these runs have a held-out loss, so none is called the best."
    (first, best), (second, next_) = sorted(measured)[:2]
    if first == second:
        return f"{best} and {next_} have the same held-out loss, {number(first)} nats per token."
    ahead = number(second - first, 2)
    return (
        f"{best} has the lowest held-out loss, {number(first)} nats per token, {ahead} below {next_}. "
        "Held-out losses compare only where the held-out rows are the same; "
        "a difference as small as between two seeds is noise."
    )


def results_table(outcomes: Sequence[Result]) -> list[dict[str, Any]]:
    """Rows of a label and, for each run, (text, whether it is the best); what no run measured is left out."""
    wanted: list[tuple[str, str, Any, bool | None]] = [  # field, label, wording, lower is better
        ("best_loss", "best held-out loss", number, True),
        ("base_loss", "base loss", number, None),
        ("best_step", "best step", number, None),
        ("exact_match", "exact match", percent, False),
        ("steps", "steps", number, None),
        ("seconds", "time", duration, True),
        ("speed", "tokens per second", lambda value: number(value, 3), False),
        ("memory", "peak memory", size, True),
        ("trainable", "trained weights", amount, None),
    ]
    rows = []
    for field, label, wording, lower in wanted:
        values = [getattr(outcome, field) for outcome in outcomes]
        numbers = [value for value in values if is_number(value)]
        if not numbers:
            continue
        best = None if lower is None or len(set(numbers)) < 2 else min(numbers) if lower else max(numbers)
        cells = [
            (wording(value) if value is not None else MISSING, best is not None and value == best)
            for value in values
        ]
        rows.append({"label": label, "cells": cells})
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


def render(template: str, content: dict[str, Any]) -> str:
    """Fill a template; everything that is not ours is escaped.

    raises  UserError if jinja2 is not installed
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise UserError("the report needs jinja2", hint="pip install 'loraloom[report]'") from None
    jinja = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,  # by hand: jinja2 would choose by the file's ending, which is .j2
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["number"] = number
    return jinja.get_template(template).render(content, made=day(now()), version=version("loraloom"))
