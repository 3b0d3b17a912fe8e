"""A study as one HTML page: what was asked, what was chosen, the table, the drawings, and what was published.

raises  UserError if matplotlib or jinja2 is missing
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import yaml_text
from .curves import Chart, csv_address, overlay, series, smooth
from .files import write_text
from .report import render
from .rundir import STATE, Run
from .sections import pairs
from .study_figures import cost_chart, published_charts, score_chart
from .study_table import (
    BETTER,
    CHOSEN,
    GIGABYTE,
    LOSS,
    MATCH,
    WORSE,
    cells,
    columns,
    main_of,
    measured,
    measures,
    unit_of,
)

SIGNS = {CHOSEN: ("good", "★"), BETTER: ("good", "✓"), WORSE: ("bad", "✗")}


def write_page(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write study.html into the study's folder; its path."""
    path = folder / "study.html"
    write_text(path, render("study.html.j2", content(folder, record)))
    return path


def content(folder: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows."""
    rows, axis = record["table"], record.get("axis")
    study = record["study"]
    costs = [
        cost_chart(rows, "seconds", "Time of the training steps", "seconds", 1.0),
        cost_chart(rows, "memory", "Peak memory", "GB", 1 / GIGABYTE),
    ]
    return {
        "title": study["name"],
        "preset": study["preset"],
        "asks": record["asks"],
        "source": record["source"],
        "found": record["found"],
        "note": record["note"],
        "says": record["says"],
        "columns": columns(rows),
        "rows": [row_view(row, rows) for row in rows],
        "csv": csv_address(columns(rows), [cells(row, rows) for row in rows]),
        "charts": present(score_charts(rows, axis)),
        "main": main_of(rows),
        "unit": unit_of(rows),
        "costs": present(costs),
        "published": published_charts(rows, axis),
        "curves": curves(folder, record),
        "settings": pairs(study["base"] | {"seeds": study["seeds"]}),
        "tried": [
            (one["name"], ", ".join(f"{k}={yaml_text(v)}" for k, v in one["values"].items()))
            for one in study["settings"]
        ],
        "environment": pairs(record["environment"]),
        "sizes": record["rows"],
        "runs": record["runs"],
    }


def row_view(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row's name, its numbers, its verdict and what was published."""
    colour, sign = SIGNS.get(row["verdict"], ("even", "≈" if row["verdict"] else ""))
    line = dict(zip(columns(rows), cells(row, rows), strict=True))
    known, words, name = line.pop("published", None), line.pop("beside the chosen"), line.pop("setting")
    return {
        "name": name,
        "numbers": list(line.values()),
        "verdict": f"{sign} {words}".strip(),
        "colour": colour,
        "chosen": row["verdict"] == CHOSEN,
        "published": known,
    }


def score_charts(rows: Sequence[Mapping[str, Any]], axis: str | None) -> list[Chart | None]:
    """A drawing for each score of the final rows."""
    drawn = []
    for place, name in enumerate(measures(rows)):
        key = name if name in (LOSS, MATCH) else f"task-{place}"
        own = [{**row, key: measured(row, name) or None} for row in rows]
        share = any(row[key] and row[key]["share"] for row in own)
        unit, scale = ("%", 100.0) if share else (unit_of(rows) if name == LOSS else "", 1.0)
        title = f"{name.replace('_', ' ').capitalize()} on the final rows"
        title = name.replace("_", " ") if " " in name else title  # a benchmark has rows of its own
        drawn.append(score_chart(own, key, title, unit, axis=axis, scale=scale))
    return drawn


def present(charts: Sequence[Chart | None]) -> list[Chart]:
    return [one for one in charts if one is not None]


def curves(folder: Path, record: Mapping[str, Any]) -> list[Chart]:
    """The loss of the training steps, smoothed, of each setting's first seed."""
    found = []
    first = record["study"]["seeds"][0]
    for run in record["runs"]:
        path = folder / run["run"]
        if run["seed"] == first and (path / STATE).is_file():
            x, y = series(Run(path).metrics("train"), "loss")
            found.append((run["setting"], x, smooth(y)))
    drawn = overlay("train", f"Train loss, smoothed, seed {first}", unit_of(record["table"]), found)
    return [drawn] if drawn.count else []
