"""A study's drawings: a score by setting, or over a number such as the rank, each seed as a dot.

The mean is a larger mark, and a line as long as one standard deviation goes to both sides of it. Names in a drawing
are cut to plain characters: what a user wrote is the page's to escape.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .curves import Chart, chart
from .figures import INK, SERIES, drawing
from .wording import number

Row = Mapping[str, Any]
PLAIN = re.compile(r"[^\w ,.:=+()-]")
LONGEST = 26  # characters of a name in a drawing


def plain(name: str) -> str:
    name = PLAIN.sub(" ", name)
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"


def score_chart(
    rows: Sequence[Row], key: str, title: str, unit: str, *, axis: str | None, scale: float = 1.0
) -> Chart | None:
    """A score of every setting that has it; scale turns a share into per cent."""
    shown = [row for row in rows if row[key] is not None]
    if not shown:
        return None
    table = [[row["name"], row[key]["mean"], row[key]["sd"], *(row[key]["values"])] for row in shown]
    most = max(map(len, table))
    columns = ["setting", "mean", "sd", *(f"run {i}" for i in range(1, most - 2))]
    table = [[*line, *[None] * (most - len(line))] for line in table]
    groups = list(dict.fromkeys(row["group"] for row in shown))
    numbered = axis is not None and len({row["x"] for row in shown}) > 1

    def draw(name: str, size: tuple[int, int]) -> str:
        def put(axes: Any) -> None:
            if numbered:
                over_numbers(axes, shown, key, groups, str(axis), scale)
            else:
                by_name(axes, shown, key, scale)

        if not numbered:
            size = (size[0], 56 + 24 * len(shown))
        return drawing(name, size, title, put)

    legend = [(group, place % 8 + 1, "line") for place, group in enumerate(groups)]
    named = numbered and len(groups) > 1
    return chart(key, title, unit, draw, columns, table, large=True, legend=legend if named else [])


def by_name(axes: Any, rows: Sequence[Row], key: str, scale: float) -> None:
    """A line for each setting, the first on top."""
    for place, row in enumerate(rows):
        cell, y = row[key], len(rows) - 1 - place
        colour = SERIES[1] if row["verdict"] == "chosen" else SERIES[0]
        spread_line(axes, cell, scale, colour, at=y, upright=False)
        axes.plot(
            [v * scale for v in cell["values"]], [y] * len(cell["values"]), "o", ms=4, color=INK, alpha=0.6
        )
        axes.plot([cell["mean"] * scale], [y], "D", ms=7, color=colour, zorder=4)
    axes.set_yticks(range(len(rows)), [plain(row["name"]) for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.grid(visible=True, axis="x")


def over_numbers(
    axes: Any, rows: Sequence[Row], key: str, groups: Sequence[str], axis: str, scale: float
) -> None:
    """A line for each group over a number, on a scale of doublings."""
    axes.set_xscale("log", base=2)
    for place, group in enumerate(groups):
        own = sorted((row for row in rows if row["group"] == group), key=lambda row: row["x"])
        colour = SERIES[place % len(SERIES)]
        axes.plot(
            [row["x"] for row in own], [row[key]["mean"] * scale for row in own], "-D", ms=6, color=colour
        )
        for row in own:
            cell = row[key]
            spread_line(axes, cell, scale, colour, at=row["x"], upright=True)
            axes.plot(
                [row["x"]] * len(cell["values"]),
                [v * scale for v in cell["values"]],
                "o",
                ms=4,
                color=INK,
                alpha=0.6,
            )
    every = sorted({row["x"] for row in rows})
    axes.set_xticks(every, [number(int(x) if x == int(x) else x) for x in every])
    axes.minorticks_off()
    axes.set_xlabel(plain(axis.rpartition(".")[2]), loc="right", labelpad=1)


def spread_line(axes: Any, cell: Row, scale: float, colour: str, *, at: float, upright: bool) -> None:
    """One standard deviation to both sides of the mean."""
    if cell["sd"] is None:
        return
    ends = [(cell["mean"] - cell["sd"]) * scale, (cell["mean"] + cell["sd"]) * scale]
    places = ([at, at], ends) if upright else (ends, [at, at])
    axes.plot(*places, color=colour, linewidth=2, alpha=0.6, zorder=2)


def cost_chart(rows: Sequence[Row], key: str, title: str, unit: str, scale: float) -> Chart | None:
    """Seconds or bytes by setting, as bars that begin at zero."""
    shown = [row for row in rows if row[key] is not None]
    if not shown:
        return None
    heights = [row[key]["mean"] * scale for row in shown]

    def draw(name: str, size: tuple[int, int]) -> str:
        def put(axes: Any) -> None:
            places = range(len(shown) - 1, -1, -1)
            axes.barh(list(places), heights, height=0.66, color=SERIES[0])
            axes.set_yticks(list(places), [plain(row["name"]) for row in shown])
            axes.grid(visible=False, axis="y")
            axes.grid(visible=True, axis="x")

        return drawing(name, (size[0], 56 + 22 * len(shown)), title, put)

    return chart(key, title, unit, draw, ["setting", title], list(zip((r["name"] for r in shown), heights)))


def published_charts(rows: Sequence[Row], axis: str | None) -> list[Chart]:
    """The scores that were published for these settings; costs stand in the table."""
    names = list(dict.fromkeys(key for row in rows for key in row["published"]))
    charts = []
    for name in names:
        own = [
            {**row, "verdict": "", name: {"mean": row["published"][name], "sd": None, "values": []}}
            for row in rows
            if name in row["published"]
        ]
        if name in ("seconds", "memory_gb") or len(own) < 2:
            continue
        found = score_chart(own, name, f"Published: {name.replace('_', ' ')}", "", axis=axis)
        charts += [found] if found else []
    return charts
