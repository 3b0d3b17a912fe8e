"""The picture of docs/methods.md as an SVG file: final loss against trained parameters, both on log axes.

Written by hand rather than by a plotting library, whose output changes with its version: the file is compared
with what is committed. Its colours are readable on white and on black, its background is clear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from loraloom import methods
from loraloom.methods.base import LowRank

WIDTH, HEIGHT = 920, 560
LEFT, RIGHT, TOP, BOTTOM = 64, 130, 46, 52
TEXT, GRID, PAIR, OTHER = "#7d828a", "#7d828a", "#3b82f6", "#d9730d"
LINE = 14  # pixels between labels
DODGE = 3  # pixels between points of one count
NEAR = 60  # points closer than that share a column of labels


@dataclass(frozen=True)
class Point:
    """A method: its trained parameters, and its loss with the lowest and highest over seeds."""

    name: str
    trained: int
    mean: float
    lowest: float
    highest: float

    @property
    def colour(self) -> str:
        return PAIR if issubclass(methods.find(self.name), LowRank) else OTHER


@dataclass(frozen=True)
class Scale:
    """A log axis: values from low to high onto pixels from start to stop."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, digits: Sequence[int]) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found = [digit * 10.0**decade for decade in decades for digit in digits]
        return [value for value in found if self.low <= value * 1.0001 and value <= self.high * 1.0001]


def points_of(study: Any) -> list[Point]:
    rows = {name: row for name, row in study["table"].items() if "loss" in row}
    return [
        Point(name, row["trained"], *(max(row["loss"][key], 1e-6) for key in ("mean", "lowest", "highest")))
        for name, row in rows.items()
    ]


def loss_figure(study: Any) -> str:
    """The SVG file's text."""
    points = points_of(study)
    base = study["base"].get("loss")
    top = max([p.highest for p in points] + [base or 0])
    x = Scale(min(p.trained for p in points) / 1.5, max(p.trained for p in points) * 1.2, LEFT, WIDTH - RIGHT)
    y = Scale(min(p.lowest for p in points) / 1.2, top * 1.15, HEIGHT - BOTTOM, TOP)
    parts = [*axes(x, y), *legend()]
    if base:
        parts.append(stroke(LEFT, y(base), WIDTH - RIGHT, y(base), TEXT, dash="5 4"))
        parts.append(text(WIDTH - RIGHT, y(base) - 6, f"base {base:.2f}", anchor="end"))
    for column in columns(sorted(points, key=lambda p: p.trained), x):
        parts += drawn_column(column, x, y)
    title = "Final loss of each method against its trained parameters"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}" '
    head += 'font-family="sans-serif" font-size="12">'
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def columns(points: Sequence[Point], x: Scale) -> list[list[Point]]:
    """Neighbours along the axis, whose labels stand below one another."""
    found: list[list[Point]] = []
    for point in points:
        if found and x(point.trained) - x(found[-1][0].trained) < NEAR:
            found[-1].append(point)
        else:
            found.append([point])
    return found


def drawn_column(column: Sequence[Point], x: Scale, y: Scale) -> list[str]:
    """Points with their ranges, and labels to their right with a line to each."""
    column = sorted(column, key=lambda p: y(p.mean))
    places = apart([y(p.mean) for p in column], LINE)
    across = side_by_side(column, x)
    edge = max(across.values()) + 14
    parts = []
    for point, place in zip(column, places):
        px, py = across[point.name], y(point.mean)
        parts.append(stroke(px, y(point.highest), px, y(point.lowest), point.colour, width=1.5, opacity=0.55))
        parts.append(stroke(px + 5, py, edge, place, TEXT, width=0.7, opacity=0.6))
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="4" fill="{point.colour}"/>')
        parts.append(text(edge + 3, place + 4, point.name, colour=point.colour))
    return parts


def side_by_side(column: Sequence[Point], x: Scale) -> dict[str, float]:
    """Where each point stands across; those of about one count are set a little apart, so that ranges are seen."""
    alike: dict[int, list[Point]] = {}
    for point in column:
        alike.setdefault(round(x(point.trained) / 6), []).append(point)
    found = {}
    for points in alike.values():
        middle = sum(x(p.trained) for p in points) / len(points)
        found |= {p.name: middle + DODGE * (i - (len(points) - 1) / 2) for i, p in enumerate(points)}
    return found


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Places in the order given, at least `gap` apart, with the least squared distance from those wanted."""
    blocks: list[tuple[float, int]] = []  # (mean of wanted - i * gap, how many)
    for i, place in enumerate(wanted):
        mean, count = place - i * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, many = blocks.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        blocks.append((mean, count))
    flat = [mean for mean, count in blocks for _ in range(count)]
    return [place + i * gap for i, place in enumerate(flat)]


def axes(x: Scale, y: Scale) -> list[str]:
    parts = []
    for value in y.ticks((1, 2, 5)):
        parts.append(stroke(LEFT, y(value), WIDTH - RIGHT, y(value), GRID, opacity=0.22))
        parts.append(text(LEFT - 8, y(value) + 4, f"{value:g}", anchor="end"))
    for value in x.ticks((1,)):
        parts.append(stroke(x(value), TOP, x(value), HEIGHT - BOTTOM, GRID, opacity=0.22))
        parts.append(text(x(value), HEIGHT - BOTTOM + 18, count(value), anchor="middle"))
    parts.append(text(LEFT, TOP - 12, "final loss, nats a token; mean, and lowest to highest over seeds"))
    parts.append(text(WIDTH - RIGHT, HEIGHT - 12, "trained parameters", anchor="end"))
    return parts


def legend() -> list[str]:
    parts, at = [], WIDTH - 330
    for label, colour in (("low-rank pairs", PAIR), ("others", OTHER)):
        parts.append(f'<circle cx="{at}" cy="{TOP - 16}" r="4" fill="{colour}"/>')
        parts.append(text(at + 9, TOP - 12, label))
        at += 120
    return parts


def count(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def text(x: float, y: float, words: str, *, anchor: str = "start", colour: str = TEXT) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


def stroke(
    x1: float,
    y1: float,
    x2: float,
    y2: float,
    colour: str,
    *,
    width: float = 1,
    opacity: float = 1,
    dash: str = "",
) -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {place} stroke="{colour}" stroke-width="{width}" stroke-opacity="{opacity}"{dashes}/>'
