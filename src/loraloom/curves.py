"""The charts of a run, each with its numbers: a short table to read and the whole of it as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from urllib.parse import quote

from .figures import NARROW, SMALL, WIDE, Level, Line, Mark, bar_chart, line_chart
from .results import Result
from .wording import number

Record = Mapping[str, Any]
SHOWN = 40  # rows of a table in the page; the CSV has all


@dataclass(frozen=True)
class Chart:
    """A drawing (and one for narrow screens), what it shows, its legend and its numbers.

    legend  (text, number of the page's colour from 1, kind of stroke: line, faint, dashed)
    rows    the shown numbers as text; csv is a data: address with all of them
    """

    title: str
    unit: str
    svg: str
    narrow: str | None
    legend: list[tuple[str, int, str]]
    columns: list[str]
    rows: list[list[str]]
    count: int
    csv: str
    file: str


def chart(
    name: str,
    title: str,
    unit: str,
    draw: Callable[[str, tuple[int, int]], str],
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    large: bool = False,
    legend: Sequence[tuple[str, int, str]] = (),
) -> Chart:
    """Draw a chart by draw(name, size) and put its numbers beside it."""
    shown = [[number(value) for value in row] for row in evenly(rows, SHOWN)]
    return Chart(
        title=title,
        unit=unit,
        svg=draw(name, WIDE if large else SMALL),
        narrow=draw(f"{name}-narrow", NARROW) if large else None,
        legend=list(legend),
        columns=list(columns),
        rows=shown,
        count=len(rows),
        csv=csv_address(columns, rows),
        file=f"{name}.csv",
    )


def csv_address(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as a data: address of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return "data:text/csv;charset=utf-8," + quote(text.getvalue(), safe=",-._~")


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly spread, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def series(records: Sequence[Record], key: str) -> tuple[list[float], list[float]]:
    """The steps and values of a field, where it is a finite number."""
    found = [
        (float(record["step"]), float(record[key]))
        for record in records
        if is_number(record.get(key)) and is_number(record.get("step"))
    ]
    return [step for step, _ in found], [value for _, value in found]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def smooth(values: Sequence[float]) -> list[float]:
    """The mean over a twentieth of the run around each point, taken twice.

    The window is the same on both sides, also near the ends, so that a falling curve is not held up.
    """
    half = max(1, len(values) // 40)
    out = list(values)
    for _ in range(2):
        sums = [0.0, *accumulate(out)]
        reach = [min(half, place, len(out) - 1 - place) for place in range(len(out))]
        out = [(sums[i + h + 1] - sums[i - h]) / (2 * h + 1) for i, h in enumerate(reach)]
    return out


def loss_chart(
    train: Sequence[Record], held: Sequence[Record], outcome: Result, unit: str = "nats per target token"
) -> Chart | None:
    """Train loss, raw and smoothed, and held-out loss with the base as a line and the best step marked."""
    x, y = series(train, "loss")
    held_x, held_y = series(held, "loss")
    if not x and not held_x:
        return None
    smoothed = smooth(y)
    lines = [Line(x, y, faint=True), Line(x, smoothed), Line(held_x, held_y, series=1, dots=True)]
    lines = [line for line in lines if line.x]
    legend = [("train, each step", 1, "faint"), ("train, smoothed", 1, "line")] if x else []
    legend += [("held-out", 2, "line")] if held_x else []
    levels, marks = [], []
    if outcome.base_loss is not None:
        levels = [Level(outcome.base_loss, f"base {number(outcome.base_loss)}")]
    if outcome.best_loss is not None and outcome.best_step is not None:
        label = f"best {number(outcome.best_loss)} at step {outcome.best_step}"
        marks = [Mark(outcome.best_step, outcome.best_loss, label)]
    rows = merge_columns([(x, y), (x, smoothed), (held_x, held_y)])

    def draw(name: str, size: tuple[int, int]) -> str:
        title = "train and held-out loss over the steps"
        return line_chart(name, lines, size=size, title=title, levels=levels, marks=marks)

    columns = ["step", "train loss", "smoothed train loss", "held-out loss"]
    return chart("loss", "Loss", unit, draw, columns, rows, large=True, legend=legend)


def metric_chart(held: Sequence[Record], names: Sequence[str]) -> Chart | None:
    """Metrics on held-out rows over the steps, each in a colour."""
    curves = [(name, *series(held, name)) for name in names]
    curves = [curve for curve in curves if curve[1]]
    if not curves:
        return None
    lines = [Line(x, y, series=place, dots=True) for place, (_, x, y) in enumerate(curves)]

    def draw(name: str, size: tuple[int, int]) -> str:
        return line_chart(name, lines, size=size, title="metrics on held-out rows over the steps")

    legend = [(name, place + 1, "line") for place, (name, _, _) in enumerate(curves)]
    rows = merge_columns([(x, y) for _, x, y in curves])
    columns = ["step", *(name for name, _, _ in curves)]
    return chart("metrics", "Held-out metrics", "", draw, columns, rows, large=True, legend=legend)


def small_charts(train: Sequence[Record]) -> list[Chart]:
    """Learning rate, gradient norm, tokens per second and memory, those that were measured."""
    speed = [
        {"step": record.get("step"), "speed": record["tokens"] / record["seconds"]}
        for record in train
        if record.get("tokens") and record.get("seconds")
    ]
    memory = [
        {"step": record.get("step"), "memory": record["memory"] / 2**30}
        for record in train
        if record.get("memory")
    ]
    wanted = [
        ("learning-rate", "Learning rate", "", train, "lr", False),
        ("gradient-norm", "Gradient norm", "before clipping", train, "grad_norm", False),
        ("speed", "Throughput", "tokens per second", speed, "speed", True),
        ("memory", "Memory", "peak, GiB", memory, "memory", True),
    ]
    charts = []
    for name, title, unit, records, key, smoothed in wanted:
        x, y = series(records, key)
        if x:
            charts.append(small_chart(name, title, unit, x, y, calm=smoothed))
    return charts


def small_chart(name: str, title: str, unit: str, x: list[float], y: list[float], *, calm: bool) -> Chart:
    """One quantity over the steps. calm: it begins at 0, so that jitter looks as small as it is."""

    def draw(name: str, size: tuple[int, int]) -> str:
        return line_chart(name, [Line(x, y)], size=size, title=f"{title} over the steps", zero=calm)

    return chart(name, title, unit, draw, ["step", f"{title}, {unit}".strip(", ")], list(zip(whole(x), y)))


def overlay(
    name: str, title: str, unit: str, curves: Sequence[tuple[str, list[float], list[float]]]
) -> Chart:
    """The same quantity of several runs, given as (run's name, steps, values), in the page's colours."""
    lines = [Line(x, y, series=place, dots=len(x) <= 30) for place, (_, x, y) in enumerate(curves)]

    def draw(name: str, size: tuple[int, int]) -> str:
        return line_chart(name, [line for line in lines if line.x], size=size, title=f"{title} of each run")

    legend = [(run, place % 8 + 1, "line") for place, (run, x, _) in enumerate(curves) if x]
    rows = merge_columns([(x, y) for _, x, y in curves])
    columns = ["step", *(run for run, _, _ in curves)]
    return chart(name, title, unit, draw, columns, rows, large=True, legend=legend)


def histogram(name: str, title: str, unit: str, bars: Sequence[tuple[str, float]]) -> Chart:
    """Bars with their labels."""

    def draw(name: str, size: tuple[int, int]) -> str:
        return bar_chart(
            name, [label for label, _ in bars], [height for _, height in bars], size=size, title=title
        )

    return chart(name, title, unit, draw, ["bin", "count"], bars)


def merge_columns(columns: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[list[Any]]:
    """Several series as one table with the step in front; a step that a series lacks is empty."""
    tables = [dict(zip(x, y)) for x, y in columns]
    steps = sorted({step for table in tables for step in table})
    return [[*whole([step]), *(table.get(step) for table in tables)] for step in steps]


def whole(values: Sequence[float]) -> list[float | int]:
    """Numbers without a fraction as integers: steps are read, not measured."""
    return [int(value) if value == int(value) else value for value in values]
