"""Charts as SVG that stands inline in a page, or as files: the only file that imports matplotlib.

The colours are CSS variables of the page, so that one drawing serves light and dark; text stays text.
No user's text enters a drawing but names of modules: others are written by the page, which escapes them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import write_bytes, write_text

# Drawn colour -> the page's variable. The drawn ones are arbitrary; they only have to be unlike each other.
SERIES = [f"#a1b2c{i}" for i in range(8)]
INK, GRID, BASE, CARD = "#a1b2d0", "#a1b2d1", "#a1b2d2", "#a1b2d3"
VARIABLES = {colour: f"var(--s{i + 1})" for i, colour in enumerate(SERIES)} | {
    INK: "var(--muted)",
    GRID: "var(--grid)",
    BASE: "var(--base)",
    CARD: "var(--card)",
}


@dataclass(frozen=True)
class Colours:
    """What a drawing is coloured with."""

    ink: str
    grid: str
    base: str
    series: Sequence[str]


PAGE = Colours(INK, GRID, BASE, SERIES)
PAPER = Colours(  # of a picture that stands alone: the page's light ones
    "#5b6470",
    "#dfe3e8",
    "#68707c",
    ["#2563c9", "#c4500b", "#0b7f63", "#8546c2", "#b52f68", "#776800", "#0b7495", "#59616d"],
)
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
POINTS = 1200  # of one drawn line; longer ones are thinned, and the table keeps every point

WIDE, NARROW, SMALL = (920, 340), (400, 300), (440, 210)  # in CSS pixels


@dataclass(frozen=True)
class Line:
    """One curve. series counts the page's colours from 0; faint ones lie behind; dots marks each point."""

    x: Sequence[float]
    y: Sequence[float]
    series: int = 0
    faint: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal dashed line, with its label."""

    y: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A ringed point with a label."""

    x: float
    y: float
    label: str
    series: int = 1


def line_chart(
    name: str,
    lines: Sequence[Line],
    *,
    size: tuple[int, int] = SMALL,
    title: str,
    levels: Sequence[Level] = (),
    marks: Sequence[Mark] = (),
    zero: bool = False,
) -> str:
    """Curves over the step.

    name   unlike that of any other drawing of the page: it begins the drawing's ids
    title  read aloud by screen readers
    zero   the y axis begins at 0
    """

    def draw(axes: Any) -> None:
        for line in lines:
            x, y = thin(line.x, line.y)
            colour = SERIES[line.series % len(SERIES)]
            style = DASHES[line.series // len(SERIES) % len(DASHES)]
            faint: dict[str, Any] = {"linewidth": 1, "alpha": 0.35, "zorder": 2}
            strong: dict[str, Any] = {"linewidth": 2, "zorder": 3}
            axes.plot(x, y, color=colour, linestyle=style, **(faint if line.faint else strong))
            if line.dots or len(x) == 1:
                axes.plot(x, y, "o", color=colour, markersize=4, zorder=4)
        for level in levels:
            axes.axhline(level.y, color=BASE, linewidth=1.4, linestyle=(0, (4, 3)), zorder=2)
            place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "ha": "right"}
            axes.annotate(level.label, (1, level.y), xytext=(-2, -13), color=BASE, **place)
        axes.margins(x=0.015)
        for mark in marks:
            draw_mark(axes, mark)
        axes.set_xlabel("step", loc="right", labelpad=1)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if zero:
            axes.set_ylim(0, 1.1 * max((max(line.y) for line in lines), default=1) or 1)

    return drawing(name, size, title, draw)


def draw_mark(axes: Any, mark: Mark) -> None:
    """A ring on the point, and its label in the emptier half of the chart."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    late = mark.x > (left + right) / 2
    colour = SERIES[mark.series]
    axes.plot([mark.x], [mark.y], "o", ms=10, mfc="none", mec=colour, mew=2, zorder=5)
    axes.annotate(
        mark.label,
        (mark.x, mark.y),
        xytext=(mark.x, 0.68 if mark.y < (low + high) / 2 else 0.12),
        textcoords=("data", "axes fraction"),
        ha="right" if late else "left",
        color=colour,
        fontweight="bold",
        bbox={"facecolor": CARD, "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
        arrowprops={
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 1,
            "shrinkB": 6,
            "relpos": (float(late), 0),
        },
        zorder=6,
    )


def bar_chart(
    name: str, labels: Sequence[str], heights: Sequence[float], *, size: tuple[int, int] = SMALL, title: str
) -> str:
    """Bars side by side, such as a histogram; as many labels are written as fit."""

    def draw(axes: Any) -> None:
        places = range(len(heights))
        axes.bar(places, heights, width=0.86, color=SERIES[0])
        every = max(1, -(-len(labels) * max(map(len, labels), default=1) * 7 // size[0]))
        axes.set_xticks(list(places)[::every], list(labels)[::every])
        axes.margins(x=0.01)

    return drawing(name, size, title, draw)


def drawing(name: str, size: tuple[int, int], title: str, draw: Callable[[Any], None]) -> str:
    """An SVG element with what `draw` puts on its axes."""

    def on_axes(figure: Any, _: Colours) -> None:
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        draw(axes)

    return figure_drawing(name, size, title, on_axes)


Draw = Callable[[Any, Colours], None]  # puts axes and what is on them on a figure


def figure_drawing(name: str, size: tuple[int, int], title: str, draw: Draw) -> str:
    """An SVG element with what `draw` puts on a figure."""
    return inline(as_svg(size, draw, PAGE), name, size, title)


def figure_files(stem: Path, size: tuple[int, int], draw: Draw) -> list[Path]:
    """The same as two files on white, stem.svg and stem.png."""
    figure_class, style = matplotlib_parts()
    svg, png = stem.with_name(f"{stem.name}.svg"), stem.with_name(f"{stem.name}.png")
    write_text(svg, as_svg(size, draw, PAPER))
    with style(look(PAPER)):
        figure = figure_class(figsize=(size[0] / 72, size[1] / 72), layout="constrained", facecolor="white")
        draw(figure, PAPER)
        pixels = io.BytesIO()
        figure.savefig(pixels, format="png", dpi=144, metadata={"Software": None})
    write_bytes(png, pixels.getvalue())
    return [svg, png]


def as_svg(size: tuple[int, int], draw: Draw, colours: Colours) -> str:
    figure_class, style = matplotlib_parts()
    with style(look(colours)):
        figure = figure_class(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        figure.patch.set_visible(colours is not PAGE)
        draw(figure, colours)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def look(colours: Colours) -> dict[str, Any]:
    """matplotlib's settings for every drawing."""
    return {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "svg.hashsalt": "loraloom",
        "font.size": 11,
        "font.family": "DejaVu Sans",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.facecolor": "none",
        "axes.edgecolor": colours.grid,
        "axes.labelcolor": colours.ink,
        "axes.titlecolor": colours.ink,
        "axes.titlesize": 11,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": colours.grid,
        "grid.linewidth": 1,
        "xtick.color": colours.ink,
        "ytick.color": colours.ink,
        "ytick.major.size": 0,
        "xtick.major.size": 3,
        "axes.formatter.limits": (-3, 5),
    }


def heat_panel(axes: Any, rows: Sequence[Sequence[float]], *, top: float = 1.0) -> Any:
    """A heat map of numbers from 0 to `top`, the first row above; rows and columns are counted from 1."""
    height, width = len(rows), max(map(len, rows))
    image = axes.imshow(
        rows,
        cmap="viridis",
        vmin=0,
        vmax=top,
        aspect="auto",
        interpolation="none",
        extent=(0.5, width + 0.5, height + 0.5, 0.5),
    )
    for axis, count in ((axes.xaxis, width), (axes.yaxis, height)):
        axis.set_ticks(ticks(count))
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return image


def ticks(count: int) -> list[int]:
    """1 and a few round places up to the last one."""
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 1 << 30) if count <= 6 * s)
    return [1, *range(max(step, 2), count + 1, step)]


def inline(svg: str, name: str, size: tuple[int, int], title: str) -> str:
    """matplotlib's SVG file as an element of a page: the page's colours and font, and ids of its own."""
    body = svg[svg.index("<svg") : svg.rindex("</svg>")]
    body = body[body.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"font(?:-family)?: [^;\"]*;? ?", lambda found: keep_size(found[0]), body)
    body = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', body)
    body = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", body)
    body = re.sub(r'xlink:href="#([^"]*)"', rf'href="#{name}-\1"', body)
    body = re.sub(r'xlink:href="(data:[^,"]*,)\s*', r'href="\1', body)
    body = re.sub(r"#a1b2[0-9a-f]{2}", lambda found: VARIABLES.get(found[0], found[0]), body)
    body = re.sub(r"\s*\n\s*", " ", body)
    head = f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{title}">'
    return f"{head}{body.strip()}</svg>"


def keep_size(declaration: str) -> str:
    """A CSS font declaration without the family, which is the page's."""
    found = re.search(r"([\d.]+)px", declaration)
    return f"font-size: {found[1]}px; " if found else ""


def thin(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most about POINTS points that keep the extremes of each stretch, so that no spike is lost."""
    if len(x) <= POINTS:
        return list(x), list(y)
    stretch = -(-2 * len(x) // POINTS)
    kept: list[int] = []
    for start in range(0, len(x), stretch):
        inside = range(start, min(start + stretch, len(x)))
        kept += sorted({min(inside, key=lambda i: y[i]), max(inside, key=lambda i: y[i])})
    return [x[i] for i in kept], [y[i] for i in kept]


def matplotlib_parts() -> tuple[Any, Any]:
    """matplotlib's Figure and rc_context.

    raises  UserError if it is not installed
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("the report needs matplotlib", hint="pip install 'loraloom[report]'") from None
    return Figure, rc_context
